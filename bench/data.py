"""Speed of prepare_data.py on the standard library's sources: its BPE trainer, and the whole way from text to files.

    python bench/data.py                          both
    python bench/data.py --mb 1000 --turns 1      a gigabyte of text: look at the memory
    python bench/data.py --xz data/stdlib         bits per byte of a validation split by xz: a yardstick for models

BPE: words are split, counted and merged to a vocabulary of 4,096, here in Python on one core, and by Hugging Face
tokenizers in Rust on all. Files: prepare_data.py reads, splits, encodes with GPT-2's tokenizer, counts and writes a
.txt file in a process of its own; its start is timed on an almost empty file and subtracted. encode_ordinary_batch of
tiktoken gets the same text in memory, in pieces of 64 KB, with as many threads. Contestants take turns (A B A B ...).
"""

import argparse
import lzma
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
import gpt2
import prepare_data


def train_ours(texts, vocab_size):
    return prepare_data.train_bpe(prepare_data.count_words(iter(texts)), vocab_size)


def train_theirs(texts, vocab_size):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer.get_vocab()


def compare_training(texts, turns, vocab_size=4096):
    seconds = {train_ours: [], train_theirs: []}
    for _ in range(turns):
        for train, found in seconds.items():
            start = time.perf_counter()
            n = len(train(texts, vocab_size))
            found.append(time.perf_counter() - start)
            assert n == vocab_size - 1, n
    ours, theirs = seconds.values()
    medians = f"prepare_data.py {statistics.median(ours):.2f} s, tokenizers {statistics.median(theirs):.2f} s"
    print(f"BPE of {vocab_size:,} on {sum(map(len, texts)) / 1e6:.1f} MB: {medians}, ratio {compare(ours, theirs)}")


def compare_encoding(texts, turns, mb):
    encoding, text = prepare_data.load_tokenizer("gpt2"), "".join(texts)
    pieces, size = [text[i : i + 2**16] for i in range(0, len(text), 2**16)], len(text.encode())
    ours, theirs, peaks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path, almost_empty = Path(folder, "text.txt"), Path(folder, "empty.txt")
        almost_empty.write_text("a b c d e f g h", encoding="utf-8")
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(round(mb * 1e6 / size) or 1):
                file.write(text)
        for _ in range(turns):
            start = time.perf_counter()
            encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count())
            theirs.append(size / 1e6 / (time.perf_counter() - start))
            command = f"prepare_data.py %s --tokenizer gpt2 --out {folder}/out --force"
            _, idle, _ = shell(command % almost_empty)
            _, seconds, memory = shell(command % path)
            ours.append(path.stat().st_size / 1e6 / (seconds - idle))
            peaks.append(memory / 1e6)
        print(f"{path.stat().st_size / 1e6:,.0f} MB to token files, peak memory {max(peaks):,.0f} MB:", end=" ")
    medians = f"prepare_data.py {statistics.median(ours):.1f}, encode_ordinary_batch {statistics.median(theirs):.1f}"
    print(f"{medians} MB/s, ratio {compare(ours, theirs)}")


def compress(folder):
    meta, tokenizer, splits = gpt2.open_data(folder)
    encoding = prepare_data.load_tokenizer(tokenizer["name"], tokenizer["ranks"])
    train, val = (encoding.decode_bytes(ids[ids != meta["eot"]].tolist()) for ids in (splits["train"], splits["val"]))
    bits = [8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (val, train, train + val)]
    alone, after = bits[0] / len(val), (bits[2] - bits[1]) / len(val)
    print(f"xz -9e: {alone:.3f} bits per byte for the text of {folder}/val.bin, {after:.3f} if it follows train.bin's")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100, help="text for the whole way (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--xz", type=Path, metavar="DIR", help="only compress this data set's text")
    args = parser.parse_args()
    if args.xz:
        return compress(args.xz)
    print(f"{machine()}, Python {sys.version.split()[0]}, tokenizers {tokenizers.__version__}")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in prepare_data.python_files(packages=False)]
    compare_training(texts, args.turns)
    compare_encoding(texts, args.turns, args.mb)


if __name__ == "__main__":
    main()
