"""Text from a checkpoint of any model file here: greedy, beam, top-k, temperature and nucleus decoding.

    python sample.py --ckpt out/gpt2/ckpt.pt --prompt "def main("                  greedy, as it is made
    python sample.py --ckpt out/gpt2/ckpt.pt --decode all                          one sample of each decoder, tokens/s
    python sample.py --ckpt out/gpt2/ckpt.pt --decode nucleus --num-samples 8      a batch that shares its prompt

          logits of the next token
    --------------------------------------> greedy        the likeliest
       | / temperature      sharper below 1, flatter above
       | top-k              the k likeliest (Fan et al. 2018, section 5)
       | nucleus            the fewest that hold p of the mass (Holtzman et al. 2020, section 3.1)
       v
    softmax, draw one                                      beam, aside, keeps the `beam_width` likeliest texts

A model is asked for three things alone: model(idx), model(idx, cache=...) and model.new_cache(batch). The cache is
why a new token costs one token's work and not the whole text's; --no-cache takes it away, and the text stays.
"""

import argparse
import codecs
import importlib
import math
import os
import sys
import time
from pathlib import Path

import torch

from gpt2 import choose_device, read_checkpoint  # the same lines stand in every model file
from prepare_data import load_tokenizer

DECODERS = ("greedy", "beam", "top-k", "temperature", "nucleus")


class Context:
    """The tokens of a batch so far, (B, T), and what a model has read of them."""

    def __init__(self, model, tokens, use_cache=True):
        self.model, self.tokens, self.use_cache = model, tokens, use_cache
        self.block_size = model.cfg.block_size if hasattr(model, "cfg") else sys.maxsize  # no limit that we know of
        self.start, self.cache = 0, model.new_cache(len(tokens))  # the window is tokens[:, start:]

    def logits(self):
        """Of the next `model.ahead` tokens, (B, ahead, V) float32."""
        B, T = self.tokens.shape
        if T - self.start > self.block_size:
            # The window is full. Positions are part of what a cache holds, so it cannot slide by one token: read the
            # last half again in a new window, and the price is one such step in every block_size / 2.
            self.start, self.cache = T - max(1, self.block_size // 2), self.model.new_cache(B)
        window = self.tokens[:, self.start :]
        if not self.use_cache and window.size(1) >= self.model.ahead:
            logits = self.model(window)[:, -self.model.ahead :].float()
        else:
            if not self.use_cache:
                self.cache = self.model.new_cache(B)  # gives the logits after a text shorter than `ahead`, too
            logits = self.model(window[:, self.cache.length :], cache=self.cache).float()
        if logits.isnan().any():
            raise ValueError("the network's logits are not numbers: take a checkpoint from before its weights broke")
        return logits

    def append(self, new):
        self.tokens = torch.cat([self.tokens, new], dim=1)

    def select(self, rows):
        """Makes row i what row rows[i] was."""
        self.tokens = self.tokens[rows]
        self.cache.select(rows)


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """What is drawn from: logits (B, V) -> probabilities (B, V), zero where a filter took an id out."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kept, ids = logits.topk(top_k)  # exactly k, ties or not
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, kept)
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, ids = probs.topk(min(4096, probs.size(-1)))  # most texts need no more, and sorting all takes longer
        if ranked.sum(-1).min() < top_p:
            ranked, ids = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # mass of the likelier ones: the token that crosses p stays
        ranked[before >= top_p] = 0.0
        ranked[..., 0] = ranked[..., 0].clamp(min=torch.finfo(ranked.dtype).tiny)  # never less than one token
        probs = torch.zeros_like(probs).scatter(-1, ids, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs, generator=None):
    """An id from each row of probs (B, V) -> (B): where the cumulative sum passes a random height. One random number a
    row; torch.multinomial takes V of them."""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    height = 1 - torch.rand(len(probs), 1, generator=generator, dtype=torch.float64, device=probs.device)  # in (0, 1]
    return torch.searchsorted(cdf, height * cdf[:, -1:])[:, 0]


@torch.no_grad()
def stream(model, idx, max_new_tokens, decode, temperature, top_k, top_p, eot, generator, use_cache):
    """Yields the new tokens of the batch as they are made, (B, n) with n up to model.ahead."""
    alike = len(idx) > 1 and bool((idx == idx[0]).all())  # many samples of one prompt: read it once
    context = Context(model, idx[:1] if alike else idx, use_cache)
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    while max_new_tokens > 0 and not ended.all():
        logits = context.logits()
        if len(logits) < len(idx):
            context.select([0] * len(idx))
            logits = logits.expand(len(idx), -1, -1)
        columns = []
        for step in logits[:, :max_new_tokens].unbind(1):  # (B, V) each
            if decode == "greedy" or temperature == 0:
                token = step.argmax(-1)
            else:
                token = draw(probabilities(step, temperature, top_k, top_p), generator)
            if eot is not None:
                token = token.masked_fill(ended, eot)
                ended = ended | (token == eot)
            columns.append(token)
        new = torch.stack(columns, dim=1)
        if eot is not None and ended.all():  # within a block of several: no column after the last end
            new = new[:, : int((new == eot).int().argmax(1).max()) + 1]
        context.append(new)
        max_new_tokens -= new.size(1)
        yield new


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, width, length_penalty, eot, use_cache):
    """The best text that keeping the `width` likeliest beginnings at every step finds (Graves 2012, algorithm 1).

    score = sum of the log-probabilities / (generated length ** length_penalty), end of text counted. A text is done
    when it reaches end of text among the `width` best candidates, or max_new_tokens; the search is over when no
    running beam can still beat the best text that is done.
    """
    B, prompt, device = len(idx), idx.size(1), idx.device
    context = Context(model, idx, use_cache)
    scores = torch.full((B, width), -math.inf, device=device)  # of the running beams, accumulated
    scores[:, 0] = 0.0  # at first all beams of a prompt are the same: count one
    done = [(-math.inf, idx[b, :0]) for b in range(B)]  # (score, tokens) of the best text of each prompt
    first_row = torch.arange(B, device=device)[:, None] * width  # of each prompt's beams in the batch
    logits, column = context.logits(), 0
    context.select(torch.arange(B, device=device).repeat_interleave(width))
    logits = logits.repeat_interleave(width, 0)
    for length in range(1, max_new_tokens + 1):
        if column == logits.size(1):
            logits, column = context.logits(), 0
        logp = logits[:, column].log_softmax(-1)  # (B * width, V)
        V = logp.size(-1)
        # Twice the width: even if every best candidate ended, `width` others could go on.
        best, where = (scores[:, :, None] + logp.view(B, width, V)).flatten(1).topk(min(2 * width, width * V))
        rows, tokens = first_row + where // V, where % V  # (B, 2 * width): which beam, continued by what
        last = length == max_new_tokens
        ends = torch.full_like(tokens, last, dtype=torch.bool) if eot is None or last else tokens == eot
        for b, k in (ends[:, :width] & best[:, :width].isfinite()).nonzero().tolist():
            score = best[b, k].item() / length**length_penalty
            if score > done[b][0]:
                done[b] = score, torch.cat([context.tokens[rows[b, k], prompt:], tokens[b, k, None]])
        if last:
            break
        scores, keep = best.masked_fill(ends, -math.inf).topk(width)
        rows, tokens = rows.gather(1, keep).flatten(), tokens.gather(1, keep).flatten()
        context.select(rows)
        context.append(tokens[:, None])
        logits, column = logits[rows], column + 1
        reach = max_new_tokens if length_penalty > 0 else length  # the length at which a running beam scores best
        if all(scores[b, 0].item() / reach**length_penalty <= done[b][0] for b in range(B)):
            break
    best = [text for _, text in done]
    n = max(map(len, best))
    return torch.stack([torch.cat([text, text.new_full((n - len(text),), eot or 0)]) for text in best])


def generate(model, idx, max_new_tokens, decode="greedy", temperature=1.0, top_k=None, top_p=None, beam_width=4,
             length_penalty=1.0, eot=None, generator=None, use_cache=True):  # fmt: skip
    """Continues prompts idx (B, T), all of one length; returns the new tokens (B, n), n <= max_new_tokens. With `eot`,
    a row ends there and is filled up with it. An empty prompt (T = 0) starts from eot.

    decode: greedy, beam, top-k, temperature or nucleus. The last three draw with `generator` from
    probabilities(logits, temperature, top_k, top_p); top-k takes 50 and nucleus 0.95 if they are not given.
    Temperature 0 is greedy, and so is a beam of width 1. Raises ValueError for what makes no sense.
    """
    if decode not in DECODERS:
        raise ValueError(f"decode {decode!r} is none of {', '.join(DECODERS)}")
    few = beam_width < 1 or (top_k is not None and top_k < 1)
    if few or not temperature >= 0 or not 0 <= (top_p or 0) <= 1:
        raise ValueError("temperature must be >= 0, beam_width and top_k >= 1, top_p in [0, 1]")
    if idx.size(1) == 0:
        if eot is None:
            raise ValueError("an empty prompt needs eot to start from")
        idx = idx.new_full((len(idx), 1), eot)
    top_k = 50 if decode == "top-k" and top_k is None else top_k
    top_p = 0.95 if decode == "nucleus" and top_p is None else top_p
    training = model.training
    model.eval()
    try:
        if max_new_tokens < 1:
            return idx[:, :0]
        if decode == "beam" and beam_width > 1:
            return beam_search(model, idx, max_new_tokens, beam_width, length_penalty, eot, use_cache)
        decode = "greedy" if decode == "beam" else decode
        filters = temperature, top_k, top_p
        return torch.cat([*stream(model, idx, max_new_tokens, decode, *filters, eot, generator, use_cache)], dim=1)
    finally:
        model.train(training)


def load(ckpt, device="cpu"):
    """(model, tokenizer) of a checkpoint: the Model of the file that wrote it, ready to sample, and a
    tiktoken.Encoding. Exits with one line if that cannot be."""
    state = read_checkpoint(ckpt)
    source = Path(__file__).parent / Path(str(state["model_file"])).name
    if not source.is_file() or not source.stem.isidentifier():
        sys.exit(f"{ckpt}: written by {state['model_file']}, which is not here")
    try:
        module = importlib.import_module(source.stem)
        model = module.Model(module.Config(**state["config"]))
        model.load_state_dict(state["model"])
        tokenizer = load_tokenizer(state["tokenizer"]["name"], state["tokenizer"]["ranks"])
        if tokenizer.n_vocab != state["tokenizer"]["vocab_size"]:
            raise ValueError(f"its tokenizer has {tokenizer.n_vocab} ids, not {state['tokenizer']['vocab_size']}")
    except Exception as e:  # a hand-made Config fails in as many ways as there are
        sys.exit(f"{ckpt} does not fit {source.name} ({' '.join(str(e).split())[:200]})")
    return model.to(device).eval(), tokenizer


class Printer:
    """Prints tokens as text while they come. A character may span several tokens: it waits until it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids, final=False):
        data = b"".join(self.tokenizer.decode_single_token_bytes(i) for i in ids)
        print(self.decoder.decode(data, final), end="\n" if final else "", flush=True)


def show(model, tokenizer, prompt, decode, args):
    """Prints the samples of one decoder and how fast they were."""
    eot = tokenizer.eot_token
    device = next(model.parameters()).device
    ids = tokenizer.encode_ordinary(prompt) or [eot]  # special tokens in a prompt are text like any other
    n_samples = args.num_samples if decode in ("top-k", "temperature", "nucleus") else 1  # the others have one answer
    idx = torch.tensor([ids] * n_samples, device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    top_k = args.top_k if decode == "top-k" else None
    top_p = args.top_p if decode == "nucleus" else None
    temperature = 1.0 if decode == "top-k" or decode == "nucleus" else args.temperature
    if args.decode == "all":
        print(f"--- {decode} ---")
    start, n_tokens = time.perf_counter(), 0
    if n_samples == 1 and decode != "beam":
        printer = Printer(tokenizer)
        print(prompt, end="", flush=True)
        filters = temperature, top_k, top_p
        for new in stream(model, idx, args.max_new_tokens, decode, *filters, eot, generator, not args.no_cache):
            n_tokens += new.size(1)
            printer([i for i in new[0].tolist() if i != eot])
        printer([], final=True)
    else:
        new = generate(model, idx, args.max_new_tokens, decode, temperature, top_k, top_p, args.beam_width,
                       args.length_penalty, eot, generator, not args.no_cache)  # fmt: skip
        for i, row in enumerate(new.tolist()):
            row = row[: row.index(eot)] if eot in row else row
            n_tokens += len(row)
            print("" if n_samples == 1 else f"[{i + 1}] ", prompt, tokenizer.decode(row, errors="replace"), sep="")
    seconds = time.perf_counter() - start
    about = sys.stdout if args.decode == "all" else sys.stderr
    print(f"({n_tokens} tokens, {n_tokens / seconds:,.1f} tokens/s)\n", file=about, flush=True)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=formatter)
    parser.error = lambda message: sys.exit(f"sample.py: {message} (--help lists all options)")
    parser.add_argument("--ckpt", default="out/gpt2/ckpt.pt", help="of any model file (default: %(default)s)")
    parser.add_argument("--prompt", help="text to continue; empty: a new document (default: standard input)")
    parser.add_argument("--prompt-file", help="file that holds the prompt")
    parser.add_argument("--decode", choices=(*DECODERS, "all"), default="nucleus", help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, help="of one prompt, as one batch (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of --decode temperature (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="of --decode top-k (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of --decode nucleus (default: %(default)s)")
    parser.add_argument("--beam-width", type=int, default=4, help="of --decode beam (default: %(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of --decode beam (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="read all again for every token: same text, slower")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a CUDA GPU if there is one)")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on CUDA, else float32")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 0:
        parser.error("--num-samples must be at least 1 and --max-new-tokens at least 0")
    if min(args.top_k, args.beam_width) < 1 or not args.temperature >= 0 or not 0 <= args.top_p <= 1:
        parser.error("--top-k and --beam-width must be at least 1, --temperature at least 0, --top-p in [0, 1]")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters that a model has
    device, dtype = choose_device(args, int(os.environ.get("LOCAL_RANK", 0)))
    model, tokenizer = load(args.ckpt, device)
    model.to(dtype if args.dtype != "auto" or device.type == "cuda" else torch.float32)
    decoders = DECODERS if args.decode == "all" else (args.decode,)
    try:
        prompt = args.prompt
        if args.prompt_file:
            prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        interactive = prompt is None and sys.stdin.isatty()
        if prompt is None and not interactive:
            prompt = sys.stdin.read()
        while True:
            if interactive:
                prompt = input("prompt (Ctrl-D ends)> ")
            for decode in decoders:
                show(model, tokenizer, prompt, decode, args)
            if not interactive:
                break
    except EOFError:
        print()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError:
        sys.exit(f"{args.prompt_file or 'standard input'}: not UTF-8")
    except OSError as e:
        sys.exit(f"{e.filename or 'standard output'}: {e.strerror}")
    except (ValueError, OverflowError, MemoryError) as e:
        sys.exit(f"sample.py: {str(e) or 'not enough memory'}")


if __name__ == "__main__":
    main()
