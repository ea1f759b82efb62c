"""What is a line worth? A model is trained with a line replaced, or with other options.

    make ablate                gpt2.py: results/ablations.md; three hours on two cores
    make ablate SCALE=quick    a tenth of it with one seed, to see that it works: into out/
    make march                 the encoder-decoders of MARCH: results/march.md
    python bench/ablate.py stages      when progressive.py grows, at which rank: results/stages.md

The tables of these pages say what is done: a name; texts of the model file; what stands there
instead, and options ("--..."); a remark. This program trains each row, fills in the other cells,
compares them with the table's first row, and draws the first table. It resumes.
"""

import math
import re
import sys

import runs
from compare import DATA, MODELS, RUN, SEEDS
from pictures import write_tokens
from train import ROOT, machine, prepare, replace

SPANS = "scratch_former.py --objective spans --n-layer 4 --n-head 4 --head-dim 32 --n-embd 128 "
SPANS += "--n-ff 512 --position relative --label-smoothing 0 --device cpu --block-size 128 "
SPANS += "--batch-size 8 --micro-batch 8 --warmup-steps 300 --eval-tokens 16384"
FEWER = RUN.replace("--eval-tokens 1000000", "--eval-tokens 16384")
GPT2 = f"{MODELS['gpt2'][0]} {FEWER}"
GROWING = f"{MODELS['progressive'][0]} {FEWER}"
RATE = MODELS["gpt2"][1]
SPAN_DATA = "prepare_data.py stdlib --tokenizer bpe:1024 --out data/march"
EXPERIMENTS = {  # page, data, command, steps, learning rates to begin with, seeds, unit of the loss
    "full": ("ablations", DATA["full"], GPT2, 977, [RATE], SEEDS, "bits per byte"),
    "quick": ("ablations", DATA["quick"], GPT2, 100, [RATE], SEEDS[:1], "bits per byte"),
    "march": ("march", SPAN_DATA, SPANS, 1500, [5e-4, 1e-3], SEEDS, "nats per token"),
    "stages": ("stages", DATA["full"], GROWING, 1000, [1e-3, 2e-3, 4e-3], SEEDS, "bits per byte"),
}


def read_tables(page):
    """The tables of results/PAGE.md: each a list of the titles and the rows' first four cells."""
    text = (ROOT / f"results/{page}.md").read_text(encoding="utf-8")
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        tables.append([rows[0], *(cells[:4] for cells in rows[2:])])
    return tables


def read_row(old, new, remark):
    """([(text of the model file, text instead)], options) of the cells of a row."""
    old, new = (re.findall("`([^`]+)`", cell) for cell in (old, new))
    options = " ".join(code for code in new if code.startswith("--"))
    old, new = ([code for code in codes if not code.startswith("--")] for codes in (old, new))
    return [*zip(old, new, strict=True)], options


def train_rows(rows, scale, folder):
    """{name of a row: (the rates that were tried, the best one, its trainings with all seeds)}."""
    _, data, command, steps, rates, seeds, unit = EXPERIMENTS[scale]
    data = data.split()[-1]
    file, options = command.split(" ", 1)
    options += f" --data {data} --max-steps {steps} --eval-interval {steps // 2}"
    runs.copy_code(folder)
    code = ROOT / folder / "code"
    more = {}
    for name, *cells in rows:
        changes, more[name] = read_row(*cells)
        text = replace((code / file).read_text(encoding="utf-8"), changes, name)
        (code / runs.slug(name)).mkdir(exist_ok=True)
        (code / runs.slug(name) / file).write_text(text, encoding="utf-8")

    def command_of(name, rate, seed):
        run = f"{runs.slug(name)}/{file} {options} {more[name].replace('data/compare', data)}"
        return f"{run} --learning-rate {rate:g} --seed {seed}"

    def losses(pairs):
        found = runs.train_all(folder, [(*pair, seeds[0]) for pair in pairs], command_of)
        return {(name, rate): runs.final(run, unit) for (name, rate, _), run in found.items()}

    tried = {name: [*rates] for name in more}
    best = runs.best_rates(tried, losses, widen=len(rates) > 1)
    settings = [(name, best[name], seed) for name in more for seed in seeds]
    found = runs.train_all(folder, settings, command_of)
    of_seeds = {name: [found[name, best[name], seed] for seed in seeds] for name in more}
    return {name: (sorted(tried[name]), best[name], of_seeds[name]) for name in more}


def measure(found, base, unit):
    """What is filled in for a row, its change against the row `base`, and the standard error."""
    rates, best, trained = found
    mean, its_error = runs.mean_and_error([runs.final(run, unit) for run in trained])
    base_mean, base_error = runs.mean_and_error([runs.final(run, unit) for run in base[2]])
    delta = mean - base_mean
    error = math.hypot(its_error, base_error)
    note = ", no effect at this size" if abs(delta) <= 2 * error else ""
    n_params = trained[0][0].split()[0]  # the first word that a training prints
    ms = min(1000 * rows[-1]["seconds"] / rows[-1]["step"] for _, rows in trained)
    of = f" of {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
    cells = [n_params, f"{best:g}{of}", f"{ms:.0f}", f"{mean:.3f} ± {its_error:.3f}"]
    return [*cells, "" if found is base else f"{delta:+.3f} ± {error:.3f}{note}"], delta, error


def draw(figure, changes, theirs, file, unit):
    """Dots with error bars of {name: (change, its standard error)}; diamonds: {name: change}."""
    axis = figure.subplots()
    names = sorted(changes, key=lambda name: changes[name][0])
    means, errors = zip(*(changes[name] for name in names))
    bars = dict(fmt="o", color=runs.COLORS[file], capsize=3, label="here, ± 2 standard errors")
    axis.errorbar(means, names, xerr=[2 * error for error in errors], **bars)
    if theirs:
        label = "the source, one seed"
        axis.plot([*theirs.values()], [*theirs], "D", color=runs.GREY, label=label)
    axis.axvline(0, color=runs.GREY, label=f"{file}.py as it is")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axis.set_xscale("symlog", linthresh=0.02)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=f"change of {unit} (further left is better)", ylabel="what is changed")


def main(scale="full"):
    page, data, command, steps, _, seeds, unit = EXPERIMENTS[scale]
    folder = f"out/{page}-quick" if scale == "quick" else f"out/{page}"
    results = folder if scale == "quick" else "results"
    prepare(data)
    if page == "ablations":  # what single rows need
        prepare(data.replace("--out", "--tokenizer bytes --out") + "-bytes")
        write_tokens("iid", 4, lambda rng, *size: [rng.integers(4, size=size)])
    tables = read_tables(page)
    found = train_rows([row for _, *rows in tables for row in rows], scale, folder)

    changes = {}  # of the first table
    theirs = {}
    for titles, base, *rows in tables:
        for row in base, *rows:
            name, *_, remark = row
            cells, delta, error = measure(found[name], found[base[0]], unit)
            row += cells
            if row is not base and titles is tables[0][0] and math.isfinite(delta):
                changes[name] = delta, error
                if re.fullmatch(r"[-+][\d.]+", remark):
                    theirs[name] = float(remark)
    first = tables[0][1][0]
    text = f"{len(seeds)} seeds, all of val, {machine()}, a thread a run. The first row:"
    options = f"--data {data.split()[-1]} --max-steps {steps} --learning-rate {found[first][1]:g}"
    runs.fill_page(f"{page}.md", results, text, [data, f"{command} {options}"], tables)
    file = command.split(".py")[0]
    size = (9, 1.5 + 0.25 * len(changes))
    runs.picture(f"{results}/{page}.svg", size, lambda f: draw(f, changes, theirs, file, unit))


if __name__ == "__main__":
    main(*sys.argv[1:])
