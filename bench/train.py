"""Training speed: tokens/s and peak memory, contestants side by side.

    python bench/train.py                        each model file beside gpt2.py of its size
    python bench/train.py --nanogpt DIR          and gpt2.py beside nanoGPT; DIR: a clone of github.com/karpathy/nanoGPT
    python bench/train.py "/old/gpt2.py --dtype float32" "gpt2.py --dtype float32"          any two or more commands

Each contestant is a process, because memory that a process keeps is part of its speed. They take turns of two training
steps on random tokens. Prints median tokens/s, peak memory above what imports take, ratios of the last to the fastest.
"""

import argparse
import importlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for all who import this file, too
PAIRS = [  # gpt2.py and progressive.py have 12 layers and a width of 192 by default
    ("gpt2.py --block-size 1024 --n-layer 6 --batch-size 2", "conv_attention.py --preset hourglass"),
    *(("gpt2.py", f"progressive.py --stage {stage}") for stage in (1, 2, 3)),
    ("gpt2.py --block-size 512 --n-layer 8 --n-head 4 --n-embd 256 --batch-size 4", "mixer.py --batch-size 4"),
    ("gpt2.py --n-layer 4 --n-head 8 --n-embd 512 --batch-size 10", "scratch_former.py"),
]
SHAPES = ["--n-layer 4 --n-head 4 --n-embd 128 --vocab-size 4096 --batch-size 16"]  # of gpt2.py and nanoGPT
SHAPES += ["--n-layer 6 --n-head 6 --n-embd 192 --vocab-size 50304 --batch-size 8"]


def machine(device="cpu"):
    """What speed depends on, as one line."""
    fast = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    cpu = f"{platform.machine()} {' '.join(fast) or 'without bfloat16'}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {cpu if device == 'cpu' else torch.cuda.get_device_name(device)}"


def compare(ours, theirs):
    """Median and range of the ratios of each of our turns to theirs, as text."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def shell(command):
    """Runs a Python command, or exits if it fails."""
    print("$ python", command, file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode:
        sys.exit(f"python {command}: failed")


def take_turns(file, *options):
    """Trains in this process: three steps, then as many as each line of stdin says. Prints tokens/s and bytes held."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nanoGPT prints
    sys.path.insert(0, str(Path(ROOT, file).parent))
    module = importlib.import_module(Path(file).stem)
    ours = module if hasattr(module, "parse") else importlib.import_module("gpt2")
    cfg = ours.parse(options)[0]
    device, dtype = ours.choose_device(cfg.device, cfg.dtype)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports more
    before = getrusage(RUSAGE_SELF).ru_maxrss
    if module is ours:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")  # as `train` does
        model = module.Model(cfg).to(device)
        optimizer = module.configure_optimizer(model, cfg)
    else:
        shape = cfg.block_size, cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd
        model = module.GPT(module.GPTConfig(*shape, dropout=0.0, bias=False)).to(device)
        # nanoGPT's AdamW is fused where it is told that the device is a GPU.
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda" if cfg.compile else device.type)
    compiled = torch.compile(model) if cfg.compile or (cfg.compile is None and device.type == "cuda") else model
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    idx, targets = torch.randint(cfg.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
    for steps in chain([3], map(int, sys.stdin)):
        start = time.perf_counter()
        for _ in range(steps):
            with amp:
                loss = compiled(idx, targets)
            (loss if module is ours else loss[1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # .item() waits for a GPU
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        speed, peak = steps * idx.numel() / (time.perf_counter() - start), getrusage(RUSAGE_SELF).ru_maxrss
        print(speed, torch.cuda.max_memory_allocated() or 1024 * (peak - before), file=answers, flush=True)


def race(commands, turns, steps):
    """Lets the commands take turns, prints what came out, and returns median tokens/s and peak memory of each."""
    worker = [sys.executable, "-c", "import sys, train; train.take_turns(*sys.argv[1:])"]
    pipes = dict(cwd=ROOT / "bench", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*worker, *command.split()], **pipes) for command in commands]
    for command, process in zip(commands, processes):
        if not process.stdout.readline():  # the first steps do not count
            sys.exit(f"this contestant failed: {command}")
    speeds, memory = [[] for _ in commands], [0.0 for _ in commands]
    for _ in range(turns):
        for i, process in enumerate(processes):
            print(steps, file=process.stdin, flush=True)
            speed, memory[i] = map(float, process.stdout.readline().split())
            speeds[i].append(speed)
    medians = [statistics.median(found) for found in speeds]
    for command, process, median, held in zip(commands, processes, medians, memory):
        process.communicate()  # it ends
        print(f"{command}: {median:,.0f} tokens/s, {held / 1e6:,.0f} MB")
    best = medians.index(max(medians[:-1] or medians))
    print(f"  speed {compare(speeds[-1], speeds[best])}, memory {memory[-1] / memory[best]:.2f}", flush=True)
    return [*zip(medians, memory)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="*", help="a model file with options; the last is ours")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    races = [args.command] if args.command else [[f"{file} --vocab-size 4096" for file in pair] for pair in PAIRS]
    for shape in SHAPES if args.nanogpt else []:
        peer, ours = f"{Path(args.nanogpt).resolve()}/model.py {shape}", f"gpt2.py {shape}"
        races.append([f"{peer} --dtype float32", ours])
        races.append([f"{peer} --compile --dtype float32", f"{peer} --compile --dtype bfloat16", f"{ours} --compile"])
    print(machine(args.device))
    for commands in races:
        race([f"{command} --device {args.device}" for command in commands], turns=9, steps=2)
