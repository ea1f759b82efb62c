"""prepare_data.py: byte-pair encoding against a slow, obvious trainer; texts as people have them;
what token files hold; downloads from a server that fails on purpose; errors in one line. Every test
runs in its own empty folder."""

import argparse
import base64
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
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
import urllib3
from conftest import argv, load, refused, rows

import prepare_data

SHARED = Path(prepare_data.__file__).resolve().parent.parent / "shared"
HAS_PYARROW = importlib.util.find_spec("pyarrow")
EOT = "<|endoftext|>"
PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the
age of foolishness, it was the epoch of belief. They didn't know what we'll see in 1859.
"""
UNICODE = """naïve café Zoë, Ελλάδα, Москва; 你好你好 漢字仮名交じり文 한국어 🙂🙂🙂
👩\u200d👧 👩\u200d👧 e\u0301 n\u0303 a\u0300\u0301 \u00a0\u00a0NBSP\u00a0 \u3000wide\u3000\u3000
\u2028\u0085 \ufffe\uffff\x00
"""
SPACES = [" ", "  ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u00a0\u00a0 ", "\u3000", "\u2028"]
WORDS = ["漢字漢字", "é", "e\u0301", "🙂", "\u200b", "\x1c", "\x85", "\ud7ff", UNICODE]
WORDS += ["the", "don't", "'ll", "1859", "!?", "...", "_x_", "<|endof", r"\ud800"]
ODD = "".join(random.Random(0).choices(SPACES + WORDS, k=1500))
ROWS = [{"instruction": f"{i}", "output": f"é{i}\n", "text": UNICODE[i:]} for i in range(30)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, reads text in small blocks, and waits for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "BLOCK", 128)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def run(*options, out="out"):
    prepare_data.main([*map(str, options), "--out", out])


def run_bytes(*options, out="out"):
    """With a tokenizer whose ids are bytes, and without validation, if nothing else is said."""
    run("--tokenizer", "bytes", "--val-fraction", 0, "--force", *options, out=out)


def error(*options, out="out"):
    return refused(prepare_data.main, *options, "--out", out)


def write(path, content):
    """Writes a text or bytes to a file, and returns its path. A .gz file gets them compressed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    Path(path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)
    return path


def write_rows(path, rows):
    """Writes rows, which are dicts, to a .jsonl or .parquet file."""
    if path.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        return write_table(path, pa.Table.from_pylist(rows), row_group_size=7)
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_table(path, table, **options):
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)
    return path


def write_texts(path, texts):
    return write_rows(path, [{"text": text} for text in texts])


def contents(path="out"):
    files = [p for p in Path(path).rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def read_meta(out="out"):
    return json.loads(Path(out, "meta.json").read_text(encoding="utf-8"))


def read_tokenizer(out="out"):
    path = Path(out, "tokenizer.tiktoken")
    ranks = path.read_text(encoding="utf-8") if path.exists() else ""
    return prepare_data.load_tokenizer(read_meta(out)["tokenizer"], ranks)


def read_ids(split="train", out="out"):
    return np.fromfile(f"{out}/{split}.bin", "<u2")


def read_documents(split="train", out="out"):
    """The documents of a split: its ids, cut at end of text and decoded."""
    ids = read_ids(split, out)
    eot = read_meta(out)["eot"]
    parts = np.split(ids, np.flatnonzero(ids == eot))
    decode = read_tokenizer(out).decode_bytes
    return [decode(part[part != eot].tolist()).decode() for part in parts]


# --- byte-pair encoding


def reference_bpe(words, vocab_size):
    """Counts all pairs, merges the most frequent one, and starts again. Returns the tokens, and the
    tokens of each word."""
    tokens = [bytes([b]) for b in range(256)]
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(tokens) < vocab_size - 1 and max(map(len, parts.values())) > 1:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                counts[pair] += n
        best = max(counts, key=lambda pair: (counts[pair], pair))  # ties: the greater byte strings
        tokens.append(best[0] + best[1])
        for part in parts.values():
            for i in range(len(part)):
                if tuple(part[i : i + 2]) == best:
                    part[i : i + 2] = [tokens[-1]]
    return tokens, parts


def bpe_cases():
    """In aab, (a, a) and (a, b) are equally frequent, and (a, b) is greater. Random words of few
    letters have overlaps, ties, and pairs that appear and vanish."""
    letters = "aaaaaaa aaaaa aaaa aaa bbbbbbbbb ababababa ababab abaabaabaaba"
    for text in (PROSE, UNICODE * 2, letters):
        yield Counter(regex.findall(prepare_data.SPLIT_PATTERN, text)), 400
    rng = random.Random(0)
    for _ in range(300):
        alphabet = rng.choice(["a", "ab", "abc", "a\0", "aé漢"])
        n = rng.randint(1, 8)
        words = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(n)]
        yield {word: rng.randint(1, 4) for word in words}, rng.randint(257, 290)
    yield {"aab": 2}, 1000


def test_merges_equal_the_reference_in_any_order_and_tiktoken_encodes_alike():
    rng = random.Random(1)
    for words, vocab_size in bpe_cases():
        tokens, parts = reference_bpe(words, vocab_size)
        shuffled = dict(rng.sample([*words.items()], len(words)))
        assert prepare_data.train_bpe(words, vocab_size) == tokens, words
        assert prepare_data.train_bpe(shuffled, vocab_size) == tokens, words
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
        tokenizer = prepare_data.load_tokenizer(f"bpe:{vocab_size}", "".join(lines))
        for word, part in parts.items():
            assert tokenizer.decode_tokens_bytes(tokenizer._encode_single_piece(word)) == part
    assert tokens[256:] == [b"ab", b"aab"]


def test_the_trainer_sees_the_start_of_the_training_split_and_of_long_words(monkeypatch):
    text = "abab " * 80 + "zqzq " * 40 + "xjxj " * 40  # the last words are validation
    path = write("two.txt", text)
    for limit, learned in ((2**26, b"abzq "), (300, b"ab ")):
        monkeypatch.setattr(prepare_data, "BPE_BYTES", limit)
        run(path, "--tokenizer", "bpe:300", "--val-fraction", 0.25)
        merged = [token for token in read_tokenizer().token_byte_values() if len(token) > 1]
        assert set(b"".join(merged)) == set(learned)
    monkeypatch.setattr(prepare_data, "LONG_WORD", 4)
    assert prepare_data.count_words(iter(["abcdabcd xy", "ab"])) == {"abcd": 1, " xy": 1, "ab": 1}


def test_the_trainers_limit_is_in_bytes(monkeypatch):
    monkeypatch.setattr(prepare_data, "BPE_BYTES", 3)
    assert prepare_data.count_words(iter(["é", "b", "c"])) == {"é": 1, "b": 1}  # 2 bytes, and 1


# --- token files


@pytest.mark.parametrize("n, size", [(257, 257), (258, 258), (1000, 258)])  # "ab" is the only pair
def test_token_files_are_little_endian_uint16_of_bytes_then_merges_then_end_of_text(n, size):
    path = write_texts("four.jsonl", ["ab", "c", "", "ab"])
    run(path, "--tokenizer", f"bpe:{n}", "--val-fraction", 0)
    ab = [256] if size == 258 else [*b"ab"]
    eot = size - 1
    ids = [*ab, eot, ord("c"), eot, *ab]  # end of text stands between documents alone
    assert Path("out/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)
    meta = read_meta()
    assert (meta["vocab_size"], meta["tokenizer"], meta["eot"]) == (size, f"bpe:{n}", eot)
    assert read_tokenizer().decode_bytes(range(256)) == bytes(range(256))
    assert read_tokenizer().max_token_value == eot


@pytest.mark.parametrize("text", [ODD, " \n" * 400 + "a", "a" * 900, "!\x1c?\x1d" * 200])
def test_encoding_in_pieces_gives_the_ids_of_the_whole_and_decodes_to_it(text):
    """\\x1c is white space to Python's str and re, not to tiktoken. A long word is cut anywhere."""
    for path in (write("odd.txt", text), write_texts("odd.jsonl", [text])):
        run(path, "--tokenizer", "bpe:400", "--val-fraction", 0, "--force")
        ids = read_tokenizer().encode_ordinary(text)
        assert read_ids().tolist() == ids
        assert prepare_data.encode(read_tokenizer(), text) == ids
        run_bytes(path)
        assert read_documents() == [text]
    pieces = list(prepare_data.cut("ab " + "x" * 5000))
    assert "".join(pieces) == "ab " + "x" * 5000
    assert max(map(len, pieces)) <= 9 * 128


def test_a_million_spaces_are_encoded_where_tiktoken_panics(monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 2**16)
    tokenizer = prepare_data.load_tokenizer("bytes")
    text = " " * 1_000_000 + "end"
    with pytest.raises(BaseException, match="StackOverflow"):  # a PanicException is no Exception
        tokenizer.encode_ordinary(text)
    assert prepare_data.encode(tokenizer, text) == [*text.encode()]
    assert prepare_data.encode(tokenizer, "") == []


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_gpt2_is_tiktokens_and_our_split_pattern_is_its_own():
    gpt2 = tiktoken.get_encoding("gpt2")
    names = {"pat_str": prepare_data.SPLIT_PATTERN, "mergeable_ranks": gpt2._mergeable_ranks}
    ours = tiktoken.Encoding("ours", special_tokens={}, **names)
    assert ours.encode_ordinary(ODD) == gpt2.encode_ordinary(ODD)
    run(write("odd.txt", ODD), "--tokenizer", "gpt2", "--val-fraction", 0)
    assert read_ids().tolist() == gpt2.encode_ordinary(ODD)
    assert read_meta()["eot"] == 50256


# --- texts as they are found


SEPARATED = {  # texts that are four documents
    "on a line of its own": f"one\n{EOT}\n two\nlines\n{EOT}\nthree\n\n{EOT}\nfour\n",
    "inside a line": f"one{EOT} two\nlines{EOT}three{EOT}four",
    "CRLF": f"one\r\n{EOT}\r\n two\r\nlines\r\n{EOT}\r\nthree\r\n{EOT}\r\nfour",
    "side by side": f"{EOT}one{EOT}\n{EOT}two\nlines{EOT}{EOT}{EOT}three\n{EOT} \n{EOT}four{EOT}",
}


@pytest.mark.parametrize("name", SEPARATED)
def test_a_text_is_parted_at_its_separators_and_nothing_of_them_stays(name, monkeypatch):
    write("folder/a.txt", SEPARATED[name])
    for block in (13, 14, 17, 128):  # wherever the blocks end
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        for path in ("folder/a.txt", "folder"):
            run_bytes(path)
            assert read_documents() == ["one", "two\nlines", "three", "four"]
            assert read_meta()["splits"]["train"]["documents"] == 4


def test_rows_and_programs_that_talk_about_the_separator_keep_it_as_ordinary_text():
    text = f"The separator is {EOT}, a token."
    for path in (write_texts("a.jsonl", [text]), write("a.py", text)):
        run_bytes(path)
        assert read_documents() == [text]
        assert read_meta()["splits"]["train"]["tokens"] == len(text)


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16-LE", "UTF-16-BE"])
def test_a_byte_order_mark_is_no_text_and_tells_utf_16(encoding):
    text = UNICODE.strip()
    row = json.dumps({"text": text})
    files = {"a.txt": text, "b.txt.gz": text, "a.jsonl": row, "b.json": row, "a.json": f"[{row}]"}
    for name, content in files.items():
        run_bytes(write(name, f"\ufeff{content}".encode(encoding)))
        assert read_documents() == [text]


def test_line_ends_of_windows_become_lf_in_text_files_and_it_is_said(capsys, monkeypatch):
    write("folder/a.txt", "one\r\ntwo\r\n\r\nthree\n")
    write("folder/b.txt", "one\ntwo")
    for block in (1, 2, 3, 128):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        run_bytes("folder/a.txt")
        assert read_documents() == ["one\ntwo\n\nthree\n"]
        assert "line ends CRLF became LF in 1 of 1 files" in capsys.readouterr().out
    run_bytes("folder")
    assert read_documents() == ["one\ntwo\n\nthree\n", "one\ntwo"]
    assert "in 1 of 2 files" in capsys.readouterr().out
    run_bytes("folder/b.txt")
    assert "CRLF" not in capsys.readouterr().out
    run_bytes(write_texts("a.jsonl", ["one\r\ntwo"]))  # this is what the row says
    assert read_documents() == ["one\r\ntwo"]


def test_compressed_texts_are_read_and_the_folder_has_their_name():
    prepare_data.main([write("notes.txt.gz", PROSE), "--tokenizer", "bytes", "--val-fraction", "0"])
    assert read_documents(out="data/notes") == [PROSE]
    write("folder/a.txt.gz", f"one{EOT}two")
    write("folder/b.jsonl.gz", json.dumps({"text": "three"}))
    write("folder/c.txt", "four")
    run_bytes("folder")
    assert read_documents() == ["one", "two", "three", "four"]


def test_a_compressed_text_is_read_as_a_stream():
    """The file has 50 MB; more than 20 MB of them are never in memory."""
    path = write("large.txt.gz", (PROSE * 300_000)[:50_000_000])
    code = "import pathlib, prepare_data, resource\n"
    code += "size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = size()\n"
    code += f"for document in prepare_data.read_documents(pathlib.Path('{path}'), {{}}):\n"
    code += "    for piece in prepare_data.cut(document): pass\nprint(size() - start)"
    code = code.replace("{}", "prepare_data.Counter()")
    environment = os.environ | {"PYTHONPATH": str(Path(prepare_data.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert 0 <= int(done.stdout) < 20_000  # kB


UNPACK = [("zst", "unzstd"), ("bz2", "bunzip2"), ("xz", "unxz"), ("zip", "unzip")]


@pytest.mark.parametrize("suffix, command", UNPACK)
def test_other_compressions_get_a_line_that_says_how_to_unpack_them(suffix, command):
    said = error(write(f"my notes.txt.{suffix}", b"\x28\xb5\x2f\xfd\x00"))
    assert f"unpack it first: {command} 'my notes.txt.{suffix}'" in said
    assert "utf-8" not in said.lower()


def test_a_folder_is_read_in_order_and_what_is_skipped_is_said(capsys):
    texts = [PROSE, "x", UNICODE, "<|endof", "  ", "x", "{}", PROSE[::-1], "x"]
    for i, text in enumerate(texts):
        write(f"my texts/{'abc'[i % 3]}/{i}.{'TXT' if i == 4 else 'txt'}", text)
    for name in ("image.txt/image.png", "readme.MD", "Makefile", "a.md"):
        write(f"my texts/{name}", "not a text")
    for name in ("._a.txt", ".hidden.txt", ".git/a.txt", "b/.c/d.txt"):
        write(f"my texts/{name}", f"hidden {name}")
    prepare_data.main(["my texts", "--tokenizer", "bpe:300", "--val-fraction", "0"])
    documents = dict.fromkeys(texts[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8))  # a, then b, then c
    assert read_documents(out="data/my texts") == list(documents)
    said = capsys.readouterr().out.splitlines()[0]
    skipped = "2 .md, 1 .png, 1 without a suffix, 2 identical"
    assert sorted(said.partition(" skipped: ")[2].split(", ")) == sorted(skipped.split(", "))


# --- rows


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.parquet"])
def test_rows_of_json_and_parquet_are_documents(name):
    if ".json" in name:
        lines = "\n\n".join(map(json.dumps, ROWS))
        write(name, json.dumps(ROWS, indent=1) if name == "array.json" else lines)
    else:
        write_rows(name, ROWS)
    for fields in (["text"], ["instruction", "output"]):
        run_bytes(name, "--field", ",".join(fields))
        assert read_documents() == ["\n\n".join(row[field] for field in fields) for row in ROWS]


def test_unpaired_surrogates_of_json_become_u_fffd():
    line = r'{"text": "\ud83d\ude00 \ud800a \ude00\ud83d"}'  # the first two are a pair
    run_bytes(write("lone.jsonl", line))
    assert read_documents() == ["😀 \ufffda \ufffd\ufffd"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_rows_without_text_are_left_out_and_counted(kind, capsys):
    without = [{"text": None}, {"n": 1}, {"text": ""}, {"text": " \n"}]
    some = [{"text": "one"}, *without, {"text": "two"}]
    run_bytes(write_rows(f"a{kind}", some * 100))
    assert read_documents() == ["one", "two"] * 100
    assert read_meta()["splits"]["train"]["documents"] == 200
    assert "400 of 600 rows have no text" in capsys.readouterr().out
    run_bytes(write_rows(f"b{kind}", [{"text": "one"}]))
    assert "rows" not in capsys.readouterr().out


def test_parquet_columns_of_any_kind_of_text_are_read(capsys):
    pa = pytest.importorskip("pyarrow")
    texts = ["one", None, "", " \n", "two"]
    strings = pa.array(texts)
    large = pa.array(texts, pa.large_string())
    chunks = pa.chunked_array([strings[:2], strings[2:]])
    for column in (strings, large, strings.dictionary_encode(), chunks):
        run_bytes(write_table("a.parquet", pa.table({"text": column})))
        assert read_documents() == ["one", "two"]
        assert "3 of 5 rows have no text" in capsys.readouterr().out


def test_a_row_with_one_of_two_fields_has_the_text_of_that_one(capsys):
    pairs = [{"q": "1 + 1", "a": "2"}, {"q": "2 + 2", "a": None}, {"a": "6"}, {"q": "", "a": " "}]
    run_bytes(write_rows("a.jsonl", pairs), "--field", "q,a")
    assert read_documents() == ["1 + 1\n\n2", "2 + 2", "6"]
    assert "1 of 4 rows have no text" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("field, missing", [("text", "text"), ("body,text,a", "a, text")])
def test_if_no_row_has_the_field_one_line_names_those_of_the_first_row(kind, field, missing):
    path = write_rows(f"a{kind}", [{"body": "one", "id": 1}, {"body": "two", "z": 2}])
    there = f"a{kind}: no row has the field {missing}; the first row has body, id"
    assert there in error(path, "--field", field)
    run_bytes(path, "--field", "body")
    assert read_documents() == ["one", "two"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("value, name", [([1], "list"), (5, "int"), (True, "bool"), (0.5, "float")])
def test_a_field_that_holds_no_text_is_an_error_with_row_and_type(kind, value, name):
    path = write_rows(f"a{kind}", [{"q": "one", "text": None}, {"q": "two", "text": value}])
    for field in ("text", "q,text"):
        assert f"a{kind}: row 2: text is of type {name}. --field names the text" in error(
            path, "--field", field
        )


# --- data sets


def test_downloaded_data_sets_are_read_as_documents():
    for i in range(6):
        write(f"data/downloads/maths-college/{i}-Final.json", json.dumps(ROWS))
    run_bytes("maths-college", "--shards", 5)
    assert read_documents() == [f"{row['instruction']}\n\n{row['output']}" for row in ROWS] * 5

    stories = [PROSE.strip(), "Once upon a time.\n\nThe end.", UNICODE.strip(), "A <|endof."]
    reverse = stories[::-1]
    write("data/downloads/tinystories/train.txt", f"\n{EOT}\n".join(stories))
    write("data/downloads/tinystories/valid.txt", f"\n{EOT}\n".join([*reverse, " ", ""]))
    run("tinystories", "--tokenizer", "bytes", "--force")
    assert read_documents() == stories
    assert read_documents("val") == reverse

    first = " \n = First Title = \n \n With = signs = . \n \n = = Section = = \n \n"
    second = " = Second , Title = \n . \n"
    archive = zipfile.ZipFile(write("data/downloads/wikitext2/wikitext-2-raw-v1.zip", ""), "w")
    for name, text in (("train", first + second), ("valid", second), ("test", first)):
        archive.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    archive.close()
    run("wikitext2", "--tokenizer", "bytes", "--force")
    assert read_documents() == [first, second]
    assert read_documents("val") == [second]
    assert read_documents("test") == [first]
    run_bytes("wikitext2")
    assert sorted(contents()) == ["meta.json", "train.bin"]


@pytest.mark.parametrize("name", ["stdlib", "python"])
def test_python_sources_without_tests_and_tables(name):
    files = prepare_data.find_files(argparse.Namespace(name=name))
    assert Path(argparse.__file__) in files
    assert len(files) == len({path.read_bytes() for path in files})
    parts = {part for path in files for part in path.parts}
    installed = {"torch", "numpy", "tiktoken", "sympy", "urllib3"}  # torch needs sympy
    assert (installed <= parts) == (name == "python")
    assert not parts & {"pytest", "transformers", "tests", "test", "encodings"}


# --- training and validation


def test_documents_are_split_by_a_hash_of_their_text():
    """It is the same for a folder and a .jsonl, and documents stay where they are when others are
    added. A quarter of all hashes begins with a byte below 64."""
    texts = [f"Document {i}. {PROSE[i : i + 40]}" for i in range(200)]
    val = {text for text in texts if hashlib.sha256(text.encode()).digest()[0] < 64}
    for i, text in enumerate(texts):
        write(f"folder/{i}.txt", text.replace("\n", "\r\n") if i % 2 else text)
        write(f"packed/{i}.txt.gz", text)
    some = write_texts("some.jsonl", texts[100:])
    for path, inside in (("folder", texts), ("packed", texts), (some, texts[100:])):
        run(path, "--tokenizer", "bytes", "--val-fraction", 0.25, "--force")
        assert set(read_documents()) == {*inside} - val
        assert set(read_documents("val")) == {*inside} & val


@pytest.mark.parametrize("n", [1, 3, 19])
def test_few_documents_are_split_by_position_and_meta_json_counts_them(n):
    """Wherever the boundary falls, train and val together are the text, and at most one document is
    in both."""
    texts = [f"{i:02} aé漢🙂\n e\u0301\u00a0{i} {PROSE[i:] * (i % 3)}" for i in range(n)]
    whole = "".join(texts)
    for i, text in enumerate(texts):
        write(f"folder/{i:02}.txt", text)
    for val_fraction in (0.3, 0.5, 0.7):
        boundary = round(len(whole) * (1 - val_fraction))
        for path in ("folder", write_texts("few.jsonl", texts)):
            run(path, "--tokenizer", "bpe:260", "--val-fraction", val_fraction, "--force")
            splits = {split: read_documents(split) for split in ("train", "val")}
            assert "".join(splits["train"]) == whole[:boundary]
            assert "".join(splits["val"]) == whole[boundary:]
            assert n <= len(splits["train"]) + len(splits["val"]) <= n + 1
            for split, documents in splits.items():
                assert read_meta()["splits"][split] == {
                    "tokens": len(read_ids(split)),
                    "bytes": len("".join(documents).encode()),
                    "words": sum(len(text.split()) for text in documents),
                    "documents": len(documents),
                    "sha256": hashlib.sha256(Path(f"out/{split}.bin").read_bytes()).hexdigest(),
                }
    run_bytes(path)
    assert sorted(contents()) == ["meta.json", "train.bin"]
    assert read_documents() == texts


def test_a_hundred_documents_are_split_by_their_hash_and_99_by_position():
    """So that with a tenth for validation, some ten documents are in it."""
    texts = [f"Document {i}" for i in range(100)]
    hashes = {text: int(hashlib.sha256(text.encode()).hexdigest(), 16) for text in texts}
    run(write_texts("many.jsonl", texts), "--tokenizer", "bytes")
    assert read_documents("val") == [text for text in texts if hashes[text] < 0.1 * 2**256]
    whole = "".join(texts[:99])
    few = write_texts("few.jsonl", texts[:99])
    separated = write("few.txt", (EOT + EOT).join(texts[:99]))  # what is empty does not count
    for path in (few, separated):
        run(path, "--tokenizer", "bytes", "--force")
        assert "".join(read_documents()) == whole[: round(0.9 * len(whole))]


# --- what a folder of token files says about itself


def test_a_data_set_that_was_made_otherwise_is_overwritten_only_with_force():
    two = [{"text": PROSE, "other": PROSE[::-1]}]
    first = [write_rows("notes.jsonl", two), "--tokenizer", "bpe:300"]
    write_rows("other/notes.jsonl", two)
    run(*first)
    before = contents()
    run("./other/../notes.jsonl", "--tokenizer", "bpe:300")  # the same
    assert contents() == before
    run(*first, out="same")
    others = {
        "tokenizer bpe:300": ["notes.jsonl", "--tokenizer", "bytes"],
        "tokenizer_from None": ["notes.jsonl", "--tokenizer", "same"],
        f"source {Path('notes.jsonl').resolve()}": ["other/notes.jsonl", "--tokenizer", "bpe:300"],
        "field text": [*first, "--field", "other"],
        "val_fraction 0.1": [*first, "--val-fraction", 0.2],
    }
    for made, options in others.items():
        said = error(*options)
        assert f"out was made with {made}. Choose another folder with --out, or " in said
        assert "--force" in said
        assert contents() == before
        run(*options, "--force")
        assert contents() != before
        run(*first, "--force")
        assert contents() == before


@pytest.mark.parametrize("name", ["bpe:300", "bytes"])
def test_a_tokenizer_is_used_again_for_another_text(name):
    run(write("a.txt", PROSE * 3), "--tokenizer", name, out="first")
    run(write("b.txt", UNICODE * 3), "--tokenizer", "first", out="second")
    first = read_meta("first")
    second = read_meta("second")
    for key in ("tokenizer", "vocab_size", "eot"):
        assert second[key] == first[key]
    assert first["tokenizer_from"] is None
    assert second["tokenizer_from"] == str(Path("first").resolve())
    assert ("tokenizer.tiktoken" in contents("second")) == (name == "bpe:300")
    for file in {"tokenizer.tiktoken"} & contents("first").keys():
        assert contents("second")[file] == contents("first")[file]
    train = read_tokenizer("first").decode(read_ids(out="second").tolist())
    assert read_ids(out="second").tolist() == read_tokenizer("first").encode_ordinary(train)
    assert train + read_documents("val", "second")[0] == UNICODE * 3


def test_a_model_goes_on_with_another_text_and_the_tokenizer_of_the_first(tmp_path):
    gpt2 = load("gpt2")
    words = PROSE.split()
    run(write("a.txt", PROSE * 30), "--tokenizer", "bpe:300", out="first")
    run(write("b.txt", " ".join(words[::-1]) * 30), "--tokenizer", "first", out="second")
    run("b.txt", "--tokenizer", "bpe:300", out="alone")
    gpt2.main(argv("first", "run", "--n-layer", 1, "--max-steps", 60, "--learning-rate", 1e-2))
    one_step = ["--max-steps", 1, "--init-from", "run/ckpt.pt"]
    gpt2.main(argv("second", "next", *one_step))
    first_loss = float(rows(tmp_path / "next")[0]["train_loss"])
    assert first_loss < math.log(300) - 1  # a new model begins at ln V
    assert "another tokenizer" in refused(gpt2.main, *argv("alone", "no", *one_step))


def test_check_finds_each_kind_of_damage():
    run(write("my notes.txt", PROSE * 3), "--tokenizer", "bpe:300")
    before = contents()
    prepare_data.main(["--check", "--out", "out"])
    ranks = before["tokenizer.tiktoken"]
    fewer = ranks[: ranks.rindex(b"\nIH") + 1]  # without its last tokens
    damages = [
        ("val.bin", before["val.bin"][:-2] + b"\0\0", "val.bin: changed, or cut short"),
        ("train.bin", before["train.bin"][:-2], "train.bin: changed, or cut short"),
        ("tokenizer.tiktoken", fewer, "tokenizer.tiktoken was changed"),
        ("tokenizer.tiktoken", ranks[:100], "tokenizer.tiktoken is damaged"),
        ("meta.json", b'{"splits": ', "meta.json: damaged"),
    ]
    for name, content, message in damages:
        write(f"out/{name}", content)
        assert message in error("--check")
        if name == "meta.json":
            assert message in error("my notes.txt", "--tokenizer", "bpe:300")
        run("my notes.txt", "--tokenizer", "bpe:300", "--force")
        assert contents() == before


# --- errors


BAD_LINES = [
    (b"plain", "line 42: not JSON"),
    (b'{"text": "a"', "line 42: not JSON"),
    (b"[1]", "row 41 is of type list"),
    (b'"text"', "row 41 is of type str"),
    (b"null", "row 41 is of type NoneType"),
    (b'{"text": 5}', "row 41: text is of type int"),
    (b'{"text": "\xff"}', "a.jsonl: byte 691 is not utf-8"),
]
GOOD_LINES = b"\n" + b'{"text": "good"}\n' * 40
BAD_RUNS = [  # arguments, content of the file, message
    ("a.txt", b"abc" * 4000 + b"d\xff", "a.txt: byte 12,001 is not utf-8; use iconv"),
    ("a.txt", b"abc\xe6\xbc", "a.txt: byte 3 is not utf-8; use iconv"),
    ("a.txt", b"\xff\xfea\0b", "a.txt: byte 4 is not utf-16-le"),
    ("a.txt.gz", gzip.compress(b"abc" * 4000 + b"\xff"), "a.txt.gz: byte 12,000 is not utf-8"),
    ("a.txt.gz", gzip.compress(PROSE.encode())[:-20], "a.txt.gz: damaged: "),
    ("a.txt.gz", b"plain", "a.txt.gz: damaged: Not a gzipped file"),
    ("a.txt", b"", "a.txt: too little text for --val-fraction 0.1"),
    ("a.txt", b"a", "a.txt: too little text for --val-fraction 0.1"),
    ("a.json", b'[{"text": "a"},\n', "a.json: line 2: not JSON"),
    *(("a.jsonl", GOOD_LINES + bad + b"\n{}\n", message) for bad, message in BAD_LINES),
    ("a.parquet", b"\x89PNG", "a.parquet: " if HAS_PYARROW else "pip install pyarrow"),
    ("wikitext2", b"\x89PNG", "wikitext-2-raw-v1.zip: damaged: File is not a zip file"),
    ("nope", b"", "nope: not a file, not a folder, and none of stdlib, python, shakespeare"),
    ("images", b"", "images: no .txt, .jsonl, .parquet in this folder"),
    *((f"a.txt --tokenizer bpe:{n}", b"a", "N is from 257") for n in ("256", "65537", "x", "")),
    ("a.txt --tokenizer o200k_base", b"a", "more than 65,536 ids"),
    ("a.txt --tokenizer nowhere", b"a", "tokenizer nowhere: use bpe:N, bytes, gpt2"),
    *((f"a.txt --val-fraction {x}", b"a", f"fraction {x}") for x in ("1.0", "-0.1", "nan")),
    ("shakespeare --shards 0", b"", "--shards 0: it must be at least 1"),
]


@pytest.mark.parametrize("command, content, message", BAD_RUNS, ids=[run[2] for run in BAD_RUNS])
def test_a_failing_run_is_one_line_and_leaves_the_old_set_or_no_folder(command, content, message):
    name, *options = command.split()
    options = ["--tokenizer", "bpe:300", *options]
    write("images/a.png", b"\x89PNG")
    if "." in name:
        Path(name).write_bytes(content)
    if name == "wikitext2":
        write("data/downloads/wikitext2/wikitext-2-raw-v1.zip", content)
    assert message in error(name, *options, out="new")
    assert not Path("new").exists()
    run(write("good.txt", PROSE), "--tokenizer", "bpe:290")
    before = contents()
    assert message in error(name, *options, "--force")
    assert contents() == before


def test_a_mistake_in_the_code_shows_its_line(monkeypatch):
    """Only what a user can put right is one line: students edit this file."""
    monkeypatch.setattr(prepare_data, "merge", lambda ids, pair, new: (1, 2, 3))
    with pytest.raises(ValueError, match="too many values to unpack"):
        run(write("a.txt", PROSE), "--tokenizer", "bpe:300")
    assert not Path("out").exists()


def test_ctrl_c_is_one_line_and_leaves_no_folder(monkeypatch, capsys):
    def interrupt(words, vocab_size):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "train_bpe", interrupt)
    with pytest.raises(SystemExit) as e:
        run(write("a.txt", PROSE))
    assert e.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_terminal_that_lacks_the_letters_of_a_files_name_is_no_error():
    path = write("Ω 漢字.txt", PROSE)
    command = [sys.executable, prepare_data.__file__, path, "--tokenizer", "bytes"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"? ??.txt: bytes" in done.stdout
    assert "".join(read_documents(split, "data/Ω 漢字")[0] for split in ("train", "val")) == PROSE


# --- processes that are killed, or that write at the same time


def start(*options):
    return subprocess.Popen([sys.executable, prepare_data.__file__, *options])


def wait_for_file(pattern, process):
    while process.poll() is None:
        if list(Path().glob(pattern)):
            return
    raise AssertionError("the process ended too early")


def whole_files(path="out"):
    """Without those of a process that was killed or waits."""
    return {name: data for name, data in contents(path).items() if "partial" not in name}


def test_kills_leave_the_older_data_set_whole_and_the_next_run_is_complete():
    run(write("prose.txt", PROSE * 4000), "--tokenizer", "bytes")
    before = contents()
    for _ in range(3):
        process = start("prose.txt", "--out", "out", "--force", "--tokenizer", "bpe:270")
        wait_for_file("out/prepare_data*partial/train.bin", process)
        process.kill()
        assert process.wait() == -9
        assert whole_files() == before
    run("prose.txt", "--tokenizer", "bpe:280", "--force")
    run("prose.txt", "--tokenizer", "bpe:280", out="alone")
    assert whole_files() == contents("alone")


def test_two_processes_that_write_to_one_folder_leave_a_whole_data_set():
    run(write("prose.txt", PROSE * 4000), "--tokenizer", "bpe:270", out="alone")
    process = start("prose.txt", "--out", "out", "--tokenizer", "bpe:270")
    wait_for_file("out/prepare_data*partial", process)
    process.send_signal(signal.SIGSTOP)
    try:
        run("prose.txt", "--tokenizer", "bpe:270")
        assert whole_files() == contents("alone")
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert contents() == contents("alone")  # no partial folder is left


def test_files_are_on_the_disk_before_they_take_their_names(monkeypatch):
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300")
    sizes = {}  # inode -> size at the last fsync
    moved = []
    replace = os.replace

    def note_fsync(number):
        sizes[os.fstat(number).st_ino] = os.fstat(number).st_size

    def note_replace(source, target):
        assert sizes[os.stat(source).st_ino] == os.stat(source).st_size
        assert not Path("out/meta.json").exists()
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    run("prose.txt", "--tokenizer", "bpe:300")
    assert sorted(moved) == sorted(contents())
    assert moved[-1] == "meta.json"


# --- downloads


BODY = "".join(f"line {i} of the file, {i * i}\n" for i in range(10_000)).encode()  # 300 kB
TAG = ("X-Linked-Etag", f'"{hashlib.sha256(BODY).hexdigest()}"')  # as the hub tells the SHA-256


class Handler(BaseHTTPRequestHandler):
    """Keeps what is asked for, and serves one of the server's answers after the other, the last one
    again and again. It compresses the body for who accepts that."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        self.server.paths.append(self.path)
        answers = self.server.answers
        self.answer(**answers.pop(0) if len(answers) > 1 else answers[0])

    def answer(self, body=BODY, code=200, send=None, ranges=True, headers=()):
        """The body, or the range that is asked for; only `send` bytes of it, if given."""
        headers = list(headers)
        if "gzip" in self.headers.get("Accept-Encoding", "identity"):
            body = gzip.compress(body)
            headers.append(("Content-Encoding", "gzip"))
        start = int(self.headers["Range"][6:-1]) if ranges else 0
        end = len(body)
        if code == 200 and ranges:
            code = 416 if start >= end else 206
            span = "*" if start >= end else f"{start}-{end - 1}"
            headers.append(("Content-Range", f"bytes {span}/{end}"))
        headers.append(("Content-Length", max(0, end - start)))
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[start:][:send])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.answers = [{}]
        server.ranges = []  # what was asked for
        server.paths = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield server
        server.shutdown()


START = "bytes=0-"
BEYOND = f"bytes={len(BODY) + 1}-"
REDIRECT = {"body": b"", "code": 302, "headers": [TAG, ("Location", "/elsewhere")], "ranges": False}
DOWNLOADS = {  # bytes that an earlier run left, answers, Range headers
    "at once": (b"", [{}], [START]),
    "Range is ignored": (b"", [{"send": 200_000}, {"ranges": False}], [START, "bytes=196608-"]),
    "temporary errors": (b"", [{"code": 503}, {"code": 429}, {}], [START] * 3),
    "wrong bytes": (b"", [REDIRECT, {"body": BODY[::-1]}, REDIRECT, {}], [START] * 4),
    "part of an earlier run": (BODY[:9], [{}], ["bytes=9-"]),
    "longer than the file": (BODY + b"!", [{}], [BEYOND, START]),
    "fails: 404": (b"", [{"code": 404}], [START] * 3),
    "fails: wrong bytes": (b"", [{"body": BODY[::-1], "headers": [TAG]}], [START] * 3),
    "fails: ends early": (b"", [{"send": 70_000}], [START, "bytes=65536-", "bytes=131072-"]),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_the_file_or_one_line_after_three_tries(name, server, monkeypatch):
    part, answers, ranges = DOWNLOADS[name]
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    here = prepare_data.DataSet(f"{server.url}/", ["input.txt"])
    monkeypatch.setitem(prepare_data.DATASETS, "shakespeare", here)
    command = ["shakespeare", "--tokenizer", "bytes", "--val-fraction", 0]
    server.answers = list(answers)
    if part:
        write("data/downloads/shakespeare/input.txt.part", part)
    if "fails" in name:
        said = error(*command)
        assert f"{server.url}/input.txt: " in said
        assert "data/downloads/shakespeare/input.txt yourself" in said
        assert waited == [0, 5, 10]
        assert not Path("out").exists()
        left = [BODY[:196608]] if "early" in name else []
        assert list(contents("data").values()) == left
        server.answers = [{}]
    run(*command)
    run(*command)  # does not download an existing file again
    assert read_documents() == [BODY.decode()]
    assert list(contents("data").values()) == [BODY]
    assert server.ranges[: len(ranges)] == ranges
    assert len(server.ranges) == len(ranges) + ("fails" in name)


def test_a_download_that_ends_early_is_noticed_with_an_older_urllib3_too(server, monkeypatch):
    """Before version 2, urllib3 did not compare the length."""
    init = urllib3.HTTPResponse.__init__

    def old_init(self, *args, **options):
        init(self, *args, **(options | {"enforce_content_length": False}))

    monkeypatch.setattr(urllib3.HTTPResponse, "__init__", old_init)
    server.answers = [{"send": 70_000}, {"send": 70_000}, {}]
    path = prepare_data.download(f"{server.url}/input.txt", Path("input.txt"))
    assert path.read_bytes() == BODY


HUB_FILES = {  # the files of large data sets on the hub, and how many there are
    "openwebmath": ("open-web-math/open-web-math/resolve/main/data/train-0000{}-of-00114-x", 0),
    "openwebtext": ("Skylion007/openwebtext/resolve/main/plain_text/train-0000{}-of-00080", 80),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/00{}_00000", 14),
}


def serve_data_set(name, server, monkeypatch):
    data_set = prepare_data.DATASETS[name]
    address = data_set.address.replace(prepare_data.HUB, server.url)
    monkeypatch.setitem(prepare_data.DATASETS, name, dataclasses.replace(data_set, address=address))
    monkeypatch.setattr(prepare_data, "HUB", server.url)


@pytest.mark.parametrize("name", HUB_FILES)
def test_the_files_of_large_data_sets_are_those_of_the_hub(name, server, monkeypatch):
    serve_data_set(name, server, monkeypatch)
    monkeypatch.setattr(prepare_data, "import_pyarrow", lambda: None)  # a download needs none
    listed = []
    if name == "openwebmath":
        listing = [{"path": f"data/train-0000{i}-of-00114-x.parquet"} for i in (1, 2, 0)]
        server.answers = [{"body": json.dumps(listing).encode(), "ranges": False}, {}]
        listed = ["/api/datasets/open-web-math/open-web-math/tree/main/data"]
    files = prepare_data.download_files(name, shards=2)
    path, n = HUB_FILES[name]
    wanted = [f"/datasets/{path.format(i)}.parquet" for i in (0, 1)]
    assert server.paths == listed + wanted
    assert [path.name for path in files] == [Path(path).name for path in wanted]
    assert len(prepare_data.DATASETS[name].names) == n


@pytest.mark.skipif(HAS_PYARROW is not None, reason="pyarrow is there")
def test_without_pyarrow_a_parquet_data_set_is_one_line_before_the_download():
    assert "pip install pyarrow" in error("openwebtext")
    assert not Path("data").exists()


@pytest.mark.parametrize("name", ["openwebtext", "fineweb-edu"])
def test_a_parquet_data_set_becomes_tokens(name, server, monkeypatch):
    texts = [f"Text {i} of many." for i in range(5000)]
    path = write_rows("a.parquet", [{"text": text, "id": i} for i, text in enumerate(texts)])
    server.answers = [{"body": Path(path).read_bytes()}]
    serve_data_set(name, server, monkeypatch)
    run(name, "--shards", 1, "--tokenizer", "bytes")
    assert read_meta()["val_fraction"] == 0.001
    whole = "".join(texts)
    assert "".join(read_documents()) == whole[: round(len(whole) * 0.999)]


def test_large_data_sets_have_a_val_fraction_of_their_own_that_the_help_tells(capsys):
    tokens = {"maths-college": 1.4e9, "openwebmath": 14.7e9}
    tokens |= {"openwebtext": 9e9, "fineweb-edu": 10e9}
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, data_set in prepare_data.DATASETS.items():
        if name in tokens:
            assert 8e6 < data_set.val_fraction * tokens[name] < 12e6
            assert f"{data_set.val_fraction} of " in said
        else:
            assert data_set.val_fraction == 0.1
    assert prepare_data.parse(["openwebtext"]).val_fraction == 0.001
    assert prepare_data.parse(["openwebtext", "--val-fraction", "0.5"]).val_fraction == 0.5
    assert prepare_data.parse(["notes.txt"]).val_fraction == 0.1
    assert prepare_data.parse(["maths-college"]).field == "instruction,output"


# --- weights


def test_weights_give_the_logits_of_hugging_face():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = load("gpt2")
    config = GPT2Config(vocab_size=97, n_positions=16, n_layer=2, n_embd=128, n_head=2)
    peer = GPT2LMHeadModel(config).eval()
    state = peer.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    path = write("data/downloads/gpt2.bin", "")
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as OpenAI's
    prepare_data.main(["weights:gpt2"])
    ckpt = torch.load("out/gpt2-openai/ckpt.pt", weights_only=True)
    assert "rng" not in ckpt
    model = gpt2.Model(gpt2.Config(**ckpt["config"])).eval()
    model.load_state_dict(ckpt["model"])
    idx = torch.randint(97, (2, 16))
    torch.testing.assert_close(model(idx)[..., :97], peer(idx).logits, rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_openai_alone():
    said = error("weights:distilgpt2")
    assert "weights:distilgpt2: OpenAI's models are gpt2, gpt2-medium, gpt2-large, gpt2-xl" in said
    assert not Path("data").exists()
