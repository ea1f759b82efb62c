"""Training speed: tokens/s and peak memory, contestants side by side.

    python bench/train.py                        each model file beside gpt2.py of its size
    python bench/train.py --nanogpt DIR          and gpt2.py beside nanoGPT (a clone of it)
    python bench/train.py "/old/gpt2.py --dtype float32" "gpt2.py --dtype float32"     any commands

Each contestant is a process, because memory that a process keeps is part of its speed. They take
turns of two training steps on random tokens. Prints median tokens/s, peak memory above what imports
take, ratios of the last to the fastest, and MFU, the share of a GPU's peak, where that is known.
"""

import argparse
import importlib
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the model files, before torch is imported

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for all who import this file, too

PAIRS = {  # each file: gpt2.py of its size; progressive.py and gpt2.py have the same by default
    "conv_attention.py --preset hourglass": "gpt2.py --block-size 1024 --n-layer 6 --batch-size 2",
    "progressive.py --stage 1": "gpt2.py",
    "progressive.py --stage 2": "gpt2.py",
    "progressive.py --stage 3": "gpt2.py",
    "mixer.py --batch-size 4": "gpt2.py --block-size 512 --n-layer 8 --n-head 4 --n-embd 256 "
    "--batch-size 4",
    "scratch_former.py": "gpt2.py --n-layer 4 --n-head 8 --n-embd 512 --batch-size 10",
}
SHAPES = [  # of gpt2.py beside nanoGPT
    "--n-layer 4 --n-head 4 --n-embd 128 --vocab-size 4096 --batch-size 16",
    "--n-layer 6 --n-head 6 --n-embd 192 --vocab-size 50304 --batch-size 8",
]
# TFLOP/s of dense bfloat16 products, by what stands in a card's name; the first that fits counts.
PEAKS = {"MIG": None, "Laptop": None, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989}
PEAKS |= {"A100": 312, "RTX 4090": 165}


def machine(device="cpu"):
    """What speed depends on, as one line."""
    if device != "cpu":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch < 2.11: empty
    fast = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
    cpu = " ".join([platform.machine(), *fast])
    return f"torch {torch.__version__}, {cpu}, {torch.get_num_threads()} threads"


def flops_per_token(model, idx, targets):
    """What training on a token costs, in FLOPs: three times the matrix products of a forward pass.
    idx (1, T). For GPT-2 of N parameters without the positions, L layers, and H heads of size Q
    this is 6 N + 12 L H Q T, as nanoGPT counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(idx, targets)
    return 3 * counter.get_total_flops() / idx.numel()


def compare(ours, theirs):
    """Median and range of the ratios of each of our turns to theirs, as text."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def shell(command):
    """Runs a Python command, or exits if it fails."""
    print("$ python", command, file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode:
        sys.exit(f"python {command}: failed")


def prepare(command):
    """Runs `prepare_data.py ... --out FOLDER`, unless the folder has a data set."""
    if not (ROOT / command.split()[-1] / "meta.json").exists():
        shell(command)


def replace(source, changes, name):
    """`source` with each pair's first text, which must be there once, replaced by its second."""
    for old, new in changes:
        if source.count(old) != 1:
            sys.exit(f"{name}: the file has {source.count(old)} times: {old}")
        source = source.replace(old, new)
    return source


def take_turns(file, *options):
    """Trains in this process: three steps, then as many as each line of stdin says. Prints each
    time tokens/s, the bytes that it held at most, and the FLOPs of a token."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nanoGPT prints
    sys.path.insert(0, str(Path(ROOT, file).parent))
    module = importlib.import_module(Path(file).stem)
    ours = hasattr(module, "parse")
    main_file = module if ours else importlib.import_module("gpt2")
    cfg = main_file.parse(options)[0]
    device, dtype = main_file.choose_device(cfg.device, cfg.dtype)
    cuda = device.type == "cuda"
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports more
    before = getrusage(RUSAGE_SELF).ru_maxrss

    if ours:
        model = module.Model(cfg).to(device)
        optimizer = module.configure_optimizer(model, cfg)
    else:
        shape = cfg.block_size, cfg.vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd
        model = module.GPT(module.GPTConfig(*shape, dropout=0.0, bias=False)).to(device)
        kind = "cuda" if cfg.compile else device.type  # for a GPU, its AdamW is fused
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), kind)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    idx, targets = torch.randint(cfg.vocab_size, (2, cfg.batch_size, cfg.block_size), device=device)
    with amp:
        flops = flops_per_token(model, idx[:1], targets[:1])
    use_compile = cuda if cfg.compile is None else cfg.compile
    compiled = torch.compile(model) if use_compile else model

    for steps in chain([3], map(int, sys.stdin)):
        start = time.perf_counter()
        for _ in range(steps):
            with amp:
                loss = compiled(idx, targets)
            if not ours:
                loss = loss[1]  # nanoGPT returns logits and loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # waits for a GPU
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        speed = steps * idx.numel() / (time.perf_counter() - start)
        peak = 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)
        held = torch.cuda.max_memory_allocated() if cuda else peak
        print(speed, held, flops, file=answers, flush=True)


def race(commands, turns, steps, peak=None):
    """Lets the commands take turns, prints what came out, and returns (median tokens/s, bytes held)
    of each. With the card's peak in TFLOP/s it prints MFU, too."""
    worker = [sys.executable, "-c", "import sys, train; train.take_turns(*sys.argv[1:])"]
    pipes = dict(cwd=ROOT / "bench", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*worker, *command.split()], **pipes) for command in commands]
    for command, process in zip(commands, processes):
        if not process.stdout.readline():  # the first steps do not count
            sys.exit(f"this contestant failed: {command}")
    found = [[] for _ in commands]  # what each turn printed
    for _ in range(turns):
        for process, lines in zip(processes, found):
            print(steps, file=process.stdin, flush=True)
            lines.append([float(word) for word in process.stdout.readline().split()])
    for process in processes:
        process.communicate()  # it ends

    speeds = [[line[0] for line in lines] for lines in found]
    medians = [statistics.median(its_speeds) for its_speeds in speeds]
    _, memory, flops = zip(*(lines[-1] for lines in found))
    for command, median, held, cost in zip(commands, medians, memory, flops):
        print(f"{command}: {median:,.0f} tokens/s, {held / 1e6:,.0f} MB")
        if peak:
            share = median * cost / (peak * 1e12)
            print(f"  MFU {share:.1%} of {peak} TFLOP/s, at {cost / 1e6:,.0f} MFLOPs a token")
    best = medians.index(max(medians[:-1] or medians))
    speed = compare(speeds[-1], speeds[best])
    print(f"  speed {speed}, memory {memory[-1] / memory[best]:.2f}", flush=True)
    return [*zip(medians, memory)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("command", nargs="*", help="a model file with options; the last is ours")
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    races = [[f"{text} --vocab-size 4096" for text in (PAIRS[ours], ours)] for ours in PAIRS]
    races = [args.command] if args.command else races
    for shape in SHAPES if args.nanogpt else []:
        peer = f"{Path(args.nanogpt).resolve()}/model.py {shape}"
        ours = f"gpt2.py {shape}"
        fast = f"{peer} --compile --dtype"
        races.append([f"{peer} --dtype float32", ours])
        races.append([f"{fast} float32", f"{fast} bfloat16", f"{ours} --compile"])
    print(machine(args.device))
    peak = next((PEAKS[name] for name in PEAKS if name in machine(args.device)), None)
    for commands in races:
        race([f"{command} --device {args.device}" for command in commands], 9, 2, peak)


if __name__ == "__main__":
    main()
