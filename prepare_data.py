"""Text in, token files out: what the model files train on.

    find_files        the files of a data set; they are downloaded if need be
        |
    read              documents: texts, or paths of text files
        |
    cut, pieces       pieces of some 64,000 characters, each of the training or validation split
        |
        +---> count_words, train_bpe    learn a byte-pair tokenizer from the training split
        |            |
    write_splits <---+                  token ids: 17, 3021, 256, ...
        |
    replace_folder    data/NAME has train.bin and val.bin, ids as little-endian uint16 without a
                      header, meta.json with the vocabulary size, counts and checksums, and
                      tokenizer.tiktoken, if the tokenizer was trained here

    python prepare_data.py                              the sources of Python's standard library
    python prepare_data.py notes.txt --tokenizer gpt2   your own text, or a folder of texts
    python prepare_data.py tinystories                  one of the data sets below
    python prepare_data.py --check tinystories          compares the files with their meta.json

Your own text is a .txt file, of one document or of several with `<|endoftext|>` between them, or a
.jsonl or .parquet file, where each row is a document (--field names the text). Each of them may be
compressed, as in notes.txt.gz. To go on from a model that was trained on another text, use the
tokenizer of that text again:

    python prepare_data.py notes.txt --tokenizer data/stdlib
    python gpt2.py --init-from out/demo/best.pt --data data/notes --out out/notes

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section
3.2, on bytes, with GPT-2's split pattern (Radford et al. 2019, section 2.2). But the trainer does
not count all pairs again after each merge: it updates the counts that the merge changes.

    stdlib         Python's standard library on this machine, without tests and tables: 10 MB
    python         stdlib, and the packages that requirements.txt installs: about 90 MB
    shakespeare    tiny Shakespeare (Karpathy, char-rnn): 1.1 MB
    wikitext2      WikiText-2 (Merity et al. 2016), with a test split: 13 MB
    tinystories    TinyStories (Eldan and Li 2023), written by GPT-4: 2.25 GB
    maths-college  Maths-College (ajibawa-2023), exercises and answers: 6 files of 830 MB
    openwebmath    OpenWebMath (Paster et al. 2023): 114 files of 240 MB
    openwebtext    OpenWebText (Gokaslan and Cohen 2019), as for nanoGPT: 80 files of 300 MB
    fineweb-edu    FineWeb-Edu's sample of 10B tokens (Penedo et al. 2024): 14 files of 2.15 GB
    weights:gpt2   OpenAI's GPT-2 as a checkpoint of gpt2.py: 0.55 GB; also gpt2-medium (1.5 GB),
                   gpt2-large (3.2 GB) and gpt2-xl (6.4 GB)

The first two need no network; openwebmath, openwebtext, fineweb-edu and other Parquet files need
pyarrow. A tenth of a text is for validation: documents that are selected by a hash or, if documents
are few, the end of the text. wikitext2 and tinystories have files for it. Of the
last four data sets it is less, so that it has some ten million tokens with all of their files:
0.007 of maths-college, 0.0007 of openwebmath, 0.001 of the other two.
"""

import argparse
import base64
import codecs
import gzip
import hashlib
import heapq
import io
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken. The standard library's re has no \p{L}, which is any letter
import requests
import tiktoken

EOT = "<|endoftext|>"
# GPT-2's: contractions, then words, numbers and the rest, each with the space before it if there is
# one, then white space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # what uint16 holds
BLOCK = 2**16  # characters of text that are read at once
LONG_WORD = 2**13  # characters of a word, at most, that the BPE trainer reads: longer ones are slow
BPE_BYTES = 2**26  # 64 MB of training text are enough for the BPE trainer


class UserError(ValueError):
    """Something that the user can put right: main prints it as one line, without a traceback."""


# --- tokenizers


def train_bpe(words, vocab_size):
    """Learns byte-pair merges from word counts. At first, each byte is a token. Then, again and
    again, the pair of neighbours that is most frequent in the text becomes one new token.

    words: dict of str to int, the words that SPLIT_PATTERN makes and how often each occurs.
    vocab_size: number of ids, 256 bytes and end of text included. Returns a list of bytes, the
    token of each id but the last one (end of text); it is shorter if every word becomes one token
    before. Of equally frequent pairs, the lexicographically greater pair of byte strings is merged
    first, so the result does not depend on the order of `words`.
    """
    tokens = [bytes([b]) for b in range(256)]
    # heapq pops the smallest entry, and we want the greatest token: so its bytes are negated. The 1
    # at the end is greater than any negated byte, so that b"ab" comes before its beginning b"a".
    rank = [(-b, 1) for b in range(256)]
    symbols = [list(word.encode()) for word in words]  # each word as a list of token ids
    freqs = list(words.values())

    counts = Counter()  # (a, b) -> how often id b follows id a in the whole text
    where = defaultdict(set)  # (a, b) -> the words in which the pair occurs, or has occurred
    for w, ids in enumerate(symbols):
        for pair in zip(ids, ids[1:]):
            counts[pair] += freqs[w]
            where[pair].add(w)

    def entry(pair):
        a, b = pair
        return -counts[pair], rank[a], rank[b], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        # The most frequent pair. A merge lowers the counts of other pairs, but not in their heap
        # entries. An entry with an old count is put back with the new one.
        n, _, _, pair = heapq.heappop(heap)
        if counts[pair] != -n:
            if counts[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue

        # It becomes a token.
        a, b = pair
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        rank.append(rank[a][:-1] + rank[b])

        # Merge it in all words that have it, and count the pairs that go and come.
        created = set()
        for w in where.pop(pair):
            gone, made = merge(symbols[w], pair, new)
            for old in gone:
                counts[old] -= freqs[w]
            for other in made:
                counts[other] += freqs[w]
                where[other].add(w)
                created.add(other)
        del counts[pair]
        for other in created:
            if counts[other] > 0:  # else the next merge in the same word has removed it
                heapq.heappush(heap, entry(other))
    return tokens


def merge(ids, pair, new):
    """Replaces each occurrence of the pair in the list `ids` by `new`, in place. Returns a list of
    the pairs of neighbours that are gone, and a list of those that are made: in x a b y, (x, a) and
    (b, y) are gone, (x, new) and (new, y) are made."""
    gone = []
    made = []
    i = 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            ids[i : i + 2] = [new]
            if i > 0:
                gone.append((ids[i - 1], pair[0]))
                made.append((ids[i - 1], new))
            if i + 1 < len(ids):
                gone.append((pair[1], ids[i + 1]))
                made.append((new, ids[i + 1]))
        i += 1
    return gone, made


def load_tokenizer(name, ranks=""):
    """Returns a tiktoken.Encoding; its `eot_token` is the id of end of text.

    name: `bytes`, `bpe:N`, or one of tiktoken's names whose ids fit 16 bits. ranks: for `bpe:N`,
    the text of its tokenizer.tiktoken, which has a line for each token: its bytes in base64, and
    its id. Raises UserError for other names, if fewer than 256 ranks are whole, and if tiktoken
    cannot download its own ranks.
    """
    if name in ("gpt2", "r50k_base", "p50k_base", "p50k_edit"):
        try:
            return tiktoken.get_encoding(name)
        except OSError as e:
            hint = "Without a network use bpe:4096, or set TIKTOKEN_CACHE_DIR to a folder with it"
            raise UserError(f"tokenizer {name}: {e}. {hint}") from e

    tokens = [bytes([b]) for b in range(256)]
    if name.startswith("bpe:"):
        # A damaged line is left out. Then there are fewer ids than meta.json says.
        lines = re.findall(r"^((?:[A-Za-z0-9+/=]{4})+) \d+$", ranks, re.MULTILINE)
        tokens = map(base64.b64decode, lines)
    elif name != "bytes":
        names = "bpe:N, bytes, gpt2, r50k_base, p50k_base, p50k_edit or a folder of token files"
        raise UserError(
            f"tokenizer {name}: use {names}; other tokenizers of tiktoken have more than "
            f"{MAX_IDS:,} ids: too many for 16 bits"
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < 256:
        raise UserError(f"tokenizer {name}: tokenizer.tiktoken is damaged")
    return tiktoken.Encoding(
        name, pat_str=SPLIT_PATTERN, mergeable_ranks=ids, special_tokens={EOT: len(ids)}
    )


def find_tokenizer(name):
    """Returns the name and the ranks of a tokenizer for load_tokenizer. `name` may be a folder of
    token files, whose tokenizer is used again. The ranks are "" if there are none, or none yet."""
    folder = Path(name)
    ranks = ""
    if (folder / "meta.json").exists():
        name = read_meta(folder)["tokenizer"]
        if name.startswith("bpe:"):
            ranks = (folder / "tokenizer.tiktoken").read_text(encoding="utf-8")
    return name, ranks


# --- downloads

DOWNLOADS = Path("data/downloads")


def sync(file):
    """Waits until what was written is on the disk. Only then may the file take its final name."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show_progress(what, size):
    """Writes one line on the terminal, again and again. size: in bytes, so far."""
    if sys.stderr.isatty():
        print(f"{what}: {size / 1e6:,.1f} MB\033[K", end="\r", file=sys.stderr)


def fetch(url, part):
    """One try of a download: appends to the file `part` the bytes that it lacks. Raises
    requests.RequestException if the connection fails, or if the file is not the published one."""
    done = part.stat().st_size if part.exists() else 0
    # identity: not compressed. Range: from byte `done` on.
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, headers=headers, stream=True, timeout=20) as response:
        if response.status_code == 416:  # no such byte: `part` is whole, or of another file
            part.unlink()
        response.raise_for_status()
        if response.status_code != 206:  # the server sends the whole file, and not the range
            done = 0
        size = done + int(response.headers.get("Content-Length", 0))
        with open(part, "ab" if done else "wb") as file:
            for chunk in response.iter_content(2**16):
                file.write(chunk)
                done += len(chunk)
                show_progress(f"{part.stem} of {size / 1e6:,.1f} MB", done)
            sync(file)

        # The hub tells the SHA-256 of a large file, in the answer that points to its address.
        answers = [*response.history, response]
        tags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in answers]
        wrong = [tag for tag in tags if len(tag) == 64 and tag != sha256_of(part)]
        if wrong or done < size:
            part.unlink()
            raise requests.RequestException("its length or SHA-256 is not the published one")


def download(url, path):
    """Downloads url to path, unless that file exists, and returns path. The bytes are collected in
    path.part, so that the next try, or the next run, goes on where this one stops. Raises UserError
    after three tries."""
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for seconds in (0, 5, 10):
        time.sleep(seconds)
        try:
            fetch(url, part)
            os.replace(part, path)
            return path
        except requests.RequestException as e:
            problem = e
    hint = f"Run the same command again to resume, or save the file as {path} yourself"
    raise UserError(f"{url}: {problem}. {hint}")


# --- the files of a data set

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
HF = f"{HUB}/datasets"
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"


@dataclass
class DataSet:
    """A data set to download. The addresses of its files are address + name."""

    address: str
    names: list
    field: str = "text"  # of the rows of .json and .parquet files: where the text is
    val_fraction: float = 0.1  # of a large data set less, so that val has some 10M tokens


DATASETS = {
    "shakespeare": DataSet(f"{CHAR_RNN}/data/tinyshakespeare/", ["input.txt"]),
    "wikitext2": DataSet(f"{HF}/ggml-org/ci/resolve/main/", ["wikitext-2-raw-v1.zip"]),
    "tinystories": DataSet(
        f"{HF}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-",
        ["train.txt", "valid.txt"],
    ),
    "maths-college": DataSet(
        f"{HF}/ajibawa-2023/Maths-College/resolve/main/Maths-College-",
        [f"{i}-Final.json" for i in range(6)],
        field="instruction,output",
        val_fraction=0.007,  # of 1.4B tokens
    ),
    "openwebmath": DataSet(
        f"{HF}/open-web-math/open-web-math/resolve/main/",
        [],  # the hub has a list of them
        val_fraction=0.0007,  # of 14.7B tokens
    ),
    "openwebtext": DataSet(
        f"{HF}/Skylion007/openwebtext/resolve/main/plain_text/",
        [f"train-{i:05}-of-00080.parquet" for i in range(80)],
        val_fraction=0.001,  # of 9B tokens
    ),
    "fineweb-edu": DataSet(
        f"{HF}/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/",
        [f"{i:03}_00000.parquet" for i in range(14)],
        val_fraction=0.001,  # of 10B tokens
    ),
}
NAMES = ("stdlib", "python", *DATASETS)

# Left out of Python's sources: packages, tests, demos, generated files, and tables, which would
# drown the code.
SKIP = r"(^|/)(site-packages|tests?|idle_test|encodings|pydoc_data|lib2to3|turtledemo)/"
SKIP += "|^(config-|_sysconfigdata)"


def find_package_files(requirements):
    """Yields (path, path relative to site-packages) for the files of the installed packages that
    the lines of `requirements` name, and of all packages that they require."""
    todo = list(requirements)
    seen = set()
    while todo:
        name = re.match(r"[\w.-]+", todo.pop(0))[0]
        if name in seen:
            continue
        seen.add(name)
        with suppress(metadata.PackageNotFoundError):  # it may be required on other systems
            package = metadata.distribution(name)
            todo += [line for line in package.requires or [] if "extra ==" not in line]
            for file in sorted(package.files or []):
                yield Path(package.locate_file(file)), file


def python_files(packages):
    """The Python sources of the standard library and, if `packages`, of what requirements.txt
    names and requires."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [(path, path.relative_to(root)) for path in sorted(root.rglob("*.py"))]
    if packages:
        requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
        files += find_package_files(requirements.splitlines())
    return [
        path
        for path, name in files
        if path.suffix == ".py" and not re.search(SKIP, name.as_posix())
    ]


# Kinds of files that are read of a folder.
TEXTS = (".txt", ".jsonl", ".parquet")
# Kinds of files that are not read as they are, and what unpacks them.
UNPACK = {".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}


def without_gz(path):
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def kind(path):
    """.txt of a.txt, B.TXT and c.txt.gz"""
    return without_gz(path).suffix.lower()


def find_files(args):
    """The files of the data set `args.name` in their order; they are downloaded if need be."""
    path = Path(args.name)
    if args.name in DATASETS:
        return download_files(args.name, args.shards)
    if args.name in ("stdlib", "python"):
        return drop_identical(python_files(packages=args.name == "python"))
    if path.is_dir():
        return find_texts(path)
    if not path.exists():
        raise UserError(f"{path}: not a file, not a folder, and none of {', '.join(NAMES)}")
    if kind(path) in UNPACK:
        raise UserError(f"{path}: unpack it first: {UNPACK[kind(path)]} '{path}'")
    return [path]


def drop_identical(files):
    """Of files with the same bytes, only one is kept."""
    return list({sha256_of(file): file for file in files}.values())


def find_texts(folder):
    """The texts in a folder and its folders, without hidden ones. Says which files it skips."""
    files = []
    skipped = Counter()
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if path.is_dir() or any(name.startswith(".") for name in names):
            continue
        if kind(path) in TEXTS:
            files.append(path)
        else:
            skipped[kind(path) or "without a suffix"] += 1
    if not files:
        raise UserError(f"{folder}: no {', '.join(TEXTS)} in this folder")
    unique = drop_identical(files)
    skipped["identical"] = len(files) - len(unique)
    counts = [f"{n:,} {what}" for what, n in skipped.items() if n > 0]
    if counts:
        print(f"{folder}: files that were skipped: {', '.join(counts)}")
    return unique


def import_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{e}. Parquet files need it: pip install pyarrow") from e
    return pyarrow


def download_files(name, shards):
    """Downloads the first `shards` files of a data set, or all of them if it is None."""
    folder = DOWNLOADS / name
    names = DATASETS[name].names
    if name == "openwebmath":
        tree = f"{HUB}/api/datasets/open-web-math/open-web-math/tree/main/data"
        listing = download(tree, folder / "files.json").read_text(encoding="utf-8")
        names = sorted(entry["path"] for entry in json.loads(listing))
    if names[0].endswith(".parquet"):
        import_pyarrow()  # if it is not there, fail before the download
    address = DATASETS[name].address
    return [download(address + file, folder / Path(file).name) for file in names[:shards]]


# --- from files to documents


def open_file(path):
    """Opens a file to read its bytes; of a .gz file those inside."""
    return open(path, "rb") if without_gz(path) == path else gzip.open(path)


def open_text(path):
    """Opens a text file as Python does, where all line ends are read as LF. The encoding is UTF-8,
    or UTF-16 if its byte order mark is there. The mark is no text."""
    file = open_file(path)
    utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return io.TextIOWrapper(file, "utf-16" if utf16 else "utf-8-sig")


def read_blocks(document, notes=None):
    """Yields a text, or the text of a file, in strings of up to BLOCK characters. In the Counter
    `notes`, files with line ends of Windows are counted."""
    with open_text(document) if isinstance(document, Path) else io.StringIO(document) as file:
        try:
            while block := file.read(BLOCK):
                yield block
        except UnicodeDecodeError as e:
            at = file.buffer.tell() - len(e.object) + e.start
            raise UserError(f"{document}: byte {at:,} is not {e.encoding}; use iconv") from e
        if notes is not None:
            notes["files with CRLF"] += "\r\n" in (file.newlines or "")


def split_text(path, separator):
    """Yields what stands between the separators in a text file."""
    text = ""
    for block in read_blocks(path):
        seen = max(0, len(text) - len(separator))  # a separator may begin in the block before
        text += block
        if separator in text[seen:]:
            *parts, text = text.split(separator)  # the last part may go on in the next block
            yield from parts
    yield text


def read_documents(path, notes):
    """Yields the texts between `<|endoftext|>` and `<|endoftext|>` in a text file. A file without
    it, or a program, is one document. It may be large, so only its path is yielded."""
    separated = False
    end = ""
    for block in read_blocks(path, notes):
        separated |= EOT in end + block
        end = block[-len(EOT) :]  # EOT may begin in this block and end in the next
    if separated and kind(path) != ".py":
        texts = map(str.strip, split_text(path, EOT))
        yield from filter(None, texts)
    else:
        yield path


def read_wikitext(path):
    """Yields (split, article) of WikiText's zip."""
    # An article begins at a line ` = Title = ` after an empty line.
    beginning = regex.compile(r"(?m)(?<=\S\s*\n\s*\n)(?= = [^=\n].* = $)")
    with zipfile.ZipFile(path) as archive:
        for split, name in [("train", "train"), ("val", "valid"), ("test", "test")]:
            text = archive.read(f"wikitext-2-raw/wiki.{name}.raw").decode()
            for article in beginning.split(text):
                yield split, article


def read_parquet(path, fields):
    """Yields the rows of a .parquet file as dicts, of the columns `fields` alone if they exist."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(open_file(path)) as file:
            known = set(fields) <= set(file.schema_arrow.names)
            for rows in file.iter_batches(256, columns=fields if known else None):
                yield from rows.to_pylist()
    except pyarrow.ArrowException as e:
        raise UserError(f"{path}: {e}") from e


def read_json(path):
    """Yields the rows of a .jsonl file, one in each line, or of a .json file, which may also be one
    array of rows."""
    is_array = kind(path) == ".json" and next(read_blocks(path), "").lstrip().startswith("[")
    texts = ["".join(read_blocks(path))] if is_array else split_text(path, "\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as e:
            line = number + e.lineno - 1
            raise UserError(f"{path}: line {line:,}: not JSON: {e.msg}") from e
        yield from rows if is_array else [rows]


def read_fields(path, fields, notes):
    """Yields the text of each row: its fields, with an empty line between them. Rows without text
    are left out, and counted in `notes`."""
    first = {}  # the first row
    missing = set(fields)
    rows = read_parquet(path, fields) if kind(path) == ".parquet" else read_json(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number:,} is of type {type(row).__name__}, not a dict")
        first = first or row
        missing -= row.keys()
        texts = []
        for field in fields:
            text = row.get(field)
            if not isinstance(text, str | None):
                problem = f"is of type {type(text).__name__}. --field names the text"
                raise UserError(f"{path}: row {number:,}: {field} {problem}")
            if text and text.strip():
                texts.append(text)
        notes["rows"] += 1
        if texts:
            # "\ud800" is JSON but not Unicode: it becomes U+FFFD.
            yield re.sub("[\ud800-\udfff]", "\ufffd", "\n\n".join(texts))
        else:
            notes["rows without text"] += 1
    if missing and first:
        there = f"the first row has {', '.join(first)}. --field names the text"
        raise UserError(f"{path}: no row has the field {', '.join(sorted(missing))}; {there}")


def read(files, args, notes):
    """Yields (split, document). split: train, val or test, or None if the source does not tell it.
    document: a text, or the path of a text file. The Counter `notes` counts what the user should be
    told."""
    for path in files:
        split = None
        if args.name == "tinystories":
            split = "val" if path.name == "valid.txt" else "train"
        try:
            if args.name == "wikitext2":
                yield from read_wikitext(path)
            elif kind(path) in (".jsonl", ".json", ".parquet"):
                for text in read_fields(path, args.field.split(","), notes):
                    yield split, text
            else:
                for document in read_documents(path, notes):
                    yield split, document
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: damaged: {e}") from e


# --- from documents to pieces


def cut(document):
    """Yields a document in pieces of about BLOCK characters, cut where white space begins. There
    GPT-2's pattern always splits, so the ids of the pieces are those of the whole. Without such a
    place, a text is cut after 8 BLOCK: tiktoken overflows its stack on long words."""
    text = ""
    for block in read_blocks(document):
        text += block
        end = 0
        gap = regex.match(r"(?s).*\S(?=\s)", text)  # up to the last such place
        if gap:
            end = gap.end()
        elif len(text) > 8 * BLOCK:
            end = len(text)
        if end > 0:
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def encode(tokenizer, text):
    """The ids of a text, as in the token files: a list. tokenizer: what load_tokenizer returns. The
    text is cut first, because `tokenizer.encode_ordinary` alone panics at a million spaces."""
    ids = []
    for piece in cut(text):
        ids += tokenizer.encode_ordinary(piece)
    return ids


def find_boundary(files, args):
    """Returns how many characters of all texts together are for training. The rest is for val: few
    documents are split by position, since a hash might choose none of them for val. Returns None if
    there are enough. Then the hash of each document decides, so that it stays in its split when
    others are added."""
    if args.val_fraction == 0:
        return None
    many = math.ceil(10 / min(args.val_fraction, 1 - args.val_fraction))  # ten in the smaller split
    documents = (document for _, document in islice(read(files, args, Counter()), many))
    sizes = [sum(map(len, read_blocks(document))) for document in documents]  # in characters
    if len(sizes) == many:
        return None
    return round(sum(sizes) * (1 - args.val_fraction))


def split_by_hash(document, val_fraction):
    """The split of a document, the same on every machine and in every run."""
    sha = hashlib.sha256()
    for block in read_blocks(document):
        sha.update(block.encode())
    number = int(sha.hexdigest(), 16)  # as if drawn from 0 .. 2**256 - 1
    return "val" if number < val_fraction * 2**256 else "train"


def pieces(files, args, boundary, notes):
    """Yields (split, number of the document, text) for the pieces of all documents."""
    position = 0  # of the piece in all texts together
    for number, (split, document) in enumerate(read(files, args, notes)):
        if split is None and boundary is None:
            split = split_by_hash(document, args.val_fraction)
        if split in ("val", "test") and args.val_fraction == 0:
            continue
        for text in cut(document):
            if split is not None:
                yield split, number, text
                continue
            in_train = min(max(boundary - position, 0), len(text))  # characters of this piece
            position += len(text)
            if in_train > 0:
                yield "train", number, text[:in_train]
            if in_train < len(text):
                yield "val", number, text[in_train:]


# --- from pieces to a folder of token files


def count_words(texts):
    """Counts the words that SPLIT_PATTERN makes of texts, up to BPE_BYTES of text."""
    words = Counter()
    left = BPE_BYTES
    for text in texts:
        words.update(word[:LONG_WORD] for word in regex.findall(SPLIT_PATTERN, text))
        left -= len(text.encode())
        if left <= 0:
            break
    return words


def make_ranks(vocab_size, texts):
    """Trains BPE on texts. Returns what tokenizer.tiktoken holds."""
    tokens = train_bpe(count_words(texts), vocab_size)
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    return "".join(lines)


def write_splits(pieces, tokenizer, folder):
    """Encodes pieces of text and writes their ids to folder/SPLIT.bin. Returns {split: counts}."""
    files = {}  # split -> its file
    splits = defaultdict(Counter)  # split -> its counts
    newest = {}  # split -> number of the document that was written to it last
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def encode_piece(piece):
            return tokenizer.encode_to_numpy(piece[2], disallowed_special=())

        while batch := list(islice(pieces, 128)):
            for (split, number, text), ids in zip(batch, pool.map(encode_piece, batch)):
                if split not in files:
                    files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                counts = splits[split]
                begins = number != newest.get(split)  # a document
                if begins and split in newest:  # end of text stands between two documents
                    ids = np.append(tokenizer.eot_token, ids)
                files[split].write(ids.astype("<u2").tobytes())
                newest[split] = number
                counts["tokens"] += len(ids)
                counts["bytes"] += len(text.encode())
                counts["words"] += len(text.split())
                counts["documents"] += begins
            show_progress(f"encoded for {split}.bin", counts["bytes"])
        for file in files.values():
            sync(file)
    for split, counts in splits.items():
        counts["sha256"] = sha256_of(folder / f"{split}.bin")
    return splits


def write_text(path, text):
    with open(path, "wb") as file:
        file.write(text.encode())
        sync(file)


def write_data_set(args, files, origin, ranks, folder):
    """Writes all files of the data set to `folder`, and says what is in them. origin: what
    meta.json tells of how they were made. ranks: of the tokenizer, "" if it must be trained first.
    """
    boundary = find_boundary(files, args)
    name = origin["tokenizer"]
    if name.startswith("bpe:"):
        if not ranks:
            parts = pieces(files, args, boundary, Counter())
            texts = (text for split, _, text in parts if split == "train")
            ranks = make_ranks(int(name.removeprefix("bpe:")), texts)
        write_text(folder / "tokenizer.tiktoken", ranks)
    tokenizer = load_tokenizer(name, ranks)

    notes = Counter()
    splits = write_splits(pieces(files, args, boundary, notes), tokenizer, folder)
    wanted = {"train", "val"} if args.val_fraction > 0 else {"train"}
    if wanted - splits.keys():
        raise UserError(f"{args.name}: too little text for --val-fraction {args.val_fraction}")
    meta = {"vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token, **origin, "splits": splits}
    write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")

    print(f"{args.name}: {name}, vocabulary size {tokenizer.n_vocab:,}")
    print(f"  split {'documents':>12} {'bytes':>15} {'tokens':>15}   bytes per token")
    for split, n in splits.items():
        print(
            f"  {split:5} {n['documents']:>12,} {n['bytes']:>15,} {n['tokens']:>15,} "
            f"{n['bytes'] / n['tokens']:>17.2f}"
        )
    if notes["rows without text"]:
        print(f"  {notes['rows without text']:,} of {notes['rows']:,} rows have no text")
    if notes["files with CRLF"]:
        print(f"  line ends CRLF became LF in {notes['files with CRLF']:,} of {len(files):,} files")


# A folder without meta.json is no data set. So meta.json is removed first, and moved last.
FILES = ("meta.json", "tokenizer.tiktoken", "train.bin", "val.bin", "test.bin")


def replace_folder(partial, out):
    """Moves the files of a data set from `partial` to `out`, in place of the older ones."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for name in reversed(FILES):
        if (partial / name).exists():
            os.replace(partial / name, out / name)


def read_meta(out):
    path = out / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}). Prepare that data set again with --force") from e


def prepare(args, out):
    """Writes the data set `args.name` to the folder `out`. If that fails, what the folder held
    stays whole."""
    name, ranks = find_tokenizer(args.tokenizer)
    origin = {
        "tokenizer": name,
        "tokenizer_from": str(Path(args.tokenizer).resolve()) if name != args.tokenizer else None,
        "source": args.name if args.name in NAMES else str(Path(args.name).resolve()),
        "field": args.field,
        "val_fraction": args.val_fraction,
        "shards": args.shards,
    }
    if (out / "meta.json").exists() and not args.force:
        old = read_meta(out)
        changed = [
            f"{key} {old[key]}" for key in origin if old.get(key, origin[key]) != origin[key]
        ]
        if changed:
            hint = "Choose another folder with --out, or overwrite this one with --force"
            raise UserError(f"{out} was made with {', '.join(changed)}. {hint}")

    if ranks or not name.startswith("bpe:"):
        load_tokenizer(name, ranks)  # if there is no such tokenizer, fail before a download
    files = find_files(args)
    # Two processes that write to the same folder must not write to the same files.
    partial = out / f"prepare_data.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        write_data_set(args, files, origin, ranks, partial)
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()  # only if it is empty
    print(f"To train on it: python gpt2.py --preset demo --data '{out}'")


def check(out):
    """Compares the files of a data set with its meta.json. Raises UserError for the first one that
    is not the same."""
    meta = read_meta(out)
    if load_tokenizer(*find_tokenizer(out)).n_vocab != meta["vocab_size"]:
        raise UserError(f"{out}: tokenizer.tiktoken was changed. Prepare the data set again")
    for split, counts in meta["splits"].items():
        path = out / f"{split}.bin"
        if sha256_of(path) != counts["sha256"]:
            raise UserError(f"{path}: changed, or cut short. Prepare the data set again")
        print(f"{path}: {counts['tokens']:,} tokens, as in meta.json")


# --- OpenAI's weights

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def prepare_weights(name, out):
    """Writes OpenAI's GPT-2 (Radford et al. 2019) as out/ckpt.pt, a checkpoint of gpt2.py."""
    import torch

    if name not in OPENAI:
        raise UserError(f"weights:{name}: OpenAI's models are {', '.join(OPENAI)}")
    if (out / "ckpt.pt").exists():
        raise UserError(f"{out} has a checkpoint already. Choose another folder with --out")
    url = f"{HUB}/openai-community/{name}/resolve/main/pytorch_model.bin"
    path = download(url, DOWNLOADS / f"{name}.bin")
    model = {}
    for key, weight in torch.load(path, weights_only=True).items():
        key = key.removeprefix("transformer.")
        if key == "lm_head.weight" or key.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the same matrix as wte.weight, and constants
        if key.startswith("h.") and weight.dim() == 2:
            weight = weight.T.contiguous()  # OpenAI computes x @ W, nn.Linear x @ W.T
        model[key] = weight

    vocab_size, n_embd = model["wte.weight"].shape
    padding = torch.zeros(-vocab_size % 64, n_embd)  # gpt2.py pads it to a multiple of 64
    model["wte.weight"] = torch.cat([model["wte.weight"], padding])
    model["lm_head.weight"] = model["wte.weight"]
    config = {
        "vocab_size": vocab_size,
        "block_size": len(model["wpe.weight"]),
        "n_layer": sum(key.endswith("ln_1.weight") for key in model),
        "n_head": n_embd // 64,  # in all four, a head has 64 channels
        "n_embd": n_embd,
    }
    tokenizer = {"name": "gpt2", "ranks": ""}
    ckpt = {"model_file": "gpt2.py", "config": config, "tokenizer": tokenizer, "model": model}
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "ckpt.pt.tmp"
    with open(temporary, "wb") as file:
        torch.save(ckpt, file)
        sync(file)
    os.replace(temporary, out / "ckpt.pt")
    print(f"To sample from it: python sample.py --ckpt '{out}/ckpt.pt'")


# --- options


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda text: sys.exit(f"prepare_data.py: {text} (--help lists all options)")
    add = parser.add_argument
    add("name", nargs="?", default="stdlib", help="a data set, or the path of your own text")
    add("--tokenizer", default="bpe:4096", help="bpe:N (trained here), bytes, gpt2 or data/OTHER")
    add("--val-fraction", type=float, help="validation's share, 0 for none (default: see above)")
    add("--field", help="in .jsonl, .json and .parquet: where the text is; a,b joins two fields")
    add("--shards", type=int, metavar="N", help="download only the first N files of the data set")
    add("--out", help="folder to write (default: data/NAME; for weights out/NAME-openai)")
    add("--force", action="store_true", help="overwrite a data set that was made otherwise")
    add("--check", action="store_true", help="check the files in the folder, and stop")
    args = parser.parse_args(argv)
    defaults = DATASETS.get(args.name, DataSet)  # the class has those of all other texts
    if args.field is None:
        args.field = defaults.field
    if args.val_fraction is None:
        args.val_fraction = defaults.val_fraction
    if args.shards is not None and args.shards < 1:
        raise UserError(f"--shards {args.shards}: it must be at least 1")
    if not 0 <= args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: it must be from 0 to less than 1")
    bpe, _, size = args.tokenizer.partition(":")
    if bpe == "bpe" and not (size.isdecimal() and 257 <= int(size) <= MAX_IDS):
        raise UserError(f"--tokenizer {args.tokenizer}: N is from 257 to {MAX_IDS:,} (16 bits)")
    return args


def run(args):
    out = Path(args.out or Path("data") / without_gz(Path(args.name).resolve()).stem)
    if args.check:
        check(out)
    elif args.name.startswith("weights:"):
        name = args.name.removeprefix("weights:")
        prepare_weights(name, Path(args.out or f"out/{name}-openai"))
    else:
        prepare(args, out)


def main(argv=None):
    try:
        run(parse(argv))
    except (UserError, OSError) as e:
        sys.exit("prepare_data.py: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        message = "interrupted. No data set was changed; the next run resumes downloads"
        print(f"\nprepare_data.py: {message}", file=sys.stderr)
        sys.exit(130)  # as in a shell


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack the letters of a file's name
        stream.reconfigure(errors="replace")
    main()
