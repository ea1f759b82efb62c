"""What encoder, encoder-decoder and decoder have learned from the same tokens, and which of twenty
hidden tokens the first two name.

    python bench/blanks.py out/masked out/spans out/next       the runs of results/scratch_former.md

The twenty hidden tokens are chosen by a rule: every 500th of those in val.bin that are a keyword, a
bracket, or a whole name seen a hundred times in training. A model sees 60 tokens on either side.
Losses are of the first --eval-tokens of val. Draws out/blanks.svg; with --save, results/blanks.svg.
"""

import argparse
import keyword
import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the model files, before torch is imported

import numpy as np
import torch
from runs import COLORS, ROOT, curve, level, log, picture

import gpt2
import sample
import scratch_former

STYLES = {"masked": "--", "spans": ":", "next": "-"}


def baseline(cfg, splits):
    """The loss of token frequencies, in nats. In the target of `spans` are sentinels, too: of them
    it knows the order and the share."""
    counts = np.bincount(splits["train"], minlength=cfg.vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())[splits["val"]].mean()
    if cfg.objective != "spans":
        return nats
    n_hidden, n_spans = scratch_former.hidden_lengths(cfg, cfg.block_size)
    p = n_hidden / (n_hidden + n_spans)  # of a token, not a sentinel
    return p * (nats - math.log(p)) - (1 - p) * math.log(1 - p)


def places(tokens, train, tokenizer):
    """Where `tokens` has a keyword, a bracket, or a whole name that `train` has a hundred times."""
    often = np.bincount(train, minlength=tokenizer.n_vocab) >= 100
    texts = [tokenizer.decode([token]) for token in tokens.tolist()]
    for i, (before, text, after) in enumerate(zip([" ", *texts], texts, [*texts[1:], " "])):
        word = text.strip()
        known = word in (*keyword.kwlist, *"()[]{}")
        if often[tokens[i]] and word.isidentifier():
            known = True
        # It is whole, if neither the letter before it nor the one after it could belong to it.
        pairs = (before[-1] + text[0], text[-1] + after[0])
        if known and not any(f"_{pair}".isidentifier() for pair in pairs):
            yield i


def draw(figure, below):
    axis = figure.subplots()
    color = COLORS["scratch_former"]
    for name, points in below.items():
        curve(axis, points, name, color=color, ls=STYLES[name])
    level(axis, 0, "token frequencies")
    axis.set_xlabel("tokens read, millions")
    axis.set_ylabel("nats below token frequencies\n(higher is better)")


def score(folders, path):
    """Prints a row for each run, and draws how far it is below token frequencies. Returns the
    models that fill blanks, {objective: model}, and tokenizer and splits of the last run."""
    models = {}
    below = {}
    print("| objective | parameters | tokens read | loss | frequencies | below |")
    print("| --- " * 6 + "|")
    for folder in folders:
        model, tokenizer = sample.load(ROOT / folder / "ckpt.pt")
        name = model.cfg.objective
        splits = gpt2.open_data(ROOT / model.cfg.data)[2]
        rows = log(folder)
        n = sum(p.numel() for p in model.parameters())
        base = baseline(model.cfg, splits)
        # The table and the picture score the same tokens: the first --eval-tokens of val.
        rows = [row for row in rows if row["val_loss"] is not None]
        nats = rows[-1]["val_loss"]
        read = f"{rows[-1]['tokens'] / 1e6:.1f}M"
        print(f"| {name} | {n:,} | {read} | {nats:.3f} | {base:.3f} | {base - nats:.3f} |")
        below[name] = [(row["tokens"] / 1e6, base - row["val_loss"]) for row in rows]
        if name != "next":
            models[name] = model
    picture(path, (8, 3.5), lambda figure: draw(figure, below))
    return models, tokenizer, splits


def fill(models, tokenizer, splits):
    """Prints a row for each of twenty hidden tokens: its line, and what the models say."""
    print("\n| line | hidden |", " | ".join(models), "|\n" + "| --- " * 4 + "|")
    right = dict.fromkeys(models, 0)
    for i in [*places(splits["val"], splits["train"], tokenizer)][499:10_000:500]:
        window = torch.tensor(splits["val"][i - 60 : i + 61].astype(np.int64))  # (121)
        before, hidden, after = (tokenizer.decode(p.tolist()) for p in window.split([60, 1, 60]))
        line = f"{before.splitlines()[-1]}____{after.splitlines()[0]}".strip()
        cells = [f"`` {line} ``", f"`{hidden!r}`"]
        window[60] = next(iter(models.values())).cfg.vocab_size  # the mask, and the first sentinel
        for name, model in models.items():
            filled = tokenizer.decode(sample.fill(model, window[None])[0][60:-60])
            right[name] += filled == hidden
            cells.append(f"`{filled!r}`" + " ✓" * (filled == hidden))
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    print("| right of 20 | |", *(f"{n} |" for n in right.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="+", help="folder of a run of scratch_former.py")
    parser.add_argument("--save", action="store_true", help="draw into results/, not into out/")
    args = parser.parse_args()
    path = "results/blanks.svg" if args.save else "out/blanks.svg"
    fill(*score(args.run, path))
