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
    python prepare_data.py notes.txt --tokenizer gpt2   your own .txt, .jsonl or .parquet
    python prepare_data.py tinystories                  one of the data sets below
    python prepare_data.py --check tinystories          compares the files with their meta.json

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section
3.2, on bytes, with GPT-2's split pattern (Radford et al. 2019, section 2.2). But the trainer does
not count all pairs again after each merge: it updates the counts that the merge changes.

    stdlib         Python's standard library on this machine, without tests and tables: 10 MB
    python         stdlib, and the packages that requirements.txt installs: about 90 MB
    shakespeare    tiny Shakespeare (Karpathy, char-rnn): 1.1 MB
    wikitext2      WikiText-2 (Merity et al. 2016), with a test split: 13 MB
    tinystories    TinyStories (Eldan and Li 2023), written by GPT-4: 2.25 GB
    maths-college  Maths-College (ajibawa-2023), exercises and answers: 6 files of 830 MB
    openwebmath    OpenWebMath (Paster et al. 2023): 114 files of 240 MB; needs pyarrow
    weights:gpt2   OpenAI's GPT-2 as a checkpoint of gpt2.py: 0.55 GB; also gpt2-medium (1.5 GB),
                   gpt2-large (3.2 GB) and gpt2-xl (6.4 GB)

The first two need no network.
"""

import argparse
import base64
import codecs
import hashlib
import heapq
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import sys
import sysconfig
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken. The standard library's re has no \p{L}, which is any letter
import requests
import tiktoken

EOT = "<|endoftext|>"
# GPT-2's: contractions, then words, numbers and the rest, each with one leading space, then white
# space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # what uint16 holds
BLOCK = 2**16  # bytes or characters of text that are read at once
LONG_WORD = 2**13  # characters of a word that the BPE trainer looks at: a line of DNA is slow
BPE_BYTES = 2**26  # 64 MB of training text are enough for the BPE trainer


class UserError(ValueError):
    """Something that the user can put right: main prints it as one line, without a traceback."""


# --- tokenizers


def train_bpe(words, vocab_size):
    """Learns byte-pair merges from word counts.

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
        # The most frequent pair. Merges lower the counts of other pairs, whose entries stay as they
        # were. Such an entry is put back with its count of now.
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
    its id. Raises UserError for other names, for damaged ranks, and if tiktoken cannot download its
    own ranks.
    """
    if name in ("gpt2", "r50k_base", "p50k_base", "p50k_edit"):
        try:
            return tiktoken.get_encoding(name)
        except OSError as e:
            hint = "Without a network use bpe:4096, or set TIKTOKEN_CACHE_DIR to a folder with it"
            raise UserError(f"tokenizer {name}: {e}. {hint}") from e

    tokens = [bytes([b]) for b in range(256)]
    if name.startswith("bpe:"):
        tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
    elif name != "bytes":
        names = "bpe:N, bytes, gpt2, r50k_base, p50k_base or p50k_edit"
        why = f"other tokenizers of tiktoken have more than {MAX_IDS:,} ids: too many for 16 bits"
        raise UserError(f"tokenizer {name}: use {names}; {why}")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(tokens) < 256 or len(ids) < len(tokens):
        raise UserError(f"tokenizer {name}: tokenizer.tiktoken is damaged")
    special = {EOT: len(tokens)}
    return tiktoken.Encoding(
        name, pat_str=SPLIT_PATTERN, mergeable_ranks=ids, special_tokens=special
    )


# --- downloads

DOWNLOADS = Path("data/downloads")


def sync(file):
    """Waits until what was written is on the disk. Only then may the file take its final name."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show_progress(what, done, total):
    """Writes one line on the terminal, again and again: bytes so far, of how many."""
    if sys.stderr.isatty():
        end = "\r" if done < total else "\n"
        print(f"{what} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", end=end, file=sys.stderr)


def fetch(url, part):
    """One try of a download: appends to the file `part` the bytes that it lacks. Raises
    requests.RequestException if the connection fails, or if the file is not the published one."""
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    # identity: not compressed. Range: from byte `done` on; a server may ignore it.
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, headers=headers, stream=True, timeout=20) as response:
        # The size of the whole file follows a slash: "bytes 9-299/300". Status 416 means that there
        # is no byte after `done`: then the header is "bytes */300".
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(size or response.headers.get("Content-Length", 0))  # 0: it is not told
        if response.status_code != 416:
            response.raise_for_status()
            if response.status_code != 206:  # 206: the range. Otherwise, it is the whole file.
                done = 0
            with open(part, "ab" if done else "wb") as file:
                for chunk in response.iter_content(2**16):
                    file.write(chunk)
                    done += len(chunk)
                    show_progress(f"downloading {url.rpartition('/')[2]}", done, size)
                sync(file)

        # The hub tells the SHA-256 of a large file, in the answer that points to its address.
        answers = [*response.history, response]
        tags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in answers]
        wrong = [tag for tag in tags if len(tag) == 64 and tag != sha256_of(part)]
        if wrong or size not in (0, done):
            part.unlink()
            raise requests.RequestException("its length or SHA-256 is not the published one")


def download(url, path):
    """Downloads url to path, unless that file exists, and returns path. The bytes are collected in
    path.part, so that the next try, or the next run, goes on where this one stops. Raises UserError
    after three tries."""
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path
    for seconds in (0, 5, 10):
        time.sleep(seconds)
        try:
            fetch(url, part)
            os.replace(part, path)
            return path
        except requests.RequestException as e:
            problem = e
            if e.response is not None and e.response.status_code in (401, 403, 404):
                break  # another try would not help
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
    ),
    "openwebmath": DataSet(
        f"{HF}/open-web-math/open-web-math/resolve/main/",
        [],  # the hub has a list of them
    ),
}

# Left out of Python's sources: tests, generated files, and tables, which would drown the code.
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
        with suppress(importlib.metadata.PackageNotFoundError):  # required on other systems only
            package = importlib.metadata.distribution(name)
            todo += [line for line in package.requires or [] if "extra ==" not in line]
            for file in sorted(package.files or []):
                yield Path(package.locate_file(file)), file


def python_files(packages):
    """The Python sources of the standard library and, if `packages`, of what requirements.txt
    names and requires."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path: path.relative_to(root) for path in sorted(root.rglob("*.py"))}
    if packages:
        requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
        files |= find_package_files(requirements.splitlines())
    return [
        path
        for path, name in files.items()
        if path.suffix == ".py" and not re.search(SKIP, name.as_posix())
    ]


def import_parquet():
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise UserError(f"{e}. Parquet files need it: pip install pyarrow") from e
    return parquet


def find_files(args):
    """The files of the data set `args.name` in their order; they are downloaded if need be."""
    if args.name in DATASETS:
        return download_files(args.name, args.shards)
    if args.name in ("stdlib", "python"):
        files = python_files(packages=args.name == "python")
    elif Path(args.name).is_dir():
        paths = sorted(Path(args.name).rglob("*"))
        files = [p for p in paths if p.suffix in (".txt", ".jsonl", ".parquet") and p.is_file()]
    else:
        files = [Path(args.name)]
    if not files or not files[0].exists():
        known = ", ".join(["stdlib", "python", *DATASETS])
        wanted = f"not a file, a folder of .txt, .jsonl or .parquet, or one of {known}"
        raise UserError(f"{args.name}: {wanted}")
    unique = {sha256_of(file): file for file in files}  # identical files count once
    return list(unique.values())


def download_files(name, shards):
    """Downloads the first `shards` files of a data set, or all of them if it is None."""
    folder = DOWNLOADS / name
    names = DATASETS[name].names
    if name == "openwebmath":
        import_parquet()  # fails before the download
        tree = f"{HUB}/api/datasets/open-web-math/open-web-math/tree/main/data"
        listing = download(tree, folder / "files.json").read_text(encoding="utf-8")
        paths = [entry["path"] for entry in json.loads(listing)]
        names = sorted(path for path in paths if path.endswith(".parquet"))
    address = DATASETS[name].address
    return [download(address + file, folder / Path(file).name) for file in names[:shards]]


# --- from files to documents


def read_text(path):
    """Yields a UTF-8 file in strings of up to BLOCK bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                at = file.tell() - len(e.object) + e.start
                hint = "iconv converts files to UTF-8"
                raise UserError(f"{path}: byte {at:,} is not UTF-8. {hint}") from e
            if not block:
                break


def read_stories(path):
    """Yields the texts between `<|endoftext|>` and `<|endoftext|>`."""
    text = ""
    for block in read_text(path):
        *stories, text = (text + block).split(EOT)  # the last one may go on in the next block
        for story in stories:
            yield story.strip()
    yield text.strip()


def read_wikitext(path):
    """Yields (split, article) of WikiText's zip."""
    # An article begins at a line ` = Title = ` after an empty line.
    beginning = regex.compile(r"(?m)(?<=\S\s*\n\s*\n)(?= = [^=\n].* = $)")
    try:
        with zipfile.ZipFile(path) as archive:
            for split, name in [("train", "train"), ("val", "valid"), ("test", "test")]:
                text = archive.read(f"wikitext-2-raw/wiki.{name}.raw").decode()
                for article in beginning.split(text):
                    yield split, article
    except zipfile.BadZipFile as e:
        raise UserError(f"{path}: {e}") from e


def read_rows(path, fields):
    """Yields the rows of a .parquet file, or the objects of a .jsonl file or of an array in a .json
    file, as dicts."""
    if path.suffix == ".parquet":
        with import_parquet().ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=256, columns=fields):
                yield from rows.to_pylist()
        return
    with open(path, encoding="utf-8") as file:
        is_array = path.suffix == ".json" and file.read(1) == "["
        file.seek(0)
        if is_array:
            yield from json.load(file)
        else:
            yield from map(json.loads, filter(str.strip, file))


def read_fields(path, fields):
    """Yields the text of each row: its fields, with an empty line between them."""
    done = 0
    try:
        for row in read_rows(path, fields):
            text = "\n\n".join(row[field] for field in fields)
            # "\ud800" is JSON but not Unicode: it becomes U+FFFD.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            done += 1
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as e:
        where = f"{path}: object {done + 1:,}"
        raise UserError(f"{where}: {type(e).__name__}: {e}. --field names the text") from e


def read(files, args):
    """Yields (split, document). split: train, val or test, or None if the source does not tell it.
    document: a text, or the path of a text file, which may be too large for the memory."""
    for path in files:
        if args.name == "wikitext2":
            yield from read_wikitext(path)
        elif args.name == "tinystories":
            for story in read_stories(path):
                yield "val" if path.name == "valid.txt" else "train", story
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            for text in read_fields(path, args.field.split(",")):
                yield None, text
        else:
            yield None, path


# --- from documents to pieces


def read_blocks(document):
    """Yields a text, or the text of a file, in strings of up to BLOCK characters."""
    if isinstance(document, Path):
        yield from read_text(document)
    else:
        for start in range(0, len(document), BLOCK):
            yield document[start : start + BLOCK]


def cut(document):
    """Yields a document in pieces of about BLOCK characters, cut between a letter and the white
    space after it. There GPT-2's pattern always splits, so the ids of the pieces are those of the
    whole. A text without such a place is cut anywhere: tiktoken overflows its stack on long words.
    """
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


def find_boundary(files, args):
    """Returns None if each document goes to train or val by its hash: it stays there when other
    documents are added. Of few documents the hash may choose none for val. So they are split by
    position: the first characters of all texts together, as many as this function returns, are for
    training."""
    if args.val_fraction == 0:
        return None
    many = math.ceil(10 / min(args.val_fraction, 1 - args.val_fraction))  # ten in the smaller split
    sizes = []  # in characters
    for _, document in islice(read(files, args), many):
        sizes.append(sum(map(len, read_blocks(document))))
    if len(sizes) == many:
        return None
    return round(sum(sizes) * (1 - args.val_fraction))


def split_by_hash(document, val_fraction):
    """The split of a document, the same on every machine and in every run."""
    sha = hashlib.sha256()
    for block in read_blocks(document):
        sha.update(block.encode())
    number = int.from_bytes(sha.digest()[:8], "big")  # as if drawn from 0 .. 2**64 - 1
    return "val" if number < val_fraction * 2**64 else "train"


def pieces(files, args, boundary):
    """Yields (split, number of the document, text) for the pieces of all documents."""
    position = 0  # of the piece in all texts together
    for number, (split, document) in enumerate(read(files, args)):
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


def write_splits(pieces, encoding, folder, total):
    """Encodes pieces of text and writes their ids to folder/SPLIT.bin. Returns {split: counts}."""
    files = {}  # split -> its file
    splits = {}  # split -> its counts
    newest = {}  # split -> number of the document that was written to it last
    with ExitStack() as stack, ThreadPoolExecutor(os.cpu_count()) as pool:

        def encode(piece):
            return encoding.encode_to_numpy(piece[2], disallowed_special=())

        while batch := list(islice(pieces, 128)):
            for (split, number, text), ids in zip(batch, pool.map(encode, batch)):
                if split not in files:
                    files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                    splits[split] = dict.fromkeys(("tokens", "bytes", "words", "documents"), 0)
                counts = splits[split]
                if number != newest.get(split):  # a document begins
                    newest[split] = number
                    if counts["documents"] > 0:  # end of text stands between two documents
                        ids = np.append(encoding.eot_token, ids)
                    counts["documents"] += 1
                files[split].write(ids.astype("<u2").tobytes())
                counts["tokens"] += len(ids)
                counts["bytes"] += len(text.encode())
                counts["words"] += len(text.split())
            show_progress("encoding", sum(counts["bytes"] for counts in splits.values()), total)
        for file in files.values():
            sync(file)
    for split, counts in splits.items():
        counts["sha256"] = sha256_of(folder / f"{split}.bin")
    return splits


def write_text(path, text):
    with open(path, "wb") as file:
        file.write(text.encode())
        sync(file)


def write_data_set(args, files, source, folder):
    """Writes all files of the data set to `folder`. Returns what meta.json holds."""
    boundary = find_boundary(files, args)
    ranks = ""
    if args.tokenizer.startswith("bpe:"):
        parts = pieces(files, args, boundary)
        texts = (text for split, _, text in parts if split == "train")
        ranks = make_ranks(int(args.tokenizer[4:]), texts)
        write_text(folder / "tokenizer.tiktoken", ranks)
    encoding = load_tokenizer(args.tokenizer, ranks)

    total = sum(path.stat().st_size for path in files)
    splits = write_splits(pieces(files, args, boundary), encoding, folder, total)
    for split in ("train", "val"):
        if split not in splits and (split == "train" or args.val_fraction > 0):
            problem = f"no text for {split}.bin (--val-fraction {args.val_fraction})"
            raise UserError(f"{args.name}: {problem}")
    meta = {
        "vocab_size": encoding.n_vocab,
        "tokenizer": args.tokenizer,
        "eot": encoding.eot_token,
        "source": source,
        "splits": splits,
    }
    write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta


def replace_folder(partial, out):
    """Moves the files of a data set from `partial` to `out`, in place of the older ones. meta.json
    goes first and comes last: a folder without it is no data set."""
    (out / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "test.bin", "tokenizer.tiktoken", "meta.json"):
        (out / name).unlink(missing_ok=True)
        if (partial / name).exists():
            os.replace(partial / name, out / name)


def read_meta(out):
    path = out / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}). --force overwrites it") from e


def prepare(args, out):
    """Writes the data set `args.name` to the folder `out`. If that fails, what the folder held
    stays whole."""
    start = time.time()
    source = args.name
    if Path(source).exists() and source not in ("stdlib", "python", *DATASETS):
        source = str(Path(source).resolve())
    if (out / "meta.json").exists() and not args.force:
        meta = read_meta(out)
        old = meta.get("source", source)
        if (meta["tokenizer"], old) != (args.tokenizer, source):
            made = f"{out} was made from {old} with {meta['tokenizer']}"
            hint = "Choose another folder with --out, or overwrite this one with --force"
            raise UserError(f"{made}. {hint}")

    if not args.tokenizer.startswith("bpe:"):
        load_tokenizer(args.tokenizer)  # if there is no such tokenizer, fail before a download
    files = find_files(args)
    partial = out / "prepare_data.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        meta = write_data_set(args, files, source, partial)
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()  # only if it is empty

    seconds = time.time() - start
    print(f"{out}: {args.tokenizer}, vocabulary size {meta['vocab_size']:,}, {seconds:.0f} s")
    for split, n in meta["splits"].items():
        counts = f"{n['tokens']:>13,} tokens {n['bytes']:>15,} bytes {n['documents']:>9,} documents"
        print(f"  {split:5} {counts}  {n['bytes'] / n['tokens']:.2f} bytes per token")


def check(out):
    """Compares the files of a data set with its meta.json: the checksums, and whether all ids are
    in the vocabulary."""
    meta = read_meta(out)
    vocab_size = meta["vocab_size"]
    command = ["prepare_data.py", meta.get("source", "NAME"), "--tokenizer", meta["tokenizer"]]
    hint = f"To prepare it again: python {shlex.join([*command, '--out', str(out)])}"
    if meta["tokenizer"].startswith("bpe:"):
        path = out / "tokenizer.tiktoken"
        ranks = path.read_text(encoding="utf-8")
        if load_tokenizer(meta["tokenizer"], ranks).n_vocab != vocab_size:
            raise UserError(f"{path}: not the vocabulary of {vocab_size:,}. {hint}")
    for split, counts in meta["splits"].items():
        path = out / f"{split}.bin"
        if sha256_of(path) != counts["sha256"]:
            raise UserError(f"{path}: changed or cut short since it was written. {hint}")
        highest = np.memmap(path, "<u2", "r").max()
        if highest >= vocab_size:
            beyond = f"id {highest:,} is beyond the vocabulary of {vocab_size:,}"
            raise UserError(f"{path}: {beyond}. {hint}")
        print(f"{path}: {counts['tokens']:,} tokens, as in meta.json")


# --- OpenAI's weights


def prepare_weights(name, out):
    """Writes OpenAI's GPT-2 (Radford et al. 2019) as out/ckpt.pt, a checkpoint of gpt2.py."""
    import torch

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
    blocks = {key.split(".")[1] for key in model if key.startswith("h.")}
    config = dict(
        vocab_size=vocab_size,
        block_size=len(model["wpe.weight"]),
        n_layer=len(blocks),
        n_head=n_embd // 64,
        n_embd=n_embd,
    )
    tokenizer = {"name": "gpt2", "eot": 50256, "vocab_size": 50257, "ranks": ""}
    state = dict(
        model_file="gpt2.py",
        config=config,
        tokenizer=tokenizer,
        step=0,
        tokens=0,
        seconds=0.0,
        best=math.inf,
        model=model,
        optimizer={"state": {}},
    )
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "ckpt.pt.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        sync(file)
    os.replace(temporary, out / "ckpt.pt")
    print(f"To sample from it: python sample.py --ckpt {shlex.quote(str(out / 'ckpt.pt'))}")


# --- options


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda text: sys.exit(f"prepare_data.py: {text} (--help lists all options)")
    add = parser.add_argument
    add("name", nargs="?", default="stdlib", help="a data set, or the path of your own text")
    add("--tokenizer", default="bpe:4096", help="bpe:N (trained here), bytes, gpt2, ...")
    add("--val-fraction", type=float, default=0.1, help="validation's share; 0: no validation")
    add("--field", help="in .jsonl, .json and .parquet: where the text is; a,b joins two fields")
    add("--shards", type=int, metavar="N", help="download only the first N files of the data set")
    add("--out", help="folder to write (default: data/NAME; for weights out/NAME-openai)")
    add("--force", action="store_true", help="overwrite a data set of another source or tokenizer")
    add("--check", action="store_true", help="check the data set, or the folder, NAME and stop")
    args = parser.parse_args(argv)
    if args.field is None:
        args.field = DATASETS[args.name].field if args.name in DATASETS else "text"
    if not 0 <= args.val_fraction < 1:
        problem = f"--val-fraction {args.val_fraction}"
        raise UserError(f"{problem}: it must be at least 0 and less than 1")
    kind, _, size = args.tokenizer.partition(":")
    if kind == "bpe" and not (size.isdecimal() and 257 <= int(size) <= MAX_IDS):
        limits = f"N is from 257 (256 bytes and end of text) to {MAX_IDS:,} (16 bits)"
        raise UserError(f"--tokenizer {args.tokenizer}: in bpe:N, {limits}")
    return args


def run(args):
    out = Path(args.out or Path("data") / Path(args.name).resolve().stem)
    if args.check:
        is_folder = (Path(args.name) / "meta.json").exists()
        check(Path(args.name) if is_folder else out)
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
        what = "interrupted; no data set was changed, and the next run resumes downloads"
        print(f"\nprepare_data.py: {what}", file=sys.stderr)
        sys.exit(130)  # as in a shell


if __name__ == "__main__":
    main()
