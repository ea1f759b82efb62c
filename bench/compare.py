"""Every model file on the same tokens, with four layers and 1.1M parameters, three seeds each.

    make compare                   4.1M tokens a run; says how long it takes before it starts
    make compare SCALE=quick       a twentieth of it with one seed, to see that it works: into out/
    make compare SCALE=long        gpt2.py and mixer.py, two sizes, up to 50M tokens: bench/long.py

Fills in results/compare.md, which says how learning rates are chosen and what is equal, and draws
compare.svg. Bits per byte are of all of val, in the picture, too. It resumes.
"""

import importlib
import math
import os
import statistics
import sys

from runs import best_rates, curve, fill_page, final, mean_and_error, picture, train_all
from train import machine, prepare, race, shell

HOURGLASS = "conv_attention.py --n-layer 1,0,0,2,0,0,1 --widths 1,1,1 --n-head 4 --n-embd 96"
MODELS = {  # options, and where the search for a learning rate begins
    "gpt2": ("gpt2.py --n-layer 4 --n-head 4 --n-embd 112", 4e-3),
    "gpt2, 12 layers": ("gpt2.py --n-layer 12 --n-head 4 --n-embd 72", 2e-3),
    "mixer": ("mixer.py --n-layer 4 --n-embd 112 --tie-weights", 1.6e-2),
    "progressive": ("progressive.py --n-layer 4 --n-head 4 --n-embd 112", 4e-3),
    "scratch_former": ("scratch_former.py --n-layer 4 --n-head 4 --n-embd 88 --n-ff 352", 2e-3),
    "conv_attention": (f"{HOURGLASS} --ahead 1", 8e-3),
    "conv_attention, 64 ahead": (f"{HOURGLASS} --ahead 64", 1e-3),
}
FINAL = {name: options for name, (options, _) in MODELS.items()}  # as what each model ends
FINAL["progressive"] += " --stage 3 --lora-rank 0"
COMMON = "--device cpu --block-size 256 --batch-size 8 --micro-batch 8"
RUN = f"{COMMON} --warmup-steps 100 --eval-tokens 1000000 --log-interval 50"
DATA = {
    "full": "prepare_data.py python --val-fraction 0.01 --out data/compare",
    "quick": "prepare_data.py stdlib --val-fraction 0.01 --out data/quick",
}
SEEDS = (1337, 1, 2)
SCALES = {  # optimizer steps, seeds, folder of the trainings, folder of the page
    "full": (2000, SEEDS, "out/compare", "results"),
    "quick": (100, SEEDS[:1], "out/quick", "out/quick"),
}


def build(options, more=f"{COMMON} --vocab-size 4096"):
    """The network of a command, with new weights."""
    file, *words = f"{options} {more}".split()
    module = importlib.import_module(file.removesuffix(".py"))
    return module.Model(module.parse(words)[0])


def count_parameters(options):
    return sum(p.numel() for p in build(options).parameters())


def bits(runs):
    return [final(run, "bits per byte") for run in runs]


def unstable(runs):
    """{setting: bits per byte} of the settings of which a seed ends more than 0.1 bits above the
    median of all seeds."""
    ends = {setting: bits(trained) for setting, trained in runs.items()}
    above = {setting: max(ends[setting]) - statistics.median(ends[setting]) for setting in ends}
    # `not`, because inf - inf, where all diverge, is not a number.
    return {setting: ends[setting] for setting in ends if not above[setting] <= 0.1}


def compare(scale):
    """Trains all models. Returns all trainings, {(name, number of steps, rate): one of each seed},
    the rates tried, the best ones, seconds of a step, and the number of steps in equal time."""
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
        found = train_all(folder, [(*one, seed) for one in settings for seed in seeds], command)
        for setting in settings:
            runs[setting] = [found[(*setting, seed)] for seed in seeds]

    def measure(pairs):
        """{(name, rate): mean bits per byte} in half of the steps, infinite if not stable."""
        train_more([(name, half, rate) for name, rate in pairs])
        losses = {pair: statistics.mean(bits(runs[pair[0], half, pair[1]])) for pair in pairs}
        too_high = {(name, rate): math.inf for name, _, rate in unstable(runs)}  # at any length
        return losses | too_high

    while True:
        best = best_rates(rates, measure, widen=scale == "full")
        seconds = {}
        timed = {}  # where a step is more than 15% faster or slower than gpt2.py's
        for name, (_, rate) in MODELS.items():
            logs = [rows[-1] for _, rows in runs[name, half, rate]]
            seconds[name] = statistics.median(row["seconds"] / row["step"] for row in logs)
            ratio = seconds["gpt2"] / seconds[name]
            if "64 ahead" not in name and abs(math.log(ratio)) > math.log(1.15):
                timed[name] = round(ratio * steps)
        lengths = [(name, steps, best[name]) for name in MODELS]
        lengths += [(name, n, best[name]) for name, n in timed.items()]
        train_more(lengths)
        if not any(setting in unstable(runs) for setting in lengths):
            return runs, rates, best, seconds, timed


def against(runs, base):
    """Bits per byte, mean ± standard error, beside `base`: "=" if within two standard errors."""
    mean, error = mean_and_error(bits(runs))
    its_mean, its_error = mean_and_error(bits(base))
    sign = " better" if mean < its_mean else " worse"
    if abs(mean - its_mean) <= 2 * math.hypot(error, its_error):
        sign = " ="
    return f"{mean:.3f} ± {error:.3f}{'' if runs is base else sign}"


def draw(figure, trained):
    """Bits per byte over tokens of {name: runs}: the mean of the seeds, and a band."""
    axis = figure.subplots()
    for name, runs in trained.items():
        if "64" in name:  # another task
            continue
        logs = [[row for row in rows if row["val_bits_per_byte"] is not None] for _, rows in runs]
        x = [row["tokens"] / 1e6 for row in logs[0]]
        y = [[row["val_bits_per_byte"] for row in rows] for rows in zip(*logs)]  # of each seed
        means = zip(x, map(statistics.mean, y))
        color = curve(axis, [*means], name, ls="--" if "12" in name else "-")
        axis.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.25, lw=0)
    axis.set(xlabel="tokens read, millions", ylabel="bits per byte of val (lower is better)")
    axis.set_title("mean of three seeds; bands: from the lowest seed to the highest", fontsize=10)


def main(scale="full"):
    if scale == "long":
        shell("bench/long.py")
        return
    steps, seeds, _, results = SCALES[scale]
    prepare(DATA[scale])
    os.environ["OMP_NUM_THREADS"] = "1"
    speed = race([f"{MODELS['gpt2'][0]} {COMMON} --vocab-size 4096"], turns=3, steps=2)[0][0]
    # Three rates in half of the steps, then equal tokens and equal time; half as much for the rest.
    tokens = len(MODELS) * len(seeds) * (3 / 2 + 2) * steps * 8 * 256
    print(f"About {1.5 * tokens / speed / os.cpu_count() / 60:.0f} minutes in all.", flush=True)
    runs, rates, best, seconds, timed = compare(scale)

    titles = "|parameters|rate|ms per step|bits per byte, equal tokens|steps|as much time as gpt2"
    rows = [titles.split("|")]
    commands = [DATA[scale]]
    equal = {name: runs[name, steps, best[name]] for name in MODELS}
    for name, (options, _) in MODELS.items():
        tried = ", ".join(f"{rate:g}" for rate in sorted(rates[name]))
        base = equal[name] if "64" in name else equal["gpt2"]
        row = [name, f"{count_parameters(FINAL[name]):,}", f"{best[name]:g} of {tried}"]
        row += [f"{1000 * seconds[name]:.0f}", against(equal[name], base), "", ""]
        if name in timed:
            row[-2:] = timed[name], against(runs[name, timed[name], best[name]], base)
        rows.append(row)
        command = f"{options} {RUN} --data {DATA[scale].split()[-1]} --max-steps {steps}"
        commands.append(f"{command} --learning-rate {best[name]:g}")
    tokens = equal["gpt2"][0][1][-1]["tokens"] / 1e6
    text = f"{tokens:.1f}M tokens a run, {len(seeds)} seeds, {machine()}, a thread a run."
    for (name, n, rate), ends in unstable(runs).items():
        values = ", ".join(f"{value:.3f}" for value in ends)
        text += f" Not stable, so not chosen: {name} at {rate:g} in {n} steps ({values})."
    fill_page("compare.md", results, text, commands, [rows])
    picture(f"{results}/compare.svg", (9, 4.5), lambda figure: draw(figure, equal))


if __name__ == "__main__":
    main(*sys.argv[1:])
