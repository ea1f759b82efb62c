"""Attention Is All You Need, written out: the decoder, the encoder, or both, in core torch.

    idx (B, T)                            the token ids of B texts
    |    sqrt(C) wte[idx] + sinusoids     3.4: embedding; 3.5: one vector for each position
    v
    x ---+      (B, T, C)                 the residual stream: C numbers for each position
    |    attn                             3.2.1, equation 1: softmax(Q K^T / sqrt(d_k)) V
    + <--+                                3.2.2: several heads; 3.2.3: which position sees which
    |    ln_1                             3.1: LayerNorm(x + Sublayer(x)), the norm after the sum
    x ---+
    |    mlp                              3.3, equation 2: max(0, x W_1 + b_1) W_2 + b_2
    + <--+                                n_layer blocks of two sums (three: cross-attention)
    |    ln_2
    |    lm_head                          a matrix of its own, with a bias
    v
    logits (B, T, V)

The numbers are sections and equations of Vaswani et al. 2017, arXiv 1706.03762. This file is not
gpt2.py with a few changes. It is written anew: read it alone, beside the paper.

GPT, BERT and T5 are variants of this network. They differ most in what a position may see, and in
what is hidden. Here the text is `for i in range ( n`. [M] hides the token `i`, and <0> hides the
span `i in`:

    --objective  next                 masked               spans
    as in        GPT                  BERT                 T5's encoder         T5's decoder
    reads        for i in range (     for [M] in range ( n for <0> range ( n    <0> i in
    predicts     i in range ( n           i                                     i in <1>
    a position   itself, and          all positions        all positions        itself, all before
    sees         all before it                                                  it, and the encoder

Hidden tokens are as in Devlin et al. 2018, arXiv 1810.04805, 3.1. Hidden spans are as in Raffel et
al. 2020, arXiv 1910.10683, 3.1.4 and 3.3.4, but the first sentinel is given and not predicted. In
T5 and GPT-2, the norms come before the sublayers. The options that vary the network (--position,
--ff, --head-dim, --no-cross-kv) are from github.com/bri25yu/march.

The source is github.com/jrussell25/scratch-former, whose author wrote it to learn from the paper:

                    paper                   source                        here
    network         encoder and decoder     decoder                       by --objective
    embedding       times sqrt(C)           not scaled                    times sqrt(C)
    after the sum   dropout                 LayerNorm                     dropout
    sinusoids of    pos / 10000^(2i / C)    pos / 100000^(2i): only 2     pos / 10000^(2i / C)
                                            of 512 channels vary
    lm_head         the weights of wte      weights of its own            weights of its own
    Adam's betas    0.9, 0.98               0.9, 0.999                    0.9, 0.98
    dropout         0.1                     0                             --dropout, 0 by default

Its perplexity of 34.4 on WikiText-2 is that of some 960 tokens, each predicted from a whole window.
--eval-only --stride 1 scores all tokens in this way.

    python scratch_former.py --preset demo                           some minutes on two CPU cores
    python scratch_former.py --device cuda --data data/wikitext2     the source's size on one GPU

Unlike gpt2.py it has attention by its formula alone, norms after the sums, three objectives, four
encodings of positions, label smoothing (5.4), and the paper's Adam and learning rate (5.3).
"""

import argparse
import gc
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

# On Linux, a waiting thread keeps its core busy. If one other program is busy, training becomes up
# to 30 times slower. With this setting, it sleeps after 1,000 tries (4% slower on an idle machine).
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
    n_embd: int = 512  # width of the residual stream, in channels
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_kv_head: int = 0  # heads of keys and values, shared by the query heads; 0: n_head
    n_ff: int = 1024  # hidden units of the feed-forward network
    ff: str = "relu"  # its activation: relu, gelu, or with a gate geglu, swiglu
    position: str = "sinusoid"  # encoding of positions: sinusoid, learned, rotary or relative
    objective: str = "next"  # what is predicted: next, masked or spans; see the table above
    hide: float = 0.15  # share of the tokens that masked and spans hide, above 0 and below 1
    span_length: float = 3.0  # mean length of a hidden span, in tokens, at least 1
    cross_kv: bool = True  # cross-attention has W^K and W^V; no: the encoder's output is K and V
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
    micro_batch: int = 10  # sequences in a forward pass on a device; gradients add up to the batch
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens that such an evaluation scores, from the start of val.bin
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 0.0  # peak; 0: the one of the paper, (n_embd x warmup_steps) ** -0.5
    warmup_steps: int = 4000  # steps of linear warm-up, before the inverse square root of the step
    label_smoothing: float = 0.1  # share of a target that is spread over all tokens, in training
    grad_clip: float = 1.0  # a gradient whose norm is larger is scaled down to it; 0: no limit
    dropout: float = 0.0  # probability, after the embedding and after each sublayer


# What three of the options may be.
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "geglu": F.gelu, "swiglu": F.silu}
CHOICES = {
    "ff": ACTIVATIONS,
    "position": ("sinusoid", "learned", "rotary", "relative"),
    "objective": ("next", "masked", "spans"),
}


class Attention(nn.Module):
    """Multi-head attention (3.2.2). Each query is compared with all keys that the mask allows. The
    result is a mean of the values, in which a value counts more if its key is like the query.

    Queries come from x. Keys and values come from x, too, or in cross-attention from the encoder's
    output. If `kv` is False, there is no W^K and no W^V: they are that output itself. Several query
    heads may share one head of keys and values, so that fewer need to be cached (Shazeer
    2019, arXiv 1911.02150; Ainslie et al. 2023, arXiv 2305.13245).
    """

    def __init__(self, cfg, kv=True):
        super().__init__()
        C = cfg.n_embd
        n_head = cfg.n_head
        if not cfg.head_dim and C % n_head:
            raise UserError(f"n_embd {C} is not a multiple of n_head {n_head}")
        d_k = cfg.head_dim or C // n_head  # channels of a head
        n_kv_head = cfg.n_kv_head or n_head
        if not kv:  # then the C channels of the encoder's output are cut into heads
            if C % d_k:
                raise UserError(f"--no-cross-kv: n_embd {C} is not a multiple of head_dim {d_k}")
            n_kv_head = C // d_k
        if n_head % n_kv_head:
            raise UserError(f"n_head {n_head} is not a multiple of {n_kv_head} key and value heads")
        self.d_k = d_k
        self.n_kv_head = n_kv_head
        self.group = n_head // n_kv_head  # query heads that share keys and values
        self.c_q = nn.Linear(C, n_head * d_k, bias=False)  # W^Q
        self.c_k = nn.Linear(C, n_kv_head * d_k, bias=False) if kv else nn.Identity()  # W^K
        self.c_v = nn.Linear(C, n_kv_head * d_k, bias=False) if kv else nn.Identity()  # W^V
        self.c_proj = nn.Linear(n_head * d_k, C, bias=False)  # W^O

    def heads(self, x):
        """(B, T, nh d_k) -> (B, nh, T, d_k), where nh is n_head or n_kv_head."""
        return x.unflatten(2, (-1, self.d_k)).transpose(1, 2)

    def keys_and_values(self, x):
        """The keys and the values of a text x (B, S, C), both (B, n_kv_head, S, d_k)."""
        return self.heads(self.c_k(x)), self.heads(self.c_v(x))

    def forward(self, x, mask=None, rotation=None, cache=None, layer=0, memory=None):
        """T queries from x (B, T, C), compared with S keys. mask (T, S) or (n_head, T, S) is added
        to the scores; rotation (T, d_k) is the table of `rotate`; memory: keys and values (of the
        encoder's output), if they are not those of x."""
        q = self.heads(self.c_q(x))  # (B, n_head, T, d_k)
        k, v = self.keys_and_values(x) if memory is None else memory  # (B, n_kv_head, S, d_k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # S: the tokens read before, then the T of x
        if self.group > 1:
            k = k.repeat_interleave(self.group, 1)  # (B, n_head, S, d_k)
            v = v.repeat_interleave(self.group, 1)

        # Equation 1: softmax(Q K^T / sqrt(d_k)) V
        scores = q / math.sqrt(self.d_k) @ k.transpose(2, 3)  # (B, n_head, T, S)
        if mask is not None:
            scores = scores + mask.type_as(scores)  # 16 bits in autocast
        weights = scores.softmax(-1)
        y = weights @ v  # (B, n_head, T, d_k)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, n_head d_k) -> (B, T, C)


class MLP(nn.Module):
    """Feed-forward: C -> n_ff -> C, with a ReLU (3.3, equation 2) or a GELU. In geglu and swiglu, a
    second linear map of x, c_gate, multiplies the hidden units. It is the V of Shazeer 2020, arXiv
    2002.05202. Others call the other factor, with the activation, the gate."""

    def __init__(self, cfg):
        super().__init__()
        gated = cfg.ff.endswith("glu")
        # With a gate, three matrices have as many parameters as two of n_ff hidden units.
        n_ff = round(cfg.n_ff * 2 / 3) if gated else cfg.n_ff
        self.activation = ACTIVATIONS[cfg.ff]
        self.c_fc = nn.Linear(cfg.n_embd, n_ff)  # W_1, b_1
        self.c_proj = nn.Linear(n_ff, cfg.n_embd)  # W_2, b_2
        self.c_gate = nn.Linear(cfg.n_embd, n_ff) if gated else None

    def forward(self, x):
        hidden = self.activation(self.c_fc(x))
        if self.c_gate:
            hidden = hidden * self.c_gate(x)
        return self.c_proj(hidden)


class Block(nn.Module):
    """Twice LayerNorm(x + Sublayer(x)) (3.1): attention, then feed-forward. In the decoder of an
    encoder-decoder, cross-attention comes between them."""

    def __init__(self, cfg, cross=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        if cross:
            self.ln_cross = nn.LayerNorm(cfg.n_embd)
            self.cross = Attention(cfg, cfg.cross_kv)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)  # of each sublayer's output, before the sum (5.4)

    def forward(self, x, mask, rotation=None, memory=None, cache=None, layer=0):
        x = self.ln_1(x + self.drop(self.attn(x, mask, rotation, cache, layer)))
        if memory is not None:
            x = self.ln_cross(x + self.drop(self.cross(x, memory=memory)))
        return self.ln_2(x + self.drop(self.mlp(x)))


# Positions. Attention without a mask does not know the order of the tokens, and a causal mask only
# hints at it. `sinusoid` and `learned` add a vector to each embedding, `rotary` turns queries and
# keys, `relative` adds a number to each score.


def positions(length, n_embd):
    """The table of sinusoids (3.5), (length, C), in float32 but computed in float64:

        row pos, channel 2i       sin(pos / 10000^(2i / C))
        row pos, channel 2i + 1   cos(pos / 10000^(2i / C))

    C is n_embd, or d_k where queries and keys are rotated by it.
    """
    pos = torch.arange(length).double()[:, None]  # (length, 1)
    angle = pos / 10_000 ** (torch.arange(0, n_embd, 2).double() / n_embd)  # (length, C / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()  # (length, C)


def rotate(x, table):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, 3.2.2). Each pair of channels of x
    (B, nh, T, d_k) is turned by an angle that grows with the position; `table` (T, d_k) has the
    sines and cosines. If a query and a key both move by n positions, their product is the same."""
    sin, cos = table[:, ::2], table[:, 1::2]  # (T, d_k / 2)
    x1, x2 = x[..., ::2], x[..., 1::2]  # (B, nh, T, d_k / 2)
    turned = torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)
    return turned.flatten(-2).type_as(x)  # (B, nh, T, d_k / 2, 2) -> (B, nh, T, d_k)


def buckets(distance, causal):
    """T5's bucket, 0 to 31, for each distance of a key from a query (Raffel et al. 2020, 2.1). Keys
    at similar distances are in one bucket, and have the same bias. In a decoder:

        tokens back   0 .. 15    each has a bucket of its own, 0 .. 15
                     16 .. 127   share the buckets 16 .. 31, on a log scale
                    128 ..       have bucket 31

    An encoder has 16 such buckets (8 and 8) for keys to the left, and 16 for keys to the right.
    """
    near = 16 if causal else 8  # buckets of one distance each; as many more for longer ones
    d = distance.abs()
    far = (d.clamp(min=1) / near).log() / math.log(128 / near)  # 0 at `near` tokens, 1 at 128
    # Some distances, such as 32, are where a bucket begins, so the rounding of the device's log
    # would decide. With 1e-4 more, they are in the upper bucket on every device.
    far_bucket = near + (near * far + 1e-4).long()
    bucket = torch.where(d < near, d, far_bucket.clamp(max=2 * near - 1))
    return bucket if causal else bucket + 16 * (distance > 0)


# What `masked` and `spans` hide. It depends on `noise`, (2, B, T) random numbers from 0 to 1.


def hidden_lengths(cfg, length):
    """(tokens to hide, spans to hide) of a text of `length` tokens. They are the same for all texts
    of this length, so that no text needs padding."""
    n_hidden = max(1, round(cfg.hide * length))
    return n_hidden, max(1, round(n_hidden / cfg.span_length))


def hide_tokens(text, noise, cfg, training):
    """BERT's masked tokens: text (B, T) -> idx (B, T), where some tokens are hidden, and targets
    (B, T), which has the hidden tokens, and -1 elsewhere. An example in training, with hide = 0.5:

        text      a   b   c   d   e   f   g   h       T = 8: 4 tokens are hidden
        rank      6   1   4   0   7   3   5   2       of noise[0]: 0 is the lowest
        idx       a  [M]  c  [M]  e   x   g  [M]      ranks 0, 1, 2: mask id; 3: a random token
        targets  -1   b  -1   d  -1   f  -1   h       ranks 0 to 3

    80% of the hidden tokens become the mask id [M], which is vocab_size. 10% become random tokens,
    and 10% stay as they are, because BERT later reads texts without mask ids. In evaluation, all
    become the mask id.
    """
    n_hidden, _ = hidden_lengths(cfg, text.size(1))
    n_masked = round(0.8 * n_hidden) if training else n_hidden
    n_changed = round(0.9 * n_hidden) if training else n_hidden
    # rank[b, t]: how many positions of text b have lower noise than t. argsort lists the positions
    # from the lowest noise to the highest; argsort of this list says where each position is in it.
    rank = noise[0].argsort(1).argsort(1)  # (B, T)
    random_tokens = (noise[1] * cfg.vocab_size).long()
    idx = text.where(rank >= n_changed, random_tokens)
    idx = idx.masked_fill(rank < n_masked, cfg.vocab_size)
    return idx, text.masked_fill(rank >= n_hidden, -1)


def random_numbers(noise, limit, n):
    """(B, n): for each text, n different integers from 0 to limit - 1, in increasing order: those
    positions among the first `limit` at which noise (B, T) is highest."""
    return noise[:, :limit].topk(n).indices.sort().values


def pick(values, wanted, n):
    """Of each row of values (B, S), the first n where `wanted` is True. It equals

        torch.stack([row[w][:n] for row, w in zip(values, wanted)])

    but does not make the program wait until the GPU has counted them. A stable sort puts what is
    wanted first, and keeps its order.
    """
    order = (~wanted).int().argsort(dim=1, stable=True)
    return values.gather(1, order[:, :n])


def hide_spans(text, noise, cfg):
    """T5's span corruption: text (B, T) -> source (B, T - n_hidden + n_spans) for the encoder, and
    target (B, n_hidden + n_spans + 1) for the decoder. An example:

        text      a   b   c   d   e   f   g   h       T = 8: 3 tokens are hidden, in 2 spans
        part      0   1   2   2   3   3   4   4       gap, span, gap, span, gap: odd parts are spans
        source    a  <0>  c   d  <1>  g   h           each span becomes one sentinel
        target   <0>  b  <1>  e   f  <2>              each gap becomes one sentinel

    The sentinels <0>, <1>, ... are the ids vocab_size, vocab_size + 1, ...
    """
    T = text.size(1)
    n_hidden, n_spans = hidden_lengths(cfg, T)

    # A row of n_hidden tokens is cut into spans: in the example, after 1 token. Then each span gets
    # a place among the T - n_hidden other tokens: in the example, after 1 and after 3 of them.
    cuts = random_numbers(noise[0], n_hidden - 1, n_spans - 1) + 1  # (B, n_spans - 1)
    places = random_numbers(noise[1], T - n_hidden + 1, n_spans)  # (B, n_spans)
    starts = places + F.pad(cuts, (1, 0))  # where each span starts: 1 and 4
    ends = places + F.pad(cuts, (0, 1), value=n_hidden)  # the position after it: 2 and 6

    # A new part begins at each start and each end; their running count is the number of the part.
    text = F.pad(text, (0, 1))  # (B, T + 1): the last end may be T. The id does not matter
    edges = torch.cat([starts, ends], 1)  # (B, 2 n_spans)
    begins = torch.zeros_like(text, dtype=torch.bool).scatter(1, edges, True)  # (B, T + 1)
    part = begins.cumsum(1)
    hidden = part % 2 == 1

    # The first token of what becomes a sentinel is replaced by it, and the rest is left out.
    # In `source`, the added position T would be the last token: `pick` takes one less.
    sentinel = cfg.vocab_size + part // 2
    source = pick(sentinel.where(hidden, text), begins | ~hidden, T - n_hidden + n_spans)
    target = pick(text.where(hidden, sentinel), begins | hidden, n_hidden + n_spans)
    return source, F.pad(target, (1, 0), value=cfg.vocab_size)  # <0>: the first gap


@torch.compiler.disable  # it cannot compile torch.Generator
def fixed_noise(text):
    """Noise (2, B, T) for texts (B, T). The seed for each text is the sum of its ids, so its noise
    does not depend on the batch that it is in."""
    rows = [
        torch.rand(2, len(ids), generator=torch.Generator().manual_seed(sum(ids)))
        for ids in text.tolist()
    ]
    return torch.stack(rows, 1).to(text.device)


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
#   cache.select(rows)       text i becomes what text rows[i] was, as beam search needs it
#   configure_optimizer, learning_rate, grow    three functions that the training loop calls


class Model(nn.Module):
    """A decoder (next), an encoder (masked), or both (spans). Besides what is said above:

    model(idx, targets)      masked, spans: hides some of idx, and scores what is hidden. A row of
                             targets that ends with -1 says that this text does not count; any other
                             text counts whole, also where the windows of --stride overlap
    model(idx)               masked: row i scores token i itself; a hidden token is vocab_size
                             spans: hides some of idx; row i scores token i + 1 of the target
    model(idx, cache=cache)  spans: the first call reads all tokens of the encoder, with a sentinel
                             for each span, and the first sentinel of the decoder; later calls read
                             what the decoder has written since

    Raises UserError if an option has an impossible value, or a text is longer than block_size.
    """

    ahead = 1

    def __init__(self, cfg):
        super().__init__()
        for name, choices in CHOICES.items():
            if getattr(cfg, name) not in choices:
                raise UserError(f"--{name}: choose one of {', '.join(choices)}")
        if not 0 < cfg.hide < 1:
            raise UserError(f"--hide {cfg.hide} must be above 0 and below 1")
        if cfg.span_length < 1:
            raise UserError(f"--span-length {cfg.span_length} must be at least 1")
        objective = cfg.objective
        spans = objective == "spans"
        n_hidden, n_spans = hidden_lengths(cfg, cfg.block_size)
        if spans and n_hidden + n_spans > cfg.block_size:
            raise UserError(f"--hide {cfg.hide} leaves too few tokens between the {n_spans} spans")
        self.cfg = cfg
        self.causal = objective != "masked"  # whether self.h is a decoder
        self.likelihood = objective == "next"

        # Ids past vocab_size: a mask id, which is only read; or sentinels, also predicted.
        n_extra = {"next": 0, "masked": 1, "spans": n_spans + 1}[objective]
        self.n_logits = cfg.vocab_size + spans * n_extra
        padded = math.ceil((cfg.vocab_size + n_extra) / 64) * 64  # for faster matrix products

        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.position == "learned":
            self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg, spans) for _ in range(cfg.n_layer))
        if spans:
            self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.lm_head = nn.Linear(cfg.n_embd, padded)
        for name, p in self.named_parameters():
            if name in ("wte.weight", "wpe.weight"):
                nn.init.normal_(p, std=cfg.n_embd**-0.5)  # times sqrt(C): as large as the sinusoids
            elif p.dim() >= 2:
                nn.init.xavier_uniform_(p)
            elif "bias" in name:
                nn.init.zeros_(p)

        width = self.h[0].attn.d_k if cfg.position == "rotary" else cfg.n_embd
        if width % 2:
            raise UserError(f"{width} channels (n_embd; in rotary, head_dim) must be even")
        self.register_buffer("positions", positions(cfg.block_size, width), persistent=False)
        if cfg.position == "relative":
            # The biases of buckets and heads, (32, n_head). All blocks of a stack use one table,
            # which is in the first block. A bias begins as -slope * n: n counts the buckets from
            # near to far (on each side), and slope is 1, 1/2, 1/4, ... for the heads. So each head
            # begins with what is near, at a scale of its own, much as in ALiBi (Press et al. 2022,
            # arXiv 2108.12409), where n is the distance. T5 begins near zero.
            slope = 0.5 ** torch.arange(cfg.n_head)
            bucket = torch.arange(32.0)[:, None]
            self.h[0].relative_bias = nn.Parameter(-slope * (bucket % (32 if self.causal else 16)))
            if spans:
                self.encoder[0].relative_bias = nn.Parameter(-slope * (bucket % 16))

    def noise(self, text):
        """The noise (2, B, T) that decides which tokens of text (B, T) are hidden. In evaluation it
        depends on the text alone, so that all models are scored on the same hidden tokens."""
        if self.training:
            return torch.rand(2, *text.shape, device=text.device)
        return fixed_noise(text)

    def run(self, blocks, idx, causal, past=0, memory=None, cache=None):
        """Runs one of the two stacks of figure 1: tokens (B, T), which begin at position `past`, ->
        (B, T, C). If causal it is a decoder: a position sees itself, and all before it. memory has
        the keys and values for cross-attention, a pair for each block."""
        position = self.cfg.position
        end = past + idx.size(1)
        if end > self.cfg.block_size:
            raise UserError(f"{end} tokens do not fit block_size {self.cfg.block_size}")

        # The embedding of tokens and positions.
        x = self.wte(idx)  # (B, T, C)
        table = self.positions[past:end]
        if position == "learned":
            x = x + self.wpe.weight[past:end]
        x = math.sqrt(self.cfg.n_embd) * x
        if position == "sinusoid":
            x = x + table
        x = self.drop(x)
        rotation = table if position == "rotary" else None

        # The mask is added to the scores: 0, or a bias, for a key that a query may see, else -inf.
        keys = torch.arange(end, device=idx.device)
        distance = keys - keys[past:, None]  # (T, S), from query to key: negative to the left
        mask = x.new_zeros(distance.shape)
        if position == "relative":
            bias = F.embedding(buckets(distance, causal), blocks[0].relative_bias)  # (T, S, n_head)
            mask = bias.permute(2, 0, 1)
        if causal:
            mask = mask.masked_fill(distance > 0, -math.inf)

        # The blocks.
        for layer, block in enumerate(blocks):
            x = block(x, mask, rotation, memory[layer] if memory else None, cache, layer)
        return x

    def forward(self, idx, targets=None, cache=None):
        if cache is not None:
            return self.decode(idx, cache)

        # Hide some of the text. From here on, idx is what the network reads, and `answers` has the
        # token to predict at each position, or -1 for none.
        cfg = self.cfg
        memory = None
        answers = targets
        if cfg.objective == "masked" and targets is not None:
            idx, answers = hide_tokens(idx, self.noise(idx), cfg, self.training)
        if cfg.objective == "spans":
            source, spans = hide_spans(idx, self.noise(idx), cfg)
            memory = self.encode(source)
            idx, answers = spans[:, :-1], spans[:, 1:]

        x = self.run(self.h, idx, self.causal, memory=memory)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)[..., : self.n_logits]  # (B, T, V)
        if cfg.objective != "next":  # evaluate fills up its last batch with rows of -1
            answers = answers.masked_fill(targets[:, -1:] < 0, -1)
        loss = linear_cross_entropy(
            x, self.lm_head.weight, answers, self.n_logits, self.lm_head.bias
        )
        if self.training and cfg.label_smoothing:
            loss += cfg.label_smoothing * self.smoothing(x, answers)
        return loss

    def encode(self, source):
        """The keys and values of the encoder's output for source (B, S): a pair for each block of
        the decoder, which attends to it."""
        x = self.run(self.encoder, source, causal=False)  # (B, S, C)
        return [block.cross.keys_and_values(x) for block in self.h]

    def decode(self, idx, cache):
        """Reads the new tokens idx (B, T). Logits (B, 1, V) of the token after them."""
        if self.cfg.objective == "spans" and cache.length == 0:
            # The encoder's text has the first sentinel once. Where it comes for the second time,
            # the decoder's text begins, in all rows at the same position.
            start = (idx[0] == self.cfg.vocab_size).nonzero()[1].item()
            cache.memory = self.encode(idx[:, :start])
            cache.source = start
            idx = idx[:, start:]
        x = self.run(self.h, idx, self.causal, cache.past, cache.memory, cache)
        cache.past += idx.size(1)
        return self.lm_head(x[:, -1:])[..., : self.n_logits]

    def smoothing(self, x, answers):
        """What label smoothing (5.4) adds to the loss, divided by epsilon. Instead of probability 1
        for the answer y, the targets are 1 - epsilon for y, plus epsilon / V for each of V tokens:

            loss = (1 - epsilon) * (-log p[y]) + epsilon * mean(-log p)
                 = -log p[y] + epsilon * (log p[y] - mean(log p))
                 = -log p[y] + epsilon * (logit[y] - mean(logit))

        since log p is logit minus a number that is the same for all tokens. The difference of the
        logits is linear in x (B, T, C): so it is computed without (B, T, V) logits.
        """
        weight = self.lm_head.weight[: self.n_logits]
        bias = self.lm_head.bias[: self.n_logits]
        y = answers[answers >= 0]  # (N): of the N positions that count
        # Not weight[y] and bias[y]: on several threads, their gradients change from run to run.
        w = F.embedding(y, weight) - weight.mean(0)  # (N, C)
        # No matrix product, so autocast computes the difference in float32: (N).
        difference = (x[answers >= 0] * w).sum(-1) + bias.gather(0, y) - bias.mean()
        return difference.mean()

    def new_cache(self, batch_size):
        return Cache(self, batch_size)


class Cache:
    """The keys and values of all tokens read so far, so that one more token costs the work of one.

    They stay valid, because the keys and values of a token do not depend on later tokens: attention
    looks back only, and everything else in the network treats each position by itself.

    With --objective spans, the encoder reads the first tokens, and the decoder the rest. Then k and
    v are of the decoder, and `memory` has the keys and values of the encoder's output.
    """

    def __init__(self, model, batch_size):
        cfg = model.cfg
        attn = model.h[0].attn
        shape = (cfg.n_layer, batch_size, attn.n_kv_head, cfg.block_size, attn.d_k)
        self.k = model.wte.weight.new_empty(shape)
        self.v = model.wte.weight.new_empty(shape)
        self.past = 0  # positions that are filled, the same in all layers
        self.source = 0  # tokens that the encoder has read
        self.memory = []  # a pair for each layer: keys and values for cross-attention

    @property
    def length(self):
        """The number of tokens read so far."""
        return self.source + self.past

    def append(self, layer, k, v):
        """Stores the new keys and values of a layer, (B, nh, T, d_k), and returns those of all
        tokens, (B, nh, past + T, d_k). When all layers have stored theirs, `past` goes up by T.
        """
        end = self.past + k.size(2)
        self.k[layer, :, :, self.past : end] = k
        self.v[layer, :, :, self.past : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Text i becomes what text rows[i] was."""
        rows = torch.as_tensor(rows).tolist()
        self.memory = [(k[rows], v[rows]) for k, v in self.memory]
        self.k = self.rearrange(self.k, rows)
        self.v = self.rearrange(self.v, rows)

    def rearrange(self, x, rows):
        """Returns keys or values x (n_layer, B, nh, block_size, d_k) with text rows[i] as text i.
        Beam search asks for this at every step, but few texts move then. Only these are copied, and
        only the positions that are filled; x itself is changed if the number of texts stays."""
        n_layer, B, *sizes = x.shape
        new = x if len(rows) == B else x.new_empty(n_layer, len(rows), *sizes)
        copies = {
            i: x[:, row, :, : self.past].clone()
            for i, row in enumerate(rows)
            if row != i or new is not x
        }
        for i, copy in copies.items():  # no text is overwritten before all copies are made
            new[:, i, :, : self.past] = copy
        return new


# Named sizes and their training. `masked` and `spans` have the same batches and steps.
BLANKS = dict(
    position="relative",
    block_size=128,
    n_head=4,
    n_embd=128,
    n_ff=512,
    batch_size=16,
    micro_batch=16,
    max_steps=3000,
    log_interval=100,
    warmup_steps=300,
    label_smoothing=0.0,
)
PRESETS = {
    "demo": dict(
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_ff=512,
        batch_size=8,
        micro_batch=8,
        max_steps=950,
        eval_interval=250,
        log_interval=50,
        warmup_steps=200,
    ),
    "masked": dict(objective="masked", hide=0.3, n_layer=4, learning_rate=4e-3, **BLANKS),
    "spans": dict(objective="spans", n_layer=2, learning_rate=1.5e-3, **BLANKS),
}


# The three functions that the training loop calls. Each model file has its own.


def configure_optimizer(model, cfg):
    """Adam (Kingma and Ba 2015) with the betas and the epsilon of 5.3."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)


def learning_rate(step, cfg):
    """At step `step`, counted from 0. By equation 3 of 5.3 it is, with s = step + 1,

        n_embd^-0.5 min(s^-0.5, s warmup_steps^-1.5)

    which rises to (n_embd warmup_steps)^-0.5 at s = warmup_steps, and then falls. If learning_rate
    is not 0, it is the peak instead. A short run reaches the same peak sooner.
    """
    peak = cfg.learning_rate or (cfg.n_embd * max(1, cfg.warmup_steps)) ** -0.5
    warmup = max(1, min(cfg.warmup_steps, cfg.max_steps // 2))  # at most half of a short run
    s = (step + 1) / warmup  # 1 at the peak
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
    logits. In loss.backward(), torch calls backward, which finds in ctx what forward has saved.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, need_grad):
        # x (N, C), weight (V, C), bias (V), targets (N, 1). Products in `dtype`, sums in float32.
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        chunk = 512 if device == "cpu" else 4096  # rows at a time
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
            torch.softmax(p.copy_(logits), dim=1, out=p)  # in place
            p_target = p.gather(1, targets[rows])  # (n, 1)
            loss -= p_target.clamp(min=2e-38).log().sum()  # not log(0): at most 86.8 nats
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
        # One gradient for each argument of forward: none for targets and need_grad.
        return *(t.mul_(factor) for t in ctx.saved_tensors), None, None


@torch.compiler.disable  # it would unroll the loop over the chunks
def linear_cross_entropy(x, weight, targets, vocab_size, bias=None):
    """The mean cross-entropy, in nats, of logits = x @ weight.T + bias. It equals

        logits = F.linear(x, weight, bias)[..., :vocab_size].flatten(0, 1)
        F.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    but never holds more than 512 rows of logits (4,096 on a GPU). The whole matrix of logits is the
    largest one of a step: for 8 x 2,048 tokens and 50,257 ids, it and its gradient need 6.6 GB.

    x (B, T, C), weight (V, C), bias (V); targets (B, T), where -1 does not count. Rows of weight
    from vocab_size on are padding. Weights in 16 bits would lose digits in the sum of the losses.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    bias[vocab_size:] = -math.inf  # so that the padding has probability 0
    counts = targets >= 0  # (B, T)
    x = x[counts].to(weight.dtype)  # (N, C): the N positions that count
    targets = targets[counts][:, None]  # (N, 1)
    need_grad = torch.is_grad_enabled()  # not in an evaluation
    return LinearCrossEntropy.apply(x, weight, bias, targets, need_grad)


# --- data, and how well a model predicts it


def open_data(data):
    """What prepare_data.py wrote into a folder: meta.json as a dict, a dict with what is needed to
    decode tokens, and for each split its tokens, as a memory map of the file."""
    path = Path(data)
    if not (path / "meta.json").is_file():
        raise UserError(
            f"{path}: no data. Try python prepare_data.py "
            f"{repr(data) if path.is_file() else 'stdlib'}"
        )
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    tokenizer = {"name": meta["tokenizer"], "ranks": ""}
    if tokenizer["name"].startswith("bpe:"):  # trained by prepare_data.py, which wrote its table
        tokenizer["ranks"] = (path / "tokenizer.tiktoken").read_text(encoding="utf-8")
    splits = {}
    for split, counts in meta["splits"].items():
        file = path / f"{split}.bin"
        if file.stat().st_size != 2 * counts["tokens"]:
            raise UserError(f"{file} has not the length that meta.json says: prepare it again")
        splits[split] = np.memmap(file, dtype="<u2", mode="r")  # little-endian uint16
    return meta, tokenizer, splits


def get_windows(tokens, starts, length):
    """B windows of `length` tokens, which begin at the positions `starts`: a tensor (B, length)."""
    index = starts[:, None] + np.arange(length)  # (B, length)
    return torch.from_numpy(tokens[index].astype(np.int64))


def get_batch(tokens, length, cfg, step):
    """The windows, (B, length), that this process trains on in step `step`. Those of all processes
    depend on seed and step alone: a resumed run, or one on more devices, sees the same data."""
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
    new_targets = np.diff(starts + T, prepend=0)  # of each window: how many were not scored before

    model.eval()
    total = 0.0
    for i in range(rank * B, len(starts), world_size * B):  # the processes share the batches
        start = starts[i : i + B]  # (B)
        count = torch.from_numpy(new_targets[i : i + B])  # (B)
        inputs = get_windows(text, start, T)  # (B, T)
        targets = get_windows(text, start + model.ahead, T)  # (B, T)
        targets[torch.arange(T) < T - count[:, None]] = -1  # scored in a window before
        with amp:
            mean = model(inputs.to(device), targets.to(device)).item()
        total += mean * count.sum().item()
    return add_up([total], device)[0] / n


def bits_per_byte(nats, counts):
    """Converts nats per token to bits per byte. A bit is ln 2 nats. `counts` is of the whole split,
    so for its first eval_tokens the result is an estimate."""
    return nats * (counts["tokens"] / counts["bytes"] / math.log(2))


def describe(nats, counts, likelihood):
    """A line about a loss in nats per token. If it is the likelihood of a text, also in bits per
    byte, and as perplexity per token, word and byte: e ** (all nats / their number)."""
    text = f"{nats:.4f} nats per token"
    if likelihood:
        text += f", {bits_per_byte(nats, counts):.4f} bits per byte; perplexity"
        for unit in ("token", "word", "byte"):
            power = nats * counts["tokens"] / max(1, counts[f"{unit}s"])
            if power < 99:  # not of a text without spaces, which is one huge word
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


def open_log(path, step):
    """Opens log.csv, to append rows to it. A resumed run takes the steps after its checkpoint
    again, so their old rows are removed, and with them half a row that a killed run may have left.
    """
    old = path.read_text() if path.exists() else ""
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


def choose_device(device="auto", dtype="auto"):
    """(device, dtype to compute in). Raises UserError if the device is not available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: {str(e).split('. ')[0]}. Try --device cpu") from e
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


# Integers that may be 0. On the command line, other integers are at least 1, and floats at least 0,
# unless their default is less. (lora_rank is an option of progressive.py.)
MAY_BE_ZERO = ("seed", "max_steps", "warmup_steps", "lora_rank")


def at_least(least, kind):
    """Returns a function that reads an int or a float from the command line, `least` or more."""

    def number(text):
        value = kind(text)
        if not value >= least:  # so that nan is refused, too
            raise argparse.ArgumentTypeError(f"{text}: at least {least} is needed")
        return value

    return number


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda text: sys.exit(f"{parser.prog}: {text} (--help lists all options)")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="a named size with its training")
    add("--eval-only", action="store_true", help="evaluate --init-from, or ckpt.pt in --out")
    add("--split", default="val", help="evaluated at the end, if it exists: train, val or test")
    add("--stride", type=at_least(1, int), help="at the end: each window scores STRIDE targets")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out")
    start.add_argument("--init-from", help="start a new run from the weights of this checkpoint")

    # Each field of Config is an option. Its help is the comment beside it, found in the source.
    comments = dict(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        kind = {"type": field.type}
        if field.type in (int, float):
            least = int(field.type is int and field.name not in MAY_BE_ZERO)
            kind["type"] = at_least(min(least, field.default), field.type)
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
    """In `with catch_signals() as caught`, Ctrl-C and SIGTERM only add their number to `caught`, so
    that the step can be finished and saved. The same signal again ends the program at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, handlers[number])
        # Not print: the signal may come in the middle of another print.
        os.write(2, b"stopping after this step; once more stops at once\n")

    handlers = {}  # those from before, which are set again at the end
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
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
    if use_compile:
        torch.compiler.reset()  # forget what was compiled before it grew: torch keeps only a few
        model = torch.compile(model)
    if world_size > 1:
        return model, nn.parallel.DistributedDataParallel(model)
    return model, model


def train(cfg, options, ckpt):
    """Trains, resumes or evaluates. Started by torchrun, all processes do this at the same time."""
    out = Path(cfg.out)
    if (out / "ckpt.pt").exists() and not (options.resume or options.eval_only):
        raise UserError(f"{out} holds a run: --resume continues it, --out FOLDER starts another")

    if cfg.dropout >= 1 or cfg.batch_size < world_size:
        raise UserError(f"--dropout must be below 1, and --batch-size at least {world_size}")

    # The device. Autocast computes matrix products in 16 bits. Weights and their gradients, the
    # residual stream and the loss stay in float32.
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
        # OpenAI's weights name no data set. Their tokenizer is gpt2.
        raise UserError(
            f"{cfg.data} has another tokenizer than the model: "
            f"prepare it with --tokenizer {ckpt['config'].get('data', 'gpt2')}"
        )
    cfg.vocab_size = meta["vocab_size"]
    cfg.eot = meta["eot"]

    if options.eval_only:
        cfg.max_steps = 0  # then no step is taken, and nothing is written
        if options.split not in splits:
            raise UserError(f"--split {options.split}: {cfg.data} has {', '.join(splits)}")

    # The model and its optimizer: new, or those of the checkpoint.
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    optimizer = configure_optimizer(model, cfg)
    step = tokens = 0
    seconds = 0.0  # of steps, without evaluations
    best = math.inf  # lowest validation loss
    best_step = 0  # the step that had it
    if ckpt:
        model.load_state_dict(ckpt["model"])
    if options.resume:
        if "best_step" not in ckpt:  # of prepare_data.py weights:gpt2 or progressive.py --export
            raise UserError(f"{out}/ckpt.pt has weights, but no run: --init-from starts one")
        step, tokens, seconds, best, best_step = (
            ckpt[k] for k in ("step", "tokens", "seconds", "best", "best_step")
        )
        # Adam's moments come from the checkpoint; weight decay and betas are those of this run.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": ckpt["optimizer"]["state"]})
        scaler.load_state_dict(scaler.state_dict() | ckpt["scaler"])
        if any(ckpt["config"][name] != getattr(cfg, name) for name in ("data", "eval_tokens")):
            best = math.inf  # it is the loss of another text
    ckpt.clear()  # frees its memory: 4 bytes for each parameter, or 12 with Adam's moments

    # A training window has the inputs and, `ahead` tokens later, the targets.
    length = cfg.block_size + model.ahead
    print0(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}, "
        f"{cfg.data} -> {out}"
    )
    tokens_per_step = cfg.batch_size * cfg.block_size

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
            best_step=best_step,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )
        write_atomically(out / name, lambda file: torch.save(state, file))

    if not options.eval_only:
        if len(splits["train"]) < length:
            raise UserError(f"{cfg.data}/train.bin: fewer than {length} tokens, lower --block-size")
        print0(
            f"{cfg.max_steps:,} steps read the text "
            f"{cfg.max_steps * tokens_per_step / len(splits['train']):,.1f} times "
            "(from some ten times on, it is learned by heart)"
        )
        save("ckpt.pt")  # from here on there is something to resume
        log = open_log(out / "log.csv", step)
    stopped = 0  # how many times the processes were told to stop
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
            seed = np.random.SeedSequence([cfg.seed, step, rank])
            torch.manual_seed(seed.generate_state(1).item())

            # Forward and backward, a micro-batch at a time. The gradients add up, so each mean loss
            # is multiplied by its share of the batch, and by world_size, since DDP divides by it.
            # Only in the last backward pass, DDP needs to exchange gradients between processes.
            model.train()
            total = 0.0
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
            loss, stopped = add_up([loss, len(signals)], device)
            if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}. "
                    f"{out}/ckpt.pt is from before it"
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            tokens += tokens_per_step
            seconds += time.perf_counter() - start

            # Once in a while: the validation loss. best.pt has the weights with the lowest one.
            evaluating = step % cfg.eval_interval == 0 or step == cfg.max_steps
            val = val_bits = val_text = ""  # empty, unless this step evaluates
            if evaluating and "val" in splits:
                val = evaluate(compiled, splits["val"][: cfg.eval_tokens], cfg.eot, amp)
                if math.isnan(val):
                    raise UserError(
                        f"step {step}: validation loss {val}. {out}/ckpt.pt is from before it"
                    )
                val_text = f", validation loss {val:.4f}"
                if model.likelihood:
                    val_bits = bits_per_byte(val, meta["splits"]["val"])
                    val_text += f", {val_bits:.4f} bits per byte"
                if val < best:
                    best = val
                    best_step = step
                    save("best.pt")

            # A line on the terminal, and a row in log.csv.
            if step == 1 or step % cfg.log_interval == 0 or evaluating or stopped:
                speed = (tokens - last_tokens) / (seconds - last_seconds)
                last_tokens, last_seconds = tokens, seconds
                minutes = (cfg.max_steps - step) * tokens_per_step / speed / 60
                print0(
                    f"step {step:,}/{cfg.max_steps:,}: loss {loss:.4f}, lr {lr:.2e}, "
                    f"norm {norm:.2f}, {speed:,.0f} tokens/s, {minutes:.0f} min left{val_text}"
                )
                row = f"{step},{tokens},{loss},{val},{val_bits},{lr},{norm},{speed},{seconds}"
                print(row, file=log)
            if evaluating or stopped:
                save("ckpt.pt")

    if not options.eval_only:
        grow(model, optimizer, cfg, step)  # progressive.py writes its --export here
        name = "ckpt.pt"
        if best < math.inf:
            name = "best.pt"
            print0(f"best: {best:.4f} at step {best_step:,}, {out / name}")
        print0(
            f"{step:,} steps, {seconds:.0f} s. --resume continues; with --max-steps N, learning "
            f"rates are those of a run of N steps. Try python sample.py --ckpt '{out / name}'"
        )

    # At the end, the latest weights (not those of best.pt) are evaluated on a whole split.
    if options.split in splits and not stopped:
        nats = evaluate(compiled, splits[options.split], cfg.eot, amp, options.stride)
        print0(
            f"all of {options.split}: "
            f"{describe(nats, meta['splits'][options.split], model.likelihood)}"
        )
    # What uses the process group is deleted before it, or the program may hang at its end.
    del ddp_model
    gc.collect()
    if world_size > 1:
        dist.destroy_process_group()
    if stopped:  # as in a shell: 130 is Ctrl-C; perhaps only another process was told to stop
        sys.exit(128 + max(signals, default=0))


def main(argv=None):
    try:
        train(*parse(argv))
    except KeyboardInterrupt:  # outside the training loop, or the second one in it
        print(f"{FILE}: interrupted", file=sys.stderr)
        sys.exit(130)  # as in a shell
    except (UserError, OSError, MemoryError) as e:
        sys.exit(f"{FILE}: {e}")
    except RuntimeError as e:  # "enforce fail": no memory on a CPU, or no space on the disk
        if not re.search(r"enforce fail|out of memory|C(\+\+)? compiler", str(e)):
            raise
        sys.exit(
            f"{FILE}: no memory, no space on the disk, or no compiler (--no-compile): "
            f"{str(e).splitlines()[0]}"
        )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character of a path
    main()
