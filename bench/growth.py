"""How cost grows with the context, from 128 to 4,096 tokens: prints two tables and draws results/growth.svg.

A training step has 4,096 tokens, at context T as 4,096 / T texts; its memory is the peak above what imports take. A
decoding step is the mean of 64 steps that follow T tokens. Models have the shapes of bench/compare.py.
"""

import importlib
import time

import torch
from compare import MODELS
from runs import curve, picture
from train import machine, race

CONTEXTS = [128, 256, 512, 1024, 2048, 4096]
CELLS = {"Training: tokens/s, peak memory": "{1:,.0f}, {2:,.0f} MB"}  # (context, tokens/s, MB, ms at three batches)
CELLS |= {"Decoding: ms per step, at batch 1 / 8 / 64": "{3:.1f} / {4:.1f} / {5:.1f}"}
PANELS = [(1, "training, tokens/s"), (2, "training, memory in MB")]
PANELS += [(3, "decoding, ms per step, batch 1"), (5, "decoding, ms per step, batch 64")]


@torch.no_grad()
def decoding(command, context):
    """Milliseconds of a cached step at batch 1, 8 and 64."""
    file, *options = command.split()
    module = importlib.import_module(file.removesuffix(".py"))
    cfg = module.parse([*options, "--vocab-size", "4096", "--block-size", str(context + 64)])[0]
    model = module.Model(cfg).eval().to(module.choose_device("cpu", "auto")[1])
    for batch in (1, 8, 64):
        cache, steps = model.new_cache(1), torch.randint(4096, (64, batch, 1))
        model(torch.randint(4096, (1, context)), cache=cache)
        cache.select([0] * batch)
        start = time.perf_counter()
        for idx in steps:
            model(idx, cache=cache)
        yield 1000 * (time.perf_counter() - start) / 64


def draw(figure, rows):
    for axis, (i, title) in zip(figure.subplots(2, 2).flat, PANELS):
        for name in rows:
            curve(axis, [(row[0], row[i]) for row in rows[name]], name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(CONTEXTS, map("{:,}".format, CONTEXTS))
        axis.set(yscale="log", title=title)


if __name__ == "__main__":
    rows, models = {}, {name: options for name, (options, _) in MODELS.items() if "64" not in name}
    steps = [f"--vocab-size 4096 --block-size {context} --batch-size {4096 // context}" for context in CONTEXTS]
    for name, model in models.items():
        trained = zip(CONTEXTS, race([f"{model} {step}" for step in steps], turns=3, steps=1))
        rows[name] = [(n, speed, held / 1e6, *decoding(model, n)) for n, (speed, held) in trained]
    print(machine())
    for title, cell in CELLS.items():
        print(f"\n{title}\n\n| context |", " | ".join(map("{:,}".format, CONTEXTS)), "|\n" + "| --- " * 7 + "|")
        for name in rows:
            print(f"| {name} |", " | ".join(cell.format(*row) for row in rows[name]), "|")
    picture("results/growth.svg", (12, 8), lambda figure: draw(figure, rows))
