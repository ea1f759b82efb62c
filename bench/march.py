"""MARCH's encoder-decoders at equal parameters, on scratch_former.py: 60 trainings or more.

MARCH (github.com/bri25yu/march) trained models of 220M parameters for 1,000 steps of a million
tokens, one seed each. Here models of 2.1M learn to write hidden spans of the standard library's
sources; a vocabulary of 1,024 leaves seven eighths of them to the blocks. Each variant has the best
of four learning rates, chosen with its first seed, and two more seeds. If the best rate is the
lowest or the highest, the next one is tried, too. All are scored on the same hidden tokens. It
resumes. Writes results/march.md and march.svg.
"""

import statistics

from runs import (
    COLORS,
    GREY,
    best_rates,
    final,
    mean_and_error,
    picture,
    prepare,
    table,
    train_all,
    write_page,
)
from train import machine

VARIANTS = {  # what differs, and MARCH's change of the loss at step 1,000, where it gives a number
    "baseline": ("", ""),
    "more heads, fewer layers": ("--n-layer 2 --n-head 13 --n-ff 544", "-0.051"),
    "and no cross-attention keys and values": ("--n-layer 2 --n-head 16 --no-cross-kv", ""),
    "wider, fewer layers": ("--n-layer 2 --n-embd 192 --n-ff 720", "-0.212"),
    "wider, more heads, fewer layers": ("--n-layer 2 --n-head 8 --n-embd 160 --n-ff 608", ""),
    "GEGLU": ("--ff geglu", "-0.064"),
    "SwiGLU": ("--ff swiglu", "-0.061"),
    "sinusoid positions": ("--position sinusoid", ""),
    "learned positions": ("--position learned", ""),
    "rotary positions": ("--position rotary", ""),
}
STEPS = 1500
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
SEEDS = (1337, 1, 2)
FOLDER = "out/march"
PREPARE = "prepare_data.py stdlib --tokenizer bpe:1024 --out data/march"
COMMON = "--objective spans --n-layer 4 --n-head 4 --head-dim 32 --n-embd 128 --n-ff 512 "
COMMON += "--position relative --device cpu --data data/march --block-size 128 --batch-size 8 "
COMMON += "--micro-batch 8 --warmup-steps 300 --label-smoothing 0 --eval-interval 500 "
COMMON += f"--eval-tokens 16384 --max-steps {STEPS}"


def command(name, rate, seed):
    return f"scratch_former.py {COMMON} {VARIANTS[name][0]} --learning-rate {rate:g} --seed {seed}"


def search():
    """{variant: (the rates that were tried, the best one, its runs with all seeds)}."""
    rates = {name: [*RATES] for name in VARIANTS}

    def measure(rates):
        settings = [(name, rate, SEEDS[0]) for name in rates for rate in rates[name]]
        losses = {name: {} for name in rates}
        for (name, rate, _), run in train_all(FOLDER, settings, command).items():
            losses[name][rate] = final(run, "nats")
        return losses

    best = best_rates(rates, measure)
    settings = [(name, best[name], seed) for name in VARIANTS for seed in SEEDS]
    runs = train_all(FOLDER, settings, command)
    found = {}
    for name in VARIANTS:
        found[name] = sorted(rates[name]), best[name], [runs[name, best[name], s] for s in SEEDS]
    return found


def draw(figure, changes, error):
    axis = figure.subplots()
    names = [*changes]
    color = COLORS["scratch_former"]
    bars = dict(xerr=2 * error, fmt="o", color=color, capsize=3, label="ours ± 2 standard errors")
    axis.errorbar([*changes.values()], names, **bars)
    theirs = [float(VARIANTS[name][1] or "nan") for name in names]
    axis.plot(theirs, names, "D", color=GREY, label="MARCH, one seed")
    axis.axvline(0, color=GREY)
    axis.invert_yaxis()
    axis.set_xlabel("change of the loss in nats per predicted token (further left is better)")
    axis.set_ylabel("what differs from the baseline")
    axis.legend(frameon=False)


def main():
    prepare(PREPARE)
    found = search()
    losses = {name: [final(run, "nats") for run in runs] for name, (_, _, runs) in found.items()}
    base = statistics.mean(losses["baseline"])
    # The standard deviation of one run, pooled over all variants, and the standard error of the
    # difference of two means.
    spread = statistics.mean(statistics.variance(values) for values in losses.values()) ** 0.5
    error = spread * (2 / len(SEEDS)) ** 0.5
    changes = {name: statistics.mean(losses[name]) - base for name in VARIANTS}
    del changes["baseline"]

    rows = []
    for name, (rates, best, runs) in found.items():
        options, theirs = VARIANTS[name]
        mean, its_error = mean_and_error(losses[name])
        ms = 1000 / STEPS * min(run_log[-1]["seconds"] for _, run_log in runs)
        change = ""
        if name in changes:
            change = f"{changes[name]:+.3f} ({changes[name] / error:+.0f})"
        tried = ", ".join(f"{rate:g}" for rate in rates)
        row = [name, options and f"`{options}`", runs[0][0].split()[0], f"{best:g} of {tried}"]
        rows.append([*row, f"{ms:.0f}", f"{mean:.3f} ± {its_error:.3f}", change, theirs])
    titles = ["", "options", "parameters", "rate", "ms per step", "loss"]
    titles += ["change (in standard errors)", "MARCH's change"]
    page = [
        f"{STEPS:,} steps of 8 x 128 tokens of the standard library's sources, a vocabulary of "
        "1,024, 15% hidden in spans of three tokens on average; the best learning rate of those "
        "given, three seeds. Nats per predicted token, mean ± its standard error, on all of val. "
        f"{machine()}, a thread a run.",
        "",
        *table(titles, rows),
        "",
        f"Standard deviation of one run, pooled: {spread:.3f}; standard error of a change: "
        f"{error:.3f}. Each row, with its options, its `--learning-rate`, and `--seed` {SEEDS}:",
        "",
        f"    python {PREPARE}",
        f"    python scratch_former.py {COMMON}",
    ]
    write_page("results/march.md", page)
    picture("results/march.svg", (9, 4.5), lambda figure: draw(figure, changes, error))


if __name__ == "__main__":
    main()
