"""Decoding speed: sample.py beside Hugging Face's generate, and a cached step of other models beside gpt2.py's.

    python bench/decode.py                     GPT-2 124M, random weights, the same in both
    python bench/decode.py --device cuda       bfloat16 in both
    python bench/decode.py --models            milliseconds of a decoding step with a full context

The last norm is scaled by 6.5, which gives the next token about the entropy that it has in text, 4 to 5 nats: a nucleus
of nearly uniform probabilities would hold the whole vocabulary. On a CPU sample.py computes in float32, and generate
takes turns in float32 and in bfloat16: the faster one counts. Turns alternate (A B C A B C ...) in one process; the
first does not count. Prints steps/s (tokens per text), and the median and range of our ratio.
"""

import argparse
import importlib
import statistics
import sys
import time

import torch
import transformers
from train import ROOT, compare, machine

sys.path.insert(0, str(ROOT))
import gpt2
import sample

SETTINGS = {  # name: (new tokens, batch, generate's options, sample.generate's)
    "greedy, batch 1": (128, 1, {}, {"decode": "greedy"}),
    "beam 4, batch 1": (32, 1, {"num_beams": 4, "early_stopping": "never"}, {"decode": "beam", "beam_width": 4}),
    "nucleus, batch 8": (32, 8, {"do_sample": True, "top_p": 0.95, "top_k": 0}, {"decode": "nucleus", "top_p": 0.95}),
}
PAIRS = [  # with as many parameters
    ("gpt2.py --block-size 1024 --n-layer 15 --n-head 4 --n-embd 128", "conv_attention.py --preset hourglass"),
    ("gpt2.py --block-size 512 --n-layer 8 --n-head 4 --n-embd 256", "mixer.py"),
]


def build(device):
    """{name: (model, whether it is ours)}, all with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device).eval()
    ours = gpt2.Model(gpt2.Config(50257, 1024, 12, 12, 768)).to(device).eval()
    with torch.no_grad():
        for name, p in theirs.transformer.named_parameters():
            p = p.T if p.dim() == 2 and name.startswith("h.") else p
            ours.get_parameter(name)[: len(p)] = p
        theirs.transformer.ln_f.weight.mul_(6.5)
        ours.ln_f.weight.mul_(6.5)
    half = transformers.GPT2LMHeadModel(theirs.config).to(device, torch.bfloat16).eval()
    half.load_state_dict(theirs.state_dict())
    for model in (theirs, half):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if device == "cpu":
        return {"generate, float32": (theirs, False), "generate, bfloat16": (half, False), "sample.py": (ours, True)}
    return {"generate, bfloat16": (half, False), "sample.py, bfloat16": (ours.to(torch.bfloat16), True)}


def seconds(run, *args, **options):
    """How long run(*args, **options) takes."""
    start = time.perf_counter()
    run(*args, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_with_generate(args):
    models = build(args.device)
    for name, (n_new, batch, for_them, for_us) in SETTINGS.items():
        idx = torch.randint(50257, (1, 16), device=args.device).repeat(batch, 1)
        speeds = {who: [] for who in models}
        n_new = min(n_new, args.tokens)
        for _ in range(args.turns + 1):
            for who, (model, mine) in models.items():
                if mine:
                    spent = seconds(sample.generate, model, idx, n_new, **for_us)
                else:
                    spent = seconds(model.generate, idx, max_new_tokens=n_new, min_new_tokens=n_new, **for_them)
                speeds[who].append(n_new / spent)
        *theirs, ours = (found[1:] for found in speeds.values())
        medians = "; ".join(f"{who} {statistics.median(found[1:]):.1f}" for who, found in speeds.items())
        print(f"{name}, {n_new} tokens: {medians} steps/s; ratio {compare(ours, max(theirs, key=statistics.median))}")


def feed(model, idx, cache):
    for token in idx.unbind(1):
        model(token[:, None], cache=cache)


def compare_models(args):
    for pair in PAIRS:
        models, times, n = [], ([], []), min(64, args.tokens)
        for command in pair:
            file, *options = command.split()
            module = importlib.import_module(file.removesuffix(".py"))
            models.append(module.Model(module.parse([*options, "--vocab-size", "4096"])[0]).to(args.device).eval())
        for _ in range(args.turns + 1):
            for model, found in zip(models, times):
                idx = torch.randint(4096, (1, model.cfg.block_size), device=args.device)
                cache = model.new_cache(1)
                model(idx[:, :-n], cache=cache)
                found.append(1000 / n * seconds(feed, model, idx[:, -n:], cache))
        theirs, ours = (found[1:] for found in times)
        medians = f"{statistics.median(ours):.2f} / {statistics.median(theirs):.2f} ms per step"
        print(f"{pair[1]} / {pair[0]}: {medians} = {compare(ours, theirs)}", flush=True)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", action="store_true", help="compare model files, not sample.py and generate")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns that count (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a turn at most (default: %(default)s)")
    args = parser.parse_args()
    print(f"{machine(args.device)}, transformers {transformers.__version__}")
    (compare_models if args.models else compare_with_generate)(args)


if __name__ == "__main__":
    main()
