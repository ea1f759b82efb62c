"""Speed of prepare_data.py beside libraries in Rust, which take turns with it (A B A B ...), on the stdlib's sources.

BPE, in Python on one core: split into words, count, merge to a vocabulary of 4,096; the peer is Hugging Face's library.
Files: read, split, encode with GPT-2's tokenizer, count and write five times the text; the peer is tiktoken, in memory.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from train import compare, machine, shell

import prepare_data


def race(what, texts, theirs, ours):
    """Lets the two take turns and prints their median MB/s."""
    megabytes, speeds = sum(len(text.encode()) for text in texts) / 1e6, {theirs: [], ours: []}
    for run in [theirs, ours] * 3:
        start = time.perf_counter()
        run()
        speeds[run].append(megabytes / (time.perf_counter() - start))
    medians = f"prepare_data.py {statistics.median(speeds[ours]):.1f}, peer {statistics.median(speeds[theirs]):.1f}"
    print(f"{what}, {megabytes:.0f} MB: {medians} MB/s, ratio {compare(speeds[ours], speeds[theirs])}", flush=True)


if __name__ == "__main__":
    print(machine())
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in prepare_data.python_files(packages=False)]
    options = {"vocab_size": 4095, "min_frequency": 0, "show_progress": False}
    race("BPE", texts, lambda: ByteLevelBPETokenizer().train_from_iterator(texts, **options),
         lambda: prepare_data.train_bpe(prepare_data.count_words(iter(texts)), 4096))  # fmt: skip
    texts, encode = texts * 5, prepare_data.load_tokenizer("gpt2").encode_ordinary_batch
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("".join(texts), encoding="utf-8")
        command = f"prepare_data.py {folder}/text.txt --tokenizer gpt2 --out {folder}/out --force"
        race("Files", texts, lambda: encode(texts, num_threads=os.cpu_count()), lambda: shell(command))
