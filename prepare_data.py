"""Text in, uint16 token files out.

    python prepare_data.py                                      # the Python standard library's own sources
    python prepare_data.py notes.txt --tokenizer gpt2           # or a .txt, a .jsonl, a folder of them

                  hash of the text
    documents ----------------------> train | val         Each NAME becomes a folder data/NAME with
        |                                |                train.bin, val.bin   ids as little-endian uint16, no header
        | count words, merge pairs       | tiktoken       meta.json            vocabulary size, counts, checksums
        v                                v                tokenizer.tiktoken   the byte pairs learned here, if any
    tokenizer.tiktoken ------------> 17, 3021, 256, ...

Nothing is held in memory but a few megabytes of text: documents stream through, ids are appended to disk under
temporary names, and the files take their real names when all are whole.

Byte-pair encoding follows Sennrich et al. (2016, arXiv 1508.07909, section 3.2) on bytes, with GPT-2's split
pattern (Radford et al. 2019, section 2.2). The trainer updates pair counts in place while it merges.
"""

import argparse
import base64
import codecs
import hashlib
import heapq
import json
import os
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken, whose patterns are written for it: the standard library's re has no \p{L}
import tiktoken

EOT = "<|endoftext|>"
# GPT-2's: contractions, then words, numbers and the rest, each with one leading space, then white space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # what uint16 holds
TOO_LARGE = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}  # ids: known without a download
BLOCK = 2**16  # bytes or characters of text taken up at once
LONG_WORD = 2**13  # characters: a line of DNA is cut into such words, each merge in one takes time with its length
BPE_BYTES = 2**26  # ~64 MB of training text is what the BPE trainer looks at: more changes few merges

# --- tokenizers


def train_bpe(words, vocab_size):
    """Learns byte-pair merges from word counts.

    words: dict of str to int, the pieces SPLIT_PATTERN makes and how often each occurs. vocab_size: ids in all,
    256 bytes and end of text included. Returns a list of bytes, the token of each id but the last (end of text);
    fewer than asked for when every word has become one token. Of equally frequent pairs the lexicographically
    greater pair of byte strings is merged first, so the list does not depend on the order of `words`.
    """
    tokens = [bytes([b]) for b in range(256)]
    # heapq pops the smallest, we want the greatest: negated bytes, and a last 1 so that b"ab" comes before b"a".
    rank = [(-b, 1) for b in range(256)]
    symbols = [list(word.encode()) for word in words]
    freqs = list(words.values())
    counts = Counter()  # (a, b) -> how often a stands before b in the whole text
    where = defaultdict(set)  # (a, b) -> the words it occurs in (or once occurred in)
    for w, (ids, freq) in enumerate(zip(symbols, freqs)):
        for pair in zip(ids, ids[1:]):
            counts[pair] += freq
            where[pair].add(w)
    heap = [(-n, rank[a], rank[b], a, b) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        n, _, _, a, b = heapq.heappop(heap)
        if counts[a, b] != -n:  # counts of standing pairs only fall: put it back where it belongs now
            if counts[a, b] > 0:
                heapq.heappush(heap, (-counts[a, b], rank[a], rank[b], a, b))
            continue
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        rank.append(rank[a][:-1] + rank[b])
        born = set()
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
                            born.add((left, right))
                i += 1
        del counts[a, b]
        for c, d in born:
            if counts[c, d] > 0:  # else merged away again in the same word
                heapq.heappush(heap, (-counts[c, d], rank[c], rank[d], c, d))
    return tokens


def load_tokenizer(name, ranks=""):
    """The tiktoken.Encoding called `name`: `bpe:N` (with `ranks`, the text of its tokenizer.tiktoken), `bytes`, or
    any name tiktoken knows. Its end of text is the id `.eot_token`. Exits with one line if there is no such
    tokenizer or its ids do not fit 16 bits."""
    if name == "bytes":
        tokens = [bytes([b]) for b in range(256)]
    elif name.startswith("bpe:"):
        tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
    else:
        if name not in tiktoken.list_encoding_names():
            sys.exit(f"--tokenizer {name}: not known. Use bpe:N, bytes, gpt2, r50k_base, p50k_base or p50k_edit.")
        try:
            size = TOO_LARGE.get(name) or tiktoken.get_encoding(name).n_vocab
        except Exception as e:  # whatever a failed download raises
            sys.exit(
                f"--tokenizer {name}: tiktoken could not load it ({type(e).__name__}). It downloads the ranks once; "
                "without a network set TIKTOKEN_CACHE_DIR to a folder that has them, or use bpe:4096."
            )
        if size > MAX_IDS:
            sys.exit(
                f"--tokenizer {name}: {size:,} ids do not fit the 16 bits of a token file (at most {MAX_IDS:,}). "
                "gpt2, r50k_base, p50k_base, p50k_edit, bytes and bpe:N fit."
            )
        return tiktoken.get_encoding(name)
    return tiktoken.Encoding(
        name,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={EOT: len(tokens)},
    )


def dump_ranks(tokens):
    """tiktoken's own file format: a line for each token, its bytes in base64 and its id."""
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


# --- sources: each yields documents as (split, pieces of text)


def stdlib_files():
    """The standard library's sources on this machine, without what is data rather than prose and code."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skip & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield path


def find_files(name):
    """The files NAME stands for, sorted. Exits with one line if there are none."""
    if name == "stdlib":
        return list(stdlib_files())
    path = Path(name)
    if not path.exists():
        sys.exit(f"{name}: neither a known data set (stdlib) nor a file or folder here.")
    candidates = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in candidates if p.suffix in (".txt", ".jsonl")]
    if not files:
        sys.exit(f"{name}: no .txt or .jsonl {'in this folder' if path.is_dir() else 'file'}.")
    return files


replacements = 0  # bytes or surrogates replaced since the last reset


def replace_and_count(error):
    global replacements
    replacements += 1
    return "\ufffd", error.end


codecs.register_error("replace_and_count", replace_and_count)


def at_gaps(chunks):
    """Strings of at most BLOCK characters, joined and cut anew between a letter and the white space after it. There
    GPT-2's pattern always cuts too, so the pieces encode to the ids of the whole."""
    text = ""
    for chunk in chunks:
        text += chunk
        gap = regex.match(r"(?s).*\S(?=\s)", text)
        # No gap in so much text: cut anyway. Memory stays small, and tiktoken overflows its stack on longer runs.
        end = gap.end() if gap else len(text) if len(text) > 8 * BLOCK else 0
        if end:
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def read_text(path, errors, start=0, stop=None):
    """Yields bytes [start, stop) of a UTF-8 file as strings. Exits, naming the byte, where it is not UTF-8."""
    decode = codecs.getincrementaldecoder("utf-8")(errors).decode
    left = (path.stat().st_size if stop is None else stop) - start
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0:
            block = file.read(min(left, BLOCK))
            left = left - len(block) if block else 0  # a file that shrank under us ends here
            try:
                yield decode(block, final=left == 0)
            except UnicodeDecodeError as e:
                at = file.tell() - len(e.object) + e.start
                sys.exit(f"{path}: byte {at:,} is not UTF-8. Convert the file, or put U+FFFD there: --errors replace.")


def read_jsonl(path, field, errors):
    """Yields the text of `field` on each line of a .jsonl file. Exits, naming the line, if one has none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8", errors))[field]
                if not isinstance(text, str):
                    raise TypeError(f"field {field!r} is not a string")
                try:
                    text.encode()
                except UnicodeEncodeError:  # "\ud800" is good JSON and no character
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
            except KeyError:
                sys.exit(f"{path}:{number}: no field {field!r}; --field names the one that holds the text.")
            except UnicodeError:
                sys.exit(f"{path}:{number}: not valid Unicode. Mend the line, or put U+FFFD there: --errors replace.")
            except (ValueError, TypeError, RecursionError) as e:
                sys.exit(f"{path}:{number}: not a JSON object with a text in it ({e}).")
            yield text


def split_of(blocks, val_fraction):
    """`val` for a fraction of all documents, chosen by a hash of their text: the same on every machine and run."""
    sha = hashlib.sha256()
    for block in blocks:
        sha.update(block)
    return "val" if int.from_bytes(sha.digest()[:8], "big") < val_fraction * 2**64 else "train"


def cut_position(path, val_fraction):
    """Byte at which the last val_fraction of a file starts, moved on to the start of a character."""
    with open(path, "rb") as file:
        at = file.seek(round(path.stat().st_size * (1 - val_fraction)))
        while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:  # inside a UTF-8 sequence
            at += 1
    return at


class Source:
    """Documents of a list of files. Iterating yields (split, pieces), pieces an iterable of str; `size` in bytes."""

    def __init__(self, files, args):
        self.files, self.field, self.val_fraction = files, args.field, args.val_fraction
        self.errors = "replace_and_count" if args.errors == "replace" else "strict"
        self.size = sum(path.stat().st_size for path in files)
        self.splits = {}  # of the text files; one pass now, so that later passes know before they read
        for path in files:
            if path.suffix != ".jsonl" and len(files) > 1:
                with open(path, "rb") as file:
                    self.splits[path] = split_of(iter(lambda: file.read(BLOCK), b""), self.val_fraction)

    def __iter__(self):
        for path in self.files:
            if path.suffix == ".jsonl":
                for text in read_jsonl(path, self.field, self.errors):
                    chunks = (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))
                    yield split_of([text.encode()], self.val_fraction), at_gaps(chunks)
            elif path in self.splits:
                yield self.splits[path], at_gaps(read_text(path, self.errors))
            else:  # one document: no hash can split it
                cut = cut_position(path, self.val_fraction)
                yield "train", at_gaps(read_text(path, self.errors, 0, cut))
                yield "val", at_gaps(read_text(path, self.errors, cut))


# --- writing


class Progress:
    """One line on the terminal: what, how far, MB/s and time left."""

    def __init__(self, what, total):
        self.what, self.total, self.done = what, total, 0
        self.start = self.shown = time.time()

    def add(self, n_bytes):
        self.done += n_bytes
        now = time.time()
        if now - self.shown > 0.5 and sys.stderr.isatty():
            self.shown, rate = now, self.done / (now - self.start)
            left = max(0, self.total - self.done) / rate
            text = f"{self.what} {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s, "
            text += f"{left:.0f} s left"
            print(f"\r{text:<79}", end="", file=sys.stderr, flush=True)

    def end(self):
        seconds = time.time() - self.start
        rate = self.done / 1e6 / max(seconds, 1e-9)
        text = f"{self.what} {self.done / 1e6:,.1f} MB in {seconds:.1f} s, {rate:.1f} MB/s"
        print(("\r" if sys.stderr.isatty() else "") + f"{text:<79}", file=sys.stderr)


class SplitWriter:
    """Appends the ids of one split to a file and keeps the counts of meta.json."""

    def __init__(self, path):
        self.file, self.sha = open(path, "wb"), hashlib.sha256()
        self.tokens = self.bytes = self.words = self.documents = 0

    def write(self, ids):
        data = np.array(ids, dtype="<u2").tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.tokens += len(ids)

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        counts = {k: getattr(self, k) for k in ("tokens", "bytes", "words", "documents")}
        return {**counts, "sha256": self.sha.hexdigest()}


def count_words(source):
    """Counts of SPLIT_PATTERN's pieces in the first BPE_BYTES of the training split."""
    words, left = Counter(), BPE_BYTES
    progress = Progress("counting words", min(source.size, BPE_BYTES))
    for split, pieces in source:
        if split == "train":
            for text in pieces:
                words.update(regex.findall(SPLIT_PATTERN, text))
                size = len(text.encode())
                progress.add(size)
                left -= size
                if left <= 0:
                    break
        if left <= 0:
            break
    progress.end()
    for word in [w for w in words if len(w) > LONG_WORD]:
        freq = words.pop(word)
        for i in range(0, len(word), LONG_WORD):
            words[word[i : i + LONG_WORD]] += freq
    return words


def write_splits(source, encoding, open_split):
    """Encodes every document into the file of its split; open_split(name) makes a SplitWriter. Returns them all."""
    writers, queue, queued = {}, [], 0
    progress = Progress("encoding", source.size)

    def flush():
        nonlocal queued
        encoded = encoding.encode_ordinary_batch([text for _, text, _ in queue], num_threads=os.cpu_count() or 1)
        for (writer, text, starts), ids in zip(queue, encoded):
            size = len(text.encode())
            if starts:
                writer.write([encoding.eot_token] if writer.documents else [])  # between documents
                writer.documents += 1
            writer.write(ids)
            writer.bytes += size
            writer.words += len(text.split())
            progress.add(size)
        queue.clear()
        queued = 0

    for split, pieces in source:
        for i, text in enumerate(pieces):
            if split not in writers:
                writers[split] = open_split(split)
            queue.append((writers[split], text, i == 0))
            queued += len(text)
            if queued >= 64 * BLOCK:  # ~4 MB, enough to keep all cores busy
                flush()
    flush()
    progress.end()
    return writers


def prepare(args):
    global replacements
    source = Source(find_files(args.name), args)
    out = Path(args.out or Path("data") / Path(args.name).resolve().stem)
    out.mkdir(parents=True, exist_ok=True)
    temporary = {}  # final name -> where it is written

    def create(name):
        temporary[name] = out / f"{name}.{os.getpid()}.tmp"
        return temporary[name]

    try:
        ranks = ""
        if args.tokenizer.startswith("bpe:"):
            tokens = train_bpe(count_words(source), int(args.tokenizer[4:]))
            ranks = dump_ranks(tokens)
            create("tokenizer.tiktoken").write_text(ranks, encoding="utf-8")
        encoding = load_tokenizer(args.tokenizer, ranks)
        replacements = 0
        writers = write_splits(source, encoding, lambda split: SplitWriter(create(f"{split}.bin")))
        splits = {split: writer.close() for split, writer in writers.items()}
        if "train" not in splits:
            sys.exit(f"{args.name}: no text for training in it (--val-fraction {args.val_fraction}).")
        meta = {"vocab_size": encoding.n_vocab, "tokenizer": args.tokenizer, "eot": encoding.eot_token}
        meta["splits"] = splits
        create("meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        # Without meta.json a folder is no data set: it goes first and comes last.
        for name in ("meta.json", "train.bin", "val.bin", "test.bin", "tokenizer.tiktoken"):
            if name == "meta.json" or name not in temporary:
                (out / name).unlink(missing_ok=True)
        for name in sorted(temporary, key="meta.json".__eq__):
            os.replace(temporary[name], out / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)

    print(f"{out}: {args.tokenizer}, {encoding.n_vocab:,} ids")
    for split, n in splits.items():
        print(
            f"  {split:5} {n['tokens']:>13,} tokens {n['bytes']:>15,} bytes {n['documents']:>9,} documents  "
            f"{n['bytes'] / max(n['tokens'], 1):.2f} bytes a token"
        )
    if replacements:
        print(f"  {replacements:,} invalid sequences became U+FFFD")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, formatter_class=formatter)
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (--help lists all)")
    parser.add_argument("name", nargs="?", default="stdlib", help="stdlib, or a .txt, a .jsonl, a folder of them")
    parser.add_argument("--tokenizer", default="bpe:4096", help="bpe:N, bytes, gpt2, ... (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="of the text; 0 writes train.bin alone")
    parser.add_argument("--field", default="text", help="of a .jsonl line that holds its text (default: %(default)s)")
    parser.add_argument("--errors", choices=("strict", "replace"), default="strict", help="what invalid UTF-8 becomes")
    parser.add_argument("--out", help="folder to write (default: data/NAME)")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction {args.val_fraction} is not in [0, 1)")
    if args.tokenizer.startswith("bpe:"):
        size = args.tokenizer[4:]
        if not size.isdecimal() or len(size) > 5 or not 257 <= int(size) <= MAX_IDS:
            parser.error(f"--tokenizer {args.tokenizer}: N goes from 257 (bytes, end of text) to {MAX_IDS:,} (16 bits)")
    else:
        load_tokenizer(args.tokenizer)  # complains before any work is done
    try:
        prepare(args)
    except OSError as e:
        sys.exit(f"{e.filename or args.out or 'data'}: {e.strerror or e}")
    except KeyboardInterrupt:
        print("\ninterrupted: this data set is not finished", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
