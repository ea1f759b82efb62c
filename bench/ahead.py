"""What "64 ahead" costs: the loss of a conv_attention.py checkpoint by the token's place in the block that it predicts.

    python bench/ahead.py --ckpt out/conv_attention/ckpt.pt --data data/stdlib

The first token of a block directly follows what the model has read; the 64th is scored with 63 unknown ones between.
Windows of block_size tokens cover the validation split; none of it is scored twice.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="out/conv_attention/ckpt.pt")
    parser.add_argument("--data", default="data/stdlib")
    args = parser.parse_args()
    model, _ = sample.load(args.ckpt)
    tokens = torch.from_numpy(np.fromfile(Path(args.data, "val.bin"), dtype="<u2").astype(np.int64))
    length, ahead = model.cfg.block_size, model.ahead
    total, n = torch.zeros(ahead), 0
    with torch.no_grad():
        for start in range(0, len(tokens) - length - ahead + 1, length):
            idx, targets = tokens[start : start + length], tokens[start + ahead : start + ahead + length]
            nats = F.cross_entropy(model(idx[None])[0], targets, reduction="none")
            total += nats.view(-1, ahead).sum(0)
            n += length // ahead
    loss = (total / n).tolist()
    print(f"{args.ckpt}: {n * ahead:,} tokens, {sum(loss) / ahead:.4f} nats on average")
    edges = [1, 2, 3, 4, 5, 9, 17, 33, 65]
    for first, end in zip(edges, edges[1:]):
        part = loss[first - 1 : end - 1]
        if part:
            name = f"{first}" if end == first + 1 else f"{first} to {end - 1}"
            print(f"  token {name:>8} of the block: {sum(part) / len(part):.3f} nats")


if __name__ == "__main__":
    main()
