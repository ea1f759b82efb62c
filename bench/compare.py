"""Every model file on the same tokens, with as many parameters, each at its own learning rate: tables, a plot, samples.

    make compare                   SCALE=cpu: about 1.1M parameters, half an hour on two cores
    make compare SCALE=gpu         about 6.2M parameters, context 1,024, on a CUDA GPU

Each model trains on the same number of tokens at three learning rates; the run with the best final validation loss
counts. Then each model gets the seconds that gpt2.py took, at its best rate. All are scored on test tokens that no
choice depends on: the standard library has no test split, so the first half of its validation documents is "val" here
and the second half "test". gpt2.py trains with two more seeds: smaller differences than theirs mean nothing. An
interrupted comparison resumes. Everything is written to results/.
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from train import ROOT, machine, shell

sys.path.insert(0, str(ROOT))
import gpt2
import sample

PROMPT = "def main("
NAMES = ("gpt2", "conv_attention, 1 ahead", "conv_attention, 64 ahead", "progressive", "mixer", "scratch_former")
RATES = (4e-3, 4e-3, 2e-3, 4e-3, 8e-3, 2e-3)  # the best of earlier searches; half and twice as much are tried, too
SHAPES = {
    "cpu": (
        "gpt2.py --n-layer 3 --n-head 4 --n-embd 128",
        "conv_attention.py --ahead 1 --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 --n-head 4 --n-embd 64",
        "conv_attention.py --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 --n-head 4 --n-embd 64",
        "progressive.py --n-layer 12 --n-head 4 --n-embd 72",
        "mixer.py --n-layer 3 --n-embd 128 --tie-weights",
        "scratch_former.py --n-layer 3 --n-head 4 --n-embd 96 --n-ff 384",
    ),
    "gpu": (
        "gpt2.py --n-layer 12 --n-head 6 --n-embd 192",
        "conv_attention.py --ahead 1 --n-layer 1,2,2,2,2,2,1 --widths 1,1,1 --n-head 6 --n-embd 180",
        "conv_attention.py --n-layer 1,2,2,2,2,2,1 --widths 1,1,1 --n-head 6 --n-embd 180",
        "progressive.py --n-layer 12 --n-head 6 --n-embd 186",
        "mixer.py --n-layer 4 --n-embd 192 --tie-weights",
        "scratch_former.py --n-layer 8 --n-head 8 --n-embd 216 --n-ff 864",
    ),
}
COMMON = {
    "cpu": "--device cpu --block-size 256 --batch-size 8 --micro-batch 8 --warmup-steps 50 --eval-interval 50 "
    "--eval-tokens 16384",
    "gpu": "--device cuda --block-size 1024 --batch-size 64 --micro-batch 64 --warmup-steps 100 --eval-interval 100",
}
STEPS = {"cpu": 250, "gpu": 1500}


def score(ckpt, device):
    """[parameters, bits per byte of val, bits per byte of test, perplexity per token of test] in float32."""
    model, tokenizer = sample.load(ckpt, device)
    tokens, eot = np.array(gpt2.open_data(ROOT / model.cfg.data)[2]["val"]), tokenizer.eot_token
    ends, scores = np.flatnonzero(tokens == eot), [sum(p.numel() for p in model.parameters())]
    middle = ends[np.searchsorted(ends, len(tokens) // 2)]  # between two documents
    for half in (tokens[:middle], tokens[middle + 1 :]):
        nats = gpt2.evaluate(model, half, eot, nullcontext())
        scores.append(nats / math.log(2) * len(half) / len(tokenizer.decode_bytes(half[half != eot].tolist())))
    return [*scores, math.exp(nats)]


def train(name, scale, rate, steps, budget="tokens", seed=1337):
    """Trains a model, or reads a run that is complete: its command, log, scores and peak memory."""
    out = f"out/compare/{scale}/{name.replace(', ', '-').replace(' ', '-')}-{budget}-{rate}-{seed}"
    command = f"{SHAPES[scale][NAMES.index(name)]} {COMMON[scale]} --learning-rate {rate} --max-steps {steps}"
    command += f" --seed {seed} --out {out}"
    device, done = COMMON[scale].split()[1], ROOT / out / "compare.json"
    if not done.exists():
        _, _, memory = shell(command + " --resume" * (ROOT / out / "ckpt.pt").exists())
        done.write_text(json.dumps([*score(ROOT / out / "ckpt.pt", device), memory]), encoding="utf-8")
    run = SimpleNamespace(name=name, command=command, device=device, rate=rate, steps=steps, ckpt=f"{out}/ckpt.pt")
    run.parameters, run.bits, *test, run.memory = json.loads(done.read_text(encoding="utf-8"))
    run.test = "{:.3f} | {:.1f}".format(*test)
    with open(ROOT / out / "log.csv", newline="", encoding="utf-8") as file:
        run.log = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    run.tokens, run.seconds = run.log[-1]["tokens"], run.log[-1]["seconds"]
    return run


def plot(runs, path):
    """Validation bits per byte over tokens, and over seconds."""
    grey = "#808080"  # legible on white and on black
    matplotlib.rcParams.update({k: grey for k in ("text.color", "axes.labelcolor", "axes.edgecolor")})
    matplotlib.rcParams.update({"xtick.color": grey, "ytick.color": grey, "svg.hashsalt": "compare", "font.size": 11})
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, ("tokens", "seconds")):
        for run in runs:
            points = [(row[column], row["val_bits_per_byte"]) for row in run.log if row["val_bits_per_byte"]]
            axis.plot(*zip(*points), "--" if "64" in run.name else "-", label=run.name)
        axis.set_xlabel(column)
        axis.grid(color=grey, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation bits per byte")
    axes[1].legend(frameon=False)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def compare(scale):
    steps, best, fastest, timed = STEPS[scale], {}, {}, {}
    if not (ROOT / "data/stdlib/meta.json").exists():
        shell("prepare_data.py stdlib")
    tried = {name: (rate / 2, rate, 2 * rate) for name, rate in zip(NAMES, RATES)}
    for name, rates in tried.items():
        runs = [train(name, scale, rate, steps) for rate in rates]
        best[name] = min(runs, key=lambda run: run.bits)
        fastest[name] = min(run.seconds for run in runs) / steps  # per step, when the machine was least busy
    seeds = [train("gpt2", scale, best["gpt2"].rate, steps, seed=seed).bits for seed in (1337, 1, 2)]
    budget = steps * fastest["gpt2"]
    for name, run in best.items():
        timed[name] = train(name, scale, run.rate, round(budget / fastest[name]), "seconds") if timed else run

    rows, timed_rows, samples = [], [], [f"# `{PROMPT}`, unedited (seed 1337)\n"]
    for name, run in best.items():
        options = f"--prompt '{PROMPT}' --decode all --max-new-tokens 64 --device {run.device}"
        text, _, _ = shell(f"sample.py --ckpt {run.ckpt} {options}")
        samples.append(f"## {name}\n\n```\n{text.strip()}\n```\n")
        speed = re.search(r"--- greedy ---.*?([\d,]+)[\d.]* tokens/s", text, re.S)[1]
        memory = f"{run.memory / 1e6:,.0f} MB" if scale == "cpu" else "not measured"
        rows.append(f"| {name} | {run.parameters:,} | {run.rate} of {', '.join(map(str, tried[name]))} "
                    f"| {1000 * fastest[name]:.0f} | {run.bits:.3f} | {run.test} | {speed} | {memory} |")  # fmt: skip
        run = timed[name]
        timed_rows.append(f"| {name} | {run.steps:,} | {run.tokens / 1e6:.2f}M | {run.seconds:.0f} | {run.bits:.3f} "
                          f"| {run.test} |")  # fmt: skip
    table = [
        f"Equal tokens: {best['gpt2'].tokens / 1e6:.2f}M of the standard library's sources, vocabulary of 4,096; "
        f"the best of three learning rates. {machine(run.device)}.\n",
        "| | parameters | rate | ms per step | val bits per byte | test bits per byte | test perplexity per token "
        "| greedy, tokens/s | peak memory |",
        "| --- " * 9 + "|",
        *rows,
        "\nms per step: of the fastest of a model's three runs, without evaluations. Equal time: as many steps as fit "
        f"into gpt2.py's {budget:.0f} s at that speed; the table has the seconds that they took.\n",
        "| | steps | tokens | seconds | val bits per byte | test bits per byte | test perplexity per token |",
        "| --- " * 7 + "|",
        *timed_rows,
        f"\nThree seeds of gpt2.py: {', '.join(f'{bits:.3f}' for bits in seeds)} val bits per byte, standard deviation "
        f"{statistics.stdev(seeds):.3f}. conv_attention 64 ahead predicts 64 tokens at once: another task, not to be "
        "compared with the others. The commands, for each model that of equal tokens:\n",
        *(f"    python {run.command}" for run in best.values()),
    ]
    results = ROOT / "results"
    (results / f"compare-{scale}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    (results / f"samples-{scale}.md").write_text("\n".join(samples), encoding="utf-8")
    plot(best.values(), results / f"compare-{scale}.svg")
    print("\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SHAPES, default="cpu", help="(default: %(default)s)")
    try:
        compare(parser.parse_args().scale)
    except KeyboardInterrupt:  # the training that was running has saved its checkpoint
        sys.exit("compare.py: interrupted. Run again to resume")
