"""Can a model copy a name from a place that varies? Accuracy after 1,000 steps, over the distance of the place.

    python bench/recall.py         prints a table and writes results/recall.svg

A text of 128 random tokens holds a mark and a name after it, at a random place, and ends with the mark again: the name
comes next. Attention can look for the mark. A map of positions, as in mixer.py, has the same weights for every text.
"""

import importlib
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from compare import MODELS
from runs import ROOT, curve, picture

sys.path.insert(0, str(ROOT))
V, T, ENDS = 64, 128, [8, 16, 32, 64, 128]  # id V - 1 is the mark; distances up to each end are counted together
TRAINING = f"--vocab-size {V} --block-size {T} --max-steps 1000 --warmup-steps 100 --learning-rate 2e-3"


def texts(n):
    """n texts (n, T), the name that comes next in each (n), and how far it is from there (n)."""
    idx, place = torch.randint(V - 1, (n, T)), torch.randint(T - 2, (n,))
    idx[torch.arange(n), place] = idx[:, -1] = V - 1
    return idx, idx[torch.arange(n), place + 1], T - 1 - place


def train(name):
    """[(distance, share of names recalled up to there)]."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file, options = MODELS[name][0].split(maxsplit=1)
    module = importlib.import_module(file.removesuffix(".py"))
    cfg = module.parse(f"{options} {TRAINING}".split())[0]
    model = module.Model(cfg)
    optimizer = module.configure_optimizer(model, cfg)
    for step in range(cfg.max_steps):
        module.grow(model, optimizer, cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = module.learning_rate(step, cfg)
        idx, names, _ = texts(32)
        model(idx, F.pad(names[:, None], (T - 1, 0), value=-1)).backward()  # only the last row counts
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    idx, names, distance = texts(4096)
    with torch.no_grad():
        right = torch.cat([model.eval()(part)[:, -1].argmax(-1) for part in idx.split(64)]) == names
    bucket = torch.bucketize(distance, torch.tensor(ENDS))
    return [(end, right[bucket == i].float().mean().item()) for i, end in enumerate(ENDS)]


if __name__ == "__main__":
    chosen = [name for name in MODELS if "64" not in name]  # 64 ahead is no next token
    with ProcessPoolExecutor() as pool:
        found = dict(zip(chosen, pool.map(train, chosen)))
    print("| distance up to |", " | ".join(map(str, ENDS)), "|\n" + "| --- " * (1 + len(ENDS)) + "|")
    for name, points in found.items():
        print(f"| {name} |", " | ".join(f"{share:.0%}" for _, share in points), "|")

    def draw(figure):
        axis = figure.subplots()
        for name, points in found.items():
            curve(axis, points, name, marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("distance of the name, tokens")
        axis.set_ylabel("share recalled")

    picture("results/recall.svg", (8, 4), draw)
