"""What encoder, encoder-decoder and decoder have learned from the same tokens, and which of twenty
hidden tokens the first two name.

    python bench/blanks.py out/masked out/spans out/next       the runs of results/scratch_former.md

The twenty: every 500th token of val.bin that is a keyword, a bracket, or a whole name seen a
hundred times in training, between 60 other tokens on either side. Draws out/blanks.svg.
"""

import keyword
import math
import sys

import numpy as np
import runs  # before torch, because train.py sets GOMP_SPINCOUNT first
import torch
from train import ROOT

import gpt2
import sample
import scratch_former

STYLES = {"masked": "--", "spans": ":", "next": "-"}


def baseline(cfg, splits):
    """The loss of token frequencies, in nats, on the tokens that a run evaluates. In the target of
    `spans` are sentinels, too: of them it knows the order and the share."""
    counts = np.bincount(splits["train"], minlength=cfg.vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())[splits["val"][: cfg.eval_tokens]].mean()
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
        known = word in (*keyword.kwlist, *"()[]{}") or (often[tokens[i]] and word.isidentifier())
        # It is whole if neither the letter before it nor the one after it could belong to it.
        pairs = (before[-1] + text[0], text[-1] + after[0])
        if known and not any(f"_{pair}".isidentifier() for pair in pairs):
            yield i


def main(folders):
    print("| objective | parameters | tokens read | loss | frequencies | below |")
    print("| --- " * 6 + "|")
    models = {}
    below = {}
    for folder in folders:
        model, tokenizer = sample.load(ROOT / folder / "ckpt.pt")
        splits = gpt2.open_data(ROOT / model.cfg.data)[2]
        base = baseline(model.cfg, splits)
        name = model.cfg.objective
        rows = [row for row in runs.log(folder) if row["val_loss"]]
        below[name] = [(row["tokens"] / 1e6, base - row["val_loss"]) for row in rows]
        read, gain = below[name][-1]
        n = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {n:,} | {read:.1f}M | {base - gain:.3f} | {base:.3f} | {gain:.3f} |")
        if name != "next":
            models[name] = model

    def draw(figure):
        axis = figure.subplots()
        for name, points in below.items():
            runs.curve(axis, points, name, color=runs.COLORS["scratch_former"], ls=STYLES[name])
        runs.level(axis, 0, "token frequencies")
        axis.set(xlabel="tokens read, millions", ylim=(-0.3, None))  # room for that name
        axis.set_ylabel("nats below token frequencies\n(higher is better)")

    runs.picture("out/blanks.svg", (8, 3.5), draw)

    print("\n| line | hidden |", " | ".join(models), "|\n" + "| --- " * 4 + "|")
    right = dict.fromkeys(models, 0)
    for i in [*places(splits["val"], splits["train"], tokenizer)][499:10_000:500]:
        window = torch.tensor(splits["val"][i - 60 : i + 61].astype(np.int64))  # (121)
        before, hidden, after = (tokenizer.decode(p.tolist()) for p in window.split([60, 1, 60]))
        line = f"{before.splitlines()[-1]}____{after.splitlines()[0]}".strip()
        cells = [f"`` {line} ``", f"`{hidden!r}`"]
        for name, model in models.items():
            window[60] = model.cfg.vocab_size  # the mask, or the first sentinel
            filled = tokenizer.decode(sample.fill(model, window[None])[0][60:-60])
            right[name] += filled == hidden
            cells.append(f"`{filled!r}`" + " ✓" * (filled == hidden))
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    print("| right of 20 | |", *(f"{n} |" for n in right.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
