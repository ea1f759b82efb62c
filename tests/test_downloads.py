"""Downloads, against a web server on 127.0.0.1 that misbehaves on purpose: the right file, or one line that says
why not. The data sets that come over the network, and OpenAI's weights. Every test runs in its own empty folder."""

import copy
import gzip
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from functools import cache, partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tiktoken
import torch
from conftest import ROOT
from test_prepare_data import GPT2_CACHE, PROSE, UNICODE, contents, write, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2
import prepare_data
import sample

TOKEN = "hf_SecretOfTheTests"
# Every line is another one: bytes put together from two places, or from two files, do not go unseen.
BODY = "".join(f"line {i} of the file, {i * i}\n" for i in range(10_000)).encode()  # ~320 kB
OTHER = BODY.replace(b"line", b"verse").replace(b"file", b"fil")  # as long, and different everywhere
assert len(OTHER) == len(BODY)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test stands in an empty folder, waits little between tries, and knows no proxy, token or cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(prepare_data, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(prepare_data, "TIMEOUT", 5)
    return tmp_path


# --- a web server that does as it is told


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site = self.server.site
        with site.lock:
            answers = site.pages.get(self.path, [status(404)])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]  # the last one answers for ever
            log = SimpleNamespace(path=self.path, headers=self.headers, time=time.monotonic(), status=None)
            site.requests.append(log)
        try:
            answer(self)
        except OSError:  # the client has gone
            self.close_connection = True

    do_CONNECT = do_GET  # a proxy is asked for https in this way

    def send_response(self, code, message=None):
        self.server.site.requests[-1].status = code
        super().send_response(code, message)

    def log_message(self, *args):
        pass


class Site:
    """The server. serve(path, answer, answer, ...) gives the answers one after the other, and the last one from then
    on; `requests` remembers what was asked."""

    def __init__(self):
        self.pages, self.requests, self.lock, self.closing = {}, [], threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close, self.server.site = True, False, self
        self.server.handle_error = lambda *args: None  # clients that go away are meant
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, path, *answers):
        """Returns the address."""
        self.pages[path] = list(answers)
        return self.url + path if path.startswith("/") else path

    def asked(self, path):
        """The requests for a path."""
        return [request for request in self.requests if request.path == path]

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def page(body, *, first=None, then="close", claim=0, ranges=True, if_range=True, **headers):
    """An answer with a file, or the part of it that is asked for. first: how many bytes of it are sent before `then`:
    the connection is closed, or reset, or hangs. claim: added to the true Content-Length. Headers: ETag='"1"'."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        wanted = handler.headers.get("If-Range")
        if not ranges or (if_range and wanted and wanted not in headers.values()):
            asked = None
        start = int(asked[1]) if asked else 0
        if asked and start >= len(body) + claim:
            status(416, Content_Range=f"bytes */{len(body) + claim}")(handler)
            return
        part = body[start : int(asked[2]) + 1 if asked and asked[2] else None]
        handler.send_response(206 if asked else 200)
        if asked:
            end = start + len(part) + claim - 1
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(body) + claim}")
        handler.send_header("Content-Length", str(len(part) + claim))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(part[:first])
        handler.wfile.flush()
        if first is not None and then == "hang":
            handler.server.site.closing.wait(20)
        if first is not None and then == "reset":
            time.sleep(0.05)  # what was sent must arrive before
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        if first is not None or claim:
            handler.close_connection = True

    return answer


def status(code, text=b"", **headers):
    """An answer that is no file."""

    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    answer.__name__ = str(code)  # what pytest calls it
    return answer


def redirect(to, code=302, **headers):
    return status(code, Location=to, **headers)


def chunked(body, stop=None):
    """An answer that does not say how long it is; with `stop`, one that breaks off there."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for i in range(0, len(body[:stop]), 50_000):
            piece = body[:stop][i : i + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n" if stop is None else b"")
        handler.close_connection = True

    return answer


def drip(body, n_pieces, seconds):
    """A slow answer that never quite stops."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        size = -(-len(body) // n_pieces)
        for i in range(0, len(body), size):
            handler.wfile.write(body[i : i + size])
            time.sleep(seconds / n_pieces)

    return answer


def silence(handler):
    """An answer that never begins."""
    handler.server.site.closing.wait(20)
    handler.close_connection = True


def hang_up(handler):
    """No answer at all."""
    handler.close_connection = True


def compressed(body):
    """What many servers do with text when a client says that it understands gzip."""

    def answer(handler):
        if "gzip" in handler.headers.get("Accept-Encoding", ""):
            page(gzip.compress(body), ranges=False, Content_Encoding="gzip")(handler)
        else:
            page(body)(handler)

    return answer


# --- what a test does with it


def prepare(name, *argv):
    """Runs the script in this process: token files of bytes, everything in train.bin."""
    prepare_data.main([name, *(["--tokenizer", "bytes"] if "--tokenizer" not in argv else []), *map(str, argv)])


def get(url):
    """What the script makes of the file at an address."""
    prepare("shakespeare", "--url", url, "--val-fraction", 0)
    return documents("shakespeare")[0]


def downloads():
    """name -> bytes of what lies in data/downloads."""
    return contents("data/downloads") if Path("data/downloads").is_dir() else {}


def documents(name, split="train"):
    ids = np.fromfile(f"data/{name}/{split}.bin", dtype="<u2")
    parts = np.split(ids, np.flatnonzero(ids == 256))
    return [part[part < 256].astype(np.uint8).tobytes() for part in parts]


def error(name, *argv):
    """The one line that the script ends with. It leaves nothing that looks whole."""
    with pytest.raises(SystemExit) as e:
        prepare(name, *argv)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code, e.value.code
    folder = Path("data", name)
    assert not folder.exists() or not any(p.suffix in (".bin", ".json") for p in folder.iterdir())
    return e.value.code


def fails(url):
    """The one line that a download ends with. No file has its final name."""
    said = error("shakespeare", "--url", url, "--val-fraction", 0)
    assert [name for name in downloads() if ".part" not in name] == []
    return said


def start(*argv, **env):
    """The script in a process of its own, in the folder of the test."""
    command = [sys.executable, prepare_data.__file__, *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    awake = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, preexec_fn=awake, **pipes)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never came"
        time.sleep(0.01)


# --- a download that goes well


def test_bins_from_the_server_equal_bins_from_the_file(site):
    url = site.serve("/input.txt", page(PROSE.encode() * 20))
    prepare("shakespeare", "--url", url, "--tokenizer", "bpe:300")
    prepare(str(write("input.txt", PROSE * 20)), "--tokenizer", "bpe:300")
    assert contents("data/shakespeare") == contents("data/input")
    assert set(contents("data/input")) == {"train.bin", "val.bin", "meta.json", "tokenizer.tiktoken"}
    assert len(site.requests) == 1


def test_make_data_takes_a_data_set_by_name(site):
    """With the interpreter of the tests in place of .venv, in the test's folder."""
    url = site.serve("/input.txt", page(PROSE.encode()))
    Path("prepare_data.py").symlink_to(prepare_data.__file__)
    command = ["make", "-f", ROOT / "Makefile", "-o", ".venv/installed", "data", f"PY={sys.executable}"]
    command += ["DATASET=shakespeare", "TOKENIZER=bytes", f"ARGS=--url {url}"]
    subprocess.run(command, check=True, capture_output=True)
    prepare(str(write("input.txt", PROSE)))
    assert contents("data/shakespeare") == contents("data/input")


def test_the_file_gets_its_name_when_it_is_whole(site):
    assert get(site.serve("/input.txt", page(BODY, first=200_000), page(BODY))) == BODY
    assert list(downloads().values()) == [BODY] and ".part" not in next(iter(downloads()))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site, code):
    site.serve("/there/text", page(BODY))
    assert get(site.serve("/input.txt", redirect("/there/text", code))) == BODY


def test_a_download_without_a_length(site):
    assert get(site.serve("/input.txt", chunked(BODY))) == BODY


def test_a_server_that_likes_to_compress(site):
    """Lengths, ranges and checksums are those of the file, so it is asked for as it is."""
    assert get(site.serve("/input.txt", compressed(BODY))) == BODY


def test_an_address_with_a_question_mark(site):
    """As the hub's own download links have."""
    url = site.serve("/input.txt?download=true", page(BODY))
    assert get(url) == BODY


def test_an_empty_file_is_no_text(site):
    assert "no text" in error("shakespeare", "--url", site.serve("/input.txt", page(b"")))


def test_two_addresses_that_end_alike_are_two_files(site):
    site.serve("/one/input.txt", page(BODY, ETag='"1"'))
    site.serve("/two/input.txt", page(OTHER, ETag='"2"'))
    assert get(site.url + "/one/input.txt") == BODY
    assert get(site.url + "/two/input.txt") == OTHER


# --- and ones that do not


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_connection_that_always_drops_after_some_bytes(site, then):
    """Every try gets further, so there are more of them than there are pauses."""
    assert len(BODY) > 50_000 * len(prepare_data.PAUSES)
    assert get(site.serve("/input.txt", page(BODY, first=50_000, then=then, ETag='"1"'))) == BODY
    assert len(prepare_data.PAUSES) + 2 < len(site.requests) < 3 * len(BODY) / 50_000
    assert all("Range" in request.headers for request in site.requests[1:])


def test_a_server_without_validators_is_resumed_too(site):
    assert get(site.serve("/input.txt", page(BODY, first=100_000))) == BODY
    assert site.requests[-1].status == 206


@pytest.mark.parametrize("n", [0, 1, 7, len(BODY) - 1])
def test_a_connection_that_drops_at_an_odd_place(site, n):
    assert get(site.serve("/input.txt", page(BODY, first=n), page(BODY))) == BODY


@pytest.mark.parametrize("answer", [hang_up, chunked(BODY, 100_000), status(408), *map(status, (500, 502, 503, 504))])
def test_a_fault_that_passes(site, answer):
    assert get(site.serve("/input.txt", answer, page(BODY))) == BODY


def test_a_fault_in_the_middle_costs_no_more_than_itself(site):
    url = site.serve("/input.txt", page(BODY, first=200_000), status(503), hang_up, page(BODY))
    assert get(url) == BODY
    assert site.requests[-1].status == 206


def test_a_server_that_ignores_range_is_read_from_the_start(site):
    url = site.serve("/input.txt", page(BODY, first=200_000, ranges=False), page(BODY, ranges=False))
    assert get(url) == BODY
    assert len(site.requests) == 2


def test_a_server_that_ignores_range_and_always_drops_is_given_up(site):
    said = fails(site.serve("/input.txt", page(BODY, first=200_000, ranges=False)))
    assert "/input.txt" in said
    assert len(site.requests) <= 2 * (len(prepare_data.PAUSES) + 1)


@pytest.mark.parametrize(
    "answer",
    [
        status(416),
        status(206, BODY[:99], Content_Range="bytes 0-98/99999"),
        status(206, BODY[99:], Content_Range=f"bytes 99-{len(BODY) - 1}/{len(BODY)}"),
        status(206, BODY, Content_Range="bytes */*"),
        status(206, BODY),
        status(204),
        status(300, b"choose"),
        status(302, b"somewhere else"),
        status(304),
    ],
)
@pytest.mark.parametrize("once", [True, False])
def test_an_answer_to_another_question_is_not_the_file(site, answer, once):
    """No part was asked for, nothing is known of an older version, and no place is named to go to."""
    if once:
        url = site.serve("/input.txt", answer, page(BODY))
        try:
            assert get(url) == BODY
        except SystemExit as e:  # given up at once: that is right, too
            assert isinstance(e.code, str) and "\n" not in e.code and len(site.requests) == 1
    else:
        fails(site.serve("/input.txt", answer))


def test_a_tls_handshake_that_breaks_off_is_tried_again():
    """As it does behind a busy server or proxy: that says nothing of its certificate."""
    accepted = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            nonlocal accepted
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                accepted += 1
                connection.recv(9999)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        fails(f"https://127.0.0.1:{server.getsockname()[1]}/input.txt")
        server.shutdown(socket.SHUT_RDWR)
    assert accepted == len(prepare_data.PAUSES) + 1


def test_a_part_that_begins_elsewhere_than_asked(site):
    """206, but from the start of the file: appended to what is there it would be twice in it."""

    def confused(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY)

    assert get(site.serve("/input.txt", page(BODY, first=200_000), confused, page(BODY))) == BODY


def test_too_many_requests_waits_as_long_as_it_is_told(site):
    assert get(site.serve("/input.txt", status(429, Retry_After="1"), page(BODY))) == BODY
    first, second = site.requests
    assert second.time - first.time >= 1


@pytest.mark.parametrize("after", ["0", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "nan", ""])
def test_a_retry_after_that_says_nothing_is_no_trouble(site, after):
    assert get(site.serve("/input.txt", status(429, Retry_After=after), page(BODY))) == BODY


def test_503_for_ever_is_one_line_after_all_the_pauses(site, capsys):
    said = fails(site.serve("/input.txt", status(503, b"<html>\nbusy")))
    assert "503" in said and f"{site.url}/input.txt" in said
    times = [request.time for request in site.requests]
    assert len(times) == len(prepare_data.PAUSES) + 1
    assert all(b - a >= pause for a, b, pause in zip(times, times[1:], prepare_data.PAUSES))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_an_answer_that_will_not_change_is_asked_for_once(site, code):
    assert str(code) in fails(site.serve("/input.txt", status(code, b"no such thing")))
    assert len(site.requests) == 1


@pytest.mark.parametrize("answer", [silence, page(BODY, first=100_000, then="hang")])
def test_a_server_that_hangs_is_asked_again(site, answer, monkeypatch):
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.3)
    assert get(site.serve("/input.txt", answer, page(BODY))) == BODY


def test_a_server_that_hangs_for_ever_is_given_up(site, monkeypatch):
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.2)
    fails(site.serve("/input.txt", page(BODY, first=100_000, then="hang", ranges=False)))


def test_a_server_that_is_slow_does_not_hang(site, monkeypatch):
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.4)
    assert get(site.serve("/input.txt", drip(BODY, 10, 1.0))) == BODY
    assert len(site.requests) == 1


def test_a_length_that_lies_for_ever(site):
    fails(site.serve("/input.txt", page(BODY, claim=100)))


def test_a_length_that_lied_once(site):
    assert get(site.serve("/input.txt", page(BODY, claim=100), page(BODY))) == BODY


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/input.txt"
    assert url in fails(url)


NO_ADDRESSES = [
    "input.txt",
    "ftp://127.0.0.1/a",
    "file:///etc/passwd",
    "http://",
    "http://[",
    "http://127.0.0.1:port/a",
]


@pytest.mark.parametrize("url", [*NO_ADDRESSES, "http://127.0.0.1:1/%00.txt"])
def test_an_address_that_is_none(url):
    fails(url)


@pytest.mark.parametrize("to", ["/input.txt", "file:///etc/passwd", "http://[", "", "gopher://127.0.0.1/"])
def test_a_redirect_that_leads_nowhere(site, to):
    fails(site.serve("/input.txt", redirect(to)))


# --- the file is what it says it is


@pytest.mark.parametrize("where", ["on the response", "on the redirect"])
def test_other_bytes_of_the_right_length_are_asked_for_again(site, where):
    said = {"X_Linked_Etag": f'"{sha256(BODY).hexdigest()}"'}
    if where == "on the response":
        site.serve("/input.txt", page(OTHER, **said), page(BODY, **said))
    else:
        site.serve("/input.txt", redirect("/blob", **said))
        site.serve("/blob", page(OTHER), page(BODY))
    assert get(site.url + "/input.txt") == BODY


@pytest.mark.parametrize("where", ["on the response", "on the redirect"])
def test_other_bytes_of_the_right_length_for_ever(site, where):
    said = {"X_Linked_Etag": f'"{sha256(BODY).hexdigest()}"'}
    wrong = BODY[:-2] + b"!\n"
    site.serve("/input.txt", page(wrong, **said) if where == "on the response" else redirect("/blob", **said))
    site.serve("/blob", page(wrong))
    assert "SHA-256" in fails(site.url + "/input.txt")


def test_a_wrong_byte_before_the_joint_is_found(site):
    """The connection drops, the rest is right: only the sum of it all is not."""
    said = {"X_Linked_Etag": sha256(BODY).hexdigest()}
    wrong = b"X" + BODY[1:]
    assert get(site.serve("/input.txt", page(wrong, first=200_000, **said), page(BODY, **said))) == BODY


def test_a_git_hash_is_no_checksum(site):
    """The hub's X-Linked-Etag of a small file is the 40 digits of its git blob."""
    assert get(site.serve("/input.txt", page(BODY, X_Linked_Etag='"' + "0" * 40 + '"'))) == BODY


VALIDATORS = {
    "ETag": ({"ETag": '"one"'}, {"ETag": '"two"'}),
    "weak ETag": ({"ETag": 'W/"one"'}, {"ETag": 'W/"two"'}),
    "Last-Modified": (
        {"Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
        {"Last_Modified": "Thu, 22 Oct 2015 07:28:00 GMT"},
    ),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("validator", VALIDATORS)
def test_a_file_that_changes_between_two_tries_is_begun_again(site, validator, if_range):
    """Of the same length. Servers need not know If-Range."""
    one, two = VALIDATORS[validator]
    url = site.serve("/input.txt", page(BODY, first=200_000, **one), page(OTHER, if_range=if_range, **two))
    assert get(url) == OTHER


@pytest.mark.parametrize("n", [100_000, 200_000, 210_000, len(BODY) - 1])
def test_a_file_that_changes_its_length_between_two_tries_is_begun_again(site, n):
    url = site.serve("/input.txt", page(BODY, first=200_000), page(OTHER[:n]))
    assert get(url) == OTHER[:n]


def test_a_file_that_always_changes_is_given_up(site):
    """Each try starts from nothing, so none of them is progress."""
    answers = [page([BODY, OTHER][i % 2], first=200_000, if_range=False, ETag=f'"{i}"') for i in range(40)]
    fails(site.serve("/input.txt", *answers))
    assert len(site.requests) < 40


# --- from one run to the next


def test_a_run_that_was_killed_is_taken_up_where_it_stopped(site):
    url = site.serve("/input.txt", page(BODY, first=200_000, then="hang", ETag='"1"'), page(BODY, ETag='"1"'))
    process = start("shakespeare", "--url", url)
    wait_for(lambda: sum(map(len, downloads().values())) >= 100_000)
    process.kill()
    process.communicate()
    assert all(".part" in name for name in downloads())
    assert get(url) == BODY
    assert len(site.requests) == 2 and site.requests[1].status == 206
    assert int(re.match(r"bytes=(\d+)-", site.requests[1].headers["Range"])[1]) > 50_000


@pytest.mark.parametrize("validator", VALIDATORS)
def test_a_file_that_changed_between_two_runs_is_begun_again(site, validator):
    one, two = VALIDATORS[validator]
    url = site.serve("/input.txt", page(BODY, first=200_000, **one), status(404))
    fails(url)
    site.serve("/input.txt", page(OTHER, if_range=False, **two))
    assert get(url) == OTHER


def test_a_run_that_failed_is_taken_up_where_it_stopped(site):
    url = site.serve("/input.txt", page(BODY, first=200_000, ETag='"1"'), status(503))
    fails(url)
    site.serve("/input.txt", page(BODY, ETag='"1"'))
    assert get(url) == BODY
    assert site.requests[-1].status == 206


def test_part_of_one_address_is_not_taken_for_another(site):
    fails(site.serve("/one/input.txt", page(BODY, first=200_000), status(404)))
    assert get(site.serve("/two/input.txt", page(OTHER))) == OTHER


def test_addresses_that_are_good_for_one_time_only(site):
    """As a hub's signed ones are: who resumes has to ask at the front door again."""
    site.serve("/input.txt", redirect("/blob?signed=1"), redirect("/blob?signed=2"))
    site.serve("/blob?signed=1", page(BODY, first=200_000, ETag='"1"'), status(403))
    site.serve("/blob?signed=2", page(BODY, ETag='"1"'))
    assert get(site.url + "/input.txt") == BODY
    assert site.requests[-1].status == 206


def test_on_the_command_line_a_failed_download_is_one_line_and_exit_code_1(site):
    process = start("shakespeare", "--url", site.serve("/input.txt", status(404)))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert "404" in err


def test_ctrl_c_keeps_the_part_and_says_little(site):
    url = site.serve("/input.txt", page(BODY, first=200_000, then="hang", ETag='"1"'), page(BODY, ETag='"1"'))
    process = start("shakespeare", "--url", url)
    wait_for(lambda: sum(map(len, downloads().values())) >= 100_000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err
    assert get(url) == BODY
    assert site.requests[-1].status == 206


def test_a_run_that_ended_just_before_the_file_got_its_name(site, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    url = site.serve("/input.txt", page(BODY, ETag='"1"'))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", stop)
        get(url)
    assert [".part" in name for name in downloads()] == [True]
    assert get(url) == BODY
    assert site.requests[-1].status == 206


def test_what_was_whole_before_does_where_the_server_is_gone(site):
    url = site.serve("/input.txt", page(BODY))
    assert get(url) == BODY
    site.serve("/input.txt", status(503))
    assert get(url) == BODY


def test_a_file_that_is_whole_is_not_sent_again_but_one_that_changed_is(site):
    url = site.serve("/input.txt", page(BODY, ETag='"1"'))
    assert get(url) == get(url) == BODY
    site.serve("/input.txt", page(OTHER, ETag='"2"'))
    assert get(url) == OTHER
    assert len(downloads()) == 1


# --- tokens, proxies and other addresses


def tokens_sent(site):
    return [request.headers.get("Authorization") for request in site.requests]


@pytest.fixture
def token(monkeypatch, capsys):
    """HF_TOKEN. Whatever is printed, it is not in it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield TOKEN
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err


def test_a_token_goes_to_a_server_on_this_machine(site, token):
    get(site.serve("/input.txt", page(BODY, first=200_000)))
    assert set(tokens_sent(site)) == {f"Bearer {TOKEN}"}


def test_no_token_is_sent_where_there_is_none(site):
    get(site.serve("/input.txt", page(BODY)))
    assert tokens_sent(site) == [None]


def test_a_token_goes_on_with_a_redirect_to_the_same_host(site, token):
    site.serve("/blob", page(BODY))
    get(site.serve("/input.txt", redirect("/blob")))
    assert tokens_sent(site) == [f"Bearer {TOKEN}"] * 2


def test_a_token_does_not_go_on_to_another_host(site, token):
    """Not at first, not when the download is resumed."""
    site.serve("/blob", page(BODY, first=200_000, ETag='"1"'))
    url = site.serve("/input.txt", redirect(f"http://localhost:{site.port}/blob"))
    assert get(url) == BODY
    assert [request.headers.get("Authorization") for request in site.asked("/blob")] == [None] * 2
    assert {request.headers.get("Authorization") for request in site.asked("/input.txt")} == {f"Bearer {TOKEN}"}


def test_a_proxy_is_used_and_a_token_goes_to_the_endpoint_alone(site, token, monkeypatch):
    """The proxy stands for the whole internet: hosts have any name here."""
    monkeypatch.setenv("HTTP_PROXY", site.url)
    monkeypatch.setattr(prepare_data, "HUB", "http://hub.example")
    site.serve("http://hub.example/input.txt", redirect("http://cdn.example/blob"))
    site.serve("http://cdn.example/blob", page(BODY))
    site.serve("http://elsewhere.example/input.txt", page(OTHER))
    assert get("http://hub.example/input.txt") == BODY
    assert tokens_sent(site) == [f"Bearer {TOKEN}", None]
    assert get("http://elsewhere.example/input.txt") == OTHER
    assert tokens_sent(site)[2:] == [None]


@pytest.mark.parametrize("host", ["hub.example.evil.example", "evil.example/hub.example", "huggingface.co.evil"])
def test_a_host_that_looks_like_another_gets_no_token(site, token, monkeypatch, host):
    monkeypatch.setenv("HTTP_PROXY", site.url)
    monkeypatch.setattr(prepare_data, "HUB", "http://hub.example")
    url = site.serve(f"http://{host}/input.txt", page(BODY))
    assert get(url) == BODY
    assert tokens_sent(site) == [None]


@pytest.mark.parametrize("answer", [status(401), status(403), status(503), hang_up, page(BODY, claim=9)])
def test_a_failed_download_does_not_say_the_token(site, token, answer):
    assert TOKEN not in fails(site.serve("/input.txt", answer))


@pytest.mark.parametrize("value", [f"{TOKEN}\n", f"  {TOKEN}\r\n", f"{TOKEN}\nX-Other: 1", f"{TOKEN}é漢"])
def test_a_token_with_a_slip_of_the_pen_is_not_shown(site, value, monkeypatch, capsys):
    """requests puts a header that it does not like into its error."""
    monkeypatch.setenv("HF_TOKEN", value)
    url = site.serve("/input.txt", page(BODY))
    try:
        assert get(url) == BODY
    except SystemExit as e:
        assert isinstance(e.code, str) and TOKEN not in e.code and "\n" not in e.code
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err


def test_the_password_of_a_proxy_is_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("HTTP_PROXY", "http://me:SecretOfTheProxy@127.0.0.1:9")
    said = fails("http://data.example/input.txt")
    captured = capsys.readouterr()
    assert "SecretOfTheProxy" not in said + captured.out + captured.err


def test_shakespeare_comes_from_github_through_the_proxy_for_https(site, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", site.url)
    site.serve("raw.githubusercontent.com:443", status(502))
    said = error("shakespeare")
    assert "raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt" in said
    assert {request.path for request in site.requests} == {"raw.githubusercontent.com:443"}


DEFAULTS = {
    "wikitext2": "/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
    "tinystories": "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
    "maths-college": "/datasets/ajibawa-2023/Maths-College/resolve/main/Maths-College-0-Final.json",
    "openwebmath": "/api/datasets/open-web-math/open-web-math/tree/main/data",
    "weights:gpt2": "/openai-community/gpt2/resolve/main/model.safetensors",
    "weights:gpt2-medium": "/openai-community/gpt2-medium/resolve/main/model.safetensors",
    "weights:gpt2-large": "/openai-community/gpt2-large/resolve/main/model.safetensors",
    "weights:gpt2-xl": "/openai-community/gpt2-xl/resolve/main/model.safetensors",
}


EACH_NAME = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import prepare_data
prepare_data.PAUSES = (0.01,)
for name in sys.argv[1:]:
    try:
        prepare_data.main([name, "--tokenizer", "bytes"])
        print(name, "went well")
    except SystemExit as e:
        print(e)
"""


def with_endpoint(url, *names):
    """The line that each of the names ends with when HF_ENDPOINT is `url`, which is read at import."""
    env = {**os.environ, "HF_ENDPOINT": url}
    command = [sys.executable, "-c", EACH_NAME, ROOT, *names]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_default_addresses_are_the_hubs_and_hf_endpoint_moves_them(site):
    said = with_endpoint(site.url + "/", *DEFAULTS)
    assert len(said) == len(DEFAULTS) and all("404" in line for line in said)
    assert [request.path for request in site.requests] == list(DEFAULTS.values())


def test_a_file_other_than_the_published_one_is_refused_without_url(site):
    """WikiText-2's sha256 is known; with --url it is not asked for."""
    url = site.serve(DEFAULTS["wikitext2"], page(zipped(WIKI)))
    assert "wikitext-2-raw-v1.zip" in with_endpoint(site.url, "wikitext2")[0]
    assert [name for name in downloads() if ".part" not in name] == []
    prepare("wikitext2", "--url", url)
    assert "wikitext-2-raw-v1.zip" in with_endpoint(site.url, "wikitext2")[0]  # although it lies there now


def test_help_names_every_data_set_with_its_size_and_source(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    text = capsys.readouterr().out
    hosts = dict.fromkeys(
        ["wikitext2", "tinystories", "maths-college", "openwebmath", "weights:gpt2"], "huggingface.co/"
    )
    for name, host in {**hosts, "shakespeare": "raw.githubusercontent.com/karpathy/", "stdlib": "library"}.items():
        about = re.search(rf"^  {name} .*(\n    .*)?", text, re.M)
        assert about and host in about[0] and re.search(r"\d [MG]B", about[0]), name
    assert all(size in text for size in ("gpt2-medium", "gpt2-large", "gpt2-xl"))


# --- WikiText-2

WIKI = {
    "train": " \n = First Title = \n \n A text with = signs = in it . \n \n = = Section = = \n \n More . \n"
    " = = = Deeper = = = \n Most . \n \n = Second , Title ( of 2 ) = \n \n Ünïcode . \n",
    "valid": " \n = Third = \n \n Held out . \n",
    "test": " \n = Fourth = \n \n Held out , too . \n \n = Fifth = \n \n And so . \n",
}


def zipped(texts, **others):
    """A zip as WikiText-2 comes in, with other members besides."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in texts.items():
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", text)
        for name, text in others.items():
            archive.writestr(name, text)
    return file.getvalue()


def wikitext2(site, archive, *argv):
    prepare("wikitext2", "--url", site.serve("/wikitext.zip", page(archive)), *argv)


def test_wikitext2_has_three_splits_and_articles_are_documents(site):
    wikitext2(site, zipped(WIKI, **{"./": "", "wikitext-2-raw/": "", "wikitext-2-raw/read.me": "Not read."}))
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        articles = re.split(r"(?m)^(?= = [^=]*[^= ] = $)", WIKI[name])[1:]
        assert len(articles) == {"train": 2, "val": 1, "test": 2}[split]
        assert [text.decode().strip() for text in documents("wikitext2", split)] == [text.strip() for text in articles]
    meta = json.loads(Path("data/wikitext2/meta.json").read_text(encoding="utf-8"))
    assert {split: counts["documents"] for split, counts in meta["splits"].items()} == {"train": 2, "val": 1, "test": 2}


def test_byte_pairs_are_learned_from_the_training_split_alone(site):
    train = WIKI["train"] + PROSE
    wikitext2(site, zipped({**WIKI, "train": train}), "--tokenizer", "bpe:290")
    learned = Path("data/wikitext2/tokenizer.tiktoken").read_bytes()
    site.serve("/other.zip", page(zipped({"train": train, "valid": " = A = \n zzzzzz" * 99, "test": " = B = \n qqqq"})))
    prepare("wikitext2", "--url", site.url + "/other.zip", "--tokenizer", "bpe:290")
    assert Path("data/wikitext2/tokenizer.tiktoken").read_bytes() == learned


def test_the_test_split_can_be_scored(site, capsys):
    wikitext2(site, zipped({split: text * 20 for split, text in WIKI.items()}))
    argv = "--data data/wikitext2 --out out --n-layer 1 --n-head 1 --n-embd 8 --block-size 16 --max-steps 1".split()
    gpt2.main([*argv, "--device", "cpu"])
    capsys.readouterr()
    gpt2.main(["--eval-only", "--split", "test", "--out", "out", "--device", "cpu"])
    n_tokens = json.loads(Path("data/wikitext2/meta.json").read_text())["splits"]["test"]["tokens"]
    assert f"test: {n_tokens:,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["../evil.raw", "wikitext-2-raw/../../evil.raw", "/tmp/evil-of-the-tests", "C:\\evil", "..\\evil", "a/../../evil"],
)
def test_a_zip_whose_names_point_outside_is_refused(site, name, folder):
    with pytest.raises(SystemExit) as e:
        wikitext2(site, zipped(WIKI, **{name: "evil"}))
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and "evil" in e.value.code
    assert not [path for path in folder.parent.rglob("*evil*") if path.is_file()]
    assert not Path("/tmp/evil-of-the-tests").exists() and not Path("data/wikitext2/train.bin").exists()


def test_a_zip_with_odd_bytes_never_ends_in_a_traceback(tmp_path):
    rng, body = random.Random(0), zipped(WIKI)
    for _ in range(150):
        changed = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(body))] = rng.randrange(256)
        path = write(tmp_path / "wikitext.zip", bytes(changed))
        try:
            list(prepare_data.read_wikitext(path, "strict"))
        except SystemExit as e:
            assert "\n" not in e.code
        except OSError:  # main's to report
            pass


def broken_zips():
    good = zipped(WIKI)
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        for split, text in WIKI.items():
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", text)
    yield "a web page", b"<html>Sign in first</html>"
    yield "nothing", b""
    yield "cut short", good[: len(good) // 2]
    yield "one byte changed", stored.getvalue().replace(b"Held out", b"Held oui", 1)
    yield "no test split", zipped({k: v for k, v in WIKI.items() if k != "test"})
    yield "not UTF-8", zipped({**WIKI, "valid": b" = Latin = \n \n caf\xe9 \n"})


@pytest.mark.parametrize("name, archive", [*broken_zips()])
def test_a_broken_zip_is_one_line_and_is_fetched_again(site, name, archive):
    with pytest.raises(SystemExit) as e:
        wikitext2(site, archive)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    assert not Path("data/wikitext2").exists() or contents("data/wikitext2") == {}
    wikitext2(site, zipped(WIKI))
    assert len(documents("wikitext2")) == 2


# --- TinyStories

STORIES = [PROSE, "Once upon a time.\n\nThe end.", UNICODE.strip(), "x", "A cat.\nA <|endof a hat.", "Good night."]


def stories(texts):
    return "\n<|endoftext|>\n".join(texts).encode()


@pytest.mark.parametrize("block", [16, 64, 2**16])
def test_tinystories_are_documents(site, block, monkeypatch):
    """However the blocks fall that the files are read in."""
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    train = site.serve("/train.txt", page(stories(STORIES)))
    valid = site.serve("/valid.txt", page(stories(STORIES[::-1]) + b"\n<|endoftext|>\n\n<|endoftext|>"))
    prepare("tinystories", "--url", train, valid)
    assert documents("tinystories") == [text.strip().encode() for text in STORIES]
    assert documents("tinystories", "val") == [text.strip().encode() for text in STORIES[::-1]]
    assert not Path("data/tinystories/test.bin").exists()


def test_tinystories_in_a_folder(site):
    site.serve("/folder/TinyStoriesV2-GPT4-train.txt", page(stories(STORIES)))
    site.serve("/folder/TinyStoriesV2-GPT4-valid.txt", page(stories(STORIES[:2])))
    for url in (site.url + "/folder", site.url + "/folder/"):
        prepare("tinystories", "--url", url)
        assert len(documents("tinystories")) == len(STORIES) and len(documents("tinystories", "val")) == 2


def test_one_story_of_many_blocks(site, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 64)
    train = site.serve("/train.txt", page(stories([PROSE * 20, "Short."])))
    prepare("tinystories", "--url", train, site.serve("/valid.txt", page(stories(["Short."]))))
    assert documents("tinystories") == [(PROSE * 20).strip().encode(), b"Short."]


def test_a_story_that_is_not_utf8_is_one_line_or_replaced(site):
    train = site.serve("/train.txt", page(stories(STORIES) + b"<|endoftext|>caf\xe9 <|endoftext|>"))
    valid = site.serve("/valid.txt", page(stories(STORIES)))
    assert "UTF-8" in error("tinystories", "--url", train, valid)
    prepare("tinystories", "--url", train, valid, "--errors", "replace")
    assert documents("tinystories")[-1] == "caf\ufffd".encode()


# --- Maths-College

SUMS = [
    {
        "instruction": f"What is {i} + {i}? {UNICODE[i % 60 : i % 60 + 9]}",
        "output": f'"{i + i}" [\\boxed{{{i + i}}}], {{',
    }
    for i in range(120)
]
SUMS[3] = {"output": PROSE * 3, "instruction": "Read.", "other": {"nested": [1, "]"]}, "more": None}


def maths_text(row):
    return row["instruction"] + "\n\n" + row["output"]


MATHS_FILES = {
    "an array": json.dumps(SUMS),
    "an indented array": "\n\n" + json.dumps(SUMS, indent=2, ensure_ascii=False) + "\n",
    "an array without white space": json.dumps(SUMS, separators=(",", ":")),
    "lines": "".join(json.dumps(row) + "\n" for row in SUMS),
    "lines of any letters": "\n".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in SUMS),
}


@pytest.mark.parametrize("block", [16, 1000, 2**16])
@pytest.mark.parametrize("name", MATHS_FILES)
def test_maths_college_is_an_array_or_lines(site, name, block, monkeypatch):
    """And the same as a .jsonl of the same texts."""
    url = site.serve("/maths.json", page(MATHS_FILES[name].encode()))
    prepare(str(write_jsonl("maths.jsonl", map(maths_text, SUMS))), "--val-fraction", 0.3)
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    prepare("maths-college", "--url", url, "--val-fraction", 0.3)
    assert contents("data/maths-college") == contents("data/maths")
    assert {"train.bin", "val.bin"} < set(contents("data/maths"))


BROKEN_MATHS = {
    "empty": "",
    "an empty array": "[]",
    "cut short in an object": json.dumps(SUMS)[:5000],
    "cut short between objects": "[" + json.dumps(SUMS[0]) + ",",
    "no end": "[" + json.dumps(SUMS[0]),
    "text after the end": json.dumps(SUMS[:3]) + " and more",
    "a number": "17",
    "a list of texts": json.dumps(["text"] * 3),
    "no output": json.dumps([{"instruction": "What?"}]),
    "an output that is a number": json.dumps([{"instruction": "What?", "output": 5}]),
    "an instruction that is null": json.dumps([{"instruction": None, "output": "5"}]),
    "a bad line": "".join(json.dumps(row) + "\n" for row in SUMS) + '{"instruction": "a", "output"\n',
    "a web page": "<html>Sign in first</html>",
    "deep": "[" * 100_000,
    "deep in a field": '[{"instruction": ' + "[" * 100_000 + "}]",
    "a lone surrogate": '[{"instruction": "\\ud800", "output": "a"}]',
    "not UTF-8": json.dumps(SUMS).encode()[:-1] + b', {"instruction": "\xff", "output": "a"}]',
}


@pytest.mark.parametrize("name", BROKEN_MATHS)
def test_broken_maths_is_one_line_that_names_the_file(site, name, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 1000)
    body = BROKEN_MATHS[name]
    url = site.serve("/folder/maths.json", page(body if isinstance(body, bytes) else body.encode()))
    said = error("maths-college", "--url", url)
    assert "maths" in said and len(said) < 500


def six_files(site, folder=""):
    """The six files of the hub under an address, 20 objects in each."""
    for i in range(6):
        body = json.dumps(SUMS[20 * i : 20 * i + 20]).encode()
        site.serve(f"{folder}/Maths-College-{i}-Final.json", page(body, ETag=f'"{i}"'))
    return site.url + folder


def expected(rows):
    return [maths_text(row).encode() for row in rows]


@pytest.mark.parametrize("shards, rows", [(None, SUMS), ("0-5", SUMS), ("2", SUMS[40:60]), ("1-3", SUMS[20:80])])
def test_shards_takes_some_of_the_files_in_their_order(site, shards, rows):
    url = six_files(site, "/maths")
    prepare("maths-college", "--url", url, "--val-fraction", 0, *(["--shards", shards] if shards else []))
    assert documents("maths-college") == expected(rows)
    assert len(site.requests) == len(rows) / 20


def test_several_addresses_in_the_order_given(site):
    url = six_files(site)
    urls = [f"{url}/Maths-College-{i}-Final.json" for i in (3, 1)]
    prepare("maths-college", "--url", *urls, "--val-fraction", 0)
    assert documents("maths-college") == expected(SUMS[60:80] + SUMS[20:40])


@pytest.mark.parametrize("shards", ["6", "4-6", "3-1", "-1", "one", "1-", "0,1", "1-2-3", "9" * 5000])
def test_shards_that_are_not_there_are_one_line(site, shards):
    said = error("maths-college", "--url", six_files(site), f"--shards={shards}")
    assert "shards" in said and len(said) < 500
    assert site.requests == []


# --- a run of several files goes on where it was


@pytest.fixture
def encoded(monkeypatch):
    """The texts that this process has encoded, as a list that grows. `encoded.stop_at`: Ctrl-C before such a text."""

    class Texts(list):
        stop_at = None

    texts, original = Texts(), tiktoken.Encoding.encode_to_numpy

    def encode(self, text, **kwargs):
        if texts.stop_at and texts.stop_at in text:
            raise KeyboardInterrupt
        texts.append(text)
        return original(self, text, **kwargs)

    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", encode)
    return texts


def test_a_run_of_several_files_that_was_killed_goes_on(site, encoded):
    """kill -9 while the fourth file is on its way."""
    url = six_files(site)
    fourth = "/Maths-College-3-Final.json"
    whole = site.pages[fourth]
    prepare("maths-college", "--url", url, "--out", "whole")
    assert "".join(encoded) == "".join(map(maths_text, SUMS))
    encoded.clear()
    Path("data/downloads").rename("elsewhere")
    site.serve(fourth, silence)
    process = start("maths-college", "--url", url, "--tokenizer", "bytes")
    wait_for(lambda: len(site.asked(fourth)) == 2)
    process.kill()
    process.communicate()
    assert not {"meta.json", "train.bin", "val.bin"} & set(contents("data/maths-college"))
    site.requests.clear()
    site.serve(fourth, *whole)
    prepare("maths-college", "--url", url)
    assert contents("data/maths-college") == contents("whole")
    assert "".join(encoded) == "".join(map(maths_text, SUMS[60:]))
    assert [request.path[-12] for request in site.requests] == ["3", "4", "5"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_ctrl_c_while_encoding_several_files(site, encoded, tokenizer):
    argv = ["maths-college", "--url", six_files(site), "--val-fraction", 0.3, "--tokenizer", tokenizer]
    prepare(*argv, "--out", "whole")
    encoded.clear()
    encoded.stop_at = "What is 70 + 70?"
    with pytest.raises(SystemExit) as e:
        prepare(*argv)
    assert e.value.code == 130
    assert not {"meta.json", "train.bin", "val.bin"} & set(contents("data/maths-college"))
    encoded.clear()
    encoded.stop_at = None
    prepare(*argv)
    assert contents("data/maths-college") == contents("whole")
    assert "".join(encoded) == "".join(map(maths_text, SUMS[60:]))


OTHER_RUNS = {
    "another tokenizer": ["--tokenizer", "bpe:300"],
    "no validation": ["--val-fraction", "0"],
    "another order": ["--shards", "1-2"],
    "other errors": ["--errors", "replace"],
}


@pytest.mark.parametrize("before", [None, *OTHER_RUNS])
@pytest.mark.parametrize("after", [None, *OTHER_RUNS])
def test_what_a_failed_run_left_is_not_taken_for_part_of_another(site, before, after):
    url = six_files(site)
    last = "/Maths-College-2-Final.json"
    whole = site.pages[last]
    argv = ["maths-college", "--url", url, "--shards", "0-2", "--val-fraction", 0.3]
    prepare(*argv, *OTHER_RUNS.get(after, []), "--out", "whole")
    Path("data/downloads").rename("elsewhere")
    site.serve(last, status(404))
    with pytest.raises(SystemExit):
        prepare(*argv, *OTHER_RUNS.get(before, []))
    site.serve(last, *whole)
    prepare(*argv, *OTHER_RUNS.get(after, []))
    assert contents("data/maths-college") == contents("whole")


def test_what_a_failed_run_of_another_data_set_left_in_the_folder_goes(site):
    """WikiText-2 has a test.bin. It breaks off in it, and then stands where another data set is wanted."""
    archive = zipped({**WIKI, "test": WIKI["test"].encode() + b"caf\xe9\n"})
    with pytest.raises(SystemExit):
        prepare("wikitext2", "--url", site.serve("/wikitext.zip", page(archive)), "--out", "out")
    url = site.serve("/input.txt", page(PROSE.encode()))
    prepare("shakespeare", "--url", url, "--out", "out")
    assert set(contents("out")) == {"train.bin", "val.bin", "meta.json"}


# --- OpenWebMath


class ParquetFile:
    """What stands in for pyarrow's where that is not installed: a Parquet file here is lines of JSON."""

    def __init__(self, path):
        self.rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        self.schema_arrow = SimpleNamespace(names=list(self.rows[0]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def iter_batches(self, batch_size, columns):
        for i in range(0, len(self.rows), batch_size):
            rows = self.rows[i : i + batch_size]
            values = {name: [row[name] for row in rows] for name in columns}
            yield SimpleNamespace(column=lambda name, v=values: SimpleNamespace(to_pylist=lambda: v[name]))


@pytest.fixture
def lines_for_parquet(monkeypatch):
    for name, content in (("pyarrow", {"ArrowException": OSError}), ("pyarrow.parquet", {"ParquetFile": ParquetFile})):
        module = ModuleType(name)
        module.__dict__.update(content, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["pyarrow"].parquet = sys.modules["pyarrow.parquet"]


ROOT_OF_DATA = "/datasets/open-web-math/open-web-math"
TREE = f"/api{ROOT_OF_DATA}/tree/main/data"
PAGES = [[f"Shard {i}, text {j}: {PROSE[j : j + 50]}" for j in range(5)] for i in range(4)]  # of the web


def as_lines(texts):
    return "".join(json.dumps({"text": text, "url": "https://example.com"}) + "\n" for text in texts).encode()


def as_parquet(texts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"url": ["https://example.com"] * len(texts), "text": texts}), file)
    return file.getvalue()


def hub(site, pack=as_lines, per_page=3):
    """The hub's data set: a list of files in pages, and the files. Returns its address."""
    entries = [{"type": "directory", "path": "data/old", "size": 0, "oid": "1"}]
    entries += [{"type": "file", "path": "data/README.md", "size": 12, "oid": "2"}]
    for i, texts in enumerate(PAGES):
        path, body = f"data/train-{i:05}-of-00004-{i}a2b.parquet", pack(texts)
        lfs = {"oid": sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        entries.append({"type": "file", "path": path, "size": len(body), "oid": "3", "lfs": lfs})
        site.serve(f"{ROOT_OF_DATA}/resolve/main/{path}", page(body, ETag=f'"{i}"'))
    for start in range(0, len(entries), per_page):
        more, path = start + per_page < len(entries), TREE + (f"?cursor={start}" if start else "")
        headers = {"Link": f'<{site.url}{TREE}?cursor={start + per_page}>; rel="next"'} if more else {}
        body = json.dumps(entries[start : start + per_page]).encode()
        site.serve(path, page(body, ranges=False, Content_Type="application/json", **headers))
    return site.url + ROOT_OF_DATA


def texts_of(pages):
    return [text.encode() for texts in pages for text in texts]


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("per_page", [1, 3, 100])
def test_openwebmath_is_listed_page_after_page(site, per_page, slash, lines_for_parquet):
    prepare("openwebmath", "--url", hub(site, per_page=per_page) + slash, "--val-fraction", 0)
    assert documents("openwebmath") == texts_of(PAGES)


@pytest.mark.parametrize("shards, pages", [("0-3", PAGES), ("2", PAGES[2:3]), ("1-2", PAGES[1:3])])
def test_shards_of_openwebmath(site, shards, pages, lines_for_parquet):
    prepare("openwebmath", "--url", hub(site), "--shards", shards, "--val-fraction", 0)
    assert documents("openwebmath") == texts_of(pages)
    assert sum(request.path.endswith(".parquet") for request in site.requests) == len(pages)


def test_openwebmath_from_addresses_of_its_files(site, lines_for_parquet):
    urls = [site.serve(f"/{i}.parquet?download=true", page(as_lines(PAGES[i]))) for i in (2, 0)]
    prepare("openwebmath", "--url", *urls, "--val-fraction", 0)
    assert documents("openwebmath") == texts_of([PAGES[2], PAGES[0]])


def test_a_shard_other_than_the_one_listed_is_fetched_again(site, lines_for_parquet):
    url = hub(site)
    path = f"{ROOT_OF_DATA}/resolve/main/data/train-00001-of-00004-1a2b.parquet"
    wrong = as_lines(PAGES[1]).replace(b"best", b"last")
    site.serve(path, page(wrong, ETag='"x"'), *site.pages[path])
    prepare("openwebmath", "--url", url, "--val-fraction", 0)
    assert documents("openwebmath") == texts_of(PAGES)
    site.serve(path, page(wrong, ETag='"y"'))
    Path("data").rename("elsewhere")
    assert path in error("openwebmath", "--url", url, "--tokenizer", "bpe:300")
    assert len([name for name in downloads() if ".part" not in name]) == 1  # the one before it


BAD_LISTS = {
    "no JSON": page(b"<html>Sign in first</html>"),
    "an error": page(b'{"error": "no such data set"}'),
    "nothing": page(b"[]"),
    "no file of ours": page(b'[{"type": "file", "path": "data/README.md", "size": 3}]'),
    "not found": status(404),
    "busy for ever": status(503),
    "no size": page(b'[{"type": "file", "path": "data/a.parquet"}]'),
    "numbers": page(b"[1, 2]"),
    "a size that is none": page(b'[{"path": "data/a.parquet", "size": "large"}]'),
    "a next page that is none": page(b"[]", Link='<file:///etc/passwd>; rel="next"'),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_of_files_is_one_line(site, name, lines_for_parquet):
    site.serve(TREE, BAD_LISTS[name])
    assert len(error("openwebmath", "--url", site.url + ROOT_OF_DATA)) < 500


def test_a_list_that_never_ends_is_one_line(site, lines_for_parquet):
    again = page(b'[{"path": "data/a.parquet", "size": 9}]', Link=f'<{site.url}{TREE}>; rel="next"')
    site.serve(TREE, *[again] * 50, status(404))
    error("openwebmath", "--url", site.url + ROOT_OF_DATA)
    assert len(site.requests) < 50


def test_a_list_whose_server_stumbles(site, lines_for_parquet):
    url = hub(site)
    site.serve(TREE, status(500), hang_up, page(b"[{", first=1, claim=9), *site.pages[TREE])
    prepare("openwebmath", "--url", url, "--val-fraction", 0)
    assert documents("openwebmath") == texts_of(PAGES)


def test_the_token_goes_to_the_list_and_not_to_a_next_page_elsewhere(site, token, monkeypatch, lines_for_parquet):
    monkeypatch.setenv("HTTP_PROXY", site.url)
    monkeypatch.setattr(prepare_data, "HUB", "http://hub.example")
    site.serve(f"http://hub.example{TREE}", page(b"[]", Link='<http://evil.example/next>; rel="next"'))
    site.serve("http://evil.example/next", page(b"[]"))
    error("openwebmath", "--url", "http://hub.example" + ROOT_OF_DATA)
    assert tokens_sent(site) == [f"Bearer {TOKEN}", None]


def test_without_pyarrow_it_is_asked_for_before_anything_is_downloaded(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error("openwebmath", "--url", hub(site))
    assert "pip install pyarrow" in error("openwebmath", "--url", site.url + "/a.parquet")
    assert not any(request.path.endswith(".parquet") for request in site.requests)


def test_maths_college_from_addresses_that_end_in_anything(site):
    entries = [{"instruction": f"What is {i} + {i}?", "output": f"{2 * i}."} for i in range(6)]
    urls = [site.serve(f"/{n}", page(json.dumps(entries[3 * n : 3 * n + 3]).encode())) for n in range(2)]
    prepare("maths-college", "--url", *urls, "--val-fraction", 0)
    assert documents("maths-college") == [f"{e['instruction']}\n\n{e['output']}".encode() for e in entries]


def test_two_columns_of_parquet_are_a_text(site, lines_for_parquet):
    url = site.serve("/a.parquet", page(as_lines(PAGES[0])))
    prepare("openwebmath", "--url", url, "--field", "url,text", "--val-fraction", 0)
    assert documents("openwebmath") == [f"https://example.com\n\n{text}".encode() for text in PAGES[0]]


def test_openwebmath_with_pyarrow(site):
    prepare("openwebmath", "--url", hub(site, as_parquet), "--val-fraction", 0)
    assert documents("openwebmath") == texts_of(PAGES)


def test_parquet_from_the_disk_equals_the_same_texts_as_jsonl():
    write("one.parquet", as_parquet([*SHORT_TEXTS, None, ""]))
    write_jsonl("two.jsonl", SHORT_TEXTS)
    for name in ("one.parquet", "two.jsonl"):
        prepare(name, "--val-fraction", 0.3)
    assert contents("data/one") == contents("data/two")


SHORT_TEXTS = [text for texts in PAGES for text in texts] + [UNICODE]


@pytest.mark.parametrize("fault", ["a web page", "nothing", "cut short", "no such column", "numbers"])
def test_a_broken_parquet_file_is_one_line(site, fault):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    if fault in ("no such column", "numbers"):
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"text" if fault == "numbers" else "other": [1, 2]}), file)
        body = file.getvalue()
    else:
        body = {"a web page": b"<html>", "nothing": b"", "cut short": as_parquet(PAGES[0])[:-9]}[fault]
    url = site.serve("/data/a.parquet", page(body))
    said = error("openwebmath", "--url", url)
    assert "a.parquet" in said and len(said) < 500


# --- OpenAI's weights


@cache
def hugging_face(n_layer, n_embd, vocab_size=97, n_positions=24):
    """A GPT-2 of Hugging Face's in which every weight, bias and norm matters, and what the logits of some ids are."""
    torch.manual_seed(n_embd)
    config = GPT2Config(vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer,
                        n_head=n_embd // 64, bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape)
        idx = torch.randint(vocab_size, (2, n_positions))
        return model, idx, model(idx).logits


def safetensors_of(model, prefix, **others):
    """The file as the hub has it. OpenAI's has no prefix and has the masks in it; newer ones have a prefix."""
    tensors = {name.removeprefix("transformer."): p for name, p in model.state_dict().items()}
    if not prefix:
        n = model.config.n_positions
        for i in range(model.config.n_layer):
            tensors[f"h.{i}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        del tensors["lm_head.weight"]
    tensors = {name if name.startswith("lm_head") else prefix + name: p.clone() for name, p in tensors.items()}
    return safetensors.torch.save(tensors | others, metadata={"format": "pt"})


def weights(url, name="gpt2", *argv):
    prepare_data.main([f"weights:{name}", "--url", url, *argv])


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(
    "name, shape", [("gpt2", (2, 64)), ("gpt2-medium", (3, 128)), ("gpt2-large", (4, 192)), ("gpt2-xl", (5, 320))]
)
def test_weights_give_the_logits_of_hugging_face(site, name, shape, prefix, monkeypatch):
    """The four shapes, scaled down. GPT-2's tokenizer is not there: its ranks would have to be downloaded."""
    monkeypatch.setattr(sample, "load_tokenizer", lambda *args: SimpleNamespace(args=args, n_vocab=50257))
    model, idx, logits = hugging_face(*shape)
    weights(site.serve("/model.safetensors", page(safetensors_of(model, prefix))), name)
    ours, tokenizer = sample.load(f"out/{name}-openai/ckpt.pt")
    assert (ours.cfg.n_layer, ours.cfg.n_embd, ours.cfg.n_head) == (*shape, shape[1] // 64)
    assert (ours.cfg.vocab_size, ours.cfg.block_size) == (97, 24)
    with torch.no_grad():
        assert (ours(idx) - logits).abs().max() < 1e-4
    assert tokenizer.args == ("gpt2", "")
    assert set(contents(f"out/{name}-openai")) == {"ckpt.pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(site, dtype):
    model, _, _ = hugging_face(2, 64)
    model = copy.deepcopy(model).to(dtype)
    weights(site.serve("/model.safetensors", page(safetensors_of(model, ""))))
    ckpt = gpt2.read_checkpoint("out/gpt2-openai/ckpt.pt")
    assert {p.dtype for p in ckpt["model"].values()} == {torch.float32}
    assert torch.equal(ckpt["model"]["h.1.mlp.c_fc.weight"], model.transformer.h[1].mlp.c_fc.weight.T.float())


def test_out_is_another_folder_for_the_weights(site):
    model, _, _ = hugging_face(2, 64)
    weights(site.serve("/model.safetensors", page(safetensors_of(model, ""))), "gpt2", "--out", "my/own")
    assert set(contents("my/own")) == {"ckpt.pt"} and not Path("out").exists()


def test_weights_that_arrive_in_pieces(site):
    model, _, _ = hugging_face(2, 64)
    body = safetensors_of(model, "")
    weights(site.serve("/a/model.safetensors", page(body)), "gpt2", "--out", "one")
    weights(site.serve("/b/model.safetensors", page(body, first=len(body) // 5)), "gpt2", "--out", "two")
    one, two = (gpt2.read_checkpoint(f"{out}/ckpt.pt")["model"] for out in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gpt2_with_its_tokenizer_speaks_is_scored_and_is_trained_on(site, monkeypatch, capsys):
    if not GPT2_CACHE.is_dir():
        pytest.skip(f"no {GPT2_CACHE}: GPT-2's ranks would have to be downloaded")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    model, _, _ = hugging_face(1, 64, vocab_size=50257)
    weights(site.serve("/model.safetensors", page(safetensors_of(model, ""))))
    sample.main(["--ckpt", "out/gpt2-openai/ckpt.pt", "--prompt", "It was the", "--max-new-tokens", "4"])
    prepare(str(write("prose.txt", PROSE)), "--tokenizer", "gpt2", "--val-fraction", 0.3)
    argv = ["--init-from", "out/gpt2-openai/ckpt.pt", "--data", "data/prose", "--device", "cpu"]
    capsys.readouterr()
    gpt2.main([*argv, "--eval-only"])
    assert "perplexity" in capsys.readouterr().out
    gpt2.main([*argv, "--out", "out/mine", "--max-steps", "1", "--batch-size", "1"])
    assert gpt2.read_checkpoint("out/mine/ckpt.pt")["step"] == 1


# Each breaks a file that is right: header -> header, or a change in place.
LIES = {
    "an offset past the end": lambda h: h["wte.weight"]["data_offsets"].__setitem__(1, 10**9),
    "an offset far past the end": lambda h: h["wte.weight"].update(data_offsets=[2**62, 2**62 + 97 * 64 * 4]),
    "a negative offset": lambda h: h["wte.weight"].update(data_offsets=[-97 * 64 * 4, 0]),
    "offsets the wrong way round": lambda h: h["wte.weight"]["data_offsets"].reverse(),
    "overlapping tensors": lambda h: h["ln_f.weight"].update(data_offsets=h["ln_f.bias"]["data_offsets"]),
    "an offset that is a text": lambda h: h["wte.weight"].update(data_offsets=["0", "24832"]),
    "an offset that is a fraction": lambda h: h["ln_f.bias"].update(data_offsets=[0.0, 256.0]),
    "an offset that is null": lambda h: h["ln_f.bias"].update(data_offsets=None),
    "one offset": lambda h: h["ln_f.bias"].update(data_offsets=[0]),
    "three offsets": lambda h: h["ln_f.bias"]["data_offsets"].append(0),
    "a shape that does not multiply": lambda h: h["wte.weight"].update(shape=[97, 65]),
    "a shape of negative numbers": lambda h: h["wte.weight"].update(shape=[-97, -64]),
    "a shape of fractions": lambda h: h["wte.weight"].update(shape=[97.0, 64.0]),
    "a huge shape": lambda h: h["wte.weight"].update(shape=[2**40, 2**40]),
    "a shape that is a number": lambda h: h["wte.weight"].update(shape=97 * 64),
    "a shape that is null": lambda h: h["wte.weight"].update(shape=None),
    "a flat embedding": lambda h: h["wte.weight"].update(shape=[97 * 64]),
    "flat positions": lambda h: h["wpe.weight"].update(shape=[24 * 64]),
    "no dimension": lambda h: h["ln_f.bias"].update(shape=[]),
    "positions of another width": lambda h: h["wpe.weight"].update(shape=[48, 32]),
    "an embedding on its side": lambda h: h["wte.weight"].update(shape=[64, 97]),
    "a weight on its side": lambda h: h["h.1.attn.c_attn.weight"].update(shape=[192, 64]),
    "a bias with one dimension more": lambda h: h["h.1.attn.c_attn.bias"].update(shape=[1, 192]),
    "whole numbers as long as the weights": lambda h: h["h.1.attn.c_attn.weight"].update(dtype="I32"),
    "numbers twice as long": lambda h: h["wte.weight"].update(dtype="F64"),
    "numbers half as long, twice as many": lambda h: h["wte.weight"].update(dtype="F16", shape=[97, 128]),
    "a type that is not known": lambda h: h["wte.weight"].update(dtype="F33"),
    "a type that is a list": lambda h: h["wte.weight"].update(dtype=["F32"]),
    "no type": lambda h: h["wte.weight"].pop("dtype"),
    "no shape": lambda h: h["wte.weight"].pop("shape"),
    "no offsets": lambda h: h["wte.weight"].pop("data_offsets"),
    "a tensor that is a list": lambda h: h.update({"ln_f.bias": [0, 256]}),
    "a tensor that is null": lambda h: h.update({"ln_f.bias": None}),
    "no embedding": lambda h: h.pop("wte.weight"),
    "no positions": lambda h: h.pop("wpe.weight"),
    "no bias": lambda h: h.pop("h.1.ln_2.bias"),
    "a layer that is missing": lambda h: [h.pop(name) for name in list(h) if name.startswith("h.0.")],
    "a layer with another number": lambda h: [
        h.update({name.replace("h.1.", "h.2."): h.pop(name)}) for name in list(h) if name.startswith("h.1.")
    ],
    "a layer without a number": lambda h: h.update({"h.one.ln_1.bias": h.pop("h.1.ln_1.bias")}),
    "another model": lambda h: [h.update({"model." + name: h.pop(name)}) for name in list(h)],
    "no tensors": lambda h: h.clear(),
}


def split_header(body):
    n = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + n]), body[8 + n :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_dimension_less(body):
    """wpe of no dimension at all: what has no length has no block size."""
    header, data = split_header(body)
    header = {"wte.weight": {"dtype": "F32", "shape": [1, 64], "data_offsets": [0, 256]}}
    header["wpe.weight"] = {"dtype": "F32", "shape": [], "data_offsets": [256, 260]}
    return with_header(header, data[:260])


BROKEN_WEIGHTS = {
    "nothing": lambda body: b"",
    "seven bytes": lambda body: body[:7],
    "no header": lambda body: body[:8],
    "half a header": lambda body: body[:500],
    "no tensors in it": lambda body: body[: 8 + int.from_bytes(body[:8], "little")],
    "half the tensors": lambda body: body[: len(body) // 2],
    "a byte less": lambda body: body[:-1],
    "a byte more": lambda body: body + b"\0",
    "a header longer than the file": lambda body: (len(body) + 1).to_bytes(8, "little") + body[8:],
    "a header as long as the file": lambda body: len(body).to_bytes(8, "little") + body[8:],
    "the longest header": lambda body: b"\xff" * 8 + body[8:],
    "a header of no bytes": lambda body: bytes(8) + body[8:],
    "a header one byte short": lambda body: (int.from_bytes(body[:8], "little") - 1).to_bytes(8, "little") + body[8:],
    "a web page": lambda body: b"<html>Sign in first</html>" * 99,
    "a pickle": lambda body: b"\x80\x04\x95" + bytes(1000),
    "a zip": lambda body: zipped(WIKI),
    "a list": lambda body: with_header([split_header(body)[0]], split_header(body)[1]),
    "a text": lambda body: with_header("wte.weight", split_header(body)[1]),
    "null": lambda body: with_header(None, split_header(body)[1]),
    "a number": lambda body: with_header(1, split_header(body)[1]),
    "not UTF-8": lambda body: with_header(b'{"\xff": 1}', b""),
    "not JSON": lambda body: with_header(b'{"wte.weight": ', b""),
    "deep": lambda body: with_header(b"[" * 100_000, b""),
    "a number of many digits": lambda body: with_header(b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "a wpe without dimensions": one_dimension_less,
}


def refused(url):
    """The one line that weights which are none end with; an older checkpoint stays."""
    older = write("out/gpt2-openai/ckpt.pt", b"of before")
    with pytest.raises(SystemExit) as e:
        weights(url)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and len(e.value.code) < 500
    assert contents("out/gpt2-openai") == {"ckpt.pt": b"of before"}
    older.unlink()
    return e.value.code


@pytest.mark.parametrize("name", [*LIES, *BROKEN_WEIGHTS])
def test_weights_that_lie_about_themselves_are_refused(site, name):
    body = safetensors_of(hugging_face(2, 64)[0], "")
    if name in LIES:
        header, data = split_header(body)
        LIES[name](header)
        body = with_header(header, data)
    else:
        body = BROKEN_WEIGHTS[name](body)
    assert "model.safetensors" in refused(site.serve("/model.safetensors", page(body)))


def test_a_head_of_its_own_is_refused(site):
    """GPT-2's is the token embedding: with another one the logits would be others."""
    model, _, _ = hugging_face(2, 64)
    body = safetensors_of(model, "", **{"lm_head.weight": torch.randn(97, 64)})
    refused(site.serve("/model.safetensors", page(body)))


def test_a_width_that_64_wide_heads_do_not_divide_is_refused(site):
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=96, n_layer=1, n_head=2)
    refused(site.serve("/model.safetensors", page(safetensors_of(GPT2LMHeadModel(config), ""))))


def test_a_random_byte_of_the_header_never_ends_in_a_traceback(tmp_path):
    rng, body = random.Random(0), safetensors_of(hugging_face(2, 64)[0], "")
    n = 8 + int.from_bytes(body[:8], "little")
    for _ in range(150):
        changed = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            changed[rng.choice([rng.randrange(8), rng.randrange(n)])] = rng.choice(b'{}[]",:0-9e.\x00\xff')
        path = write(tmp_path / "model.safetensors", bytes(changed))
        try:
            prepare_data.read_safetensors(path)
        except SystemExit as e:
            assert "\n" not in e.code


def test_weights_of_no_such_size_are_one_line():
    with pytest.raises(SystemExit) as e:
        prepare_data.main(["weights:gpt5"])
    assert "gpt5" in e.value.code and "gpt2-medium" in e.value.code and "\n" not in e.value.code
