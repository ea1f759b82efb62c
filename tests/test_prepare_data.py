"""prepare_data.py: byte-pair encoding against a slow, obvious trainer; what the token files hold; downloads from a
server that fails on purpose; errors in one line. Every test runs in its own empty folder."""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

import prepare_data

SHARED = Path(prepare_data.__file__).resolve().parent.parent / "shared"
HAS_PYARROW = importlib.util.find_spec("pyarrow")
PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity. They didn't know what we'll see in 1859.
"""
UNICODE = (
    "naïve café Zoë, Ελλάδα, Москва; 你好你好 漢字仮名交じり文 한국어 🙂🙂🙂 👩\u200d👧 👩\u200d👧 e\u0301 n\u0303 "
    "a\u0300\u0301 \u00a0\u00a0NBSP\u00a0 \u3000wide\u3000\u3000 \u2028\u0085 \ufffe\uffff\x00\n"
)
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u00a0\u00a0 ", "\u3000", "\u2028", "\u0085"]
WORDS = ["the", "don't", "'ll", "1859", "!?", "...", "漢字漢字", "é", "e\u0301", "🙂", "\u200b", "_x_", "<|endoftext|>"]
ODD = "".join(random.Random(0).choices([*SPACES, *WORDS, UNICODE, r"\ud800", "\x1c", "\ud7ff", "\U0010ffff"], k=1500))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, reads text in small blocks, and does not wait between tries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "BLOCK", 128)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def run(*argv, out="out"):
    prepare_data.main([*map(str, argv), "--out", out])


def error(*argv, out="out"):
    """The one line with which the script ends."""
    with pytest.raises(SystemExit) as e:
        run(*argv, out=out)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    return e.value.code


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path, texts):
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def contents(path="out"):
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def read_meta():
    return json.loads(Path("out/meta.json").read_text(encoding="utf-8"))


def read_tokenizer():
    name, path = read_meta()["tokenizer"], Path("out/tokenizer.tiktoken")
    return prepare_data.load_tokenizer(name, path.read_text(encoding="utf-8") if path.exists() else "")


def read_documents(split="train"):
    """The documents of a split: its ids cut at end of text and decoded."""
    ids, tokenizer, eot = np.fromfile(f"out/{split}.bin", "<u2"), read_tokenizer(), read_meta()["eot"]
    parts = np.split(ids, np.flatnonzero(ids == eot))
    return [tokenizer.decode_bytes(part[part != eot].tolist()).decode() for part in parts]


def reference_bpe(words, vocab_size):
    """Byte-pair encoding as one would explain it: count all pairs, merge the most frequent, start over. Returns the
    tokens, and the tokens that each word has become."""
    tokens = [bytes([b]) for b in range(256)]
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(tokens) < vocab_size - 1:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                counts[pair] += n
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))  # ties: the greater pair of byte strings
        tokens.append(best[0] + best[1])
        for word, old in parts.items():
            parts[word] = []
            for part in old:
                parts[word].append(part)
                if tuple(parts[word][-2:]) == best:
                    parts[word][-2:] = [tokens[-1]]
    return tokens, parts


@pytest.mark.parametrize("text", [PROSE, UNICODE * 2, "aaaaaaa aaaaa aaaa aaa bbbbbbbbb ababababa ababab abaabaabaaba"])
def test_merges_equal_the_reference_in_any_order_and_tiktoken_encodes_alike(text):
    words = Counter(regex.findall(prepare_data.SPLIT_PATTERN, text))
    tokens, parts = reference_bpe(words, 400)
    assert prepare_data.train_bpe(words, 400) == tokens
    assert prepare_data.train_bpe(dict(random.Random(0).sample(list(words.items()), len(words))), 400) == tokens
    ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    tokenizer = prepare_data.load_tokenizer("bpe:400", ranks)
    for word, expected in parts.items():
        assert [tokenizer.decode_single_token_bytes(i) for i in tokenizer.encode_ordinary(word)] == expected


def test_merges_equal_the_reference_on_small_and_random_words():
    """In aab (a, a) and (a, b) are equally frequent, and (a, b) is greater. Random words of few letters have overlaps,
    ties, and pairs that appear and vanish."""
    assert prepare_data.train_bpe({"aab": 2}, 1000)[256:] == [b"ab", b"aab"]
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice(["a", "ab", "abc", "a\0", "aé漢"])
        words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 8))]
        words, vocab_size = {word: rng.randint(1, 4) for word in words}, rng.randint(257, 290)
        assert prepare_data.train_bpe(words, vocab_size) == reference_bpe(words, vocab_size)[0], words


@pytest.mark.parametrize("n, text, size", [(300, PROSE, 300), (257, PROSE, 257), (1000, "ab ab ab", 259)])
def test_bpe_n_is_bytes_then_merges_then_end_of_text(n, text, size):
    run(write("text.txt", text), "--tokenizer", f"bpe:{n}", "--val-fraction", 0)
    assert [read_meta()[key] for key in ("vocab_size", "tokenizer", "eot")] == [size, f"bpe:{n}", size - 1]
    assert (
        read_tokenizer().decode_bytes(range(256)) == bytes(range(256)) and read_tokenizer().max_token_value == size - 1
    )


def test_the_trainer_reads_the_start_of_the_training_split_and_of_long_words(monkeypatch):
    text = "abab " * 80 + "zqzq " * 40 + "xjxj " * 40  # the last words are validation
    for limit, learned in ((2**26, b"abzq "), (300, b"ab ")):
        monkeypatch.setattr(prepare_data, "BPE_BYTES", limit)
        run(write("two.txt", text), "--tokenizer", "bpe:300", "--val-fraction", 0.25)
        tokens = read_tokenizer().token_byte_values()
        assert set(b"".join(token for token in tokens if len(token) > 1)) == set(learned)
    monkeypatch.setattr(prepare_data, "LONG_WORD", 4)
    assert prepare_data.count_words(iter(["abcdabcd xy", "ab"])) == {"abcd": 1, " xy": 1, "ab": 1}


# --- token files


def test_token_files_are_raw_little_endian_uint16_joined_by_end_of_text():
    run(write_jsonl("three.jsonl", ["ab", "c", "", "ab"]), "--tokenizer", "bpe:258", "--val-fraction", 0)
    ids = [256, 257, ord("c"), 257, 256]  # 256 is "ab", 257 end of text: between documents, not before or after them
    assert Path("out/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)


@pytest.mark.parametrize("text", [ODD, " \n" * 400 + "a", "a" * 900, "!\x1c?\x1d" * 200])
def test_encoding_in_pieces_gives_the_ids_of_the_whole_and_decodes_to_it(text):
    """\\x1c is white space to Python's str and re, not to tiktoken. A word without end is cut somewhere."""
    for path in (write("odd.txt", text), write_jsonl("odd.jsonl", [text])):
        run(path, "--tokenizer", "bpe:400", "--val-fraction", 0, "--force")
        assert np.fromfile("out/train.bin", "<u2").tolist() == read_tokenizer().encode_ordinary(text)
        run(path, "--tokenizer", "bytes", "--val-fraction", 0, "--force")
        assert read_documents() == [text]
    pieces = list(prepare_data.cut("ab " + "x" * 5000))
    assert "".join(pieces) == "ab " + "x" * 5000 and max(map(len, pieces)) <= 9 * 128


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_gpt2_is_tiktokens_and_our_split_pattern_is_its_own():
    gpt2 = tiktoken.get_encoding("gpt2")
    names = {"pat_str": prepare_data.SPLIT_PATTERN, "mergeable_ranks": gpt2._mergeable_ranks, "special_tokens": {}}
    assert tiktoken.Encoding("ours", **names).encode_ordinary(ODD) == gpt2.encode_ordinary(ODD)
    run(write("odd.txt", ODD), "--tokenizer", "gpt2", "--val-fraction", 0)
    assert np.fromfile("out/train.bin", "<u2").tolist() == gpt2.encode_ordinary(ODD) and read_meta()["eot"] == 50256


def test_meta_json_counts_what_is_in_the_files():
    texts = [PROSE * 3, "one two\u00a0three\n four", UNICODE, ""]
    run(write_jsonl("four.jsonl", texts), "--tokenizer", "bpe:300", "--val-fraction", 0.3)
    for split, counts in read_meta()["splits"].items():
        documents = read_documents(split)
        assert counts == {
            "tokens": sum(len(read_tokenizer().encode_ordinary(text)) for text in documents) + len(documents) - 1,
            "bytes": sum(len(text.encode()) for text in documents),
            "words": sum(len(text.split()) for text in documents),
            "documents": len(documents),
            "sha256": hashlib.sha256(Path(f"out/{split}.bin").read_bytes()).hexdigest(),
        }
    assert "".join(read_documents() + read_documents("val")) == "".join(texts)


ROWS = [{"instruction": f"{i} + 1", "output": f"é{i + 1}\n", "text": UNICODE[i:]} for i in range(30)]


def write_rows(path):
    """ROWS in the format that the name says."""
    if path.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
        return path
    indent = 1 if "indented" in path else None
    return write(path, json.dumps(ROWS, indent=indent) if "array" in path else "\n\n".join(map(json.dumps, ROWS)))


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "indented array.json", "a.parquet"])
def test_rows_of_json_and_parquet_are_documents(name):
    for fields in (["text"], ["instruction", "output"]):
        run(write_rows(name), "--field", ",".join(fields), "--tokenizer", "bytes", "--val-fraction", 0)
        assert read_documents() == ["\n\n".join(row[field] for field in fields) for row in ROWS]
    assert "KeyError: 'nothing'" in error(name, "--field", "nothing", "--tokenizer", "bytes")
    write("lone.jsonl", r'{"text": "\ud83d\ude00 \ud800a \ude00\ud83d"}')  # one pair, and two the wrong way round
    run("lone.jsonl", "--tokenizer", "bytes", "--val-fraction", 0, "--force")
    assert read_documents() == ["😀 \ufffda \ufffd\ufffd"]


def test_downloaded_data_sets_are_read_as_documents():
    for i in range(6):
        write(f"data/downloads/maths-college/{i}-Final.json", Path(write_rows("array.json")).read_bytes())
    run("maths-college", "--tokenizer", "bytes", "--val-fraction", 0, "--shards", 5)
    assert read_documents() == [f"{row['instruction']}\n\n{row['output']}" for row in ROWS] * 5
    stories = [PROSE.strip(), "Once upon a time.\n\nThe end.", UNICODE.strip(), "x", "A cat.\nA <|endof a hat."]
    write("data/downloads/tinystories/train.txt", "\n<|endoftext|>\n".join(stories))
    write("data/downloads/tinystories/valid.txt", "\n<|endoftext|>\n".join([*stories[::-1], " ", ""]))
    run("tinystories", "--tokenizer", "bytes", "--force")
    assert read_documents() == stories and read_documents("val") == stories[::-1]
    articles = [" \n = First Title = \n \n With = signs = . \n \n = = Section = = \n \n", " = Second , Title = \n . \n"]
    Path("data/downloads/wikitext2").mkdir(parents=True)
    with zipfile.ZipFile("data/downloads/wikitext2/wikitext-2-raw-v1.zip", "w") as archive:
        for name, text in (("train", "".join(articles)), ("valid", articles[1]), ("test", articles[0])):
            archive.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    run("wikitext2", "--tokenizer", "bytes", "--force")
    assert [read_documents(split) for split in ("train", "val", "test")] == [articles, articles[1:], articles[:1]]
    run("wikitext2", "--tokenizer", "bytes", "--val-fraction", 0)
    assert sorted(contents()) == ["meta.json", "train.bin"]


def test_a_folder_is_read_in_order_and_identical_files_count_once():
    texts = [PROSE, "x", UNICODE, "<|endoftext|>", "  ", "x", "{}", PROSE[::-1], "x"]
    for i, text in enumerate(texts):
        write(f"my texts/{'abc'[i % 3]}/{i}.txt", text)
    write("my texts/image.txt/image.png", b"\x89PNG")
    prepare_data.main(["my texts", "--tokenizer", "bpe:300", "--val-fraction", "0"])
    Path("data/my texts").rename("out")
    documents = {path.read_text(encoding="utf-8"): None for path in sorted(Path("my texts").rglob("?.txt"))}
    assert read_documents() == list(documents) and len(documents) == len(texts) - 2


@pytest.mark.parametrize("name", ["stdlib", "python"])
def test_python_sources_without_tests_and_tables(name):
    files = prepare_data.find_files(argparse.Namespace(name=name))
    assert Path(argparse.__file__) in files and len(files) == len({path.read_bytes() for path in files})
    parts = {part for path in files for part in path.parts}
    assert ({"torch", "numpy", "tiktoken", "sympy", "urllib3"} <= parts) == (name == "python")
    assert not parts & {"pytest", "transformers", "tests", "test", "encodings"}


def test_documents_are_split_by_a_hash_of_their_text():
    """The same from a folder or a .jsonl, and documents that are added move none."""
    texts = [f"Document {i}. {PROSE[i : i + 40]}" for i in range(200)]

    def splits_of(path):
        run(path, "--tokenizer", "bytes", "--val-fraction", 0.25, "--force")
        return [set(read_documents(split)) for split in ("train", "val")]

    train, val = splits_of(write_jsonl("documents.jsonl", texts))
    assert val == {text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 64} and train == {*texts} - val
    for i, text in enumerate(texts):
        write(f"folder/{i}.txt", text)
    assert splits_of("folder") == [train, val]
    before = splits_of(write_jsonl("documents.jsonl", texts[100:]))
    assert before[0] < train and before[1] < val


@pytest.mark.parametrize("n", [1, 3, 19])
def test_few_documents_are_split_by_position(n):
    """Wherever the boundary falls, train and val together are the text, and at most one document is in both."""
    texts = [f"{i:02} aé漢🙂\r\n e\u0301 {PROSE[i : 2 * i]}" for i in range(n)]
    for i, text in enumerate(texts):
        write(f"folder/{i:02}.txt", text)
    for val_fraction in (0.3, 0.5, 0.7):
        for path in ("folder", write_jsonl("few.jsonl", texts)):
            run(path, "--tokenizer", "bpe:260", "--val-fraction", val_fraction, "--force")
            train, val = read_documents(), read_documents("val")
            boundary = round(len("".join(texts)) * (1 - val_fraction))
            assert ("".join(train), "".join(val)) == ("".join(texts)[:boundary], "".join(texts)[boundary:])
            assert n <= len(train) + len(val) <= n + 1
    run(path, "--tokenizer", "bytes", "--val-fraction", 0, "--force")
    assert sorted(contents()) == ["meta.json", "train.bin"] and read_documents() == texts


BAD_LINES = [b"plain", b'{"text": "a"', b"[1]", b'"text"', b"null", b'{"other": 1}', b'{"text": 5}']
BAD_FILES = {  # name: (content, message)
    "folder/2.txt": (b"abc" * 100 + b"\xff", "byte 300 is not UTF-8"),
    "half.txt": (b"abc\xe6\xbc", "byte 3 is not UTF-8"),
    "empty.txt": (b"", "no text for train.bin"),
    "short.txt": (b"a", "no text for val.bin"),
    "array.json": (b'[{"text": "a"}, ', "object 1: "),
    **{f"{i}.jsonl": (b'{"text": "good"}\n' * 40 + bad + b"\n{}\n", "object 41: ") for i, bad in enumerate(BAD_LINES)},
}
BAD_RUNS = [
    *((name, f"{Path(name)}: {message}") for name, (_, message) in BAD_FILES.items()),
    ("nope", "nope: not a file"),
    ("image.parquet", "image.parquet: object 1: " if HAS_PYARROW else "pip install pyarrow"),
    ("wikitext2", "not a zip file"),
    *((f"good.txt --tokenizer {name}", "257") for name in ("bpe:256", "bpe:65537", "bpe:abc", "bpe:")),
    ("good.txt --tokenizer o200k_base", "more than 65,536 ids"),
    *((f"good.txt --val-fraction {x}", f"fraction {x}") for x in ("1.0", "-0.1", "nan")),
]


@pytest.mark.parametrize("argv, message", BAD_RUNS)
def test_a_failing_run_is_one_line_and_leaves_the_older_data_set_or_no_folder(argv, message):
    write("data/downloads/wikitext2/wikitext-2-raw-v1.zip", write("image.parquet", b"\x89PNG"))
    files = {name: content for name, (content, _) in BAD_FILES.items()} | {"good.txt": PROSE, "folder/1.txt": PROSE}
    for path, content in files.items():
        write(path, content)
    argv = ["--tokenizer", "bpe:300", *argv.split()]
    assert message in error(*argv, out="new/folder") and not Path("new").exists()
    run("good.txt", "--tokenizer", "bpe:290")
    before = contents()
    assert message in error(*argv, "--force") and contents() == before


# --- older data sets, checks and interruptions


def test_a_data_set_of_another_tokenizer_or_source_is_overwritten_with_force_alone():
    run(write("notes.txt", PROSE), "--tokenizer", "bpe:300")
    before = contents()
    run(write("./other/../notes.txt", PROSE), "--tokenizer", "bpe:300")  # the same source
    for argv in (["notes.txt", "--tokenizer", "bytes"], [write("other/notes.txt", PROSE), "--tokenizer", "bpe:300"]):
        assert re.search("out was made from .*bpe:300.*--out.*--force", error(*argv)) and contents() == before
        run(*argv, "--force")
        assert contents() != before
        run("notes.txt", "--tokenizer", "bpe:300", "--force")


def test_check_finds_each_kind_of_damage_and_its_hint_repairs_it():
    run(write("my notes.txt", PROSE * 3), "--tokenizer", "bpe:300")
    before, meta = contents(), read_meta()
    prepare_data.main(["--check", "out"])
    flipped = bytes([*before["val.bin"][:5], before["val.bin"][5] ^ 1, *before["val.bin"][6:]])
    high = before["train.bin"] + (300).to_bytes(2, "little")
    meta["splits"]["train"] |= {"tokens": len(high) // 2, "sha256": hashlib.sha256(high).hexdigest()}
    damages = {
        "val.bin: changed": {"val.bin": flipped},
        "train.bin: changed": {"train.bin": before["train.bin"][:-2]},
        "id 300 is beyond the vocabulary of 300": {"train.bin": high, "meta.json": json.dumps(meta)},
        "not the vocabulary of 300": {"tokenizer.tiktoken": before["tokenizer.tiktoken"].rpartition(b"\nIH")[0]},
    }
    for message, files in damages.items():
        for name, content in files.items():
            write(f"out/{name}", content)
        said = error("--check")
        assert message in said
        command = said.partition("again: python ")[2].replace("prepare_data.py", prepare_data.__file__, 1)
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
        assert contents() == before
    write("out/meta.json", '{"splits": ')
    assert "meta.json: damaged" in error("--check") and "meta.json: damaged" in error("my notes.txt")


def test_ten_kills_leave_the_older_data_set_whole_and_the_next_run_removes_the_rest():
    run(write("prose.txt", PROSE * 4000), "--tokenizer", "bytes")
    before, partial = contents(), Path("out/prepare_data.partial")
    command = [sys.executable, prepare_data.__file__, "prose.txt", "--out", "out", "--force", "--tokenizer", "bpe:270"]
    for _ in range(10):
        process = subprocess.Popen(command)
        while not (partial / "train.bin").exists() and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert {name: data for name, data in contents().items() if partial.name not in name} == before
    write(partial / "test.bin", "of another source")
    run("prose.txt", "--tokenizer", "bytes")
    assert contents() == before


def test_files_are_on_the_disk_before_they_take_their_names(monkeypatch):
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300")
    sizes, moved, fsync, replace = {}, [], os.fsync, os.replace

    def note_fsync(fd):
        sizes[os.fstat(fd).st_ino] = os.fstat(fd).st_size
        fsync(fd)

    def note_replace(source, target):
        assert sizes[os.stat(source).st_ino] == os.stat(source).st_size and not Path("out/meta.json").exists()
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    run("prose.txt", "--tokenizer", "bpe:300")
    assert sorted(moved) == sorted(contents()) and moved[-1] == "meta.json"


# --- downloads

# Every line differs, so that bytes put together from two places do not go unseen.
BODY = "".join(f"line {i} of the file, {i * i}\n" for i in range(10_000)).encode()  # 300 kB
TAG = ("X-Linked-Etag", f'"{hashlib.sha256(BODY).hexdigest()}"')  # as the hub tells the SHA-256 of large files


def page(body=BODY, code=200, send=None, claim=0, ranges=True, headers=()):
    """An answer: a file, or the part that is asked for; `send` bytes of it; `claim` is added to its true length."""

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        start, size = int(asked[1]) if asked else 0, len(body) + claim
        beyond = asked and start >= size
        handler.send_response(code if code != 200 else 416 if beyond else 206 if asked else 200)
        span = [("Content-Range", f"bytes {'*' if beyond else f'{start}-{size - 1}'}/{size}")] if asked else []
        for name, value in (*headers, *span, ("Content-Length", 0 if beyond else size - start)):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[start:][:send])

    return answer


class Handler(BaseHTTPRequestHandler):
    """Gives the server's answers one after the other, the last one for ever, and keeps the Range headers."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        (self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0])(self)

    def log_message(self, *args):
        pass


WRONG = page(BODY[::-1], headers=[TAG])
REDIRECT = page(b"", code=302, headers=[TAG, ("Location", "/elsewhere")])
DOWNLOADS = {  # bytes that an earlier run left, answers, Range headers
    "at once": (b"", [page()], [None]),
    "resumed": (b"", [page(send=70_000), page(send=70_000), page()], [None, "bytes=65536-", "bytes=131072-"]),
    "Range is ignored": (b"", [page(send=200_000), page(ranges=False)], [None, "bytes=196608-"]),
    "errors that pass": (b"", [page(code=503), page(code=429), page()], [None] * 3),
    "wrong bytes": (b"", [REDIRECT, page(BODY[::-1]), REDIRECT, page()], [None] * 4),
    "part of an earlier run": (BODY[:9], [page()], ["bytes=9-"]),
    "all but its name": (BODY, [page()], [f"bytes={len(BODY)}-"]),
    "longer than the file": (BODY + b"!", [page()], [f"bytes={len(BODY) + 1}-", None]),
    "fails: 404": (b"", [page(code=404)], [None]),
    "fails: 503": (b"", [page(code=503)], [None] * 3),
    "fails: wrong bytes": (b"", [WRONG], [None] * 3),
    "fails: ends early": (b"", [page(claim=9)], [None, "bytes=262144-", "bytes=262144-"]),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_the_file_or_one_line_after_three_tries(name, monkeypatch):
    (part, answers, ranges), command = DOWNLOADS[name], ["shakespeare", "--tokenizer", "bytes", "--val-fraction", 0]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.answers, server.asked, url = list(answers), [], f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setitem(prepare_data.DATASETS, "shakespeare", (url, ["input.txt"]))
        if part:
            write("data/downloads/shakespeare/input.txt.part", part)
        if "fails" in name:
            assert url in error(*command) and server.asked == ranges and not Path("out").exists()
            assert list(contents("data").values()) == ([BODY[:262144]] if "early" in name else [])
            server.answers = [page()]
        run(*command)
        run(*command)  # a file that is there is not asked for again
        assert read_documents() == [BODY.decode()] and list(contents("data").values()) == [BODY]
        assert server.asked[: len(ranges)] == ranges and len(server.asked) == len(ranges) + ("fails" in name)
        server.shutdown()


def test_weights_give_the_logits_of_hugging_face():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import gpt2

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_layer=2, n_embd=128, n_head=2)).eval()
    state = theirs.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    Path("data/downloads").mkdir(parents=True)
    torch.save(state, "data/downloads/gpt2.bin", _use_new_zipfile_serialization=False)  # as OpenAI's are stored
    prepare_data.main(["weights:gpt2"])
    ckpt = torch.load("out/gpt2-openai/ckpt.pt", weights_only=True)
    ours = gpt2.Model(gpt2.Config(**ckpt["config"])).eval()
    ours.load_state_dict(ckpt["model"])
    idx = torch.randint(97, (2, 16))
    torch.testing.assert_close(ours(idx)[..., :97], theirs(idx).logits, rtol=1e-4, atol=1e-4)
