"""How cost grows with the context: training and cached decoding of each model at 128 to 4,096 tokens.

    python bench/growth.py         prints two tables and draws results/growth.svg

A training step has 4,096 tokens, at context T as 4,096 / T texts; its memory is the peak above what imports take. A
decoding step is the mean of 64 steps that follow T tokens. Models have the shapes of bench/compare.py.
"""

import importlib
import sys
import time

import torch
from compare import MODELS
from runs import ROOT, curve, picture
from train import machine, race

sys.path.insert(0, str(ROOT))
CONTEXTS, BATCHES = [128, 256, 512, 1024, 2048, 4096], [1, 8, 64]


@torch.no_grad()
def decoding(command, context):
    """{batch: milliseconds of a cached step}."""
    file, *options = command.split()
    module, found = importlib.import_module(file.removesuffix(".py")), {}
    cfg = module.parse([*options, "--vocab-size", "4096", "--block-size", str(context + 64)])[0]
    model = module.Model(cfg).eval().to(module.choose_device("cpu", "auto")[1])
    for batch in BATCHES:
        cache, steps = model.new_cache(1), torch.randint(4096, (64, batch, 1))
        model(torch.randint(4096, (1, context)), cache=cache)
        cache.select([0] * batch)
        start = time.perf_counter()
        for idx in steps:
            model(idx, cache=cache)
        found[batch] = 1000 * (time.perf_counter() - start) / 64
    return found


def table(title, cells):
    print(f"\n{title}\n\n| context |", " | ".join(f"{context:,}" for context in CONTEXTS), "|")
    print("| --- " * (1 + len(CONTEXTS)) + "|")
    for name, values in cells.items():
        print(f"| {name} |", " | ".join(values), "|", flush=True)


def main():
    names = [name for name in MODELS if "64" not in name]
    steps = [f"--vocab-size 4096 --block-size {context} --batch-size {4096 // context}" for context in CONTEXTS]
    trained = {name: race([f"{MODELS[name][0]} {step}" for step in steps], turns=3, steps=1) for name in names}
    decoded = {name: [decoding(MODELS[name][0], context) for context in CONTEXTS] for name in names}
    print(machine())
    cells = {name: [f"{speed:,.0f}, {held / 1e6:,.0f} MB" for speed, held in found] for name, found in trained.items()}
    table("Training: tokens/s, peak memory", cells)
    cells = {name: [" / ".join(f"{ms:.1f}" for ms in found.values()) for found in decoded[name]] for name in names}
    table(f"Decoding: ms per step, at batch {' / '.join(map(str, BATCHES))}", cells)

    def draw(figure):
        panels = [("training, tokens/s", [(name, [speed for speed, _ in trained[name]]) for name in names])]
        panels += [("training, memory in MB", [(name, [held / 1e6 for _, held in trained[name]]) for name in names])]
        for batch in (1, 64):
            values = [(name, [found[batch] for found in decoded[name]]) for name in names]
            panels += [(f"decoding, ms per step, batch {batch}", values)]
        for axis, (title, lines) in zip(figure.subplots(2, 2).flat, panels):
            for name, values in lines:
                curve(axis, [*zip(CONTEXTS, values)], name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(CONTEXTS, [f"{context:,}" for context in CONTEXTS])
            axis.set_title(title)
        figure.subplots_adjust(hspace=0.35, wspace=0.5)

    picture("results/growth.svg", (12, 8), draw)


if __name__ == "__main__":
    main()
