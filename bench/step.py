"""Time of a training step and of a cached decoding step of each model file, beside gpt2.py of the same size.

    python bench/step.py                      all pairs on the CPU
    python bench/step.py --device cuda mixer  those with "mixer" in their name, on a GPU

The two of a pair take turns (A B A B ...) in one process. A training step is forward, backward, clipping and the
optimizer, on random tokens; the first turn does not count. Prints the medians, and that and the range of the ratios.
"""

import argparse
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import conv_attention
import gpt2
import mixer
import progressive
import scratch_former

V = 4096  # ids


class Fused(scratch_former.Attention):
    """What scratch_former.py does by hand, by the fused kernel."""

    def forward(self, x, mask, cache=None, layer=0):
        q, k, v = (w(x).unflatten(-1, (-1, self.d_k)).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        return self.w_o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


fused = scratch_former.Config(V)  # the one whose model gets it


def build(cfg):
    model = sys.modules[type(cfg).__module__].Model(cfg)
    if cfg is fused:
        for block in model.h:
            block.attn.__class__ = Fused
    return model


gpt2_12 = gpt2.Config(V, 256, 12, 6, 192)
grown = progressive.Config(V, 256, 12, 6, 192)
hourglass = conv_attention.Config(V, 1024, **{**conv_attention.PRESETS["hourglass"], "max_steps": 1})
gpt2_4, mixer_4 = gpt2.Config(V, 512, 4, 8, 128), mixer.Config(V, 512, 4, 1, 128)
TRAIN = {  # name: (A, B, batch size); the ratio is B's time to A's
    "conv_attention.py --preset hourglass / gpt2.py, 6 layers, width 192": (
        gpt2.Config(V, 1024, 6, 6, 192),
        hourglass,
        2,
    ),
    "progressive.py, stage 1 / gpt2.py": (gpt2_12, grown, 8),
    "progressive.py, stage 2 / gpt2.py": (gpt2_12, replace(grown, stage=2), 8),
    "progressive.py, stage 3 / gpt2.py": (gpt2_12, replace(grown, stage=3), 8),
    "mixer.py / gpt2.py, 8 layers, width 256": (gpt2.Config(V, 512, 8, 4, 256), mixer.Config(V), 4),
    "scratch_former.py / with a fused kernel": (fused, scratch_former.Config(V), 10),
}
MIXERS = {
    "flat": {},
    "expanded": {"mixing": "expanded"},
    "softmax": {"mixing": "softmax"},
    "4 heads": {"n_head": 4},
    "kernel 4": {"kernel": 4},
    "rotary": {"rotary": True},
}
TRAIN |= {f"small mixer.py, {k} / gpt2.py, 8 heads": (gpt2_4, replace(mixer_4, **v), 4) for k, v in MIXERS.items()}
TRAIN |= {f"small gpt2.py, {n} heads / 8 heads": (gpt2_4, replace(gpt2_4, n_head=n), 4) for n in (16, 4)}
DECODE = {  # name: (A, B)
    "conv_attention.py --ahead 1 / gpt2.py, 1024 before": (gpt2.Config(V, 1024, 15, 4, 128), hourglass),
    "mixer.py / gpt2.py, 512 before": (gpt2.Config(V, 512, 8, 4, 256), mixer.Config(V)),
}


def trainer(cfg, batch_size, device):
    model = build(cfg).to(device).train()
    optimizer = gpt2.configure_optimizer(model, gpt2.Config())
    idx = torch.randint(V, (batch_size, model.cfg.block_size), device=device)

    def step():
        model(idx, idx).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 1

    return step


def decoder(cfg, device):
    """Feeds the last 64 tokens of a full context, one by one."""
    model = build(cfg).to(device).eval()
    idx = torch.randint(V, (1, model.cfg.block_size), device=device)

    @torch.no_grad()
    def steps():
        cache = model.new_cache(1)
        model(idx[:, :-64], cache=cache)
        start = time.perf_counter()
        for token in idx[:, -64:].unbind(1):
            model(token[:, None], cache=cache)
        steps.start = start
        return 64

    return steps


def seconds(run, device):
    run.start = time.perf_counter()
    n = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - run.start) / n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="part of the names of the pairs to run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=11, help="(default: %(default)s)")
    args = parser.parse_args()
    what = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {what}")
    pairs = {f"train   {k}": [(trainer, m, v[2]) for m in v[:2]] for k, v in TRAIN.items()}
    pairs |= {f"decode  {k}": [(decoder, m) for m in v] for k, v in DECODE.items()}
    for name, pair in pairs.items():
        if args.only in name:
            a, b = (make(*rest, args.device) for make, *rest in pair)
            times = [(seconds(a, args.device), seconds(b, args.device)) for _ in range(args.turns + 1)][1:]
            ratios = sorted(y / x for x, y in times)
            one, other = (1000 * statistics.median(t) for t in zip(*times))
            print(f"{name}: {other:.2f} / {one:.2f} ms = {statistics.median(ratios):.2f}"
                  f" ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
