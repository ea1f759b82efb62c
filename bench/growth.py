"""How cost grows with the context, from 128 to 4,096 tokens: two tables and results/growth.svg.

A training step has 4,096 tokens, at context T as 4,096 / T texts. A decoding step is the mean of 64
that follow T tokens. Models are those of bench/compare.py, progressive.py's in its last stage.
"""

import time

import runs  # first, because train.py sets GOMP_SPINCOUNT before it imports torch
import torch
from compare import FINAL, build
from train import machine, race

import gpt2

CONTEXTS = [128, 256, 512, 1024, 2048, 4096]
# A row of a model has (context, tokens/s, MB, ms at batch 1, 8, 64) for each context.
TABLES = {
    "Training: tokens/s, peak memory": "{1:,.0f}, {2:,.0f} MB",
    "Decoding: ms per step, at batch 1 / 8 / 64": "{3:.1f} / {4:.1f} / {5:.1f}",
}
PANELS = {  # which number, and what it is
    1: "training: tokens/s (higher is better)",
    2: "training: peak memory, MB (lower is better)",
    3: "decoding, batch 1: ms per step (lower is better)",
    5: "decoding, batch 64: ms per step (lower is better)",
}


@torch.no_grad()
def decoding(command, context):
    """Milliseconds of a cached step at batch 1, 8 and 64."""
    model = build(command, f"--block-size {context + 64}").eval()
    model.to(gpt2.choose_device("cpu", "auto")[1])
    for batch in (1, 8, 64):
        cache = model.new_cache(1)
        model(torch.randint(4096, (1, context)), cache=cache)
        cache.select([0] * batch)
        steps = torch.randint(4096, (64, batch, 1))
        start = time.perf_counter()
        for idx in steps:
            model(idx, cache=cache)
        yield 1000 * (time.perf_counter() - start) / 64


def main():
    names = [name for name in FINAL if "," not in name]  # the others: another shape, or 64 ahead
    commands = {name: f"{FINAL[name]} --vocab-size 4096" for name in names}
    trained = {}  # before any decoding, since a process inherits the peak memory of its parent
    for name, command in commands.items():
        texts = [f"{command} --block-size {n} --batch-size {4096 // n}" for n in CONTEXTS]
        trained[name] = race(texts, turns=3, steps=1)
    rows = {}
    for name, command in commands.items():
        pairs = zip(CONTEXTS, trained[name])
        rows[name] = [(n, speed, held / 1e6, *decoding(command, n)) for n, (speed, held) in pairs]
    print(machine())
    titles = ["context", *(f"{n:,}" for n in CONTEXTS)]
    for title, cell in TABLES.items():
        cells = [[name, *(cell.format(*row) for row in rows[name])] for name in rows]
        print(f"\n{title}\n\n{runs.table(titles, *cells)}")

    def draw(figure):
        for axis, (i, label) in zip(figure.subplots(2, 2).flat, PANELS.items()):
            for name in rows:
                runs.curve(axis, [(row[0], row[i]) for row in rows[name]], name)
            axis.set_xscale("log", base=2)
            axis.set_xticks(CONTEXTS, titles[1:])
            axis.set(xlabel="context, tokens", ylabel=label, yscale="log")

    runs.picture("results/growth.svg", (13, 9), draw)


if __name__ == "__main__":
    main()
