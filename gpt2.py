"""GPT-2: the baseline that every other file here is compared with.

    idx (B, T)                            the token ids of B texts
    |    wte[idx] + wpe[0 .. T-1]         a vector for each token, and one for each position
    v
    x ---+      (B, T, C)                 the residual stream: C numbers for each position
    |    ln_1                             LayerNorm: mean 0 and variance 1, then scale and shift
    |    attn                             attention: a position reads the positions up to itself
    + <--+
    x ---+                                a block has two sums; there are n_layer blocks
    |    ln_2
    |    mlp                              feed-forward network: each position by itself
    + <--+
    |    ln_f, then the transpose of wte  the head shares the weights of the token embedding
    v
    logits (B, T, V)                      row i scores token i + 1

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, on
the GPT of Radford et al. 2018. The parameters have OpenAI's names, so OpenAI's weights can be
loaded (python prepare_data.py weights:gpt2). Only the matrices of linear layers are transposed.

    python gpt2.py --preset demo                                  some minutes on two CPU cores
    python gpt2.py --preset gpt2 --device cuda --data data/NAME   124M parameters on one GPU

The loss begins near ln V, as if all tokens were equally likely: 8.3 nats for 4,096 of them. The
other model files differ from this one in the network and in the three functions below it. Compare
them: diff gpt2.py progressive.py
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
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads
    n_embd: int = 192  # width of the residual stream, in channels
    eot: int = -1  # id of the end of text (-1: the last id); training takes it from the data set
    # The run. These fields may change when a run is resumed.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = f"out/{Path(__file__).stem}"  # folder for ckpt.pt, best.pt and log.csv
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a CUDA GPU if there is one
    dtype: str = "auto"  # float32, or bfloat16 or float16 (autocast); auto: a fast one
    compile: bool | None = None  # torch.compile; None: on NVIDIA's GPUs since 2017, under Linux
    seed: int = 1337  # of the initial weights, the batches and dropout
    max_steps: int = 80_000  # optimizer steps
    batch_size: int = 8  # sequences in an optimizer step, over all devices
    micro_batch: int = 8  # sequences in a forward pass on a device; gradients add up to the batch
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int = 2**16  # tokens that such an evaluation scores, from the start of val.bin
    log_interval: int = 10  # steps between lines of log.csv
    learning_rate: float = 6e-4  # peak learning rate
    warmup_steps: int = 100  # steps of linear warm-up, before a cosine decay to zero
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    grad_clip: float = 1.0  # a gradient whose norm is larger is scaled down to it; 0: no limit
    dropout: float = 0.0  # probability, after embeddings and sublayers and on attention weights


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2). A position makes three
    vectors: a query, a key and a value. Its query is compared with the keys of all positions up to
    itself. The result is a mean of their values, in which a value counts more if its key is like
    the query. Each head does this with vectors of its own."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        hs = C // self.n_head  # head size
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, T, 3, nh, hs) -> three times (B, nh, T, hs)
        if cache is not None:
            # In sampling, k and v become those of all S tokens, (B, nh, S, hs). The new T are last.
            k, v = cache.append(layer, k, v)
        S = k.size(2)
        dropout = self.dropout if self.training else 0.0

        # The mask is added to the scores: 0 for a key that a query may see, -inf for a later token.
        # Query i is token S - T + i of the text. A single query is the last token: it may see all.
        mask = None
        # On a CPU in bfloat16, the formula of attention makes a training step 10% to 20% faster. In
        # evaluation, and with 512 tokens or more, torch's function is as fast or faster.
        on_cpu = q.device.type == "cpu"
        by_formula = self.training and on_cpu and q.dtype == torch.bfloat16 and S < 512
        if by_formula or 1 < T < S:
            mask = q.new_full((T, S), -math.inf).triu(S - T + 1)  # (T, S)
        if by_formula:
            scores = q / math.sqrt(hs) @ k.transpose(-2, -1) + mask  # (B, nh, T, S)
            y = F.dropout(scores.softmax(-1), dropout) @ v  # (B, nh, T, hs)
        else:  # torch's function computes the same; is_causal stands for the mask when T == S
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=(T == S))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, nh, T, hs) -> (B, T, C)


class MLP(nn.Module):
    """Feed-forward: C -> 4C -> C, with GELU by tanh (Hendrycks and Gimpel 2016, section 2)."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


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
    """GPT-2, as in the drawing at the top of this file."""

    ahead = 1
    likelihood = True

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_embd % cfg.n_head:
            raise UserError(f"n_embd {cfg.n_embd} is not a multiple of n_head {cfg.n_head}")
        self.cfg = cfg
        padded = math.ceil(cfg.vocab_size / 64) * 64  # matrix products of such a size are faster
        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, padded, bias=False)
        self.lm_head.weight = self.wte.weight  # one matrix for both
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = 0.02
                if "c_proj" in name:  # 2 n_layer outputs are added to x: each starts smaller
                    std /= math.sqrt(2 * cfg.n_layer)
                nn.init.normal_(p, std=std)
            elif "bias" in name:
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        T = idx.size(1)
        past = 0 if cache is None else cache.length  # tokens before idx
        if past + T > self.cfg.block_size:
            raise UserError(f"{past + T} tokens do not fit block_size {self.cfg.block_size}")
        positions = torch.arange(past, past + T, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]  # only the token after idx is asked for
        x = self.ln_f(x)
        if targets is not None:  # F.cross_entropy of the logits, in less memory: see below
            return linear_cross_entropy(x, self.lm_head.weight, targets, self.cfg.vocab_size)
        return self.lm_head(x)[..., : self.cfg.vocab_size]  # (B, T, V), without the padding

    def new_cache(self, batch_size):
        return Cache(self, batch_size)


class Cache:
    """The keys and values of all tokens read so far, so that one more token costs the work of one.

    They stay valid, because the keys and values of a token do not depend on later tokens: attention
    looks back only, and everything else in the network treats each position by itself.
    """

    def __init__(self, model, batch_size):
        cfg = model.cfg
        shape = (cfg.n_layer, batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.k = model.wte.weight.new_empty(shape)
        self.v = model.wte.weight.new_empty(shape)
        self.length = 0  # positions that are filled, the same in all layers

    def append(self, layer, k, v):
        """Stores the new keys and values of a layer, (B, nh, T, hs), and returns those of all
        tokens, (B, nh, length + T, hs). When all layers have stored theirs, `length` goes up by T.
        """
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows):
        """Text i becomes what text rows[i] was."""
        rows = torch.as_tensor(rows).tolist()
        self.k = self.rearrange(self.k, rows)
        self.v = self.rearrange(self.v, rows)

    def rearrange(self, x, rows):
        """Returns keys or values x (n_layer, B, nh, block_size, hs) with text rows[i] as text i.
        Beam search asks for this at every step, but few texts move then. Only these are copied, and
        only the positions that are filled; x itself is changed if the number of texts stays."""
        n_layer, B, *sizes = x.shape
        new = x if len(rows) == B else x.new_empty(n_layer, len(rows), *sizes)
        copies = {
            i: x[:, row, :, : self.length].clone()
            for i, row in enumerate(rows)
            if row != i or new is not x
        }
        for i, copy in copies.items():  # no text is overwritten before all copies are made
            new[:, i, :, : self.length] = copy
        return new


# Named sizes and their training. For OpenAI's sizes, learning rates are those of GPT-3 (Brown et
# al. 2020, table 2.1), and a step has 512 x 1024 = 2**19 tokens, about 0.5M.
DEMO = dict(block_size=128, batch_size=16, micro_batch=16, max_steps=2300, learning_rate=4e-3)
REPORT = dict(dropout=0.2, batch_size=64, micro_batch=64, max_steps=5000, learning_rate=3e-4)
GPT2 = dict(block_size=1024, batch_size=512, micro_batch=16, max_steps=20_000, warmup_steps=700)
PRESETS = {
    "demo": dict(n_layer=2, n_head=4, n_embd=128, warmup_steps=300, log_interval=50, **DEMO),
    "report": dict(n_layer=6, n_head=6, n_embd=384, **REPORT),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, **GPT2),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=3e-4, **GPT2),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=2.5e-4, **GPT2),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=2e-4, **GPT2),
}


# The three functions that the training loop calls. Each model file has its own.


def configure_optimizer(model, cfg):
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices and embeddings alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]  # biases and the weights of norms
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, cfg):
    """At step `step`, counted from 0: linear warm-up, then a cosine down to zero at max_steps."""
    warmup = min(cfg.warmup_steps, cfg.max_steps // 2)  # at most half of a short run
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (cfg.max_steps - warmup)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


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
