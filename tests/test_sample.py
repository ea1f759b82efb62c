"""Decoders agree with Hugging Face, with exhaustive search and with exact distributions; the
command line does what it says."""

import copy
import inspect
import io
import itertools
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW_LAYERS, MODEL_FILES, ROOT, load, train
from test_gpt2 import as_hugging_face

import gpt2
import sample
import scratch_former
from prepare_data import load_tokenizer


@pytest.fixture(autouse=True)
def no_test_draws_for_ever():
    """Each token is drawn again until it is in the nucleus: if it never is, the test ends, too."""

    def stop(*_):
        raise TimeoutError("still running after 100 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_ids(*shape, vocab_size=12, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


@torch.no_grad()
def add_noise(model, std):
    for p in model.parameters():
        p += std * torch.randn(p.shape)
    return model.double().eval()


def tiny(seed=0, **config):
    """A GPT-2 whose most probable token of 12 has about half the probability. In float64, so that
    rounding never decides which of two tokens is the better one."""
    config = dict(vocab_size=12, block_size=16, n_layer=1, n_embd=16, n_head=2) | config
    torch.manual_seed(seed)
    return add_noise(gpt2.Model(gpt2.Config(**config)), 0.4)


class Table(torch.nn.Module):
    """A network that looks at the last token alone: row i of `probs` (V, V) is what follows i."""

    ahead = 1
    cfg = SimpleNamespace(block_size=100)

    def __init__(self, probs):
        super().__init__()
        self.logits = torch.tensor(probs).log()

    def new_cache(self, batch_size):
        return SimpleNamespace(length=0, select=lambda rows: None)

    def forward(self, idx, cache):
        cache.length += idx.size(1)
        return self.logits[idx[:, -1:]]


def assert_drawn_with(p, counts, n):
    """counts (..., V) of n draws each agree with the probabilities p. By Bernstein's inequality,
    one count in a million is further away than this. What has probability 0 is never drawn."""
    bound = 5.4 * (n * p * (1 - p)).sqrt() + 4.8
    assert (counts[p == 0] == 0).all()
    assert (abs(counts - n * p) <= bound).all()


# --- greedy and beam search


@pytest.mark.parametrize(
    "width, length_penalty", [(1, 1.0), (3, 0.0), (3, 1.0), (3, 2.0), (5, 1.0)]
)
def test_greedy_and_beam_search_equal_hugging_face_token_for_token(width, length_penalty):
    """Greedy is also what a beam of width 1 gives, and what drawing gives at a temperature of 0, or
    almost 0."""
    ended_early = 0
    for seed, end in itertools.product(range(12), (False, True)):
        V = [6, 12, 30][seed % 3]
        eot = V - 1
        model = tiny(seed, vocab_size=V)
        model.wte.weight.data[eot] *= 3  # often the best token, or the worst: some rows end early
        idx = random_ids(1 + seed % 2, 1 + seed % 5, vocab_size=V, seed=seed)
        expected = as_hugging_face(model).generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=10,
            do_sample=False,
            num_beams=width,
            early_stopping="never",
            length_penalty=length_penalty,
            eos_token_id=eot if end else None,
            pad_token_id=eot,
        )[:, idx.size(1) :]
        options = dict(beam_width=width, length_penalty=length_penalty, eot=eot if end else None)
        for decode in sample.DECODERS if width == 1 else ["beam"]:
            temperature = (0, 1e-46, 1e-38, 1e-10)[seed % 4]
            assert sample.generate(model, idx, 10, decode, temperature, **options).equal(expected)
        ended_early += end and (expected == eot).any().item()
    assert ended_early >= 4


@torch.no_grad()
def slow_search(model, text, n, width=1, eot=None, length_penalty=1.0):
    """Beam search for the next n tokens of a text (T), with a forward pass for every token. It is
    greedy if width is 1, and exhaustive if it is V^n. A pass gives the logits of `model.ahead`
    tokens. A window that is full slides by a quarter."""
    T = len(text)
    running = [(0.0, text.tolist())]  # (log-probability, tokens)
    finished = []
    start = 0
    for i in range(n):
        done = i % model.ahead  # tokens of the last pass
        if done == 0 and T + i - start > model.cfg.block_size:
            start = T + i - model.cfg.block_size * 3 // 4
        windows = torch.tensor([tokens[start : T + i - done] for _, tokens in running])
        logp = model(windows)[:, -model.ahead :][:, done].log_softmax(-1).tolist()
        longer = []
        for (total, tokens), row in zip(running, logp):
            longer += [(total + p, [*tokens, token]) for token, p in enumerate(row)]
        finished += [x for x in longer if x[1][-1] == eot]
        running = sorted((x for x in longer if x[1][-1] != eot), reverse=True)[:width]
    best = max(running + finished, key=lambda x: x[0] / (len(x[1]) - T) ** length_penalty)
    return best[1][T:]


@pytest.mark.parametrize("eot, length_penalty", [(None, 1.0), (0, 0.0), (0, 1.0), (0, 2.0)])
def test_a_beam_that_is_wide_enough_finds_what_exhaustive_search_finds(eot, length_penalty):
    options = dict(length_penalty=length_penalty, eot=eot)
    for seed in range(8):
        model = tiny(seed, vocab_size=4)
        idx = random_ids(2, 5, vocab_size=4, seed=seed)
        new = sample.generate(model, idx, 4, "beam", beam_width=64, **options)
        best = [slow_search(model, text, 4, 256, **options) for text in idx]
        assert new.tolist() == [row + [eot] * (new.size(1) - len(row)) for row in best]


def test_a_hypothesis_ends_only_if_it_is_among_the_best_of_the_beam():
    """End of text, 2, comes third. It is better than every longer text, but a beam of 2 must not
    take it, and a beam of 3 must."""
    model = Table([[0.35, 0.33, 0.32], [0.35, 0.33, 0.32], [0.4, 0.4, 0.2]])
    model.logits[1] = torch.tensor([0.5, 0.3, 0.2]).log()  # the prompt is token 1
    prompt = torch.tensor([[1]])
    options = dict(length_penalty=0.0, eot=2)
    assert sample.generate(model, prompt, 2, "beam", beam_width=2, **options).tolist() == [[0, 0]]
    assert sample.generate(model, prompt, 2, "beam", beam_width=3, **options).tolist() == [[2]]


# --- the cache, the window, the prompt


@pytest.mark.parametrize("name", MODEL_FILES)
def test_cached_uncached_and_plain_forward_passes_give_the_same_text_while_the_window_slides(name):
    module = load(name)
    block_size = max(32, 2 * getattr(module.Config, "ahead", 1))
    config = dict(vocab_size=12, block_size=block_size, n_embd=24, n_layer=FEW_LAYERS[name])
    if hasattr(module.Config, "n_head"):
        config["n_head"] = 2
    torch.manual_seed(0)
    model = add_noise(module.Model(module.Config(**config)), 0.2)
    idx = random_ids(2, block_size * 3 // 4)
    n = block_size * 7 // 8

    def both(prompts, **options):
        options |= dict(max_new_tokens=n, beam_width=4)
        new = sample.generate(model, prompts, **options, generator=seeded(0))
        plain = sample.generate(model, prompts, **options, generator=seeded(0), use_cache=False)
        assert new.equal(plain)
        return new.tolist()

    for decode in sample.DECODERS:
        free = both(idx, decode=decode)
        if decode in ("greedy", "beam"):
            width = 4 if decode == "beam" else 1
            assert free == [slow_search(model, row, n, width) for row in idx]
        both(idx, decode=decode, eot=free[0][3])
        both(idx[:1].expand(3, -1), decode=decode)  # equal rows are read once


def test_a_cached_step_computes_new_tokens_only_and_equal_prompts_once():
    model = tiny()
    shapes = []
    model.register_forward_pre_hook(lambda model, args: shapes.append(tuple(args[0].shape)))
    idx = random_ids(1, 3).expand(2, -1)
    sample.generate(model, idx, 3, "nucleus", generator=seeded(1))
    assert shapes == [(1, 3), (2, 1), (2, 1)]
    shapes.clear()
    sample.generate(model, idx, 3, "nucleus", generator=seeded(1), use_cache=False)
    assert shapes == [(1, 3), (2, 4), (2, 5)]


def test_a_long_prompt_keeps_what_leaves_room_for_the_new_tokens(capsys):
    model = tiny()
    text = random_ids(33)
    for T, n, kept in ((16, 9, 16), (17, 1, 15), (33, 2, 14), (33, 4, 12), (33, 40, 12)):
        new = sample.generate(model, text[None, :T], n)[0].tolist()
        assert new == slow_search(model, text[T - kept : T], n)
        assert (f"first {T - kept} tokens" in capsys.readouterr().err) == (T > 16)


def test_dropout_is_off_and_no_token_is_a_possible_number_of_new_tokens():
    model = tiny(dropout=0.5)
    idx = random_ids(2, 3)
    assert sample.generate(model, idx, 12).equal(sample.generate(model.train(), idx, 12))
    assert not model.training
    for decode in sample.DECODERS:
        assert sample.generate(model, idx, 0, decode).shape == (2, 0)


def test_arguments_that_cannot_be_used_are_refused_by_name():
    model = tiny()
    idx = random_ids(2, 3)
    wrong = [{"temperature": value} for value in (-1.0, math.nan, math.inf)]
    wrong += [{"top_p": 1.5}, {"top_p": -0.1}, {"top_k": -1}]
    for option in wrong:
        with pytest.raises(gpt2.UserError, match=f"{next(iter(option))} goes from 0 to"):
            sample.generate(model, idx, 4, "nucleus", **option)
    with pytest.raises(gpt2.UserError, match="beam_width goes from 1 to"):
        sample.generate(model, idx, 4, "beam", beam_width=0)
    with pytest.raises(gpt2.UserError, match=r"'beams'.*greedy, beam, top-k, temperature, nucleus"):
        sample.generate(model, idx, 4, "beams")
    empty = torch.zeros(2, 0, dtype=torch.long)
    for prompt in ("def main(", [1, 2], idx.float(), idx[0], empty, torch.tensor([[]])):
        with pytest.raises(TypeError) as e:
            sample.generate(model, prompt, 4)
        wanted = "idx (B, T), a LongTensor: torch.tensor([tokenizer.encode(text)])"
        assert wanted in str(e.value)


# --- filters and draws


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from, one id at a time: temperature, then top-k, then nucleus."""
    weights = [math.exp(x / temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        mass = [*itertools.accumulate(weights[i] for i in kept)]
        kept = kept[: 1 + sum(m < top_p * mass[-1] for m in mass)]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def drawn(logits, n, top_k=None, top_p=None, temperature=1.0):
    """How often each id comes in n draws, (B, V)."""
    rows = logits.repeat_interleave(n, 0)
    ids = sample.choose(rows, "temperature", temperature, top_k, top_p, seeded(0))
    return F.one_hot(ids.view(-1, n), logits.size(1)).sum(1)


def test_the_filters_equal_a_loop_over_ids():
    logits = 2 * torch.randn(20, 10, generator=seeded(0))
    n = 5_000
    names = ("temperature", "top_k", "top_p")
    for values in itertools.product((0.5, 2.0), (None, 1, 3, 50), (None, 0.0, 0.3, 0.9, 1.0)):
        filters = dict(zip(names, values))
        p = torch.tensor([exact(row, **filters) for row in logits.tolist()])
        assert_drawn_with(p, drawn(logits, n, **filters), n)


def test_a_top_k_of_0_is_no_filter():
    model = tiny(1, vocab_size=200)
    prompts = random_ids(1, 4, vocab_size=200).expand(50, -1)
    every, none = (
        sample.generate(model, prompts, 9, decode, 3.0, top_k, generator=seeded(0))
        for decode, top_k in (("temperature", None), ("top-k", 0))
    )
    assert every.equal(none)
    assert not every.equal(sample.generate(model, prompts, 9, "top-k", 3.0, generator=seeded(0)))


def test_equally_probable_tokens_are_kept_up_to_exactly_k_or_p():
    flat = torch.zeros(1, 8)
    steps = torch.tensor([[1.0, 2, 2, 2, 2, 2, 0, 0]])
    for k, logits in itertools.product((1, 2, 5, 8, 9), (flat, steps)):
        assert (drawn(logits, 10_000, top_k=k) > 0).sum() == min(k, 8)
    assert (drawn(flat, 10_000, top_p=0.3) > 0).sum() == 3  # 3/8 is the first sum that reaches 0.3
    many = drawn(torch.zeros(1, 600), 20_000, top_p=0.75)
    assert (many > 0).sum() == pytest.approx(450, abs=1)
    model = tiny()
    torch.nn.init.zeros_(model.wte.weight)  # all logits are equal
    idx = random_ids(2, 3)
    greedy = sample.generate(model, idx, 12)
    assert sample.generate(model, idx, 12, "nucleus", temperature=0).equal(greedy)


def test_the_nucleus_is_that_of_the_textbook_in_the_docstring():
    lines = inspect.getdoc(sample.draw_from_nucleus).splitlines()
    textbook = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    assert textbook.count("\n") == 4
    logits = 2 * torch.randn(6, 10, generator=seeded(3))
    logits[0] = 0.0
    probs = logits.softmax(-1)
    ids = torch.stack([torch.randperm(10, generator=seeded(i)) for i in range(6)]) + 100
    ids[0] = ids[0].sort().values  # of equally probable tokens, the one with the lower id is first
    n = 20_000
    for top_p in (0.25, 0.55, 0.85, 0.99):
        names = dict(torch=torch, probs=probs, ids=ids, top_p=top_p, generator=seeded(0))
        exec(textbook, names)
        assert names["token"].shape == (6,)
        cut = names["sorted_probs"] / names["sorted_probs"].sum(-1, keepdim=True)
        p = torch.zeros(6, 10).scatter(1, ids.gather(1, names["order"]) - 100, cut)
        rows = [x.repeat_interleave(n, 0) for x in (probs, ids)]
        token = sample.draw_from_nucleus(*rows, top_p, seeded(0))
        assert_drawn_with(p, F.one_hot(token.view(6, n) - 100, 10).sum(1), n)


CASES = [
    ("greedy", {}),
    ("beam", {"beam_width": 3, "length_penalty": 0.5}),
    ("temperature", {}),
    ("temperature", {"temperature": 0.5}),
    ("top-k", {"temperature": 2.0}),
    ("top-k", {"top_k": 9, "top_p": 0.8}),
    ("nucleus", {}),
]


@pytest.mark.parametrize(
    "decode, options, filters",
    [
        ("top-k", {}, {"top_k": 50}),
        ("nucleus", {}, {"top_p": 0.95}),
        ("nucleus", {"temperature": 1.5, "top_k": 9}, {"top_p": 0.95}),
    ],
)
@torch.no_grad()
def test_draws_have_the_exact_distribution(decode, options, filters):
    model = tiny(1, vocab_size=60)
    prompt = random_ids(1, 4, vocab_size=60)
    n = 20_000
    new = sample.generate(model, prompt.expand(n, -1), 1, decode, generator=seeded(0), **options)
    p = torch.tensor(exact(model(prompt)[0, -1].tolist(), **filters, **options))
    assert_drawn_with(p, torch.bincount(new[:, 0], minlength=60), n)


def test_logits_of_16_bits_are_drawn_from_in_float32():
    """600 equally probable tokens: in bfloat16, a sum of probabilities has only 256 steps."""
    model = Table([[1 / 600] * 600] * 600)
    model.logits = model.logits.bfloat16()
    n = 60_000
    prompts = torch.zeros(n, 1, dtype=torch.long)
    new = sample.generate(model, prompts, 1, "temperature", generator=seeded(0))
    assert_drawn_with(torch.full((600,), 1 / 600), torch.bincount(new[:, 0], minlength=600), n)


@torch.no_grad()
def test_generate_draws_two_tokens_as_the_plain_loop_on_the_first_screen_does():
    model = tiny(2, vocab_size=5)
    prompt = random_ids(1, 4, vocab_size=5)
    first = (model(prompt)[0, -1] / 0.8).softmax(-1)  # (V)
    longer = torch.cat([prompt.expand(5, -1), torch.arange(5)[:, None]], dim=1)
    second = (model(longer)[:, -1] / 0.8).softmax(-1)  # (V, V)
    p = (first[:, None] * second).flatten()
    n = 20_000
    prompts = prompt.expand(n, -1)
    torch.manual_seed(0)
    plain = sample.plain_generate(model, prompts, 2, temperature=0.8)
    assert plain[:, :4].equal(prompts)
    fast = sample.generate(model, prompts, 2, "temperature", 0.8, generator=seeded(0))
    for pair in (plain[:, 4:], fast):
        assert_drawn_with(p, torch.bincount(pair[:, 0] * 5 + pair[:, 1], minlength=25), n)
    cold = sample.plain_generate(model, prompt, 12, temperature=1e-4)
    assert cold[:, 4:].equal(sample.generate(model, prompt, 12))


# --- blanks


def for_blanks(objective, seed=0):
    """A network of scratch_former.py with peaked distributions, which takes up to two spans."""
    config = dict(vocab_size=5, block_size=16, n_layer=1, n_embd=16, n_head=2, n_ff=32, hide=0.4)
    torch.manual_seed(seed)
    model = scratch_former.Model(scratch_former.Config(objective=objective, **config))
    return add_noise(model, 0.5)


@torch.no_grad()
def test_greedy_and_beam_search_for_spans_equal_a_brute_force_search():
    """Two blanks: the sentinels before their spans are 5 and 6, and 7 ends the second span."""
    prompt = torch.tensor([[1, 5, 2, 3, 5, 0]])
    lengths = set()
    for seed, penalty in itertools.product(range(6), (0.0, 1.0)):
        model = for_blanks("spans", seed)
        source = model.run(model.encoder, torch.tensor([[1, 5, 2, 3, 6, 0]]), causal=False)

        def logp(texts, model=model, source=source):
            """Log-probabilities of the tokens after 5, and of what follows, (B, T + 1, V)."""
            idx = torch.tensor([[5, *text] for text in texts])
            encoded = source.expand(len(idx), -1, -1)
            memory = [block.cross.keys_and_values(encoded) for block in model.h]
            x = model.run(model.h, idx, True, memory=memory)
            return model.lm_head(x)[..., :8].log_softmax(-1)

        scores = {}  # of all texts that end with 7, or have 4 tokens
        greedy = []
        for n in range(1, 5):
            texts = [text for text in itertools.product(range(8), repeat=n) if 7 not in text[:-1]]
            if n < 4:
                texts = [text for text in texts if text[-1] == 7]
            of_tokens = logp(texts)[:, :-1].gather(2, torch.tensor(texts)[:, :, None])  # (B, n, 1)
            scores |= dict(zip(texts, (of_tokens.sum((1, 2)) / n**penalty).tolist()))
            if 7 not in greedy:
                greedy.append(logp([greedy])[0, -1].argmax().item())
        for decode, best in (("greedy", greedy), ("beam", max(scores, key=scores.get))):
            spans = [[*map(int, span)] for span in re.split("[567]", "".join(map(str, best)))]
            spans.append([])  # perhaps there is no second one
            expected = [1, *spans[0], 2, 3, *spans[1], 0]
            options = dict(beam_width=400, length_penalty=penalty)
            assert sample.fill(model, prompt, 4, decode, **options) == [expected]
            lengths.add(len(best))
    assert len(lengths) > 1


@torch.no_grad()
def test_masked_tokens_are_chosen_the_most_certain_first():
    order = []
    for seed, row in itertools.product(range(3), ([1, 5, 2, 5, 5, 0], [5, 3, 5, 0, 1, 5])):
        model = for_blanks("masked", seed)
        text = list(row)
        while 5 in text:
            probs = model(torch.tensor([text]))[0].softmax(-1)  # (T, V)
            blanks = [i for i, token in enumerate(text) if token == 5]
            i = max(blanks, key=lambda i: probs[i].max())
            text[i] = probs[i].argmax().item()
            order.append(i)
        assert sample.fill(model, torch.tensor([row, row[::-1]]))[0] == text
    assert any(a > b for a, b in itertools.pairwise(order[:3]))  # not from left to right
    prompts = torch.tensor([row]).expand(200, -1)
    texts = sample.fill(model, prompts, decode="top-k", top_k=2, generator=seeded(0))
    assert 2 < len({tuple(text) for text in texts}) <= 8


def test_what_cannot_be_filled_is_refused():
    spans = for_blanks("spans")  # for the 16 positions: the text, a sentinel, and what is written
    masked = for_blanks("masked")
    assert len(sample.fill(spans, torch.tensor([[5] + [1] * 13]))[0]) in (13, 14)
    assert sample.fill(spans, torch.tensor([[5] + [1] * 14])) == [[1] * 14]
    assert len(sample.fill(masked, torch.tensor([[5] + [1] * 15]))[0]) == 16
    refused = [
        (masked, [[5] + [1] * 16], "greedy", "17 tokens: at most 16"),
        (spans, [[5] + [1] * 15], "greedy", "16 tokens: at most 15"),
        (spans, [[5, 5, 5]], "greedy", "3 blanks: at most 2"),
        (spans, [[5, 1], [5, 5]], "greedy", "not as many in each row"),
        (masked, [[5, 1]], "beam", "one at a time"),
        (masked, [[2, 1]], "greedy", "no blanks"),
    ]
    for model, prompts, decode, error in refused:
        with pytest.raises(gpt2.UserError, match=error):
            sample.fill(model, torch.tensor(prompts), decode=decode)


def test_a_space_before_a_blank_belongs_to_what_fills_it_unless_tokens_are_bytes(ckpt):
    assert sample.encode("a <blank>b <blank>", load_tokenizer("bytes"), 7) == [97, 32, 7, 98, 32, 7]
    _, tokenizer = sample.load(ckpt)
    words = ("the model", "reads", " it")
    a, b, c = (tokenizer.encode_ordinary(word) for word in words)
    ids = sample.encode("the model <blank>reads<blank> it", tokenizer, 7)
    assert ids == [*a, 7, *b, 7, *c]


def test_a_million_letters_or_spaces_are_encoded(say, ckpt):
    _, tokenizer = sample.load(ckpt)
    for text in (" " * 1_000_000, "the" * 300_000, "a b  \n" * 50_000):
        ids = sample.encode(text, tokenizer, 7)
        assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode_ordinary(text)  # the pieces are cut where tokens end, too
    assert say("--prompt", " " * 1_000_000, "--decode", "greedy").startswith(" " * 1_000_000)


# --- checkpoints


@pytest.fixture(scope="module")
def ckpt(data, tmp_path_factory):
    """A step of training writes it. Its weights become so large that every token matters, and end
    of text comes now and then."""
    path = tmp_path_factory.mktemp("out") / "ckpt.pt"
    train("gpt2", data, path.parent, "--block-size", 32, "--max-steps", 1)
    state = torch.load(path, weights_only=True)
    for w in state["model"].values():
        w.normal_(std=0.4, generator=seeded(w.numel()))
    state["model"]["lm_head.weight"][state["config"]["eot"]] *= -1.5
    torch.save(state, path)
    return path


def changed(ckpt, path, **values):
    """Writes a copy of a checkpoint with other values, and returns its path."""
    torch.save(torch.load(ckpt, weights_only=True) | values, path)
    return path


def test_a_checkpoint_imports_nothing_but_a_model_file_beside_sample_py(
    ckpt, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload.py").write_text("raise SystemExit('executed')", "utf-8")
    banner = (ROOT / "gpt2.py").read_text("utf-8")
    (tmp_path / "elsewhere.py").write_text(f"raise SystemExit('executed')\n{banner}", "utf-8")
    names = ["payload.py", "this", "this.py", "elsewhere.py", f"{tmp_path}/elsewhere.py"]
    names += ["../x.py", f"{ROOT}/gpt2.py", "./gpt2.py", "sample.py", "prepare_data.py", ""]
    for name in names:
        path = changed(ckpt, tmp_path / "named.pt", model_file=name)
        with pytest.raises(gpt2.UserError) as e:
            sample.load(path)
        assert f"named.pt is of {name}" in str(e.value) and "gpt2.py" in str(e.value)
    assert not {"payload", "this", "elsewhere"} & sys.modules.keys()


def test_a_checkpoint_that_does_not_fit_is_one_line_but_a_mistake_in_the_network_is_not(
    ckpt, tmp_path, monkeypatch
):
    state = torch.load(ckpt, weights_only=True)
    (tmp_path / "text.pt").write_text("text")
    changed(ckpt, tmp_path / "key.pt", config=state["config"] | {"no_such_field": 1})
    changed(ckpt, tmp_path / "size.pt", config=state["config"] | {"n_embd": 24})
    errors = {"text": "damaged", "key": "no_such_field", "size": "24"}
    for name, error in errors.items():
        with pytest.raises(gpt2.UserError, match=rf"{name}\.pt.*{error}") as e:
            sample.load(tmp_path / f"{name}.pt")
        assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        sample.load(tmp_path / "none.pt")
    for mistake in (TypeError, RuntimeError, ValueError):

        def wrong(self, cfg, mistake=mistake):
            raise mistake("of a student")

        monkeypatch.setattr(gpt2.Model, "__init__", wrong)
        with pytest.raises(mistake, match="of a student"):
            sample.main(["--ckpt", str(ckpt), "--prompt", "the"])


def linear_layers(model):
    return [layer for layer in model.modules() if type(layer) is torch.nn.Linear]


def capabilities(monkeypatch, amx):
    """As if this CPU had AMX, or had not. Before 2.11, torch has no such function."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)


@pytest.mark.parametrize("amx", [False, True])
def test_few_rows_are_used_where_they_are_faster_and_only_on_purpose(amx, ckpt, monkeypatch):
    capabilities(monkeypatch, amx)
    for dtype in (torch.float32, torch.bfloat16):
        model = sample.load(ckpt)[0].to(dtype)
        assert len(linear_layers(model)) == 4 + 1
        assert not any("forward" in vars(layer) for layer in model.modules())
        sample.use_few_rows(model)
        used = ["forward" in vars(layer) for layer in linear_layers(model)]
        assert used == [(dtype == torch.bfloat16) == amx] * 5


@torch.no_grad()
def test_few_rows_leave_a_layer_with_a_forward_of_its_own_alone(monkeypatch):
    capabilities(monkeypatch, amx=False)
    progressive = load("progressive")
    size = dict(vocab_size=12, block_size=16, n_layer=4, n_embd=16, n_head=2)
    model = progressive.Model(progressive.Config(stage=2, lora_rank=2, **size))
    model = add_noise(model, 0.2).float()
    idx = random_ids(3, 1)
    logits = model(idx)
    sample.use_few_rows(model)
    assert torch.allclose(model(idx), logits, atol=1e-5)


def test_the_command_line_uses_few_rows(say, monkeypatch):
    capabilities(monkeypatch, amx=False)
    shapes = []
    few_rows = sample.few_rows

    def noted(layer, x):
        shapes.append(x.shape[:2])
        return few_rows(layer, x)

    monkeypatch.setattr(sample, "few_rows", noted)
    say("--prompt", "the", "--decode", "top-k", "--num-samples", 3)
    assert (3, 1) in shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_as_exact_as_a_linear_layer_and_many_rows_are_one(dtype, monkeypatch):
    calls = []
    linear = F.linear

    def noted(*args):
        calls.append(args)
        return linear(*args)

    monkeypatch.setattr(F, "linear", noted)
    shapes = [(1, 1), (8, 1), (32, 1), (33, 1), (1, 2), (2, 3)]
    for shape, bias in itertools.product(shapes, (True, False)):
        layer = torch.nn.Linear(96, 160, bias).to(dtype)
        x = torch.randn(*shape, 96, generator=seeded(0)).to(dtype)
        exact = copy.deepcopy(layer).double()(x.double())
        theirs = layer(x)
        calls.clear()
        y = sample.few_rows(layer, x)
        assert len(calls) == (shape[0] > 32 or shape[1] > 1)
        assert y.shape == exact.shape
        assert (y - exact).abs().mean() <= 3 * (theirs - exact).abs().mean()  # both are rounding


# --- the command line


@pytest.fixture
def say(ckpt, capsys):
    """say(options): what sample.py prints to standard output, or the line with which it exits."""

    def say(*options):
        capsys.readouterr()
        always = ["--ckpt", str(ckpt), "--dtype", "float32", "--max-new-tokens", "20"]
        try:
            sample.main([*always, *map(str, options)])
        except SystemExit as end:
            assert "\n" not in end.code and capsys.readouterr().out == ""
            return end.code
        return capsys.readouterr().out

    return say


@pytest.mark.parametrize("decode, options", CASES)
def test_the_command_line_prints_what_generate_returns(say, ckpt, decode, options):
    model, tokenizer = sample.load(ckpt)
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", value]
    if decode == "temperature":
        options = {"temperature": 0.7} | options
    eot = tokenizer.eot_token
    for prompt in ("the naïve model", "<|endoftext|>", ""):  # special tokens are plain text
        idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [eot]])
        new = sample.generate(model, idx, 20, decode, eot=eot, generator=seeded(1337), **options)
        text = prompt + tokenizer.decode([i for i in new[0].tolist() if i != eot])
        printed = say("--decode", decode, "--prompt", prompt, *flags)
        assert printed[-1] == "\n"
        assert printed.rstrip("\ufffd\n") == text.rstrip("\ufffd\n")  # of a character, half is left


def test_dtype_is_that_of_the_weights(say, ckpt):
    texts = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = sample.load(ckpt)
        sample.use_few_rows(model.to(dtype))
        idx = torch.tensor([tokenizer.encode_ordinary("slowly")])
        eot = tokenizer.eot_token
        new = sample.generate(model, idx, 60, "top-k", eot=eot, generator=seeded(1337))[0].tolist()
        text = "slowly" + tokenizer.decode([i for i in new if i != eot])
        options = ("--prompt", "slowly", "--decode", "top-k", "--max-new-tokens", 60)
        printed = say(*options, "--dtype", str(dtype).removeprefix("torch."))
        assert printed.rstrip("\ufffd\n") == text.rstrip("\ufffd\n")
        texts.append(text)
    assert min(map(len, texts)) > 20 and len(set(texts)) == 3


def test_all_decoders_many_samples_no_cache_and_a_long_prompt(say, ckpt, capsys, monkeypatch):
    printed = say("--decode", "all", "--prompt", "the model", "--dtype", "bfloat16", "--top-k", 3)
    parts = [part.split(" ---\n") for part in printed.split("--- ")[1:]]
    assert [decode for decode, _ in parts] == [*sample.DECODERS]
    assert all(text.startswith("the model") and "tokens/s)" in text for _, text in parts)
    printed = say("--decode", "all", "--prompt", "the", "--num-samples", 2)
    assert [part.count("[2] the") for part in printed.split("--- ")[1:]] == [0, 0, 1, 1, 1]
    samples = say("--prompt", "the", "--num-samples", 40, "--temperature", 2).split("\n[")
    assert [text[: text.index("] the")] for text in samples] == ["[1", *map(str, range(2, 41))]
    assert len({text.split("] ", 1)[1] for text in samples}) == 40
    assert "<|endoftext|>" not in str(samples)
    caches = []
    new_cache = gpt2.Model.new_cache

    def noted(self, n):
        caches.append(n)
        return new_cache(self, n)

    monkeypatch.setattr(gpt2.Model, "new_cache", noted)
    cached = say("--prompt", "the")
    caches.clear()
    assert say("--prompt", "the", "--no-cache") == cached
    assert len(caches) > 2
    sample.main(["--ckpt", str(ckpt), "--decode", "all", "--prompt", "the model learns " * 20])
    assert capsys.readouterr().err.count("tokens are left out") == 1


def test_tokens_after_end_of_text_do_not_count(ckpt, capsys):
    model, tokenizer = sample.load(ckpt)
    eot = tokenizer.eot_token
    idx = torch.tensor([tokenizer.encode_ordinary("the")]).expand(60, -1)
    new = sample.generate(model, idx, 20, "temperature", 2.0, eot=eot, generator=seeded(1337))
    rows = new.tolist()
    n = sum(row.index(eot) if eot in row else 20 for row in rows)
    assert 0 < n < 60 * 20 - 50
    options = "--decode temperature --temperature 2 --num-samples 60 --max-new-tokens 20"
    always = ["--ckpt", str(ckpt), "--dtype", "float32", "--prompt", "the"]
    sample.main([*always, *options.split()])
    assert capsys.readouterr().err.startswith(f"({n} tokens, ")


def test_an_early_end_of_text_is_said(ckpt, capsys):
    model, tokenizer = sample.load(ckpt)
    eot = tokenizer.eot_token
    idx = torch.tensor([tokenizer.encode_ordinary("the")])
    always = ["--ckpt", str(ckpt), "--dtype", "float32", "--prompt", "the"]
    always += ["--decode", "temperature", "--temperature", "2", "--max-new-tokens", "30"]
    found = set()
    for seed in range(20):
        options = dict(temperature=2.0, eot=eot, generator=seeded(seed))
        n = sample.generate(model, idx, 30, "temperature", **options).size(1)
        if n not in found and len(found) < 3:
            sample.main([*always, "--seed", str(seed)])
            text = "30 tokens" if n == 30 else f"{n - 1} tokens, end of text"
            assert re.fullmatch(rf"\({text}, [\d,.]+ tokens/s\)\n\n", capsys.readouterr().err)
            found.add(n)
    assert 30 in found and len(found) > 1


@pytest.mark.parametrize(
    "typed", ["naïve\nreads", "naïve\nreads\n", "naïve\r\nreads\r\n", "naïve\nreads\n\n"]
)
def test_a_prompt_from_a_pipe_or_a_file_loses_one_newline_and_all_of_windows(
    typed, say, tmp_path, monkeypatch
):
    text = say("--prompt", "naïve\nreads\n" if typed[-2:] == "\n\n" else "naïve\nreads")
    monkeypatch.setattr("sys.stdin", io.StringIO(typed, newline=""))
    assert say() == text
    (tmp_path / "prompt.txt").write_bytes(typed.encode())
    assert say("--prompt-file", tmp_path / "prompt.txt") == text
    (tmp_path / "prompt.txt").write_bytes(typed.encode("utf-8-sig"))  # a byte order mark is no text
    assert say("--prompt-file", tmp_path / "prompt.txt") == text


def test_prompts_of_a_session_draw_on_and_the_seed_fixes_the_session(say, monkeypatch):
    sessions = []
    for seed in (1, 1, 2):
        monkeypatch.setattr("sys.stdin", io.StringIO("the\nthe\n"))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        printed = say("--seed", seed)
        sessions.append([text.strip() for text in printed.split("prompt (Ctrl-D ends)> ")])
    assert sessions[0] == sessions[1] != sessions[2]
    assert sessions[0][1] != sessions[0][2]
    assert sessions[0][1] == say("--prompt", "the", "--seed", 1).strip()


def test_a_session_goes_on_after_a_prompt_that_cannot_be_used(say, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a <blank>\nthe\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    _, refused, answered, end = say("--decode", "greedy").split("prompt (Ctrl-D ends)> ")
    assert "<blank>" in refused and refused.count("\n") == 1
    assert answered == say("--decode", "greedy", "--prompt", "the")
    assert end == "\n"


def test_the_printer_never_cuts_a_character(capsys):
    show = sample.printer(load_tokenizer("bytes"))
    data = "naïve 你好, мир 🏳️‍🌈".encode()
    printed = ""
    for i, token in enumerate([*data, 256], 1):  # at last the end of text, which is not printed
        show(torch.tensor([token]))
        printed += capsys.readouterr().out
        assert printed == data[:i].decode(errors="ignore")  # as soon as a character is complete


def test_waiting_threads_sleep_as_in_the_model_files():
    """The C library of OpenMP reads the variable when torch is imported, before gpt2.py is."""
    first = (ROOT / "sample.py").read_text("utf-8").partition("import torch\n")[0]
    assert 'os.environ.setdefault("GOMP_SPINCOUNT", "1000")' in first
    assert 'os.environ.setdefault("GOMP_SPINCOUNT", "1000")' in inspect.getsource(gpt2)


@pytest.mark.parametrize("stop", ["interrupt", "close"])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(ckpt, stop):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the мир"]
    child = subprocess.Popen(
        [*command, "--max-new-tokens", "99999"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if pytest ignores it
    )
    assert child.stdout.read(7) == b"the ???"  # what the terminal lacks is replaced
    child.stdout.read(1)  # it generates
    if stop == "interrupt":
        child.send_signal(signal.SIGINT)
    else:
        child.stdout.close()
    assert child.wait(60) == (130 if stop == "interrupt" else 0)
    assert child.stderr.read().strip() == b""


def test_an_option_without_effect_is_one_line(say):
    options = ("--temperature", "--num-samples", "--beam-width", "--length-penalty")
    for decode, option in zip(("greedy", "beam", "top-k", "nucleus"), options):
        error = f"{option} has no effect with --decode {decode}, only with "
        assert error in say("--decode", decode, option, 1)
    assert "--seed has no effect with --decode greedy" in say("--decode", "greedy", "--seed", 1)
    assert say("--decode", "all", "--beam-width", 2, "--prompt", "the").count("tokens/s)") == 5


@pytest.mark.parametrize(
    "option, values, bounds",
    [
        ("--max-new-tokens", (0, -1, 1_000_001), "from 1 to 1,000,000"),
        ("--num-samples", (0, 1_000_001), "from 1 to 1,000,000"),
        ("--seed", (-1, 2**64), "from 0 to 9,223,"),
        ("--temperature", (-0.1, "nan", "inf"), "from 0 to 1,000"),
        ("--top-k", (-1,), "from 0 to 1,000,000"),
        ("--top-p", (-0.1, 1.1, "nan"), "from 0 to 1"),
        ("--beam-width", (0,), "from 1 to 10,000"),
        ("--length-penalty", (10.5, "nan"), "from -10 to 10"),
    ],
)
def test_a_number_out_of_range_is_one_line_with_the_option_and_its_range(
    option, values, bounds, say
):
    decode = "beam" if option in ("--beam-width", "--length-penalty") else "nucleus"
    for value in values:
        line = say("--decode", decode, "--prompt", "the", option, value)
        assert re.match(rf"sample.py: {option} {value}: .* {bounds}", line)
    assert f"{option}: invalid" in say(option, "many")


def test_what_cannot_be_used_is_one_line(say, ckpt, tmp_path):
    assert "--prompt-file: not allowed with" in say("--prompt", "the", "--prompt-file", "no.txt")
    for option in ("--decode", "--device", "--prompt-file", "--ckpt"):
        assert "nothing" in say(option, "nothing")
    assert "<blank>" in say("--prompt", "def <blank>(")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert "latin.txt is not UTF-8" in say("--prompt-file", tmp_path / "latin.txt")
    path = changed(ckpt, tmp_path / "named.pt", tokenizer={"name": "nothing", "ranks": ""})
    assert "tokenizer nothing" in say("--ckpt", path)


def test_without_a_checkpoint_the_newest_is_taken_and_a_wrong_one_lists_those_that_exist(
    ckpt, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    always = ["--prompt", "the", "--max-new-tokens", "5", "--dtype", "float32"]
    for options in (always, [*always, "--ckpt", "out/a"]):
        with pytest.raises(SystemExit) as e:
            sample.main(options)
        assert "no checkpoint" in e.value.code and "python gpt2.py --preset demo" in e.value.code
    for n, name in enumerate(("out/old/best.pt", "out/new run/deep/ckpt.pt", "out/old/ckpt.pt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"damaged")
        os.utime(path, (n, 1000 - n))  # by the time of their last change, the first is the newest
    (tmp_path / "out/old/best.pt").write_bytes(ckpt.read_bytes())
    sample.main(always)
    out, err = capsys.readouterr()
    assert out.startswith("the") and err.startswith("(the newest checkpoint: out/old/best.pt)\n")
    for wrong in ("out/new", "out/old", str(tmp_path)):
        with pytest.raises(SystemExit) as e:
            sample.main([*always, "--ckpt", wrong])
        names = "out/old/best.pt, out/new run/deep/ckpt.pt, out/old/ckpt.pt"
        assert e.value.code.startswith(f"sample.py: {wrong}: ") and e.value.code.endswith(names)


@pytest.mark.parametrize("objective", ["masked", "spans"])
def test_the_command_line_fills_blanks(objective, say, data, tmp_path):
    train("scratch_former", data, tmp_path, "--objective", objective, "--max-steps", 1)
    ckpt = ("--ckpt", tmp_path / "ckpt.pt")
    model, tokenizer = sample.load(tmp_path / "ckpt.pt")
    before, after = (tokenizer.encode_ordinary(part) for part in ("the", " model"))
    text = sample.fill(model, torch.tensor([[*before, 300, *after]]), 20)
    assert say(*ckpt, "--prompt", "the <blank> model") == tokenizer.decode(text[0]) + "\n"
    printed = say(*ckpt, "--prompt", "<blank>model<blank>", "--decode", "all")
    assert printed.count("model") >= 4
    assert ("--- beam" in printed) == (objective == "spans")
    assert "<blank>" in say(*ckpt, "--prompt", "the model")
    most = 64 if objective == "masked" else 63
    assert f"tokens: at most {most} fit" in say(*ckpt, "--prompt", "<blank>" + "model " * 99)
    if objective == "masked":
        assert "(1 tokens, " in printed or "(2 tokens, " in printed
        assert "one at a time" in say(*ckpt, "--prompt", "<blank>", "--decode", "beam")


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal as Linux has it")
def test_a_terminal_has_a_history_and_underlines_what_is_filled_in(data, tmp_path):
    train("scratch_former", data, tmp_path, "--objective", "masked", "--max-steps", 1)
    ours, child_side = pty.openpty()
    command = [sys.executable, ROOT / "sample.py", "--ckpt", tmp_path / "ckpt.pt"]
    env = os.environ | {"TERM": "dumb"}
    pipes = dict(stdin=child_side, stdout=child_side, stderr=child_side)
    child = subprocess.Popen([*command, "--dtype", "float32"], env=env, **pipes)
    os.close(child_side)

    def answer(keys):
        """Types the keys, and returns what is on the terminal before the next prompt."""
        os.write(ours, keys)
        seen = b""
        end = time.monotonic() + 60
        while not seen.endswith(b"prompt (Ctrl-D ends)> "):
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 1000)
        return seen.decode()

    try:
        answer(b"")
        assert "has to be in a prompt" in answer(b"the model\n")
        first = answer(b"the <blank> model\n")
        text = re.search(r"the\x1b\[4m.+\x1b\[24m model", first)[0]
        again = answer(b"\x1b[A\n")  # arrow up
        assert text in again and "^[[A" not in again
        os.write(ours, b"\x04")  # Ctrl-D
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
