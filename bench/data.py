"""Speed of prepare_data.py beside libraries in Rust, with which it takes turns.

BPE, in Python on one core: split the standard library's sources into words, count them, merge to a
vocabulary of 4,096. The peer is Hugging Face's library. Files: read, split, encode with GPT-2's
tokenizer, count and write five times the text. The peer is tiktoken, in memory.
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
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds = {theirs: [], ours: []}
    for run in [theirs, ours] * 3:
        start = time.perf_counter()
        run()
        speeds[run].append(megabytes / (time.perf_counter() - start))
    their_median, our_median = (statistics.median(found) for found in speeds.values())
    medians = f"prepare_data.py {our_median:.1f}, peer {their_median:.1f}"
    ratio = compare(speeds[ours], speeds[theirs])
    print(f"{what}, {megabytes:.0f} MB: {medians} MB/s, ratio {ratio}", flush=True)


def main():
    print(machine())
    texts = []
    for path in prepare_data.python_files(packages=False):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))

    def their_bpe():
        options = {"vocab_size": 4095, "min_frequency": 0, "show_progress": False}
        ByteLevelBPETokenizer().train_from_iterator(texts, **options)

    def our_bpe():
        prepare_data.train_bpe(prepare_data.count_words(iter(texts)), 4096)

    race("BPE", texts, their_bpe, our_bpe)

    more = texts * 5
    encode = prepare_data.load_tokenizer("gpt2").encode_ordinary_batch
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("".join(more), encoding="utf-8")
        command = f"prepare_data.py {folder}/text.txt --tokenizer gpt2 --out {folder}/out --force"
        threads = os.cpu_count()
        race("Files", more, lambda: encode(more, num_threads=threads), lambda: shell(command))


if __name__ == "__main__":
    main()
