"""Decoding speed: sample.py beside Hugging Face's generate. GPT-2 124M with random weights, the same in both.

Both compute in float32 and in bfloat16; the faster generate is the peer. Nucleus sampling has two settings: "flat",
random weights, whose next token is anything; "text", the last norm scaled by 6.5, which gives the entropy that a next
token has in text, 4 to 5 nats. Prints steps/s, and ratios of turns. On a GPU: python bench/decode.py cuda
"""

import statistics
import sys
import tempfile
import time

import torch
import transformers
from train import compare, machine

import gpt2
import sample

NUCLEUS = {"do_sample": True, "top_p": 0.95, "top_k": 0}, {"decode": "nucleus", "top_p": 0.95}
SETTINGS = {  # name: (new tokens, batch, scale of the last norm, generate's options, sample.generate's)
    "greedy, batch 1": (128, 1, 1.0, {}, {"decode": "greedy"}),
    "beam 4, batch 1": (32, 1, 1.0, {"num_beams": 4, "early_stopping": "never"}, {"decode": "beam", "beam_width": 4}),
    "nucleus, batch 8, flat": (32, 8, 1.0, *NUCLEUS),
    "nucleus, batch 8, text": (32, 8, 6.5, *NUCLEUS),
}


def build(device):
    """{name: model}, all with the same weights."""
    torch.manual_seed(0)
    config = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    ours, models = gpt2.Model(gpt2.Config(**config)), {}
    weights = {name: p.T if name.endswith(("attn.weight", "c_fc.weight", "c_proj.weight")) else p[:50257]
               for name, p in ours.named_parameters()}  # fmt: skip
    state = {"model_file": "gpt2.py", "config": config, "model": ours.state_dict(), "step": 0}
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(state | {"tokenizer": {"name": "bytes", "ranks": ""}}, file.name)
        for dtype in (torch.float32, torch.bfloat16):
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
            theirs.transformer.load_state_dict(weights)
            theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
            models[f"generate, {dtype}"] = theirs.eval().to(device, dtype)
            models[f"sample.py, {dtype}"] = sample.load(file.name, device)[0].to(dtype)
    return models


if __name__ == "__main__":
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    print(f"{machine(device)}, transformers {transformers.__version__}", gpt2.choose_device(device, "auto"))
    models = build(device)
    for name, (n_new, batch, scale, for_them, for_us) in SETTINGS.items():
        idx = torch.randint(50257, (1, 16), device=device).repeat(batch, 1)
        speeds = {who: [] for who in models}
        for model in models.values():
            getattr(model, "transformer", model).ln_f.weight.data.fill_(scale)
        for _ in range(6):
            for who, model in models.items():
                start = time.perf_counter()
                if isinstance(model, gpt2.Model):
                    new = sample.generate(model, idx, n_new, **for_us)
                else:
                    new = model.generate(idx, max_new_tokens=n_new, min_new_tokens=n_new, **for_them)
                new.cpu()  # waits for a GPU
                speeds[who].append(n_new / (time.perf_counter() - start))
        speeds = {who: found[1:] for who, found in speeds.items()}
        best = max((who for who in models if "generate" in who), key=lambda who: statistics.median(speeds[who]))
        print(f"{name}, {n_new} tokens, steps/s; ratios to {best}")
        for who, found in speeds.items():
            print(f"  {who}: {statistics.median(found):.1f}, ratio {compare(found, speeds[best])}", flush=True)
