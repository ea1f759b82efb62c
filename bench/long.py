"""Does attention overtake the mixer? gpt2.py and mixer.py at two sizes, on 4M to 50M tokens.

    make compare SCALE=long

One run with a constant rate serves four budgets: at 80% of each of them a copy of it begins, in
which the rate falls linearly to zero. Rates are searched at the first budget with the first seed.
The second seed follows, as far as six hours allow. Fills in results/long.md and draws long.svg.
"""

import importlib
import statistics
import sys
import threading
import time

from compare import DATA, MODELS, RUN, bits, count_parameters
from runs import RUNNING, best_rates, copy_code, curve, fill_page, picture, side_by_side, train
from train import ROOT, machine, prepare

FOLDER = "out/long"
LIMIT = 6 * 3600  # seconds
CLOCK = ROOT / FOLDER / "seconds"
BEGAN = time.monotonic() - (float(CLOCK.read_text() or 0) if CLOCK.exists() else 0.0)
BUDGETS = (4, 12, 25, 50)  # millions of tokens
DECAY = 0.2  # of a budget
SEEDS = (1337, 1)
NETWORKS = {  # options, and where the search for a learning rate begins
    "gpt2, 1.1M": (MODELS["gpt2"][0], 2e-3),
    "mixer, 1.1M": (MODELS["mixer"][0], 8e-3),
    "gpt2, 4M": ("gpt2.py --n-layer 4 --n-head 8 --n-embd 256", 1e-3),
    "mixer, 4M": ("mixer.py --n-layer 4 --n-embd 288 --tie-weights", 4e-3),
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


def spent():
    """The seconds that this program has run, those before an interruption included."""
    return time.monotonic() - BEGAN


def clock():
    """Writes down the time, and ends the trainings when it is over."""
    while spent() < LIMIT:
        CLOCK.write_text(str(spent()))
        time.sleep(10)
    for child in RUNNING.copy():
        child.terminate()


def train_budgets(name, rate, seed, budgets=BUDGETS):
    """{millions of tokens: bits per byte at the end of a run}, as far as time allows."""
    found = {}
    steady = None  # the run with the constant rate
    options = f"{NETWORKS[name][0]} {RUN} --data {DATA['full'].split()[-1]} --eval-tokens 16384"
    options += f" --warmup-steps 300 --eval-interval 500 --learning-rate {rate:g} --seed {seed}"
    for budget in budgets:
        steps = round(budget * 1e6 / (8 * 256))
        for kind, n in ("steady", round((1 - DECAY) * steps)), ("decayed", steps):
            run = f"{name}-{rate:g}-{seed}/{kind}-{n}"
            try:
                command = f"bench/long.py {kind} {options} --max-steps {n}"
                result = train(FOLDER, run, command, begin=steady, start=spent() < LIMIT)
            except ChildProcessError:
                if spent() < LIMIT:
                    raise
                return found  # `clock` has ended it
            if kind == "steady":
                steady = run
        found[budget] = bits([result])[0]
    return found


def measure(pairs):
    """{(name, rate): bits per byte at the end of the first budget}."""
    found = side_by_side(lambda pair: train_budgets(*pair, SEEDS[0], BUDGETS[:1]), pairs)
    return {pair: values[BUDGETS[0]] for pair, values in zip(pairs, found)}


def main():
    prepare(DATA["full"])
    copy_code(FOLDER)
    print(f"At most {LIMIT / 3600:.0f} hours, of which {spent() / 3600:.1f} are over.", flush=True)
    threading.Thread(target=clock, daemon=True).start()
    rates = {name: [rate / 2, rate, rate * 2] for name, (_, rate) in NETWORKS.items()}
    best = best_rates(rates, measure)
    runs = [(name, best[name], seed) for seed in SEEDS for name in NETWORKS]
    points = {name: {} for name in NETWORKS}  # {name: {budget: bits per byte of each seed}}
    for (name, *_), found in zip(runs, side_by_side(lambda run: train_budgets(*run), runs)):
        for budget, value in found.items():
            points[name].setdefault(budget, []).append(value)

    rows = [["", "parameters", "rate", *(f"{budget}M tokens" for budget in BUDGETS)]]
    for name, (options, _) in NETWORKS.items():
        tried = ", ".join(f"{rate:g}" for rate in sorted(rates[name]))
        row = [name, f"{count_parameters(options):,}", f"{best[name]:g} of {tried}"]
        ends = [points[name].get(budget, []) for budget in BUDGETS]
        rows.append([*row, *(", ".join(f"{value:.3f}" for value in values) for values in ends)])
    fill_page("long.md", "results", f"{machine()}, a thread a run.", [DATA["full"]], [rows])

    def draw(figure):
        axis = figure.subplots()
        for name, values in points.items():
            style = dict(ls="--" if "4M" in name else "-", marker="o")
            curve(axis, [(n, statistics.mean(found)) for n, found in values.items()], name, **style)
        axis.set(xscale="log", ylabel="bits per byte of val (lower is better)")
        axis.set_xticks(BUDGETS, [f"{budget}M" for budget in BUDGETS])
        axis.minorticks_off()
        axis.set_xlabel("tokens of a run, log scale; at each point its rate had fallen to zero")

    picture("results/long.svg", (9, 4.5), draw)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
    else:
        main()
