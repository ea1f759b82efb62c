"""Every model file on the same tokens, with four layers and 1.1M parameters, three seeds each.

    make compare                   4.1M tokens a run; says how long it takes before it starts
    make compare SCALE=quick       a twentieth of it with one seed, to see that it works: into out/
    make compare SCALE=long        gpt2.py and mixer.py, two sizes, up to 50M tokens: bench/long.py

The text is that of `prepare_data.py python`. Each model has its own learning rate. It is searched
in runs of half the length, with all seeds, until the best one has a worse one on either side. A
rate at which one of the seeds ends more than 0.1 bits above their median is not stable, and not
chosen. Next-token models whose steps are over 15% faster or slower than gpt2.py's train once more,
for as many seconds as its run takes. Steps are timed alone, on one thread. Bits per byte, in the
table and in the picture, are of all of val. It resumes. Writes results/compare.md and compare.svg.
"""

import importlib
import json
import math
import os
import statistics
import sys

from runs import (
    ROOT,
    best_rates,
    curve,
    final,
    mean_and_error,
    picture,
    prepare,
    table,
    train_all,
    write_page,
)
from train import machine, race, shell

HOURGLASS = "conv_attention.py --n-layer 1,0,0,2,0,0,1 --widths 1,1,1 --n-head 4 --n-embd 96"
MODELS = {  # options, and where the search for a learning rate begins
    "gpt2": ("gpt2.py --n-layer 4 --n-head 4 --n-embd 112", 2e-3),
    "gpt2, 12 layers": ("gpt2.py --n-layer 12 --n-head 4 --n-embd 72", 2e-3),
    "mixer": ("mixer.py --n-layer 4 --n-embd 112 --tie-weights", 1.6e-2),
    "progressive": ("progressive.py --n-layer 4 --n-head 4 --n-embd 112", 4e-3),
    "scratch_former": ("scratch_former.py --n-layer 4 --n-head 4 --n-embd 88 --n-ff 352", 2e-3),
    "conv_attention": (f"{HOURGLASS} --ahead 1", 8e-3),
    "conv_attention, 64 ahead": (f"{HOURGLASS} --ahead 64", 1e-3),
}
ENDS_AS = {"progressive": "--stage 3 --lora-rank 0"}  # the network that it is in the end
COMMON = "--device cpu --block-size 256 --batch-size 8 --micro-batch 8"
RUN = f"{COMMON} --warmup-steps 100 --eval-tokens 1000000 --log-interval 50"
DATA = {
    "full": "prepare_data.py python --val-fraction 0.01 --out data/compare",
    "quick": "prepare_data.py stdlib --val-fraction 0.01 --out data/quick",
}
SCALES = {  # optimizer steps, seeds, folder of the trainings, folder of the page
    "full": (2000, (1337, 1, 2), "out/compare", "results"),
    "quick": (100, (1337,), "out/quick", "out/quick"),
}
TEXT = """
Equal: the tokens, their order, four layers (blocks), the parameters within 5%, the optimizer, the
warm-up. gpt2, mixer and progressive have width 112. Not equal: "gpt2, 12 layers" has width 72, and
shows what shape alone does. scratch_former has width 88, because its head is a matrix of its own.
conv_attention has width 96, because compressing and expanding need matrices, too; two of its four
layers are at full length, two where the text is 64 times shorter. progressive has 1, then 2, then 4
blocks, with LoRA from the second stage on. It is compared as the network that it ends as: its
parameters are counted, its steps timed and its val scored in the last stage.

= : within two standard errors of gpt2.py's. conv_attention 64 ahead predicts 64 tokens at once:
another task, which is not to be compared with the other rows.
"""


def build(options, more=f"{COMMON} --vocab-size 4096"):
    """The network of a command, with new weights."""
    file, *words = f"{options} {more}".split()
    module = importlib.import_module(file.removesuffix(".py"))
    cfg = module.parse(words)[0]
    return module.Model(cfg)


def count_parameters(name):
    model = build(f"{MODELS[name][0]} {ENDS_AS.get(name, '')}")
    return sum(p.numel() for p in model.parameters())


def time_steps(folder):
    """Seconds of a training step of each model, on one thread with nothing beside it."""
    file = ROOT / folder / "seconds.json"
    if not file.exists():
        os.environ["OMP_NUM_THREADS"] = "1"
        options = [f"{MODELS[name][0]} {ENDS_AS.get(name, '')}" for name in MODELS]
        speeds = race([f"{text} {COMMON} --vocab-size 4096" for text in options], turns=5, steps=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([8 * 256 / speed for speed, _ in speeds]), encoding="utf-8")
    return dict(zip(MODELS, json.loads(file.read_text(encoding="utf-8"))))


def steps_in_equal_time(name, steps, seconds):
    """As many steps as take the time of gpt2.py's, or None if it is not asked for."""
    ratio = seconds["gpt2"] / seconds[name]
    if "64 ahead" in name or abs(math.log(ratio)) < math.log(1.15):
        return None
    return round(ratio * steps)


def minutes(lengths, steps, seeds, seconds):
    """How long it will take, if three rates are enough for each model."""
    evaluation = 8  # seconds for all of val
    slower = 1.1  # than alone, while another run goes on
    half = [(name, steps // 2) for name in MODELS]
    work = 0
    for name, n in 3 * half + lengths:
        n_evaluations = 3 if n == steps // 2 else 9
        work += len(seeds) * (n * seconds[name] * slower + n_evaluations * evaluation)
    return work / os.cpu_count() / 60


def bits(runs):
    return [final(run, "bits") for run in runs]


def unstable(values):
    """Whether one of the seeds ends more than 0.1 bits above their median."""
    return not max(values) - statistics.median(values) <= 0.1


def compare(scale, lengths):
    """Trains each model for its lengths (name, number of steps) at its best rate. Returns all
    trainings, {(name, number of steps, rate): one of each seed}, the rates tried and the best."""
    steps, seeds, folder, _ = SCALES[scale]
    half = steps // 2
    runs = {}
    rates = {name: [rate / 2, rate, rate * 2] for name, (_, rate) in MODELS.items()}

    def command(name, n, rate, seed):
        every = half if n == half else steps // 8
        text = f"{MODELS[name][0]} {RUN} --data {DATA[scale].split()[-1]} --max-steps {n}"
        return f"{text} --eval-interval {every} --learning-rate {rate:g} --seed {seed}"

    def train_more(settings):
        settings = [setting for setting in settings if setting not in runs]
        every_seed = [(*setting, seed) for setting in settings for seed in seeds]
        found = train_all(folder, every_seed, command)
        for setting in settings:
            runs[setting] = [found[(*setting, seed)] for seed in seeds]

    def measure(rates):
        """{name: {rate: mean bits per byte}} in half of the steps, infinite if not stable."""
        train_more([(name, half, rate) for name in rates for rate in rates[name]])
        losses = {name: {} for name in rates}
        for name, n, rate in runs:
            if n == half:
                losses[name][rate] = statistics.mean(bits(runs[name, n, rate]))
        for name, n, rate in runs:  # of any length
            if unstable(bits(runs[name, n, rate])):
                losses[name][rate] = math.inf
        return losses

    while True:
        best = best_rates(rates, measure, widen=scale == "full")
        train_more([(name, n, best[name]) for name, n in lengths])
        if not any(unstable(bits(runs[name, n, best[name]])) for name, n in lengths):
            return runs, rates, best


def against(runs, base):
    """Bits per byte, mean ± standard error, and how they compare with gpt2.py's: "=" if they are
    within two standard errors."""
    ours = bits(runs)
    if len(ours) == 1:
        return f"{ours[0]:.3f}"
    mean, error = mean_and_error(ours)
    its_mean, its_error = mean_and_error(bits(base))
    sign = " better" if mean < its_mean else " worse"
    if abs(mean - its_mean) <= 2 * math.hypot(error, its_error):
        sign = " ="
    if runs is base:
        sign = ""
    return f"{mean:.3f} ± {error:.3f}{sign}"


def draw(figure, trained):
    """Bits per byte over tokens of {name: runs}: the mean of the seeds, and a band."""
    axis = figure.subplots()
    for name, runs in trained.items():
        if "64" in name:  # another task
            continue
        points = {}  # millions of tokens: bits per byte of all seeds
        for _, rows in runs:
            for row in rows:
                if row["val_bits_per_byte"] is not None:
                    points.setdefault(row["tokens"] / 1e6, []).append(row["val_bits_per_byte"])
        means = [(x, statistics.mean(values)) for x, values in points.items()]
        color = curve(axis, means, name, ls="--" if "12" in name else "-")
        low, high = zip(*((min(values), max(values)) for values in points.values()))
        axis.fill_between([*points], low, high, color=color, alpha=0.25, lw=0)
    axis.set_xlabel("tokens read, millions")
    axis.set_ylabel("bits per byte of val (lower is better)")
    axis.set_title("mean of three seeds; bands: from the lowest seed to the highest", fontsize=10)


def main(scale):
    if scale == "long":
        shell("bench/long.py")
        return
    steps, seeds, folder, results = SCALES[scale]
    prepare(DATA[scale])
    seconds = time_steps(folder)
    timed = {name: steps_in_equal_time(name, steps, seconds) for name in MODELS}
    lengths = [(name, steps) for name in MODELS]
    lengths += [(name, n) for name, n in timed.items() if n]
    print(f"About {minutes(lengths, steps, seeds, seconds):.0f} minutes.", flush=True)
    runs, rates, best = compare(scale, lengths)

    equal = {name: runs[name, steps, best[name]] for name in MODELS}
    rows = []
    for name in MODELS:
        tried = ", ".join(f"{rate:g}" for rate in sorted(rates[name]))
        base = equal[name] if "64" in name else equal["gpt2"]
        row = [name, f"{count_parameters(name):,}", f"{best[name]:g} of {tried}"]
        row += [f"{1000 * seconds[name]:.0f}", against(equal[name], base)]
        if timed[name]:
            row += [timed[name], against(runs[name, timed[name], best[name]], base)]
        else:
            row += ["", ""]
        rows.append(row)
    tokens = equal["gpt2"][0][1][-1]["tokens"] / 1e6
    titles = ["", "parameters", "rate", "ms per step", "bits per byte, equal tokens"]
    titles += ["steps", "bits per byte, equal time"]
    page = [f"{tokens:.1f}M tokens a run, {len(seeds)} seeds. {machine()}, a thread a run.", ""]
    page += [*table(titles, rows), TEXT]
    for (name, n, rate), found in runs.items():
        if unstable(bits(found)):
            ends = ", ".join(f"{value:.3f}" for value in bits(found))
            page.append(f"Not stable, not chosen: {name} at {rate:g} in {n} steps: {ends}.\n")
    page.append(f"Each row, for one seed:\n\n    python {DATA[scale]}")
    for name, (options, _) in MODELS.items():
        command = f"{options} {RUN} --data {DATA[scale].split()[-1]} --max-steps {steps}"
        page.append(f"    python {command} --learning-rate {best[name]:g}")
    write_page(f"{results}/compare.md", page)
    picture(f"{results}/compare.svg", (9, 4.5), lambda figure: draw(figure, equal))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["full"])
