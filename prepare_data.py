"""Text in, uint16 token files out.

    python prepare_data.py                                      # the Python standard library's own sources
    python prepare_data.py notes.txt --tokenizer gpt2           # or a .txt, .jsonl, .parquet, a folder of them
    python prepare_data.py tinystories                          # or a data set of those below, from the network
    python prepare_data.py weights:gpt2                         # OpenAI's GPT-2, as a checkpoint of gpt2.py

                  hash of the text
    documents ----------------------> train | val         Each NAME becomes a folder data/NAME with
        |                                |                train.bin, val.bin   ids as little-endian uint16, no header
        | count words, merge pairs       | tiktoken       meta.json            vocabulary size, counts, checksums
        v                                v                tokenizer.tiktoken   the byte pairs learned here, if any
    tokenizer.tiktoken ------------> 17, 3021, 256, ...

Nothing is held in memory but a few megabytes of text: documents stream through, ids are appended to disk under
temporary names, and the files take their real names when all are whole. An interrupted run goes on, when it is run
again, after the last file of its source that it had finished.

Byte-pair encoding follows Sennrich et al. (2016, arXiv 1508.07909, section 3.2) on bytes, with GPT-2's split
pattern (Radford et al. 2019, section 2.2). The trainer updates pair counts in place while it merges.
"""

import argparse
import base64
import codecs
import glob
import hashlib
import heapq
import importlib.util
import json
import math
import os
import re
import sys
import sysconfig
import time
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
import regex  # comes with tiktoken, whose patterns are written for it: the standard library's re has no \p{L}
import requests
import tiktoken

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nobody keeps two runs apart there
    flock = None

EOT = "<|endoftext|>"
# GPT-2's: contractions, then words, numbers and the rest, each with one leading space, then white space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_IDS = 2**16  # what uint16 holds
TOO_LARGE = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}  # ids: known without a download
BLOCK = 2**16  # bytes or characters of text taken up at once
LONG_WORD = 2**13  # characters: a line of DNA is cut into such words, each merge in one takes time with its length
BPE_BYTES = 2**26  # ~64 MB of training text is what the BPE trainer looks at: more changes few merges
SAVE_BYTES = 2**26  # after so much text of small files, a run that breaks off can be taken up

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
    tokenizer or its ids do not fit 16 bits; damaged ranks are a ValueError."""
    if name == "bytes":
        tokens = [bytes([b]) for b in range(256)]
    elif name.startswith("bpe:"):
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in ranks.splitlines() if line.split()]
        if tokens[:256] != [bytes([b]) for b in range(256)] or len(set(tokens)) != len(tokens):
            raise ValueError("its ranks are damaged")
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


# --- files, whole or not there


def sync(file):
    """Waits until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_whole(path, write):
    """Has write(file) fill a file that takes its name when it is whole, in place of what stood there."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder, waiting):
    """Makes a folder and keeps every other process that asks for it waiting until we leave it, or die."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY) if flock else None
    try:
        if flock:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: {waiting}; waiting for it", file=sys.stderr)
                flock(lock, LOCK_EX)
        yield
    finally:
        if flock:
            os.close(lock)


# --- downloads

DOWNLOADS = Path("data/downloads")
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
TIMEOUT = 10  # seconds without a byte: then we ask again, from where we are
PAUSES = (1, 2, 4, 8)  # seconds between tries of which none got further than the one before
OVERLAP = 2**10  # bytes that a resumed download reads again: do they fit what lies on disk?


class Torn(Exception):
    """A download that broke off, or brought what it should not: worth another try."""


def shown(url):
    """An address without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def token_for(url):
    """HF_TOKEN as requests' auth, for the hub and for a stand-in on this machine. For others, nothing."""
    token, host = os.environ.get("HF_TOKEN", "").strip(), urlsplit(url).hostname
    if not token.isascii() or (token and not token.isprintable()):
        sys.exit("HF_TOKEN holds characters that no token has: set it anew, or unset it.")

    def bearer(request):
        if token and host in ("huggingface.co", urlsplit(HUB).hostname, "127.0.0.1", "localhost", "::1"):
            request.headers["Authorization"] = f"Bearer {token}"  # requests drops it where another host takes over
        return request

    return bearer


def get(url, use, start=lambda: 0):
    """use(response) of a GET of url from byte start() on. If that fails, it is tried again: at once if start() has
    moved on, else after a pause, each longer than the one before. Exits with one line when no pause is left."""
    failures, reached = 0, start()
    while True:
        wait, begin = 0, start()
        try:
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
            with requests.get(url, headers=headers, auth=token_for(url), stream=True, timeout=TIMEOUT) as response:
                code = response.status_code
                if code in (200, 206) or (code == 416 and begin):
                    return use(response)
                why = f"the server answers {code} {response.reason}"
                if code not in (408, 429) and code < 500:
                    hint = " It may want a token: set HF_TOKEN." if code in (401, 403) else ""
                    sys.exit(f"{shown(url)}: {why}.{hint} --url names another address.")
                after = response.headers.get("Retry-After", "")
                wait = min(int(after), 60) if after.isdecimal() else 0
        except Torn as e:
            why = str(e)
        except requests.Timeout:
            why = f"nothing came for {TIMEOUT} s"
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                sys.exit(f"{shown(url)}: this machine does not trust its certificate.")
            proxy = isinstance(e, requests.exceptions.ProxyError)
            why = "the proxy in HTTP_PROXY or HTTPS_PROXY did not let us through" if proxy else "the connection failed"
        except (requests.RequestException, ValueError) as e:  # no address, redirects without end, ...
            sys.exit(f"{shown(url)}: cannot be asked for ({type(e).__name__}).")
        failures = 0 if start() > reached else failures + 1
        reached = max(reached, start())
        if failures > len(PAUSES):
            sys.exit(f"{shown(url)}: {why}, {failures} times. Run again to go on; --url names another address.")
        time.sleep(max(wait, PAUSES[failures - 1] if failures else 0))


def sha256_of(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def download(url, size=None, sha256=None):
    """The path of the file at url, in DOWNLOADS. It is written to a .part whose name tells the address and the version
    (length, ETag, date) that it is of: a later try, or a later run, goes on with it if the server still has that one.
    It loses its .part when its length and SHA-256, as far as the caller or the hub names them, are right. Exits with
    one line if it cannot be had."""
    address, name = hashlib.sha256(url.encode()).hexdigest()[:8], PurePosixPath(unquote(urlsplit(url).path)).name
    name = name.replace(os.sep, "_") or "file"

    def find(ending):
        return next(DOWNLOADS.glob(f"{address}-????????-{glob.escape(name)}{ending}"), None)

    def right(path, sha256):
        return path.stat().st_size == (size or path.stat().st_size) and (not sha256 or sha256_of(path) == sha256)

    def start():
        return max(0, part.stat().st_size - OVERLAP) if (part := find(".part")) else 0

    def receive(response):
        begin, total = 0, response.headers.get("Content-Length", "")
        total = int(total) if total.isdecimal() and "Content-Encoding" not in response.headers else None
        if response.status_code == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            begin, total = map(int, span.groups()) if span else (-1, None)
        part, older = find(".part"), find("")
        if response.status_code == 416 or (begin and (begin != start() or not part)):
            if part:
                part.unlink()
            raise Torn("the server sent another part of the file than it was asked for")
        version = repr([total, *(response.headers.get(key) for key in ("ETag", "Last-Modified"))])
        target = DOWNLOADS / f"{address}-{hashlib.sha256(version.encode()).hexdigest()[:8]}-{name}"
        if target.exists() and target.stat().st_size == total and right(target, sha256):
            return target  # from an earlier run, and it has not changed since
        if part and part.name != f"{target.name}.part":
            part.unlink()
            if begin:
                raise Torn("the file changed while it was downloaded")
        part = target.with_name(f"{target.name}.part")
        hub = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in (*response.history, response)]
        sha = sha256 or next((tag for tag in hub if re.fullmatch("[0-9a-f]{64}", tag)), None)  # the hub's, of LFS files
        progress = Progress(f"downloading {name}", total or size or 0, begin)
        with open(part, "r+b" if begin else "w+b") as file:
            file.seek(begin)
            seam = file.read()
            for chunk in response.iter_content(2**13):  # what does not fill a chunk is lost if the connection breaks
                again = min(len(seam), len(chunk))
                if seam[:again] != chunk[:again]:
                    file.truncate(0)
                    raise Torn("the file changed while it was downloaded")
                file.write(chunk[again:])
                seam = seam[again:]
                progress.add(len(chunk))
            sync(file)
        got = part.stat().st_size
        if total is not None and got < total:
            raise Torn(f"the connection ended after {got:,} of {total:,} bytes")
        if total not in (None, got) or not right(part, sha):
            part.unlink()
            raise Torn(f"these {got:,} bytes are not the published file: it has another length or SHA-256")
        progress.end()
        if older:
            older.unlink()
        os.replace(part, target)
        return target

    with alone_in(DOWNLOADS, "another process downloads"):
        try:
            return get(url, receive, start)
        except SystemExit as e:
            if not (whole := find("")) or not right(whole, sha256):
                raise
            print(f"{e.code}\n{whole}, from an earlier run, will do.", file=sys.stderr)
            return whole


# --- sources: files, and for each a reader that yields its documents as (split, pieces of text)

DATASETS = {  # NAME: (what --help says of it, folder of its files, their names)
    "stdlib": ("the Python standard library's own sources, as found here: about 10 MB, no network", "", []),
    "shakespeare": (
        "tiny Shakespeare (Karpathy, char-rnn): one text of 1.1 MB",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
        ["input.txt"],
    ),
    "wikitext2": (
        "WikiText-2 (Merity et al. 2016), with a test split: 4.7 MB, unzipped 13 MB",
        f"{HUB}/datasets/ggml-org/ci/resolve/main",
        ["wikitext-2-raw-v1.zip"],
    ),
    "tinystories": (
        "TinyStories (Eldan and Li 2023), written by GPT-4: 2.25 GB",
        f"{HUB}/datasets/roneneldan/TinyStories/resolve/main",
        ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
    ),
    "maths-college": (
        "Maths-College (ajibawa-2023), exercises and answers: 6 files of about 830 MB",
        f"{HUB}/datasets/ajibawa-2023/Maths-College/resolve/main",
        [f"Maths-College-{i}-Final.json" for i in range(6)],
    ),
    "openwebmath": (
        "OpenWebMath (Paster et al. 2023): 114 shards of about 240 MB, and needs pyarrow",
        f"{HUB}/datasets/open-web-math/open-web-math",
        [],  # the hub knows
    ),
}
PUBLISHED = {  # length and SHA-256, where the source tells them
    "input.txt": (1_115_394, None),
    "wikitext-2-raw-v1.zip": (4_721_645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
}


@dataclass
class Shard:
    """A file of a source: here, or at an address until somebody reads it."""

    path: Path | None = None
    url: str = ""
    size: int = 0  # bytes, 0 as long as nobody has told
    sha256: str | None = None

    def fetch(self):
        if not self.path:
            self.path = download(self.url, self.size or None, self.sha256)
        self.size = self.path.stat().st_size
        return self.path


def list_hub(root):
    """The Parquet files of a data set on the hub, as its API tells them, page after page."""
    parts, shards = urlsplit(root), []
    page = f"{parts.scheme}://{parts.netloc}/api{parts.path}/tree/main/data"

    def read(response):
        try:
            for entry in response.json():
                if entry["path"].endswith(".parquet"):
                    size, sha256 = int(entry["size"]), entry.get("lfs", {}).get("oid")
                    shards.append(Shard(None, f"{root}/resolve/main/{entry['path']}", size, sha256))
        except (ValueError, KeyError, TypeError, AttributeError):
            sys.exit(f"{shown(response.url)}: not the list of files that the hub's API gives. --url names another.")
        return response.links.get("next", {}).get("url")

    seen = set()
    while page and page not in seen:
        seen.add(page)
        page = get(page, read)
    if page:
        sys.exit(f"{shown(page)}: a list of files that never ends. --url names another.")
    return sorted(shards, key=lambda shard: shard.url)


def find_addresses(args):
    """The shards of a data set that has to be downloaded, or of the one that --url put in its place."""
    _, folder, names = DATASETS[args.name]
    urls = [url.rstrip("/") for url in args.url or [folder]]
    if not all(url.startswith(("http://", "https://")) for url in urls):
        sys.exit(f"--url {' '.join(urls)}: an address starts with http:// or https://")
    try:
        suffix = Path(urlsplit(urls[0]).path).suffix
    except ValueError as e:
        sys.exit(f"--url {urls[0]}: no address ({e})")
    if args.name == "openwebmath" and suffix != ".parquet":
        shards = list_hub(urls[0])
    elif names and len(urls) == 1 and suffix != Path(names[0]).suffix:
        known = {} if args.url else PUBLISHED
        shards = [Shard(None, f"{urls[0]}/{name}", *known.get(name, ())) for name in names]
    else:
        shards = [Shard(None, url) for url in urls]
    if args.shards:
        span = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", args.shards)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, -1)
        if not first <= last < len(shards):
            sys.exit(f"--shards {args.shards[:40]}: there are {len(shards)}, from 0 on. Like 0-3, or 2.")
        shards = shards[first : last + 1]
    return shards


def stdlib_files():
    """The standard library's sources on this machine, without what is data rather than prose and code."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skip & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield path


def find_shards(args):
    """The files that NAME stands for, in order. Exits with one line if there are none."""
    if args.name == "stdlib":
        return [Shard(path) for path in stdlib_files()]
    if args.name in DATASETS:
        return find_addresses(args)
    path = Path(args.name)
    if not path.exists():
        sys.exit(f"{args.name}: neither a data set ({', '.join(DATASETS)}) nor a file or folder here.")
    candidates = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    suffixes = (".txt", ".jsonl", ".parquet", *([".json"] if path.is_file() else []))
    shards = [Shard(p) for p in candidates if p.suffix in suffixes]
    if not shards:
        sys.exit(f"{args.name}: no .txt, .jsonl or .parquet {'in this folder' if path.is_dir() else 'file'}.")
    return shards


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


def text_of(entry, fields, errors, where):
    """The text of a JSON object: that of its fields, an empty line between them."""
    try:
        texts = [entry[field] for field in fields]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"field {','.join(fields)!r} is not a string")
        text = "\n\n".join(texts)
        try:
            text.encode()
        except UnicodeEncodeError:  # "\ud800" is good JSON and no character
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
        return text
    except KeyError as e:
        sys.exit(f"{where}: no field {e}; --field names the one that holds the text.")
    except UnicodeError:
        sys.exit(f"{where}: not valid Unicode. Mend it, or put U+FFFD there: --errors replace.")
    except TypeError as e:
        sys.exit(f"{where}: not a JSON object with a text in it ({e}).")


def read_jsonl(path, fields, errors):
    """Yields the text of each line of a .jsonl file. Exits, naming the line, if one has none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    entry = json.loads(line.decode("utf-8", errors))
                except UnicodeError:
                    sys.exit(f"{path}:{number}: not UTF-8. Mend it, or put U+FFFD there: --errors replace.")
                except (ValueError, RecursionError) as e:
                    sys.exit(f"{path}:{number}: not a JSON object with a text in it ({e}).")
                yield text_of(entry, fields, errors, f"{path}:{number}")


def read_json(path, fields, errors):
    """Yields the text of each object of a .json file: an array of them, or one after the other."""
    decoder, text, number, left, first, last = json.JSONDecoder(), "", 0, 0, "", ""
    for chunk in chain(read_text(path, errors), [None]):  # None: the end
        text += chunk or ""
        if chunk is not None and len(text) < 2 * left:
            continue  # a long object: not tried anew with every block
        at = 0
        while (at := re.compile(r"[\s,\[\]]*").match(text, at).end()) < len(text):
            try:
                entry, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as e:
                if chunk is None or len(text) - at > 2**26:
                    sys.exit(f"{path}: object {number + 1:,} is cut short or no JSON ({str(e).split(':')[0]}).")
                break
            at, number = end, number + 1
            yield text_of(entry, fields, errors, f"{path}: object {number:,}")
        read = text[:at].strip()
        first, last, text, left = first or read[:1], read[-1:] or last, text[at:], len(text) - at
    if first == "[" and last != "]":
        sys.exit(f"{path}: the array ends after object {number:,} without a ]: is a part of the file missing?")


def read_parquet(path, fields, batch_size=256):
    """Yields the text of each row of a Parquet file: that of its fields, an empty line between them."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if missing := [field for field in fields if field not in file.schema_arrow.names]:
                sys.exit(f"{path}: no column {missing[0]!r}; --field names the one that holds the text.")
            for rows in file.iter_batches(batch_size, columns=fields):
                for texts in zip(*(rows.column(field).to_pylist() for field in fields)):
                    yield "\n\n".join("" if text is None else text for text in texts)
    except (pyarrow.ArrowException, TypeError) as e:
        sys.exit(f"{path}: not a Parquet file with texts in it ({type(e).__name__}).")


def read_wikitext(path, errors):
    """Yields (split, article) of WikiText's zip, from which nothing is unpacked. An article begins at ` = Title = `
    after an empty line."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [PurePosixPath(name.replace("\\", "/")) for name in archive.namelist()]
            if bad := next((m for m in members if m.is_absolute() or ".." in m.parts or ":" in str(m)), None):
                sys.exit(f"{path}: has a member {str(bad)!r}, outside its folder. This is not WikiText.")
            for split, ending in (("train", "train"), ("val", "valid"), ("test", "test")):
                if f"wiki.{ending}.raw" not in [m.name for m in members]:
                    sys.exit(f"{path}: has no wiki.{ending}.raw. This is not WikiText as raw text.")
                name = next(n for n in archive.namelist() if n.endswith(f"wiki.{ending}.raw"))
                article, before = "", ""
                with archive.open(name) as file:
                    for line in file:
                        line = line.decode("utf-8", errors)
                        if re.fullmatch(r" = [^=].* = \s*", line) and article.strip() and not before.strip():
                            yield split, article
                            article = ""
                        article, before = article + line, line
                yield split, article
    except UnicodeError:
        sys.exit(f"{path}: not UTF-8. Put U+FFFD there: --errors replace.")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as e:
        path.unlink()  # so that the next run gets it anew
        sys.exit(f"{path}: not a zip file that can be read ({type(e).__name__}), and removed. Run again.")


def between(chunks, separator):
    """The texts between separators, without white space around them."""
    text = ""
    for chunk in chunks:
        *texts, text = (text + chunk).split(separator)
        yield from map(str.strip, texts)
    yield text.strip()


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
    """The shards of a data set, and how their documents are read."""

    def __init__(self, args):
        self.shards, self.val_fraction = find_shards(args), args.val_fraction
        self.name = args.name
        self.fields = ["instruction", "output"] if args.name == "maths-college" else args.field.split(",")
        self.errors = "replace_and_count" if args.errors == "replace" else "strict"
        for shard in self.shards:
            if shard.path:
                shard.fetch()
        if any((shard.path or Path(urlsplit(shard.url).path)).suffix == ".parquet" for shard in self.shards):
            if not importlib.util.find_spec("pyarrow"):
                sys.exit(f"{self.name}: Parquet files are read by pyarrow: pip install pyarrow")

    @property
    def size(self):
        """Bytes, as far as is known before all is downloaded."""
        return sum(shard.size for shard in self.shards)

    def read(self, shard):
        """Yields (split, text or pieces of one) of a shard. Split None: by a hash of the text."""
        path, fields, errors = shard.fetch(), self.fields, self.errors
        if self.name == "wikitext2":
            yield from read_wikitext(path, errors)
        elif self.name == "tinystories":
            split = None if len(self.shards) == 1 else "val" if shard is self.shards[-1] else "train"
            yield from ((split, story) for story in between(read_text(path, errors), EOT))
        elif path.suffix == ".json" or self.name == "maths-college":  # several addresses may end in anything
            yield from ((None, text) for text in read_json(path, fields, errors))
        elif path.suffix == ".jsonl":
            yield from ((None, text) for text in read_jsonl(path, fields, errors))
        elif path.suffix == ".parquet":
            yield from ((None, text) for text in read_parquet(path, fields))
        elif len(self.shards) > 1:  # each file is a document
            with open(path, "rb") as file:
                split = split_of(iter(lambda: file.read(BLOCK), b""), self.val_fraction)
            yield split, read_text(path, errors)
        else:  # one document: no hash can split it
            cut = cut_position(path, self.val_fraction)
            yield "train", read_text(path, errors, 0, cut)
            yield "val", read_text(path, errors, cut)

    def documents(self, shard):
        """Yields (split, pieces of text) of a shard, pieces an iterable of str."""
        for split, text in self.read(shard):
            if isinstance(text, str):
                split = split or split_of([text.encode()], self.val_fraction)
                text = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
            if split == "train" or self.val_fraction:
                yield split, at_gaps(text)


# --- writing


class Progress:
    """One line on the terminal: what, how far, MB/s and time left."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.done, self.before = what, total, done, done
        self.start = self.shown = time.time()

    def add(self, n_bytes):
        self.done += n_bytes
        now = time.time()
        if now - self.shown > 0.5 and sys.stderr.isatty():
            self.shown, rate = now, (self.done - self.before) / (now - self.start)
            text = f"{self.what} {self.done / 1e6:,.1f}"
            if self.total > self.done:
                text += f" of {self.total / 1e6:,.1f} MB, {(self.total - self.done) / rate:,.0f} s left"
            text += f" MB, {rate / 1e6:.1f} MB/s"
            print(f"\r{text:<79}", end="", file=sys.stderr, flush=True)

    def end(self):
        seconds = time.time() - self.start
        rate = (self.done - self.before) / 1e6 / max(seconds, 1e-9)
        text = f"{self.what} {self.done / 1e6:,.1f} MB in {seconds:.1f} s, {rate:.1f} MB/s"
        print(("\r" if sys.stderr.isatty() else "") + f"{text:<79}", file=sys.stderr)


class SplitWriter:
    """Appends the ids of one split to a file and keeps the counts of meta.json. With counts of before, it goes on."""

    def __init__(self, path, counts=None):
        self.file, self.sha = open(path, "r+b" if counts else "wb"), hashlib.sha256()
        self.counts = counts or dict.fromkeys(("tokens", "bytes", "words", "documents"), 0)
        left = 2 * self.counts["tokens"]
        while left and (block := self.file.read(min(left, 2**20))):
            self.sha.update(block)
            left -= len(block)
        if left:
            raise ValueError(f"{path} is shorter than it was")
        self.file.truncate()

    def write(self, ids):
        data = ids.astype("<u2").tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.counts["tokens"] += len(ids)

    def flush(self):
        sync(self.file)
        return self.counts


def count_words(source):
    """Counts of SPLIT_PATTERN's pieces in the first BPE_BYTES of the training split."""
    words, left = Counter(), BPE_BYTES
    progress = Progress("counting words", min(source.size, BPE_BYTES))
    for split, pieces in chain.from_iterable(map(source.documents, source.shards)):
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


def write_splits(source, encoding, writers, open_split, first, save):
    """Encodes the documents of the shards from number `first` on into the file of their split; open_split(name) makes
    a SplitWriter. Calls save(number of shards that are whole on disk) now and then. Threads encode (tiktoken needs no
    interpreter lock for it), batch after batch; what they give is written in the order of the source."""
    n_threads = os.cpu_count() or 1
    progress = Progress("encoding", source.size)
    batch, queue, size, unsaved = [], deque(), 0, 0

    def encode(texts):
        return [(encoding.encode_to_numpy(t, disallowed_special=()), len(t.encode()), len(t.split())) for t in texts]

    def drain(most):
        """Writes the oldest batches until at most so many are on their way."""
        nonlocal unsaved
        while len(queue) > most:
            items, future = queue.popleft()
            for (writer, starts, _), (ids, n_bytes, n_words) in zip(items, future.result()):
                if starts:
                    writer.write(np.array([encoding.eot_token] if writer.counts["documents"] else []))  # between them
                    writer.counts["documents"] += 1
                writer.write(ids)
                writer.counts["bytes"] += n_bytes
                writer.counts["words"] += n_words
                unsaved += n_bytes
                progress.add(n_bytes)

    with ThreadPoolExecutor(n_threads) as pool:

        def submit():
            nonlocal batch, size
            queue.append((batch, pool.submit(encode, [text for _, _, text in batch])))
            batch, size = [], 0

        for number, shard in enumerate(source.shards[first:], first + 1):
            for split, pieces in source.documents(shard):
                for i, text in enumerate(pieces):
                    if split not in writers:
                        writers[split] = open_split(split)
                    batch.append((writers[split], i == 0, text))
                    size += len(text)
                    if size >= 4 * BLOCK:
                        submit()
                        drain(2 * n_threads)
            if number == len(source.shards) or shard.url or unsaved > SAVE_BYTES:
                submit()
                drain(0)
                if number < len(source.shards):
                    save(number)
                    unsaved = 0
    progress.end()


def prepare(args, out):
    """Writes the data set `args.name` to the folder `out`, where no one else writes now."""
    global replacements
    names = ("tokenizer.tiktoken", "train.bin", "val.bin", "test.bin", "meta.json")
    temporary = {name: out / f"{name}.partial" for name in names}
    journal = out / "journal.partial"  # tells a later run what stands in the others
    source = Source(args)
    files = [shard.url or [str(shard.path), shard.size, shard.path.stat().st_mtime_ns] for shard in source.shards]
    what = [args.tokenizer, args.val_fraction, args.field, args.errors, files]
    done, ranks, writers, replacements = 0, "", {}, 0
    for path in out.glob("*.partial.tmp"):  # a killed run was writing it
        path.unlink()
    try:
        state = json.loads(journal.read_text(encoding="utf-8"))
        if state["what"] == what:
            writers = {split: SplitWriter(temporary[f"{split}.bin"], n) for split, n in state["splits"].items()}
            done, ranks = state["done"], state["ranks"]
            print(f"{out}: going on after {done} of {len(files)} files", file=sys.stderr)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if not done:
        writers = {}
        for path in (journal, *temporary.values()):
            path.unlink(missing_ok=True)

    def save(number):
        state = {"what": what, "done": number, "ranks": ranks, "replacements": replacements}
        state["splits"] = {split: writer.flush() for split, writer in writers.items()}
        write_whole(journal, lambda file: file.write(json.dumps(state).encode()))

    try:
        if args.tokenizer.startswith("bpe:") and not ranks:
            ranks = dump_ranks(train_bpe(count_words(source), int(args.tokenizer[4:])))
        encoding = load_tokenizer(args.tokenizer, ranks)
        replacements = state["replacements"] if done else 0
        write_splits(source, encoding, writers, lambda split: SplitWriter(temporary[f"{split}.bin"]), done, save)
        splits = {name: {**writer.flush(), "sha256": writer.sha.hexdigest()} for name, writer in writers.items()}
        if "train" not in splits:
            sys.exit(f"{args.name}: no text for training in it (--val-fraction {args.val_fraction}).")
        meta = {"vocab_size": encoding.n_vocab, "tokenizer": args.tokenizer, "eot": encoding.eot_token}
        text = json.dumps({**meta, "splits": splits}, indent=1) + "\n"
        write_whole(temporary["meta.json"], lambda file: file.write(text.encode()))
        if ranks:
            write_whole(temporary["tokenizer.tiktoken"], lambda file: file.write(ranks.encode()))
        # Without meta.json a folder is no data set: it goes first and comes last.
        (out / "meta.json").unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        for name in names:
            if temporary[name].exists():
                os.replace(temporary[name], out / name)
            else:
                (out / name).unlink(missing_ok=True)
    finally:
        for writer in writers.values():
            writer.file.close()
        if not journal.exists():
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


def check(out):
    """Compares the files of a data set with the lengths and checksums of its meta.json."""
    try:
        splits = json.loads((out / "meta.json").read_text(encoding="utf-8"))["splits"]
        for split, counts in splits.items():
            path = out / f"{split}.bin"
            if path.stat().st_size != 2 * counts["tokens"] or sha256_of(path) != counts["sha256"]:
                sys.exit(f"{path} is not what meta.json tells: it was changed, or cut. Prepare it again.")
            print(f"{path}: {counts['tokens']:,} tokens, as meta.json tells")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"{out / 'meta.json'} is not as prepare_data.py writes it ({type(e).__name__}). Prepare it again.")


# --- OpenAI's weights


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes that tell the length of a JSON header, the header, which tells
    type, shape and place of each tensor, and the tensors, one after the other. Exits if one of these does not fit."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"U8": torch.uint8, "BOOL": torch.bool, "I64": torch.int64, "I32": torch.int32}
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        if not 0 < length <= len(data) - 8:
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        data, end = data[8 + length :], 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], dtypes[entry["dtype"]]
            if not all(isinstance(n, int) and n >= 0 for n in (begin, stop, *shape)) or begin != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            if stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
                raise ValueError(f"{name} takes {stop - begin:,} bytes")
            tensors[name] = torch.frombuffer(bytearray(data[begin:stop]), dtype=dtype).view(shape)
            end = stop
        if end != len(data):
            raise ValueError(f"{len(data) - end:,} bytes of no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        path.unlink()  # so that the next run gets it anew
        sys.exit(f"{path}: cut short, damaged, or no safetensors file ({str(e)[:100]}), and removed. Run again.")
    return tensors


def prepare_weights(args):
    """OpenAI's GPT-2 (Radford et al. 2019) as out/NAME-openai/ckpt.pt, a checkpoint of gpt2.py."""
    import torch

    name = args.name.removeprefix("weights:")
    url = (args.url or [f"{HUB}/openai-community/{name}/resolve/main/model.safetensors"])[0]
    path = download(url)
    theirs = {k.removeprefix("transformer."): v for k, v in read_safetensors(path).items()}
    masks = [k for k in theirs if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", k)]
    ours = {k: v.float() for k, v in theirs.items() if k not in masks and k != "lm_head.weight"}
    try:
        (vocab_size, C), block_size = ours["wte.weight"].shape, len(ours["wpe.weight"])
        n_layer = len({k.split(".")[1] for k in ours if k.startswith("h.")})
        linear = {"attn.c_attn": [C, 3 * C], "attn.c_proj": [C, C], "mlp.c_fc": [C, 4 * C], "mlp.c_proj": [4 * C, C]}
        shapes = {"wte.weight": [vocab_size, C], "wpe.weight": [block_size, C], "ln_f.weight": [C], "ln_f.bias": [C]}
        for i in range(n_layer):
            for part, shape in {"ln_1": [C], "ln_2": [C], **linear}.items():
                shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[-1:]}
        head = theirs.get("lm_head.weight", theirs["wte.weight"])
        if (
            C % 64
            or not all(theirs[k].is_floating_point() for k in ours)
            or {k: list(v.shape) for k, v in ours.items()} != shapes
            or not torch.equal(head, theirs["wte.weight"])
        ):
            raise ValueError
    except (KeyError, ValueError, IndexError, TypeError):
        sys.exit(f"{path}: its tensors are not those of one of OpenAI's GPT-2.")
    for k, v in ours.items():
        if k.startswith("h.") and v.dim() == 2:
            ours[k] = v.T.contiguous()  # OpenAI has x @ W, an nn.Linear x @ W.T
    padding = -vocab_size % 64  # gpt2.py rounds the rows of its embedding up
    ours["wte.weight"] = torch.cat([ours["wte.weight"], torch.zeros(padding, C)])
    config = {"vocab_size": vocab_size, "block_size": block_size, "n_layer": n_layer, "n_head": C // 64, "n_embd": C}
    tokenizer = {"name": "gpt2", "eot": 50256, "vocab_size": 50257, "ranks": ""}
    state = {"model_file": "gpt2.py", "config": config, "tokenizer": tokenizer, "model": ours}
    state |= {"optimizer": {"state": {}}, "step": 0, "rng": [0, 0], "best": math.inf, "seconds": 0.0}
    out = Path(args.out or Path("out") / f"{name}-openai")
    with alone_in(out, "another process writes it"):
        write_whole(out / "ckpt.pt", lambda file: torch.save(state, file))
    print(
        f"{out / 'ckpt.pt'}: {sum(map(torch.numel, ours.values())) - padding * C:,} parameters. "
        f"Hear it: python sample.py --ckpt {out / 'ckpt.pt'}"
    )


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    table = "names:\n"
    for name, (about, folder, _) in DATASETS.items():
        table += f"  {name:14} {about}\n" + f"{'':17}{folder}\n" * bool(folder)
    table += "  weights:gpt2   OpenAI's weights, 0.55 GB; also gpt2-medium (1.5), gpt2-large (3.2), gpt2-xl (6.4)\n"
    table += f"{'':17}{HUB}/openai-community\n"
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, epilog=table, formatter_class=formatter)
    parser.error = lambda message: sys.exit(f"prepare_data.py: {message} (--help lists all)")
    add = parser.add_argument
    add("name", nargs="?", default="stdlib", help="one of those below, or a .txt, .jsonl, .parquet, a folder of them")
    add("--tokenizer", default="bpe:4096", help="bpe:N, bytes, gpt2, ... (default: %(default)s)")
    add("--val-fraction", type=float, default=0.1, help="of the text, if the source has no split; 0: train.bin alone")
    add("--field", default="text", help="of a JSON object or Parquet row: its text; a,b: both (default: %(default)s)")
    add("--errors", choices=("strict", "replace"), default="strict", help="what invalid UTF-8 becomes")
    add("--out", help="folder to write (default: data/NAME, or out/NAME-openai)")
    add("--url", nargs="+", help="addresses of the files, or of their folder, in place of the published ones")
    add("--shards", help="of a data set in many files, those numbered: 0-3, or 2 (default: all)")
    add("--check", action="store_true", help="compare a data set that was prepared with its checksums, and stop")
    args = parser.parse_args(argv)
    weights = args.name.startswith("weights:")
    if weights and args.name[8:] not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        parser.error(f"{args.name}: weights are gpt2, gpt2-medium, gpt2-large or gpt2-xl")
    if (args.url or args.shards) and args.name not in list(DATASETS)[1:] and not weights:
        parser.error("--url and --shards are for data sets that are downloaded")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction {args.val_fraction} is not in [0, 1)")
    if args.tokenizer.startswith("bpe:"):
        size = args.tokenizer[4:]
        if not size.isdecimal() or len(size) > 5 or not 257 <= int(size) <= MAX_IDS:
            parser.error(f"--tokenizer {args.tokenizer}: N goes from 257 (bytes, end of text) to {MAX_IDS:,} (16 bits)")
    elif not args.check and not weights:
        load_tokenizer(args.tokenizer)  # complains before any work is done
    out = Path(args.out or Path("data") / Path(args.name).resolve().stem)
    try:
        if args.check:
            check(out)
        elif weights:
            prepare_weights(args)
        else:
            with alone_in(out, "another prepare_data.py writes it"):
                prepare(args, out)
    except OSError as e:
        sys.exit(f"{e.filename or out}: {e.strerror or e}")
    except RuntimeError as e:  # what torch.save makes of a full disk
        sys.exit(f"{out}: could not be written; is the disk full? ({str(e).splitlines()[0]})")
    except KeyboardInterrupt:
        print("\ninterrupted: this data set is not finished. Run again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
