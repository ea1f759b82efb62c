"""Progressive diverging: 3 shared blocks become 6, then 12, during training, and no switch changes the function.

    layer     0  1  2  3  4  5  6  7  8  9 10 11      every stage is a GPT-2 of 12 layers
    stage 1   A  A  A  A  B  B  B  B  C  C  C  C      3 blocks, each called 4 times in a row
    stage 2   A  A  A' A' B  B  B' B' C  C  C' C'     6 blocks: each block and a copy of it, called twice
    stage 3   A  a  A' a' B  b  B' b' C  c  C' c'     12 blocks: copied again, called once

The idea: begin with few parameters, and let the layers become different as training proceeds. From stage 2 on the
attention matrices are frozen and learn through LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): W becomes
W + alpha / rank B A, where B starts at zero. A copy computes what its original does, and B A is zero, so the loss is
the same before and after a switch. The next switch adds B A to W. At every stage some plain GPT-2 computes the same:
--export writes it as a checkpoint of gpt2.py, which samples faster, since W + B A is not summed again for each token.

Source: github.com/swortaljuju/lmsmall, "Progressive Diverging model". Its code does not do what its text says: the
optimizer is built before stages 2 and 3, so their tensors are never trained; LoRA is a second attention module with
random weights, so the loss jumps from 1.92 to 3.19 at a switch; and its test loss is that of the stage 1 network.
Related: Takase and Kiyono 2021 (arXiv 2104.06022) share blocks in this order (they call it SEQUENCE); Bae et al. 2024
(arXiv 2410.20672, Relaxed Recursive Transformers) add LoRA to each call of a shared block.

    python progressive.py --preset demo                               some minutes on a laptop's CPU
    python progressive.py --device cuda --data data/NAME              the source's size on one GPU

In the diff with gpt2.py: LoRALinear, the line of Model.forward that picks the block of a layer, and grow with the
functions that it calls. --lora-rank 0 switches without freezing anything: the control experiment.
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
from contextlib import nullcontext
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
    n_layer: int = 12  # layers, a multiple of 4; a block serves several of them
    n_head: int = 6  # attention heads
    n_embd: int = 192  # width of the residual stream, in channels
    stage: int = 1  # blocks serve 4 layers each in stage 1, 2 in stage 2, 1 in stage 3; training raises it
    lora_rank: int = 32  # rank of B A, with which attention matrices learn from stage 2 on; 0: W itself is trained
    lora_alpha: float = 64.0  # B A is scaled by lora_alpha / lora_rank
    dropout: float = 0.0  # probability, at the embedding, attention weights and the output of each sublayer
    # The run.
    data: str = "data/stdlib"  # folder that prepare_data.py wrote
    out: str = "out/progressive"  # folder for ckpt.pt, best.pt and log.csv
    stages: str = "0.05,0.15"  # when stages 2 and 3 begin, as fractions of max_steps; never, for 1 and above
    export: str = ""  # file to write the finished model to, as a checkpoint of gpt2.py
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
    "demo": dict(n_layer=12, n_head=4, n_embd=64, max_steps=750, eval_interval=250, log_interval=50,
                 learning_rate=4e-3, warmup_steps=60),
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


class LoRALinear(nn.Linear):
    """A Linear layer. From stage 2 on its W is frozen and B A is trained: y = (W + alpha / rank B A) x + bias."""

    def __init__(self, n_in, n_out, cfg):
        super().__init__(n_in, n_out)
        self.rank = cfg.lora_rank if cfg.stage > 1 else 0
        if self.rank:
            self.weight.requires_grad = False
            self.scale = cfg.lora_alpha / cfg.lora_rank
            self.lora_a = nn.Parameter(torch.randn(self.rank, n_in) / math.sqrt(n_in))
            self.lora_b = nn.Parameter(torch.zeros(n_out, self.rank))

    def matrix(self):
        """W + alpha / rank B A (n_out, n_in). In training the sum costs less than two more matmuls for each token."""
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


class Model(nn.Module):
    """GPT-2 whose layers share blocks. model(idx) -> logits (B, T, V); model(idx, targets) -> mean cross-entropy in
    nats, a scalar; model(idx, cache=cache) -> logits (B, 1, V) for the token after idx, which continues what the cache
    has seen. Raises ValueError for heads that do not divide the width, a number of layers that is not a multiple of 4,
    stages that are not two numbers, and a text longer than block_size."""

    ahead = 1  # row i of the logits scores token i + ahead
    likelihood = True  # of the text: the loss has a meaning in bits per byte

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_embd % cfg.n_head:
            raise ValueError(f"n_embd {cfg.n_embd} is not a multiple of n_head {cfg.n_head}")
        if cfg.n_layer % 4 or cfg.stage not in (1, 2, 3):
            raise ValueError(f"n_layer {cfg.n_layer} must be a multiple of 4, and stage {cfg.stage} be 1, 2 or 3")
        if not re.fullmatch(r"[\d.]+,[\d.]+", cfg.stages):
            raise ValueError(f"stages {cfg.stages!r} must be two fractions of the run, like 0.05,0.15")
        self.cfg = cfg
        padded = math.ceil(cfg.vocab_size / 64) * 64  # for faster matmuls; padded logits are sliced off
        self.wte = nn.Embedding(padded, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer // 2 ** (3 - cfg.stage)))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, padded, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if "lora" in name:  # LoRALinear has set these
                continue
            if p.dim() == 2:  # residual projections are scaled by 1 / sqrt(2 n_layer): that many are added up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        T, past = idx.size(1), cache.length if cache is not None else 0
        if past + T > self.cfg.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size {self.cfg.block_size}")
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(past, past + T, device=idx.device)))  # (B, T, C)
        for layer in range(self.cfg.n_layer):
            block = self.h[layer * len(self.h) // self.cfg.n_layer]  # consecutive layers share it
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
            x = x[:, -self.ahead :]
        x = self.ln_f(x)
        if targets is not None:
            return linear_cross_entropy(x, self.lm_head.weight, targets, self.cfg.vocab_size)
        return self.lm_head(x)[..., : self.cfg.vocab_size]  # (B, T, V)

    def new_cache(self, batch_size):
        return Cache(self.cfg, batch_size, self.wte.weight)


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


def unrolled(blocks, n):
    """State dict of n blocks that compute what these compute: each is copied n / len(blocks) times, B A added to W."""
    state = {}
    for i in range(n):
        block = blocks[i * len(blocks) // n]
        state |= {f"{i}.{k}": v for k, v in block.state_dict().items() if "lora" not in k}
        state |= {f"{i}.attn.{k}.weight": getattr(block.attn, k).matrix().detach() for k in ("c_attn", "c_proj")}
    return state


def diverge(model, optimizer, cfg):
    """Moves to the next stage, in place: each block becomes two equal ones, and B A is added to W and starts anew. Adam
    keeps the moments of the parameters that are still trained, and copies of them for their copies."""
    old, blocks = {k: p for k, p in model.named_parameters() if "lora" not in k}, model.h
    cfg.stage += 1
    torch.manual_seed(cfg.seed + cfg.stage)  # a run that is resumed before this switch draws the same lora_a
    model.h = nn.ModuleList(Block(cfg) for _ in range(2 * len(blocks))).to(model.wte.weight.device)
    model.h.load_state_dict(unrolled(blocks, len(model.h)), strict=False)  # all but the new A and B
    fresh = configure_optimizer(model, cfg)
    for name, p in model.named_parameters():
        origin = old.get(re.sub(r"^h\.(\d+)", lambda m: f"h.{int(m[1]) // 2}", name))
        if p.requires_grad and origin in optimizer.state:
            fresh.state[p] = {k: v.clone() for k, v in optimizer.state[origin].items()}
    optimizer.param_groups, optimizer.state = fresh.param_groups, fresh.state


def export(model, cfg, step):
    """Writes the model, of whatever stage, as a checkpoint of gpt2.py without optimizer state."""
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("h.")}
    weights |= {f"h.{k}": v for k, v in unrolled(model.h, cfg.n_layer).items()}
    own = ("stage", "lora_rank", "lora_alpha", "stages", "export")  # the fields that gpt2.py does not have
    config = {k: v for k, v in asdict(cfg).items() if k not in own}
    state = dict(model_file="gpt2.py", config=config, tokenizer=open_data(cfg.data)[1], model=weights, step=step)
    state |= dict(tokens=step * cfg.batch_size * cfg.block_size, best=math.inf, seconds=0.0, optimizer={"state": {}})
    write_atomically(Path(cfg.export), lambda f: torch.save(state, f))


def grow(model, optimizer, cfg, step):
    """Called before each step and after the last, in every process; returns True if it changed the network."""
    print0 = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    if cfg.export and step >= cfg.max_steps:
        export(model, cfg, step)
        print0(f"{cfg.export} holds the finished model as a checkpoint of gpt2.py")
    due = sum(step >= round(float(part) * cfg.max_steps) for part in cfg.stages.split(","))  # switches up to now
    if step >= cfg.max_steps or due < cfg.stage:
        return False
    meta, _, splits = open_data(cfg.data)
    tokens = splits.get("val", splits["train"])[: 2**13]
    before = evaluate(model, tokens, meta["eot"], nullcontext())  # without autocast: it must not change at all
    diverge(model, optimizer, cfg)
    after, n = evaluate(model, tokens, meta["eot"], nullcontext()), len(model.h)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"step {step:,}: from {n // 2} to {n} blocks, {total:,} parameters, {trained:,} of them trained, "
           f"evaluation loss {before:.6f} -> {after:.6f}")  # fmt: skip
    return True


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
