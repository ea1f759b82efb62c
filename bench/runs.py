"""What the comparisons share: trainings side by side, the mean of seeds, pictures.

python bench/runs.py out/gpt2 out/mixer      (make plot RUNS="out/gpt2 out/mixer") draws your own runs: out/plot.svg
"""

import csv
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
from matplotlib.figure import Figure
from train import ROOT

GREY = "#808080"  # legible on white and on black


def log(out):
    """The rows of a run's log.csv, as dicts."""
    with open(ROOT / out / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def train(command, out):
    """Runs a training on one thread, or resumes it, unless it is complete: (what it printed, the rows of its log)."""
    printed = ROOT / out / "printed.txt"
    if not printed.exists():
        resume = ["--resume"] if (ROOT / out / "ckpt.pt").exists() else []
        done = subprocess.run([sys.executable, *shlex.split(command), "--out", out, *resume], cwd=ROOT, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)  # fmt: skip
        if done.returncode:
            raise ChildProcessError(f"python {command} --out {out}: stopped")
        printed.write_text(done.stdout, encoding="utf-8")
        print(f"{out}: {done.stdout.splitlines()[-1]}", flush=True)
    return printed.read_text(encoding="utf-8"), log(out)


def final(run, unit):
    """The number before `unit` in the last line that a training printed, which is of all of val."""
    return float(run[0].splitlines()[-1].split(f" {unit}")[0].split()[-1])


def side_by_side(work):
    """work(submit), where submit(command, out) gives a future of train's result, on as many threads as cores."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return work(lambda command, out: pool.submit(train, command, out))
    except (KeyboardInterrupt, ChildProcessError) as e:  # the trainings that were running save their checkpoints
        sys.exit(f"{e or 'interrupted'}. Run again to resume")
    finally:
        pool.shutdown(cancel_futures=True)


def mean_and_error(values):
    """Mean of a few seeds, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def picture(path, size, draw):
    """Has draw(figure) draw, without a background and in colours that are legible on white and on black."""
    matplotlib.rcParams.update({k: GREY for k in ("text.color", "axes.labelcolor", "axes.edgecolor")})
    matplotlib.rcParams.update({"xtick.color": GREY, "ytick.color": GREY, "svg.hashsalt": path, "font.size": 11})
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.draw_without_rendering()  # lays it out
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GREY, alpha=0.25)
        names, free = [text for text in axis.texts if text.get_gid() == "name"], -math.inf
        for text in sorted(names, key=lambda text: text.xy[1]):  # names of lines that end together move up
            y = axis.transData.transform(text.xy)[1] * 72 / figure.dpi  # in points
            text.xyann, free = (4, max(0, free - y)), max(y, free) + 13
    figure.savefig(ROOT / path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def curve(axis, points, name):
    """Draws a line through points (x, y) with its name at its end; returns its colour."""
    (line,) = axis.plot(*zip(*points))
    axis.annotate(name, points[-1], (4, 0), "data", "offset points", color=line.get_color(), va="center", gid="name")
    return line.get_color()


def plot(folders):
    """Validation loss over tokens and over time, from the log.csv of each folder."""

    def draw(figure):
        units = ("tokens", 1e6, "tokens, millions"), ("seconds", 60, "minutes of training")
        for axis, (column, unit, label) in zip(figure.subplots(1, 2, sharey=True), units):
            for folder in folders:
                points = [(row[column] / unit, row["val_loss"]) for row in log(folder) if row["val_loss"]]
                curve(axis, points, folder.removeprefix("out/"))
            axis.set(xlabel=label, ylabel="validation loss, nats per token")

    picture("out/plot.svg", (13, 4), draw)


if __name__ == "__main__":
    plot(sys.argv[1:])
