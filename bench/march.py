"""MARCH's claims about the shape of a transformer, at equal parameters, on gpt2.py: does it pay to be wide, to have
many heads, to gate the feed-forward layer?

    make march                     27 shapes and seeds, under an hour on two cores

MARCH (github.com/bri25yu/march) trained encoder-decoders of 220M parameters for 1,000 steps, one seed each. Here a
decoder of 1.35M learns the standard library's sources; 1,024 ids leave four fifths and more of that to the blocks.
Every shape has two learning rates to choose from, with its first seed, and trains two more seeds at the better one. As
many trainings as there are cores run side by side, on one thread each. A run that was interrupted is resumed. Prints
the table and writes it to assets/march.md.
"""

import csv
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SHAPES = {
    "gpt2.py as it is": "--n-layer 6 --n-embd 128 --n-head 4",
    "narrower and deeper": "--n-layer 11 --n-embd 96 --n-head 4",
    "wider and shallower": "--n-layer 3 --n-embd 176 --n-head 4",
    "wider and shallower still": "--n-layer 2 --n-embd 212 --n-head 4",
    "more heads, as much smaller": "--n-layer 6 --n-embd 128 --n-head 16",
    "more heads, fewer layers": "--n-layer 3 --n-embd 128 --n-head 16 --head-dim 32",
    "wider, more heads, fewer layers": "--n-layer 2 --n-embd 168 --n-head 16 --head-dim 32",
    "GEGLU": "--n-layer 6 --n-embd 128 --n-head 4 --mlp geglu",
    "SwiGLU": "--n-layer 6 --n-embd 128 --n-head 4 --mlp swiglu",
}
STEPS, RATES, SEEDS = 250, ("2e-3", "4e-3"), (1337, 1, 2)
COMMON = (
    f"--data data/march --device cpu --dtype float32 --block-size 256 --batch-size 8 --micro-batch 8 --warmup-steps 50 "
    f"--max-steps {STEPS} --eval-interval {STEPS} --eval-tokens 16384"
)


def train(name, rate, seed):
    """(parameters, validation bits a byte, ms a step) of one training, which it runs if it has not been."""
    out = Path(f"out/march/{name.replace(',', '').replace(' ', '-')}-{rate}-{seed}")
    command = f"gpt2.py {SHAPES[name]} {COMMON} --learning-rate {rate} --seed {seed} --out {out}"
    said = ROOT / out / "said.txt"
    if not said.exists():
        resume = ["--resume"] if (ROOT / out / "ckpt.pt").exists() else []
        print(f"$ OMP_NUM_THREADS=1 python {command}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command.split(), *resume], cwd=ROOT, env=environment,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"march.py: {out} did not finish. Run again to go on")
        said.write_text(done.stdout, encoding="utf-8")
    parameters = int(re.search(r"([\d,]+) parameters", said.read_text(encoding="utf-8"))[1].replace(",", ""))
    with open(ROOT / out / "log.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    return parameters, float(last["val_bits_per_byte"]), 1000 * float(last["seconds"]) / STEPS


def main():
    if not (ROOT / "data/march/meta.json").exists():
        command = [sys.executable, "prepare_data.py", "stdlib", "--tokenizer", "bpe:1024", "--out", "data/march"]
        subprocess.run(command, cwd=ROOT, check=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        search = {name: [pool.submit(train, name, rate, SEEDS[0]) for rate in RATES] for name in SHAPES}
        best = {name: min(range(len(RATES)), key=lambda i: found[i].result()[1]) for name, found in search.items()}
        more = {name: [pool.submit(train, name, RATES[best[name]], seed) for seed in SEEDS[1:]] for name in SHAPES}
        results = {name: [future.result() for future in (search[name][best[name]], *more[name])] for name in SHAPES}
    finally:
        pool.shutdown(cancel_futures=True)
    bits = {name: [b for _, b, _ in found] for name, found in results.items()}
    spread = statistics.mean(statistics.variance(b) for b in bits.values()) ** 0.5  # pooled, of one run
    error = spread * (2 / len(SEEDS)) ** 0.5  # of the difference of two means
    base = statistics.mean(next(iter(bits.values())))
    rows = []
    for name, found in results.items():
        mean, ms = statistics.mean(bits[name]), statistics.median(ms for *_, ms in found)
        rows.append(f"| {name} | `{SHAPES[name]}` | {found[0][0]:,} | {RATES[best[name]]} | {ms:.0f} "
                    f"| {', '.join(f'{b:.3f}' for b in bits[name])} | {mean:.3f} | {mean - base:+.3f} "
                    f"| {(mean - base) / error:+.1f} |")  # fmt: skip
    table = [
        f"{STEPS} steps of 2,048 tokens of the standard library's sources, 1,024 ids; the better of the learning rates "
        f"{' and '.join(RATES)}; whole validation split. {platform.machine()}, {os.cpu_count()} cores, a thread a run, "
        f"torch {torch.__version__}.\n",
        "| | `python gpt2.py` | parameters | rate | ms a step | bits a byte, 3 seeds | mean | less or more "
        "| in standard errors |",
        "| --- " * 9 + "|",
        *rows,
        f"\nStandard deviation of one run, pooled: {spread:.3f}; standard error of a difference of means: {error:.3f}. "
        "Below 2 of them a difference says nothing.\n",
        f"All with `{COMMON}`, and `--learning-rate`, `--seed {', '.join(map(str, SEEDS))}`.",
    ]
    (ROOT / "assets").mkdir(exist_ok=True)
    (ROOT / "assets/march.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the trainings that were running have saved themselves
        sys.exit("march.py: interrupted. Run again to go on")
