"""Speed of prepare_data.py on the standard library's sources: its BPE trainer, and the whole way from text to files.

    python bench/data.py --mb 50 --turns 3
    python bench/data.py --mb 1000 --turns 1      a gigabyte of text: look at the memory

BPE: words are split, counted and merged to a vocabulary of 4,096, here in Python on one core, and by Hugging Face
tokenizers in Rust on all. Files: prepare_data.py reads, splits, encodes with GPT-2's tokenizer, counts and writes a
.txt file in a process of its own. encode_ordinary_batch of tiktoken gets the same text in memory, in pieces of 64 KB,
with as many threads. Contestants take turns (A B A B ...).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from train import ROOT, compare, machine, shell

sys.path.insert(0, str(ROOT))
import prepare_data


def seconds(run, *args, **options):
    """How long run(*args, **options) takes."""
    start = time.perf_counter()
    run(*args, **options)
    return time.perf_counter() - start


def train_ours(texts):
    prepare_data.train_bpe(prepare_data.count_words(iter(texts)), 4096)


def train_theirs(texts):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4095, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100, help="text for the whole way (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    print(f"{machine()}, Python {sys.version.split()[0]}, tokenizers {tokenizers.__version__}")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in prepare_data.python_files(packages=False)]
    ours, theirs = zip(*((seconds(train_ours, texts), seconds(train_theirs, texts)) for _ in range(args.turns)))
    medians = f"prepare_data.py {statistics.median(ours):.2f} s, tokenizers {statistics.median(theirs):.2f} s"
    print(f"BPE of 4,096 on {sum(map(len, texts)) / 1e6:.1f} MB: {medians}, ratio {compare(ours, theirs)}", flush=True)

    encoding, text = prepare_data.load_tokenizer("gpt2"), "".join(texts)
    text *= round(args.mb * 1e6 / len(text)) or 1
    pieces, size, ours, theirs = [text[i : i + 2**16] for i in range(0, len(text), 2**16)], len(text.encode()), [], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text(text, encoding="utf-8")
        for _ in range(args.turns):
            theirs.append(size / 1e6 / seconds(encoding.encode_ordinary_batch, pieces, num_threads=os.cpu_count()))
            _, spent, memory = shell(f"prepare_data.py {folder}/text.txt --tokenizer gpt2 --out {folder}/out --force")
            ours.append(size / 1e6 / spent)
    medians = f"prepare_data.py {statistics.median(ours):.1f}, encode_ordinary_batch {statistics.median(theirs):.1f}"
    print(f"{size / 1e6:,.0f} MB to files: {medians} MB/s, ratio {compare(ours, theirs)}; {memory / 1e6:,.0f} MB held")


if __name__ == "__main__":
    main()
