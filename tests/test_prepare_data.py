"""prepare_data.py, by behaviour: the BPE trainer against a slow, obvious one; what the token files hold; what a reader
sees when the input is bad. Every test runs in its own empty folder."""

import argparse
import encodings.cp1252
import hashlib
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load

import prepare_data

ROOT = Path(__file__).resolve().parent.parent
SHARED_TEXT = ROOT.parent / "shared" / "text"
GPT2_CACHE = ROOT.parent / "shared" / "tiktoken_cache"

PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the
season of Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had
nothing before us, we were all going direct to Heaven, we were all going direct the other way; in short, the
period was so far like the present period, that some of its noisiest authorities insisted on its being received,
for good or for evil, in the superlative degree of comparison only. They didn't know what we'll see in 1859.
"""
UNICODE = (
    "naïve café Zoë, Ærøskøbing, Ελλάδα, Москва; 你好你好 漢字仮名交じり文 한국어 한국어 🙂🙂🙂 👩\u200d👧 👩\u200d👧 "
    "e\u0301e\u0301 n\u0303 a\u0300\u0301 \u00a0\u00a0NBSP\u00a0 \u3000wide\u3000\u3000 \u2028\u0085 \ufffe\uffff\x00\n"
)
TEXTS = {
    "English prose": PROSE,
    "code": Path(prepare_data.__file__).read_text(encoding="utf-8")[:8000],
    "repeated characters": "aaaaaaa aaaaaaa aaaaa aaaa aaa aa bbbbbbbbbbb abababababa ababababab abaabaabaaba",
    "unicode": UNICODE * 2,
    "many ties": "zebra yacht xylem wagon vixen umbra table sugar river queen piano ocean night mango lemon koala",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test stands in an empty folder. load_tiktoken_bpe keeps what it read by path: not here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    return tmp_path


@pytest.fixture
def gpt2_cache(monkeypatch):
    if not GPT2_CACHE.is_dir():
        pytest.skip(f"no {GPT2_CACHE}: GPT-2's ranks would have to be downloaded")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))


@pytest.fixture
def small_blocks(monkeypatch):
    """Files are read 64 bytes at a time, so that short texts come in many pieces."""
    monkeypatch.setattr(prepare_data, "BLOCK", 128)


def run(*argv):
    """Runs the script in this process, into the folder `out`."""
    prepare_data.main([*map(str, argv), "--out", "out"])


def error(*argv):
    """The one line the script ends with."""
    with pytest.raises(SystemExit) as e:
        run(*argv)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    return e.value.code


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path, texts):
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def contents(path="out"):
    """name -> bytes of everything in a folder."""
    return {p.name: p.read_bytes() for p in Path(path).iterdir()}


def read_meta():
    return json.loads(Path("out/meta.json").read_text(encoding="utf-8"))


def read_ids(split):
    return np.fromfile(f"out/{split}.bin", dtype="<u2")


def read_tokenizer():
    """The tiktoken.Encoding of the data set in out, put together without prepare_data's loader."""
    meta, single_bytes = read_meta(), {bytes([b]): b for b in range(256)}
    ranks = single_bytes if meta["tokenizer"] == "bytes" else tiktoken.load.load_tiktoken_bpe("out/tokenizer.tiktoken")
    return tiktoken.Encoding("test", pat_str=prepare_data.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def read_documents(split):
    """The bytes of each document of a split: its ids cut at end of text, each decoded."""
    ids, tokenizer = read_ids(split), read_tokenizer()
    ends = np.flatnonzero(ids == read_meta()["eot"])
    return [tokenizer.decode_bytes(part[part != read_meta()["eot"]].tolist()) for part in np.split(ids, ends)]


# --- byte-pair encoding


def count_pieces(text):
    return Counter(regex.findall(prepare_data.SPLIT_PATTERN, text))


def reference_bpe(words, vocab_size):
    """Byte-pair encoding as one would explain it: count all pairs, merge the most frequent, start over.

    Returns the tokens, and the tokens that each word has become."""
    tokens = [bytes([b]) for b in range(256)]
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(tokens) < vocab_size - 1:
        counts = Counter()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))  # ties: the greater pair of byte strings
        tokens.append(best[0] + best[1])
        for word, old in parts.items():
            new = []
            for part in old:
                if new and (new[-1], part) == best:
                    new[-1] = best[0] + best[1]
                else:
                    new.append(part)
            parts[word] = new
    return tokens, parts


def bpe_tokenizer(text, vocab_size):
    ranks = prepare_data.dump_ranks(prepare_data.train_bpe(count_pieces(text), vocab_size))
    return prepare_data.load_tokenizer(f"bpe:{vocab_size}", ranks)


def test_the_reference_makes_the_merges_worked_out_by_hand():
    """aab x 2: aa and ab stand twice each, (a, b) > (a, a); then (a, ab) is all that is left."""
    tokens, parts = reference_bpe({"aab": 2}, 300)
    assert tokens[256:] == [b"ab", b"aab"]
    assert parts == {"aab": [b"aab"]}


@pytest.mark.parametrize("name", TEXTS)
def test_merges_equal_the_slow_reference(name):
    words = count_pieces(TEXTS[name])
    assert prepare_data.train_bpe(words, 400) == reference_bpe(words, 400)[0]


def test_merges_equal_the_slow_reference_on_random_words():
    """Few letters and short words: overlaps, ties and pairs that come and go."""
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice(["a", "ab", "abc", "aé漢"])
        words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 8))]
        words = {word: rng.randint(1, 4) for word in words}
        vocab_size = rng.randint(257, 290)
        assert prepare_data.train_bpe(words, vocab_size) == reference_bpe(words, vocab_size)[0], words


@pytest.mark.parametrize("name", TEXTS)
def test_tiktoken_cuts_words_as_the_trainer_left_them(name):
    """Ranks alone say how to encode: the order of the merges is all that tiktoken needs."""
    words = count_pieces(TEXTS[name])
    tokenizer = bpe_tokenizer(TEXTS[name], 330)
    for word, parts in reference_bpe(words, 330)[1].items():
        assert [tokenizer.decode_single_token_bytes(i) for i in tokenizer.encode_ordinary(word)] == parts


@pytest.mark.parametrize("name", TEXTS)
def test_the_order_of_the_words_does_not_matter(name):
    words = list(count_pieces(TEXTS[name]).items())
    first = prepare_data.train_bpe(dict(words), 400)
    for seed in range(5):
        random.Random(seed).shuffle(words)
        assert prepare_data.train_bpe(dict(words), 400) == first


@pytest.mark.parametrize("word, merges", [("a", []), ("ab", [b"ab"]), ("aaaa", [b"aa", b"aaaa"])])
def test_running_out_of_pairs_gives_fewer_tokens(word, merges):
    assert prepare_data.train_bpe({word: 3}, 1000)[256:] == merges


def test_bpe_n_has_n_ids_bytes_first_and_end_of_text_last():
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300")
    meta = read_meta()
    assert (meta["vocab_size"], meta["tokenizer"], meta["eot"]) == (300, "bpe:300", 299)
    ranks = tiktoken.load.load_tiktoken_bpe("out/tokenizer.tiktoken")
    assert sorted(ranks.values()) == list(range(299))
    assert all(ranks[bytes([b])] == b for b in range(256))


def test_bpe_257_is_bytes_and_end_of_text():
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:257", "--val-fraction", 0)
    assert (read_meta()["vocab_size"], read_meta()["eot"]) == (257, 256)
    assert bytes(read_ids("train").tolist()) == PROSE.encode()


def test_vocab_size_says_how_many_ids_there_are_when_the_text_runs_out_of_pairs():
    run(write("tiny.txt", "ab ab ab"), "--tokenizer", "bpe:1000", "--val-fraction", 0)
    assert (read_meta()["vocab_size"], read_meta()["eot"]) == (259, 258)  # 256 bytes, "ab", " ab", end of text
    assert Path("out/tokenizer.tiktoken").read_text(encoding="utf-8").splitlines()[256:] == ["YWI= 256", "IGFi 257"]


def test_the_trainer_sees_the_training_split_only():
    run(write("two.txt", "abab " * 80 + "zqzq " * 20), "--tokenizer", "bpe:300", "--val-fraction", 0.2)
    ranks = tiktoken.load.load_tiktoken_bpe("out/tokenizer.tiktoken")
    assert b"abab" in ranks and not any(b"zq" in token for token in ranks)


def random_bytes(rng):
    kind = rng.choice(["any", "high", "fragments"])
    if kind == "fragments":  # half characters, surrogates, overlong forms, what lies past the last character
        parts = [b"\xe6\xbc", b"\xf0\x9f", b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xff"]
        return b"".join(rng.choices([*parts, b" ", b"  \n", b"the", "é漢🙂".encode()], k=rng.randint(0, 20)))
    return bytes(rng.choices(range(256) if kind == "any" else range(128, 256), k=rng.randint(0, 40)))


@pytest.mark.parametrize("name", ["bpe:400", "bytes"])
def test_encode_then_decode_gives_back_any_bytes(name):
    tokenizer = bpe_tokenizer(PROSE + UNICODE, 400) if name == "bpe:400" else prepare_data.load_tokenizer(name)
    rng = random.Random(0)
    for _ in range(500):
        data = random_bytes(rng)
        ids = tokenizer._encode_bytes(data)
        assert tokenizer.decode_bytes(ids) == data
        assert max(ids, default=0) < tokenizer.eot_token


@pytest.mark.parametrize("name", ["bpe:400", "bytes"])
def test_encode_then_decode_gives_back_any_text(name):
    r"""Written-out surrogates (\ud800), non-characters, NUL, and the name of end of text, which is text here."""
    text = PROSE + UNICODE + r"\ud800 \udfff \ud83d\ude00 <|endoftext|> " + "\ud7ff\ue000\U0010ffff"
    run(write("odd.txt", text), "--tokenizer", name, "--val-fraction", 0)
    assert read_documents("train") == [text.encode()]


def test_a_million_spaces_are_encoded():
    """tiktoken's pattern has a limit on how far it looks ahead. Ours must not end in a stack trace there."""
    text = "a" + 1_500_000 * " " + "b"
    run(write("spaces.txt", text), "--tokenizer", "bytes", "--val-fraction", 0)
    assert bytes(read_ids("train").tolist()) == text.encode()


# --- token files


def test_token_files_are_raw_little_endian_uint16_joined_by_end_of_text():
    run(write_jsonl("three.jsonl", ["ab", "c", "ab"]), "--tokenizer", "bpe:258", "--val-fraction", 0)
    ids = [256, 257, ord("c"), 257, 256]  # 256 is "ab", 257 end of text: between documents, not before or after them
    assert Path("out/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)


def test_documents_come_back_whole_and_in_order(small_blocks):
    texts = [PROSE, "x", UNICODE, "<|endoftext|>", "  ", "\n", "{}", PROSE[::-1]]
    for i, text in enumerate(texts):
        write(f"folder/{'abc'[i % 3]}/{i}.txt", text)
    run("folder", "--tokenizer", "bpe:300", "--val-fraction", 0)
    paths = sorted(p for p in Path("folder").rglob("*.txt"))
    assert read_documents("train") == [p.read_bytes() for p in paths]


@pytest.mark.parametrize("text", ["one\r\ntwo\r\n\r\nthree\r\n", "aé漢🙂 e\u0301\n\u00a0" * 2], ids=["CRLF", "UTF-8"])
def test_one_file_is_cut_by_position_and_nothing_is_lost(text, small_blocks):
    """Wherever the cut falls: both sides are UTF-8, and together they are the file."""
    data = text.encode()
    path = write("one.txt", data)
    for at in range(1, len(data)):
        run(path, "--tokenizer", "bpe:260", "--val-fraction", 1 - at / len(data))
        train, val = (b"".join(read_documents(s)) if s in read_meta()["splits"] else b"" for s in ("train", "val"))
        assert train + val == data
        assert at <= len(train) <= at + 3  # the cut moves on to the start of a character
        train.decode(), val.decode()


def test_meta_counts_what_is_in_the_files(small_blocks):
    texts = [PROSE, "one two\u00a0three\n four", UNICODE, ""]
    run(write_jsonl("four.jsonl", texts), "--tokenizer", "bpe:300", "--val-fraction", 0)
    data, tokenizer = Path("out/train.bin").read_bytes(), read_tokenizer()
    assert read_meta()["splits"] == {
        "train": {
            "tokens": sum(len(tokenizer.encode_ordinary(text)) for text in texts) + 2,
            "bytes": sum(len(text.encode()) for text in texts),
            "words": sum(len(text.split()) for text in texts),
            "documents": 3,  # an empty text is none
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    }
    assert len(data) == 2 * read_meta()["splits"]["train"]["tokens"]


def test_meta_counts_both_sides_of_a_cut_file(small_blocks):
    run(write("prose.txt", PROSE), "--tokenizer", "bpe:300", "--val-fraction", 0.3)
    splits = read_meta()["splits"]
    assert list(splits) == ["train", "val"]
    for split, counts in splits.items():
        (text,) = read_documents(split)
        data = Path(f"out/{split}.bin").read_bytes()
        assert counts == {
            "tokens": len(data) // 2,
            "bytes": len(text),
            "words": len(text.decode().split()),
            "documents": 1,
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def odd_text(seed):
    """Words, runs of all kinds of white space, punctuation and scripts, in random order."""
    space = [" ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u00a0\u00a0 ", "\u3000", "\u2028", "\u0085"]
    words = ["the", "don't", "'ll", "1859", "!?", "...", "漢字漢字", "é", "e\u0301", "🙂", "\u200b", "\x00", "_x_"]
    return "".join(random.Random(seed).choices(space + words, k=1500))


PIECES = {
    "odd": odd_text(0),
    "odder": odd_text(1),
    "unicode": UNICODE * 10,
    "white space": " \n" * 400 + "a",
    "one word": "a" * 900,
    "separators": "!\x1c?\x1d" * 200,  # white space to Python's str and re, not to tiktoken
}


@pytest.mark.parametrize("text", PIECES.values(), ids=PIECES)
def test_encoding_in_pieces_gives_the_ids_of_the_whole(text, small_blocks):
    run(write("odd.txt", text), "--tokenizer", "bpe:400", "--val-fraction", 0)
    assert read_ids("train").tolist() == read_tokenizer().encode_ordinary(text)


@pytest.mark.parametrize("name", ["shakespeare.txt", "wikitext2_test.txt", "wikitext2_valid.txt"])
def test_encoding_a_large_file_in_pieces_gives_the_ids_of_the_whole(name, monkeypatch):
    if not (SHARED_TEXT / name).is_file():
        pytest.skip(f"no {SHARED_TEXT / name}")
    monkeypatch.setattr(prepare_data, "BLOCK", 625)
    run(SHARED_TEXT / name, "--tokenizer", "bpe:500", "--val-fraction", 0)
    text = (SHARED_TEXT / name).read_bytes().decode()
    assert read_ids("train").tolist() == read_tokenizer().encode_ordinary(text)


def test_text_streams_through_memory(monkeypatch):
    """1.6 MB of text in blocks of 4 kB: at no time is a third of it in memory."""
    monkeypatch.setattr(prepare_data, "BLOCK", 256)
    path = write("large.txt", PROSE * 2500)
    tracemalloc.start()
    try:
        run(path, "--tokenizer", "bytes")
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()


def test_the_folder_is_named_after_the_source():
    prepare_data.main([str(write("texts/notes.txt", PROSE)), "--tokenizer", "bytes"])
    prepare_data.main(["texts/", "--tokenizer", "bytes"])
    assert sorted(p.name for p in Path("data").iterdir()) == ["notes", "texts"]


def test_the_folder_we_stand_in_has_a_name_too(monkeypatch):
    write("texts/notes.txt", PROSE)
    monkeypatch.chdir("texts")
    prepare_data.main([".", "--tokenizer", "bytes"])
    assert [p.name for p in Path("data").iterdir()] == ["texts"]


def test_a_folder_that_is_called_like_a_file_is_walked():
    write("texts/chapters.txt/one.txt", "one")
    write("texts/two.txt", "two")
    run("texts", "--tokenizer", "bytes", "--val-fraction", 0)
    assert read_documents("train") == [b"one", b"two"]


# --- train and val

DOCUMENTS = [f"Document {i}. {PROSE[i : i + 40]}" for i in range(400)]


def splits_of(texts):
    run(write_jsonl("documents.jsonl", texts), "--tokenizer", "bytes", "--val-fraction", 0.25)
    return {split: set(read_documents(split)) for split in ("train", "val")}


def test_a_document_lands_in_the_same_split_from_a_folder_or_a_jsonl():
    from_jsonl = splits_of(DOCUMENTS)
    for i, text in enumerate(DOCUMENTS):
        write(f"folder/{i}.txt", text)
    run("folder", "--tokenizer", "bytes", "--val-fraction", 0.25)
    assert {split: set(read_documents(split)) for split in ("train", "val")} == from_jsonl


def test_adding_documents_moves_none():
    before = splits_of(DOCUMENTS[:200])
    after = splits_of(DOCUMENTS[::-1])
    assert before["train"] < after["train"] and before["val"] < after["val"]


def test_val_fraction_of_the_documents_is_validation():
    """Of 400 documents 100 are expected; 5 standard deviations are 43."""
    splits = splits_of(DOCUMENTS)
    assert 57 < len(splits["val"]) < 143
    assert len(splits["val"]) + len(splits["train"]) == 400
    assert not splits["val"] & splits["train"]


@pytest.mark.parametrize("source", ["one.txt", "documents.jsonl"])
def test_val_fraction_0_writes_train_alone_and_removes_an_older_val(source):
    write("one.txt", PROSE)
    write_jsonl("documents.jsonl", DOCUMENTS)
    run(source, "--tokenizer", "bpe:260", "--val-fraction", 0.5)
    assert sorted(contents()) == ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    run(source, "--tokenizer", "bytes", "--val-fraction", 0)
    assert sorted(contents()) == ["meta.json", "train.bin"]
    assert list(read_meta()["splits"]) == ["train"]


def test_field_names_the_text_of_a_jsonl_line():
    write("maths.jsonl", '{"instruction": "ask", "output": "1 + 1"}\n\n{"output": "\\u00e9", "text": 5}')
    run("maths.jsonl", "--field", "output", "--tokenizer", "bytes", "--val-fraction", 0)
    assert read_documents("train") == [b"1 + 1", "é".encode()]


# --- bad input


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "JSON"),
        (b"plain text", "JSON"),
        (b"[1, 2]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b"[" * 100_000, "JSON"),
        (b'{"other": "a"}', "no field 'text'"),
        (b'{"text": 5}', "not a string"),
        (b'{"text": null}', "not a string"),
        (b'{"text": "\\ud800"}', "--errors replace"),
        (b'{"text": "\xff"}', "--errors replace"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else None,
)
def test_a_bad_jsonl_line_is_named_by_file_and_number(line, message):
    write("bad.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    said = error("bad.jsonl", "--tokenizer", "bytes")
    assert said.startswith("bad.jsonl:3: ") and message in said


@pytest.mark.parametrize("bad", [b"\xff", b"\xe9 ", b"\xe6\xbc", b"\xed\xa0\x80"])
@pytest.mark.parametrize("at", [0, 63, 64, 1200, 5000])
def test_a_text_that_is_not_utf8_is_named_with_the_byte(at, bad, small_blocks):
    good = ("aé漢 " * 1000).encode()
    at -= next(n for n in range(4) if 0xC0 <= good[at - n] or good[at - n] < 0x80)  # not inside a character
    write("folder/good.txt", good)
    write("folder/late/latin.txt", good[:at] + bad + good[at:])
    said = error("folder", "--tokenizer", "bytes", "--val-fraction", 0)
    assert said.startswith(f"{Path('folder/late/latin.txt')}: byte {at:,} is not UTF-8") and "--errors replace" in said
    assert error("folder/late/latin.txt", "--tokenizer", "bytes") == said


BROKEN = b"ok \xff\xfe bad \xe6\xbc cut \xf0\x9f\x98 and \xed\xa0\x80 \x80\x80 \xef\xbf\xbd is U+FFFD itself\n"
N_BROKEN = 2 + 1 + 1 + 3 + 2


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_replacements_in_one_file_are_counted(tokenizer, small_blocks, capsys):
    path = write("broken.txt", BROKEN * 20 + b"\xe6")
    for val_fraction in (0, 0.1, 0.35, 0.7):
        run(path, "--tokenizer", tokenizer, "--errors", "replace", "--val-fraction", val_fraction)
        assert f" {20 * N_BROKEN + 1} invalid sequences became U+FFFD" in capsys.readouterr().out
        texts = [text for split in read_meta()["splits"] for text in read_documents(split)]
        assert b"".join(texts).decode() == path.read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_replacements_in_a_folder_are_counted_once(tokenizer, small_blocks, capsys):
    """The files are read several times: for the split, for the trainer, for encoding."""
    for i in range(3):
        write(f"folder/{i}.txt", BROKEN * (i + 1))
    write_jsonl("folder/good.jsonl", ["good"])
    run("folder", "--tokenizer", tokenizer, "--errors", "replace", "--val-fraction", 0)
    assert f" {6 * N_BROKEN} invalid sequences became U+FFFD" in capsys.readouterr().out
    assert read_documents("train")[:3] == [(BROKEN * n).decode("utf-8", "replace").encode() for n in (1, 2, 3)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_lone_surrogates_of_a_jsonl_are_replaced_and_counted(tokenizer, capsys):
    r"""A pair, \ud83d\ude00, is one good character; \ude00\ud83d, the wrong way round, is two bad ones."""
    text = r'{"text": "\ud83d\ude00 \ud800a \ude00\ud83d"}' + "\n"
    write("lone.jsonl", text.encode() + b'{"text": "\xff"}')
    run("lone.jsonl", "--tokenizer", tokenizer, "--errors", "replace", "--val-fraction", 0)
    assert read_documents("train") == ["😀 \ufffda \ufffd\ufffd".encode(), "\ufffd".encode()]
    assert " 4 invalid sequences became U+FFFD" in capsys.readouterr().out


def test_good_text_has_no_replacements_to_report(capsys):
    run(write("good.txt", UNICODE + "\ufffd"), "--tokenizer", "bytes", "--errors", "replace")
    assert "U+FFFD" not in capsys.readouterr().out


BAD_RUNS = {
    "unknown name": (["nope"], "nope: neither"),
    "missing file": (["nope.txt"], "nope.txt: neither"),
    "empty folder": (["empty"], "empty: no .txt, .jsonl or .parquet"),
    "neither .txt nor .jsonl": (["image.png"], "image.png: no .txt, .jsonl or .parquet"),
    "empty file": (["empty.txt"], "empty.txt: no text"),
    "empty jsonl": (["empty.jsonl"], "empty.jsonl: no text"),
    "second file not UTF-8": (["folder"], "byte 3 is not UTF-8"),
    "malformed line": (["bad.jsonl"], "bad.jsonl:41: "),
    "bpe of a malformed line": (["bad.jsonl", "--tokenizer", "bpe:300"], "bad.jsonl:41: "),
    "unknown tokenizer": (["good.txt", "--tokenizer", "gpt5"], "gpt5: not known"),
    "cl100k_base": (["good.txt", "--tokenizer", "cl100k_base"], "at most 65,536"),
    "o200k_base": (["good.txt", "--tokenizer", "o200k_base"], "at most 65,536"),
    "bpe too small": (["good.txt", "--tokenizer", "bpe:256"], "257"),
    "bpe far too small": (["good.txt", "--tokenizer", "bpe:100"], "257"),
    "bpe too large": (["good.txt", "--tokenizer", "bpe:65537"], "65,536"),
    "bpe far too large": (["good.txt", "--tokenizer", "bpe:70000"], "65,536"),
    "bpe without a number": (["good.txt", "--tokenizer", "bpe:abc"], "bpe:abc"),
    "bpe with nothing": (["good.txt", "--tokenizer", "bpe:"], "bpe:"),
    "fraction above 1": (["good.txt", "--val-fraction", "1.5"], "1.5"),
    "fraction of 1": (["good.txt", "--val-fraction", "1"], "1.0"),
    "negative fraction": (["good.txt", "--val-fraction", "-0.1"], "-0.1"),
    "fraction not a number": (["good.txt", "--val-fraction", "nan"], "nan"),
    "fraction not numeric": (["good.txt", "--val-fraction", "tenth"], "tenth"),
    "unknown option": (["good.txt", "--tokeniser", "bytes"], "--tokeniser"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_failing_run_says_why_in_one_line_and_leaves_the_older_data_set_whole(name, small_blocks):
    argv, message = BAD_RUNS[name]
    write("good.txt", PROSE)
    write("image.png", b"\x89PNG")
    write("empty.txt", b"")
    write("empty.jsonl", b"\n")
    write("folder/1.txt", PROSE)
    write("folder/2.txt", b"abc\xff")
    write("bad.jsonl", b'{"text": "a good line, forty times"}\n' * 40 + b"{")
    Path("empty").mkdir()
    run("good.txt", "--tokenizer", "bpe:300")
    before = contents()
    assert message in error(*(argv if "--tokenizer" in argv else [*argv, "--tokenizer", "bytes"]))
    assert contents() == before


def test_a_failing_first_run_leaves_nothing_behind(small_blocks):
    write("late.txt", PROSE.encode() + b"\xff")
    error("late.txt", "--tokenizer", "bytes")
    assert not Path("out").exists() or contents() == {}


@pytest.mark.parametrize("out", ["file.txt", "file.txt/out"])
def test_an_out_that_is_or_lies_under_a_file(out):
    write("file.txt", PROSE)
    with pytest.raises(SystemExit) as e:
        prepare_data.main(["file.txt", "--tokenizer", "bytes", "--out", out])
    assert str(Path(out)) in e.value.code and "\n" not in e.value.code
    assert contents(".") == {"file.txt": PROSE.encode()}


def test_a_tokenizer_that_cannot_be_downloaded(monkeypatch):
    def no_network(path):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    said = error(write("good.txt", PROSE), "--tokenizer", "p50k_base")
    assert "p50k_base" in said and "TIKTOKEN_CACHE_DIR" in said
    assert not Path("out").exists()


def test_on_the_command_line_an_error_is_one_line_and_exit_code_1():
    argv = [sys.executable, prepare_data.__file__, "nope.txt"]
    result = subprocess.run(argv, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "nope.txt" in result.stderr


def test_a_word_too_long_to_merge_in_one_is_cut_and_every_part_counted(monkeypatch):
    monkeypatch.setattr(prepare_data, "LONG_WORD", 4)
    write("line.txt", "abcdabcdabcdab xy")
    args = argparse.Namespace(name="line.txt", field="text", val_fraction=0.0, errors="strict")
    words = prepare_data.count_words(prepare_data.Source(args))
    assert words == {"abcd": 3, "ab": 1, " xy": 1}


# --- interruptions


@pytest.mark.parametrize("older", [False, True])
def test_ctrl_c_while_encoding_leaves_no_half_file(older, small_blocks, monkeypatch):
    write("prose.txt", PROSE * 60)
    if older:
        run("prose.txt", "--tokenizer", "bpe:300")
    before = contents() if older else {}
    encode, seen = tiktoken.Encoding.encode_to_numpy, []

    def encode_and_interrupt(self, text, **kwargs):
        seen.append(sorted(p.suffix for p in Path("out").iterdir() if p.name not in before))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, text, **kwargs)

    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", encode_and_interrupt)
    with pytest.raises(SystemExit) as e:
        run("prose.txt", "--tokenizer", "bytes")
    assert e.value.code == 130
    assert seen[-1] == [".partial"]  # it was in the middle of train.bin
    assert contents() == before


def test_what_a_killed_run_was_writing_is_removed():
    write("prose.txt", PROSE)
    write("out/journal.partial.tmp", "{")
    run("prose.txt", "--tokenizer", "bytes")
    assert not [name for name in contents() if name.endswith(".tmp")]


@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_ctrl_c_while_renaming_leaves_no_meta_json(when, monkeypatch):
    """Old and new files may lie side by side then: without meta.json nothing takes them for a data set."""
    write("prose.txt", PROSE)
    run("prose.txt", "--tokenizer", "bpe:300")
    replace, calls = os.replace, []

    def replace_and_interrupt(source, target):
        calls.extend([target] if target.suffix != ".partial" else [])  # meta.json gets that name first
        if len(calls) == when:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_interrupt)
        with pytest.raises(SystemExit) as e:
            run("prose.txt", "--tokenizer", "bpe:280")
    assert e.value.code == 130 and len(calls) == when
    assert not any(name == "meta.json" or name.endswith(".partial") for name in contents())


# --- the standard library, and GPT-2's tokenizer


def test_stdlib_is_this_machines_sources_without_tests_and_tables():
    run("stdlib", "--tokenizer", "bytes")
    documents = set()
    for split in ("train", "val"):
        ids = read_ids(split)
        assert ids.max() == read_meta()["eot"] == 256
        documents.update(ids[ids < 256].astype(np.uint8).tobytes() for ids in np.split(ids, np.flatnonzero(ids == 256)))
    assert Path(argparse.__file__).read_bytes() in documents
    left_out = [encodings.cp1252.__file__, pydoc_data.topics.__file__]
    left_out += list(Path(argparse.__file__).parent.glob("test/test_a*.py"))  # not installed everywhere
    assert not any(Path(path).read_bytes() in documents for path in left_out)


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason=f"no {SHARED_TEXT}")
def test_gpt2_ids_decode_to_the_file(gpt2_cache):
    path = SHARED_TEXT / "shakespeare.txt"
    run(path, "--tokenizer", "gpt2")
    meta = read_meta()
    assert (meta["vocab_size"], meta["tokenizer"], meta["eot"]) == (50257, "gpt2", 50256)
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]
    ids = np.concatenate([read_ids("train"), read_ids("val")])
    assert tiktoken.get_encoding("gpt2").decode_bytes(ids.tolist()) == path.read_bytes()


@pytest.mark.parametrize("name", ["odd", "shakespeare"])
def test_our_split_pattern_with_gpt2s_ranks_is_gpt2(name, gpt2_cache):
    path = SHARED_TEXT / "shakespeare.txt"
    if name == "shakespeare" and not path.is_file():
        pytest.skip(f"no {path}")
    text = path.read_text(encoding="utf-8") if name == "shakespeare" else odd_text(2) + UNICODE + PROSE + "  \n "
    gpt2 = tiktoken.get_encoding("gpt2")
    ranks, pattern = gpt2._mergeable_ranks, prepare_data.SPLIT_PATTERN
    ours = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text)
