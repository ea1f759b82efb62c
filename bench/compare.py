"""Every model file on the same tokens, with as many parameters, each at its own learning rate, three seeds each.

    make compare                   4.1M tokens a run; says how long it takes before it starts: two to three hours
    make compare SCALE=quick       a twelfth of it with one seed, in ten minutes, to see that it works

The text is `prepare_data.py python`: the standard library's sources and those of the packages in requirements.txt. Each
model searches its learning rate in runs of a quarter of the length, until the best one has a worse one on either side.
Models whose step takes 15% more or less time than gpt2.py's train a second time, for as many seconds as gpt2.py's run.
Steps are timed alone, on one thread; then as many runs as there are cores go on side by side, a thread each. Bits per
byte are of all of val. An interrupted comparison resumes. Writes results/compare.md and results/compare.svg.
"""

import argparse
import json
import os
import statistics

from runs import ROOT, curve, mean_and_error, picture, side_by_side
from train import machine, race, shell

MODELS = {  # options, and where the search for a learning rate begins
    "gpt2": ("gpt2.py --n-layer 3 --n-head 4 --n-embd 128", 4e-3),
    "conv_attention": (
        "conv_attention.py --ahead 1 --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 --n-head 4 --n-embd 64",
        4e-3,
    ),
    "conv_attention, 64 ahead": (
        "conv_attention.py --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 --n-head 4 --n-embd 64",
        2e-3,
    ),
    "progressive": ("progressive.py --n-layer 12 --n-head 4 --n-embd 72", 4e-3),
    "mixer": ("mixer.py --n-layer 3 --n-embd 128 --tie-weights", 8e-3),
    "scratch_former": ("scratch_former.py --n-layer 3 --n-head 4 --n-embd 96 --n-ff 384", 2e-3),
}
COMMON = "--device cpu --block-size 256 --batch-size 8 --micro-batch 8"
RUN = "--data data/compare --warmup-steps 100 --eval-tokens 16384 --log-interval 50"
SCALES = {"full": (2000, (1337, 1, 2)), "quick": (160, (1337,))}


def bits(run):
    """Bits per byte of all of val."""
    return float(run[0].split("nats per token, ")[1].split()[0])


def step_seconds():
    """Seconds of a training step of each model, on one thread with nothing beside it."""
    file = ROOT / "out/compare/seconds.json"
    if not file.exists():
        os.environ["OMP_NUM_THREADS"] = "1"
        speeds = race([f"{options} {COMMON} --vocab-size 4096" for options, _ in MODELS.values()], turns=5, steps=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([8 * 256 / speed for speed, _ in speeds]), encoding="utf-8")
    return dict(zip(MODELS, json.loads(file.read_text(encoding="utf-8"))))


def compare(submit, steps, seeds, seconds):
    """{name: (rates tried, the best of them, runs at equal tokens, (steps, runs) at equal time or None)}."""

    def start(name, steps, rate, seed):
        command = f"{MODELS[name][0]} {COMMON} {RUN} --eval-interval {max(1, steps // 20)} --max-steps {steps}"
        out = f"out/compare/{name.replace(', ', '-').replace(' ', '-')}-{steps}-{rate:g}-{seed}"
        return submit(f"{command} --learning-rate {rate:g} --seed {seed}", out)

    found, short = {}, steps // 4
    tried = {n: {f * rate: start(n, short, f * rate, seeds[0]) for f in (0.5, 1, 2)} for n, (_, rate) in MODELS.items()}
    for name, runs in tried.items():
        while True:
            best = min(runs, key=lambda rate: bits(runs[rate].result()))
            if min(runs) < best < max(runs):
                break
            more = best / 2 if best == min(runs) else best * 2
            runs[more] = start(name, short, more, seeds[0])
        equal, ratio = None, seconds["gpt2"] / seconds[name]
        if not 1 / 1.15 < ratio < 1.15:
            equal = round(ratio * steps), [start(name, round(ratio * steps), best, seed) for seed in seeds]
        found[name] = sorted(runs), best, [start(name, steps, best, seed) for seed in seeds], equal
    return {
        name: (rates, best, [run.result() for run in runs], equal and (equal[0], [run.result() for run in equal[1]]))
        for name, (rates, best, runs, equal) in found.items()
    }


def against(ours, base):
    """Bits per byte, mean ± standard error, and how they compare with gpt2.py's: = if within two standard errors."""
    if len(ours) == 1:
        return f"{ours[0]:.3f}"
    (mean, error), (other, its_error) = mean_and_error(ours), mean_and_error(base)
    distance = mean - other
    sign = "=" if abs(distance) <= 2 * (error**2 + its_error**2) ** 0.5 else "better" if distance < 0 else "worse"
    return f"{mean:.3f} ± {error:.3f}" + (f" {sign}" if ours != base else "")


def main(scale):
    steps, seeds = SCALES[scale]
    if not (ROOT / "data/compare/meta.json").exists():
        shell("prepare_data.py python --val-fraction 0.02 --out data/compare")
    seconds = step_seconds()
    evaluate, slower = 40, 1.5  # seconds for all of val; steps take longer while other runs go on
    units = [(0.75 + len(seeds)) * steps * slower * s + (3 + len(seeds)) * evaluate for s in seconds.values()]
    units += [len(seeds) * (steps * slower * seconds["gpt2"] + evaluate)] * 4  # at equal time
    print(f"About {sum(units) / os.cpu_count() / 60:.0f} minutes.", flush=True)
    found = side_by_side(lambda submit: compare(submit, steps, seeds, seconds))

    base, rows = [bits(run) for run in found["gpt2"][2]], []
    for name, (rates, best, runs, equal) in found.items():
        others = ", ".join(f"{rate:g}" for rate in rates)
        timed = f"{equal[0]:,} | {against([bits(run) for run in equal[1]], base)}" if equal else "|"
        rows.append(f"| {name} | {runs[0][0].split()[0]} | {best:g} of {others} | {1000 * seconds[name]:.0f} "
                    f"| {against([bits(run) for run in runs], base)} | {timed} |")  # fmt: skip
    tokens = found["gpt2"][2][0][1][-1]["tokens"]
    table = [
        f"{tokens / 1e6:.1f}M tokens a run, {len(seeds)} seeds. {machine()}, a thread a run.\n",
        "| | parameters | rate | ms per step | bits per byte, equal tokens | steps | bits per byte, equal time |",
        "| --- " * 7 + "|",
        *rows,
        "\n= : within two standard errors of gpt2.py's. conv_attention 64 ahead predicts 64 tokens at once: another "
        "task, not to be compared with the others. Each row, for one seed:\n",
        *(f"    python {MODELS[name][0]} {COMMON} {RUN} --max-steps {steps} --learning-rate {best:g}"
          for name, (_, best, _, _) in found.items()),
    ]  # fmt: skip
    where = "results" if scale == "full" else "out/compare"
    (ROOT / where / "compare.md").write_text("\n".join(table) + "\n", encoding="utf-8")

    def draw(figure):
        axis = figure.subplots()
        for name, (_, _, runs, _) in found.items():
            curves = [
                [(r["tokens"], r["val_bits_per_byte"]) for r in rows if r["val_bits_per_byte"]] for _, rows in runs
            ]
            x = [tokens / 1e6 for tokens, _ in curves[0]]
            values = [*zip(*([value for _, value in curve] for curve in curves))]
            color = curve(axis, [*zip(x, map(statistics.mean, values))], name)
            axis.fill_between(x, [*map(min, values)], [*map(max, values)], color=color, alpha=0.25, lw=0)
        axis.set_xlabel("tokens read, millions")
        axis.set_ylabel("validation bits per byte")

    picture(f"{where}/compare.svg", (9, 4.5), draw)
    print("\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="(default: %(default)s)")
    main(parser.parse_args().scale)
