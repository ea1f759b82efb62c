"""Five ideas, one table: every model file on the same tokens, with as many parameters, each at its own learning rate.

    make compare                   SCALE=cpu: about 1.1M parameters, half an hour on two cores
    make compare SCALE=gpu         about 6.2M parameters, context 1,024, on a CUDA GPU

Each model trains on the same number of tokens at three learning rates; the one with the best loss on all of the
validation tokens counts. Then each gets the seconds that gpt2.py took for that, at its best rate. All are scored on
test tokens that no choice has looked at: the standard library has no test split, so the second half of its validation
documents becomes one, in data/compare. gpt2.py trains with two more seeds: differences of the size of theirs mean
nothing. A run that was interrupted is resumed. Everything in the table and the plot comes from the runs' log.csv and
from what the commands under the table print; both are written to assets/.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare_data

ROOT = Path(__file__).parent.parent
PROMPT, PROMPT_FILE = "def main(", Path("out/compare/prompt.txt")

SHAPES = {
    "cpu": {
        "gpt2": "gpt2.py --n-layer 3 --n-head 4 --n-embd 128",
        "conv_attention, 1 ahead": "conv_attention.py --ahead 1 --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 "
        "--n-head 4 --n-embd 64",
        "conv_attention, 64 ahead": "conv_attention.py --n-layer 1,1,1,1,1,1,1 --widths 1.5,1.5,1.5 "
        "--n-head 4 --n-embd 64",
        "progressive": "progressive.py --n-layer 12 --n-head 4 --n-embd 72",
        "mixer": "mixer.py --n-layer 3 --n-embd 128 --tie-weights",
        "scratch_former": "scratch_former.py --n-layer 3 --n-head 4 --n-embd 96 --n-ff 384",
    },
    "gpu": {
        "gpt2": "gpt2.py --n-layer 12 --n-head 6 --n-embd 192",
        "conv_attention, 1 ahead": "conv_attention.py --ahead 1 --n-layer 1,2,2,2,2,2,1 --widths 1,1,1 "
        "--n-head 6 --n-embd 180",
        "conv_attention, 64 ahead": "conv_attention.py --n-layer 1,2,2,2,2,2,1 --widths 1,1,1 --n-head 6 --n-embd 180",
        "progressive": "progressive.py --n-layer 12 --n-head 6 --n-embd 186",
        "mixer": "mixer.py --n-layer 4 --n-embd 192 --tie-weights",
        "scratch_former": "scratch_former.py --n-layer 8 --n-head 8 --n-embd 216 --n-ff 864",
    },
}
COMMON = {
    "cpu": "--device cpu --block-size 256 --batch-size 8 --micro-batch 8 --warmup-steps 50 --log-interval 10 "
    "--eval-interval 50 --eval-tokens 16384",
    "gpu": "--device cuda --block-size 1024 --batch-size 64 --micro-batch 64 --warmup-steps 100 --log-interval 10 "
    "--eval-interval 100 --eval-tokens 65536",
}
STEPS = {"cpu": 250, "gpu": 1500}
RATES = {  # three for each, with the best of earlier searches in the middle
    "gpt2": ("2e-3", "4e-3", "8e-3"),
    "conv_attention, 1 ahead": ("2e-3", "4e-3", "8e-3"),
    "conv_attention, 64 ahead": ("1e-3", "2e-3", "4e-3"),
    "progressive": ("2e-3", "4e-3", "8e-3"),
    "mixer": ("4e-3", "8e-3", "1.6e-2"),
    "scratch_former": ("1e-3", "2e-3", "4e-3"),
}


def shell(command):
    """(what a command prints, its peak memory in bytes); the rest of this program ends if it fails."""
    print("$ python", command, flush=True)
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE)
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said + "compare.py: that command failed. Run again to go on")
    return said, usage.ru_maxrss * 1024


def make_data(source, target):
    """The data set of `source`, the documents of its validation split shared out between val and test."""
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    ranks = source / "tokenizer.tiktoken"
    encoding = prepare_data.load_tokenizer(
        meta["tokenizer"], ranks.read_text(encoding="utf-8") if ranks.exists() else ""
    )
    tokens = np.fromfile(source / "val.bin", "<u2")
    ends = np.flatnonzero(tokens == meta["eot"])  # a document ends before each
    middle = int(ends[np.searchsorted(ends, len(tokens) // 2)])
    target.mkdir(parents=True, exist_ok=True)
    for name, part in (("val", tokens[:middle]), ("test", tokens[middle + 1 :])):
        documents = np.split(part, np.flatnonzero(part == meta["eot"]))
        texts = [encoding.decode([i for i in ids.tolist() if i != meta["eot"]]) for ids in documents]
        counts = {"tokens": len(part), "bytes": sum(len(text.encode()) for text in texts)}
        counts |= {"words": sum(len(text.split()) for text in texts), "documents": len(texts)}
        meta["splits"][name] = {**counts, "sha256": sha256(part.tobytes()).hexdigest()}
        (target / f"{name}.bin").write_bytes(part.tobytes())
    for path in filter(Path.exists, (source / "train.bin", ranks)):
        shutil.copy(path, target)
    (target / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


class Run:
    """One training: its command, and what its files tell."""

    def __init__(self, name, scale, rate, steps, budget="tokens", seed=1337):
        self.name, self.rate = name, rate
        self.out = Path(f"out/compare/{scale}/{name.replace(', ', '-').replace(' ', '-')}-{budget}-{rate}-{seed}")
        options = f"--data data/compare --learning-rate {rate} --max-steps {steps} --seed {seed} {COMMON[scale]}"
        self.command = f"{SHAPES[scale][name]} {options} --out {self.out}"
        notes = ROOT / self.out / "compare.json"  # what log.csv does not tell
        if not notes.exists():
            ckpt = ROOT / self.out / "ckpt.pt"
            said, memory = shell(self.command + " --resume" * ckpt.exists())
            said = said.replace(",", "")
            parameters = int(re.findall(r"(\d+) parameters", said)[-1])  # progressive.py grows
            notes.write_text(json.dumps({"memory": memory, "parameters": parameters}), encoding="utf-8")
        self.__dict__.update(json.loads(notes.read_text(encoding="utf-8")))
        with open(ROOT / self.out / "log.csv", newline="", encoding="utf-8") as file:
            self.log = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
        last = self.log[-1]
        self.val, self.nats, self.seconds = last["val_bits_per_byte"], last["val_loss"], last["seconds"]
        self.steps, self.tokens = int(last["step"]), int(last["tokens"])

    def score(self):
        """Two cells of the table: bits a byte and perplexity a token on the test split."""
        said, _ = shell(f"{self.command.split()[0]} --eval-only --split test --out {self.out}")
        bits, perplexity = (float(re.search(rf"([\d.]+) {unit}", said)[1]) for unit in ("bits", "a token"))
        return f"{bits:.3f} | {perplexity:.1f}"

    def speak(self, device):
        """(what all decoders say, tokens a second of greedy)."""
        command = f"sample.py --ckpt {self.out}/ckpt.pt --decode all --max-new-tokens 64 --seed 1337 --device {device}"
        said, _ = shell(f"{command} --prompt-file {PROMPT_FILE}")
        return said, float(re.search(r"--- greedy.*?\((?:.*?), ([\d.,]+) tokens/s", said, re.S)[1].replace(",", ""))


def plot(runs, path):
    """Validation bits a byte over tokens, and over seconds."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = "#808080"  # reads on white and on black
    pyplot.rcParams.update({k: grey for k in ("text.color", "axes.labelcolor", "axes.edgecolor")})
    pyplot.rcParams.update({"xtick.color": grey, "ytick.color": grey, "svg.hashsalt": "compare", "font.size": 11})
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, column, label in ((axes[0], "tokens", "tokens"), (axes[1], "seconds", "seconds of training")):
        for run in runs:
            points = [(row[column], row["val_bits_per_byte"]) for row in run.log if row["val_bits_per_byte"]]
            axis.plot(*zip(*points), "--" if "64" in run.name else "-", label=run.name)
        axis.set_xlabel(label)
        axis.grid(color=grey, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation bits a byte")
    axes[1].legend(frameon=False)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SHAPES, default="cpu")
    scale = parser.parse_args().scale
    device = "cuda" if scale == "gpu" else "cpu"
    if not (ROOT / "data/compare/meta.json").exists():
        if not (ROOT / "data/stdlib/meta.json").exists():
            shell("prepare_data.py stdlib")
        make_data(ROOT / "data/stdlib", ROOT / "data/compare")
    (ROOT / PROMPT_FILE).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / PROMPT_FILE).write_text(PROMPT, encoding="utf-8")

    best, quick, timed, rows, others = {}, {}, {}, [], []
    for name in SHAPES[scale]:
        runs = [Run(name, scale, rate, STEPS[scale]) for rate in RATES[name]]
        best[name] = min(runs, key=lambda run: run.nats)
        quick[name] = min(run.seconds for run in runs)  # the machine at its quietest
    budget = quick["gpt2"]
    for name, run in best.items():
        steps = round(run.steps * budget / quick[name])
        timed[name] = run if name == "gpt2" else Run(name, scale, run.rate, steps, "seconds")
    seeds = [best["gpt2"].val] + [Run("gpt2", scale, best["gpt2"].rate, STEPS[scale], seed=s).val for s in (1, 2)]

    said = [f"# `{PROMPT}`, as they came (seed 1337)\n"]
    for name, run in best.items():
        score, (text, decoding) = run.score(), run.speak(device)
        said.append(f"## {name}\n\n```\n{text.strip()}\n```\n")
        memory = f"{run.memory / 1e6:,.0f} MB" if device == "cpu" else "not measured"
        ms = 1000 * quick[name] / run.steps
        rows.append(f"| {name} | {run.parameters:,} | {run.rate} of {', '.join(RATES[name])} | {ms:.0f} "
                    f"| {run.val:.3f} | {score} | {decoding:,.0f} | {memory} |")  # fmt: skip
        other = timed[name]
        score = score if other is run else other.score()
        others.append(f"| {name} | {other.steps:,} | {other.tokens / 1e6:.2f}M | {other.seconds:.0f} "
                      f"| {other.val:.3f} | {score} |")  # fmt: skip
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    tokens = best["gpt2"].tokens
    table = [
        f"Equal tokens: {tokens / 1e6:.2f}M of the standard library's sources, 4,096 ids; the best of three learning "
        f"rates. {machine}, torch {torch.__version__}.\n",
        "| | parameters | rate | ms a step | val bits a byte | test bits a byte | test perplexity a token "
        "| greedy, tokens/s | peak memory |",
        "| --- " * 9 + "|",
        *rows,
        "\nms a step: of the fastest of a model's three runs, evaluations not counted. Equal time: as many steps as "
        f"fit at that speed into gpt2.py's {budget:.0f} s. How many seconds they became is in the table.\n",
        "| | steps | tokens | seconds | val bits a byte | test bits a byte | test perplexity a token |",
        "| --- " * 7 + "|",
        *others,
        f"\nThree seeds of gpt2.py: {', '.join(f'{b:.3f}' for b in seeds)} val bits a byte, standard deviation "
        f"{statistics.stdev(seeds):.3f}. conv_attention 64 ahead predicts 64 tokens at once: another task, and its "
        "numbers are not to be compared with the others'.\n",
        "The commands, for each model that of equal tokens; add `--eval-only --split test` for its score:\n",
        *(f"    python {run.command}" for run in best.values()),
    ]
    assets = ROOT / "assets"
    assets.mkdir(exist_ok=True)
    (assets / f"compare-{scale}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    (assets / f"samples-{scale}.md").write_text("\n".join(said), encoding="utf-8")
    plot(best.values(), assets / f"compare-{scale}.svg")
    print("\n".join(table))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the training that was running has saved itself
        sys.exit("compare.py: interrupted. Run again to go on")
