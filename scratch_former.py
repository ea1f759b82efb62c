"""Attention Is All You Need, unfused: its decoder, its encoder, or both, with matmuls, softmax and core torch only.

    idx (B, T)
      |   sqrt(C) embedding[idx] + sinusoids of the positions               3.4, 3.5
      v
    x (B, T, C) --+----------------+--> (+) --> LayerNorm --> x             n_layer times: post-norm, 3.1
                  |                |
                  +-> attention ---+        softmax(Q K^T / sqrt(d_k)) V    3.2.1, equation 1; heads 3.2.2, mask 3.2.3
                  +-> feed-forward +        max(0, x W_1 + b_1) W_2 + b_2   3.3, equation 2
      |
      v   head: a matrix of its own, with a bias
    logits (B, T, V)

GPT, BERT and T5 share all of this. They differ in which positions attention may see, and in what is hidden:

    --objective   next (GPT)             masked (BERT)          spans (T5)
    network       decoder                encoder                encoder        and decoder, with cross-attention
    example       for i in range         for [M] in range       for <0> range      <0> i in
    predicts      i in range (           i                                         i in <1>
    attention     to the left only       everywhere             everywhere         to the left, and to the encoder

The numbers are sections and equations of Vaswani et al. 2017, arXiv 1706.03762. Training is the paper's, too: a linear
warm-up, then the inverse square root of the step, Adam with beta_2 = 0.98 (5.3), and label smoothing (5.4).

Source: github.com/jrussell25/scratch-former, written to learn from the paper: 4 layers, width 512, 256 tokens.
- As there, unlike the paper: a decoder alone by default, and a head that does not share the weights of the embedding.
- As in the paper, unlike there: embeddings are scaled by sqrt(C), no LayerNorm follows the sum with the positions, Adam
  has the paper's betas, and the exponent of the sinusoids is divided by C (without it, 2 of 512 columns vary).
- Its perplexity of 34.4 on WikiText-2 counts some 960 tokens. --eval-only --stride 1 scores all, with full windows.
Hidden tokens are BERT's (Devlin et al. 2018, arXiv 1810.04805, 3.1), spans T5's (Raffel et al. 2020, arXiv 1910.10683,
3.1.4), as in github.com/bri25yu/march, which varies --position, --ff, --head-dim, --no-cross-kv. T5's norms come first.

    python scratch_former.py --preset demo                               three minutes on a laptop's CPU
    python scratch_former.py --device cuda --data data/wikitext2         the source's size on one GPU

In the diff with gpt2.py: unfused attention, norms after the sums, three objectives, positions, label smoothing, Adam.
"""

import argparse
import csv
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# On Linux, a thread that waits for others keeps its core busy, so that one other busy program makes
# training up to 30 times slower. Now it sleeps after 1,000 tries (4% slower on an idle machine).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # The network: the fields above `data`. A checkpoint fixes them.
    vocab_size: int = 50257  # vocabulary size; training takes it from the data set
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 4  # blocks; with --objective spans, of the encoder and of the decoder each
    n_head: int = 8  # attention heads
    n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head query heads; 1: multi-query; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_embd: int = 512  # width of the residual stream, in channels
    n_ff: int = 1024  # hidden units of the feed-forward network
    ff: str = "relu"  # feed-forward network: relu, gelu, geglu or swiglu; gated ones have 2/3 of the hidden units
    position: str = "sinusoid"  # encoding of positions: sinusoid, learned, rotary or relative
    objective: str = "next"  # what is predicted: next (tokens), masked (tokens) or spans (of hidden tokens)
    hide: float = 0.15  # share of the tokens that masked and spans hide
    span_length: float = 3.0  # mean length of a hidden span, in tokens
    cross_kv: bool = True  # whether cross-attention has key and value matrices, or takes the encoder's output itself
    eot: int = -1  # id of the end of text (-1: the last id); training takes it from the data set
    # The run. These fields may change when a run is resumed.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = f"out/{Path(__file__).stem}"  # folder for ckpt.pt, best.pt and log.csv
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one
    dtype: str = "auto"  # float32, or bfloat16 or float16 (autocast); auto: a fast one
    compile: bool | None = None  # torch.compile; None: on NVIDIA's GPUs since 2017, under Linux
    seed: int = 1337  # of the initial weights, the batches and dropout
    max_steps: int = 200_000  # optimizer steps
    batch_size: int = 10  # sequences in an optimizer step, over all devices
    micro_batch: int = 10  # sequences in a forward pass on one device; gradients add up to the batch
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens that such an evaluation scores, from the start of val.bin
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 0.0  # peak; 0: the paper's, (n_embd x warmup_steps) ** -0.5
    warmup_steps: int = 4000  # steps of linear warm-up, before the inverse square root of the step
    label_smoothing: float = 0.1  # share of each target that is spread over the vocabulary, in training only
    grad_clip: float = 1.0  # a gradient whose norm is larger is scaled down to it; 0: no limit
    dropout: float = 0.0  # probability, after the embedding and after each sublayer


PRESETS = {
    "demo": dict(n_layer=2, n_head=4, n_embd=128, n_ff=512, batch_size=8, micro_batch=8, max_steps=950,
                 eval_interval=250, log_interval=50, warmup_steps=200),
    "masked": dict(objective="masked", position="relative", hide=0.3, block_size=128, n_layer=4, n_head=4, n_embd=128,
                   n_ff=512, batch_size=16, micro_batch=16, max_steps=3000, eval_interval=500, log_interval=100,
                   learning_rate=4e-3, warmup_steps=300, label_smoothing=0.0),
}  # fmt: skip
PRESETS["spans"] = PRESETS["masked"] | dict(objective="spans", hide=0.15, n_layer=2, learning_rate=1.5e-3)


class Cache:
    """Keys and values of the tokens fed so far, (n_layer, B, n_kv_head, block_size, hs) each. The encoder was fed the
    first `source` of all `length` tokens: `memory` has their keys and values for cross-attention."""

    def __init__(self, shape, like):
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length, self.source, self.memory = 0, 0, None

    def append(self, layer, k, v):
        """Stores a layer's new keys and values (B, nh, T, hs); returns all of them (B, nh, past + T, hs)."""
        past = self.length - self.source
        end = past + k.size(2)
        self.k[layer, :, :, past:end] = k
        self.v[layer, :, :, past:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Makes row i of the batch what row rows[i] was: keeps, repeats or reorders them."""
        past = self.length - self.source
        k, v = (old[:, rows, :, :past] for old in (self.k, self.v))
        if len(rows) != self.k.size(1):
            self.k, self.v = (old.new_empty(len(old), len(rows), *old.shape[2:]) for old in (self.k, self.v))
        self.k[:, :, :, :past], self.v[:, :, :, :past] = k, v
        self.memory = self.memory and [(k[rows], v[rows]) for k, v in self.memory]


def positions(length, n_embd):
    """The table of positional encodings, (length, C) float32, computed in float64 (3.5):
    PE[pos, 2i] = sin(pos / 10000^(2i / C)), PE[pos, 2i + 1] = cos(pos / 10000^(2i / C))."""
    angle = torch.arange(length).double()[:, None] / 10_000 ** (torch.arange(0, n_embd, 2).double() / n_embd)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def rotate(x, table):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, 3.2.2): turns each pair of channels of x (B, nh, T, hs) by an
    angle whose sine and cosine are in table (T, hs). Then q @ k depends on positions through their distance alone."""
    sin, cos, a, b = table[:, 0::2], table[:, 1::2], x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def buckets(distance, causal):
    """T5's bucket, 0 to 31, for distances of keys from queries, any shape (Raffel et al. 2020, 2.1): one each for the
    short ones, wider ones up to 128 tokens, and one for the rest. Unless causal, half are for keys to the right."""
    near = 16 if causal else 8  # distances with a bucket of their own; as many buckets are for the longer ones
    d = (-distance).clamp(min=0) if causal else distance.abs()
    far = near + (torch.log(d.clamp(min=1) / near) / math.log(128 / near) * near + 1e-4).long()
    bucket = torch.where(d < near, d, far.clamp(max=2 * near - 1))
    return bucket if causal else bucket + 16 * (distance > 0)


class Attention(nn.Module):
    """Multi-head attention (3.2.2): a query head compares its queries with keys and averages the values of those that
    match. Keys and values come from the same text or, in cross-attention, from the encoder's output. To cache fewer of
    them, query heads may share them (Shazeer 2019, arXiv 1911.02150; Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, cfg, kv=True):
        super().__init__()
        self.d_k = cfg.head_dim or cfg.n_embd // cfg.n_head
        self.n_head, self.n_kv_head = cfg.n_head, cfg.n_kv_head or cfg.n_head
        if not kv:  # keys and values are what is attended to, split into heads
            self.n_kv_head = cfg.n_embd // self.d_k
        self.w_q = nn.Linear(cfg.n_embd, self.n_head * self.d_k, bias=False)
        self.w_k = nn.Linear(cfg.n_embd, self.n_kv_head * self.d_k, bias=False) if kv else nn.Identity()
        self.w_v = nn.Linear(cfg.n_embd, self.n_kv_head * self.d_k, bias=False) if kv else nn.Identity()
        self.w_o = nn.Linear(self.n_head * self.d_k, cfg.n_embd, bias=False)

    def keys_and_values(self, x):
        """Of what is attended to, (B, S, C) -> two of (B, n_kv_head, S, d_k)."""
        return [w(x).view(*x.shape[:2], -1, self.d_k).transpose(1, 2) for w in (self.w_k, self.w_v)]

    def forward(self, x, mask=None, rotation=None, memory=None, cache=None, layer=0):
        """x (B, T, C); mask (T, S) or (n_head, T, S), added to the scores; memory: keys and values of another text."""
        B, T, _ = x.shape
        q = self.w_q(x).view(B, T, -1, self.d_k).transpose(1, 2)
        k, v = memory or self.keys_and_values(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, n_kv_head, S, d_k), S = tokens before + T
        # The G = n_head / n_kv_head query heads of a key head become one head with G T queries: keys are not repeated.
        q = q.reshape(B, self.n_kv_head, -1, self.d_k) / math.sqrt(self.d_k)  # (B, n_kv_head, G T, d_k)
        scores = (q @ k.mT).view(B, self.n_head, T, -1)  # equation 1, (B, n_head, T, S)
        scores = scores if mask is None else scores + mask.type_as(q)
        weights = scores.softmax(-1).view(*q.shape[:-1], -1)  # (B, n_kv_head, G T, S)
        y = (weights @ v).view(B, self.n_head, T, self.d_k)
        return self.w_o(y.transpose(1, 2).reshape(B, T, -1))  # (B, n_head, T, d_k) -> (B, T, C)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them (3.3, equation 2), or a GELU. In gated ones, a third map multiplies the
    hidden units (Shazeer 2020, arXiv 2002.05202); with 2/3 of the units, there are as many parameters."""

    def __init__(self, cfg):
        super().__init__()
        gated = cfg.ff.endswith("glu")
        n_ff = round(cfg.n_ff * 2 / 3) if gated else cfg.n_ff
        self.activation = {"relu": F.relu, "swiglu": F.silu}.get(cfg.ff, F.gelu)
        self.w_1 = nn.Linear(cfg.n_embd, n_ff)
        self.w_2 = nn.Linear(n_ff, cfg.n_embd)
        self.gate = nn.Linear(cfg.n_embd, n_ff) if gated else None

    def forward(self, x):
        y = self.activation(self.w_1(x))
        return self.w_2(y * self.gate(x) if self.gate else y)


class Block(nn.Module):
    """LayerNorm(x + Sublayer(x)), twice (3.1): the norm comes after the sum. With cross-attention, three times."""

    def __init__(self, cfg, cross=False):
        super().__init__()
        self.attn, self.ln_1 = Attention(cfg), nn.LayerNorm(cfg.n_embd)
        if cross:
            self.cross, self.ln_cross = Attention(cfg, cfg.cross_kv), nn.LayerNorm(cfg.n_embd)
        self.ff, self.ln_2 = FeedForward(cfg), nn.LayerNorm(cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)  # of each sublayer's output, before the sum (5.4)

    def forward(self, x, mask, rotation=None, memory=None, cache=None, layer=0):
        x = self.ln_1(x + self.drop(self.attn(x, mask, rotation, cache=cache, layer=layer)))
        if memory is not None:
            x = self.ln_cross(x + self.drop(self.cross(x, memory=memory)))
        return self.ln_2(x + self.drop(self.ff(x)))


def hidden_lengths(cfg, length):
    """How many of `length` tokens to hide, and in how many spans: the same in every text, so that nothing is padded."""
    n_hidden = max(1, round(cfg.hide * length))
    return n_hidden, max(1, round(n_hidden / cfg.span_length))


def hide_tokens(text, noise, cfg, training):
    """BERT's masked tokens. text (B, T), noise (2, B, T) uniform in [0, 1) -> the text with some tokens hidden and what
    they were, -1 elsewhere, both (B, T). The mask id, vocab_size, replaces 80%; 10% become random tokens and 10% stay,
    because texts to be read later have no mask ids. In evaluation it replaces all."""
    n = hidden_lengths(cfg, text.size(1))[0]
    rank = noise[0].argsort(1).argsort(1)  # positions in random order: the first n are hidden
    masked, changed = (round(0.8 * n), round(0.9 * n)) if training else (n, n)
    idx = text.where(rank >= changed, (noise[1] * cfg.vocab_size).long()).masked_fill(rank < masked, cfg.vocab_size)
    return idx, text.masked_fill(rank >= n, -1)


def hide_spans(text, noise, cfg):
    """T5's span corruption. text (B, T), noise (2, B, T) uniform in [0, 1) -> the text with a sentinel in place of each
    hidden span (B, T - n_hidden + n_spans), and the spans, each after its sentinel, then one more sentinel (B, n_hidden
    + n_spans + 1). Sentinels are the ids from vocab_size on."""
    B, T = text.shape
    n_hidden, n_spans = hidden_lengths(cfg, T)

    def random_lengths(noise, total, n):
        """n lengths of at least 1 that sum to total, which is cut at n - 1 random places: (B, n)."""
        cuts = noise[:, : total - 1].topk(n - 1).indices.sort().values + 1
        return cuts.diff(prepend=cuts.new_zeros(B, 1), append=cuts.new_full((B, 1), total))

    spans = random_lengths(noise[0], n_hidden, n_spans)
    gaps = random_lengths(noise[1], T - n_hidden + 2, n_spans + 1)
    gaps[:, 0] -= 1  # a text may begin with a span; it ends with one if the last gap, which is one longer, is 1
    # Parts of the text, 0 to 2 n_spans: gap, span, gap, span, ... Spans have the odd numbers.
    ends = torch.stack([gaps[:, :-1], spans], dim=-1).flatten(1).cumsum(1)
    part = torch.searchsorted(ends, torch.arange(T, device=text.device).repeat(B, 1), right=True)  # (B, T)
    hidden = part % 2 == 1
    first = hidden & (part.diff(prepend=part.new_zeros(B, 1)) > 0)
    both = torch.stack([cfg.vocab_size + part // 2, text], dim=-1)  # (B, T, 2): a sentinel goes before its span
    source, target = (both[torch.stack([first, tokens], dim=-1)].view(B, -1) for tokens in (~hidden, hidden))
    return source, F.pad(target, (0, 1), value=cfg.vocab_size + n_spans)


# What every model file has. The training loop below and sample.py ask for no more than this:
#
#   model(idx)               logits (B, T, V); row i scores token i + model.ahead
#   model(idx, targets)      the mean loss, in nats per token, a scalar; targets of -1 do not count
#   model.ahead              1, but conv_attention.py can predict 64 tokens at once
#   model.likelihood         True: the loss is -log p(text), so it can be given in bits per byte;
#                            False: it is of hidden tokens only (scratch_former.py)
#   model.new_cache(B)       an empty cache, for B texts that are read piece by piece
#   model(idx, cache=cache)  reads the new tokens idx; logits (B, ahead, V) of the tokens after them
#   cache.length             the number of tokens read so far
#   cache.select(rows)       text i is replaced by text rows[i], as beam search needs it
#   configure_optimizer, learning_rate, grow    three functions that the training loop calls


@torch.compiler.disable  # it cannot compile generators
def fixed_noise(text):
    """Uniform numbers (2, B, T) that depend on the text (B, T) alone: the seed of a row is the sum of its ids."""
    seeded = [torch.Generator().manual_seed(sum(row)) for row in text.tolist()]
    return torch.stack([torch.rand(2, text.size(1), generator=g) for g in seeded], dim=1).to(text.device)


class Model(nn.Module):
    """A transformer. For `next`, model(idx) -> logits (B, T, V); model(idx, targets) -> mean cross-entropy in nats, a
    scalar, with smoothed labels in training; model(idx, cache=cache) -> logits (B, 1, V) for the token after idx, which
    continues what the cache has seen. Otherwise, model(idx, targets) hides some of idx and scores that. In a prompt ids
    from vocab_size on stand for what is hidden: in `masked`, row i of model(idx) names token i; `spans` needs a cache,
    and the decoder's tokens follow the encoder's, beginning with the first sentinel again.
    Raises ValueError for sizes and names that do not fit, and for a text longer than block_size."""

    ahead = 1  # row i of the logits scores token i + ahead

    def __init__(self, cfg):
        super().__init__()
        d_k = cfg.head_dim or cfg.n_embd // cfg.n_head
        valid = dict(objective="next masked spans", position="sinusoid learned rotary relative")
        for name, choices in [*valid.items(), ("ff", "relu gelu geglu swiglu")]:
            if getattr(cfg, name) not in choices.split():
                raise UserError(f"{name} {getattr(cfg, name)!r} is invalid: choose one of {choices}")
        if (cfg.n_embd % cfg.n_head and not cfg.head_dim) or cfg.n_embd % 2:
            raise UserError(f"n_embd {cfg.n_embd} is not even, or not a multiple of n_head {cfg.n_head}")
        if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
            raise UserError(f"n_head {cfg.n_head} is not a multiple of n_kv_head {cfg.n_kv_head}")
        if not cfg.cross_kv and (cfg.n_embd % d_k or cfg.n_head % (cfg.n_embd // d_k)):
            raise UserError(f"n_head {cfg.n_head} is not a multiple of n_embd / head_dim, as --no-cross-kv needs")
        self.cfg, spans = cfg, cfg.objective == "spans"
        self.likelihood = cfg.objective == "next"  # of the text: the loss has a meaning in bits per byte
        extra = hidden_lengths(cfg, cfg.block_size)[1] + 1 if spans else cfg.objective == "masked"
        self.n_logits = cfg.vocab_size + extra * spans  # sentinels are written, too
        padded = math.ceil((cfg.vocab_size + extra) / 64) * 64  # for faster matmuls; padded logits are sliced off
        self.embedding = nn.Embedding(padded, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.position == "learned":
            self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)
        table = positions(cfg.block_size, d_k if cfg.position == "rotary" else cfg.n_embd)
        self.register_buffer("positions", table, persistent=False)
        self.h = nn.ModuleList(Block(cfg, cross=spans) for _ in range(cfg.n_layer))
        if spans:
            self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(cfg.n_embd, padded)
        for name, p in self.named_parameters():
            if "embedding" in name:
                nn.init.normal_(p, std=cfg.n_embd**-0.5)  # times sqrt(C): about as large as the sinusoids
            elif p.dim() == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if cfg.position == "relative":  # biases (32, nh) of buckets and heads, for all layers; first the encoder's
            # Each head begins with what is near, at its own scale, as in ALiBi (Press et al. 2022, arXiv 2108.12409).
            near = [-(torch.arange(32.0)[:, None] % n) * 0.5 ** torch.arange(cfg.n_head)
                    for n in {"next": [32], "masked": [16], "spans": [16, 32]}[cfg.objective]]  # fmt: skip
            self.relative_embedding = nn.ModuleList(nn.Embedding.from_pretrained(b, freeze=False) for b in near)

    def noise(self, text):
        """Uniform numbers (2, B, T) by which to hide tokens of text (B, T): in training of the step's random state, in
        evaluation of the text, so that every model, step and micro_batch is scored on the same hidden tokens."""
        if self.training:
            return torch.rand(2, *text.shape, device=text.device)
        return fixed_noise(text)

    def run(self, blocks, idx, causal, past=0, memory=None, cache=None):
        """Embeds tokens (B, T), `past` positions from the start, and runs one of the two stacks of figure 1 on them:
        (B, T, C). The mask alone makes a decoder of an encoder: if `causal`, a position sees those up to its own."""
        end, position = past + idx.size(1), self.cfg.position
        if end > self.cfg.block_size:
            raise UserError(f"{end} tokens do not fit block_size {self.cfg.block_size}")
        x, table = self.embedding(idx), self.positions[past:end]
        if position == "learned":
            x = x + self.position_embedding.weight[past:end]
        x = math.sqrt(self.cfg.n_embd) * x + (table if position == "sinusoid" else 0.0)
        key = torch.arange(end, device=idx.device)
        distance = key - key[past:, None]  # (T, past + T), of each key from each query: negative to the left
        # Query t has position past + t and sees the keys up to there: 0 is added to their scores, -inf to all others.
        mask = x.new_zeros(distance.shape).masked_fill(distance > 0, -math.inf if causal else 0.0)
        if position == "relative":
            mask = mask + self.relative_embedding[-1 if causal else 0](buckets(distance, causal)).permute(2, 0, 1)
        x, rotation = self.drop(x), table if position == "rotary" else None
        for layer, block in enumerate(blocks):
            x = block(x, mask, rotation, memory and memory[layer], cache, layer)
        return x

    def forward(self, idx, targets=None, cache=None):
        objective, source, hidden = self.cfg.objective, None, targets
        if objective == "masked" and targets is not None:
            idx, hidden = hide_tokens(idx, self.noise(idx), self.cfg, self.training)
        elif objective == "spans" and cache is None:
            source, spans = hide_spans(idx, self.noise(idx), self.cfg)
            idx, hidden = spans[:, :-1], spans[:, 1:]
        elif objective == "spans" and cache.length == 0:  # the first sentinel again: from there on it is the decoder's
            start = (idx[0] == self.cfg.vocab_size).nonzero()[1].item()
            source, idx = idx[:, :start], idx[:, start:]
        memory, past = (cache.memory, cache.length - cache.source) if cache is not None else (None, 0)
        if source is not None:  # each layer's keys and values of the encoder's output are computed once for a text
            encoded = self.run(self.encoder, source, causal=False)
            memory = [block.cross.keys_and_values(encoded) for block in self.h]
            if cache is not None:
                cache.memory, cache.source, cache.length = memory, source.size(1), source.size(1)
        x = self.run(self.h, idx, objective != "masked", past, memory, cache)
        if cache is not None:
            cache.length += idx.size(1)
            x = x[:, -self.ahead :]
        if targets is None:
            return self.head(x)[..., : self.n_logits]  # (B, T, V)
        if objective != "next":
            hidden = hidden.masked_fill(targets[:, -1:] < 0, -1)  # evaluation fills up batches with such rows
        loss = linear_cross_entropy(x, self.head.weight, hidden, self.n_logits, self.head.bias)
        if self.training and self.cfg.label_smoothing > 0:
            loss = loss + self.cfg.label_smoothing * self.smoothing(x, hidden)
        return loss

    def smoothing(self, x, targets):
        """What label smoothing (5.4) adds to the cross-entropy, divided by epsilon: log-probability of the target minus
        the mean over the vocabulary, which is logit of the target - mean logit, without (B, T, V) logits; a scalar."""
        weight, bias = (p[: self.n_logits] for p in (self.head.weight, self.head.bias))
        w, b = weight[targets] - weight.mean(0), bias[targets] - bias.mean()  # (B, T, C), (B, T)
        difference = (x * w).sum(-1) + b  # elementwise, so autocast leaves it in float32
        counted = targets >= 0
        return (difference * counted).sum() / counted.sum()

    def new_cache(self, batch_size):
        attn = self.h[0].attn
        shape = (self.cfg.n_layer, batch_size, attn.n_kv_head, self.cfg.block_size, attn.d_k)
        return Cache(shape, self.head.weight)


# The three functions that the training loop calls. Each model file has its own.


def configure_optimizer(model, cfg):
    """Adam (Kingma and Ba 2015) with the betas and epsilon of 5.3."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)


def learning_rate(step, cfg):
    """Learning rate at step `step`, counted from 0: n_embd^-0.5 min(s^-0.5, s warmup^-1.5), s counted from 1 (5.3,
    equation 3). Its peak at s = warmup is (n_embd warmup)^-0.5; --learning-rate sets another peak."""
    warmup = max(1, min(cfg.warmup_steps, cfg.max_steps // 2))  # a short run reaches the peak, too
    peak = cfg.learning_rate or (cfg.n_embd * max(1, cfg.warmup_steps)) ** -0.5
    s = (step + 1) / warmup
    return peak * min(s**-0.5, s)


def grow(model, optimizer, cfg, step):
    """Called before each step and after the last. Returns True if it changed the network."""
    return False


# --- training: the same lines in every model file ---

# torchrun starts world_size processes, one for each device, and numbers them: rank 0, 1, 2, ...
world_size = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
FILE = Path(__file__).name  # a checkpoint says which file has its network


class UserError(ValueError):
    """Something that the user can put right: main prints it as one line, without a traceback."""


def print0(text):
    """Prints a line, in the first process only."""
    if rank == 0:
        print(text, flush=True)


def add_up(numbers, device):
    """The sums of a list of numbers over all processes."""
    if world_size > 1:
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        numbers = sums.tolist()
    return numbers


# --- the loss


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of logits = x @ weight.T + bias, computed some rows at a time.

    The gradient with respect to a row of logits is (softmax(logits) - one_hot(target)) / number of
    rows. It is known as soon as the logits are. So forward computes all gradients, and keeps no
    logits.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, dtype, need_grad):
        # x (N, C), weight (V, C), bias (V), targets (N, 1). Products in `dtype`, sums in float32.
        chunk = 512 if x.device.type == "cpu" else 4096  # rows at a time
        w = weight.to(dtype)
        loss = weight.new_zeros(())
        grad_x, grad_weight, grad_bias = (torch.zeros_like(t) for t in (x, weight, bias))
        # The two large matrices. All chunks use the same memory: with new memory for each of them,
        # this is up to 1.8 times as slow on a CPU.
        logits = w.new_empty(min(chunk, len(x)), len(w))  # (chunk, V)
        p = torch.empty_like(logits, dtype=weight.dtype)  # (chunk, V), probabilities
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            part = x[rows].to(dtype)  # (n, C), where n < chunk in the last chunk
            logits, p = logits[: len(part)], p[: len(part)]
            torch.addmm(bias.to(dtype), part, w.T, out=logits)
            torch.softmax(p.copy_(logits), dim=1, out=p)
            p_target = p.gather(1, targets[rows])  # (n, 1)
            loss -= p_target.clamp(min=1e-38).log().sum()  # at most 87.5 nats a row
            if need_grad:
                p.scatter_(1, targets[rows], p_target - 1)  # softmax - one_hot
                grad = logits.copy_(p)  # (n, V), in `dtype`
                grad_x[rows] = grad @ w
                grad_weight += grad.T @ part
                if bias.requires_grad:
                    grad_bias += p.sum(0)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        factor = grad / len(ctx.saved_tensors[0])  # N rows
        return *(t.mul_(factor) for t in ctx.saved_tensors), None, None, None


@torch.compiler.disable  # it would unroll the loop over the chunks
def linear_cross_entropy(x, weight, targets, vocab_size, bias=None):
    """The mean cross-entropy, in nats, of logits = x @ weight.T + bias. It equals

        logits = F.linear(x, weight, bias)[..., :vocab_size].flatten(0, 1)
        F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    but never holds all the logits, the largest matrix of a step: for 8 x 256 tokens and 50,257 ids
    they and their gradient need 0.8 GB. x (B, T, C), weight (V, C), bias (V); targets (B, T), where
    -1 does not count. The rows of weight from vocab_size on are padding.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    bias[vocab_size:] = -math.inf  # so that the padding has probability 0
    counts = targets >= 0  # (B, T)
    x = x[counts].to(weight.dtype)  # (N, C): the N positions that count
    targets = targets[counts][:, None]  # (N, 1)
    need_grad = torch.is_grad_enabled()  # not in an evaluation
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(x, weight, bias, targets, dtype, need_grad)


# --- data, and how well a model predicts it


def open_data(data):
    """What prepare_data.py wrote into a folder: meta.json as a dict, a dict with what is needed to
    decode tokens, and for each split its tokens, as a memory map of the file."""
    path = Path(data)
    if not (path / "meta.json").is_file():
        name = repr(data) if path.is_file() else "stdlib"
        raise UserError(f"{path}: no data. Try python prepare_data.py {name}")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    tokenizer = {"name": meta["tokenizer"], "eot": meta["eot"], "vocab_size": meta["vocab_size"]}
    tokenizer["ranks"] = ""  # the table of a tokenizer that was trained here
    if tokenizer["name"].startswith("bpe:"):
        tokenizer["ranks"] = (path / "tokenizer.tiktoken").read_text(encoding="utf-8")
    splits = {}
    for split, counts in meta["splits"].items():
        file = path / f"{split}.bin"
        splits[split] = np.memmap(file, dtype="<u2", mode="r")  # little-endian uint16
        if len(splits[split]) != counts["tokens"]:
            raise UserError(f"{file} has not the length that meta.json says: prepare it again")
    return meta, tokenizer, splits


def get_windows(tokens, starts, length):
    """The `length` tokens from each of the B positions `starts` on, as a tensor (B, length)."""
    index = starts[:, None] + np.arange(length)  # (B, length)
    return torch.from_numpy(tokens[index].astype(np.int64))


def get_batch(tokens, length, cfg, step):
    """The windows, (B, length), that this process trains on in step `step`. They depend on seed and
    step alone, so that a resumed run, or one on more devices, sees the same data."""
    rng = np.random.default_rng([cfg.seed, step])
    starts = rng.integers(len(tokens) - length + 1, size=cfg.batch_size)  # of all processes
    return get_windows(tokens, starts[rank::world_size], length)


@torch.no_grad()
def evaluate(model, tokens, eot, amp, stride=None):
    """The mean loss of a text in nats per token. Each token is scored once.

    A window of T = block_size tokens moves over the text, `stride` tokens at a time (default: T, so
    that windows lie side by side). A target counts in the first window that has it. So, with a
    small stride, a token after the first window is predicted from at least T - stride tokens.
    """
    device = next(model.parameters()).device
    B = model.cfg.micro_batch
    n = len(tokens)
    T = min(n, model.cfg.block_size)
    # An end-of-text token comes first, so that the first token of the text is predicted, too.
    text = np.concatenate([np.full(model.ahead, eot, tokens.dtype), tokens])
    stride = min(stride or T, T)
    starts = np.arange(0, n - T + stride, stride).clip(max=n - T)  # the last ends with the text
    # Repeat the last window until all batches have one shape. A repeat has no new targets. Example:
    # n = 10, T = stride = 4, B = 2: starts are 0, 4, 6, 6, new_targets 4, 4, 2, 0.
    starts = np.pad(starts, (0, -len(starts) % B), mode="edge")
    new_targets = np.diff(starts + T, prepend=0)  # of a window: those that no window before it has

    model.eval()
    total = 0.0
    for i in range(rank * B, len(starts), world_size * B):  # the processes share the batches
        start = starts[i : i + B]  # (B)
        count = torch.from_numpy(new_targets[i : i + B])  # (B)
        inputs = get_windows(text, start, T)  # (B, T)
        targets = get_windows(text, start + model.ahead, T)  # (B, T)
        targets[torch.arange(T) < T - count[:, None]] = -1  # a window before has these
        with amp:
            mean = model(inputs.to(device), targets.to(device)).item()
        total += mean * count.sum().item()
    return add_up([total], device)[0] / n


def bits_per_byte(nats, counts):
    """Converts nats per token to bits per byte. A bit is ln 2 nats; `counts` is of the split."""
    return nats * (counts["tokens"] / counts["bytes"] / math.log(2))


def describe(nats, counts, likelihood):
    """A line about a loss in nats per token. If it is the likelihood of a text, the same total is
    also given in bits per byte, and as perplexity: e to the power of the nats of one unit."""
    text = f"{nats:.4f} nats per token"
    if likelihood:
        text += f", {bits_per_byte(nats, counts):.4f} bits per byte; perplexity"
        for unit in ("token", "word", "byte"):
            power = nats * counts["tokens"] / max(1, counts[f"{unit}s"])
            if power < 99:  # without spaces there are no words, or one huge word
                text += f" {math.exp(power):,.4f} per {unit},"
    return text.rstrip(",")


# --- files of a run


def write_atomically(path, write):
    """Calls write(file) on a temporary file, then renames it to `path`. Whatever happens, a reader
    finds the whole old file there, or the whole new one."""
    if rank != 0:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only if something failed


def read_checkpoint(path):
    """The dict that a model file saved. Nothing in it is executed."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
            raise UserError("wrong checksum")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if "model_file" not in ckpt:
            raise UserError("it is another kind of file")
        return ckpt
    except OSError:  # its message says that the file is not there, or cannot be read
        raise
    except Exception as e:  # zipfile, pickle and torch raise many kinds
        raise UserError(f"{path}: no checkpoint of this repository, or damaged: {e!r:.80}") from e


# The columns of log.csv.
LOG = "step,tokens,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,tokens_per_s,seconds"


def open_log(path, resume, step):
    """Opens log.csv, to append rows to it. A resumed run takes the steps after its checkpoint
    again, so their old rows are removed, and with them half a row that a killed run may have left.
    """
    old = path.read_text() if resume else ""
    rows = [LOG]
    for row in old.splitlines()[1:]:
        whole = row.count(",") == LOG.count(",")
        if whole and int(row.split(",")[0]) <= step:
            rows.append(row)
    text = "\n".join(rows) + "\n"
    if text != old:
        write_atomically(path, lambda file: file.write(text.encode()))
    return open(path if rank == 0 else os.devnull, "a", buffering=1)  # a row at a time


# --- options

# Other integers are at least 1, and other floats at least 0, unless their default is less.
MAY_BE_ZERO = ("seed", "max_steps", "warmup_steps", "lora_rank")


def choose_device(device="auto", dtype="auto"):
    """(device, dtype to compute in). Raises UserError if the device is not available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}. Try --device cpu") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the GPU of this process, from now on

    if dtype == "auto":  # bfloat16 is fast on GPUs since 2020 and on some CPUs
        dtype = "float32"
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # empty before torch 2.11
        if device.type == "cuda":
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if bfloat16 else "float16"
        elif cpu.get("amx_bf16") or cpu.get("avx512_bf16"):
            dtype = "bfloat16"
    return device, getattr(torch, dtype)


def number(kind, least):
    """Returns a function that reads an int or a float from the command line, `least` or more."""

    def read(text):
        value = kind(text)
        if not value >= least:  # so that nan is refused, too
            raise argparse.ArgumentTypeError(f"{text}: at least {least} is needed")
        return value

    return read


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda text: sys.exit(f"{parser.prog}: {text} (--help lists all options)")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="a named size with its training")
    add("--eval-only", action="store_true", help="evaluate --init-from, or ckpt.pt in --out")
    add("--split", default="val", help="what is evaluated at the end: train, val or test")
    add("--stride", type=number(int, 1), help="at the end: each window scores STRIDE targets")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--init-from", metavar="CKPT", help="start a new run from these weights")

    # Each field of Config is an option. Its help is the comment beside it, found in the source.
    comments = dict(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        kind = {"type": field.type}
        if field.type in (int, float):
            least = int(field.type is int and field.name not in MAY_BE_ZERO)
            kind["type"] = number(field.type, min(least, field.default))
        if field.type in (bool, bool | None):
            kind = {"action": argparse.BooleanOptionalAction}  # --compile and --no-compile
        if field.name == "dtype":
            kind["choices"] = ("auto", "float32", "bfloat16", "float16")
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        # SUPPRESS: an option that is not given does not exist, so a preset or checkpoint sets it.
        add(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)
    return parser


def parse(argv):
    """(cfg, the other options, checkpoint or {}). Each field of cfg comes from the first of these
    that sets it: the command line, the preset, the checkpoint, the default in Config."""
    options = make_parser().parse_args(argv)
    names = list(vars(Config()))
    typed = {name: value for name, value in vars(options).items() if name in names}
    given = PRESETS.get(options.preset, {}) | typed
    if not (options.resume or options.init_from or options.eval_only):
        return Config(**given), options, {}

    # A checkpoint: its network must stay as it is.
    path = options.init_from or Path(given.get("out", Config.out), "ckpt.pt")
    ckpt = read_checkpoint(path)
    if ckpt["model_file"] != FILE:
        raise UserError(f"{path} is a checkpoint of {ckpt['model_file']}: run that file")
    saved = ckpt["config"]
    network = names[: names.index("data")]
    changed = [name for name in network if name in given and given[name] != saved.get(name)]
    if changed:
        raise UserError(f"{path} has another {', '.join(changed)}: leave that option out")

    # A run that goes on keeps its other options, too; --init-from begins another run.
    kept = network
    if options.resume or options.eval_only:
        kept = set(names) - {"out", "device", "compile"}
    saved = {name: value for name, value in saved.items() if name in kept}
    return Config(**(saved | given)), options, ckpt


# --- the training loop


@contextmanager
def catch_signals():
    """In a `with` block of this, Ctrl-C and SIGTERM only add their number to a list, so that the
    step can be finished and saved. A second one ends the program at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, handlers[number])
        print0("stopping after this step; once more stops at once")

    handlers = {}  # those from before
    if threading.current_thread() is threading.main_thread():  # Python allows it in no other
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare_model(model, use_compile):
    """(model to evaluate, model to train). The second gives all processes the mean of their
    gradients (DistributedDataParallel, DDP)."""
    compiled = model
    if use_compile:
        torch.compiler.reset()  # forget the network before it grew: torch keeps only a few
        compiled = torch.compile(model)
    if world_size > 1:
        return compiled, nn.parallel.DistributedDataParallel(compiled)
    return compiled, compiled


def train(cfg, options, ckpt):
    """Trains, resumes or evaluates. Started by torchrun, all processes do this at the same time."""
    out = Path(cfg.out)
    if (out / "ckpt.pt").exists() and not (options.resume or options.eval_only):
        raise UserError(f"{out} holds a run: --resume continues it, --out FOLDER starts another")

    if cfg.dropout >= 1 or cfg.batch_size < world_size:
        raise UserError(f"--dropout must be below 1, and --batch-size at least {world_size}")

    # The device. Autocast computes matrix products in 16 bits; weights and sums stay in float32.
    device, dtype = choose_device(cfg.device, cfg.dtype)
    cuda = device.type == "cuda"
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # Small gradients would be zero in float16. So the loss is multiplied by a large number, and the
    # gradients are divided by it later. bfloat16 has the range of float32, and does not need this.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The data.
    meta, tokenizer, splits = open_data(cfg.data)
    if ckpt and ckpt["tokenizer"] != tokenizer:
        raise UserError(
            f"{cfg.data} has another tokenizer than the model: "
            f"prepare it with --tokenizer {ckpt['config']['data']}"
        )
    if options.eval_only and options.split not in splits:
        raise UserError(f"--split {options.split}: {cfg.data} has {', '.join(splits)}")
    cfg.vocab_size = meta["vocab_size"]
    cfg.eot = meta["eot"]

    if options.eval_only:
        cfg.max_steps = 0  # then no step is taken, and nothing is written

    # The model and its optimizer: new, or those of the checkpoint.
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    optimizer = configure_optimizer(model, cfg)
    step = tokens = 0
    seconds = 0.0  # of steps, without evaluations
    best = math.inf  # lowest validation loss
    if ckpt:
        model.load_state_dict(ckpt["model"])
    if options.resume:
        step, tokens, seconds, best = (ckpt[k] for k in ("step", "tokens", "seconds", "best"))
        # Adam's moments come from the checkpoint; weight decay and betas are those of this run.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": ckpt["optimizer"]["state"]})
        scaler.load_state_dict(scaler.state_dict() | ckpt["scaler"])
        if any(ckpt["config"][name] != getattr(cfg, name) for name in ("data", "eval_tokens")):
            best = math.inf  # it is the loss of another text
    ckpt.clear()  # frees its memory, 4 bytes for each parameter

    # A training window has the inputs and, `ahead` tokens later, the targets.
    length = cfg.block_size + model.ahead
    if len(splits["train"]) < length:
        raise UserError(f"{cfg.data}/train.bin has fewer than {length} tokens: lower --block-size")
    n_params = sum(p.numel() for p in model.parameters())
    print0(f"{n_params:,} parameters, {device}, {dtype}, {cfg.data} -> {out}")
    tokens_per_step = cfg.batch_size * cfg.block_size
    times = cfg.max_steps * tokens_per_step / len(splits["train"])
    if times > 10:  # more text, or fewer steps, is better
        print0(f"{cfg.max_steps:,} steps read the text {times:.0f} times and learn it by heart.")

    use_compile = cfg.compile
    if cuda and use_compile is None:  # its compiler needs Linux and a card since Volta (2017)
        use_compile = sys.platform == "linux" and torch.cuda.get_device_capability() >= (7, 0)
    compiled, ddp_model = prepare_model(model, use_compile)

    def save(name):
        """Writes a checkpoint: the values that these variables have when save is called."""
        state = dict(
            model_file=FILE,
            config=asdict(cfg),
            tokenizer=tokenizer,
            step=step,
            tokens=tokens,
            seconds=seconds,
            best=best,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )
        write_atomically(out / name, lambda file: torch.save(state, file))

    if not options.eval_only:
        save("ckpt.pt")  # from here on there is something to resume
        log = open_log(out / "log.csv", options.resume, step)
    stopped = False
    last_val = best  # validation loss of the last evaluation
    last_tokens, last_seconds = tokens, seconds  # at the last line of the log

    with catch_signals() as signals:
        while step < cfg.max_steps and not stopped:
            if grow(model, optimizer, cfg, step):
                compiled, ddp_model = prepare_model(model, use_compile)
            start = time.perf_counter()

            # The batch, the learning rate, and the random numbers of dropout depend on the step.
            rows = get_batch(splits["train"], length, cfg, step).to(device)  # (B, length)
            lr = learning_rate(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed = np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]
            torch.manual_seed(int(seed))

            # Forward and backward, a micro-batch at a time. The gradients add up, so each mean loss
            # is multiplied by its share of the batch. DDP divides gradients by world_size. It needs
            # to exchange them between the processes in the last backward pass only.
            model.train()
            total = torch.zeros((), device=device)
            parts = rows.split(cfg.micro_batch)
            for part in parts:
                ddp_model.require_backward_grad_sync = part is parts[-1]
                share = len(part) * world_size / cfg.batch_size
                with amp:
                    part_loss = ddp_model(part[:, : -model.ahead], part[:, model.ahead :]) * share
                scaler.scale(part_loss).backward()
                total += part_loss.detach()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            loss, norm = torch.stack([total / world_size, norm]).tolist()  # waits for the GPU

            # All processes must agree on the loss, and on whether one of them was told to stop.
            # In float16, a gradient that is not finite is no error: the scaler skips that step.
            loss, n_signals = add_up([loss, len(signals)], device)
            stopped = n_signals > 0
            if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
                problem = f"loss {loss}, gradient norm {norm}"
                raise UserError(f"step {step + 1}: {problem}. {out}/ckpt.pt is from before it")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            tokens += tokens_per_step
            seconds += time.perf_counter() - start

            # Once in a while: the validation loss. best.pt has the weights with the lowest one.
            evaluating = step % cfg.eval_interval == 0 or step == cfg.max_steps
            val = val_bits = None
            val_text = ""
            if evaluating and "val" in splits:
                val = evaluate(compiled, splits["val"][: cfg.eval_tokens], cfg.eot, amp)
                val_text = f", validation loss {val:.4f}"
                if model.likelihood:
                    val_bits = bits_per_byte(val, meta["splits"]["val"])
                    val_text += f", {val_bits:.4f} bits per byte"
                last_val = val
                if val < best:
                    best = val
                    save("best.pt")

            # A line on the terminal, and a row in log.csv, where None becomes an empty cell.
            if step == 1 or step % cfg.log_interval == 0 or evaluating or stopped:
                speed = (tokens - last_tokens) / (seconds - last_seconds)
                last_tokens, last_seconds = tokens, seconds
                minutes = (cfg.max_steps - step) * tokens_per_step / speed / 60
                text = f"step {step:,}/{cfg.max_steps:,}: loss {loss:.4f}, lr {lr:.2e}, "
                text += f"norm {norm:.2f}, {speed:,.0f} tokens/s, {minutes:.0f} min left"
                print0(text + val_text)
                row = [step, tokens, loss, val, val_bits, lr, norm, speed, seconds]
                csv.writer(log, lineterminator="\n").writerow(row)
            if (evaluating or stopped) and (val is None or math.isfinite(val)):
                save("ckpt.pt")

    if not options.eval_only:
        grow(model, optimizer, cfg, step)
        file = out / "ckpt.pt"
        if best < last_val:
            file = out / "best.pt"
            print0(f"best: {best:.4f} at step {read_checkpoint(file)['step']:,}, {file}")
        text = f"{step:,} steps, {seconds:.0f} s; --resume continues, also to other --max-steps."
        print0(f"{text} Try python sample.py --ckpt '{file}'")

    # At the end, a whole split is evaluated, not only its first eval_tokens.
    split = options.split
    if split in splits and not stopped:
        nats = evaluate(compiled, splits[split], cfg.eot, amp, options.stride)
        print0(f"all of {split}: {describe(nats, meta['splits'][split], model.likelihood)}")
    del ddp_model  # before the process group that it uses, or the end of gloo's threads may hang
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:  # as in a shell: 130 is Ctrl-C; perhaps only another process was told to stop
        sys.exit(128 + max(signals, default=signal.SIGTERM))


def main(argv=None):
    try:
        train(*parse(argv))
    except KeyboardInterrupt:  # in an evaluation: training catches the signal
        print(f"{FILE}: interrupted", file=sys.stderr)
        sys.exit(130)  # as in a shell
    except (UserError, OSError, MemoryError) as e:
        sys.exit(f"{FILE}: {e}")
    except RuntimeError as e:  # what torch raises for a CPU out of memory, and for a full disk
        if not isinstance(e, torch.OutOfMemoryError) and "enforce fail" not in str(e):
            raise
        sys.exit(f"{FILE}: out of memory, or of space on the disk ({str(e).splitlines()[0]})")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character of a path
    main()
