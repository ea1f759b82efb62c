"""Progressive diverging: 3 shared blocks become 6, then 12, while training, and no switch changes the function.

    layer     0  1  2  3  4  5  6  7  8  9 10 11        every stage is a GPT-2 of 12 layers
    stage 1   A  A  A  A  B  B  B  B  C  C  C  C        3 blocks, each called 4 times in a row
    stage 2   A  A  A' A' B  B  B' B' C  C  C' C'       each is copied: 6 blocks, called twice
    stage 3   A  a  A' a' B  b  B' b' C  c  C' c'       12 blocks, called once

From stage 2 on the attention matrices are frozen and learn through LoRA (Hu et al. 2021, arXiv 2106.09685, section
4.1): W + alpha / rank B A, with B = 0 at birth, added up before it meets the tokens, so that a step costs what GPT-2's
does. A copy computes what its original did and B A is 0, so the loss is the same just before and just after a switch.
At the next switch W takes up its B A; at the end all of it is a plain GPT-2, which --export writes for gpt2.py.

Source: github.com/swortaljuju/lmsmall, "Progressive Diverging model", whose code did not do this. Its optimizer was
built before stages 2 and 3 were: none of their tensors were trained, only embeddings, last norm and head after a third
of the run. Its LoRA was a second attention with random weights: the loss jumped from 1.92 to 3.19 at the switch. And
its test loss is that of the stage 1 network. Relatives that work: Takase and Kiyono 2021 (arXiv 2104.06022) share
blocks in this order; Relaxed Recursive Transformers (Bae et al. 2024, arXiv 2410.20672) add LoRA to each call.

    python progressive.py --preset demo                                  some minutes on a laptop's CPU
    python progressive.py --device cuda --data data/NAME                 the source's size on one GPU

In the diff with gpt2.py: LoRALinear, the line of forward that picks a block for a layer, and grow. --lora-rank 0 grows
without freezing: the control experiment.
"""

import argparse
import base64
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # The network. A checkpoint fixes these; what follows may change when a run is resumed.
    vocab_size: int = 50257  # token ids; a new run takes the number of its data set
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 12  # calls of a block, a multiple of 4
    n_head: int = 6  # attention heads
    n_embd: int = 192  # width of the stream, in channels
    stage: int = 1  # 1: a block for 4 layers, 2: for 2 layers, 3: for each; training moves it on
    lora_rank: int = 16  # rank of what the attention matrices learn from stage 2 on; 0: they are not frozen
    lora_alpha: float = 32.0  # B A counts lora_alpha / lora_rank times
    dropout: float = 0.0  # probability, at the embedding, attention weights and both ends of a block
    # The run.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = "out/progressive"  # folder for ckpt.pt, best.pt and log.csv
    stages: str = "0.33,0.67"  # where stages 2 and 3 begin, in parts of max_steps
    export: str = ""  # file for the finished model as a gpt2.py checkpoint
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes a CUDA GPU if there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto takes bfloat16 where the device computes in it
    compile: bool | None = None  # torch.compile; when not given, on CUDA alone
    seed: int = 1337  # of weights, batches and dropout
    max_steps: int = 80_000  # optimizer steps
    batch_size: int = 8  # sequences an optimizer step, over all devices
    micro_batch: int = 8  # sequences a forward pass on one device; gradients add up to batch_size
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens at the start of val.bin that these evaluations score; the last scores all
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 6e-4  # its peak
    warmup_steps: int = 100  # steps of linear warm-up, before a cosine to zero
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    grad_clip: float = 1.0  # largest norm of the gradient


PRESETS = {
    "demo": dict(n_layer=12, n_head=4, n_embd=64, max_steps=750, eval_interval=250, log_interval=50,
                 learning_rate=4e-3, warmup_steps=60),
}  # fmt: skip


class Cache:
    """Keys and values of the tokens fed so far, (n_layer, B, n_head, block_size, head size) each, `length` filled."""

    def __init__(self, cfg, batch_size, like):
        shape = (cfg.n_layer, batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, layer, k, v):
        """Stores a layer's new keys and values (B, nh, T, hs); returns those of all tokens (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Makes row i of the batch what row rows[i] was: keeps, repeats or reorders them."""
        k, v = (old[:, rows, :, : self.length] for old in (self.k, self.v))
        if len(rows) != self.k.size(1):
            self.k, self.v = (old.new_empty(len(old), len(rows), *old.shape[2:]) for old in (self.k, self.v))
        self.k[:, :, :, : self.length], self.v[:, :, :, : self.length] = k, v


class LoRALinear(nn.Linear):
    """A Linear whose matrix, from stage 2 on, is frozen and learns in few dimensions: weight + scale lora_b lora_a."""

    def __init__(self, n_in, n_out, cfg):
        super().__init__(n_in, n_out)
        self.rank = cfg.lora_rank if cfg.stage > 1 else 0
        if self.rank:
            self.weight.requires_grad = False
            self.scale = cfg.lora_alpha / cfg.lora_rank
            self.lora_a = nn.Parameter(torch.randn(self.rank, n_in) / math.sqrt(n_in))
            self.lora_b = nn.Parameter(torch.zeros(n_out, self.rank))

    def matrix(self):
        """The matrix that it multiplies with, (n_out, n_in)."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a) if self.rank else self.weight

    def forward(self, x):
        return F.linear(x, self.matrix(), self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.c_attn = LoRALinear(cfg.n_embd, 3 * cfg.n_embd, cfg)
        self.c_proj = LoRALinear(cfg.n_embd, cfg.n_embd, cfg)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, nh, S, hs), S = tokens before + T
        S = k.size(2)
        mask = None  # query t stands at position S - T + t, and sees the keys up to there
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        # What scaled_dot_product_attention computes, without ever holding the (T, S) weights in memory:
        #   weights = q @ k.transpose(-2, -1) / math.sqrt(C // n_head)                        # (B, nh, T, S)
        #   weights = weights.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -math.inf)
        #   y = F.dropout(weights.softmax(-1), dropout) @ v                                   # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T == S and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, nh, T, hs) -> (B, T, C)


class MLP(nn.Module):
    """Feed-forward: C -> 4C -> C, with the tanh form of GELU (Hendrycks and Gimpel 2016, section 2)."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


LAYERS_A_BLOCK = {1: 4, 2: 2, 3: 1}  # by stage


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Model(nn.Module):
    """GPT-2, in which a block may be several layers. model(idx) -> logits (B, T, V); model(idx, targets) -> mean
    cross-entropy in nats, a scalar; model(idx, cache=cache) -> logits (B, 1, V) for the token after idx, which goes on
    from what the cache has seen. Raises ValueError if the heads do not divide the width, blocks not the layers, or a
    text is longer than block_size."""

    ahead = 1  # row i of the logits scores token i + ahead

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_embd % cfg.n_head:
            raise ValueError(f"n_embd {cfg.n_embd} is not a multiple of n_head {cfg.n_head}")
        if cfg.n_layer % 4 or cfg.stage not in (1, 2, 3) or cfg.lora_rank < 0:
            raise ValueError(f"n_layer {cfg.n_layer} must be a multiple of 4, stage {cfg.stage} 1 to 3, lora_rank >= 0")
        if cfg.export and Path(cfg.export).resolve() == Path(cfg.out, "ckpt.pt").resolve():
            raise ValueError(f"export {cfg.export} is the run's own checkpoint: name another file")
        switches(cfg)
        self.cfg = cfg
        padded = math.ceil(cfg.vocab_size / 64) * 64  # matrix products like round sizes; no one sees the extra ids
        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer // LAYERS_A_BLOCK[cfg.stage]))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        for name, p in self.named_parameters():
            if "lora" in name:
                continue
            if p.dim() == 2:  # the stream is a sum of 2 n_layer terms: scaled so that it starts no wider for it
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        T, past = idx.size(1), cache.length if cache is not None else 0
        if past + T > self.cfg.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size {self.cfg.block_size}")
        position = torch.arange(past, past + T, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C)
        for layer in range(self.cfg.n_layer):
            x = self.h[layer // LAYERS_A_BLOCK[self.cfg.stage]](x, cache, layer)
        if cache is not None:
            cache.length += T
            x = x[:, -self.ahead :]
        x = self.ln_f(x)
        if targets is not None:
            return linear_cross_entropy(x, self.wte.weight, targets, self.cfg.vocab_size)
        return F.linear(x, self.wte.weight)[..., : self.cfg.vocab_size]  # (B, T, V)

    def new_cache(self, batch_size):
        return Cache(self.cfg, batch_size, self.wte.weight)


# What the training below asks of each file: an optimizer, a learning rate for each step, and whether to grow.


def configure_optimizer(model, cfg):
    """AdamW (Loshchilov and Hutter 2019), decaying what multiplies (matrices, embeddings) and not what adds."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, cfg):
    """Of the step after `step` steps: linear warm-up to the peak, then half a cosine to zero at max_steps."""
    warmup = min(cfg.warmup_steps, cfg.max_steps // 2)  # a short run gets over it, too
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (cfg.max_steps - warmup)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def switches(cfg):
    """The steps before which stages 2 and 3 begin; never, for a part of the run that is 1 or more."""
    try:
        second, third = map(float, cfg.stages.split(","))
    except ValueError:
        second = third = math.nan
    if not 0 <= second <= third:
        raise ValueError(f"stages {cfg.stages!r} must be two parts of the run like '0.33,0.67'")
    return [min(round(part * cfg.max_steps), cfg.max_steps - 1) if part < 1 else math.inf for part in (second, third)]


def diverge(model, optimizer, cfg):
    """To the next stage, in place: each block becomes two equal ones, LoRA products move into their matrices and begin
    anew. What goes on to be trained keeps the moments that Adam had of it, in the copies, too."""
    old, blocks = dict(model.named_parameters()), model.h
    cfg.stage += 1
    torch.manual_seed(cfg.seed + cfg.stage)  # of lora_a: the same in all processes, and when resumed
    device = model.wte.weight.device
    model.h = nn.ModuleList(Block(cfg) for _ in range(2 * len(blocks))).to(device).train(model.training)
    for n, block in enumerate(model.h):
        block.load_state_dict(merged(blocks[n // 2]), strict=False)  # all but the new LoRA
    fresh, state = configure_optimizer(model, cfg), {}
    for name, p in model.named_parameters():
        origin = old.get(re.sub(r"^h\.(\d+)", lambda m: f"h.{int(m[1]) // 2}", name))
        if p.requires_grad and "lora" not in name and origin in optimizer.state:
            state[p] = {k: v.clone() for k, v in optimizer.state[origin].items()}
    for group, new in zip(optimizer.param_groups, fresh.param_groups):
        group["params"] = new["params"]
    optimizer.state.clear()
    optimizer.state.update(state)


def merged(module):
    """The state dict of a module in which each LoRALinear is the Linear that it amounts to."""
    state = {k: v.detach() for k, v in module.state_dict().items() if "lora" not in k}
    return state | {f"{k}.weight": m.matrix().detach() for k, m in module.named_modules() if isinstance(m, LoRALinear)}


def export(model, cfg, step):
    """Writes the model, at any stage, as a checkpoint of gpt2.py, which it is. Moments of Adam start anew."""
    _, tokenizer, _ = open_data(cfg.data)
    weights = {k: v for k, v in merged(model).items() if not k.startswith("h.")}
    for layer in range(cfg.n_layer):
        block = merged(model.h[layer // LAYERS_A_BLOCK[cfg.stage]])
        weights |= {f"h.{layer}.{k}": v.clone() for k, v in block.items()}
    config = asdict(cfg)
    for k in ("stage", "lora_rank", "lora_alpha", "stages", "export"):
        del config[k]
    state = {"model_file": "gpt2.py", "config": config, "tokenizer": tokenizer, "model": weights}
    state |= {"optimizer": {"state": {}}, "step": step, "rng": [cfg.seed, step], "best": math.inf, "seconds": 0.0}
    Path(cfg.export).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(cfg.export), lambda f: torch.save(state, f))


def validation(cfg):
    """A function that scores a model on the beginning of the validation split, where there is one with its ids."""
    meta, splits = {}, {}
    if Path(cfg.data, "meta.json").is_file():
        meta, _, splits = open_data(cfg.data)
    if "val" not in splits or meta["vocab_size"] != cfg.vocab_size:
        return lambda model: math.nan
    return lambda model: evaluate(model, splits["val"], meta["eot"], cfg, 1, nullcontext(), limit=2**13)


def grow(model, optimizer, cfg, step):
    """Called before each step and after the last. Returns True if it changed the network."""
    stage, first = cfg.stage, not dist.is_initialized() or dist.get_rank() == 0
    due = 1 + sum(step >= switch for switch in switches(cfg))
    val_loss = validation(cfg) if first and stage < due else lambda model: math.nan
    while cfg.stage < due:
        before = val_loss(model)
        diverge(model, optimizer, cfg)
        params, now, after = list(model.parameters()), len(model.h), val_loss(model)
        n, trained = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
        if first:
            print(f"step {step:,}: {now // 2} blocks become {now}: {n:,} parameters, {trained:,} of them trained,"
                  f" validation loss {before:.6f} -> {after:.6f}")  # fmt: skip
    if cfg.export and step >= cfg.max_steps and first:
        export(model, cfg, step)
        print(f"{cfg.export}: the same model for gpt2.py")
    return cfg.stage > stage


# --- training: the same lines in every model file ---


class LinearCrossEntropy(torch.autograd.Function):
    """The head's product, the softmax and their gradients, some rows at a time: the (B T, V) logits are the largest
    matrix of a small model, and only a chunk of them ever exists. d loss / d logits = softmax - target."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, vocab_size, smoothing, training):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        loss, dx = x.new_zeros((), dtype=torch.float32), torch.empty_like(x) if training else None
        w, dw = weight.to(dtype), torch.zeros_like(weight) if training else None
        db = torch.zeros_like(bias) if training and bias is not None else None
        share = (targets >= 0) / (targets >= 0).sum().clamp(min=1)  # (N), of each row in the mean; 0 for a target of -1
        rows = max(128, 2 ** (20 if kind == "cpu" else 27) // len(w))  # 4 MB of logits stay in a CPU's cache
        with torch.autocast(kind, enabled=False):
            for i in range(0, len(x), rows):
                part = slice(i, i + rows)
                x_i, s_i, t_i = x[part].to(dtype), share[part, None], targets[part, None].clamp(min=0)
                logits = (x_i @ w.T).float()  # (rows, V)
                if bias is not None:
                    logits += bias
                logits[:, vocab_size:] = -math.inf  # padding is no token
                logp = logits.log_softmax(-1)
                nll = (smoothing - 1) * logp.gather(1, t_i)
                if smoothing:  # Szegedy et al. 2016, section 7: this part of each target is spread over all ids
                    nll -= smoothing * logp[:, :vocab_size].mean(-1, keepdim=True)
                loss += (nll * s_i).sum()
                if training:
                    d = logp.exp_().to(dtype).scatter_add_(1, t_i, x_i.new_full(t_i.shape, smoothing - 1))
                    if smoothing:
                        d[:, :vocab_size] -= smoothing / vocab_size
                    dx[part] = d @ w * s_i
                    scaled = (x_i * s_i).to(dtype)
                    torch.addmm(dw, d.T, scaled, out=dw) if dtype == dw.dtype else dw.add_(d.T @ scaled)
                    if bias is not None:
                        db += (d.T @ s_i.to(dtype))[:, 0]
        ctx.save_for_backward(dx, dw, db)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw, db = ctx.saved_tensors
        return dx * grad, dw * grad, None if db is None else db * grad, None, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size, smoothing=0.0, bias=None):
    """Mean cross-entropy, in nats, of the logits x @ weight.T + bias. x (B, T, C), weight (V, C), bias (V), targets
    (B, T), -1 where a position does not count. Ids from vocab_size on are padding. smoothing: probability spread evenly
    over all ids."""
    training = torch.is_grad_enabled()
    apply = LinearCrossEntropy.apply
    if torch.compiler.is_compiling() and not x.is_cuda:  # what it makes of this for a CPU is slower: a step 1.4 times
        apply = torch.compiler.disable(apply)
    return apply(x.flatten(0, 1), weight, bias, targets.flatten(), vocab_size, smoothing, training)


def windows(tokens, starts, length, eot):
    """tokens[s : s + length] for each s of starts, as (len(starts), length) int64. Before a text stands end of text."""
    rows = [np.concatenate([np.full(max(0, -s), eot), tokens[max(0, s) : s + length]]) for s in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def batch(tokens, cfg, ahead, step, rank, world):
    """This rank's rows of the batch of a step, idx and targets, (rows, block_size) each. A pure function of seed and
    step: whoever resumes, or shares the work among more devices, sees the same data."""
    length = cfg.block_size + ahead
    starts = np.random.default_rng([cfg.seed, step]).integers(len(tokens) - length + 1, size=cfg.batch_size)
    rows = windows(tokens, starts[rank::world], length, 0)
    return rows[:, :-ahead], rows[:, ahead:]


@torch.no_grad()
def evaluate(model, tokens, eot, cfg, ahead, amp, limit=None, stride=None, rank=0, world=1):
    """Mean nats a token over tokens[:limit], each scored once. A window of block_size tokens moves on by `stride`
    (block_size if not given) and only what is new in it is scored: a short stride gives every token more context."""
    n, stride = min(len(tokens), limit or len(tokens)), min(stride or cfg.block_size, cfg.block_size)
    length = min(n, cfg.block_size)
    ends = [0, length]
    while ends[-1] < n:
        ends.append(min(ends[-1] + stride, n))
    total, device = torch.zeros((), dtype=torch.float64), next(model.parameters()).device
    model.eval()
    for i in range(1 + rank * cfg.micro_batch, len(ends), world * cfg.micro_batch):
        part = range(i, min(i + cfg.micro_batch, len(ends)))
        rows = windows(tokens, [ends[k] - length - ahead for k in part], length + ahead, eot)
        new = torch.tensor([ends[k] - ends[k - 1] for k in part])[:, None]
        targets = rows[:, ahead:].where(torch.arange(length) >= length - new, -1)
        with amp:
            total += model(rows[:, :-ahead].to(device), targets.to(device)).item() * new.sum()
    model.train()
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.item() / n


def perplexity(nats):
    return math.exp(min(nats, 700))  # e**700 is about what a float holds


TOKENIZER = dict(name=str, eot=int, vocab_size=int, ranks=str)  # what a checkpoint says of it: enough to decode


def open_data(folder, check=False):
    """A data set: (meta.json, what a checkpoint says of its tokenizer, memory map of each split). check: compares each
    split with its checksum. Exits with one line if a part is missing or does not fit the others."""
    folder, splits = Path(folder), {}
    again = f"Prepare it again: python prepare_data.py {folder.name}"
    if not folder.is_dir():
        sys.exit(f"--data {folder}: no such folder. To make it: python prepare_data.py {folder.name}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokenizer = {"name": meta["tokenizer"], "eot": meta["eot"], "vocab_size": meta["vocab_size"], "ranks": ""}
        if {k: type(v) for k, v in tokenizer.items()} != TOKENIZER or not re.fullmatch(r"[\w:.-]+", tokenizer["name"]):
            raise ValueError("no such tokenizer")
        if not 0 < meta["vocab_size"] <= 2**16:
            raise ValueError("more ids than 16 bits hold, or none")
        if meta["tokenizer"].startswith("bpe:"):
            tokenizer["ranks"] = (folder / "tokenizer.tiktoken").read_text(encoding="utf-8")
        for split, counts in meta["splits"].items():
            path, n = folder / f"{split}.bin", counts["tokens"]
            if any(type(counts[k]) is not int for k in ("tokens", "bytes", "words")):
                raise ValueError("counts that are none")
            if (size := path.stat().st_size) != 2 * n or n < 1 or counts["bytes"] < 1 or counts["words"] < 0:
                sys.exit(f"{path} has {size:,} bytes, but meta.json says {n:,} tokens of 2 bytes. {again}")
            splits[split] = np.memmap(path, dtype="<u2", mode="r")
            if check and hashlib.sha256(splits[split]).hexdigest() != counts["sha256"]:
                sys.exit(f"{path} has another SHA-256 than meta.json says: it was changed. {again}")
            if (top := splits[split].max()) >= meta["vocab_size"]:
                sys.exit(f"{path} holds id {top}, but meta.json says {meta['vocab_size']:,} ids in all. {again}")
        tokens = {base64.b64decode(line.split()[0], validate=True) for line in tokenizer["ranks"].splitlines()}
        if tokens and (len(tokens) != meta["vocab_size"] - 1 or not tokens >= {bytes([b]) for b in range(256)}):
            sys.exit(f"{folder / 'tokenizer.tiktoken'} is damaged, or another data set's. {again}")
        if "train" not in splits or not 0 <= meta["eot"] < meta["vocab_size"]:
            raise ValueError("no train split, or an end-of-text id beyond the vocabulary")
    except FileNotFoundError as e:
        sys.exit(f"{e.filename} is missing. {again}")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as e:
        why = repr(e)[:100]
        sys.exit(f"{folder / 'meta.json'} is not as prepare_data.py writes it, or tokenizer.tiktoken: {why}. {again}")
    return meta, tokenizer, splits


def write_whole(path, write):
    """Has write(file) fill a temporary file, then gives it its name: what stood there stays whole until then."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as e:  # what torch.save makes of a full disk
        raise OSError(0, "could not be written; is the disk full?", str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claim(folder):
    """Makes a folder and keeps it for this process, until it leaves the block or dies. Exits with one line if another
    process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        sys.exit(f"{folder} is in use by another run: --out FOLDER starts one elsewhere; --resume goes on with this "
                 "one when it has ended")  # fmt: skip
    except (ImportError, OSError):  # Windows, or a file system without locks: no one watches there
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing came of it
        if lock is not None:
            os.close(lock)


def read_checkpoint(path):
    """The dict that one of the model files saved; nothing in it is executed. Exits with one line if it is not one."""
    kinds = dict(model_file=str, config=dict, tokenizer=dict, model=dict, optimizer=dict, step=int, best=float)
    try:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():
                raise ValueError(f"{part} has another checksum")  # which torch.load would not notice
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := [k for k, kind in {**kinds, "seconds": float}.items() if not isinstance(ckpt.get(k), kind)]:
            raise ValueError(f"no {', '.join(wrong)} as the model files write it")
        tokenizer, n_layer = ckpt["tokenizer"], ckpt["config"].get("n_layer")
        if not all(isinstance(v, str | int | float | None) for v in ckpt["config"].values()):
            raise ValueError("a config that holds more than numbers and words")
        if {k: type(v) for k, v in tokenizer.items()} != TOKENIZER:
            raise ValueError("its tokenizer is none")
        if not re.fullmatch(r"\w+\.py", ckpt["model_file"]) or not re.fullmatch(r"[\w:.-]+", tokenizer["name"]):
            raise ValueError("names that are none")
        if ckpt["step"] < 0 or not 0 <= ckpt["seconds"] < math.inf:
            raise ValueError(f"step {ckpt['step']} after {ckpt['seconds']} s")
        if isinstance(n_layer, int) and n_layer > len(ckpt["model"]):
            raise ValueError(f"{n_layer} layers in {len(ckpt['model'])} tensors")
    except FileNotFoundError:
        sys.exit(f"{path}: no such checkpoint")
    except Exception as e:  # torch, zip and pickle each have their own for a damaged file
        why = str(e).splitlines()[0][:100] if type(e) is ValueError else type(e).__name__
        sys.exit(f"{path}: cut short, damaged, or not a checkpoint of this repository ({why})")
    return ckpt


def open_log(path, step):
    """log.csv up to `step`; returns a function that appends a row. What came after `step` will be written again."""
    header = "step,tokens,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,tokens_per_s,seconds"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = [line for line in lines if re.match(r"\d{1,15}(,[^,]*){8}$", line) and int(line.split(",")[0]) <= step]
    write_whole(path, lambda file: file.write("".join(line + "\n" for line in [header, *lines]).encode()))

    def append(*cells):
        with open(path, "a", encoding="utf-8", newline="") as file:
            text = ("" if c is None else f"{c:.9g}" if isinstance(c, float) else str(c) for c in cells)
            file.write(",".join(text) + "\n")

    return append


def choose_device(cfg, local_rank):
    """(device, dtype to compute in). bfloat16 pays on GPUs from Ampere on, and on CPUs with AMX or AVX512-BF16."""
    try:
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"--device {cfg.device}: not to be had here ({str(e).splitlines()[0]}). Try --device cpu")
    bf16 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    elif device.type == "cpu" and sys.platform == "linux":
        bf16 = re.search("amx_bf16|avx512_bf16", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # else glibc gives freed memory back, and the kernel zeroes it at every step
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks of up to 32 MB come from the heap,
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps up to 2 GB of them
    return device, getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if bf16 else "float32")


# Dense bfloat16 peak in FLOP/s, from the makers' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def flops_per_token(model, cfg):
    """Floating point operations of one training step for one token, counted while one sequence goes through it."""
    from torch.utils.flop_counter import FlopCounterMode

    idx = torch.zeros(1, cfg.block_size, dtype=torch.long, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / cfg.block_size


def parse(argv):
    """The command line as (cfg, options that are not in Config, checkpoint to start from or None). A field of Config
    comes from the command line, else from the preset, else from the checkpoint, else it has its default."""
    name = Path(__file__).name
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"{name}: {message} (--help lists all options)")
    parser.add_argument("--preset", choices=PRESETS, help="a named size with its training")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--init-from", metavar="CKPT", help="start from its weights, with a fresh optimizer")
    parser.add_argument("--eval-only", action="store_true", help="score ckpt.pt in --out, or --init-from, and stop")
    parser.add_argument("--split", default="val", help="with --eval-only: train, val or test (default: val)")
    parser.add_argument("--stride", type=int, help="with --eval-only: score the last STRIDE targets of each window")
    parser.add_argument("--check", action="store_true", help="compare the data with its checksums first")
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, bool | None) else {"type": f.type}
        about = f"{comments[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **kind)
    options = parser.parse_args(argv)
    names = [f.name for f in fields(Config)]
    given = {**PRESETS.get(options.preset, {}), **{k: v for k, v in vars(options).items() if k in names}}
    ckpt, inherited = None, {}
    if options.init_from or options.resume or options.eval_only:
        path = options.init_from or Path(given.get("out", Config.out), "ckpt.pt")
        ckpt = read_checkpoint(path)
        if ckpt["model_file"] != name:
            sys.exit(f"{path} was written by {ckpt['model_file']}: use that file, or name another checkpoint")
        then, network = ckpt["config"], names[: names.index("dropout")]
        for k in network:
            if k in given and given[k] != then.get(k):
                sys.exit(f"{path} has {k} {repr(then.get(k))[:50]}, not {given[k]}: a checkpoint fixes the network")
        keep = set(names) - {"out", "device", "compile"} if options.resume or options.eval_only else set(network)
        inherited = {k: v for k, v in then.items() if k in keep}  # a field that is newer than it has its default
    cfg = Config(**{**inherited, **given})
    for f in fields(Config):
        if not isinstance(v := getattr(cfg, f.name), int | float if f.type is float else f.type):
            sys.exit(f"{path}: its {f.name} is {repr(v)[:50]}, which is no {f.type.__name__}")
    positive = "block_size n_embd n_head batch_size micro_batch eval_interval eval_tokens log_interval"
    for k in positive.split():
        if not 1 <= getattr(cfg, k) < 2**31:
            parser.error(f"--{k.replace('_', '-')} {getattr(cfg, k)} is not in 1 to {2**31 - 1:,}")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        parser.error(f"--dtype {cfg.dtype} is none of auto, float32, bfloat16")
    if options.stride is not None and options.stride < 1:
        parser.error(f"--stride {options.stride} is less than 1")
    return cfg, options, ckpt


def train(cfg, options, ckpt, rank, world, local_rank):
    """Trains, resumes or evaluates, as the command line says. One of these runs in each of `world` processes."""
    out, name = Path(cfg.out), Path(__file__).name

    def say(text):
        if rank == 0:
            with suppress(OSError):  # who read us may have gone: the run goes on
                print(text, flush=True)

    if not (options.resume or options.eval_only) and any((out / f).exists() for f in ("ckpt.pt", "log.csv")):
        sys.exit(f"{out} holds a run already: --resume goes on with it, --out FOLDER starts another")
    device, dtype = choose_device(cfg, local_rank)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # The data, and a network for it.
    meta, tokenizer, splits = open_data(cfg.data, options.check)
    if ckpt is None:
        cfg.vocab_size = getattr(options, "vocab_size", meta["vocab_size"])
        if cfg.vocab_size != meta["vocab_size"]:
            sys.exit(f"--vocab-size {cfg.vocab_size}: {cfg.data} has {meta['vocab_size']} ids")
    elif ckpt["tokenizer"] != tokenizer:
        theirs = ckpt["tokenizer"]["name"]
        sys.exit(f"--data {cfg.data} ({tokenizer['name']}) has other ids than the checkpoint ({theirs})")
    torch.manual_seed(cfg.seed)
    try:
        model = Model(cfg)
        if ckpt:
            model.load_state_dict(ckpt["model"])
        model.to(device)
        optimizer = None if options.eval_only else configure_optimizer(model, cfg)
        if options.resume:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": ckpt["optimizer"]["state"]})
            for p, state in optimizer.state.items():
                if {k: v.shape for k, v in state.items()} != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                    raise ValueError("the checkpoint has Adam's moments of another network")
    except Exception as e:  # a Config that makes no network, or weights that are another's
        if ckpt is None and not isinstance(e, (ValueError, RuntimeError)):
            raise
        sys.exit(f"{name}: {' '.join(str(e).split())[:200]}")
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    fast = torch.compile(model) if compiled else model

    def score(split, limit=None, stride=None):
        """(nats a token, bits a byte) of a split, or of its first tokens at the whole split's bytes a token."""
        eot, counts = meta["eot"], meta["splits"][split]
        nats = evaluate(fast, splits[split], eot, cfg, model.ahead, amp, limit, stride, rank, world)
        return nats, nats / math.log(2) * counts["tokens"] / counts["bytes"]

    if options.eval_only:
        if options.split not in splits:
            sys.exit(f"--split {options.split}: {cfg.data} has {', '.join(splits)}")
        (nats, bits), n = score(options.split, stride=options.stride), meta["splits"][options.split]
        a_word, a_byte = perplexity(nats * n["tokens"] / max(1, n["words"])), perplexity(bits * math.log(2))
        move = min(options.stride or cfg.block_size, cfg.block_size)
        say(f"{options.split}: {n['tokens']:,} tokens, in windows of {cfg.block_size} that move on by {move}")
        say(f"{nats:.4f} nats a token, {bits:.4f} bits a byte")
        say(f"perplexity: {perplexity(nats):.3f} a token, {a_word:.3f} a word, {a_byte:.4f} a byte")
        return
    if len(splits["train"]) < cfg.block_size + model.ahead:
        n = len(splits["train"])
        sys.exit(f"{cfg.data}/train.bin has {n:,} tokens, fewer than one window of {cfg.block_size} + {model.ahead}")
    if cfg.batch_size < world:
        sys.exit(f"--batch-size {cfg.batch_size}: each of {world} devices needs a sequence")

    # What a step needs, and where it starts.
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in gpu), None)
    flops = flops_per_token(model, cfg) if peak else None
    step, best, seconds = 0, math.inf, 0.0  # seconds: spent on steps, not on evaluations
    if options.resume:
        step, best, seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]
    n_params, per_step = sum(p.numel() for p in model.parameters()), cfg.batch_size * cfg.block_size
    how = f"{gpu or device} x {world}, {str(dtype)[6:]}{', compiled' * compiled}"
    say(f"{name}: {n_params:,} parameters, {per_step:,} tokens a step, {how}, {cfg.data} -> {out}")

    def save(file):
        if rank != 0:
            return
        nats = evaluate(model, splits["train"], meta["eot"], cfg, model.ahead, amp, limit=cfg.block_size)
        if not math.isfinite(nats):
            sys.exit(f"after step {step} the loss is {nats}: not saved. The last good checkpoint, if any, is "
                     f"{out / 'ckpt.pt'}: --resume with a lower --learning-rate")  # fmt: skip
        # Each step draws its batch and its dropout from (seed, step): that is all the state of randomness there is.
        state = {"model_file": name, "config": asdict(cfg), "tokenizer": tokenizer, "model": model.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "step": step, "rng": [cfg.seed, step]}
        state |= {"best": best, "seconds": seconds}
        write_whole(out / file, lambda f: torch.save(state, f))

    signals = []  # Ctrl-C and SIGTERM let the step finish and save; a second one ends it there

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    if rank == 0:
        if not options.resume:
            save("ckpt.pt")  # from here on there is something to resume
        log = open_log(out / "log.csv", step)

    def fetch(step):
        """This rank's micro-batches of a step, on their way to the device."""
        rows = batch(splits["train"], cfg, model.ahead, step, rank, world)
        if device.type == "cuda":
            rows = [t.pin_memory() for t in rows]
        idx, targets = (t.to(device, non_blocking=True) for t in rows)
        return list(zip(idx.split(cfg.micro_batch), targets.split(cfg.micro_batch)))

    # The loop.
    model.train()
    first, replica, stopped, data, mark = step, None, False, fetch(step), (step, seconds)
    while not stopped:
        if grow(model, optimizer, cfg, step) or replica is None:
            fast = torch.compile(model) if compiled else model
            replica = nn.parallel.DistributedDataParallel(fast) if world > 1 else fast
        if step >= cfg.max_steps:
            break
        start = time.perf_counter()
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]))  # of dropout
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for i, (idx, targets) in enumerate(data):
            # Processes exchange gradients in the backward pass of the last micro-batch alone.
            with replica.no_sync() if world > 1 and i < len(data) - 1 else nullcontext():
                with amp:
                    part = replica(idx, targets) * (len(idx) * world / cfg.batch_size)
                part.backward()
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        data = fetch(step + 1)  # while a GPU is still computing
        report = torch.stack([loss / world, torch.tensor(float(len(signals)), device=device)])
        if world > 1:
            dist.all_reduce(report)
        loss, stopped, norm = *report.tolist(), norm.item()
        if not math.isfinite(loss + norm):
            sys.exit(f"step {step + 1}: loss {loss}, gradient norm {norm}; the step was not taken. The last good "
                     f"checkpoint is {out / 'ckpt.pt'}: --resume with a lower --learning-rate")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seconds = step + 1, seconds + time.perf_counter() - start

        val = bits = None
        evaluating = step % cfg.eval_interval == 0 or step == cfg.max_steps
        if evaluating and "val" in splits:
            val, bits = score("val", cfg.eval_tokens)
            say(f"step {step:,}: validation loss {val:.4f}, perplexity {perplexity(val):.2f}, {bits:.4f} bits a byte")
            if val < best:
                best = val
                save("best.pt")
            if step == cfg.max_steps and len(splits["val"]) > cfg.eval_tokens:
                val, bits = score("val")
        if step % cfg.log_interval == 0 or evaluating or stopped:
            per_second = (step - mark[0]) * per_step / (seconds - mark[1])
            left = int((cfg.max_steps - step) * per_step / per_second)
            left = f"{left // 3600:02}:{left // 60 % 60:02}:{left % 60:02}"
            mfu = f"  MFU {per_second * flops / peak / world:.1%}" if peak else ""
            say(f"step {step:>6,}/{cfg.max_steps:,}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}"
                f"  {per_second:>9,.0f} tokens/s{mfu}  {left} left")  # fmt: skip
            if rank == 0:
                log(step, step * per_step, loss, val, bits, lr, norm, per_second, seconds)
            mark = (step, seconds)
        if evaluating or stopped:
            save("ckpt.pt")

    if stopped:
        say(f"stopped after step {step:,}, saved in {out / 'ckpt.pt'}: --resume goes on")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if step == first:
        say(f"{out} is finished: {step:,} steps. A larger --max-steps goes on")
    else:
        if "val" in splits:
            say(f"all of val: {val:.4f} nats a token, perplexity {perplexity(val):.2f}, {bits:.4f} bits a byte")
        say(f"{step:,} steps in {seconds:.0f} s. Hear it: python sample.py --ckpt {out / 'ckpt.pt'}")


def main(argv=None):
    env, handlers = os.environ, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    # torchrun sets these, one process for each device
    rank, world, local_rank = (int(env.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters that a folder's name has
    cfg, options, ckpt = parse(argv)
    try:
        with claim(Path(cfg.out)) if rank == 0 and not options.eval_only else nullcontext():
            train(cfg, options, ckpt, rank, world, local_rank)
    except OSError as e:
        sys.exit(f"{e.filename or cfg.out}: {e.strerror or e}")
    except MemoryError:
        sys.exit("not enough memory: take a smaller --batch-size, --micro-batch or network")
    except KeyboardInterrupt:  # before the first step, or while evaluating
        sys.exit(130)
    except RuntimeError as e:
        if world == 1 or not re.search("gloo|NCCL|store|[Cc]onnection", str(e)):
            raise
        sys.exit(f"process {rank} of {world}: another one is gone ({str(e).splitlines()[0][:100]}). --resume goes on "
                 f"from {Path(cfg.out, 'ckpt.pt')}")  # fmt: skip
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
