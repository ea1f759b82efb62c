"""Does attention overtake the mixer? gpt2.py and mixer.py at two sizes, on 4M to 50M tokens.

    make compare SCALE=long        some four hours on two cores; it resumes

One run with a constant rate serves four budgets: at 80% of each of them a copy of it begins, in
which the rate falls linearly to zero. Rates are searched at the first budget with the first seed.
Fills in results/long.md and draws long.svg.
"""

import importlib
import statistics
import sys

import numpy as np
import runs  # before torch, because train.py sets GOMP_SPINCOUNT first
import torch
from compare import DATA, MODELS, RUN, bits, count_parameters
from train import ROOT, machine, prepare

import gpt2
import sample

FOLDER = "out/long"
TOKENS = DATA["full"].split()[-1]  # the folder of the token files
BUDGETS = (4, 12, 25, 50)  # millions of tokens
DECAY = 0.2  # of a budget
SEEDS = (1337,)
NETWORKS = {  # options, where the search for a learning rate begins, and the budgets
    "gpt2, 1.1M": (MODELS["gpt2"][0], 2e-3, BUDGETS),
    "mixer, 1.1M": (MODELS["mixer"][0], 8e-3, BUDGETS),
    "gpt2, 4M": ("gpt2.py --n-layer 4 --n-head 8 --n-embd 256", 1e-3, BUDGETS[:2]),
    "mixer, 4M": ("mixer.py --n-layer 4 --n-embd 288 --tie-weights", 4e-3, BUDGETS[:2]),
}


def work(kind, file, *options):
    """Runs a model file whose rate is constant after the warm-up: "steady" until max_steps,
    "decayed" until the last 20% of max_steps, in which it falls linearly to zero."""
    module = importlib.import_module(file.removesuffix(".py"))

    def learning_rate(step, cfg):
        share = min(1, (step + 1) / cfg.warmup_steps)
        if kind == "decayed":
            share = min(share, (cfg.max_steps - step) / (DECAY * cfg.max_steps))
        return cfg.learning_rate * share

    module.learning_rate = learning_rate
    module.main(options)


@torch.no_grad()
def copied(run):
    """The share of tokens that a trained network names in texts of 8 to 71 tokens, drawn from val
    at random, which are repeated: what is right there has been found in the text."""
    model = sample.load(ROOT / FOLDER / runs.slug(run) / "ckpt.pt")[0]
    val = gpt2.open_data(ROOT / TOKENS)[2]["val"]
    rng = np.random.default_rng(0)
    texts = [np.resize(rng.choice(val, n), 256) for n in range(8, 72)]  # repeated up to 256 tokens
    texts = torch.from_numpy(np.stack(texts).astype(int))  # (64, 256)
    right = model(texts[:, :-1]).argmax(-1) == texts[:, 1:]
    return right[:, 71:].float().mean().item()  # from where every text has been read once


def train_budgets(name, rate, seed, budgets):
    """{millions of tokens: (bits per byte, share of copied tokens) at the end of a run}."""
    found = {}
    steady = None  # the run with the constant rate
    options = f"{NETWORKS[name][0]} {RUN} --data {TOKENS} --eval-tokens 16384"
    options += f" --warmup-steps 300 --eval-interval 500 --learning-rate {rate:g} --seed {seed}"
    for budget in budgets:
        steps = round(budget * 1e6 / (8 * 256))
        for kind, n in ("steady", round((1 - DECAY) * steps)), ("decayed", steps):
            run = f"{name}-{rate:g}-{seed}/{kind}-{n}"
            command = f"bench/long.py {kind} {options} --max-steps {n}"
            result = runs.train(FOLDER, run, command, begin=steady)
            if kind == "steady":
                steady = run
        found[budget] = bits([result])[0], copied(run)
    return found


def measure(pairs):
    """{(name, rate): bits per byte at the end of the first budget}."""
    settings = [(name, rate, SEEDS[0], BUDGETS[:1]) for name, rate in pairs]
    found = runs.side_by_side(lambda setting: train_budgets(*setting), settings)
    return {pair: ends[BUDGETS[0]][0] for pair, ends in zip(pairs, found)}


def main():
    prepare(DATA["full"])
    runs.copy_code(FOLDER)
    rates = {name: [rate / 2, rate, rate * 2] for name, (_, rate, _) in NETWORKS.items()}
    best = runs.best_rates(rates, measure)
    order = [(name, best[name], seed, NETWORKS[name][-1]) for name in NETWORKS for seed in SEEDS]
    ends = {name: {n: [] for n in budgets} for name, (*_, budgets) in NETWORKS.items()}
    for (name, *_), found in zip(order, runs.side_by_side(lambda one: train_budgets(*one), order)):
        for budget, end in found.items():
            ends[name][budget].append(end)  # of each seed

    titles = ["", "parameters", "rate", *(f"{budget}M tokens" for budget in BUDGETS)]
    tables = [titles], [["", *titles[3:]]]
    for name, (options, *_) in NETWORKS.items():
        tried = ", ".join(f"{rate:g}" for rate in sorted(rates[name]))
        row = [name, f"{count_parameters(options):,}", f"{best[name]:g} of {tried}"]
        of_budgets = [ends[name].get(budget, []) for budget in BUDGETS]
        losses = [", ".join(f"{loss:.3f}" for loss, _ in found) for found in of_budgets]
        shares = [", ".join(f"{share:.0%}" for _, share in found) for found in of_budgets]
        tables[0].append([*row, *losses])
        tables[1].append([name, *shares])
    runs.fill_page("long.md", "results", f"{machine()}, a thread a run.", [DATA["full"]], tables)

    def draw(figure):
        labels = "bits per byte (lower is better)", "share of copied tokens (higher is better)"
        for i, (axis, label) in enumerate(zip(figure.subplots(1, 2), labels)):
            for name, found in ends.items():
                points = [(n, statistics.mean(end[i] for end in found[n])) for n in found]
                runs.curve(axis, points, name, ls="--" if "4M" in name else "-", marker="o")
            axis.set(xscale="log", ylabel=label)
            axis.set_xticks(BUDGETS, [f"{budget}M" for budget in BUDGETS])
            axis.minorticks_off()
            axis.set_xlabel("tokens of a run, log scale; at each point its rate had fallen to zero")

    runs.picture("results/long.svg", (13, 4.5), draw)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
    else:
        main()
