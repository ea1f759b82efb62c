"""Training speed of gpt2.py beside nanoGPT's model and step as shipped (float32, eager), on the CPU.

    python bench/train.py --nanogpt DIR        DIR: a clone of github.com/karpathy/nanoGPT

Each is a process of its own, in turn (A B A B ...), because both reuse memory that a process keeps. A step is forward,
backward, clipping and AdamW on random tokens; the first three are not counted. Prints tokens/s, the most memory that
the process held above what its imports take, and the ratios.
"""

import argparse
import contextlib
import io
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # n_layer, n_head, n_embd, block_size, batch, vocabulary
    "4 layers, width 128, batch 16 x 256, 4,096 ids": (4, 4, 128, 256, 16, 4096),
    "6 layers, width 192, batch 8 x 256, 50,304 ids": (6, 6, 192, 256, 8, 50304),
}


def measure(which, nanogpt, shape, steps):
    """(median seconds of a step, bytes of memory at most) in this process."""
    import torch

    n_layer, n_head, n_embd, block_size, batch, vocab_size = shape
    torch.manual_seed(0)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports more
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    amp = contextlib.nullcontext()
    if which == "nanogpt":
        sys.path.insert(0, nanogpt)
        from model import GPT, GPTConfig

        with contextlib.redirect_stdout(io.StringIO()):
            model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=False))
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    else:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import gpt2

        cfg = gpt2.Config(vocab_size, block_size, n_layer, n_head, n_embd, device="cpu")
        _, dtype = gpt2.choose_device(cfg, 0)
        amp = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        model = gpt2.Model(cfg)
        optimizer = gpt2.configure_optimizer(model, cfg)
    idx, targets = torch.randint(vocab_size, (2, batch, block_size))
    seconds = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        with amp:
            loss = model(idx, targets)
        (loss[1] if which == "nanogpt" else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:]), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a process (default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # which, shape: a process of the pair
    args = parser.parse_args()
    if args.one:
        print(*measure(args.one[0], args.nanogpt, SHAPES[args.one[1]], args.steps))
        return
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name, shape in SHAPES.items():
        rates, memory = {"nanogpt": [], "gpt2": []}, {}
        for _ in range(args.rounds):
            for which, found in rates.items():
                command = [sys.executable, __file__, "--nanogpt", args.nanogpt, "--steps", str(args.steps)]
                out = subprocess.run([*command, "--one", which, name], check=True, stdout=subprocess.PIPE, text=True)
                seconds, most = map(float, out.stdout.split())
                found.append(shape[3] * shape[4] / seconds)
                memory[which] = max(most, memory.get(which, 0))
        ratios = [b / a for a, b in zip(*rates.values())]
        nano, ours = (statistics.median(r) for r in rates.values())
        print(f"{name}: nanoGPT {nano:,.0f} tokens/s, gpt2.py {ours:,.0f}, ratio {statistics.median(ratios):.2f}"
              f" ({min(ratios):.2f} to {max(ratios):.2f}); memory {memory['nanogpt'] / 1e6:,.0f} MB,"
              f" {memory['gpt2'] / 1e6:,.0f}, ratio {memory['gpt2'] / memory['nanogpt']:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
