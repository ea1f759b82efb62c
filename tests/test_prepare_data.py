"""prepare_data.py: byte-pair encoding against a slow, obvious trainer; texts as people have them;
what token files hold; downloads from a server that fails on purpose; errors in one line."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import regex
import torch
from conftest import ROOT, load, refused, train

import prepare_data

CACHE = ROOT.parent / "shared" / "tiktoken_cache"
EOT = "<|endoftext|>"
PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was
the age of foolishness, it was the epoch of belief. They didn't know what we'll see in 1859.\n"""
UNICODE = """naïve café, Ελλάδα; 你好你好 漢字仮名交じり文 🙂🙂🙂 👩\u200d👧 e\u0301 \u3000wide
\u00a0\u00a0NBSP\u00a0 \u3000\u3000 \u2028\u0085 \ufffe\uffff\x00"""
WORDS = ["  ", "\n\n", " \n ", "\u00a0\u00a0 ", *" \n\té\u3000\u2028\u200b\x1c\x85\ud7ff", UNICODE]
WORDS += r"漢字 🙂 the don't 'll 1859 ... _x_ <|endof \ud800".split()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and reads text in small blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "BLOCK", 128)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))


def run(*options, out="out"):
    prepare_data.main([*map(str, options), "--out", out])


def error(*options):
    return refused(prepare_data.main, *options, "--out", "out")


def write(path, content):
    """Writes a text or bytes to a file, and returns its path. A .gz file gets them compressed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    Path(path).write_bytes(gzip.compress(data) if path.endswith(".gz") else data)
    return path


def write_rows(path, rows):
    """Writes dicts to a .jsonl or .parquet file, or as an array to a .json file."""
    if path.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(load("pyarrow").Table.from_pylist(rows), path, row_group_size=7)
        return path
    lines = "\n\n".join(map(json.dumps, rows))
    return write(path, json.dumps(rows, indent=1) if path.endswith(".json") else lines)


def contents(path="out"):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def read_documents(split="train", out="out"):
    """The documents of a split: its ids, cut at end of text and decoded."""
    tokenizer = prepare_data.load_tokenizer(*prepare_data.find_tokenizer(out))
    ids, eot = np.fromfile(f"{out}/{split}.bin", "<u2"), tokenizer.eot_token
    parts = np.split(ids, np.flatnonzero(ids == eot))
    return [tokenizer.decode_bytes(part[part != eot].tolist()).decode() for part in parts]


def documents_of(*options):
    """The documents of a text that is prepared with bytes as ids, and without validation."""
    run("--tokenizer", "bytes", "--val-fraction", 0, "--force", *options)
    return read_documents()


def reference_bpe(words, vocab_size):
    """Counts all pairs, merges the most frequent one, and starts again. chr(i) is token i."""
    tokens = [bytes([b]) for b in range(256)]
    words = {word.encode().decode("latin-1"): n for word, n in words.items()}
    while len(tokens) < vocab_size - 1 and max(map(len, words)) > 1:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += n
        # Of equally frequent pairs, the greater byte strings.
        a, b = max(counts, key=lambda pair: (counts[pair], *(tokens[ord(c)] for c in pair)))
        words = {word.replace(a + b, chr(len(tokens))): n for word, n in words.items()}
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
    return tokens


def test_merges_are_those_of_the_reference_within_the_trainers_limits(monkeypatch):
    """Random words of few letters have overlaps, ties, and pairs that appear and vanish."""
    rng = random.Random(0)
    cases = [Counter(regex.findall(prepare_data.SPLIT_PATTERN, PROSE + UNICODE))]
    for letters in ["a", "ab", "abc", "a\0", "aé漢"] * 60:
        words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(8)]
        cases.append({word: rng.randint(1, 4) for word in words})
    for words in cases:
        vocab_size = rng.randint(257, 290)
        tokens = reference_bpe(words, vocab_size)
        assert prepare_data.train_bpe(words, vocab_size) == tokens, words
    monkeypatch.setattr(prepare_data, "BPE_BYTES", 11)  # of which é has two
    monkeypatch.setattr(prepare_data, "LONG_WORD", 4)  # letters
    assert prepare_data.count_words(["abcdabcd", "é", "b", "c"]) == {"abcd": 1, "é": 1, "b": 1}


@pytest.mark.parametrize("n, eot", [(257, 256), (258, 257), (1000, 257)])  # "ab" is the only pair
def test_token_files_are_little_endian_uint16_of_bytes_then_merges_then_end_of_text(n, eot):
    path = write_rows("four.jsonl", [{"text": text} for text in ("ab", "c", "", "ab")])
    run(path, "--tokenizer", f"bpe:{n}", "--val-fraction", 0)
    ab = [256] if eot == 257 else [*b"ab"]
    ids = [*ab, eot, ord("c"), eot, *ab]  # end of text stands between documents alone
    assert Path("out/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)
    meta = prepare_data.read_meta(Path("out"))
    assert (meta["vocab_size"], meta["tokenizer"], meta["eot"]) == (eot + 1, f"bpe:{n}", eot)


@pytest.mark.parametrize("name", ["bpe:400", "gpt2"])
def test_encoding_in_pieces_gives_the_ids_of_the_whole(name):
    """\\x1c is white space to Python's str and re, not to tiktoken. A long word is cut anywhere."""
    if name == "gpt2" and not CACHE.is_dir():
        pytest.skip(f"no {CACHE}")
    odd = "".join(random.Random(0).choices(WORDS, k=1500))
    for text in (odd, " \n" * 400 + "a", "a" * 900, "!\x1c?\x1d" * 200):
        run(write("odd.txt", text), "--tokenizer", name, "--val-fraction", 0, "--force")
        tokenizer = prepare_data.load_tokenizer(*prepare_data.find_tokenizer("out"))
        ids = np.fromfile("out/train.bin", "<u2").tolist()
        assert ids == prepare_data.encode(tokenizer, text) == tokenizer.encode_ordinary(text)
        words = regex.findall(tokenizer._pat_str, text)
        assert regex.findall(prepare_data.SPLIT_PATTERN, text) == words
    assert max(map(len, prepare_data.cut("ab " + "x" * 5000))) <= 9 * 128


FOUR = ["one", "two\nlines", "three", "four"]
SIDE_BY_SIDE = f"{EOT}one{EOT}\n{EOT} two\nlines{EOT}{EOT}{EOT}three\n{EOT} \n{EOT}four{EOT}"
ABOUT = f"The separator is {EOT},\r\n a token."
FOUND = [  # a file, what it holds, its documents
    ("a.txt", f"one\n{EOT}\n two\nlines\n{EOT}\nthree\n\n{EOT}\nfour\n", FOUR),
    ("a.txt.gz", SIDE_BY_SIDE, FOUR),
    ("CRLF.txt", SIDE_BY_SIDE.replace("\n", "\r\n"), FOUR),
    ("CRLF.py", ABOUT, [ABOUT.replace("\r", "")]),
    ("a.jsonl.gz", json.dumps({"text": ABOUT}), [ABOUT]),
    ("a.json", '{"text": "1"}\n\n{"text": "2"}', ["1", "2"]),
    ("a.jsonl", r'{"text": "\ud83d\ude00 \ud800a \ude00\ud83d"}', ["😀 \ufffda \ufffd\ufffd"]),
]
for encoding in ("UTF-8", "UTF-16-LE", "UTF-16-BE"):  # a byte order mark is no text
    FOUND.append(("a.txt", f"\ufeff{UNICODE}".encode(encoding), [UNICODE]))
    FOUND.append(("a.json", '\ufeff\n[{"text": "é🙂"}]'.encode(encoding), ["é🙂"]))


@pytest.mark.parametrize("name, content, documents", FOUND)
def test_a_file_as_people_have_it_becomes_its_documents(name, content, documents, capsys):
    for prepare_data.BLOCK in (13, 14, 17, 128):  # wherever the blocks end
        assert documents_of(write(name, content)) == documents
    assert ("CRLF became LF in 1 of 1 files" in capsys.readouterr().out) == ("CRLF" in name)


def test_a_folder_is_read_in_order_and_what_is_skipped_is_said(capsys):
    texts = {"b/1.txt.gz": f"three{EOT}four", "c.jsonl": '{"text": "five"}', "a/1.txt": "one"}
    texts |= dict.fromkeys(("a/3.txt", "b/2.txt"), "one") | {"a/2.TXT": "two"}
    others = ("._a.txt", ".git/a.txt", "b/.c/d.txt", "b.txt/image.png", "a.MD", "Makefile", "a.md")
    for name, text in (texts | dict.fromkeys(others, "not a text")).items():
        write(f"my texts/{name}", text)
    prepare_data.main(["my texts", "--tokenizer", "bpe:300", "--val-fraction", "0"])
    assert read_documents(out="data/my texts") == ["one", "two", "three", "four", "five"]
    said = capsys.readouterr().out.splitlines()[0].partition(" skipped: ")[2].split(", ")
    assert sorted(said) == ["1 .png", "1 without a suffix", "2 .md", "2 identical"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_rows_are_documents_of_their_fields_and_those_without_text_are_counted(kind, capsys):
    rows = [{"q": "1\n", "a": "é🙂"}, {"q": None, "a": "2"}, {"a": "3"}, {"q": "", "a": " \n"}]
    path = write_rows(f"a{kind}", rows * 100)
    assert documents_of(path, "--field", "q,a") == ["1\n\n\né🙂", "2", "3"] * 100
    assert "100 of 400 rows have no text" in capsys.readouterr().out
    said = error(path, "--field", "z,q,b", "--force")
    assert f"a{kind}: no row has the field b, z; the first row has q, a" in said
    path = write_rows(f"b{kind}", [{"q": "one", "text": None}, {"q": "two", "text": [1]}])
    assert "row 2: text is of type list. " in error(path, "--field", "q,text", "--force")


def test_downloaded_data_sets_are_read_as_documents():
    write_rows("data/downloads/maths-college/0-Final.json", [{"instruction": "1", "output": "é"}])
    assert documents_of("maths-college", "--shards", 1) == ["1\n\né"]
    stories = [PROSE.strip(), "Once upon a time.\n\nThe end.", "A <|endof."]
    write("data/downloads/tinystories/train.txt", f"\n{EOT}\n".join(stories))
    write("data/downloads/tinystories/valid.txt", stories[0])
    run("tinystories", "--tokenizer", "bytes", "--force")
    assert (read_documents(), read_documents("val")) == (stories, stories[:1])
    a = " \n = First Title = \n \n With = signs = . \n \n = = Section = = \n \n"
    b = " = Second , Title = \n . \n"
    path = write("data/downloads/wikitext2/wikitext-2-raw-v1.zip", "")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("train", a + b), ("valid", b), ("test", a)):
            archive.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    run("wikitext2", "--tokenizer", "bytes", "--force")
    assert [read_documents(split) for split in ("train", "val", "test")] == [[a, b], [b], [a]]
    assert documents_of("wikitext2") == [a, b] and "val.bin" not in contents()


def test_python_sources_are_without_tests_and_tables_and_with_packages_if_asked():
    names = {"json", "torch", "sympy", "pytest", "test", "tests", "encodings"}  # torch needs sympy
    for name, found in (("stdlib", {"json"}), ("python", {"json", "torch", "sympy"})):
        files = prepare_data.find_files(prepare_data.parse([name]))
        assert {part for path in files for part in path.parts} & names == found


@pytest.mark.parametrize("n, val_fraction", [(100, 0.1), (99, 0.1), (19, 0.5), (1, 0.7)])
def test_many_documents_are_split_by_a_hash_of_their_text_and_few_by_position(n, val_fraction):
    """meta.json counts them, and the tokenizer is trained on the training split alone."""
    texts = [f"{i:02} aé漢🙂\n e\u0301\u00a0{i} {PROSE[i:]}." for i in range(n)]
    whole = "".join(texts)
    boundary = round(len(whole) * (1 - val_fraction))
    hashed = [t for t in texts if hashlib.sha256(t.encode()).hexdigest() < "19999999"]  # a tenth
    for i, text in enumerate(texts):
        write(f"folder/{i:02}.txt", text.replace("\n", "\r\n") if i % 2 else text)
    for path in ("folder", write_rows("a.jsonl", [{"text": text} for text in texts])):
        run(path, "--tokenizer", "bpe:300", "--val-fraction", val_fraction, "--force")
        train, val = read_documents("train"), read_documents("val")
        if n == 100:
            assert (train, val) == ([t for t in texts if t not in hashed], hashed)
        else:
            assert ("".join(train), "".join(val)) == (whole[:boundary], whole[boundary:])
        assert contents()["tokenizer.tiktoken"].decode() == prepare_data.make_ranks(300, train)
        for split, documents in (("train", train), ("val", val)):
            counts = prepare_data.read_meta(Path("out"))["splits"][split]
            assert counts["documents"] == len(documents)
            assert counts["bytes"] == len("".join(documents).encode())
            assert counts["words"] == len(" ".join(documents).split())


def test_a_data_set_that_was_made_otherwise_is_kept_and_check_finds_damage():
    first = [write_rows("a.jsonl", [{"text": PROSE, "b": PROSE[::-1]}]), "--tokenizer", "bpe:300"]
    run(*first)
    run("--check")
    before = contents()
    for made, *options in (
        ("tokenizer bpe:300", "a.jsonl", "--tokenizer", "bytes"),
        (f"source {Path('a.jsonl').resolve()}", write("b.txt", PROSE), *first[1:]),
        ("field text", *first, "--field", "b"),
        ("val_fraction 0.1, shards None", *first, "--val-fraction", 0.2, "--shards", 1),
    ):
        assert f"out was made with {made}. Choose another folder" in error(*options)
        assert contents() == before
    for name in ("val.bin", "tokenizer.tiktoken", "meta.json"):
        write(f"out/{name}", before[name][1:-7])
        assert name in error("--check")
        write(f"out/{name}", before[name])


def test_a_model_goes_on_with_another_text_and_the_tokenizer_of_the_first(tmp_path):
    text = " ".join(PROSE.split()[::-1]) * 30
    run(write("a.txt", PROSE * 30), "--tokenizer", "bpe:300", out="first")
    run(write("b.txt", text), "--tokenizer", "first", out="second")
    assert prepare_data.read_meta(Path("second"))["tokenizer_from"] == f"{Path('first').resolve()}"
    assert read_documents("train", "second")[0] + read_documents("val", "second")[0] == text
    train("gpt2", "first", tmp_path / "run", "--max-steps", 60, "--learning-rate", 1e-2)
    (row,) = train("gpt2", "second", tmp_path / "next", "--init-from", "run/ckpt.pt")
    assert float(row["train_loss"]) < np.log(300) - 1  # a new model begins at ln V


BAD_RUNS = [  # arguments, content of the file, message
    ("a.txt", b"abc" * 4000 + b"d\xff", "a.txt: byte 12,001 is not utf-8; use iconv"),
    ("a.txt.gz", gzip.compress(PROSE.encode())[:-20], "a.txt.gz: damaged: "),
    ("a.txt.zst", b"\x28\xb5", "a.txt.zst: unpack it first: unzstd 'a.txt.zst'"),
    ("a.txt", b"a", "a.txt: too little text for --val-fraction 0.1"),
    ("a.jsonl", b'\n{"text": "good"}\nplain\n{}\n', "a.jsonl: line 3: not JSON"),
    ("a.jsonl", b'\n{"text": "good"}\n[1]\n{}\n', "a.jsonl: row 2 is of type list"),
    ("openwebtext", b"", "pip install pyarrow"),  # before the download
    ("nope", b"", "nope: not a file, not a folder, and none of stdlib, python, shakespeare"),
    ("weights:distilgpt2", b"", "weights:distilgpt2: OpenAI's models are gpt2, gpt2-medium"),
    *((f"a.txt --tokenizer bpe:{n}", b"a", "N is from 257") for n in ("256", "65537", "x")),
    ("a.txt --tokenizer o200k_base", b"a", "more than 65,536 ids"),
    *((f"a.txt --val-fraction {x}", b"a", f"fraction {x}") for x in ("1.0", "-0.1", "nan")),
]


@pytest.mark.parametrize("command, content, message", BAD_RUNS, ids=[run[2] for run in BAD_RUNS])
def test_a_failing_run_is_one_line_and_changes_no_data_set(command, content, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    if content:
        Path(command.split()[0]).write_bytes(content)
    run(write("good.txt", PROSE), "--tokenizer", "bpe:290")
    before = contents()
    assert message in error("--tokenizer", "bpe:300", *command.split(), "--force")
    assert contents() == before


def test_ctrl_c_is_one_line_and_a_mistake_in_the_code_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "merge", lambda ids, pair, new: (1, 2, 3))
    with pytest.raises(ValueError, match="too many values"):  # students edit this file
        run(write("a.txt", PROSE), "--tokenizer", "bpe:300")
    monkeypatch.setattr(prepare_data, "merge", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as e:
        run("a.txt", "--tokenizer", "bpe:300")
    assert e.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_run_that_another_process_overtakes_leaves_a_whole_data_set(monkeypatch):
    options = [write("Ω 漢字.txt", PROSE), "--tokenizer", "bpe:270"]  # a name that cp1252 lacks
    run(*options, out="alone")
    train_bpe = prepare_data.train_bpe

    def overtaken(*args):
        command = [sys.executable, prepare_data.__file__, *options, "--out", "out"]
        subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, check=True)
        return train_bpe(*args)

    monkeypatch.setattr(prepare_data, "train_bpe", overtaken)
    run(*options)
    assert contents() == contents("alone")


def test_files_are_on_the_disk_before_they_take_their_names_and_meta_json_is_last(monkeypatch):
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300")
    on_disk, moved, replace = set(), [], os.replace

    def note_replace(source, target):
        assert os.stat(source)[:7] in on_disk  # up to its size
        assert not Path("out/meta.json").exists()
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda number: on_disk.add(os.fstat(number)[:7]))
    monkeypatch.setattr(os, "replace", note_replace)
    run("prose.txt", "--tokenizer", "bpe:300")
    assert sorted(moved) == sorted(contents()) and moved[-1] == "meta.json"


BODY = "".join(f"line {i} of the file, {i * i}\n" for i in range(10_000)).encode()  # 300 kB


class Handler(BaseHTTPRequestHandler):
    """Serves the server's answers: a code, a body, or with 206 the rest of it, and headers."""

    def do_GET(self):
        assert self.headers["Accept-Encoding"] == "identity"  # else it would be compressed
        begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.asked.append(begin)
        code, body, headers = self.server.answers.pop(0)
        body = body[begin:] if code == 206 else body
        self.send_response(code if body or code != 206 else 416)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


WHOLE = (206, BODY, {})
TAG = f'"{hashlib.sha256(BODY).hexdigest()}"'  # as the hub tells the SHA-256
REDIRECT = (302, b"", {"X-Linked-Etag": TAG, "Location": "/elsewhere"})
CUT = [(206, BODY[:n], {"Content-Length": len(BODY)}) for n in (70_000, 140_000, 140_000)]
DOWNLOADS = {  # bytes that an earlier run left, answers, the bytes from which on it is asked
    "Range is ignored": (b"", [CUT[0], (200, BODY, {})], [0, 65536]),
    "wrong bytes": (b"", [REDIRECT, (206, BODY[::-1], {}), REDIRECT, WHOLE], [0, 0, 0, 0]),
    "longer than the file": (BODY + b"!", [WHOLE, WHOLE], [len(BODY) + 1, 0]),
    "it always ends early": (BODY[:9], CUT, [9, 65545, 131081]),
}


@pytest.mark.parametrize("part, answers, starts", DOWNLOADS.values(), ids=DOWNLOADS)
def test_a_download_is_the_file_or_fails_after_three_tries(part, answers, starts, monkeypatch):
    write("input.txt.part", part)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answers, server.asked = [*answers], []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        wanted = f"http://127.0.0.1:{server.server_port}/x", Path("input.txt")
        if answers is CUT:
            with pytest.raises(prepare_data.UserError, match="save the file as input"):
                prepare_data.download(*wanted)
            assert waited == [0, 5, 10]
        else:
            for _ in range(2):  # what is there is not downloaded again
                assert prepare_data.download(*wanted).read_bytes() == BODY
        server.shutdown()
    assert server.asked == starts


LARGE = [  # repository on the hub, the names of its files, how many there are, tokens
    ("maths-college", "ajibawa-2023/Maths-College", "Maths-College-{}-Final.json", 6, 1.4e9),
    ("openwebmath", "open-web-math/open-web-math", "data/train-{}.parquet", 0, 14.7e9),
    ("openwebtext", "Skylion007/openwebtext", "plain_text/train-0000{}-of-00080.parquet", 80, 9e9),
    ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample/10BT/00{}_00000.parquet", 14, 10e9),
]


def test_large_data_sets_come_from_the_hub_with_ten_million_tokens_for_validation(monkeypatch):
    urls = []
    monkeypatch.setattr(prepare_data, "download", lambda url, path: urls.append(url) or path)
    monkeypatch.setattr(prepare_data, "import_pyarrow", lambda: None)  # a download needs none
    listing = [{"path": f"data/train-{i}.parquet"} for i in (1, 2, 0)]  # of openwebmath
    write("data/downloads/openwebmath/files.json", json.dumps(listing))
    for name, repository, file, n, tokens in LARGE:
        prepare_data.download_files(name, shards=2)
        url = f"{prepare_data.HUB}/datasets/{repository}/resolve/main/{file}"
        assert urls[-2:] == [url.format(0), url.format(1)]
        assert len(prepare_data.DATASETS[name].names) == n
        share = prepare_data.parse([name]).val_fraction
        assert 8e6 < share * tokens < 12e6 and f"{share} of " in prepare_data.__doc__
    assert f"{prepare_data.HUB}/api/datasets/open-web-math/open-web-math/tree/main/data" in urls


def test_weights_give_the_logits_of_hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    peer = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_layer=2, n_embd=128, n_head=2)).eval()
    state = peer.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    torch.save(state, write("data/downloads/gpt2.bin", b""))
    prepare_data.main(["weights:gpt2"])
    assert "has a checkpoint already" in refused(prepare_data.main, "weights:gpt2")
    ckpt = torch.load("out/gpt2-openai/ckpt.pt", weights_only=True)
    gpt2 = load("gpt2")
    model = gpt2.Model(gpt2.Config(**ckpt["config"])).eval()
    model.load_state_dict(ckpt["model"])
    idx = torch.randint(97, (2, 16))
    torch.testing.assert_close(model(idx)[..., :97], peer(idx).logits, rtol=1e-4, atol=1e-4)
