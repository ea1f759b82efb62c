"""Training speed of gpt2.py beside nanoGPT's model and optimizer, on the CPU.

    python bench/train.py --nanogpt DIR        DIR: a clone of github.com/karpathy/nanoGPT

Contestants: nanoGPT as shipped (float32, eager) and gpt2.py as shipped; nanoGPT with torch.compile and fused AdamW
switched on by hand, in float32 and with bfloat16 autocast, of which the faster counts, and gpt2.py --compile. Each is a
process of its own, because memory that a process keeps is part of its speed; they take turns of some steps (A B A B
...), the first of which do not count. A step is forward, backward, clipping and AdamW on the same random tokens. Prints
tokens/s, the ratio of each turn to its pair, the most memory that the process held above what its imports take, and the
tokens/s at which this machine's matrix product would do the model's products and nothing else.
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

import torch

SHAPES = {  # n_layer, n_head, n_embd, block_size, batch, vocabulary
    "4 layers, width 128, batch 16 x 256, 4,096 ids": (4, 4, 128, 256, 16, 4096),
    "6 layers, width 192, batch 8 x 256, 50,304 ids": (6, 6, 192, 256, 8, 50304),
}
PAIRS = {  # gpt2.py's turns are compared with those of the fastest of its peers
    "as shipped": (["nanoGPT"], "gpt2.py"),
    "compiled": (["nanoGPT by hand, float32", "nanoGPT by hand, bfloat16"], "gpt2.py --compile"),
}


def take_turns(who, nanogpt, shape):
    """Trains in this process: for each line of standard input as many steps as it says. Answers each with the median
    seconds of a step and the most bytes held so far."""
    n_layer, n_head, n_embd, block_size, batch, vocab_size = shape
    torch.manual_seed(0)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports more
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_hand, bf16 = "by hand" in who, "bfloat16" in who
    if who.startswith("nanoGPT"):
        sys.path.insert(0, nanogpt)
        from model import GPT, GPTConfig

        with contextlib.redirect_stdout(io.StringIO()):
            model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=False))
            # its AdamW is fused where it believes that the device is a GPU
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda" if by_hand else "cpu")
    else:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import gpt2

        cfg = gpt2.Config(vocab_size, block_size, n_layer, n_head, n_embd, device="cpu")
        bf16 = gpt2.choose_device(cfg, 0)[1] == torch.bfloat16
        model = gpt2.Model(cfg)
        optimizer = gpt2.configure_optimizer(model, cfg)
    fast = torch.compile(model) if by_hand or "--compile" in who else model
    amp = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    idx, targets = torch.randint(vocab_size, (2, batch, block_size))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            with amp:
                loss = fast(idx, targets)
            (loss[1] if who.startswith("nanoGPT") else loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(statistics.median(seconds), 1024 * most, flush=True)


def most_tokens(shape):
    """Tokens/s if a step were its matrix products alone, at the float32 speed of a large one here."""
    n_layer, _, n_embd, block_size, _, vocab_size = shape
    a, b, seconds = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    weights = 12 * n_layer * n_embd**2 + vocab_size * n_embd
    attention = n_layer * block_size * n_embd  # 2 products of half a triangle
    return 2 * 2048**3 / statistics.median(seconds) / (6 * (weights + attention))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="a clone of nanoGPT")
    parser.add_argument("--turns", type=int, default=5, help="counted turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # who, shape: a process
    args = parser.parse_args()
    if args.one:
        take_turns(args.one[0], args.nanogpt, SHAPES[args.one[1]])
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name, shape in SHAPES.items():
        rates, memory, most = {}, {}, []
        command = [sys.executable, __file__, "--nanogpt", args.nanogpt, "--one"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        contestants = [who for peers, ours in PAIRS.values() for who in (*peers, ours)]
        running = {who: subprocess.Popen([*command, who, name], **pipes) for who in contestants}
        for turn in range(1 + args.turns):
            most.append(most_tokens(shape))
            for who, process in running.items():
                print(args.steps if turn else 3, file=process.stdin, flush=True)
                seconds, held = map(float, process.stdout.readline().split())
                memory[who] = held
                if turn:
                    rates.setdefault(who, []).append(shape[3] * shape[4] / seconds)
        for process in running.values():
            process.communicate()
        print(f"{name}; its products alone: {statistics.median(most):,.0f} tokens/s")
        for how, (peers, ours) in PAIRS.items():
            best = max(peers, key=lambda who: statistics.median(rates[who]))
            ratios = [b / a for a, b in zip(rates[best], rates[ours])]
            for who in (*peers, ours):
                found = statistics.median(rates[who])
                print(f"  {who}: {found:,.0f} tokens/s, {memory[who] / 1e6:,.0f} MB")
            print(f"  {how}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), memory "
                  f"{memory[ours] / memory[best]:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
