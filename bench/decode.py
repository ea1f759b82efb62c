"""Decoding speed of GPT-2 124M with random weights: sample.py beside Hugging Face's generate.

Both compute in float32 and in bfloat16; the faster generate is the peer. Nucleus sampling has two
settings: "flat", random weights, whose next token is anything; "text", the last norm scaled by 6.5,
so that the entropy is that of text, 4 to 5 nats. On a GPU: python bench/decode.py cuda
"""

import copy
import os
import statistics
import sys
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the model files, before torch is imported

import torch
import transformers
from train import compare, machine

import gpt2
import sample

BEAM = {"num_beams": 4, "early_stopping": "never"}, {"decode": "beam", "beam_width": 4}
NUCLEUS = {"do_sample": True, "top_p": 0.95, "top_k": 0}, {"decode": "nucleus", "top_p": 0.95}
SETTINGS = {  # new tokens, batch, scale of the last norm, options of generate and sample.generate
    "greedy, batch 1": (128, 1, 1.0, {}, {"decode": "greedy"}),
    "beam 4, batch 1": (32, 1, 1.0, *BEAM),
    "nucleus, batch 8, flat": (32, 8, 1.0, *NUCLEUS),
    "nucleus, batch 8, text": (32, 8, 6.5, *NUCLEUS),
}


def build(device):
    """{name: model}, all with the same weights."""
    torch.manual_seed(0)
    ours = gpt2.Model(gpt2.Config(vocab_size=50257, **gpt2.PRESETS["gpt2"])).eval()
    matrices = ("attn.weight", "c_fc.weight", "c_proj.weight")  # transposed in OpenAI's networks
    weights = {}
    for name, p in ours.named_parameters():
        weights[name] = p.T if name.endswith(matrices) else p[:50257]
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        theirs.transformer.load_state_dict(weights)
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = 0
        models[f"generate, {dtype}"] = theirs.eval().to(device, dtype)
        model = copy.deepcopy(ours).to(device, dtype)
        if device == "cpu":
            sample.use_few_rows(model)
        models[f"sample.py, {dtype}"] = model
    return models


def main(device="cpu"):
    print(f"{machine(device)}, transformers {transformers.__version__}")
    models = build(device)
    for name, (n_new, batch, scale, for_them, for_us) in SETTINGS.items():
        idx = torch.randint(50257, (1, 16), device=device).repeat(batch, 1)
        for_them = for_them | {"max_new_tokens": n_new, "min_new_tokens": n_new}
        speeds = {who: [] for who in models}
        for model in models.values():
            getattr(model, "transformer", model).ln_f.weight.data.fill_(scale)
        for _ in range(6):
            for who, model in models.items():
                start = time.perf_counter()
                if isinstance(model, gpt2.Model):
                    new = sample.generate(model, idx, n_new, **for_us)
                else:
                    new = model.generate(idx, **for_them)
                new.cpu()  # waits for a GPU
                speeds[who].append(n_new / (time.perf_counter() - start))
        speeds = {who: found[1:] for who, found in speeds.items()}
        medians = {who: statistics.median(found) for who, found in speeds.items()}
        best = max((who for who in models if "generate" in who), key=medians.get)
        print(f"{name}, {n_new} tokens, steps/s; ratios to {best}")
        for who, found in speeds.items():
            print(f"  {who}: {medians[who]:.1f}, ratio {compare(found, speeds[best])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
