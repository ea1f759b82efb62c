"""What encoder, encoder-decoder and decoder have learned from the same tokens, and which of twenty the first two name.

    python bench/blanks.py out/masked out/spans out/next       the three runs of results/scratch_former.md

The twenty hidden tokens are chosen by a rule: every 500th of those in val.bin that are a keyword, a bracket, or a whole
name seen a hundred times in training. A model sees 60 tokens on either side. Draws results/blanks.svg, too.
"""

import keyword
import math
import sys

import numpy as np
import torch
from runs import GREY, ROOT, curve, log, picture

import gpt2
import sample
import scratch_former


def baseline(cfg, splits):
    """Loss in nats of token frequencies. Of the sentinels in the target of `spans` it knows the order and the share."""
    counts = np.bincount(splits["train"], minlength=cfg.vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())[splits["val"]].mean()
    n_hidden, n_spans = scratch_former.hidden_lengths(cfg, cfg.block_size)
    p = n_hidden / (n_hidden + n_spans)  # of a token, not a sentinel
    return p * (nats - math.log(p)) - (1 - p) * math.log(1 - p) if cfg.objective == "spans" else nats


def places(tokens, train, tokenizer):
    """Where `tokens` has a keyword, a bracket, or a name, whole, that `train` has a hundred times."""
    often = np.bincount(train, minlength=tokenizer.n_vocab) >= 100
    texts = [tokenizer.decode([token]) for token in tokens.tolist()]
    for i, (before, text, after) in enumerate(zip([" ", *texts], texts, [*texts[1:], " "])):
        known = text.strip() in [*keyword.kwlist, *"()[]{}"] or (often[tokens[i]] and text.strip().isidentifier())
        if known and not any(f"_{pair}".isidentifier() for pair in (before[-1] + text[0], text[-1] + after[0])):
            yield i


def draw(figure, below):
    axis = figure.subplots()
    for name, points in below.items():
        curve(axis, points, name)
    axis.axhline(0, color=GREY)
    axis.set(xlabel="tokens read, millions", ylabel="nats below token frequencies")


if __name__ == "__main__":
    models, below = {}, {}
    print("| objective | parameters | tokens read | loss | frequencies | below |\n" + "| --- " * 6 + "|")
    for folder in sys.argv[1:]:
        model, tokenizer = sample.load(ROOT / folder / "ckpt.pt")
        splits, rows, name = gpt2.open_data(ROOT / model.cfg.data)[2], log(folder), model.cfg.objective
        nats = gpt2.evaluate(model, splits["val"], tokenizer.eot_token, torch.no_grad())
        n, base = sum(p.numel() for p in model.parameters()), baseline(model.cfg, splits)
        print(f"| {name} | {n:,} | {rows[-1]['tokens'] / 1e6:.1f}M | {nats:.3f} | {base:.3f} | {base - nats:.3f} |")
        below[name] = [(row["tokens"] / 1e6, base - row["val_loss"]) for row in rows if row["val_loss"]]
        models |= {name: model} if name != "next" else {}
    picture("results/blanks.svg", (8, 3.5), lambda figure: draw(figure, below))

    print("\n| line | hidden |", " | ".join(models), "|\n" + "| --- " * 4 + "|")
    right = dict.fromkeys(models, 0)
    for i in [*places(splits["val"], splits["train"], tokenizer)][499:10_000:500]:
        window = torch.tensor(splits["val"][i - 60 : i + 61].astype(np.int64))[None]
        before, hidden, after = (tokenizer.decode(part.tolist()) for part in window[0].split([60, 1, 60]))
        cells = [f"`` {f'{before.splitlines()[-1]}____{after.splitlines()[0]}'.strip()} ``", f"`{hidden!r}`"]
        window[0, 60] = model.cfg.vocab_size
        for name, model in models.items():
            filled = tokenizer.decode(sample.fill(model, window)[0][60:-60])
            right[name] += filled == hidden
            cells.append(f"`{filled!r}`" + " ✓" * (filled == hidden))
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    print("| right of 20 | |", *(f"{n} |" for n in right.values()))
