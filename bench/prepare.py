"""Preparing data, end to end, beside bare tiktoken; and the memory it takes.

    python bench/prepare.py                       100 MB, five rounds
    python bench/prepare.py --mb 1000 --turns 1   a gigabyte: look at the memory

Text: the standard library's sources, over and over, as one .txt file. prepare_data.py reads, cuts, encodes with GPT-2's
tokenizer, counts and writes it, in a process of its own; its start (imports, the tokenizer's tables) is timed on an
almost empty file and taken off. tiktoken's encode_ordinary_batch gets the same text in memory, in pieces of 64 KB, with
as many threads. The two take turns. Prints MB/s of both, the ratio, and prepare_data.py's peak memory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare_data


def run(path, out, tokenizer):
    """(seconds, peak memory in bytes) of a whole process of prepare_data.py."""
    command = [sys.executable, prepare_data.__file__, str(path), "--tokenizer", tokenizer, "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("prepare_data.py failed: " + " ".join(command))
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="size of the text (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="(default: %(default)s)")
    args = parser.parse_args()
    encoding, n_threads = prepare_data.load_tokenizer(args.tokenizer), os.cpu_count()
    sources = "".join(path.read_text(encoding="utf-8", errors="replace") for path in prepare_data.stdlib_files())
    size = len(sources.encode())
    with tempfile.TemporaryDirectory() as folder:
        text, almost_empty = Path(folder, "text.txt"), Path(folder, "empty.txt")
        almost_empty.write_text("a b c d e f g h", encoding="utf-8")
        with open(text, "w", encoding="utf-8") as file:
            for _ in range(-(-args.mb * 10**6 // size)):
                file.write(sources)
        pieces = [sources[i : i + 2**16] for i in range(0, len(sources), 2**16)]
        rounds = []
        for _ in range(args.turns):
            begin = time.perf_counter()
            encoding.encode_ordinary_batch(pieces, num_threads=n_threads)
            bare = size / (time.perf_counter() - begin)
            idle, _ = run(almost_empty, Path(folder, "out"), args.tokenizer)
            seconds, memory = run(text, Path(folder, "out"), args.tokenizer)
            rounds.append((text.stat().st_size / (seconds - idle), bare, memory))
        ours, bare, memory = zip(*rounds)
        ratios = sorted(a / b for a, b in zip(ours, bare))
        print(f"{text.stat().st_size / 1e6:,.0f} MB, {args.tokenizer}, {n_threads} threads, median of {args.turns}")
        print(f"prepare_data.py {statistics.median(ours) / 1e6:.1f} MB/s, encode_ordinary_batch "
              f"{statistics.median(bare) / 1e6:.1f} MB/s, ratio {statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}), peak memory {max(memory) / 1e6:,.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
