"""Every model file on the same tokens, with as many parameters, each at its own learning rate, three seeds each.

    make compare                   4.1M tokens a run; says how long it takes before it starts: about two hours
    make compare SCALE=quick       a twelfth of it with one seed, in a quarter of an hour, to see that it works

The text is that of `prepare_data.py python`. Learning rates are searched in runs of a quarter of the length, until the
best has a worse one on either side. Next-token models whose steps are over 15% faster or slower than gpt2.py's train
once more, for as many seconds as its run takes. Steps are timed alone, on one thread (progressive.py's in stage 3, 85%
of its run). Bits per byte are of all of val. It resumes. Writes results/compare.md and results/compare.svg.
"""

import json
import math
import os
import re
import statistics
import sys

from runs import ROOT, curve, final, mean_and_error, picture, side_by_side
from train import machine, race, shell

CONV = "conv_attention.py --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 --n-head 4 --n-embd 64"
MODELS = {  # options, and where the search for a learning rate begins
    "gpt2": ("gpt2.py --n-layer 3 --n-head 4 --n-embd 128", 2e-3),
    "conv_attention": (f"{CONV} --ahead 1", 4e-3),
    "conv_attention, 64 ahead": (CONV, 2e-3),
    "progressive": ("progressive.py --n-layer 12 --n-head 4 --n-embd 72", 4e-3),
    "mixer": ("mixer.py --n-layer 3 --n-embd 128 --tie-weights", 8e-3),
    "scratch_former": ("scratch_former.py --n-layer 3 --n-head 4 --n-embd 96 --n-ff 384", 2e-3),
}
COMMON = "--device cpu --block-size 256 --batch-size 8 --micro-batch 8"
RUN = f"{COMMON} --data data/compare --warmup-steps 100 --eval-tokens 16384 --log-interval 50"
SCALES = {"full": (2000, (1337, 1, 2)), "quick": (160, (1337,))}  # optimizer steps, seeds


def step_seconds():
    """Seconds of a training step of each model, on one thread with nothing beside it."""
    file = ROOT / "out/compare/seconds.json"
    if not file.exists():
        os.environ["OMP_NUM_THREADS"] = "1"
        timed = [options + " --stage 3" * options.startswith("progressive") for options, _ in MODELS.values()]
        speeds = race([f"{options} {COMMON} --vocab-size 4096" for options in timed], turns=5, steps=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([8 * 256 / speed for speed, _ in speeds]), encoding="utf-8")
    return dict(zip(MODELS, json.loads(file.read_text(encoding="utf-8"))))


def compare(submit, steps, seeds, seconds):
    """{name: (rates tried, the best, runs at equal tokens, steps at equal time or None, runs at equal time)}."""

    def start(name, steps, rate, seed):
        command = f"{MODELS[name][0]} {RUN} --eval-interval {max(1, steps // 20)} --max-steps {steps}"
        out = f"out/compare/{name.replace(', ', '-').replace(' ', '-')}-{steps}-{rate:g}-{seed}"
        return submit(f"{command} --learning-rate {rate:g} --seed {seed}", out)

    found, short = {}, steps // 4
    tried = {n: {f * rate: start(n, short, f * rate, seeds[0]) for f in (0.5, 1, 2)} for n, (_, rate) in MODELS.items()}
    for name, runs in tried.items():
        while (best := min(runs, key=lambda rate: final(runs[rate].result(), "bits"))) in (min(runs), max(runs)):
            more = best / 2 if best == min(runs) else best * 2
            runs[more] = start(name, short, more, seeds[0])
        ratio = seconds["gpt2"] / seconds[name]
        timed = round(ratio * steps) if abs(math.log(ratio)) > math.log(1.15) and "64" not in name else None
        equal = [[start(name, n, best, seed) for seed in seeds] if n else [] for n in (steps, timed)]
        found[name] = sorted(runs), best, equal[0], timed, equal[1]
    for name, (rates, best, runs, timed, others) in found.items():
        found[name] = rates, best, [run.result() for run in runs], timed, [run.result() for run in others]
    return found


def against(runs, base):
    """Bits per byte, mean ± standard error, and how they compare with gpt2.py's: = if within two standard errors."""
    ours, theirs = ([final(run, "bits") for run in these] for these in (runs, base))
    if len(ours) < 2:
        return "".join(f"{value:.3f}" for value in ours)
    (mean, error), (other, its_error) = mean_and_error(ours), mean_and_error(theirs)
    distance, least = mean - other, 2 * (error**2 + its_error**2) ** 0.5
    sign = "" if runs == base else " =" if abs(distance) <= least else " better" if distance < 0 else " worse"
    return f"{mean:.3f} ± {error:.3f}{sign}"


def main(scale):
    steps, seeds = SCALES[scale]
    if not (ROOT / "data/compare/meta.json").exists():
        shell("prepare_data.py python --val-fraction 0.02 --out data/compare")
    seconds = step_seconds()
    evaluation, slower = 20, 1.1  # seconds for all of val; how much longer a step takes while other runs go on
    work = [(0.75 + len(seeds)) * steps * slower * s + (3 + len(seeds)) * evaluation for s in seconds.values()]
    work += [len(seeds) * (steps * slower * seconds["gpt2"] + evaluation)] * 4  # at equal time
    print(f"About {sum(work) / os.cpu_count() / 60:.0f} minutes.", flush=True)
    found = side_by_side(lambda submit: compare(submit, steps, seeds, seconds))

    base, where = found["gpt2"][2], "results" if scale == "full" else "out/compare"
    sizes = {name: re.findall("([0-9,]+) parameters", runs[0][0])[-1] for name, (_, _, runs, *_) in found.items()}
    table = [
        f"{base[0][1][-1]['tokens'] / 1e6:.1f}M tokens a run, {len(seeds)} seeds. {machine()}, a thread a run.\n",
        "| | parameters | rate | ms per step | bits per byte, equal tokens | steps | bits per byte, equal time |",
        "| --- " * 7 + "|",
        *(f"| {name} | {sizes[name]} | {best:g} of {', '.join(f'{rate:g}' for rate in rates)} "
          f"| {1000 * seconds[name]:.0f} | {against(runs, runs if '64' in name else base)} | {timed or ''} "
          f"| {against(others, base)} |"
          for name, (rates, best, runs, timed, others) in found.items()),
        "\n= : within two standard errors of gpt2.py's. conv_attention 64 ahead predicts 64 tokens at once: another "
        "task, not to be compared with the others. Each row, for one seed:\n",
        *(f"    python {MODELS[name][0]} {RUN} --max-steps {steps} --learning-rate {best:g}"
          for name, (_, best, *_) in found.items()),
    ]  # fmt: skip
    (ROOT / where / "compare.md").write_text("\n".join(table) + "\n", encoding="utf-8")

    def draw(figure):
        axis = figure.subplots()
        for name, (_, _, runs, *_) in found.items():
            rows = [[row for row in rows if row["val_bits_per_byte"]] for _, rows in runs]
            x = [row["tokens"] / 1e6 for row in rows[0]]
            values = [[row["val_bits_per_byte"] for row in same] for same in zip(*rows)]  # of all seeds, at each x
            color = curve(axis, [*zip(x, map(statistics.mean, values))], name)
            axis.fill_between(x, [*map(min, values)], [*map(max, values)], color=color, alpha=0.25, lw=0)
        axis.set(xlabel="tokens read, millions", ylabel="validation bits per byte", ylim=(None, 3))

    picture(f"{where}/compare.svg", (9, 4.5), draw)
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "full")
