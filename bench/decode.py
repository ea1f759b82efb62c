"""Decoding speed of gpt2.py and sample.py beside Hugging Face's generate: GPT-2 124M, random weights, the same in both.

    python bench/decode.py                     on the CPU
    python bench/decode.py --device cuda       bfloat16 in both

The last norm is scaled by 6.5, which gives the next token about the entropy it has in text, 4 to 5 nats: a nucleus of
nearly uniform probabilities would hold the whole vocabulary. Three settings: greedy at batch 1, beam search of width 4,
nucleus at batch 8. On a CPU sample.py computes in float32, and generate takes its turn in float32 and in bfloat16: the
better one counts. Turns alternate (A B C A B C ...) in one process, the first does not count. Prints steps a second
(tokens of each text), the ratio and its range, and how close greedy comes to reading every weight once a token at the
speed of the machine's own matrix-vector product.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt2
import sample

SETTINGS = {  # name: (new tokens, batch, generate's options, sample.generate's)
    "greedy, batch 1": (128, 1, {}, {"decode": "greedy"}),
    "beam 4, batch 1": (32, 1, {"num_beams": 4, "early_stopping": "never"}, {"decode": "beam", "beam_width": 4}),
    "nucleus, batch 8": (32, 8, {"do_sample": True, "top_p": 0.95, "top_k": 0}, {"decode": "nucleus", "top_p": 0.95}),
}


def models(device):
    """{name: (model, whether it is ours)}, all with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device).eval()
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    ours = gpt2.Model(gpt2.Config(50257, 1024, 12, 12, 768)).to(device).eval()
    with torch.no_grad():
        for name, p in theirs.transformer.named_parameters():
            linear = p.dim() == 2 and name.startswith("h.")
            ours.get_parameter(name)[: len(p.T if linear else p)] = p.T if linear else p
        for model in (theirs.transformer, ours):
            model.ln_f.weight.mul_(6.5)
    if device == "cpu":
        half = transformers.GPT2LMHeadModel(theirs.config).to(torch.bfloat16).eval()
        half.load_state_dict(theirs.state_dict())
        half.generation_config = theirs.generation_config
        return {"generate, float32": (theirs, False), "generate, bfloat16": (half, False), "sample.py": (ours, True)}
    both = {"generate, bfloat16": (theirs, False), "sample.py, bfloat16": (ours, True)}
    return {name: (model.to(torch.bfloat16), mine) for name, (model, mine) in both.items()}


def bandwidth(weight):
    """Bytes a second at which a matrix-vector product reads a weight, median of 20."""
    x, seconds = weight.new_ones(1, weight.size(1)), []
    for _ in range(20):
        start = time.perf_counter()
        F.linear(x, weight)
        if weight.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return weight.numel() * weight.element_size() / statistics.median(seconds)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    gpt2.choose_device(argparse.Namespace(device=args.device, dtype="auto"), 0)
    what = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, {what}")
    contestants = models(args.device)
    ours = next(model for model, mine in contestants.values() if mine)
    for name, (n_new, batch, for_them, for_us) in SETTINGS.items():
        idx = torch.randint(50257, (1, 16), device=args.device).repeat(batch, 1)
        rates = {who: [] for who in contestants}
        for turn in range(args.turns + 1):
            for who, (model, mine) in contestants.items():
                n = n_new if turn else 8
                start = time.perf_counter()
                if mine:
                    sample.generate(model, idx, n, **for_us)
                else:
                    model.generate(idx, max_new_tokens=n, min_new_tokens=n, **{"do_sample": False, **for_them})
                if args.device != "cpu":
                    torch.cuda.synchronize()
                rates[who].append(n / (time.perf_counter() - start))
        *theirs, mine = (found[1:] for found in rates.values())
        ratios = [us / them for us, them in zip(mine, max(theirs, key=statistics.median))]
        medians = "; ".join(f"{who} {statistics.median(found[1:]):.1f}" for who, found in rates.items())
        print(f"{name}, {n_new} tokens: {medians} steps/s; ratio {statistics.median(ratios):.2f}"
              f" ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
        if "greedy" in name:
            size = sum(p.numel() * p.element_size() for p in ours.parameters() if p is not ours.wpe.weight)
            most = bandwidth(ours.wte.weight) / size
            print(f"  a token reads {size / 1e6:.0f} MB of weights, a product {most * size / 1e9:.1f} GB/s: at most"
                  f" {most:.1f} tokens/s; sample.py reaches {statistics.median(mine) / most:.0%} of it")  # fmt: skip


if __name__ == "__main__":
    main()
