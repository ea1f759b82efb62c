"""The masked mixer: a learned lower-triangular matrix over positions instead of attention.

    x (B, T, C) --+-------------------+--> x      n_layer times, as in gpt2.py
                  |                   ^
                  +-> ln_1 -> mix  ---+           a position gathers with row t of the matrix W:
                  +-> ln_2 -> mlp  ---+               y[t] = sum over s <= t of W[t, s] x[s]

          W                W is a parameter: the weights depend on the positions and never on the tokens. There are no
          w . . .          queries, no keys and no position embeddings, since each position has its own row of W.
          w w . .          Decoding a token needs one row of W and the inputs of the earlier positions: half the
          w w w .          memory of a cache of keys and values.
          w w w w

--mixing expanded: T -> 2 T -> T with a GELU between; each position has two of the 2 T hidden units.
--mixing softmax: each row of W is a softmax over the positions up to its own.
--n-head: one W for each slice of the channels. --kernel 4: each entry of W is a convolution of width 4 along them.

Source: blbadger, "Smaller, Simpler Language Models" (a draft), and Badger 2024, arXiv 2409.01482, section 3. The
draft's code puts a new nn.Parameter in place of W in every forward, so the optimizer never updates W. The paper's code
overwrites W.data, so masked entries still have gradients, which distort clipping. Here the mask is part of the graph.
Both sources mask the expanded form with tril of a (2 T, T) matrix: half of the hidden units never reach the output.
And tril before a softmax masks nothing, since exp(0) = 1. Unlike the sources, this model has a LayerNorm before its
head, and the heads that mix have no projections of their own.

    python mixer.py --preset demo                                     three minutes on a laptop's CPU
    python mixer.py --device cuda --data data/NAME                    8 layers, width 256, context 512

In the diff with gpt2.py: PositionMap and Mix instead of Attention, a cache of one vector per position, and no wpe.
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
    vocab_size: int = 4096  # vocabulary size; training takes that of its data set
    block_size: int = 512  # longest context, in tokens
    n_layer: int = 8  # blocks
    n_head: int = 1  # matrices per layer, each for its slice of the channels
    n_embd: int = 256  # width of the residual stream, in channels
    mixing: str = "flat"  # flat: T -> T positions; expanded: T -> 2 T -> T; softmax: rows that sum to 1
    kernel: int = 1  # neighbouring channels that an entry of a matrix weighs, with one weight each
    rotary: bool = False  # rotate channels by position before mixing, as the source's draft does
    tie_weights: bool = False  # the head shares the weights of the token embedding
    dropout: float = 0.0  # probability, at the embedding and the output of each sublayer
    # The run.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = "out/mixer"  # folder for ckpt.pt, best.pt and log.csv
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
    "demo": dict(n_layer=4, n_embd=128, batch_size=4, micro_batch=4, max_steps=950, eval_interval=250, log_interval=50,
                 learning_rate=4e-3, warmup_steps=60),
}  # fmt: skip


class Cache:
    """Inputs of each PositionMap, (block_size, B, n_in, n_head, head size), `length` positions filled."""

    def __init__(self, model, batch_size):
        self.x, self.length = {}, 0
        for module in model.modules():
            if isinstance(module, PositionMap):
                n_head, _, block_size, n_in, _, _ = module.weight.shape
                shape = (block_size, batch_size, n_in, n_head, model.cfg.n_embd // n_head)
                self.x[module] = module.weight.new_empty(shape)

    def append(self, module, x):
        """Stores a map's new inputs (T, B, n_in, nh, hs); returns all of them (length + T, B, n_in, nh, hs)."""
        end = self.length + x.size(0)
        self.x[module][self.length : end] = x
        return self.x[module][:end]

    def select(self, rows):
        """Makes row i of the batch what row rows[i] was: keeps, repeats or reorders them."""
        for module, old in self.x.items():
            self.x[module] = old.new_empty(len(old), len(rows), *old.shape[2:])
            self.x[module][: self.length] = old[: self.length, rows]


class PositionMap(nn.Module):
    """A causal linear map over positions, from n_in channel vectors per position to n_out. The weight of a plain flat
    mixer is, without the dimensions of size 1, the (T, T) matrix W, and what is computed is torch.tril(W) @ x.

    Where it would be one number per position, there is no bias: the same number in all channels is what every later
    LayerNorm subtracts. Hidden vectors, which pass a GELU, and several heads have a bias that matters."""

    def __init__(self, cfg, n_in, n_out):
        super().__init__()
        self.softmax = cfg.mixing == "softmax"
        self.weight = nn.Parameter(torch.empty(cfg.n_head, n_out, cfg.block_size, n_in, cfg.block_size, cfg.kernel))
        self.bias = nn.Parameter(torch.zeros(cfg.block_size * n_out * cfg.n_head)) if n_out * cfg.n_head > 1 else None

    def forward(self, x, cache=None):
        """x (T, B, n_in, nh, hs), of new positions -> (T, B, n_out, nh, hs)."""
        T = x.size(0)
        if cache is not None:
            x = cache.append(self, x)  # (S, B, n_in, nh, hs), S = positions before + T
        S = x.size(0)
        weight = self.weight[:, :, S - T : S, :, :S]  # (nh, n_out, T, n_in, S, k)
        future = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)[:, None, :, None]
        weight = weight.masked_fill(future, -math.inf if self.softmax else 0.0)
        k = weight.size(-1)
        if self.softmax:
            weight = weight.softmax(-2) / k
        x = F.pad(x, ((k - 1) // 2, k // 2)).unfold(-1, k, 1)  # (S, B, n_in, nh, hs, k): each channel, its neighbours
        y = torch.einsum("hotisk,sbihck->tbohc", weight, x)
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, y.size(2), y.size(3), 1)[S - T : S]
        return y


class Mix(nn.Module):
    """Each channel gathers over the positions up to its own, by one PositionMap, or two with a GELU between."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.rotary = cfg.n_head, cfg.rotary
        vectors = [1, 2, 1] if cfg.mixing == "expanded" else [1, 1]  # per position, before and after each map
        self.maps = nn.ModuleList(PositionMap(cfg, n_in, n_out) for n_in, n_out in zip(vectors, vectors[1:]))

    def forward(self, x, cache=None):
        if self.rotary:
            x = rotate(x, cache.length if cache is not None else 0)
        x = x.transpose(0, 1).unflatten(2, (1, self.n_head, -1))  # (T, B, 1, nh, hs)
        for i, position_map in enumerate(self.maps):
            x = position_map(F.gelu(x, approximate="tanh") if i else x, cache)
        return x.flatten(2).transpose(0, 1)  # (B, T, C)


def rotate(x, past):
    """Rotates pairs of channels by angles that grow with the position (Su et al. 2021, arXiv 2104.09864, 3.2.2)."""
    T, C = x.shape[1:]
    position = torch.arange(past, past + T, device=x.device, dtype=torch.float32)
    angle = position[:, None] / 10_000 ** (torch.arange(0, C, 2, device=x.device) / C)  # (T, C / 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(rotated, dim=-1).flatten(2).to(x.dtype)


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
        self.ln_1, self.mix = nn.LayerNorm(cfg.n_embd), Mix(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cache=None):
        x = x + self.drop(self.mix(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Model(nn.Module):
    """The masked mixer. model(idx) -> logits (B, T, V); model(idx, targets) -> mean cross-entropy in nats, a scalar;
    model(idx, cache=cache) -> logits (B, 1, V) for the token after idx, which continues what the cache has seen.
    Raises ValueError for invalid values of cfg, and for a text longer than block_size."""

    ahead = 1  # row i of the logits scores token i + ahead
    likelihood = True  # of the text: the loss has a meaning in bits per byte

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_embd % cfg.n_head:
            raise ValueError(f"n_embd {cfg.n_embd} is not a multiple of n_head {cfg.n_head}")
        if cfg.mixing not in ("flat", "expanded", "softmax"):
            raise ValueError(f"mixing {cfg.mixing!r} is invalid: it must be flat, expanded or softmax")
        if cfg.kernel < 1 or (cfg.rotary and cfg.n_embd % 2):
            raise ValueError(f"kernel {cfg.kernel} must be at least 1, and n_embd {cfg.n_embd} even if rotary")
        self.cfg = cfg
        padded = math.ceil(cfg.vocab_size / 64) * 64  # for faster matmuls; padded logits are sliced off
        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, padded, bias=False)
        if cfg.tie_weights:
            self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:  # residual projections are scaled by 1 / sqrt(2 n_layer): that many are added up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if "c_proj" in name else 0.02)
            elif "ln_1.weight" in name:
                # A row sums up to block_size vectors that have much in common, and Adam moves all its entries at once:
                # with norms that start at 1, the sum drowns the tokens and the model learns only their frequencies.
                nn.init.constant_(p, cfg.block_size**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        T, past = idx.size(1), cache.length if cache is not None else 0
        if past + T > self.cfg.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size {self.cfg.block_size}")
        x = self.drop(self.wte(idx))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -self.ahead :]
        x = self.ln_f(x)
        if targets is not None:
            return linear_cross_entropy(x, self.lm_head.weight, targets, self.cfg.vocab_size)
        return self.lm_head(x)[..., : self.cfg.vocab_size]  # (B, T, V)

    def new_cache(self, batch_size):
        return Cache(self, batch_size)


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
