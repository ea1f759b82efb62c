"""Text in, token files of uint16 ids out.

    python prepare_data.py                                      # the sources of Python's standard library
    python prepare_data.py notes.txt --tokenizer gpt2           # your own .txt, .jsonl or .parquet, or a folder of them
    python prepare_data.py tinystories                          # or one of the data sets below
    python prepare_data.py --check tinystories                  # compares the files of a data set with its meta.json

                  hash of the text
    documents ----------------------> train | val         Each NAME becomes a folder data/NAME with
        |                                |                train.bin, val.bin   ids as little-endian uint16, no header
        | count words, merge pairs       | tiktoken       meta.json            vocabulary size, counts, checksums
        v                                v                tokenizer.tiktoken   the byte pairs, if they are learned here
    tokenizer.tiktoken ------------> 17, 3021, 256, ...

Byte-pair encoding follows Sennrich et al. (2016, arXiv 1508.07909, section 3.2) on bytes, with GPT-2's split pattern
(Radford et al. 2019, section 2.2), but the trainer updates pair counts in place while it merges.

    stdlib         Python's standard library on this machine, without tests and tables: 10 MB, no network
    python         stdlib, and the packages that requirements.txt installs: about 90 MB, no network
    shakespeare    tiny Shakespeare (Karpathy, char-rnn): 1.1 MB
    wikitext2      WikiText-2 (Merity et al. 2016), with a test split: 13 MB
    tinystories    TinyStories (Eldan and Li 2023), written by GPT-4: 2.25 GB
    maths-college  Maths-College (ajibawa-2023), exercises and answers: 6 files of 830 MB
    openwebmath    OpenWebMath (Paster et al. 2023): 114 files of 240 MB; needs pyarrow
    weights:gpt2   OpenAI's GPT-2 as a checkpoint of gpt2.py: 0.55 GB; also gpt2-medium, gpt2-large, gpt2-xl
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
from itertools import islice
from pathlib import Path

import numpy as np
import regex  # installed with tiktoken, whose patterns need it: the standard library's re has no \p{L}
import requests
import tiktoken

EOT = "<|endoftext|>"
# GPT-2's: contractions, then words, numbers and the rest, each with one leading space, then white space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # what uint16 holds
BLOCK = 2**16  # bytes or characters of text that are read at once
LONG_WORD = 2**13  # characters of a word (a line of DNA) that the BPE trainer looks at: long words make it slow
BPE_BYTES = 2**26  # ~64 MB of training text are enough for the BPE trainer: more would change few merges

# --- tokenizers


def train_bpe(words, vocab_size):
    """Learns byte-pair merges from word counts.

    words: dict of str to int, the pieces that SPLIT_PATTERN makes and how often each occurs. vocab_size: number of
    ids, 256 bytes and end of text included. Returns a list of bytes, the token of each id but the last (end of text),
    shorter if every word becomes one token before. Of equally frequent pairs the lexicographically greater pair of
    byte strings is merged first, so the result does not depend on the order of `words`.
    """
    tokens = [bytes([b]) for b in range(256)]
    # heapq pops the smallest, we want the greatest: negated bytes, and a final 1 so that b"ab" comes before b"a".
    rank = [(-b, 1) for b in range(256)]
    symbols = [list(word.encode()) for word in words]
    freqs = list(words.values())
    counts = Counter()  # (a, b) -> how often id b follows id a in the whole text
    where = defaultdict(set)  # (a, b) -> the words in which the pair occurs, or has occurred
    for w, (ids, freq) in enumerate(zip(symbols, freqs)):
        for pair in zip(ids, ids[1:]):
            counts[pair] += freq
            where[pair].add(w)
    heap = [(-n, rank[a], rank[b], a, b) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        n, _, _, a, b = heapq.heappop(heap)
        if counts[a, b] != -n:  # out of date: merges lower the counts of other pairs, so it is pushed again, lower
            if counts[a, b] > 0:
                heapq.heappush(heap, (-counts[a, b], rank[a], rank[b], a, b))
            continue
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        rank.append(rank[a][:-1] + rank[b])
        created = set()  # pairs with the new token
        for w in where.pop((a, b)):
            ids, freq, i = symbols[w], freqs[w], 0
            while i < len(ids) - 1:
                if ids[i] == a and ids[i + 1] == b:
                    ids[i : i + 2] = [new]
                    for j, old in ((i - 1, a), (i, b)):  # the pair to the left of the merge, then to the right
                        if 0 <= j < len(ids) - 1:
                            left, right = ids[j], ids[j + 1]
                            counts[(left, old) if j < i else (old, right)] -= freq
                            counts[left, right] += freq
                            where[left, right].add(w)
                            created.add((left, right))
                i += 1
        del counts[a, b]
        for c, d in created:
            if counts[c, d] > 0:  # else the next merge in the same word has removed it
                heapq.heappush(heap, (-counts[c, d], rank[c], rank[d], c, d))
    return tokens


def load_tokenizer(name, ranks=""):
    """Returns a tiktoken.Encoding; its `.eot_token` is the id of end of text. name: `bpe:N` (with `ranks`, the text
    of its tokenizer.tiktoken), `bytes`, or one of tiktoken's names whose ids fit 16 bits. Raises ValueError for other
    names, for damaged ranks, and if tiktoken cannot download its own."""
    if name in ("gpt2", "r50k_base", "p50k_base", "p50k_edit"):
        try:
            return tiktoken.get_encoding(name)
        except OSError as e:
            hint = "Without a network use bpe:4096, or set TIKTOKEN_CACHE_DIR to a folder with its ranks"
            raise ValueError(f"tokenizer {name}: {e}. {hint}") from e
    tokens = [bytes([b]) for b in range(256)]
    if name.startswith("bpe:"):
        tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
    elif name != "bytes":
        others = f"tiktoken's others have more than {MAX_IDS:,} ids, which do not fit the 16 bits of a token file"
        raise ValueError(f"tokenizer {name}: use bpe:N, bytes, gpt2, r50k_base, p50k_base or p50k_edit; {others}")
    if len(tokens) < 256 or len(set(tokens)) != len(tokens):
        raise ValueError(f"tokenizer {name}: tokenizer.tiktoken is damaged")
    mergeable_ranks, eot = {token: i for i, token in enumerate(tokens)}, {EOT: len(tokens)}
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens=eot)


# --- downloads

DOWNLOADS = Path("data/downloads")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def sync(file):
    """Waits until what was written is on the disk. Only then may the file take its final name."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def show_progress(what, done, total):
    """Writes one line on the terminal, again and again: bytes so far, of how many."""
    if sys.stderr.isatty():
        end = "\r" if done < total else "\n"
        print(f"{what} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", end=end, file=sys.stderr)


def download(url, path):
    """Downloads url to path, unless that file exists, and returns path. The bytes are collected in path.part, which
    the next try or the next run resumes with a Range request; it is renamed when its length and, where the hub tells
    it, its SHA-256 are right. Raises OSError after three tries."""
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path
    for n in range(3):
        time.sleep(5 * n)
        done = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=20) as response:
                size = response.headers.get("Content-Range", "").rpartition("/")[2]  # of the file, not of this answer
                size = int(size or response.headers.get("Content-Length", 0))
                if response.status_code != 416:  # 416: there is no byte after those in part
                    response.raise_for_status()
                    part.parent.mkdir(parents=True, exist_ok=True)
                    done = done if response.status_code == 206 else 0
                    with open(part, "ab" if done else "wb") as file:
                        for chunk in response.iter_content(2**16):
                            file.write(chunk)
                            done += len(chunk)
                            show_progress(f"downloading {path.name}", done, size)
                        sync(file)
                tags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in (*response.history, response)]
                sha256 = next((tag for tag in tags if len(tag) == 64), None)
                if size not in (0, done) or (sha256 and sha256_of(part) != sha256):
                    part.unlink()
                    raise requests.RequestException("the length or SHA-256 is not that of the published file")
                os.replace(part, path)
                return path
        except requests.RequestException as e:
            why = e
            if e.response is not None and e.response.status_code in (401, 403, 404):
                break  # another try would not help
    raise OSError(f"{url}: {why}. Run the same command again to resume, or save the file as {path} yourself")


# --- sources: the files of a data set, and the documents in them

HF = f"{HUB}/datasets"
MATHS = [f"{i}-Final.json" for i in range(6)]
DATASETS = {  # NAME: (how the addresses of its files begin, how each of them ends)
    "stdlib": ("", []),
    "python": ("", []),
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/", ["input.txt"]),
    "wikitext2": (f"{HF}/ggml-org/ci/resolve/main/", ["wikitext-2-raw-v1.zip"]),
    "tinystories": (f"{HF}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-", ["train.txt", "valid.txt"]),
    "maths-college": (f"{HF}/ajibawa-2023/Maths-College/resolve/main/Maths-College-", MATHS),
    "openwebmath": (f"{HF}/open-web-math/open-web-math/resolve/main/", []),  # the hub lists them
}
SKIP = r"(^|/)(site-packages|tests?|idle_test|encodings|pydoc_data|lib2to3|turtledemo)/|^(config-|_sysconfigdata)"


def python_files(packages):
    """Yields the Python sources of the standard library and, if `packages`, of those that requirements.txt names with
    all that they require. SKIP leaves out tests, generated files, and tables, which would drown the code."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path: path.relative_to(root) for path in sorted(root.rglob("*.py"))}
    lines = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").split() if packages else []
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    for name in names:  # grows inside the loop
        with suppress(importlib.metadata.PackageNotFoundError):  # required on other systems only
            package = importlib.metadata.distribution(name)
            required = [re.match(r"[\w.-]+", line)[0] for line in package.requires or [] if "extra ==" not in line]
            names += [other for other in required if other not in names]
            files |= {Path(package.locate_file(file)): file for file in sorted(package.files or [])}
    for path, name in files.items():
        if path.suffix == ".py" and not re.search(SKIP, name.as_posix()):
            yield path


def find_files(args):
    """The files of the data set `args.name` in their order, downloaded if need be. Identical files count once."""
    path = Path(args.name)
    if args.name in ("stdlib", "python"):
        files = python_files(args.name == "python")
    elif args.name in DATASETS:
        address, names = DATASETS[args.name]
        if args.name == "openwebmath":
            importlib.import_module("pyarrow")  # fails before the download
            tree = f"{HUB}/api/datasets/open-web-math/open-web-math/tree/main/data"
            listing = json.loads(download(tree, DOWNLOADS / args.name / "files.json").read_text(encoding="utf-8"))
            names = sorted(entry["path"] for entry in listing if entry["path"].endswith(".parquet"))
        return [download(address + name, DOWNLOADS / args.name / Path(name).name) for name in names[: args.shards]]
    else:
        paths = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [p for p in paths if p == path or (p.suffix in (".txt", ".jsonl", ".parquet") and p.is_file())]
        if not files:
            raise ValueError(
                f"{path}: not a file, a folder of .txt, .jsonl or .parquet, or one of {', '.join(DATASETS)}"
            )
    return list({sha256_of(file): file for file in files}.values())


def read_text(path):
    """Yields a UTF-8 file in strings of up to BLOCK bytes."""
    decoder, block = codecs.getincrementaldecoder("utf-8")(), True
    with open(path, "rb") as file:
        while block:
            block = file.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                at = file.tell() - len(e.object) + e.start
                raise ValueError(f"{path}: byte {at:,} is not UTF-8. iconv converts files to UTF-8") from e


def read_stories(path):
    """Yields the texts between `<|endoftext|>` and `<|endoftext|>`."""
    text = ""
    for block in read_text(path):
        *stories, text = (text + block).split(EOT)
        yield from map(str.strip, stories)
    yield text.strip()


def read_wikitext(path):
    """Yields (split, article) of WikiText's zip. An article begins at ` = Title = ` after an empty line."""
    with zipfile.ZipFile(path) as archive:
        for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
            text = archive.read(f"wikitext-2-raw/wiki.{name}.raw").decode()
            yield from ((split, article) for article in regex.split(r"(?m)(?<=\S\s*\n\s*\n)(?= = [^=\n].* = $)", text))


def read_rows(path, fields):
    """Yields the rows of a .parquet file, the objects of a .jsonl file or of an array in a .json file as dicts."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=256, columns=fields):
                yield from rows.to_pylist()
    else:
        with open(path, encoding="utf-8") as file:
            is_array = path.suffix == ".json" and file.read(1) == "["
            file.seek(0)
            yield from json.load(file) if is_array else map(json.loads, filter(str.strip, file))


def read_fields(path, fields):
    """Yields the text of each row: that of its fields, an empty line between them."""
    done = 0
    try:
        for row in read_rows(path, fields):
            text = "\n\n".join(row[field] for field in fields)
            # "\ud800" is JSON but not Unicode: it becomes U+FFFD.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            done += 1
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise ValueError(f"{path}: object {done + 1:,}: {type(e).__name__}: {e}. --field names the text") from e


def read(files, args):
    """Yields (split, document): split None if the source does not tell it, document a text or the path of one."""
    for path in files:
        if args.name == "wikitext2":
            yield from read_wikitext(path)
        elif args.name == "tinystories":
            yield from (("val" if "valid" in path.name else "train", story) for story in read_stories(path))
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            yield from ((None, text) for text in read_fields(path, args.field.split(",")))
        else:
            yield None, path


# --- from documents to pieces of text in their split


def cut(document):
    """Yields a document in pieces of about BLOCK characters, cut between a letter and the white space after it. There
    GPT-2's pattern always splits, so the ids of the pieces are those of the whole."""
    if isinstance(document, Path):
        blocks = read_text(document)
    else:
        blocks = (document[i : i + BLOCK] for i in range(0, len(document), BLOCK))
    text = ""
    for block in blocks:
        text += block
        gap = regex.match(r"(?s).*\S(?=\s)", text)
        # Without a gap in so much text it is cut anywhere: tiktoken overflows its stack on longer words.
        end = gap.end() if gap else len(text) if len(text) > 8 * BLOCK else 0
        yield text[:end]
        text = text[end:]
    yield text


def find_boundary(files, args):
    """The character of the running text at which validation begins, if it is split by position; None if by hash. A hash
    keeps each document in its split when others are added, but of few documents it may choose none for validation."""
    if args.val_fraction == 0:
        return math.inf
    many = math.ceil(10 / min(args.val_fraction, 1 - args.val_fraction))  # documents: ten in the smaller split
    sizes = [sum(map(len, cut(document))) for _, document in islice(read(files, args), many)]
    return round(sum(sizes) * (1 - args.val_fraction)) if len(sizes) < many else None


def pieces(files, args, boundary):
    """Yields (split, number of the document, text) for the pieces of all documents."""
    position = 0
    for number, (split, document) in enumerate(read(files, args)):
        if split is None and boundary is None:  # the same split on every machine and in every run
            digest = (
                sha256_of(document) if isinstance(document, Path) else hashlib.sha256(document.encode()).hexdigest()
            )
            split = "val" if int(digest[:16], 16) < args.val_fraction * 2**64 else "train"
        for text in cut(document):
            parts = {split: text}
            if split is None:
                at = max(0, min(boundary - position, len(text)))
                position += len(text)
                parts = {"train": text[:at], "val": text[at:]}
            for name, part in parts.items():
                if part and (name == "train" or args.val_fraction):
                    yield name, number, part


# --- from pieces of text to files


def count_words(texts):
    """Counts SPLIT_PATTERN's words in the first BPE_BYTES of an iterator over texts."""
    words, left = Counter(), BPE_BYTES
    while left > 0 and (text := next(texts, None)):
        words.update(word[:LONG_WORD] for word in regex.findall(SPLIT_PATTERN, text))
        left -= len(text.encode())
    return words


def write_splits(pieces, encoding, out, total):
    """Encodes pieces of text and writes their ids to out/SPLIT.bin. Returns {split: counts}."""
    files, splits, newest = {}, {}, {}
    with ExitStack() as stack, ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(pieces, 128)):
            encoded = pool.map(lambda piece: encoding.encode_to_numpy(piece[2], disallowed_special=()), batch)
            for (split, number, text), ids in zip(batch, encoded):
                if split not in files:
                    files[split] = stack.enter_context(open(out / f"{split}.bin", "wb"))
                    splits[split] = dict.fromkeys(("tokens", "bytes", "words", "documents"), 0)
                counts = splits[split]
                if newest.get(split) != number:  # a document begins; end of text stands between two
                    newest[split] = number
                    ids = np.append(encoding.eot_token, ids) if counts["documents"] else ids
                    counts["documents"] += 1
                files[split].write(ids.astype("<u2").tobytes())
                counts["tokens"] += len(ids)
                counts["bytes"] += len(text.encode())
                counts["words"] += len(text.split())
            show_progress("encoding", sum(counts["bytes"] for counts in splits.values()), total)
        for file in files.values():
            sync(file)
    return splits


def prepare(args, out):
    """Writes the data set `args.name` to the folder `out`. What the folder held stays whole if that fails."""
    source = args.name if args.name in DATASETS else str(Path(args.name).resolve())
    if (out / "meta.json").exists() and not args.force:
        meta = read_meta(out)
        if (meta["tokenizer"], meta.get("source", source)) != (args.tokenizer, source):
            old = f"{out} was made from {meta.get('source', 'another source')} with {meta['tokenizer']}"
            raise ValueError(f"{old}. Choose another folder with --out, or overwrite this one with --force")
    start, ranks, bpe = time.time(), "", args.tokenizer.startswith("bpe:")
    encoding = None if bpe else load_tokenizer(args.tokenizer)  # before any download
    files = find_files(args)
    boundary = find_boundary(files, args)
    if bpe:
        texts = (text for split, _, text in pieces(files, args, boundary) if split == "train")
        tokens = train_bpe(count_words(texts), int(args.tokenizer[4:]))
        ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
        encoding = load_tokenizer(args.tokenizer, ranks)
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    partial = out / "prepare_data.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        total = sum(path.stat().st_size for path in files)
        splits = write_splits(pieces(files, args, boundary), encoding, partial, total)
        for split in ("train", "val") if args.val_fraction else ("train",):
            if split not in splits:
                raise ValueError(f"{args.name}: no text for {split}.bin (--val-fraction {args.val_fraction})")
        for split, counts in splits.items():
            counts["sha256"] = sha256_of(partial / f"{split}.bin")
        size, eot = encoding.n_vocab, encoding.eot_token
        meta = {"vocab_size": size, "tokenizer": args.tokenizer, "eot": eot, "source": source, "splits": splits}
        texts = {"meta.json": json.dumps(meta, indent=1) + "\n"} | ({"tokenizer.tiktoken": ranks} if ranks else {})
        for name, text in texts.items():
            with open(partial / name, "wb") as file:
                file.write(text.encode())
                sync(file)
        (out / "meta.json").unlink(missing_ok=True)  # first and last: without it the folder is no data set
        for name in ("train.bin", "val.bin", "test.bin", "tokenizer.tiktoken", "meta.json"):
            (out / name).unlink(missing_ok=True)
            if (partial / name).exists():
                os.replace(partial / name, out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    print(f"{out}: {args.tokenizer}, a vocabulary of {size:,}, in {time.time() - start:.0f} s")
    for split, n in splits.items():
        ratio = f"{n['bytes'] / n['tokens']:.2f} bytes per token"
        print(f"  {split:5} {n['tokens']:>13,} tokens {n['bytes']:>15,} bytes {n['documents']:>9,} documents  {ratio}")


def read_meta(out):
    try:
        return json.loads((out / "meta.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{out / 'meta.json'}: damaged ({e}). --force overwrites it") from e


def check(out):
    """Compares the files of a data set with its meta.json: checksums, and whether ids are within the vocabulary."""
    meta = read_meta(out)
    again = ["prepare_data.py", meta.get("source", "NAME"), "--tokenizer", meta["tokenizer"], "--out", str(out)]
    hint = f"To prepare it again: python {shlex.join(again)}"
    if meta["tokenizer"].startswith("bpe:"):
        ranks = (out / "tokenizer.tiktoken").read_text(encoding="utf-8")
        if load_tokenizer(meta["tokenizer"], ranks).n_vocab != meta["vocab_size"]:
            raise ValueError(f"{out / 'tokenizer.tiktoken'}: not the vocabulary of {meta['vocab_size']:,}. {hint}")
    for split, counts in meta["splits"].items():
        path = out / f"{split}.bin"
        if sha256_of(path) != counts["sha256"]:
            raise ValueError(f"{path}: changed or cut short since it was written. {hint}")
        if (highest := np.memmap(path, "<u2", "r").max()) >= meta["vocab_size"]:
            raise ValueError(f"{path}: id {highest:,} is beyond the vocabulary of {meta['vocab_size']:,}. {hint}")
        print(f"{path}: {counts['tokens']:,} tokens, as in meta.json")


def prepare_weights(name, out):
    """Writes OpenAI's GPT-2 (Radford et al. 2019) as out/ckpt.pt, a checkpoint of gpt2.py."""
    import torch

    path = download(f"{HUB}/openai-community/{name}/resolve/main/pytorch_model.bin", DOWNLOADS / f"{name}.bin")
    model = {}
    for key, w in torch.load(path, weights_only=True).items():
        key = key.removeprefix("transformer.")
        if key != "lm_head.weight" and not key.endswith((".attn.bias", ".attn.masked_bias")):  # wte's, and constants
            model[key] = w.T.contiguous() if key.startswith("h.") and w.dim() == 2 else w  # x @ W here, x @ W.T in ours
    (vocab_size, n_embd), block_size = model["wte.weight"].shape, len(model["wpe.weight"])
    padding = torch.zeros(-vocab_size % 64, n_embd)  # gpt2.py pads its vocabulary to a multiple of 64
    model["wte.weight"] = model["lm_head.weight"] = torch.cat([model["wte.weight"], padding])
    config = {"vocab_size": vocab_size, "block_size": block_size, "n_embd": n_embd, "n_head": n_embd // 64}
    config["n_layer"] = len({key.split(".")[1] for key in model if key.startswith("h.")})
    state = {"model_file": "gpt2.py", "config": config, "model": model, "optimizer": {"state": {}}, "step": 0}
    state |= {"tokenizer": {"name": "gpt2", "eot": 50256, "vocab_size": 50257, "ranks": ""}}
    state |= {"tokens": 0, "best": math.inf, "seconds": 0.0, "rng": [0, 0]}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "ckpt.pt.tmp", "wb") as file:
        torch.save(state, file)
        sync(file)
    os.replace(out / "ckpt.pt.tmp", out / "ckpt.pt")
    print(f"To sample from it: python sample.py --ckpt {shlex.quote(str(out / 'ckpt.pt'))}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (--help lists all options)")
    add = parser.add_argument
    add("name", nargs="?", default="stdlib", help="a data set of those above, or the path of your own text")
    add("--tokenizer", default="bpe:4096", help="bpe:N (trained here), bytes, gpt2, ... (default: %(default)s)")
    add("--val-fraction", type=float, default=0.1, help="validation's share (default: %(default)s); 0: no validation")
    add("--field", help="field of the text in .jsonl, .json and .parquet; a,b joins two (default: text)")
    add("--shards", type=int, metavar="N", help="download only the first N files of the data set")
    add("--out", help="folder to write (default: data/NAME; for weights out/NAME-openai)")
    add("--force", action="store_true", help="overwrite a data set that was made from another source or tokenizer")
    add("--check", action="store_true", help="check the data set NAME, or in the folder of that name, and stop")
    args = parser.parse_args(argv)
    args.field = args.field or ("instruction,output" if args.name == "maths-college" else "text")
    out = Path(args.out or Path("data") / Path(args.name).resolve().stem)
    try:
        if not 0 <= args.val_fraction < 1:
            raise ValueError(f"--val-fraction {args.val_fraction}: use a number from 0 to less than 1")
        if args.tokenizer.startswith("bpe:") and args.tokenizer[4:] not in map(str, range(257, MAX_IDS + 1)):
            raise ValueError(f"--tokenizer {args.tokenizer}: N of bpe:N goes from 257 (bytes) to {MAX_IDS:,} (16 bits)")
        if args.check:
            check(Path(args.name) if (Path(args.name) / "meta.json").exists() else out)
        elif args.name.startswith("weights:"):
            prepare_weights(args.name.removeprefix("weights:"), Path(args.out or f"out/{args.name[8:]}-openai"))
        else:
            prepare(args, out)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        sys.exit("prepare_data.py: " + " ".join(str(e).split()))
    except ImportError as e:
        sys.exit(f"prepare_data.py: {e}. Parquet files need it: pip install pyarrow")
    except KeyboardInterrupt:
        sys.exit("\nprepare_data.py: interrupted; no data set was changed, and the next run resumes downloads")


if __name__ == "__main__":
    main()
