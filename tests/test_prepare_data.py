"""prepare_data.py: byte-pair encoding against a slow, obvious trainer; the contents of token files; downloads from a
server that fails on purpose; errors in one line. Every test runs in its own empty folder."""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from conftest import load, refused

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
ROWS = [{"instruction": f"{i} + 1", "output": f"é{i + 1}\n", "text": UNICODE[i:]} for i in range(30)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, reads text in small blocks, and does not wait between tries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "BLOCK", 128)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def run(*argv, out="out"):
    prepare_data.main([*map(str, argv), "--out", out])


def error(*argv, out="out"):
    return refused(prepare_data.main, *argv, "--out", out)


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
    """Counts all pairs, merges the most frequent, starts over. Returns the tokens, and the tokens of each word."""
    tokens = [bytes([b]) for b in range(256)]
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(tokens) < vocab_size - 1 and max(map(len, parts.values())) > 1:
        counts = Counter(pair for word, n in words.items() for pair in n * [*zip(parts[word], parts[word][1:])])
        best = max(counts, key=lambda pair: (counts[pair], pair))  # ties: the greater pair of byte strings
        tokens.append(best[0] + best[1])
        for part in parts.values():
            for i in range(len(part)):
                if tuple(part[i : i + 2]) == best:
                    part[i : i + 2] = [tokens[-1]]
    return tokens, parts


def test_merges_equal_the_reference_in_any_order_and_tiktoken_encodes_alike():
    """In aab (a, a) and (a, b) are equally frequent, and (a, b) is greater. Random words of few letters have overlaps,
    ties, and pairs that appear and vanish."""
    texts = [PROSE, UNICODE * 2, "aaaaaaa aaaaa aaaa aaa bbbbbbbbb ababababa ababab abaabaabaaba"]
    cases = [(Counter(regex.findall(prepare_data.SPLIT_PATTERN, text)), 400) for text in texts]
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice(["a", "ab", "abc", "a\0", "aé漢"])
        words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 8))]
        cases.append(({word: rng.randint(1, 4) for word in words}, rng.randint(257, 290)))
    for words, vocab_size in [*cases, ({"aab": 2}, 1000)]:
        tokens, parts = reference_bpe(words, vocab_size)
        assert prepare_data.train_bpe(words, vocab_size) == tokens, words
        assert prepare_data.train_bpe(dict(rng.sample([*words.items()], len(words))), vocab_size) == tokens, words
        ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
        tokenizer = prepare_data.load_tokenizer(f"bpe:{vocab_size}", ranks)
        for word, part in parts.items():
            assert tokenizer.decode_tokens_bytes(tokenizer._encode_single_piece(word)) == part
    assert tokens[256:] == [b"ab", b"aab"]


def test_the_trainer_sees_the_start_of_the_training_split_and_of_long_words(monkeypatch):
    text = "abab " * 80 + "zqzq " * 40 + "xjxj " * 40  # the last words are validation
    for limit, learned in ((2**26, b"abzq "), (300, b"ab ")):
        monkeypatch.setattr(prepare_data, "BPE_BYTES", limit)
        run(write("two.txt", text), "--tokenizer", "bpe:300", "--val-fraction", 0.25)
        merged = [token for token in read_tokenizer().token_byte_values() if len(token) > 1]
        assert set(b"".join(merged)) == set(learned)
    monkeypatch.setattr(prepare_data, "LONG_WORD", 4)
    assert prepare_data.count_words(iter(["abcdabcd xy", "ab"])) == {"abcd": 1, " xy": 1, "ab": 1}


@pytest.mark.parametrize("n, size", [(257, 257), (258, 258), (1000, 258)])  # "ab" is the only pair
def test_token_files_are_little_endian_uint16_of_bytes_then_merges_then_end_of_text(n, size):
    run(write_jsonl("four.jsonl", ["ab", "c", "", "ab"]), "--tokenizer", f"bpe:{n}", "--val-fraction", 0)
    ab, eot = [256] if size == 258 else [*b"ab"], size - 1
    ids = [*ab, eot, ord("c"), eot, *ab]  # end of text stands between documents, not before or after them
    assert Path("out/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)
    assert [read_meta()[key] for key in ("vocab_size", "tokenizer", "eot")] == [size, f"bpe:{n}", eot]
    assert [read_tokenizer().decode_bytes(range(256)), read_tokenizer().max_token_value] == [bytes(range(256)), eot]


@pytest.mark.parametrize("text", [ODD, " \n" * 400 + "a", "a" * 900, "!\x1c?\x1d" * 200])
def test_encoding_in_pieces_gives_the_ids_of_the_whole_and_decodes_to_it(text):
    """\\x1c is white space to Python's str and re, not to tiktoken. A very long word is cut anywhere."""
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


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.parquet"])
def test_rows_of_json_and_parquet_are_documents(name):
    if name == "a.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), name, row_group_size=7)
    else:
        write(name, json.dumps(ROWS, indent=1) if name == "array.json" else "\n\n".join(map(json.dumps, ROWS)))
    for fields in (["text"], ["instruction", "output"]):
        run(name, "--field", ",".join(fields), "--tokenizer", "bytes", "--val-fraction", 0)
        assert read_documents() == ["\n\n".join(row[field] for field in fields) for row in ROWS]
    assert "KeyError: 'nothing'" in error(name, "--field", "nothing", "--tokenizer", "bytes")
    lone = write("lone.jsonl", r'{"text": "\ud83d\ude00 \ud800a \ude00\ud83d"}')  # one pair, then unpaired ones
    run(lone, "--tokenizer", "bytes", "--val-fraction", 0, "--force")
    assert read_documents() == ["😀 \ufffda \ufffd\ufffd"]


def test_downloaded_data_sets_are_read_as_documents():
    for i in range(6):
        write(f"data/downloads/maths-college/{i}-Final.json", json.dumps(ROWS))
    run("maths-college", "--tokenizer", "bytes", "--val-fraction", 0, "--shards", 5)
    assert read_documents() == [f"{row['instruction']}\n\n{row['output']}" for row in ROWS] * 5
    stories = [PROSE.strip(), "Once upon a time.\n\nThe end.", UNICODE.strip(), "x", "A cat.\nA <|endof a hat."]
    write("data/downloads/tinystories/train.txt", "\n<|endoftext|>\n".join(stories))
    write("data/downloads/tinystories/valid.txt", "\n<|endoftext|>\n".join([*stories[::-1], " ", ""]))
    run("tinystories", "--tokenizer", "bytes", "--force")
    assert read_documents() == stories and read_documents("val") == stories[::-1]
    articles = [" \n = First Title = \n \n With = signs = . \n \n = = Section = = \n \n", " = Second , Title = \n . \n"]
    with zipfile.ZipFile(write("data/downloads/wikitext2/wikitext-2-raw-v1.zip", ""), "w") as archive:
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
    """The same from a folder or a .jsonl, and documents that are added do not move others to another split."""
    texts = [f"Document {i}. {PROSE[i : i + 40]}" for i in range(200)]
    val = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 64}
    for i, text in enumerate(texts):
        write(f"folder/{i}.txt", text)
    for path, inside in (("folder", texts), (write_jsonl("some.jsonl", texts[100:]), texts[100:])):
        run(path, "--tokenizer", "bytes", "--val-fraction", 0.25, "--force")
        assert set(read_documents()) == {*inside} - val and set(read_documents("val")) == {*inside} & val


@pytest.mark.parametrize("n", [1, 3, 19])
def test_few_documents_are_split_by_position_and_meta_json_counts_them(n):
    """Wherever the boundary falls, train and val together are the text, and at most one document is in both."""
    texts = [f"{i:02} aé漢🙂\r\n e\u0301\u00a0{i} {PROSE[i:] * (i % 3)}" for i in range(n)]
    for i, text in enumerate(texts):
        write(f"folder/{i:02}.txt", text)
    for val_fraction in (0.3, 0.5, 0.7):
        boundary = round(len("".join(texts)) * (1 - val_fraction))
        for path in ("folder", write_jsonl("few.jsonl", texts)):
            run(path, "--tokenizer", "bpe:260", "--val-fraction", val_fraction, "--force")
            splits = {split: read_documents(split) for split in ("train", "val")}
            assert "".join(splits["train"]) == "".join(texts)[:boundary]
            assert "".join(splits["val"]) == "".join(texts)[boundary:]
            assert n <= len(splits["train"]) + len(splits["val"]) <= n + 1
            for split, documents in splits.items():
                assert read_meta()["splits"][split] == {
                    "tokens": len(np.fromfile(f"out/{split}.bin", "<u2")),
                    "bytes": len("".join(documents).encode()),
                    "words": sum(len(text.split()) for text in documents),
                    "documents": len(documents),
                    "sha256": hashlib.sha256(Path(f"out/{split}.bin").read_bytes()).hexdigest(),
                }
    run(path, "--tokenizer", "bytes", "--val-fraction", 0, "--force")
    assert sorted(contents()) == ["meta.json", "train.bin"] and read_documents() == texts


BAD_LINES = [b"plain", b'{"text": "a"', b"[1]", b'"text"', b"null", b'{"other": 1}', b'{"text": 5}']
BAD_RUNS = [  # arguments, content of the file, message
    ("a.txt", b"abc" * 100 + b"\xff", "a.txt: byte 300 is not UTF-8"),
    ("a.txt", b"abc\xe6\xbc", "a.txt: byte 3 is not UTF-8"),
    ("a.txt", b"", "a.txt: no text for train.bin"),
    ("a.txt", b"a", "a.txt: no text for val.bin"),
    ("a.json", b'[{"text": "a"}, ', "a.json: object 1: "),
    *(("a.jsonl", b'{"text": "good"}\n' * 40 + bad + b"\n{}\n", "a.jsonl: object 41: ") for bad in BAD_LINES),
    ("a.parquet", b"\x89PNG", "a.parquet: object 1: " if HAS_PYARROW else "pip install pyarrow"),
    ("wikitext2", b"\x89PNG", "not a zip file"),
    ("nope", b"", "nope: not a file"),
    *((f"a.txt --tokenizer {name}", PROSE, "257") for name in ("bpe:256", "bpe:65537", "bpe:abc", "bpe:")),
    ("a.txt --tokenizer o200k_base", PROSE, "more than 65,536 ids"),
    *((f"a.txt --val-fraction {x}", PROSE, f"fraction {x}") for x in ("1.0", "-0.1", "nan")),
]


@pytest.mark.parametrize("argv, content, message", BAD_RUNS)
def test_a_failing_run_is_one_line_and_leaves_the_older_data_set_or_no_folder(argv, content, message):
    name, argv = argv.split()[0], ["--tokenizer", "bpe:300", *argv.split()]
    write(name if "." in name else "data/downloads/wikitext2/wikitext-2-raw-v1.zip", content)
    assert message in error(*argv, out="new") and not Path("new").exists()
    run(write("good.txt", PROSE), "--tokenizer", "bpe:290")
    before = contents()
    assert message in error(*argv, "--force") and contents() == before


def test_a_data_set_of_another_tokenizer_or_source_is_overwritten_only_with_force():
    run(write("notes.txt", PROSE), "--tokenizer", "bpe:300")
    before = contents()
    run(write("./other/../notes.txt", PROSE), "--tokenizer", "bpe:300")  # the same source
    for argv in (["notes.txt", "--tokenizer", "bytes"], [write("other/notes.txt", PROSE), "--tokenizer", "bpe:300"]):
        assert regex.search("out was made from .*bpe:300.*--out.*--force", error(*argv)) and contents() == before
        run(*argv, "--force")
        assert contents() != before
        run("notes.txt", "--tokenizer", "bpe:300", "--force")


def test_check_finds_each_kind_of_damage_and_its_hint_repairs_it():
    run(write("my notes.txt", PROSE * 3), "--tokenizer", "bpe:300")
    before, meta = contents(), read_meta()
    prepare_data.main(["--check", "out"])
    high = before["train.bin"] + (300).to_bytes(2, "little")
    meta["splits"]["train"]["sha256"] = hashlib.sha256(high).hexdigest()
    damages = {
        "val.bin: changed": {"val.bin": before["val.bin"][:-2] + b"\0\0"},
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
        process.kill()
        assert process.wait() == -9
        assert {name: data for name, data in contents().items() if partial.name not in name} == before
    write(partial / "test.bin", "of another source")
    run("prose.txt", "--tokenizer", "bytes")
    assert contents() == before


def test_files_are_on_the_disk_before_they_take_their_names(monkeypatch):
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300")
    sizes, moved, replace = {}, [], os.replace

    def note_replace(source, target):
        assert sizes[os.stat(source).st_ino] == os.stat(source).st_size and not Path("out/meta.json").exists()
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: sizes.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}))
    monkeypatch.setattr(os, "replace", note_replace)
    run("prose.txt", "--tokenizer", "bpe:300")
    assert sorted(moved) == sorted(contents()) and moved[-1] == "meta.json"


BODY = "".join(f"line {i} of the file, {i * i}\n" for i in range(10_000)).encode()  # 300 kB, all lines differ
TAG = ("X-Linked-Etag", f'"{hashlib.sha256(BODY).hexdigest()}"')  # as the hub tells the SHA-256 of large files


class Handler(BaseHTTPRequestHandler):
    """Keeps the Range headers, and serves one of the server's answers after the other, repeating the last one."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        self.answer(**self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0])

    def answer(self, body=BODY, code=200, send=None, ranges=True, headers=()):
        """The body, or the range that is asked for; only `send` bytes of it, if given."""
        asked = self.headers.get("Range") if ranges else None
        start, size = int(asked[6:-1]) if asked else 0, len(body)
        beyond = asked and start >= size
        self.send_response(code if code != 200 else 416 if beyond else 206 if asked else 200)
        span = [("Content-Range", f"bytes {'*' if beyond else f'{start}-{size - 1}'}/{size}")] if asked else []
        for name, value in (*headers, *span, ("Content-Length", 0 if beyond else size - start)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[start:][:send])


REDIRECT = {"body": b"", "code": 302, "headers": [TAG, ("Location", "/elsewhere")]}
DOWNLOADS = {  # bytes that an earlier run left, answers, Range headers
    "Range is ignored": (b"", [{"send": 200_000}, {"ranges": False}], ["bytes=0-", "bytes=196608-"]),
    "temporary errors": (b"", [{"code": 503}, {"code": 429}, {}], ["bytes=0-"] * 3),
    "wrong bytes": (b"", [REDIRECT, {"body": BODY[::-1]}, REDIRECT, {}], ["bytes=0-"] * 4),
    "part of an earlier run": (BODY[:9], [{}], ["bytes=9-"]),
    "all but its name": (BODY, [{}], [f"bytes={len(BODY)}-"]),
    "longer than the file": (BODY + b"!", [{}], [f"bytes={len(BODY) + 1}-", "bytes=0-"]),
    "fails: 404": (b"", [{"code": 404}], ["bytes=0-"]),
    "fails: wrong bytes": (b"", [{"body": BODY[::-1], "headers": [TAG]}], ["bytes=0-"] * 3),
    "fails: ends early": (b"", [{"send": 70_000}], ["bytes=0-", "bytes=65536-", "bytes=131072-"]),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_the_file_or_one_line_after_three_tries(name, monkeypatch):
    (part, answers, ranges), command = DOWNLOADS[name], ["shakespeare", "--tokenizer", "bytes", "--val-fraction", 0]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.answers, server.asked, url = list(answers), [], f"http://127.0.0.1:{server.server_address[1]}/"
        here = prepare_data.DataSet(url, ["input.txt"])
        monkeypatch.setitem(prepare_data.DATASETS, "shakespeare", here)
        if part:
            write("data/downloads/shakespeare/input.txt.part", part)
        if "fails" in name:
            assert url in error(*command) and server.asked == ranges and not Path("out").exists()
            assert list(contents("data").values()) == ([BODY[:196608]] if "early" in name else [])
            server.answers = [{}]
        run(*command)
        run(*command)  # does not download an existing file again
        assert read_documents() == [BODY.decode()] and list(contents("data").values()) == [BODY]
        assert server.asked[: len(ranges)] == ranges and len(server.asked) == len(ranges) + ("fails" in name)
        server.shutdown()


def test_weights_give_the_logits_of_hugging_face():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = load("gpt2")
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_layer=2, n_embd=128, n_head=2)).eval()
    state = theirs.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    torch.save(state, write("data/downloads/gpt2.bin", ""), _use_new_zipfile_serialization=False)  # as OpenAI's
    prepare_data.main(["weights:gpt2"])
    ckpt = torch.load("out/gpt2-openai/ckpt.pt", weights_only=True)
    ours = gpt2.Model(gpt2.Config(**ckpt["config"])).eval()
    ours.load_state_dict(ckpt["model"])
    idx = torch.randint(97, (2, 16))
    torch.testing.assert_close(ours(idx)[..., :97], theirs(idx).logits, rtol=1e-4, atol=1e-4)
