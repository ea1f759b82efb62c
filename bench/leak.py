"""The leak in the source of conv_attention.py, on tokens that nothing predicts: under a minute.

    python bench/leak.py

Each token is one of four symbols, drawn with equal probabilities and independently of all others.
So an honest loss is ln 4 = 1.386 nats at best, and only a model that sees its targets comes below.
"""

import math
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the model files, before torch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F
from train import machine

import conv_attention

POSITIONS = 128  # 64 ahead, the targets of rows 0 to 63 are tokens of the window
NETWORKS = {  # (ahead, whether the expander is the source's)
    "1 ahead": (1, False),
    "64 ahead": (64, False),
    "64 ahead, the source's expander": (64, True),
}


def expand_as_the_source(model):
    """Replaces the `expand` of each level by the source's: (B, S, 2 C) -> (B, 4 S, C).

    Its channels are the S positions. The kernel moves along the 2 C numbers of a vector, and every
    one of the 4 S outputs is a sum over all S inputs, the later ones included.
    """
    for level in model.modules():
        if isinstance(level, conv_attention.Level) and level.depth < 3:
            S = level.inner.max_length
            level.expand = nn.Conv1d(S, 4 * S, kernel_size=2, stride=2)


def train(ahead, source, steps=400):
    """Trains a small network. Returns the losses of its steps, and for each row of a window its
    mean loss on fresh tokens, (POSITIONS), both in nats per token."""
    torch.manual_seed(0)
    # One block, after the last expansion.
    network = dict(vocab_size=4, block_size=POSITIONS, ahead=ahead, n_layer="0,0,0,0,0,0,1")
    training = dict(max_steps=steps, warmup_steps=50, learning_rate=2e-3)
    cfg = conv_attention.Config(**network, **training)
    model = conv_attention.Model(cfg)
    if source:
        expand_as_the_source(model)
    optimizer = conv_attention.configure_optimizer(model, cfg)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = conv_attention.learning_rate(step, cfg)
        tokens = torch.randint(4, (16, POSITIONS + ahead))
        loss = model(tokens[:, :-ahead], tokens[:, ahead:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    tokens = torch.randint(4, (256, POSITIONS + ahead))
    with torch.no_grad():
        logits = model(tokens[:, :-ahead])  # (256, POSITIONS, 4)
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, ahead:], reduction="none")
    return losses, nats.mean(0)


def main():
    print(f"{machine()}\nln 4 = {math.log(4):.3f} nats. The loss on fresh tokens:\n")
    print("| | all rows | rows 0 to 63 | rows 64 to 127 |\n| --- | --- | --- | --- |")
    for name, (ahead, source) in NETWORKS.items():
        nats = train(ahead, source)[1]
        print(f"| {name} | {nats.mean():.3f} | {nats[:64].mean():.3f} | {nats[64:].mean():.3f} |")


if __name__ == "__main__":
    main()
