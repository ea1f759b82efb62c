"""Continues a text with a checkpoint of any model file, by one of five methods, or fills in blanks.

    python sample.py                                     asks for prompts
    python sample.py --prompt "def main("                prints the text token by token
    python sample.py --decode all --prompt "import"      by each of the methods, with its speed
    python sample.py --num-samples 8 --prompt "class"    eight texts, computed as one batch
    python sample.py --ckpt out/masked/ckpt.pt --prompt "for <blank> in"

Without --ckpt, it takes the newest checkpoint under out/. Blanks: see scratch_former.py.

    tokens so far (B, T)
    |    the network              with a cache, it reads new tokens only
    v
    logits of the next token (B, V)
    |    / temperature            sharper below 1, flatter above 1
    |    top-k                    only the k most probable tokens (Fan et al. 2018, section 5)
    |    nucleus, or top-p        only the most probable tokens, as few as reach the probability p
    |                             together (Holtzman et al. 2020, section 3.1)
    |    softmax, draw one
    v
    next token (B)

Temperature, top-k and nucleus are three filters, and they combine. --decode with one of these names
only chooses defaults. The other two methods do not draw: greedy decoding takes the most probable
token, and beam search keeps the `beam_width` most probable texts at every step.
"""

import argparse
import codecs
import functools
import importlib
import math
import os
import sys
import time
from itertools import takewhile
from pathlib import Path

# As in the model files: on Linux, a waiting thread keeps its core busy, which is slow if another
# program is busy, too. With this setting, it sleeps after 1,000 tries.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F

import prepare_data
from gpt2 import UserError, choose_device, read_checkpoint  # the same code in every model file


@torch.no_grad()
def plain_generate(model, idx, max_new_tokens, temperature=1.0):
    """The whole idea, for a model in eval mode that predicts one token ahead. `generate` draws from
    the same distribution with decode="temperature", as long as the text fits in the window. What it
    adds: a cache, filters, two methods that do not draw, and the end of text."""
    for _ in range(max_new_tokens):
        window = idx[:, -model.cfg.block_size :]  # what the network can read
        logits = model(window)[:, -1]  # (B, V), of the next token
        probs = F.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(probs, 1)  # (B, 1), drawn
        idx = torch.cat([idx, token], dim=1)  # (B, T + 1)
    return idx


# Each decoder, and the filter that it sets if no other is given. (0.7 is for the command line: in
# `generate` a temperature that is not given is 1.)
DECODERS = {
    "greedy": {},
    "beam": {},
    "top-k": {"top_k": 50},
    "temperature": {"temperature": 0.7},
    "nucleus": {"top_p": 0.95},
}


# --- how a token is chosen


def choose(logits, decode, temperature=1.0, top_k=None, top_p=None, generator=None):
    """The next token, (B), from logits (B, V): temperature, top-k, nucleus, then a draw. It takes
    the most probable token if decode is greedy or beam, or if the temperature is 0."""
    if decode in ("greedy", "beam") or temperature == 0:
        return logits.argmax(-1)
    defaults = DECODERS[decode]
    if top_k is None:
        top_k = defaults.get("top_k")
    if top_p is None:
        top_p = defaults.get("top_p", math.inf)

    logits = logits / max(temperature, 1e-30)  # not less, or the logits become infinite
    V = logits.size(-1)
    ids = torch.arange(V, device=logits.device).expand_as(logits)  # (B, V)
    if top_k:  # 0: no filter
        logits, ids = logits.topk(min(top_k, V))  # (B, k): exactly k, also if logits are equal
    top_p = max(top_p, 1e-9)  # a top_p of 0 keeps the most probable token
    return draw_from_nucleus(logits.softmax(-1), ids, top_p, generator)


def draw_from_nucleus(probs, ids, top_p, generator):
    """Draws a token, (B), from the nucleus: the most probable tokens, as few as reach top_p.

    probs (B, K) are the probabilities of the tokens ids (B, K). In the textbook it is

        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)  # sort
        before = sorted_probs.cumsum(-1) - sorted_probs  # cumulate
        sorted_probs[before >= top_p] = 0  # cut
        drawn = torch.multinomial(sorted_probs, 1, generator=generator)  # draw
        token = ids.gather(1, order).gather(1, drawn)[:, 0]

    But sorting a large vocabulary takes longer than all other steps. So this function draws from
    all tokens. If the tokens that are more probable than the drawn one have reached top_p without
    it, then the drawn token is outside the nucleus, and so are all less probable tokens. In this
    case it draws again, from the more probable tokens. The last draw is from the nucleus.
    """
    outside = torch.ones_like(ids[:, :1], dtype=torch.bool)  # (B, 1): the rows that have to draw
    drawn = torch.zeros_like(ids[:, :1])  # (B, 1), positions in ids
    while outside.any():
        # u is uniform: token i is drawn if u times the sum lies between cdf[i - 1] and cdf[i].
        cdf = probs.cumsum(-1)
        u = torch.rand(outside.shape, generator=generator, device=cdf.device)
        new = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        drawn = torch.where(outside, new, drawn)
        prob = probs.gather(1, drawn)
        token = ids.gather(1, drawn)
        # Of equally probable tokens, the one with the lower id comes first.
        before = (probs > prob) | ((probs == prob) & (ids < token))  # (B, K)
        outside = (probs * before).sum(-1, keepdim=True) >= top_p
        probs = probs.masked_fill(outside & ~before, 0)
    return token[:, 0]


# --- how a text is continued


def crop(idx, block_size, max_new_tokens):
    """Prompts (B, T) without their first tokens, if they do not fit in the network's window. Leaves
    room for the new tokens, but at most a quarter of the window. Says so on stderr."""
    T = idx.size(1)
    if T <= block_size:
        return idx
    keep = block_size - min(max_new_tokens, block_size // 4)
    print(f"(the prompt is too long: its first {T - keep:,} tokens are left out)", file=sys.stderr)
    return idx[:, -keep:]


class Context:
    """The tokens of B texts so far, (B, T), and the cache with which the network reads only what is
    new. It works for any model with cfg.block_size, new_cache and model(idx, cache=cache)."""

    def __init__(self, model, tokens, use_cache):
        self.model = model
        self.tokens = tokens
        self.use_cache = use_cache
        self.cache = None
        self.start = 0  # the window of the network is tokens[:, start:]
        self.pending = []  # logits, (B, V) each, that were computed and not yet asked for

    def append(self, token):
        """Adds a token (B) to each text."""
        self.tokens = torch.cat([self.tokens, token[:, None]], dim=1)

    def select(self, rows):
        """Text i becomes what text rows[i] was."""
        self.tokens = self.tokens[rows]
        self.pending = [logits[rows] for logits in self.pending]
        self.cache.select(rows)

    def logits(self):
        """Logits of the next token, (B, V) in float32."""
        if not self.pending:
            self.pending = list(self.read().float().unbind(1))
        return self.pending.pop(0)

    def read(self):
        """Logits of the next `model.ahead` tokens, (B, ahead, V)."""
        T = self.tokens.size(1)
        block_size = self.model.cfg.block_size
        if T - self.start > block_size:
            # The window slides by a quarter. What is cached depends on the positions of tokens in
            # the window, so the last three quarters are read again.
            self.start = T - (block_size - block_size // 4)
            self.cache = None
        window = self.tokens[:, self.start :]
        if self.cache is not None and self.use_cache:
            return self.model(window[:, self.cache.length :], cache=self.cache)
        # Equal texts are read once. At first, all samples of a prompt are equal, and all of a beam.
        distinct, rows = window.cpu().unique(dim=0, return_inverse=True)
        self.cache = self.model.new_cache(len(distinct))
        logits = self.model(distinct.to(window.device), cache=self.cache)
        self.cache.select(rows)
        return logits[rows]


@torch.no_grad()
def generate(
    model,
    idx,  # prompts (B, T), all of one length
    max_new_tokens,
    decode="greedy",  # or beam, top-k, temperature, nucleus
    temperature=1.0,  # the filters combine, in this order; temperature 0 is greedy
    top_k=None,  # if not given, 50 with decode="top-k"; 0: no filter
    top_p=None,  # if not given, 0.95 with decode="nucleus"
    beam_width=4,  # hypotheses of beam search; 1 is greedy
    length_penalty=1.0,  # beam search divides scores by the generated length to this power
    eot=None,  # id of the end of text: a row ends there and is filled up with it
    generator=None,  # torch.Generator to draw with
    use_cache=True,
    callback=None,  # called with each new token (B) as soon as it is known; not with beam search
):
    """Continues prompts. Returns the new tokens (B, n), n <= max_new_tokens, without the prompts.
    Cuts long prompts, as `crop` says, and puts the model into eval mode. Raises TypeError for
    prompts of another kind, and UserError, a ValueError, for an unknown decoder, and for a filter
    or a beam_width that is out of range."""
    if not torch.is_tensor(idx) or idx.dtype != torch.long or idx.dim() != 2 or 0 in idx.shape:
        raise TypeError("needs idx (B, T), a LongTensor: torch.tensor([tokenizer.encode(text)])")
    if decode not in DECODERS:
        raise UserError(f"decode {decode!r} is invalid: choose one of {', '.join(DECODERS)}")
    filters = dict(temperature=temperature, top_k=top_k or 0, top_p=top_p or 0)
    check_options(filters | {"beam_width": beam_width}, DECODERS)
    if eot is None:
        eot = -1  # which no token is
    idx = crop(idx, model.cfg.block_size, max_new_tokens)
    model.eval()
    if decode == "beam" and beam_width > 1:
        return beam_search(model, idx, max_new_tokens, beam_width, length_penalty, eot, use_cache)
    context = Context(model, idx, use_cache)
    ended = torch.zeros_like(idx[:, 0], dtype=torch.bool)  # (B)
    for _ in range(max_new_tokens):
        token = choose(context.logits(), decode, temperature, top_k, top_p, generator)  # (B)
        token = token.masked_fill(ended, eot)
        ended = token == eot
        context.append(token)
        if callback:
            callback(token)
        if ended.all():
            break
    return context.tokens[:, idx.size(1) :]


def beam_search(model, idx, max_new_tokens, width, length_penalty, eot, use_cache):
    """The best hypothesis for each prompt of idx (B, T) (Graves 2012, algorithm 1). A hypothesis is
    a text of which the log-probability is known. At every step, `width` are kept.

    score = log-probability / (generated length ** length_penalty), where end of text counts. A
    hypothesis is finished at end of text, if it is one of the `width` best, or at max_new_tokens.
    """
    B, T = idx.shape
    context = Context(model, idx.repeat_interleave(width, 0), use_cache)  # B * width texts
    first_row = torch.arange(B, device=idx.device)[:, None] * width  # (B, 1), of each prompt
    logp = torch.full((B, width), -math.inf, device=idx.device)  # of the hypotheses
    logp[:, 0] = 0.0  # at first the hypotheses of a prompt are equal: only one counts
    best_score = [-math.inf] * B  # of the finished hypotheses
    best_tokens = list(idx[:, :0])  # B texts without tokens

    for length in range(1, max_new_tokens + 1):
        # The candidates: of each hypothesis, then of each prompt, the 2 width best. Even if
        # `width` of them end, `width` remain. Choosing within each hypothesis first is faster.
        logits = context.logits()  # (B * width, V)
        likely, ids = logits.topk(min(2 * width, logits.size(-1)))  # (B * width, k)
        # The log-probability of a longer text is the sum of those of its tokens.
        longer = logp.view(-1, 1) + likely - logits.logsumexp(-1, keepdim=True)
        candidates, place = longer.view(B, -1).topk(2 * width)  # (B, 2 width), the best first
        rows = first_row + place // likely.size(1)  # the hypotheses that they continue
        tokens = ids.view(B, -1).gather(1, place)

        # Which of them are finished?
        ends = (tokens == eot) | (length == max_new_tokens)  # (B, 2 width)
        for b, i in ends[:, :width].nonzero().tolist():
            score = candidates[b, i].item() / length**length_penalty
            if score > best_score[b]:
                best_score[b] = score
                best_tokens[b] = torch.cat([context.tokens[rows[b, i], T:], tokens[b, i, None]])

        # The best of all that go on. Its log-probability is negative and can only fall. So the best
        # score that it can reach has this log-probability, and the greatest length. With a penalty
        # <= 0, it has the present length.
        logp, keep = candidates.masked_fill(ends, -math.inf).topk(width)
        reach = max_new_tokens if length_penalty > 0 else length
        if all(logp[b, 0].item() / reach**length_penalty <= best_score[b] for b in range(B)):
            break
        context.select(rows.gather(1, keep).flatten())
        context.append(tokens.gather(1, keep).flatten())
    return torch.nn.utils.rnn.pad_sequence(best_tokens, batch_first=True, padding_value=eot)


# --- how blanks are filled in, by a network of scratch_former.py

BLANK = "<blank>"  # in a prompt: one token (masked), or a text of any length (spans)


def fill(model, idx, max_new_tokens=200, decode="greedy", **options):
    """Fills in the blanks of texts idx (B, T): the ids vocab_size, equally many in each text.
    Returns B lists of token ids. The options are those of `generate` but eot, and for masked tokens
    only those that choose a token. A text and the spans for it share block_size tokens: spans that
    do not fit are cut. Raises UserError if there are no blanks, or too many, if a text is too long,
    and for beam search of masked tokens.
    """
    texts = fill_parts(model, idx, max_new_tokens, decode, **options)
    return [[token for part in parts for token in part] for parts in texts]


@torch.no_grad()
def fill_parts(model, idx, max_new_tokens, decode, **options):
    """Like `fill`, but each text is a list of parts, which are lists of token ids: what stands
    before the first blank, what fills it, what stands between it and the second blank, ..."""
    blank = model.cfg.vocab_size
    n = (idx == blank).sum(1).tolist()  # (B), the numbers of blanks
    if n[0] == 0 or len(set(n)) > 1:
        raise UserError("idx has no blanks, or not as many in each row")
    longest = model.cfg.block_size - (model.cfg.objective == "spans")  # 1 less, for a sentinel
    if idx.size(1) > longest:
        raise UserError(f"a text with blanks has {idx.size(1)} tokens: at most {longest} fit")
    if model.cfg.objective == "masked":
        written = fill_masked(model, idx, decode, **options)
    else:
        written = fill_spans(model, idx, n[0], max_new_tokens, decode, **options)
    filled = []
    for text, new in zip(idx.tolist(), written.tolist()):
        # By turns: what stands in the text up to a blank, and what was written up to a sentinel.
        # takewhile also consumes the token that it stops at. The last turn of `new` fills no blank.
        turns = (iter(text), iter(new)) * (n[0] + 1)
        parts = [list(takewhile(lambda token: token < blank, tokens)) for tokens in turns]
        filled.append(parts[:-1])
    return filled


def fill_masked(model, idx, decode, use_cache=True, **options):
    """The tokens for the n blanks of each text, each followed by the id of a blank, (B, 2 n).

    One blank of a text is filled at a time: that of which the network is most certain, so that it
    helps with the rest. There is no cache, as an encoder reads the whole text each time."""
    if decode == "beam":
        raise UserError(f"decode {decode!r} is invalid: masked tokens are chosen one at a time")
    model.eval()
    blank = model.cfg.vocab_size
    texts = torch.arange(len(idx), device=idx.device)  # (B)
    new = idx.clone()
    while (new == blank).any():
        logits = model(new).float()  # (B, T, V)
        certainty = logits.softmax(-1).amax(-1)  # (B, T), the highest probability of a token
        where = certainty.masked_fill(new != blank, -1).argmax(1)  # (B), a blank of each text
        new[texts, where] = choose(logits[texts, where], decode, **options)
    written = new[idx == blank].view(len(idx), -1, 1)  # (B, n, 1)
    return F.pad(written, (0, 1), value=blank).flatten(1)


def fill_spans(model, idx, n, max_new_tokens, decode, **options):
    """The spans for the n blanks of each text, each followed by a sentinel, (B, T). The encoder
    reads a sentinel for each blank, and the decoder writes what belongs there. An example:

        idx             for _ in _ :
        encoder reads   for <0> in <1> :
        decoder writes  <0> i <1> range ( 9 ) <2>       <0> is given, <2> ends the text
    """
    blank = model.cfg.vocab_size  # also the id of the first sentinel
    most = model.n_logits - blank - 1  # one sentinel ends the text
    if n > most:
        raise UserError(f"{n} blanks: at most {most} can be filled")
    number = (idx == blank).cumsum(1) - 1  # (B, T): at a blank, how many come before it
    source = torch.where(idx == blank, blank + number, idx)
    prompt = F.pad(source, (0, 1), value=blank)
    room = min(max_new_tokens, model.cfg.block_size - prompt.size(1))
    return generate(model, prompt, room, decode, eot=blank + n, **options)


# --- checkpoints


def find_checkpoint(path):
    """The checkpoint `path` or, if it is None, the newest one under out/."""
    found = sorted(Path("out").rglob("*.pt"), key=os.path.getmtime, reverse=True)
    if path is None and found:
        print(f"(the newest checkpoint: {found[0]})", file=sys.stderr)
        return found[0]
    if path is None or not Path(path).is_file():
        there = ", ".join(map(str, found[:5])) or "none: python gpt2.py --preset demo writes one"
        raise UserError(f"{path or 'out'}: no checkpoint. There are {there}")
    return path


def load(ckpt, device="cpu"):
    """(model, tokenizer) of a checkpoint: the Model of the file that wrote it, in eval mode, and a
    tiktoken.Encoding. Raises OSError if there is no such file, and UserError if it is damaged, no
    checkpoint, or does not fit today's model file."""
    state = read_checkpoint(ckpt)
    name = state["model_file"]
    # Whatever stands in a checkpoint, nothing but a model file beside this file is imported.
    files = [
        path.name
        for path in Path(__file__).parent.glob("*.py")
        if "\n# --- training" in path.read_text("utf-8")
    ]
    if name not in files:
        raise UserError(f"{ckpt} is of {name}, which is none of {', '.join(sorted(files))}")
    module = importlib.import_module(name.removesuffix(".py"))
    try:
        cfg = module.Config(**state["config"])
    except TypeError as e:
        raise UserError(f"{ckpt} does not fit {name}: {e}") from e
    model = module.Model(cfg)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise UserError(f"{ckpt} does not fit {name}: {e!r:.300}") from e
    saved = state["tokenizer"]
    tokenizer = prepare_data.load_tokenizer(saved["name"], saved["ranks"])
    return model.to(device).eval(), tokenizer


def few_rows(layer, x):
    """What an nn.Linear computes, (B, T, out), of x (B, T, C). For one token in each of up to 32
    texts, (W @ x.T).T can be three times as fast as x @ W.T, and two texts faster than one."""
    B, T, _ = x.shape
    if T > 1 or B > 32:
        return F.linear(x, layer.weight, layer.bias)
    rows = F.pad(x[:, 0], (0, 0, 0, B == 1))  # (B, C); a single row gets a row of zeros
    y = (layer.weight @ rows.T).T[:B, None]  # (B, 1, out)
    return y if layer.bias is None else y + layer.bias


def use_few_rows(model):
    """Makes the linear layers of a model on a CPU compute by `few_rows`, if that is faster for the
    dtype of its weights: in float32 without AMX, in bfloat16 with it (results/speed.md)."""
    amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and (layer.weight.dtype == torch.bfloat16) == amx:
            layer.forward = functools.partial(few_rows, layer)


# --- the command line

DRAWING = ("top-k", "temperature", "nucleus")
OPTIONS = {  # name: (type, least value, largest value, the decoders that use it, help)
    "max_new_tokens": (int, 1, 1_000_000, DECODERS, "tokens to add (default: 200)"),
    "num_samples": (int, 1, 1_000_000, DRAWING, "texts from one prompt, as one batch (default: 1)"),
    "seed": (int, 0, 2**63, DRAWING, "of all random draws of this run (default: 1337)"),
    "temperature": (float, 0, 1000, DRAWING, "(default: 0.7 with --decode temperature, else 1)"),
    "top_k": (int, 0, 1_000_000, DRAWING, "tokens kept, 0: all (default: 50 with top-k, else 0)"),
    "top_p": (float, 0, 1, DRAWING, "probability kept (default: 0.95 with nucleus, else 1)"),
    "beam_width": (int, 1, 10_000, ("beam",), "hypotheses of beam search (default: 4)"),
    "length_penalty": (float, -10, 10, ("beam",), "power of the length (default: 1)"),
}


def check_options(options, decoders):
    """Raises UserError for an option, {name: value}, that is out of its range, or that none of
    `decoders` uses."""
    for name, value in options.items():
        _, least, largest, users, _ = OPTIONS[name]
        option = f"--{name.replace('_', '-')}"
        if not least <= value <= largest:
            raise UserError(f"{option} {value}: {name} goes from {least:,} to {largest:,}")
        if set(users).isdisjoint(decoders):
            raise UserError(
                f"{option} has no effect with --decode {', '.join(decoders)}, "
                f"only with {', '.join(users)}"
            )


def read_prompt(args):
    """The prompt from the command line, a file or a pipe. None: the user is to be asked."""
    if args.prompt is not None:
        return args.prompt
    try:
        if args.prompt_file is not None:
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
        elif sys.stdin.isatty():
            return None
        else:
            text = sys.stdin.read()
    except UnicodeDecodeError as e:
        raise UserError(f"{args.prompt_file or 'standard input'} is not UTF-8 text") from e
    return text.replace("\r\n", "\n").removesuffix("\n")


def encode(prompt, tokenizer, blank):
    """The token ids of a prompt, a list, with the id `blank` for each <blank>. Special tokens are
    plain text."""
    if tokenizer.name != "bytes":  # a space is part of the token after it, which fills the blank
        prompt = prompt.replace(f" {BLANK}", BLANK)
    ids = []
    for part in prompt.split(BLANK):
        ids += prepare_data.encode(tokenizer, part)
        ids.append(blank)
    return ids[:-1]


def printer(tokenizer):
    """A function that prints a token (1), each character as soon as it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(token):
        if token.item() != tokenizer.eot_token:
            data = tokenizer.decode_single_token_bytes(token.item())
            print(decoder.decode(data), end="", flush=True)

    return show


def answer(model, tokenizer, decoders, n_samples, options, prompt):
    """Prints what each of the decoders makes of a prompt, and its speed."""
    eot = tokenizer.eot_token
    fills = not model.likelihood  # else it continues a text
    if fills != (BLANK in prompt):
        raise UserError(f"{BLANK} has to be in a prompt if the network fills blanks, and only then")
    ids = encode(prompt, tokenizer, model.cfg.vocab_size)
    idx = torch.tensor([ids or [eot]], device=options["generator"].device)  # (1, T)
    if not fills:
        idx = crop(idx, model.cfg.block_size, options["max_new_tokens"])

    for decode in decoders:
        if len(decoders) > 1:
            print(f"--- {decode} ---")
        B = n_samples if decode in DRAWING else 1
        streams = B == 1 and decode != "beam" and not fills  # printed token by token
        more = DECODERS[decode] | options
        note = ""
        prompts = idx.expand(B, -1)  # (B, T)
        start = time.perf_counter()
        if fills:
            texts = fill_parts(model, prompts, decode=decode, **more)
        else:
            if streams:
                print(prompt, end="", flush=True)
                more["callback"] = printer(tokenizer)
            new = generate(model, prompts, decode=decode, eot=eot, **more)  # (B, n)
            # In parts, as `fill_parts` gives them. A row that has ended is filled up with `eot`.
            texts = [[ids, [token for token in row if token != eot]] for row in new.tolist()]
            if new.size(1) < more["max_new_tokens"]:
                note = ", end of text"
        seconds = time.perf_counter() - start

        for i, parts in enumerate(texts):
            data = [tokenizer.decode_bytes(part) for part in parts]
            if fills and sys.stdout.isatty():  # underlined
                data[1::2] = [b"\033[4m" + part + b"\033[24m" for part in data[1::2]]
            text = "" if streams else b"".join(data).decode(errors="replace")
            if B > 1:
                text = f"[{i + 1}] {text}"
            print(text, flush=True)
        n = sum(len(part) for parts in texts for part in parts[1::2])  # tokens that are new
        file = sys.stdout if len(decoders) > 1 else sys.stderr
        print(f"({n} tokens{note}, {n / seconds:,.1f} tokens/s)\n", file=file)


def run(args):
    """Answers the prompt that was given or, at a terminal, one prompt after another."""
    device, dtype = choose_device(args.device, args.dtype)
    model, tokenizer = load(find_checkpoint(args.ckpt), device)
    model.to(dtype)
    if device.type == "cpu":
        use_few_rows(model)

    decode = args.decode or ("nucleus" if model.likelihood else "greedy")
    decoders = [decode]
    if decode == "all":
        decoders = list(DECODERS)
        if not model.likelihood and model.cfg.objective == "masked":
            decoders.remove("beam")  # masked tokens are chosen one at a time
    options = {"max_new_tokens": 200}
    options |= {name: value for name, value in vars(args).items() if name in OPTIONS}
    check_options(options, decoders)
    options["generator"] = torch.Generator(device).manual_seed(options.pop("seed", 1337))
    options["use_cache"] = not args.no_cache
    n_samples = options.pop("num_samples", 1)

    reply = functools.partial(answer, model, tokenizer, decoders, n_samples, options)
    prompt = read_prompt(args)
    if prompt is not None:
        reply(prompt)
        return
    try:
        import readline  # noqa: F401  (with it, `input` can edit lines and has a history)
    except ImportError:
        pass
    while True:
        try:
            reply(input("prompt (Ctrl-D ends)> "))
        except UserError as e:
            print(e)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda text: sys.exit(f"sample.py: {text} (--help lists all options)")
    add = parser.add_argument
    add("--ckpt", help="a checkpoint (default: the newest under out/)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help=f"the text to continue, or to fill in at {BLANK}")
    source.add_argument("--prompt-file", help="a UTF-8 text file with the prompt")
    add("--decode", choices=(*DECODERS, "all"), help="(default: nucleus; greedy for blanks)")
    for name, (kind, *_, text) in OPTIONS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=text, default=argparse.SUPPRESS)
    add("--no-cache", action="store_true", help="read the whole text for each token: slower")
    add("--device", default="auto", help="cpu, cuda, mps; auto: a CUDA GPU if there is one")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of the weights; auto: a fast one")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except EOFError:  # Ctrl-D
        print()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)  # as in a shell
    except BrokenPipeError:  # as in `sample.py | head`; else Python complains when it exits
        os._exit(0)
    except (UserError, prepare_data.UserError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):  # a mistake in the code
            raise
        sys.exit(f"sample.py: {e}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of the vocabulary
    main()
