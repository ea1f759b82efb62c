"""Generates text from a checkpoint of any model file with one of five decoding methods. A cache makes a new token cost
the work of one token, not of the whole text.

    python sample.py --ckpt out/gpt2/ckpt.pt --prompt "def main("        nucleus sampling, printed token by token
    python sample.py --ckpt out/gpt2/ckpt.pt --decode all                one sample of each decoder, with tokens/s
    python sample.py --ckpt out/gpt2/ckpt.pt --num-samples 8 --top-k 40  eight samples of a prompt as one batch
    python sample.py --ckpt out/masked/ckpt.pt --prompt "for <blank> in"  fills blanks: see scratch_former.py

    logits of the next token (B, V)
       |                    greedy takes the most probable token
       | / temperature      sharper below 1, flatter above
       | top-k              only the k most probable tokens (Fan et al. 2018, section 5)
       | nucleus            only the fewest tokens whose probabilities reach p (Holtzman et al. 2020, section 3.1)
       v
    softmax, draw one       beam search instead keeps the `beam_width` most probable hypotheses
"""

import argparse
import codecs
import functools
import importlib
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2 import choose_device, read_checkpoint  # the same code in every model file
from prepare_data import load_tokenizer

DRAWING = ("top-k", "temperature", "nucleus")
DECODERS = ("greedy", "beam", *DRAWING)
OPTIONS = dict.fromkeys(("temperature", "top_k", "top_p", "num_samples", "seed"), DRAWING)  # the decoders that use it
OPTIONS |= dict.fromkeys(("beam_width", "length_penalty"), ("beam",))
BLANK = "<blank>"  # in a prompt, what to fill in: a token, or a span of any length


def crop(idx, block_size, max_new_tokens):
    """Cuts prompts (B, T) that are longer than the window, to leave room for the new tokens, and says so on stderr."""
    keep = max(block_size - max_new_tokens, block_size - block_size // 4)  # three quarters of the window at least
    if idx.size(1) <= block_size:
        return idx
    print(f"(the prompt is too long: its first {idx.size(1) - keep:,} tokens are left out)", file=sys.stderr)
    return idx[:, -keep:]


class Context:
    """The tokens of a batch so far, (B, T), and the cache with which a new token costs the work of one token. It needs
    only model(idx, cache=cache), model.new_cache(batch_size), model.ahead, and model.cfg.block_size."""

    def __init__(self, model, tokens, use_cache=True):
        self.model, self.tokens, self.use_cache = model, tokens, use_cache
        self.start, self.cache = 0, None  # the window is tokens[:, start:]
        self.pending = torch.empty(len(tokens), 0, 0)  # (B, n, V), logits computed and not yet asked for

    def logits(self):
        """Logits of the next token, (B, V) in float32. One forward pass computes those of `model.ahead` tokens."""
        if self.pending.size(1) == 0:
            T, block_size = self.tokens.size(1), self.model.cfg.block_size
            if T - self.start > block_size:
                # What is cached depends on positions: slide by a quarter, then read the last three quarters again.
                self.start, self.cache = T - (block_size - block_size // 4), None
            window = self.tokens[:, self.start :]
            if self.cache is None or not self.use_cache:  # compute equal rows once, such as samples of one prompt
                distinct, rows = window.cpu().unique(dim=0, return_inverse=True)
                self.cache = self.model.new_cache(len(distinct))
                self.pending = self.model(distinct.to(window.device), cache=self.cache)[rows].float()
                self.cache.select(rows)
            else:
                self.pending = self.model(window[:, self.cache.length :], cache=self.cache).float()
        logits, self.pending = self.pending[:, 0], self.pending[:, 1:]
        return logits

    def select(self, rows):  # row i becomes what row rows[i] was
        self.tokens, self.pending = self.tokens[rows], self.pending[rows]
        self.cache.select(rows)


def choose(logits, decode, temperature, top_k, top_p, generator):
    """The next token, (B), by any decoder but beam search: logits (B, V)."""
    if decode in ("greedy", "beam") or temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # tiny temperatures must not give NaN
    ids = torch.arange(logits.size(-1), device=logits.device).expand_as(logits)
    top_k = 50 if decode == "top-k" and top_k is None else top_k
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))  # exactly k, also where logits are equal
    top_p = {"nucleus": 0.95}.get(decode, 1.0) if top_p is None else top_p
    # Nucleus without sorting: draw from all tokens. If those before the drawn one have a mass of top_p, it is outside
    # the nucleus, and so is all that is less probable: draw again from those before it.
    limit, weights = max(top_p, 1e-9) if top_p < 1 else math.inf, logits.softmax(-1)
    outside, drawn = torch.ones_like(ids[:, :1], dtype=torch.bool), 0  # (B, 1)
    while outside.any():
        cdf = weights.cumsum(-1)
        u = torch.rand(outside.shape, generator=generator, device=cdf.device)
        drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).where(outside, drawn)
        weight, token = weights.gather(1, drawn), ids.gather(1, drawn)
        before = (weights > weight) | ((weights == weight) & (ids < token))  # the order of a stable sort
        outside = (weights * before).sum(-1, keepdim=True) >= limit
        weights = weights.where(before | ~outside, 0)
    return token[:, 0]


def beam_search(model, idx, max_new_tokens, width, length_penalty, eot, use_cache):
    """The best hypothesis for each prompt of idx (B, T), of `width` kept at every step (Graves 2012, algorithm 1).

    score = sum of the log-probabilities / (generated length ** length_penalty), end of text counted. A hypothesis is
    finished at end of text, if it is among the `width` best, or at max_new_tokens. The search ends when no running
    hypothesis can still beat the best finished one."""
    B, T = idx.shape
    context = Context(model, idx.repeat_interleave(width, 0), use_cache)
    scores = torch.full((B, width), -math.inf, device=idx.device)  # summed log-probabilities of running hypotheses
    scores[:, 0] = 0.0  # the hypotheses of a prompt are equal at first: only one counts
    finished = [(-math.inf, idx[b, :0]) for b in range(B)]  # (score, tokens) of the best one of each prompt
    first_row = torch.arange(B, device=idx.device)[:, None] * width  # of each prompt's hypotheses in the batch
    for length in range(1, max_new_tokens + 1):
        logits = context.logits()  # (B * width, V)
        # Twice the width: even if the `width` best candidates all ended, `width` others remain.
        likely, tokens = logits.topk(min(2 * width, logits.size(-1)))  # of each hypothesis, then of each prompt
        logp = scores.view(-1, 1) + likely - logits.logsumexp(-1, keepdim=True)
        best, where = logp.view(B, -1).topk(2 * width)
        rows, tokens = first_row + where // likely.size(1), tokens.view(B, -1).gather(1, where)  # (B, 2 * width)
        last = length == max_new_tokens
        ends = torch.full_like(tokens, last, dtype=torch.bool) if eot is None or last else tokens == eot
        for b, k in (ends[:, :width] & best[:, :width].isfinite()).nonzero().tolist():
            score = best[b, k].item() / length**length_penalty
            if score > finished[b][0]:
                finished[b] = score, torch.cat([context.tokens[rows[b, k], T:], tokens[b, k, None]])
        scores, keep = best.masked_fill(ends, -math.inf).topk(width)
        reach = max_new_tokens if length_penalty > 0 else length  # the length at which a running hypothesis scores best
        if last or all(scores[b, 0].item() / reach**length_penalty <= finished[b][0] for b in range(B)):
            break
        context.select(rows.gather(1, keep).flatten())
        context.tokens = torch.cat([context.tokens, tokens.gather(1, keep).view(-1, 1)], dim=1)
    return torch.nn.utils.rnn.pad_sequence([tokens for _, tokens in finished], batch_first=True, padding_value=eot or 0)


@torch.no_grad()
def generate(
    model,
    idx,  # prompts (B, T), all of one length
    max_new_tokens,
    decode="greedy",  # or beam, top-k, temperature, nucleus
    temperature=1.0,  # the filters combine, in this order; temperature 0 is greedy
    top_k=None,  # if not given, 50 with decode="top-k"
    top_p=None,  # if not given, 0.95 with decode="nucleus"
    beam_width=4,  # hypotheses of beam search; 1 is greedy
    length_penalty=1.0,  # beam search divides scores by the generated length to this power
    eot=None,  # id of the end of text: a row ends there and is filled up with it
    generator=None,  # torch.Generator to draw with
    use_cache=True,
    callback=None,  # called with each new token (B) as soon as it is known; not with beam search
):
    """Continues the prompts; returns the new tokens (B, n), n <= max_new_tokens. Cuts long prompts as `crop` does, and
    puts the model in eval mode. Raises ValueError for arguments out of range."""
    if decode not in DECODERS:
        raise ValueError(f"decode {decode!r} is invalid: choose one of {', '.join(DECODERS)}")
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"idx has shape {tuple(idx.shape)}: expected (B, T), B prompts of T token ids each")
    few = min(max_new_tokens + 1, beam_width, 1 if top_k is None else top_k) < 1
    if few or not 0 <= temperature < math.inf or not 0 <= (top_p or 0) <= 1:
        raise ValueError("temperature and max_new_tokens must be >= 0, beam_width and top_k >= 1, top_p in [0, 1]")
    idx = crop(idx, model.cfg.block_size, max_new_tokens)
    model.eval()
    if decode == "beam" and beam_width > 1:
        return beam_search(model, idx, max_new_tokens, beam_width, length_penalty, eot, use_cache)
    context = Context(model, idx, use_cache)
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        token = choose(context.logits(), decode, temperature, top_k, top_p, generator)
        if eot is not None:
            token = token.masked_fill(ended, eot)
            ended = token == eot
        context.tokens = torch.cat([context.tokens, token[:, None]], dim=1)
        if callback:
            callback(token)
        if ended.all():
            break
    return context.tokens[:, idx.size(1) :]


@torch.no_grad()
def fill(model, idx, max_new_tokens=200, decode="greedy", temperature=1.0, top_k=None, top_p=None, **options):
    """Fills blanks with a network of scratch_former.py for masked tokens or spans. idx is (B, T), the id vocab_size
    for a blank, as many in each row; returns the B texts, lists of token ids. Masked tokens are chosen one after the
    other, the most certain first, so that the next ones see it; spans are written by `generate`, in one text, with its
    options. Raises ValueError for beam search of masked tokens, for no or too many blanks, and too long a text."""
    blank, block_size = model.cfg.vocab_size, model.cfg.block_size
    blanks = idx == blank
    n = int(blanks[0].sum())
    if n == 0 or (blanks.sum(1) != n).any():
        raise ValueError("idx has no blanks, or not as many in each row")
    if model.cfg.objective == "masked":
        if decode not in DECODERS or decode == "beam":
            raise ValueError(f"decode {decode!r} is invalid: masked tokens are chosen one at a time")
        model.eval()
        for _ in range(n):
            logits = model(idx).float()  # (B, T, V)
            certainty = logits.softmax(-1).amax(-1).masked_fill(idx != blank, -1)
            where = certainty.argmax(1, keepdim=True)  # (B, 1)
            logits = logits[torch.arange(len(idx), device=idx.device), where[:, 0]]
            token = choose(logits, decode, temperature, top_k, top_p, options.get("generator"))
            idx = idx.scatter(1, where, token[:, None])
        return idx.tolist()
    most = model.n_logits - blank - 1  # one sentinel ends the last span
    if n > most or idx.size(1) >= block_size:
        raise ValueError(f"{n} blanks in {idx.size(1)} tokens: at most {most} in {block_size - 1} can be filled")
    source = F.pad(idx.where(~blanks, blank - 1 + blanks.cumsum(1)), (0, 1), value=blank)  # a sentinel for each blank
    room = min(max_new_tokens, block_size - idx.size(1) - 1)
    new = generate(model, source, room, decode, temperature, top_k, top_p, eot=blank + n, **options)
    filled = []
    for prompt, row in zip(idx.tolist(), new.tolist()):
        spans = [[]]
        for token in row:  # a sentinel ends each span
            spans[-1].append(token) if token < blank else spans.append([])
        filled.append([t for token in prompt for t in ((spans or [[]]).pop(0) if token == blank else [token])])
    return filled


def few_rows(self, x):
    """What an nn.Linear computes on a CPU of one token in up to 32 texts, x (B, 1, C). There (W @ x.T).T can be three
    times as fast as x @ W.T, and two rows faster than one: in float32 without AMX, in bfloat16 with it."""
    B, T, _ = x.shape
    if T > 1 or B > 32 or (x.dtype == torch.bfloat16) != torch.cpu.get_capabilities().get("amx_bf16", False):
        return F.linear(x, self.weight, self.bias)
    y = (self.weight @ F.pad(x[:, 0], (0, 0, 0, B == 1)).T).T[:B, None]  # (B, 1, out)
    return y if self.bias is None else y + self.bias


def load(ckpt, device="cpu"):
    """(model, tokenizer) of a checkpoint: the Model of the file that wrote it, in eval mode, and a tiktoken.Encoding.
    Raises FileNotFoundError or ValueError if there is none, if it is damaged, or does not fit today's model file."""
    if Path(ckpt).is_dir():
        inside = [shlex.quote(str(path)) for path in Path(ckpt).glob("*.pt")]
        raise ValueError(f"{ckpt} is a folder. Checkpoints in it: {', '.join(sorted(inside)) or 'none'}")
    state = read_checkpoint(ckpt)
    try:
        module = importlib.import_module(Path(state["model_file"]).stem)
        model = module.Model(module.Config(**state["config"]))
        model.load_state_dict(state["model"])
        tokenizer = load_tokenizer(state["tokenizer"]["name"], state["tokenizer"]["ranks"])
    except Exception as e:  # a Config from another version fails in as many ways as it has fields
        raise ValueError(f"{ckpt} does not fit {state['model_file']}: {' '.join(str(e).split())[:300]}") from e
    for layer in model.modules() if torch.device(device).type == "cpu" else ():
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(few_rows, layer)
    return model.to(device).eval(), tokenizer


def printer(tokenizer, text):
    """Returns a function that prints `text` and then a token (1) a call, each character when it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(token):
        nonlocal text
        if token.item() != tokenizer.eot_token:
            text += decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
        print(text, end="", flush=True)
        text = ""

    return show


def run(args):
    """Prints the samples of the chosen decoders for every prompt, and their speed."""
    device, dtype = choose_device(args.device, args.dtype)
    model, tokenizer = load(args.ckpt, device)
    model.to(dtype)
    objective = getattr(model.cfg, "objective", "next")
    blank, fills = model.cfg.vocab_size, objective != "next"
    args.decode = args.decode or ("greedy" if fills else "nucleus")
    chosen = [d for d in DECODERS if (objective, d) != ("masked", "beam")] if args.decode == "all" else [args.decode]
    for name in OPTIONS.keys() & vars(args).keys():  # those that were given
        if not set(OPTIONS[name]) & set(chosen):
            option, users = f"--{name.replace('_', '-')}", ", ".join(OPTIONS[name])
            raise ValueError(f"{option} has no effect with --decode {args.decode}, only with {users}")
    generator = torch.Generator(device).manual_seed(getattr(args, "seed", 1337))
    if args.prompt_file is not None:
        args.prompt = Path(args.prompt_file).read_text(encoding="utf-8")
    elif args.prompt is None and not sys.stdin.isatty():
        args.prompt = sys.stdin.read()
    eot, session = tokenizer.eot_token, iter(lambda: input("prompt (Ctrl-D ends)> "), None)
    for prompt in session if args.prompt is None else [args.prompt]:
        if fills != (BLANK in prompt):
            does = "fills blanks: the prompt needs a" if fills else "continues a text: it cannot fill a"
            raise ValueError(f"{args.ckpt} {does} {BLANK}")
        if fills and tokenizer.n_vocab > 257:  # a space belongs to the token after it, unless tokens are bytes
            prompt = prompt.replace(f" {BLANK}", BLANK)
        parts = [tokenizer.encode_ordinary(part) for part in prompt.split(BLANK)]  # special tokens are plain text
        ids = parts[0] + [i for part in parts[1:] for i in (blank, *part)]
        idx = torch.tensor([ids or [eot]], device=device)
        idx = idx if fills else crop(idx, model.cfg.block_size, args.max_new_tokens)
        for decode in chosen:
            options = {name: value for name, value in vars(args).items() if decode in OPTIONS.get(name, ())}
            n_samples, _ = options.pop("num_samples", 1), options.pop("seed", None)
            if decode == "temperature":
                options.setdefault("temperature", 0.7)
            streams = n_samples == 1 and decode != "beam" and not fills
            if args.decode == "all":
                print(f"--- {decode} ---")
            options |= dict(generator=generator, use_cache=not args.no_cache)
            start = time.perf_counter()
            if fills:
                rows = fill(model, idx.expand(n_samples, -1), args.max_new_tokens, decode, **options)
            else:
                options |= dict(eot=eot, callback=printer(tokenizer, prompt) if streams else None)
                new = generate(model, idx.expand(n_samples, -1), args.max_new_tokens, decode, **options)
                rows = [ids + (row[: row.index(eot)] if eot in row else row) for row in new.tolist()]
            for i, row in enumerate(rows):
                text = tokenizer.decode([token for token in row if token != eot], errors="replace")
                print("" if streams else f"[{i + 1}] " * (n_samples > 1) + text, flush=True)
            n = sum(len(row) - len(ids) + ids.count(blank) for row in rows)
            file = sys.stdout if args.decode == "all" else sys.stderr
            print(f"({n} tokens, {n / (time.perf_counter() - start):,.1f} tokens/s)\n", file=file, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser("sample.py", description=__doc__, argument_default=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: sys.exit(f"sample.py: {message} (--help lists all options)")
    add = parser.add_argument
    add("--ckpt", default="out/gpt2/ckpt.pt", help="checkpoint of any model file (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default=None, help=f"text to continue, or with {BLANK} to fill (default: stdin)")
    source.add_argument("--prompt-file", default=None, help="UTF-8 text file that holds the prompt")
    add("--decode", choices=(*DECODERS, "all"), default=None, help="(default: nucleus; greedy for blanks)")
    add("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    add("--num-samples", type=int, help="samples of one prompt, drawn as one batch (default: 1)")
    add("--temperature", type=float, help="(default: 0.7 with --decode temperature, 1 with top-k and nucleus)")
    add("--top-k", type=int, help="tokens to keep (default: 50 with --decode top-k, otherwise all)")
    add("--top-p", type=float, help="probability to keep (default: 0.95 with --decode nucleus, otherwise 1)")
    add("--beam-width", type=int, help="hypotheses of beam search (default: 4)")
    add("--length-penalty", type=float, help="beam search divides by length to this power (default: 1)")
    add("--seed", type=int, help="of everything drawn until sample.py ends (default: 1337)")
    add("--no-cache", action="store_true", default=False, help="compute all again for every token: same text, slower")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: a CUDA GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where it is fast")
    args = parser.parse_args(argv)
    try:
        run(args)
    except EOFError:
        print()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `sample.py | head`; without this line Python complains again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError:
        sys.exit(f"sample.py: {args.prompt_file or 'standard input'} is not UTF-8 text")
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"sample.py: {e}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of the vocabulary
    main()
