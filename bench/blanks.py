"""What an encoder, an encoder-decoder and a decoder have learned from the same tokens, and which of twenty hidden
tokens the first two name.

    python scratch_former.py --preset masked --out out/masked
    python scratch_former.py --preset spans --out out/spans
    python scratch_former.py --preset masked --objective next --out out/next
    python bench/blanks.py out/masked out/spans out/next

Losses are compared with token frequencies in the training text. The target of `spans` holds sentinels, too: there the
baseline knows their order, and how often one comes. The twenty tokens are chosen before looking: every 500th of those
in val.bin that are a keyword, a bracket, or a whole name seen a hundred times in training. A model sees the 60 tokens
before the hidden one and the 60 after it, and fills the blank greedily. Prints two tables, draws results/blanks.svg.
"""

import keyword
import math
import sys

import numpy as np
import torch
from runs import GREY, ROOT, curve, log, picture

sys.path.insert(0, str(ROOT))
import gpt2
import sample
import scratch_former


def baseline(cfg, splits):
    """Loss in nats of token frequencies, with sentinels in the shares that they have."""
    counts = np.bincount(splits["train"], minlength=cfg.vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())[splits["val"]].mean()
    n_hidden, n_spans = scratch_former.hidden_lengths(cfg, cfg.block_size)
    p = n_hidden / (n_hidden + n_spans)  # of a token, not a sentinel
    return p * (nats - math.log(p)) - (1 - p) * math.log(1 - p) if cfg.objective == "spans" else nats


def ordinary(tokens, train, tokenizer):
    """Whether each of `tokens` is a keyword, a bracket, or a name, whole, that `train` has a hundred times."""
    often = np.bincount(train, minlength=tokenizer.n_vocab) >= 100
    texts = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]
    good = np.array([text.strip() in [*keyword.kwlist, *"()[]{}"] or bool(n and text.strip().isidentifier())
                     for text, n in zip(texts, often)])  # fmt: skip
    starts, ends = (np.array([f"_{text[where]}".isidentifier() for text in texts]) for where in (0, -1))
    joined = ends[tokens[:-1]] & starts[tokens[1:]]  # the two belong to one word
    return good[tokens] & ~np.append(joined, False) & ~np.append(False, joined)


def main(folders):
    models = {}
    for folder in folders:
        model, tokenizer = sample.load(ROOT / folder / "ckpt.pt")
        models[model.cfg.objective] = model, log(folder)
    splits = gpt2.open_data(ROOT / model.cfg.data)[2]
    bases = {name: baseline(model.cfg, splits) for name, (model, _) in models.items()}

    print("| objective | parameters | tokens read | loss | frequencies | below |\n" + "| --- " * 6 + "|")
    for name, (model, rows) in models.items():
        nats = gpt2.evaluate(model, splits["val"], tokenizer.eot_token, torch.no_grad())
        n, last = sum(p.numel() for p in model.parameters()), rows[-1]
        print(f"| {name} | {n:,} | {last['tokens'] / 1e6:.1f}M | {nats:.3f} | {bases[name]:.3f} "
              f"| {bases[name] - nats:.3f} |")  # fmt: skip

    filling = [model for name, (model, _) in models.items() if name != "next"]
    print("\n| line | hidden |", " | ".join(model.cfg.objective for model in filling), "|\n" + "| --- " * 4 + "|")
    right = [0] * len(filling)
    for i in np.flatnonzero(ordinary(splits["val"], splits["train"], tokenizer))[499::500][:20]:
        window = torch.tensor(splits["val"][i - 60 : i + 61].astype(np.int64))[None]
        before, hidden, after = (tokenizer.decode(part.tolist()) for part in window[0].split([60, 1, 60]))
        cells = [f"`` {f'{before.splitlines()[-1]}____{after.splitlines()[0]}'.strip()} ``", f"`{hidden!r}`"]
        window[0, 60] = model.cfg.vocab_size
        for j, filler in enumerate(filling):
            filled = tokenizer.decode(sample.fill(filler, window)[0][60:-60])
            right[j] += filled == hidden
            cells.append(f"`{filled!r}`" + " ✓" * (filled == hidden))
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    print("| right of 20 | |", *(f"{n} |" for n in right))

    def draw(figure):
        axis = figure.subplots()
        for name, (_, rows) in models.items():
            points = [(row["tokens"] / 1e6, bases[name] - row["val_loss"]) for row in rows if row["val_loss"]]
            curve(axis, points, name)
        axis.axhline(0, color=GREY)
        axis.set_xlabel("tokens read, millions")
        axis.set_ylabel("nats below token frequencies")

    picture("results/blanks.svg", (8, 3.5), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
