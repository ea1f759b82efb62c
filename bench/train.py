"""Training speed: tokens/s and peak memory, contestants side by side.

    python bench/train.py                        each model file beside gpt2.py of its size
    python bench/train.py --only mixer           those with "mixer" in their name
    python bench/train.py --nanogpt DIR          and gpt2.py beside nanoGPT; DIR: a clone of github.com/karpathy/nanoGPT
    python bench/train.py "/old/gpt2.py --dtype float32" "gpt2.py --dtype float32"          any two or more commands
    python bench/train.py "gpt2.py" "MALLOC_TRIM_THRESHOLD_=2000000000 gpt2.py"             an environment variable

Every contestant is a process of its own, because memory that a process keeps is part of its speed. They take turns of
a few steps (A B A B ...); their first steps do not count. A step is forward, backward, clipping and the optimizer on
random tokens. Prints the median tokens/s of each, its peak memory above what its imports take, and for the last one the
ratio of its speed to that of the fastest other: median and range over the turns.
"""

import argparse
import contextlib
import importlib
import io
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "4 layers, width 128, batch 16 x 256": "--n-layer 4 --n-head 4 --n-embd 128 --vocab-size 4096 --batch-size 16",
    "6 layers, width 192, batch 8 x 256": "--n-layer 6 --n-head 6 --n-embd 192 --vocab-size 50304 --batch-size 8",
}
GROWN = "--n-layer 12 --n-head 6 --n-embd 192"
PAIRS = [
    ("gpt2.py --block-size 1024 --n-layer 6 --batch-size 2", "conv_attention.py --preset hourglass"),
    *((f"gpt2.py {GROWN}", f"progressive.py {GROWN} --stage {stage}") for stage in (1, 2, 3)),
    ("gpt2.py --block-size 512 --n-layer 8 --n-head 4 --n-embd 256 --batch-size 4", "mixer.py --batch-size 4"),
    ("gpt2.py --n-layer 4 --n-head 8 --n-embd 512 --batch-size 10", "scratch_former.py"),
]


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
    """(what a Python command prints, its seconds, its peak memory in bytes). Exits if it fails."""
    print("$ python", command, file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.PIPE)
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{printed}python {command}: failed")
    return printed, time.perf_counter() - start, 1024 * usage.ru_maxrss


def take_turns(file, options):
    """Trains in this process: as many steps as each line of stdin says. Answers each with tokens/s and bytes held."""
    sys.path[:0] = [str(Path(ROOT, file).parent), str(ROOT)]
    module = importlib.import_module(Path(file).stem)
    ours = module if hasattr(module, "parse") else importlib.import_module("gpt2")
    cfg = ours.parse(options)[0]
    device, dtype = ours.choose_device(cfg.device, cfg.dtype)
    torch.manual_seed(0)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports more
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if module is ours:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")  # as `train` does
        model = module.Model(cfg).to(device)
        optimizer = module.configure_optimizer(model, cfg)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            shape = cfg.block_size, cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd
            model = module.GPT(module.GPTConfig(*shape, dropout=0.0, bias=False)).to(device)
            # nanoGPT's AdamW is fused where it is told that the device is a GPU.
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda" if cfg.compile else device.type)
    compiled = torch.compile(model) if cfg.compile or (cfg.compile is None and device.type == "cuda") else model
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    idx, targets = torch.randint(cfg.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            with amp:
                loss = compiled(idx, targets)
            (loss if module is ours else loss[1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # .item() waits for a GPU
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        speed = int(line) * idx.numel() / (time.perf_counter() - start)
        held = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print(speed, torch.cuda.max_memory_allocated() if device.type == "cuda" else held, flush=True)


def race(commands, turns, steps):
    """Lets the commands take turns, prints what came out, and returns median tokens/s and peak memory of each."""
    processes, speeds, memory = [], [[] for _ in commands], [0.0 for _ in commands]
    for command in commands:
        words = command.split()
        variables = [word for word in words if "=" in word and word[0] != "-"]
        worker = [sys.executable, __file__, "--worker", *words[len(variables) :]]
        env = os.environ | dict(word.split("=") for word in variables)
        processes.append(subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env))
        print(3, file=processes[-1].stdin, flush=True)  # all start at once
    for turn in range(1 + turns):
        for i, process in enumerate(processes):
            if turn:
                print(steps, file=process.stdin, flush=True)
            if not (answer := process.stdout.readline()):
                sys.exit(f"this contestant failed: {commands[i]}")
            speed, memory[i] = map(float, answer.split())
            speeds[i] += [speed] * (turn > 0)
    for process in processes:
        process.communicate()
    for command, found, held in zip(commands, speeds, memory):
        print(f"  {command}: {statistics.median(found):,.0f} tokens/s, {held / 1e6:,.0f} MB")
    best = max(range(len(commands) - 1), key=lambda i: statistics.median(speeds[i]), default=0)
    print(f"  speed {compare(speeds[-1], speeds[best])}, memory {memory[-1] / memory[best]:.2f}", flush=True)
    return [(statistics.median(found), held) for found, held in zip(speeds, memory)]


def main():
    if sys.argv[1:2] == ["--worker"]:
        return take_turns(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="*", help="a model file with options; the last is ours")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--only", default="", help="part of the names of the comparisons to run")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: %(default)s)")
    args = parser.parse_args()
    races = {ours: (f"{peer} --vocab-size 4096", f"{ours} --vocab-size 4096") for peer, ours in PAIRS}
    if args.command:
        races = {"commands": args.command}
    if args.nanogpt:
        peer = f"{Path(args.nanogpt).resolve()}/model.py"
        for name, shape in SHAPES.items():
            races[f"{name}, nanoGPT as shipped"] = f"{peer} {shape} --dtype float32", f"gpt2.py {shape}"
            options = f"{shape} --compile"  # and fused AdamW, in the faster dtype
            peers = (f"{peer} {options} --dtype {dtype}" for dtype in ("float32", "bfloat16"))
            races[f"{name}, both compiled"] = *peers, f"gpt2.py {options}"
    print(machine(args.device))
    for name, commands in races.items():
        if args.only in name:
            print(name, flush=True)
            race([f"{command} --device {args.device}" for command in commands], args.turns, args.steps)


if __name__ == "__main__":
    main()
