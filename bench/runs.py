"""What the comparisons share: trainings side by side, pages, pictures.

make plot RUNS="out/gpt2 out/mixer"       draws the losses of your own runs: out/plot.svg
"""

import csv
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import matplotlib
from matplotlib.figure import Figure
from train import ROOT

# Colours that are legible on white and on black. A model has the same one in every picture.
GREY = "#808080"
COLORS = {"gpt2": "#3a86d6", "mixer": "#d2691e", "progressive": "#a960c4"}
COLORS |= {"conv_attention": "#2e9e5b", "scratch_former": "#dd4477"}
RUNNING = set()  # processes that train


def log(out):
    """The rows of a run's log.csv, as dicts."""
    with open(ROOT / out / "log.csv", newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    return [{key: float(text) if text else None for key, text in row.items()} for row in rows]


def slug(*parts):
    """A name for a folder: ("gpt2, 12 layers", 0.002) gives gpt2-12-layers-0.002."""
    name = "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    return re.sub(r"[^\w./-]+", "-", name)


@cache
def copy_code(folder):
    """Copies the code to FOLDER/code, unless it is there: runs from the copy do not change when a
    file is edited. Says which files have changed since."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]:
        copy = ROOT / folder / "code" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copy(file, copy)
        elif copy.read_bytes() != file.read_bytes():
            print(f"{file.name} has changed. Runs go on with {folder}/code, as they began.")


def train(folder, name, command, begin=None):
    """Trains on one thread in FOLDER/NAME with FOLDER/code, unless that is complete. It resumes, or
    goes on from the run `begin`. Returns what was printed, and the rows of the log. A loss that is
    not finite counts as infinite. Raises ChildProcessError if it fails."""
    out = ROOT / folder / slug(name)
    printed = out / "printed.txt"
    if not printed.exists():
        out.mkdir(parents=True, exist_ok=True)
        if begin and not (out / "ckpt.pt").exists():
            for file in ("log.csv", "ckpt.pt"):
                shutil.copy(ROOT / folder / slug(begin) / file, out / "copying")
                (out / "copying").rename(out / file)
        file, *options = shlex.split(command)
        words = [sys.executable, f"{folder}/code/{file}", *options, "--out", str(out)]
        words += ["--resume"] * (out / "ckpt.pt").exists()
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        pipes["start_new_session"] = True  # Ctrl-C reaches this program alone
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(words, cwd=ROOT, env=env, **pipes)
        RUNNING.add(child)
        said, error = child.communicate()
        RUNNING.remove(child)
        if child.returncode == 1 and " loss " in error:  # it is not finite
            said += f"{error.strip()}: inf nats per token, inf bits per byte\n"
        elif child.returncode:
            raise ChildProcessError(f"{' '.join(words)}: stopped. {error[-2000:].strip()}")
        printed.write_text(said, encoding="utf-8")
        print(f"{folder}/{name}: {said.splitlines()[-1]}", flush=True)
    return printed.read_text(encoding="utf-8"), log(out)


def final(run, unit):
    """The last number before `unit`, in the line that is of all of val; infinite if not finite."""
    value = float(run[0].rpartition(f" {unit}")[0].split()[-1])
    return value if math.isfinite(value) else math.inf


def side_by_side(function, items):
    """[function(item) for each item], as many at a time as there are cores."""
    pool = ThreadPoolExecutor(os.cpu_count())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return [*pool.map(function, items)]
    except (KeyboardInterrupt, ChildProcessError) as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pool.shutdown(wait=False, cancel_futures=True)
        for child in RUNNING.copy():
            child.terminate()  # it saves its checkpoint
        pool.shutdown()
        sys.exit(f"{str(e) or 'interrupted'}\nThe same command goes on where this one stopped")


def train_all(folder, settings, command):
    """{setting: what train returns} of the trainings command(*setting), side by side. A setting is
    a tuple, which gives the training its folder, too."""
    copy_code(folder)
    runs = side_by_side(lambda one: train(folder, slug(*one), command(*one)), settings)
    return dict(zip(settings, runs))


def best_rates(rates, measure, widen=True):
    """{name: the best of its learning rates} of rates {name: [rate, ...]}. measure(pairs) gives
    {(name, rate): loss}. Where the best one is the lowest or the highest, one beyond is added."""
    while True:
        losses = measure([(name, rate) for name in rates for rate in rates[name]])
        best = {name: min(rates[name], key=lambda rate: losses[name, rate]) for name in rates}
        beyond = {name: best[name] / 2 for name in rates if best[name] == min(rates[name])}
        beyond |= {name: best[name] * 2 for name in rates if best[name] == max(rates[name])}
        if not beyond or not widen:
            return best
        for name, rate in beyond.items():
            rates[name].append(rate)


def mean_and_error(values):
    """The mean of a few seeds, and its standard error (nan of one seed)."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), deviation / len(values) ** 0.5


def table(titles, *rows):
    """A table in Markdown."""
    rows = titles, ["---"] * len(titles), *rows
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def fill_page(name, folder, measured, commands, tables):
    """Fills in results/NAME: the line that begins with "Measured", the block of commands, and the
    tables, each a list of rows, titles first. Other text stays. Writes FOLDER/NAME, and prints."""
    text = (ROOT / "results" / name).read_text(encoding="utf-8")
    lines = "".join(f"    python {command}\n" for command in commands)
    found = iter(tables)
    text = re.sub("^Measured.*", lambda _: f"Measured: {measured}", text, flags=re.M)
    text = re.sub("(^    python.*\n)+", lambda _: lines, text, flags=re.M)
    text = re.sub(r"(^\|.*\n)+", lambda _: table(*next(found)) + "\n", text, flags=re.M)
    (ROOT / folder / name).write_text(text, encoding="utf-8")
    print(text)


def picture(path, size, draw):
    """Has draw(figure) draw, with letters and lines that are legible on white and on black."""
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    matplotlib.rcParams.update(dict.fromkeys(grey, GREY))
    matplotlib.rcParams.update({"svg.hashsalt": str(path), "font.size": 11})
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.draw_without_rendering()  # lays it out
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GREY, alpha=0.25)
        # Names of lines that end together move up.
        names = [text for text in axis.texts if text.get_gid() == "name"]
        free = -math.inf  # in points, as y
        for text in sorted(names, key=lambda text: text.xy[1]):
            y = axis.transData.transform(text.xy)[1] * 72 / figure.dpi
            text.xyann = (4, max(0, free - y))
            free = max(y, free) + 13
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def curve(axis, points, name, **style):
    """Draws a line through points (x, y), its name at its end. `name` begins with that of a model,
    whose colour it has, or has a colour in `style`. Returns the colour."""
    marker = "." if len(points) == 1 else ""
    style = {"color": COLORS.get(name.split(",")[0]), "marker": marker} | style
    color = axis.plot(*zip(*points), **style)[0].get_color()
    place = dict(xytext=(4, 0), textcoords="offset points", va="center", gid="name")
    axis.annotate(name, points[-1], color=color, **place)
    return color


def level(axis, y, name, x=0.0):
    """A dashed horizontal line with its name below it; x: where the name begins, from 0 to 1."""
    axis.axhline(y, xmax=0.95, color=GREY, ls="--")  # up to where curves end
    place = dict(xycoords=("axes fraction", "data"), xytext=(2, -12), textcoords="offset points")
    axis.annotate(name, (x, y), color=GREY, **place)


def plot(folders):
    """Validation loss over tokens and over time, from the log.csv of each folder."""
    found = {}
    for folder in folders:
        found[folder] = [row for row in log(folder) if row["val_loss"] is not None]
        if not found[folder]:
            print(f"{folder}: no evaluation yet, not drawn")
    if not any(found.values()):
        sys.exit("No run has an evaluation yet")

    def draw(figure):
        units = [("tokens", 1e6, "tokens, millions"), ("seconds", 60, "minutes of training")]
        for axis, (column, unit, label) in zip(figure.subplots(1, 2, sharey=True), units):
            for i, folder in enumerate(folder for folder in found if found[folder]):
                points = [(row[column] / unit, row["val_loss"]) for row in found[folder]]
                curve(axis, points, folder.removeprefix("out/"), color=f"C{i}")
            axis.set(xlabel=label, ylabel="validation loss, nats per token (lower is better)")

    picture("out/plot.svg", (13, 4), draw)


if __name__ == "__main__":
    plot(sys.argv[1:])
