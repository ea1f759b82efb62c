"""Decoders give the texts that Hugging Face, exhaustive search and exact distributions give; the command line obeys."""

import io
import itertools
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from test_gpt2 import as_hugging_face, random_model
from transformers import GenerationConfig

import gpt2
import sample
from prepare_data import load_tokenizer

DRAWING = ("top-k", "temperature", "nucleus")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are faster without others to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=0, **config):
    """A network of peaked distributions: the likeliest of 12 tokens has about half the mass."""
    config = {"vocab_size": 12, "block_size": 16, "n_embd": 16, "n_head": 2, **config}
    return random_model(seed, std=0.4, **config)


def tokens(*shape, vocab_size=12, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Ahead4(nn.Module):
    """The contract of a model file with ahead = 4 and nothing more: token p is scored by its position and by all tokens
    up to p - 4. Before the text stands nothing, so that the first tokens are scored by their position alone."""

    ahead = 4

    def __init__(self, seed=0, vocab_size=12, block_size=16):
        super().__init__()
        torch.manual_seed(seed)
        self.cfg = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.position = nn.Parameter(torch.randn(block_size + 4, vocab_size))
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size))

    def forward(self, idx, cache=None):
        if cache is not None:
            cache.tokens = idx = torch.cat([cache.tokens, idx], dim=1)
        B, T = idx.shape
        assert T <= self.cfg.block_size
        read = self.table[idx].cumsum(1)  # (B, T, V), row i has read tokens 0..i and scores token i + 4
        if cache is None:
            return read + self.position[4 : T + 4]
        read = torch.cat([read.new_zeros(B, 4, read.size(2)), read], dim=1)
        return read[:, -4:] + self.position[T : T + 4]

    def new_cache(self, batch_size):
        return Ahead4Cache(batch_size)


class Ahead4Cache:
    def __init__(self, batch_size):
        self.tokens = torch.zeros(batch_size, 0, dtype=torch.long)

    @property
    def length(self):
        return self.tokens.size(1)

    def select(self, rows):
        self.tokens = self.tokens[rows]


# --- greedy and beam search


def scored(model, prompt, n, eot, length_penalty):
    """The best text of up to n tokens after a prompt (T), found by scoring all there are."""
    V = model.cfg.vocab_size
    texts = torch.tensor(list(itertools.product(range(V), repeat=n)))
    idx = torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        logp = model(idx).double().log_softmax(-1)[:, : -model.ahead][:, -n:]  # row i: of token i + ahead
    logp = logp.gather(2, texts[:, :, None])[:, :, 0]  # (V^n, n)
    scores = {}
    for text, row in zip(texts.tolist(), logp.tolist(), strict=True):
        length = text.index(eot) + 1 if eot in text else n
        scores[tuple(text[:length])] = sum(row[:length]) / length**length_penalty
    return max(scores, key=scores.get)


@pytest.fixture(scope="module")
def pairs():
    """(our network, Hugging Face's of the same weights, prompts (B, T), eot). In float64 rounding decides no tie."""
    pairs = []
    for seed in range(18):
        vocab_size = [6, 12, 30][seed % 3]
        eot = vocab_size - 1
        model = tiny(seed, vocab_size=vocab_size, n_layer=1 + seed % 2).double()
        with torch.no_grad():
            model.wte.weight[eot] *= 3  # often the best token or the worst: some texts end early
        prompts = tokens(1 + seed // 3 % 2, 1 + seed % 5, vocab_size=vocab_size, seed=seed)
        pairs.append((model, as_hugging_face(model), prompts, eot))
    return pairs


@pytest.mark.parametrize("width, length_penalty", [(1, 1.0), *itertools.product((3, 5), (0.0, 1.0, 2.0))])
def test_greedy_and_beam_equal_hugging_face_token_for_token(pairs, width, length_penalty):
    config = GenerationConfig(do_sample=False, max_new_tokens=10)
    if width > 1:
        config.update(num_beams=width, early_stopping="never", length_penalty=length_penalty)
    ended_early = 0
    for model, theirs, idx, eot in pairs:
        for end in (None, eot):
            config.update(eos_token_id=end, pad_token_id=eot)
            expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config)
            expected = expected[:, idx.size(1) :]
            ours = sample.generate(model, idx, 10, "beam", beam_width=width, length_penalty=length_penalty, eot=end)
            assert ours.tolist() == expected.tolist()
            if width == 1:
                assert sample.generate(model, idx, 10, "greedy", eot=end).tolist() == expected.tolist()
            if end is None:
                assert expected.size(1) == 10
            else:
                ended_early += bool(expected.size(1) < 10 or (expected[:, :-1] == eot).any())
    assert ended_early >= 4  # of 18


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eot", [None, 0])
@pytest.mark.parametrize("make, V, n", [(tiny, 4, 4), (Ahead4, 2, 8)])
def test_a_beam_wide_enough_is_exhaustive_search(make, V, n, eot, length_penalty):
    lengths = set()
    for seed in range(10):
        model = make(seed, vocab_size=V)
        idx = tokens(2, 5, vocab_size=V, seed=seed)
        new = sample.generate(model, idx, n, "beam", beam_width=V ** (n - 1), length_penalty=length_penalty, eot=eot)
        best = [scored(model, prompt, n, eot, length_penalty) for prompt in idx]
        longest = max(map(len, best))
        assert new.tolist() == [[*text] + [eot] * (longest - len(text)) for text in best]
        lengths |= {*map(len, best)}
    assert len(lengths) == 1 if eot is None else len(lengths) > 1


# --- what is drawn, and how often


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from, one id at a time: temperature, then top-k, then nucleus."""
    weights = [math.exp(x / temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i] / total
            if mass >= top_p:
                break
        kept = nucleus
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def fits(counts, expected):
    """Pearson's chi-squared test: False if counts as odd as these are rarer than 1 in 10,000."""
    n = sum(counts)
    assert all(c == 0 for c, p in zip(counts, expected, strict=True) if p == 0)
    cells = sorted(((c, n * p) for c, p in zip(counts, expected, strict=True) if p > 0), key=lambda cell: cell[1])
    while len(cells) > 1 and cells[0][1] < 5:  # too few to be near normal: put the rarest two together
        (c, e), (d, f) = cells[:2]
        cells = sorted([(c + d, e + f), *cells[2:]], key=lambda cell: cell[1])
    statistic, df = sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1
    assert df > 0
    # Wilson and Hilferty 1931: the cube root of chi-squared / df is nearly normal; 3.719 cuts off 1e-4 of it.
    return statistic < df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3


def count_pairs(model, prompt, n, **options):
    """How often each pair of tokens follows in n samples of a prompt, V * V counts."""
    new = sample.generate(model, prompt.repeat(n, 1), 2, generator=seeded(0), **options)
    V = model.cfg.vocab_size
    return torch.bincount(new[:, 0] * V + new[:, 1], minlength=V * V).tolist()


def exact_pairs(model, prompt, **filters):
    V = model.cfg.vocab_size
    with torch.no_grad():
        first = exact(model(prompt)[0, -1].tolist(), **filters)
        second = model(torch.cat([prompt.repeat(V, 1), torch.arange(V)[:, None]], 1))[:, -1].tolist()
    return [p * q for p, logits in zip(first, second, strict=True) for q in exact(logits, **filters)]


@pytest.mark.parametrize(
    "decode, filters",
    [
        ("temperature", {"temperature": 1.0}),
        ("temperature", {"temperature": 0.5}),
        ("temperature", {"temperature": 2.0}),
        ("top-k", {"top_k": 3}),
        ("nucleus", {"top_p": 0.6}),
        ("nucleus", {"temperature": 1.5, "top_k": 5, "top_p": 0.8}),
    ],
)
def test_draws_have_the_exact_distribution(decode, filters):
    model, prompt = random_model(1, std=0.3, vocab_size=8), tokens(1, 4, vocab_size=8)
    counts = count_pairs(model, prompt, 20_000, decode=decode, **filters)
    assert fits(counts, exact_pairs(model, prompt, **filters))


@pytest.mark.parametrize("decode, filters", [("top-k", {"top_k": 50}), ("nucleus", {"top_p": 0.95})])
def test_what_is_not_given_is_50_tokens_or_95_percent(decode, filters):
    model, prompt = random_model(1, std=0.1, vocab_size=60), tokens(1, 4, vocab_size=60)
    new = sample.generate(model, prompt.repeat(20_000, 1), 1, decode, generator=seeded(0))[:, 0]
    with torch.no_grad():
        expected = exact(model(prompt)[0, -1].tolist(), **filters)
    assert 0 in expected and fits(torch.bincount(new, minlength=60).tolist(), expected)


def test_the_chi_squared_test_can_tell():
    model, prompt = random_model(1, std=0.3, vocab_size=8), tokens(1, 4, vocab_size=8)
    counts = count_pairs(model, prompt, 20_000, decode="temperature", temperature=1.0)
    assert not fits(counts, exact_pairs(model, prompt, temperature=1.1))
    assert not fits(counts, exact_pairs(model, prompt, temperature=0.9))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.3, 0.9, 1.0])
def test_probabilities_equal_the_obvious_loop(temperature, top_k, top_p):
    logits = 2 * torch.randn(20, 10, generator=seeded(0))
    probs = sample.probabilities(logits, temperature, top_k, top_p)
    expected = torch.tensor([exact(row, temperature, top_k, top_p) for row in logits.tolist()])
    assert torch.allclose(probs, expected, atol=1e-6)
    assert ((probs > 0) == (expected > 0))[expected.gt(1e-6) | expected.eq(0)].all()  # top_p = 1 rounds the tail away


def test_filters_come_in_the_order_temperature_top_k_nucleus():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Top-k first leaves 4/7 to the first, more than half: it is the nucleus. Nucleus first would keep two.
    assert (sample.probabilities(logits, top_k=2, top_p=0.5) > 0).sum() == 1
    # At temperature 1/2 the first has 16/30. Nucleus before temperature would keep two.
    assert (sample.probabilities(logits, temperature=0.5, top_p=0.5) > 0).sum() == 1


@pytest.mark.parametrize("k", [1, 2, 5, 7, 8, 9])
def test_top_k_keeps_exactly_k_of_equals(k):
    for logits in (torch.zeros(3, 8), torch.tensor([[1.0, 2, 2, 2, 2, 2, 0, 0]])):
        probs = sample.probabilities(logits, top_k=k)
        assert ((probs > 0).sum(-1) == min(k, 8)).all()
        assert torch.allclose(probs.sum(-1), torch.ones(len(logits)))


def test_nucleus_keeps_the_token_that_crosses_and_never_less_than_one():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    nuclei = {0.0: [1], 0.1: [1], 0.49: [1], 0.51: [1, 3], 0.74: [1, 3], 0.76: [1, 2, 3], 1.0: [0, 1, 2, 3]}
    for top_p, kept in nuclei.items():
        probs = sample.probabilities(logits, top_p=top_p)[0]
        assert probs.nonzero().flatten().tolist() == kept
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), logits.exp()[0, kept])
        assert torch.allclose(probs, expected / expected.sum())
    equal = sample.probabilities(torch.zeros(1, 8), top_p=0.3)  # 3/8 is the smallest mass that reaches it
    assert (equal > 0).sum() == 3


# --- the cache


def test_cached_logits_equal_plain_ones_for_every_split_in_two():
    model, idx = tiny(), tokens(2, 16)
    with torch.no_grad():
        plain = model(idx)
        for t in range(1, 16):
            cache = model.new_cache(2)
            assert torch.allclose(model(idx[:, :t], cache=cache)[:, 0], plain[:, t - 1], atol=1e-5)
            assert torch.allclose(model(idx[:, t:], cache=cache)[:, 0], plain[:, -1], atol=1e-5)
            assert cache.length == 16


def test_cached_logits_equal_plain_ones_token_by_token():
    model, idx = tiny(), tokens(2, 16)
    cache = model.new_cache(2)
    with torch.no_grad():
        rows = [model(idx[:, t : t + 1], cache=cache) for t in range(16)]
        assert torch.allclose(torch.cat(rows, dim=1), model(idx), atol=1e-5)


@pytest.mark.parametrize("rows", [[1], [2, 0, 1], [0, 0, 0, 0], [2, 2, 0]])
def test_selected_rows_go_on_each_by_itself(rows):
    model, idx = tiny(), tokens(3, 8)
    cache = model.new_cache(3)
    new = tokens(len(rows), 8, seed=1)  # rows that were the same until now go apart
    with torch.no_grad():
        model(idx, cache=cache)
        cache.select(rows)
        assert cache.length == 8
        for t in range(8):
            text = torch.cat([idx[rows], new[:, : t + 1]], dim=1)
            assert torch.allclose(model(new[:, t : t + 1], cache=cache)[:, 0], model(text)[:, -1], atol=1e-5)


@pytest.mark.parametrize("decode", sample.DECODERS)
@pytest.mark.parametrize("make", [tiny, Ahead4])
@pytest.mark.parametrize("alike", [True, False])
def test_same_text_with_and_without_the_cache_far_past_block_size(make, decode, alike):
    for T in (4, 33):
        model, idx = make(T), tokens(1, T).repeat(3, 1) if alike else tokens(3, T)
        for eot in (None, 0):
            cached, plain = (
                sample.generate(model, idx, 30, decode, generator=seeded(T), eot=eot, use_cache=use_cache)
                for use_cache in (True, False)
            )
            assert cached.equal(plain)
            assert cached.shape == (3, 30) or eot is not None


def test_same_text_with_and_without_the_cache_after_a_prompt_shorter_than_ahead():
    model = Ahead4()
    for T, decode in itertools.product((0, 1, 2, 3), sample.DECODERS):
        cached, plain = (
            sample.generate(model, tokens(2, T), 13, decode, generator=seeded(0), eot=5, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert cached.equal(plain), f"{decode} after {T} tokens"


def test_a_window_slides_past_block_size():
    """The new window starts block_size / 2 tokens back and grows until it is full again."""
    model, text = tiny(), tokens(1, 3)
    new = sample.generate(model, text, 60)
    start = 0
    with torch.no_grad():
        for t in range(60):
            if text.size(1) - start > 16:
                start = text.size(1) - 8
            assert new[0, t] == model(text[:, start:])[0, -1].argmax()
            text = torch.cat([text, new[:, t : t + 1]], dim=1)


def test_several_tokens_a_forward_pass_follow_their_own_logits():
    for seed in range(5):
        model, text = Ahead4(seed, block_size=64), tokens(2, 6, seed=seed)
        for n in (1, 3, 4, 5, 20, 22):
            new = sample.generate(model, text, n)
            assert new.shape == (2, n)
            with torch.no_grad():
                logits = model(torch.cat([text, new], dim=1))  # row i scores token i + 4
            assert new.equal(logits.argmax(-1)[:, 6 - 4 : 6 - 4 + n])


def test_several_tokens_a_forward_pass_are_drawn_from_their_own_distributions():
    model, prompt = Ahead4(), tokens(1, 6)
    new = sample.generate(model, prompt.repeat(5000, 1), 4, "temperature", generator=seeded(0))
    with torch.no_grad():
        logits = model(prompt)[0, -4:].tolist()
    for column, row in zip(new.T, logits, strict=True):
        assert fits(torch.bincount(column, minlength=12).tolist(), exact(row))


# --- generate


@pytest.mark.parametrize("decode", DRAWING)
def test_seeds_and_samples(decode):
    model, idx = tiny(), tokens(1, 3).repeat(8, 1)
    first, again, other = (sample.generate(model, idx, 12, decode, generator=seeded(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert len({tuple(row) for row in first.tolist()}) == 8  # a sample is not its neighbour


def test_samples_of_one_prompt_share_greedy_s_text():
    model, idx = tiny(), tokens(1, 3)
    one = sample.generate(model, idx, 30)
    assert sample.generate(model, idx.repeat(3, 1), 30).equal(one.repeat(3, 1))
    other = tokens(1, 3, seed=1)
    both = sample.generate(model, torch.cat([idx, other]), 30)
    assert both.equal(torch.cat([one, sample.generate(model, other, 30)]))


@pytest.mark.parametrize("decode", DRAWING)
def test_temperature_zero_is_greedy(decode):
    model, idx = tiny(), tokens(2, 3)
    assert sample.generate(model, idx, 12, decode, temperature=0).equal(sample.generate(model, idx, 12))


@pytest.mark.parametrize("make", [tiny, Ahead4])
@pytest.mark.parametrize("decode", ["greedy", *DRAWING])
def test_rows_that_ended_are_filled_with_eot(make, decode):
    ragged = 0
    for seed in range(12):
        model, idx = make(seed), tokens(4, 4, seed=seed)
        free = sample.generate(model, idx, 10, decode, generator=seeded(0))
        eot = free[0, 3].item()  # so one row ends within four tokens
        new = sample.generate(model, idx, 10, decode, generator=seeded(0), eot=eot)
        lengths = [row.index(eot) + 1 if eot in row else 10 for row in free.tolist()]
        n = max(lengths)
        assert new.shape == (4, n)  # no column after the last row's end
        for row, text, length in zip(new.tolist(), free.tolist(), lengths, strict=True):
            assert row == text[:length] + [eot] * (n - length)
        ragged += len(set(lengths)) > 1
    assert ragged >= 6


@pytest.mark.parametrize("decode", sample.DECODERS)
def test_an_empty_prompt_starts_from_eot(decode):
    model = tiny()
    new, expected = (
        sample.generate(model, idx, 10, decode, eot=7, generator=seeded(0))
        for idx in (torch.zeros(2, 0, dtype=torch.long), torch.tensor([[7], [7]]))
    )
    assert new.equal(expected)
    with pytest.raises(ValueError, match="eot"):
        sample.generate(model, torch.zeros(2, 0, dtype=torch.long), 10, decode)


@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_dropout_is_off_while_generating_and_as_it_was_afterwards(decode):
    model, idx = tiny(dropout=0.5), tokens(2, 3)
    expected = sample.generate(model, idx, 12, decode)
    assert not model.training
    model.train()
    assert sample.generate(model, idx, 12, decode).equal(expected)
    assert model.training and model.h[0].training


@pytest.mark.parametrize("decode", sample.DECODERS)
def test_no_new_tokens(decode):
    assert sample.generate(tiny(), tokens(2, 3), 0, decode).shape == (2, 0)


def test_what_makes_no_sense_is_refused():
    for option in ("decode=best", "temperature=-1", "top_k=0", "top_p=1.5", "top_p=-0.1", "beam_width=0"):
        name, value = option.split("=")
        with pytest.raises(ValueError, match=name):
            sample.generate(tiny(), tokens(1, 3), 4, **{name: value if name == "decode" else float(value)})


# --- the command line


@pytest.fixture(scope="module")
def ckpt(data, tmp_path_factory):
    """Two steps of training write the checkpoint; then weights so large that every token of a prompt matters."""
    out = tmp_path_factory.mktemp("out")
    shape = "--block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 2 --micro-batch 2 --max-steps 2"
    gpt2.main(f"--data {data} --out {out} --device cpu {shape}".split())
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for name, w in state["model"].items():
        if w.dim() == 2:
            w.normal_(std=0.4, generator=seeded(len(name)))
    torch.save(state, out / "ckpt.pt")
    return out / "ckpt.pt"


@pytest.fixture
def run(ckpt, capsys):
    """run(options) -> what sample.py prints to standard output."""

    def run(*options):
        capsys.readouterr()
        sample.main(["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "20", *map(str, options)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(ckpt):
    """refusal(options) -> the line with which sample.py ends."""

    def refusal(*options):
        with pytest.raises(SystemExit) as end:
            sample.main(["--ckpt", str(ckpt), "--device", "cpu", "--prompt", "the", *map(str, options)])
        assert isinstance(end.value.code, str) and "\n" not in end.value.code  # on stderr, with exit code 1
        return end.value.code

    return refusal


def continuation(ckpt, ids, **options):
    model, tokenizer = sample.load(ckpt)
    new = sample.generate(model, torch.tensor([ids]), 20, eot=tokenizer.eot_token, **options)[0].tolist()
    return tokenizer.decode([i for i in new if i != tokenizer.eot_token])


def test_load_gives_the_weights_and_the_tokenizer(ckpt):
    model, tokenizer = sample.load(ckpt)
    state = torch.load(ckpt, weights_only=True)
    assert not model.training and isinstance(model, gpt2.Model)
    assert all(w.equal(state["model"][name]) for name, w in model.state_dict().items())
    assert tokenizer.decode(tokenizer.encode_ordinary("naïve 你好")) == "naïve 你好"
    assert tokenizer.eot_token == state["tokenizer"]["eot"]


def test_decode_all_prints_a_sample_of_each(run):
    parts = run("--decode", "all", "--prompt", "the model").split("--- ")[1:]
    assert [part.split(" ---\n")[0] for part in parts] == [*sample.DECODERS]
    for part in parts:
        assert part.split(" ---\n")[1].startswith("the model") and "tokens/s)" in part


@pytest.mark.parametrize("options", [{"decode": "greedy"}, {"decode": "beam", "beam_width": 3, "length_penalty": 0.5}])
def test_the_command_line_prints_what_generate_gives(run, ckpt, options):
    ids = sample.load(ckpt)[1].encode_ordinary("the model reads")
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    assert run("--prompt", "the model reads", *flags) == "the model reads" + continuation(ckpt, ids, **options) + "\n"


def test_each_decoder_obeys_its_own_option(run):
    greedy = run("--prompt", "the", "--decode", "greedy")
    for decode, option in (("top-k", "--top-k=1"), ("nucleus", "--top-p=0"), ("temperature", "--temperature=0")):
        assert run("--prompt", "the", "--decode", decode, option) == greedy
        assert run("--prompt", "the", "--decode", decode) != greedy


def test_bfloat16(run):
    assert run("--prompt", "the", "--decode", "all", "--dtype", "bfloat16").count("\nthe") == 5


def test_num_samples_prints_as_many_that_differ(run):
    samples = run("--prompt", "the", "--num-samples", 3, "--decode", "temperature", "--temperature", 1).split("[")[1:]
    assert [s[:6] for s in samples] == ["1] the", "2] the", "3] the"]
    assert len({s[6:] for s in samples}) == 3


def test_the_prompt_comes_from_an_option_a_file_or_standard_input(run, tmp_path, monkeypatch):
    text = "the naïve model\nreads"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    expected = run("--prompt", text)
    assert expected.startswith(text) and len(expected) > len(text) + 1
    assert run("--prompt-file", tmp_path / "prompt.txt") == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run() == expected


def test_a_terminal_is_asked_for_prompt_after_prompt(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("the model\nlearns\n"))
    out = run("--decode", "greedy")
    assert run("--decode", "greedy", "--prompt", "the model") in out
    assert run("--decode", "greedy", "--prompt", "learns") in out


def test_special_tokens_in_a_prompt_are_text(run, ckpt):
    text = "<|endoftext|>"
    tokenizer = sample.load(ckpt)[1]
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.eot_token not in ids
    as_text, as_token = continuation(ckpt, ids), continuation(ckpt, [tokenizer.eot_token])
    assert as_text != as_token
    assert run("--decode", "greedy", "--prompt", text) == text + as_text + "\n"


def test_an_empty_prompt_on_the_command_line(run, ckpt):
    expected = continuation(ckpt, [sample.load(ckpt)[1].eot_token]) + "\n"
    assert run("--decode", "greedy", "--prompt", "") == expected


@pytest.mark.parametrize("decode", sample.DECODERS)
def test_no_cache_prints_the_same_text(run, decode):
    options = ("--decode", decode, "--prompt", "a token", "--num-samples", 2, "--max-new-tokens", 60)
    assert run(*options) == run(*options, "--no-cache")


def test_seed_decides_what_is_drawn(run):
    first, again, other = (run("--prompt", "the", "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("text", ["naïve", "你好, мир", "a 🙂 b 🏳️‍🌈"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_printer_never_cuts_a_character(text, step, capsys):
    printer, ids = sample.Printer(load_tokenizer("bytes")), list(text.encode())
    shown = ""
    for i in range(0, len(ids), step):
        printer(ids[i : i + step])
        shown += capsys.readouterr().out
        assert shown == bytes(ids[: i + step]).decode("utf-8", "ignore")  # every character as soon as it is whole
    printer([], final=True)
    assert shown + capsys.readouterr().out == text + "\n"


def test_printer_replaces_what_never_becomes_a_character(capsys):
    printer = sample.Printer(load_tokenizer("bytes"))
    printer([0x61, 0xFF, 0x62, 0xE4])
    printer([], final=True)
    assert capsys.readouterr().out == "a\ufffdb\ufffd\n"


# --- errors, one line each


@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_truncated_checkpoint(refusal, ckpt, tmp_path, size):
    whole = ckpt.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(size * len(whole)) if size == 0.5 else size])
    assert "cut.pt" in refusal("--ckpt", tmp_path / "cut.pt")


def test_a_text_file_or_another_s_checkpoint(refusal, tmp_path):
    (tmp_path / "notes.txt").write_text("not a checkpoint at all\n")
    assert "notes.txt" in refusal("--ckpt", tmp_path / "notes.txt")
    for i, other in enumerate(({"weights": torch.zeros(2)}, [1, 2], torch.zeros(3), 5)):
        torch.save(other, tmp_path / f"other{i}.pt")
        assert f"other{i}.pt" in refusal("--ckpt", tmp_path / f"other{i}.pt")
    assert "none.pt" in refusal("--ckpt", tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["nobody.py", "prepare_data.py", "../gpt3.py", "", 3])
def test_a_checkpoint_of_an_unknown_model_file(refusal, ckpt, tmp_path, name):
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "model_file": name}, tmp_path / "other.pt")
    assert "other.pt" in refusal("--ckpt", tmp_path / "other.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"n_embd": 15}},
        {"config": {"no_such_field": 1}},
        {"model": {}},
        {"model": None},
        {"tokenizer": {}},
        {"tokenizer": {"name": "bpe:300", "ranks": "no ranks"}},
        {"tokenizer": {"name": "klingon", "ranks": ""}},
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit(refusal, ckpt, tmp_path, change):
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, **change}, tmp_path / "odd.pt")
    refusal("--ckpt", tmp_path / "odd.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_code_in_a_checkpoint_is_not_executed(refusal, ckpt, tmp_path, save):
    state = torch.load(ckpt, weights_only=True)
    fired = tmp_path / "fired"
    save({**state, "step": Bomb(fired)}, tmp_path / "bomb.pt")
    assert "bomb.pt" in refusal("--ckpt", tmp_path / "bomb.pt")
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired)))
    assert fired.exists()  # it would have


def test_a_prompt_file_that_is_missing_or_not_utf_8(refusal, tmp_path):
    assert "nothing.txt" in refusal("--prompt-file", tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert "latin.txt" in refusal("--prompt-file", tmp_path / "latin.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_cuda_where_there_is_none(refusal):
    assert "--device cuda" in refusal("--device", "cuda")


@pytest.mark.parametrize(
    "options",
    [
        "--decode top-k --top-k 0",
        "--decode nucleus --top-p 1.5",
        "--decode temperature --temperature -1",
        "--decode temperature --temperature nan",
        "--decode beam --beam-width 0",
        "--decode best",
        "--num-samples 0",
        "--max-new-tokens -1",
    ],
)
def test_an_option_that_makes_no_sense(refusal, options):
    refusal(*options.split())
    refusal("--num-samples", 2, *options.split())
