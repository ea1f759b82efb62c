"""Training a byte-pair encoding: prepare_data.py in Python beside Hugging Face tokenizers in Rust, on the same text.

    python bench/bpe.py                4,096 ids on the training split of the standard library's sources

Both split words with GPT-2's pattern, count and merge, from files to merges. They take turns (A B A B ...), the first
does not count. Prints seconds and their ratio; Rust has all cores, Python one.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare_data


def ours(source, vocab_size):
    return prepare_data.train_bpe(prepare_data.count_words(source), vocab_size)


def theirs(source, vocab_size):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    documents = (document for shard in source.shards for document in source.documents(shard))
    tokenizer.train_from_iterator(("".join(text) for split, text in documents if split == "train"), trainer)
    return tokenizer.get_vocab()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    source = prepare_data.Source(argparse.Namespace(name="stdlib", val_fraction=0.1, field="text", errors="strict"))
    machine = platform.processor() or platform.machine()
    print(f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}, {os.cpu_count()} cores, {machine}")
    seconds = {ours: [], theirs: []}
    for _ in range(args.turns + 1):
        for train, found in seconds.items():
            start = time.perf_counter()
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
                n = len(train(source, args.vocab_size))
            found.append(time.perf_counter() - start)
            assert n == args.vocab_size - 1, n
    mine, rust = (found[1:] for found in seconds.values())
    ratios = [a / b for a, b in zip(mine, rust)]
    print(f"{args.vocab_size:,} ids on {source.size / 1e6:.1f} MB: prepare_data.py {statistics.median(mine):.2f} s,"
          f" tokenizers {statistics.median(rust):.2f} s, ratio {statistics.median(ratios):.2f}"
          f" ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
