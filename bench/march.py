"""MARCH's encoder-decoders at equal parameters, on scratch_former.py: 50 trainings, less than two hours on two cores.

MARCH (github.com/bri25yu/march) trained models of 220M parameters for 1,000 steps of a million tokens, one seed each.
Here models of 2.1M learn to write hidden spans of the standard library's sources; a vocabulary of 1,024 leaves seven
eighths of them to the blocks. Each variant has the best of three learning rates, chosen with its first seed, and two
more seeds. All are scored on the same hidden tokens. Writes results/march.md and march.svg.
"""

import statistics

from runs import GREY, ROOT, final, mean_and_error, picture, side_by_side
from train import machine, shell

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
STEPS, RATES, SEEDS = 1500, ("5e-4", "1e-3", "2e-3"), (1337, 1, 2)
COMMON = "--objective spans --n-layer 4 --n-head 4 --head-dim 32 --n-embd 128 --n-ff 512 --position relative "
COMMON += "--device cpu --data data/march --block-size 128 --batch-size 8 --micro-batch 8 --warmup-steps 300 "
COMMON += f"--label-smoothing 0 --max-steps {STEPS} --eval-interval 500 --eval-tokens 16384"


def search(submit):
    """For each variant: (the best rate, [what three trainings printed and logged])."""

    def start(name, rate, seed):
        out = f"out/march/{name.replace(',', '').replace(' ', '-')}-{rate}-{seed}"
        return submit(f"scratch_former.py {COMMON} {VARIANTS[name][0]} --learning-rate {rate} --seed {seed}", out)

    first = {name: {rate: start(name, rate, SEEDS[0]) for rate in RATES} for name in VARIANTS}
    best = {name: min(RATES, key=lambda rate: final(first[name][rate].result(), "nats")) for name in VARIANTS}
    more = {name: [start(name, best[name], seed) for seed in SEEDS[1:]] for name in VARIANTS}
    return {name: (best[name], [run.result() for run in (first[name][best[name]], *more[name])]) for name in VARIANTS}


if __name__ == "__main__":
    if not (ROOT / "data/march/meta.json").exists():
        shell("prepare_data.py stdlib --tokenizer bpe:1024 --out data/march")
    found = side_by_side(search)
    losses = {name: [final(run, "nats") for run in runs] for name, (_, runs) in found.items()}
    base = statistics.mean(losses["baseline"])
    spread = statistics.mean(statistics.variance(values) for values in losses.values()) ** 0.5  # of one run, pooled
    error = spread * (2 / len(SEEDS)) ** 0.5  # of a difference of two means
    changes = {name: statistics.mean(values) - base for name, values in losses.items() if name != "baseline"}
    table = [
        f"{STEPS:,} steps of 8 x 128 tokens of the standard library's sources, a vocabulary of 1,024, 15% hidden in "
        f"spans of three tokens on average; the best of the learning rates {', '.join(RATES)}, three seeds. Nats "
        f"per predicted token, mean ± its standard error, on all of val. {machine()}, a thread a run.\n",
        "| | options | parameters | rate | ms per step | loss | change (in standard errors) | MARCH's change |",
        "| --- " * 8 + "|",
    ]
    for (name, (options, theirs)), (rate, runs) in zip(VARIANTS.items(), found.values()):
        mean, its_error = mean_and_error(losses[name])
        ms = 1000 / STEPS * min(rows[-1]["seconds"] for _, rows in runs)
        change = f"{changes[name]:+.3f} ({changes[name] / error:+.0f})" if name in changes else ""
        table.append(f"| {name} | {options and f'`{options}`'} | {runs[0][0].split()[0]} | {rate} | {ms:.0f} "
                     f"| {mean:.3f} ± {its_error:.3f} | {change} | {theirs} |")  # fmt: skip
    table.append(
        f"\nStandard deviation of one run, pooled: {spread:.3f}; standard error of a change: {error:.3f}. The runs are "
        f"`python scratch_former.py {COMMON}` with these options, `--learning-rate`, and `--seed` {SEEDS}."
    )
    (ROOT / "results/march.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))

    def draw(figure):
        axis = figure.subplots()
        axis.errorbar([*changes.values()], [*changes], xerr=2 * error, fmt="o", color="#d2691e", capsize=3)
        axis.plot([float(VARIANTS[name][1] or "nan") for name in changes], [*changes], "D", color="#4682b4")
        axis.axvline(0, color=GREY)
        axis.invert_yaxis()
        axis.set_xlabel("change of the loss in nats, ours ± 2 standard errors; diamonds: MARCH")

    picture("results/march.svg", (8, 4), draw)
