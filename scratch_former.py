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
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
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
    dropout: float = 0.0  # probability, at the embedding and the output of each sublayer
    # The run.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = "out/scratch_former"  # folder for ckpt.pt, best.pt and log.csv
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where it is fast
    compile: bool | None = None  # torch.compile; None: on CUDA only
    seed: int = 1337  # of weights, batches and dropout
    max_steps: int = 200_000  # optimizer steps
    batch_size: int = 10  # sequences per optimizer step, over all devices
    micro_batch: int = 10  # sequences per forward pass on one device; gradients accumulate to batch_size
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens at the start of val.bin that these evaluations score
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 0.0  # peak; 0: the paper's, (n_embd x warmup_steps) ** -0.5
    warmup_steps: int = 4000  # steps of linear warm-up, before the inverse square root of the step
    label_smoothing: float = 0.1  # share of each target that is spread over the vocabulary, in training only
    grad_clip: float = 1.0  # largest norm of the gradient


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
    far = near + (torch.log(d.clamp(min=1) / near) / math.log(128 / near) * near).long()
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
                raise ValueError(f"{name} {getattr(cfg, name)!r} is invalid: choose one of {choices}")
        if (cfg.n_embd % cfg.n_head and not cfg.head_dim) or cfg.n_embd % 2:
            raise ValueError(f"n_embd {cfg.n_embd} is not even, or not a multiple of n_head {cfg.n_head}")
        if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
            raise ValueError(f"n_head {cfg.n_head} is not a multiple of n_kv_head {cfg.n_kv_head}")
        if not cfg.cross_kv and (cfg.n_embd % d_k or cfg.n_head % (cfg.n_embd // d_k)):
            raise ValueError(f"n_head {cfg.n_head} is not a multiple of n_embd / head_dim, as --no-cross-kv needs")
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

    @torch.compiler.disable  # it cannot compile generators
    def noise(self, text):
        """Uniform numbers (2, B, T) by which to hide tokens of text (B, T): in training of the step's random state, in
        evaluation of the text, so that every model, step and micro_batch is scored on the same hidden tokens."""
        if self.training:
            return torch.rand(2, *text.shape, device=text.device)
        seeded = [torch.Generator().manual_seed(sum(row)) for row in text.tolist()]
        return torch.stack([torch.rand(2, text.size(1), generator=g) for g in seeded], dim=1).to(text.device)

    def run(self, blocks, idx, causal, past=0, memory=None, cache=None):
        """Embeds tokens (B, T), `past` positions from the start, and runs one of the two stacks of figure 1 on them:
        (B, T, C). The mask alone makes a decoder of an encoder: if `causal`, a position sees those up to its own."""
        end, position = past + idx.size(1), self.cfg.position
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.cfg.block_size}")
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
            counted = (hidden >= 0) & (targets[:, -1:] >= 0)  # evaluation fills up batches with rows of -1
            x, hidden = x[counted][None], hidden[counted][None]  # (1, n, C), (1, n): most tokens are not hidden
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


# What the training below asks of each file: an optimizer, a learning rate for each step, and whether to grow.


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
