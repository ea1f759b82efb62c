"""Convolution attention: compress 64 tokens into one vector, attend over the short sequence, expand it again.

    idx (B, T)                                                            logits (B, T, V)
      | wte + wpe                                                           ^ ln_f, transpose of wte
      v                                                                     |
    (B, T,    48)   1 block   --+                                +-->   1 block         a level: its width doubles,
    (B, T/4,  96)      2 blocks +--+                          +--+   2 blocks           its length is a quarter
    (B, T/16, 192)        2 blocks +--+                    +--+   2 blocks
    (B, T/64, 384)                    +-->   2 blocks   ---+
                         compress: Linear(4 C, 2 C)      expand: Linear(2 C, 4 C)

`compress` maps four neighbouring vectors, concatenated, to one: a Conv1d whose kernel size is its stride. `expand` maps
one vector to four: a ConvTranspose1d with a bias for each of the four. There are two ways to train this:

--ahead 64, the source's objective: row i scores token i + 64. A block of 64 tokens is read whole, and the 64 tokens of
    the next one are predicted at once, independently of each other. Sampling makes 64 tokens per forward pass. What the
    text says that far ahead is mostly which words it uses, so the output may copy them from the text (see Pointer).
--ahead 1, next-token prediction as in Hourglass (Nawrot et al. 2022, arXiv 2110.13711, sections 2.2 and 2.3): the
    sequence is shifted right by 3 before it is compressed, so that a group of four is complete with its newest token,
    and a skip connection leads around each shortened part. With a cache, levels advance every 1, 4, 16 and 64 tokens.

Source: github.com/swortaljuju/lmsmall, "Convolution Attention Model". Its own expander leaks the targets: a Conv1d that
takes positions for channels, so every output sees all inputs, among them 960 of the 1,024 targets of a window. The
published loss of 1.42, where GPT-2 has 3.54, is that of copying them. --expander sequence keeps it as an exhibit: on
i.i.d. tokens over 4 symbols, where no honest loss is below ln 4 = 1.386 nats, it brings those targets to 1.26.

    python conv_attention.py --preset demo                                  four minutes on a laptop's CPU
    python conv_attention.py --preset demo --ahead 1 --out out/hourglass    the same, next-token prediction
    python conv_attention.py --device cuda                                  the source's size on one GPU

In the diff with gpt2.py: Level, LevelsCache, whose levels advance at different rates, and Pointer.
"""

import argparse
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Config:
    # The network. A checkpoint fixes these; the options below may change when a run is resumed.
    vocab_size: int = 50257  # vocabulary size; training takes that of its data set
    block_size: int = 1024  # longest context, in tokens
    n_layer: str = "1,2,2,2,2,2,1"  # blocks on the way down (3 levels), at the bottom, and on the way up (3)
    n_head: int = 6  # attention heads, at every level
    n_embd: int = 48  # width of the residual stream at full length, in channels
    widths: str = "2,4,8"  # widths of the three shortened levels, in multiples of n_embd
    ahead: int = 64  # 64: predict the next 64 tokens from whole blocks of 64; 1: the next token from all before it
    expander: str = "local"  # local: one vector becomes four; sequence: the source's, an exhibit that leaks the targets
    eot: int = -1  # end-of-text id, which pads short prompts; -1: the last id; training takes that of its data set
    dropout: float = 0.0  # probability, at the embedding, attention weights and the output of each sublayer
    # The run.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = "out/conv_attention"  # folder for ckpt.pt, best.pt and log.csv
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is fast
    compile: bool | None = None  # torch.compile; None: on CUDA only
    seed: int = 1337  # of weights, batches and dropout
    max_steps: int = 80_000  # optimizer steps
    batch_size: int = 8  # sequences per optimizer step, over all devices
    micro_batch: int = 8  # sequences per forward pass on one device; gradients accumulate to batch_size
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens at the start of val.bin that these evaluations score
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 6e-4  # peak
    warmup_steps: int = 100  # steps of linear warm-up, before a cosine decay to zero
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    grad_clip: float = 1.0  # largest norm of the gradient


PRESETS = {
    "demo": dict(n_head=4, n_embd=64, batch_size=2, micro_batch=2, max_steps=950, eval_interval=250, log_interval=50,
                 learning_rate=4e-3, warmup_steps=60),
    "hourglass": dict(ahead=1, n_layer="1,1,1,1,1,1,1", n_head=4, n_embd=128, widths="1.25,1.5,1.5", batch_size=2,
                      micro_batch=2, max_steps=1638, eval_interval=200, learning_rate=3e-3),
}  # fmt: skip


class Cache:
    """Keys and values of the tokens fed so far, (n_layer, B, n_head, block_size, head size) each, `length` filled."""

    def __init__(self, cfg, batch_size, like):
        shape = (cfg.n_layer, batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k, self.v, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, layer, k, v):
        """Stores a layer's new keys and values (B, nh, T, hs); returns all of them (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end], self.v[layer, :, :, self.length : end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Makes row i of the batch what row rows[i] was: keeps, repeats or reorders them."""
        old, end = (self.k, self.v), self.length
        if len(rows) != self.k.size(1):
            self.k, self.v = (x.new_empty(len(x), len(rows), *x.shape[2:]) for x in old)
        moved = [(i, int(j)) for i, j in enumerate(rows) if i != j or self.k is not old[0]]  # the others stay
        for new, x in zip((self.k, self.v), old):
            for (i, _), row in zip(moved, [x[:, j, :, :end].clone() for _, j in moved]):
                new[:, i, :, :end] = row


class LevelsCache:
    """The text so far, and what each level has computed of it: a Cache of keys and values, and with ahead = 1 the
    `newest` 3 vectors, which the next group begins with, and those `expanded` for positions that are still to come."""

    def __init__(self, model, batch_size, like):
        self.ahead, self.expander, self.length = model.ahead, model.cfg.expander, 0
        self.text = torch.zeros(batch_size, 0, dtype=torch.long, device=like.device)
        self.levels = []
        for cfg in (module.cfg for module in model.modules() if isinstance(module, Level)):
            self.levels.append(Cache(cfg, batch_size, like))
            self.levels[-1].newest = self.levels[-1].expanded = like.new_zeros(batch_size, 0, cfg.n_embd)

    def feed(self, idx):
        """Appends new tokens to the text; returns those to compute. They are the new ones alone, unless they move the
        boundaries of the blocks of 64, which end where the text ends, or the expander mixes all positions anyway."""
        self.text, self.length = torch.cat([self.text, idx], 1), self.length + idx.size(1)
        if idx.size(1) % self.ahead == 0 and self.expander == "local":
            return idx
        for cache in self.levels:
            cache.length = 0
        return self.text

    def select(self, rows):
        """Makes row i of the batch what row rows[i] was: keeps, repeats or reorders them."""
        self.text = self.text[rows]
        for cache in self.levels:
            cache.select(rows)
            cache.newest, cache.expanded = cache.newest[rows], cache.expanded[rows]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, nh, S, hs), S = tokens before + T
        S, dropout = k.size(2), self.dropout if self.training else 0.0
        plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T and S < 512  # up to twice as fast there
        mask = q.new_full((T, S), -math.inf).triu(S - T + 1) if plain or 1 < T < S else None  # query t is at S - T + t
        if plain:
            weights = (q / math.sqrt(C // self.n_head) @ k.mT + mask).softmax(-1)  # (B, nh, T, S)
            y = F.dropout(weights, dropout) @ v  # (B, nh, T, hs)
        else:  # the same, without ever holding the weights in memory
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=1 < T == S)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, nh, T, hs) -> (B, T, C)


class MLP(nn.Module):
    """Feed-forward: C -> 4C -> C, with the tanh form of GELU (Hendrycks and Gimpel 2016, section 2)."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class SequenceExpander(nn.Conv1d):
    """The source's expander, (B, S, 2 C) -> (B, 4 S, C), an exhibit: its channels are the positions, and each output
    position sees all input positions. It has no bias, one number for all channels, which LayerNorm would subtract."""

    def __init__(self, length):
        super().__init__(length, 4 * length, kernel_size=2, stride=2, bias=False)

    def forward(self, x):
        S = x.size(1)
        return F.conv1d(x, self.weight[: 4 * S, :S], stride=2)  # a shorter text takes a corner of the weights


def sizes(cfg):
    """The numbers in Config's strings: blocks (3 levels down, bottom, 3 up), and widths of the 4 levels in channels."""
    try:
        n_layer, widths = [int(n) for n in cfg.n_layer.split(",")], [float(w) for w in f"1,{cfg.widths}".split(",")]
        assert len(n_layer) == 7 and len(widths) == 4 and min(n_layer) >= 0 and min(widths) > 0
    except (ValueError, AssertionError):
        raise ValueError(f"n_layer {cfg.n_layer!r}, widths {cfg.widths!r}: not like '1,2,2,2,2,2,1', '2,4,8'") from None
    return n_layer, [round(w * cfg.n_embd) for w in widths]


class Level(nn.Module):
    """Blocks at one sequence length; between those on the way down and those on the way up, the shorter levels."""

    def __init__(self, cfg, depth=0):
        super().__init__()
        n_layer, widths = sizes(cfg)
        down, up = n_layer[depth], n_layer[6 - depth] if depth < 3 else 0
        length = math.ceil(cfg.block_size / 64) * 64 // 4**depth
        self.cfg = replace(cfg, n_embd=widths[depth], n_layer=down + up, block_size=length)
        self.depth, self.shift = depth, cfg.ahead == 1
        self.down = nn.ModuleList(Block(self.cfg) for _ in range(down))
        self.up = nn.ModuleList(Block(self.cfg) for _ in range(up))
        if depth < 3:
            C, C2 = widths[depth : depth + 2]
            self.ln_c, self.compress = nn.LayerNorm(C), nn.Linear(4 * C, C2)
            self.inner = Level(cfg, depth + 1)
            self.ln_e, self.expand = nn.LayerNorm(C2), nn.Linear(C2, 4 * C)
            if cfg.expander == "sequence":
                self.expand = SequenceExpander(self.inner.cfg.block_size)

    def forward(self, x, caches):
        cache = caches[self.depth]
        for layer, block in enumerate(self.down):
            x = block(x, cache, layer)
        if self.depth < 3:
            x = self.shortened(x, caches)
        for layer, block in enumerate(self.up, len(self.down)):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += x.size(1)
        return x

    def shortened(self, x, caches):
        """Compresses x (B, T, C), runs the shorter levels, expands what they return to (B, T, C)."""
        B, T, C = x.shape
        if not self.shift:  # whole blocks of 64, that is groups of 4 at every level
            x = self.compress(self.ln_c(x).reshape(B, T // 4, 4 * C))  # (B, T/4, C')
            return self.expand(self.ln_e(self.inner(x, caches))).view(B, T, C)
        # Group j is tokens 4j - 3 to 4j. It is complete with token 4j, and expanded for tokens 4j to 4j + 3.
        cache = caches[self.depth]
        past = cache.length if cache is not None else 0
        seen = torch.cat([cache.newest, x], 1) if past else F.pad(x, (0, 0, 3, 0))  # from token past - 3 on
        expanded = cache.expanded if past else x[:, :0]  # for tokens from `past` on
        first = -past % 4  # index in `seen` at which the next group begins
        if n := (3 + T - first) // 4:
            groups = seen[:, first : first + 4 * n]  # (B, 4 n, C)
            groups = self.compress(self.ln_c(groups).reshape(B, n, 4 * C))  # (B, n, C')
            late = self.expand(self.ln_e(self.inner(groups, caches))).view(B, 4 * n, C)
            expanded = torch.cat([expanded, late], 1)
        if cache is not None:
            cache.newest, cache.expanded = seen[:, -3:], expanded[:, T:]
        return x + expanded[:, :T]


class Pointer(nn.Module):
    """The output of 64 ahead may copy tokens of the text (Merity et al. 2017, section 2), which one vector cannot list:
    p = (1 - g) softmax(logits) + g a, where a is attention over all tokens of the blocks read, added up for each token
    id, and g a gate (See et al. 2017, section 2.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.query, self.gate = nn.Linear(cfg.n_embd, cfg.n_embd), nn.Linear(cfg.n_embd, 1)

    def forward(self, x, text, model, targets):
        """text (B, S), x (B, T, C) of its last T positions -> log p (B, T, V), or with targets its negative mean."""
        V = model.cfg.vocab_size
        text = F.pad(text, (-text.size(1) % 64, 0), value=model.cfg.eot % V)  # (B, S), S padded
        block = torch.arange(text.size(1), device=x.device) // 64
        keys = model.wte(text) + model.wpe.weight[: text.size(1)]  # (B, S, C)
        scores, gate = (self.query(x) @ keys.mT / math.sqrt(x.size(2))).to(x.dtype), self.gate(x).to(x.dtype)
        a = scores.masked_fill(block > block[-x.size(1) :, None], -math.inf).softmax(-1)  # (B, T, S)
        if targets is None:
            log_p = model.lm_head(x)[..., :V].to(x.dtype).log_softmax(-1)
            copied = torch.zeros_like(log_p).scatter_add(2, text[:, None].expand_as(a), a)  # (B, T, V)
        else:
            log_p = -linear_cross_entropy(x, model.wte.weight, targets, V, reduction="none").view(*targets.shape, 1)
            copied = (a * (text[:, None] == targets[..., None])).sum(-1, keepdim=True)  # (B, T, 1)
        log_p = torch.logaddexp(F.logsigmoid(-gate) + log_p, F.logsigmoid(gate) + (copied + 1e-12).log())
        return log_p if targets is None else -(log_p[..., 0] * (targets >= 0)).sum() / (targets >= 0).sum()


class Model(nn.Module):
    """Convolution attention. model(idx) -> logits (B, T, V), row i scores token i + ahead; model(idx, targets) -> mean
    cross-entropy in nats, a scalar; model(idx, cache=cache) -> logits (B, ahead, V) for the tokens after idx, which
    continues what the cache has seen. Raises ValueError for sizes that do not fit, or a text longer than block_size."""

    likelihood = True  # of the text: the loss has a meaning in bits per byte

    def __init__(self, cfg):
        super().__init__()
        n_layer, widths = sizes(cfg)
        if any(width % cfg.n_head for width in widths):
            raise ValueError(f"widths {widths} are not all multiples of n_head {cfg.n_head}")
        if cfg.ahead not in (1, 64) or cfg.expander not in ("local", "sequence"):
            raise ValueError(f"ahead {cfg.ahead} must be 1 or 64, expander {cfg.expander!r} 'local' or 'sequence'")
        if cfg.expander == "sequence":
            print("warning: --expander sequence leaks the targets: its loss says nothing", file=sys.stderr)
        self.cfg, self.ahead = cfg, cfg.ahead
        padded = math.ceil(cfg.vocab_size / 64) * 64  # for faster matmuls; padded logits are sliced off
        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.wpe = nn.Embedding(math.ceil(cfg.block_size / 64) * 64, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.level = Level(cfg)
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, padded, bias=False)
        self.lm_head.weight = self.wte.weight
        self.pointer = Pointer(cfg) if cfg.ahead == 64 and cfg.expander == "local" else None
        for name, p in self.named_parameters():
            if p.dim() == 2:  # residual projections are scaled by 1 / sqrt(2 n_layer): that many are added up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * sum(n_layer)) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        T, past, text = idx.size(1), cache.length if cache is not None else 0, idx
        if past + T > self.cfg.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size {self.cfg.block_size}")
        if cache is not None:
            idx, past, text = cache.feed(idx), cache.levels[0].length, cache.text
        # Blocks of `ahead` tokens end where the text ends: end of text fills up the first one.
        idx = F.pad(idx, (-idx.size(1) % self.ahead, 0), value=self.cfg.eot % self.cfg.vocab_size)
        position = torch.arange(past, past + idx.size(1), device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C), T padded
        x = self.level(x, [None] * 4 if cache is None else cache.levels)
        x = self.ln_f(x[:, -(T if cache is None else self.ahead) :])
        if self.pointer is not None:
            return self.pointer(x, text, self, targets)
        if targets is not None:
            return linear_cross_entropy(x, self.lm_head.weight, targets, self.cfg.vocab_size)
        return self.lm_head(x)[..., : self.cfg.vocab_size]  # (B, T, V)

    def new_cache(self, batch_size):
        return LevelsCache(self, batch_size, self.wte.weight)


# What the training below asks of each file: an optimizer, a learning rate for each step, and whether to grow.


def configure_optimizer(model, cfg):
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices and embeddings, none on biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    decay, rest = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, cfg):
    """Learning rate at step `step`, counted from 0: linear warm-up to the peak, then a cosine to zero at max_steps."""
    warmup = min(cfg.warmup_steps, cfg.max_steps // 2)  # a short run reaches the peak, too
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (cfg.max_steps - warmup)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def grow(model, optimizer, cfg, step):
    """Called before each step and after the last; returns True if it changed the network. This network never grows."""
    return False


# --- training: the same lines in every model file ---


def linear_cross_entropy(x, weight, targets, vocab_size, bias=None, **more):
    """Mean cross-entropy in nats of logits x @ weight.T + bias, of which only some rows exist at a time. No mean with
    reduction="none". x (B, T, C), weight (V, C), targets (B, T) or -1 to ignore one. Ids >= vocab_size are padding."""
    padding = torch.arange(len(weight), device=x.device) >= vocab_size
    bias = (weight.new_zeros(len(weight)) if bias is None else bias).masked_fill(padding, -math.inf)
    x, targets = x.flatten(0, 1).to(weight.dtype), targets.flatten()
    # The default options are 4 to 15 times slower on a CPU, and warn where torch.compile sets the flag by itself.
    chunks = dict(batch_chunk_size=256, chunking_method=None, acc_policy="balanced") if x.device.type == "cpu" else {}
    chunks = nn.LinearCrossEntropyOptions(allow_retain_graph=torch.compiler.is_compiling(), **chunks)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, ignore_index=-1, options=chunks, **more)


@torch.no_grad()
def evaluate(model, tokens, eot, amp, stride=None):
    """Mean loss in nats per token, each token scored once. A window of block_size tokens advances by `stride` (default:
    block_size), and only targets that are new in it count: a small stride gives every token more context."""
    cfg, ahead, device, total = model.cfg, model.ahead, next(model.parameters()).device, 0.0
    n, T = len(tokens), min(len(tokens), cfg.block_size)
    tokens = np.concatenate([np.full(ahead, eot, tokens.dtype), tokens])  # the first token follows an end of text
    starts = [*range(0, n - T, min(stride or T, T)), n - T]
    starts += [n - T] * (-len(starts) % cfg.micro_batch)  # nothing is new in these, but all batches have one shape
    starts, new = torch.tensor(starts)[:, None], torch.tensor([-T, *starts]).diff()[:, None]
    model.eval()
    for start, count in zip(starts.split(cfg.micro_batch), new.split(cfg.micro_batch)):
        rows = torch.from_numpy(tokens[start + torch.arange(T + ahead)].astype(np.int64))
        targets = rows[:, ahead:].where(torch.arange(T) >= T - count, -1)
        with amp:
            total += model(rows[:, :-ahead].to(device), targets.to(device)).item() * count.sum().item()
    return total / n


def open_data(data):
    """What prepare_data.py wrote: (meta.json, what a checkpoint keeps of the tokenizer, a memory map of each split)."""
    path = Path(data)
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path}: no data. Try python prepare_data.py {repr(data) if path.is_file() else 'stdlib'}")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    ranks = (path / "tokenizer.tiktoken").read_text(encoding="utf-8") if meta["tokenizer"].startswith("bpe:") else ""
    tokenizer = {"name": meta["tokenizer"], "eot": meta["eot"], "vocab_size": meta["vocab_size"], "ranks": ranks}
    splits = {split: np.memmap(path / f"{split}.bin", dtype="<u2", mode="r") for split in meta["splits"]}
    if wrong := [split for split, tokens in splits.items() if len(tokens) != meta["splits"][split]["tokens"]]:
        raise ValueError(f"{path / wrong[0]}.bin has not as many tokens as meta.json says: prepare it again")
    return meta, tokenizer, splits


def write_atomically(path, write):
    """Has write(file) fill a temporary file, then renames it to `path`: a reader finds the old file or the new one."""
    if os.environ.get("RANK", "0") != "0":
        return  # one process writes for all
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    """The dict that a model file saved; nothing in it is executed. Raises ValueError if it is not one."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # torch.load does not compare the checksums
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        assert ckpt.keys() >= {"model_file", "config", "tokenizer", "model", "step"}
        return ckpt
    except Exception as e:  # zipfile, pickle and torch each have their own
        raise ValueError(f"{path}: no checkpoint of this repository, or damaged: {e!r:.80}") from e


def choose_device(device="auto", dtype="auto"):
    """(device, dtype to compute in): bfloat16 where it is fast, on GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() or device == "cuda" else "cpu"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device} is not available ({str(e).splitlines()[0]}). Try --device cpu") from e
    has = torch.cpu.get_capabilities().get
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else has("amx_bf16") or has("avx512_bf16")
    return device, getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if fast else torch.float32


def parse(argv):
    """(cfg, other options, checkpoint or None). A field of cfg is set by the options, else the preset or checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (--help lists all options)")
    parser.add_argument("--preset", choices=PRESETS, help="a named size with its training")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--init-from", metavar="CKPT", help="start from its weights with a new optimizer")
    parser.add_argument("--eval-only", action="store_true", help="evaluate ckpt.pt in --out, or --init-from, and exit")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="what is evaluated at the end")
    parser.add_argument("--stride", type=int, help="then score only the last STRIDE targets of each window")
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        kind = {"type": f.type, "choices": ("auto", "float32", "bfloat16") if f.name == "dtype" else None}
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, bool | None) else kind
        about = f"{comments[f.name]} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **kind)
    options = parser.parse_args(argv)
    given = PRESETS.get(options.preset, {}) | {k: v for k, v in vars(options).items() if k in comments}
    if not (options.resume or options.init_from or options.eval_only):
        return Config(**given), options, None
    path = options.init_from or Path(given.get("out", Config.out), "ckpt.pt")
    ckpt, network = read_checkpoint(path), list(comments)[: list(comments).index("dropout")]
    keep = set(comments) - {"out", "device", "compile"} if options.resume or options.eval_only else network
    inherited = {k: v for k, v in ckpt["config"].items() if k in keep}
    changed = [k for k in network if k in given and given[k] != inherited.get(k)]
    if changed or ckpt["model_file"] != Path(__file__).name:
        raise ValueError(f"{path} is a network of {ckpt['model_file']} and keeps its {', '.join(changed) or 'file'}")
    return Config(**inherited | given), options, ckpt


def train(cfg, options, ckpt):
    """Trains, resumes or evaluates. torchrun runs this in WORLD_SIZE processes at once, one for each device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, print0 = Path(cfg.out), lambda text: rank == 0 and print(text, flush=True)
    if (out / "ckpt.pt").exists() and not (options.resume or options.eval_only):
        raise ValueError(f"{out} holds a run already: --resume continues it, --out FOLDER starts another")
    device, dtype = choose_device(cfg.device, cfg.dtype)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if world_size > 1:
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    meta, tokenizer, splits = open_data(cfg.data)
    if ckpt and ckpt["tokenizer"] != tokenizer:
        raise ValueError(f"--data {cfg.data} has another tokenizer, {tokenizer['name']}, than the checkpoint")
    cfg.vocab_size, cfg.eot = meta["vocab_size"], meta["eot"]
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    optimizer, length = configure_optimizer(model, cfg), cfg.block_size + model.ahead
    if len(data := splits["train"]) < length:
        raise ValueError(f"{cfg.data}/train.bin has fewer tokens than one window ({length}): lower --block-size")
    step, tokens, best, seconds = 0, 0, math.inf, 0.0  # seconds spent on steps, not on evaluations
    model.load_state_dict(ckpt["model"] if ckpt else model.state_dict())
    if options.resume:
        step, tokens, best, seconds = (ckpt[k] for k in ("step", "tokens", "best", "seconds"))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": ckpt["optimizer"]["state"]})
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")  # of the loss's matmuls
    # Bits per byte = nats per token x bits per nat (1 / ln 2) x tokens per byte, which are those of the whole split.
    bits = {split: n["tokens"] / n["bytes"] / math.log(2) for split, n in meta["splits"].items() if model.likelihood}
    peaks = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # FLOP/s of dense bfloat16 matmuls
    peak = next((flops * world_size for name, flops in peaks.items() if name in gpu), None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # a backward pass costs two forward passes
        model(torch.zeros(1, cfg.block_size, dtype=torch.long, device=device))
    per_step = cfg.batch_size * cfg.block_size  # tokens
    print0(f"{sum(p.numel() for p in model.parameters()):,} parameters, {gpu or device}, {dtype}, {cfg.data} -> {out}")

    def save(file):
        state = dict(model_file=Path(__file__).name, config=asdict(cfg), tokenizer=tokenizer, step=step, tokens=tokens)
        state |= dict(best=best, seconds=seconds, rng=[cfg.seed, step], model=model.state_dict())
        write_atomically(out / file, lambda f: torch.save(state | {"optimizer": optimizer.state_dict()}, f))

    signals, stopped, ddp_model, mark = [], False, None, (tokens, seconds)
    if not options.eval_only:
        for number in (signal.SIGINT, signal.SIGTERM):  # the step finishes and is saved; a second one ends at once
            signal.signal(number, lambda n, frame: signals.append(n) or signal.signal(n, signal.SIG_DFL))
        save("ckpt.pt")  # from here on there is something to resume
        rows = (out / "log.csv").read_text(encoding="utf-8").splitlines()[1:] if options.resume else []
        rows = [row for row in rows if row.count(",") == 8 and int(row.split(",")[0]) <= step]  # the others come again
        names = "step,tokens,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,tokens_per_s,seconds"
        write_atomically(out / "log.csv", lambda f: f.write("\n".join([names, *rows, ""]).encode()))
        log = open(out / "log.csv" if rank == 0 else os.devnull, "a", encoding="utf-8", buffering=1)
    while not options.eval_only:
        if grow(model, optimizer, cfg, step) or ddp_model is None:
            compiled = torch.compile(model) if cfg.compile or (cfg.compile is None and gpu) else model
            ddp_model = nn.parallel.DistributedDataParallel(compiled) if world_size > 1 else compiled
        if stopped or step >= cfg.max_steps:
            print0(f"{step:,} steps, {seconds:.0f} s; --resume continues. Try python sample.py --ckpt '{out}/ckpt.pt'")
            break
        model.train()
        start, lr, report = time.perf_counter(), learning_rate(step, cfg), torch.zeros(2, device=device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Batch and dropout are functions of seed and step: a resumed run, or one on more devices, sees the same data.
        starts = np.random.default_rng([cfg.seed, step]).integers(len(data) - length + 1, size=cfg.batch_size)
        rows = torch.from_numpy(data[starts[rank::world_size, None] + np.arange(length)].astype(np.int64)).to(device)
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]))
        for i in range(0, len(rows), cfg.micro_batch):
            part = rows[i : i + cfg.micro_batch]
            ddp_model.require_backward_grad_sync = i + len(part) == len(rows)  # processes exchange gradients once
            with amp:
                micro_loss = ddp_model(part[:, : -model.ahead], part[:, model.ahead :])
                micro_loss *= len(part) * world_size / cfg.batch_size
            micro_loss.backward()
            report[0] += micro_loss.detach()
        report[1], norm = len(signals), nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        if world_size > 1:
            dist.all_reduce(report)
        loss, stopped = (report / world_size).tolist()
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}. {out / 'ckpt.pt'} is from before it")
        optimizer.step()
        optimizer.zero_grad()
        step, tokens, seconds = step + 1, tokens + per_step, seconds + time.perf_counter() - start
        # Once in a while: evaluate, log, save.
        val, evaluating = None, step % cfg.eval_interval == 0 or step == cfg.max_steps
        if evaluating and "val" in splits:
            val = evaluate(compiled, splits["val"][: cfg.eval_tokens], meta["eot"], amp)
            if val < best:
                best = val
                save("best.pt")
        if step % cfg.log_interval == 0 or evaluating or stopped:
            speed, mark = (tokens - mark[0]) / (seconds - mark[1]), (tokens, seconds)
            more = f", MFU {3 * counter.get_total_flops() / cfg.block_size * speed / peak:.1%}" if peak else ""
            val_bits = val * bits["val"] if val and bits else ""
            more += f", validation loss {val:.4f}" + (f", {val_bits:.4f} bits per byte" if bits else "") if val else ""
            print0(f"step {step:,}/{cfg.max_steps:,}: loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}, {speed:,.0f} "
                   f"tokens/s, {(cfg.max_steps - step) * per_step / speed / 60:.0f} min left{more}")  # fmt: skip
            print(step, tokens, loss, val or "", val_bits, lr, norm, speed, seconds, sep=",", file=log)
        if (evaluating or stopped) and math.isfinite(val or 0.0):
            save("ckpt.pt")
    if stopped:
        sys.exit(128 + max(signals, default=signal.SIGTERM))
    if options.eval_only and options.split not in splits:
        raise ValueError(f"--split {options.split}: {cfg.data} has {', '.join(splits)}")
    if (split := options.split) in splits:  # at the end all of it counts
        nats, n = evaluate(model, splits[split], meta["eot"], amp, options.stride), meta["splits"][split]
        pp = ", ".join(f"{math.exp(nats * n['tokens'] / n[u]):,.4f} per {u[:-1]}" for u in ("tokens", "words", "bytes"))
        more = f", {nats * bits[split]:.4f} bits per byte; perplexity {pp}" if bits else ""
        print0(f"all of {split}: {nats:.4f} nats per token{more}")


def main(argv=None):
    try:
        train(*parse(argv))
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(__file__).name}: {e}")
    except RuntimeError as e:  # on a CPU, torch has no class of its own for memory and files
        if not isinstance(e, torch.OutOfMemoryError) and "enforce fail" not in str(e):
            raise
        sys.exit(f"{Path(__file__).name}: out of memory, or of space on the disk ({str(e).splitlines()[0]})")


if __name__ == "__main__":
    main()
