"""The matrix products of one decoding step of GPT-2 124M, three ways, at small batches, on the CPU.

    python bench/products.py

F.linear reads W (out, in) as it is stored; "transposed" stores it the other way; W @ x.T makes each token a column.
Turns alternate; prints the median milliseconds of all 49 products.
"""

import statistics
import time

import torch
import torch.nn.functional as F

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12 + [(50304, 768)]  # blocks, head

weights = [0.02 * torch.randn(shape) for shape in SHAPES]
transposed = [w.T.contiguous().T for w in weights]
WAYS = {
    "F.linear": lambda xs: [F.linear(xs[w.size(1)], w) for w in weights],
    "transposed": lambda xs: [F.linear(xs[w.size(1)], w) for w in transposed],
    "W @ x.T": lambda xs: [(w @ xs[w.size(1)].T).T for w in weights],
}

print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
for batch in (1, 2, 4, 8):
    xs = {width: torch.randn(batch, width) for width in (768, 3072)}  # (B, in)
    ms = {way: [] for way in WAYS}
    for _ in range(9):
        for way, found in ms.items():
            start = time.perf_counter()
            WAYS[way](xs)
            found.append(1000 * (time.perf_counter() - start))
    print(f"batch {batch}: " + ", ".join(f"{way} {statistics.median(found[1:]):.1f} ms" for way, found in ms.items()))
