"""Decoders agree with Hugging Face, exhaustive search and exact distributions; the command line does what it says."""

import codecs
import io
import itertools
import math
import signal
import subprocess
import sys

import pytest
import torch
from conftest import MODEL_FILES, ROOT, load
from test_gpt2 import as_hugging_face, random_model
from transformers import GenerationConfig

import gpt2
import sample
from prepare_data import load_tokenizer


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tokens(*shape, vocab_size=12, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def tiny(seed=0, **config):
    """A GPT-2 with peaked distributions: the most probable of 12 tokens has about half the mass. In float64 rounding
    decides no tie."""
    config = {"vocab_size": 12, "block_size": 16, "n_layer": 1, "n_embd": 16, "n_head": 2, **config}
    return random_model(seed, std=0.4, **config).double()


# --- greedy, beam search, the window and the cache


@pytest.mark.parametrize("width, length_penalty", [(1, 1.0), (3, 0.0), (3, 1.0), (3, 2.0), (5, 1.0)])
def test_greedy_and_beam_search_equal_hugging_face_token_for_token(width, length_penalty):
    config, ended_early = GenerationConfig(do_sample=False, max_new_tokens=10), 0
    if width > 1:
        config.update(num_beams=width, early_stopping="never", length_penalty=length_penalty)
    for seed in range(12):
        V = [6, 12, 30][seed % 3]
        model, eot, idx = tiny(seed, vocab_size=V), V - 1, tokens(1 + seed % 2, 1 + seed % 5, vocab_size=V, seed=seed)
        with torch.no_grad():
            model.wte.weight[eot] *= 3  # often the best token or the worst: some rows end early
        theirs = as_hugging_face(model)
        for end in (None, eot):
            config.update(eos_token_id=end, pad_token_id=eot)
            expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), generation_config=config)
            expected = expected[:, idx.size(1) :].tolist()
            for decode in ("greedy", "beam") if width == 1 else ("beam",):
                new = sample.generate(model, idx, 10, decode, beam_width=width, length_penalty=length_penalty, eot=end)
                assert new.tolist() == expected
            ended_early += end is not None and any(eot in row for row in expected)
    assert ended_early >= 4


@torch.no_grad()
def slow_search(model, text, n, width=1, eot=None, length_penalty=1.0):
    """Beam search for the next n tokens of a text (T), with a forward pass for every token: greedy if width is 1, and
    exhaustive if it is V^n. A pass gives `model.ahead` tokens; a full window slides by a quarter."""
    running, finished, start, block_size = [(0.0, text)], [], 0, model.cfg.block_size
    for i in range(n):
        if i % model.ahead == 0:
            end = len(text) + i
            start = start if end - start <= block_size else end - block_size * 3 // 4
        logits = model(torch.stack([tokens[start:end] for _, tokens in running]))[:, -model.ahead :][:, i % model.ahead]
        longer = [
            (score + p, torch.cat([tokens, torch.tensor([token])]))
            for (score, tokens), row in zip(running, logits.log_softmax(-1).tolist())
            for token, p in enumerate(row)
        ]
        finished += [(score, tokens) for score, tokens in longer if tokens[-1] == eot]
        running = sorted([(score, tokens) for score, tokens in longer if tokens[-1] != eot], key=lambda x: -x[0])[
            :width
        ]
    best = max(running + finished, key=lambda x: x[0] / (len(x[1]) - len(text)) ** length_penalty)
    return best[1][len(text) :].tolist()


@pytest.mark.parametrize("eot, length_penalty", [(None, 1.0), (0, 0.0), (0, 1.0), (0, 2.0)])
def test_a_beam_that_is_wide_enough_finds_what_exhaustive_search_finds(eot, length_penalty):
    lengths = set()
    for seed in range(8):
        model, idx = tiny(seed, vocab_size=4), tokens(2, 5, vocab_size=4, seed=seed)
        new = sample.generate(model, idx, 4, "beam", beam_width=64, length_penalty=length_penalty, eot=eot)
        best = [slow_search(model, prompt, 4, 256, eot, length_penalty) for prompt in idx]
        assert new.tolist() == [row + [eot] * (new.size(1) - len(row)) for row in best]
        lengths |= {*map(len, best)}
    assert len(lengths) == 1 if eot is None else len(lengths) > 1


@pytest.mark.parametrize("name", MODEL_FILES)
def test_cached_uncached_and_plain_forward_passes_give_the_same_text_while_the_window_slides(name):
    module = load(name)
    block_size = max(32, 2 * getattr(module.Config, "ahead", 1))
    torch.manual_seed(0)
    model = module.Model(module.Config(vocab_size=12, block_size=block_size, n_embd=24, n_head=2)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    idx, n = tokens(2, block_size * 3 // 4), block_size * 5 // 8
    for decode, prompts in itertools.product(sample.DECODERS, (idx, idx[:1].repeat(2, 1))):  # different and equal rows
        for eot in (None, 5):
            options = dict(beam_width=2, eot=eot)
            new = sample.generate(model, prompts, n, decode, **options, generator=seeded(0))
            assert new.equal(
                sample.generate(model, prompts, n, decode, **options, generator=seeded(0), use_cache=False)
            )
            if decode in ("greedy", "beam") and eot is None and prompts is idx:
                assert new.tolist() == [slow_search(model, row, n, 2 if decode == "beam" else 1) for row in idx]


def test_a_long_prompt_keeps_what_leaves_room_for_the_new_tokens(capsys):
    model, text = tiny(), tokens(33)
    for T, n, kept in ((16, 9, 16), (17, 1, 15), (33, 2, 14), (33, 4, 12), (33, 40, 12)):
        new = sample.generate(model, text[None, :T], n)[0].tolist()
        assert new == slow_search(model, text[T - kept : T], n)
        assert (f"first {T - kept} tokens" in capsys.readouterr().err) == (T > 16)


# --- distributions


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from, one id at a time: temperature, then top-k, then nucleus."""
    weights = [math.exp(x / temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        while not nucleus or (mass < top_p and len(nucleus) < len(kept)):
            nucleus.append(kept[len(nucleus)])
            mass += weights[nucleus[-1]] / total
        kept = nucleus
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def filtered(logits, **filters):
    """The distribution that sample.py draws from, (B, V)."""
    weights, ids = sample.candidates(logits, **filters)
    return torch.zeros_like(logits).scatter(1, ids, weights / weights.sum(1, keepdim=True))


def test_the_filters_equal_a_loop_over_ids_and_keep_exactly_what_they_should():
    logits = 2 * torch.randn(20, 10, generator=seeded(0))
    for values in itertools.product((0.5, 1.0, 2.0), (None, 1, 3, 50), (None, 0.0, 0.3, 0.9, 1.0)):
        filters = dict(zip(("temperature", "top_k", "top_p"), values))
        expected, probs = torch.tensor([exact(row, **filters) for row in logits.tolist()]), filtered(logits, **filters)
        assert torch.allclose(probs, expected, atol=1e-6) and (probs > 0).equal(expected > 0), filters
    for k, ties in itertools.product((1, 2, 5, 8, 9), (torch.zeros(1, 8), torch.tensor([[1.0, 2, 2, 2, 2, 2, 0, 0]]))):
        assert (filtered(ties, top_k=k) > 0).sum() == min(k, 8)
    assert (filtered(torch.zeros(1, 8), top_p=0.3) > 0).sum() == 3  # 3/8 is the smallest mass that reaches it
    assert (filtered(torch.zeros(1, 6000), top_p=0.75) > 0).sum() == pytest.approx(4500, abs=1)


def fits(counts, expected):
    """Pearson's chi-squared test: False for counts that are rarer than 1 in 10,000."""
    n = sum(counts)
    assert all(count == 0 for count, p in zip(counts, expected) if p == 0)  # what a filter took out is never drawn
    terms = [(count - n * p) ** 2 / (n * p) for count, p in zip(counts, expected) if n * p >= 5]
    return sum(terms) < len(terms) + 2 * math.sqrt(9.2 * len(terms)) + 18.4  # Laurent and Massart 2000, lemma 1


CASES = [("temperature", {}), ("temperature", {"temperature": 0.5}), ("top-k", {}), ("top-k", {"temperature": 2.0})]
CASES += [("top-k", {"top_k": 9, "top_p": 0.8}), ("nucleus", {}), ("nucleus", {"temperature": 1.5, "top_k": 9})]


@pytest.mark.parametrize("decode, options", CASES)
def test_draws_have_the_exact_distribution(decode, options):
    """Of two tokens in a row, each after its own prefix."""
    V, defaults = 60, {"top-k": {"top_k": 50}, "nucleus": {"top_p": 0.95}}
    filters = {**defaults.get(decode, {}), **options}
    model, prompt = tiny(1, vocab_size=V), tokens(1, 4, vocab_size=V)
    new = sample.generate(model, prompt.repeat(20_000, 1), 2, decode, generator=seeded(0), **options)
    with torch.no_grad():
        first = model(prompt)[0, -1].tolist()
        second = model(torch.cat([prompt.repeat(V, 1), torch.arange(V)[:, None]], 1))[:, -1].tolist()
    expected = [p * q for p, logits in zip(exact(first, **filters), second) for q in exact(logits, **filters)]
    assert fits(torch.bincount(new[:, 0] * V + new[:, 1], minlength=V * V).tolist(), expected)
    if decode == "temperature":  # the test can tell a temperature from a close one
        close = exact(first, 1.1 * filters.get("temperature", 1.0))
        assert not fits(torch.bincount(new[:, 0], minlength=V).tolist(), close)


@pytest.mark.parametrize("decode", sample.DRAWING)
def test_seeds_tiny_temperatures_and_samples_of_one_prompt(decode):
    model, idx = tiny(), tokens(1, 3).repeat(8, 1)
    first, again, other = (sample.generate(model, idx, 12, decode, generator=seeded(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert len({tuple(row) for row in first.tolist()}) == 8  # the samples differ
    for temperature in (0, 1e-46, 1e-38, 1e-10):
        assert sample.generate(model, idx, 12, decode, temperature).equal(sample.generate(model, idx, 12))


@pytest.mark.parametrize("decode", ["greedy", *sample.DRAWING])
def test_rows_that_end_early_are_filled_with_eot(decode):
    ragged = 0
    for seed in range(8):
        model, idx, columns = tiny(seed), tokens(4, 4, seed=seed), []
        free = sample.generate(model, idx, 10, decode, generator=seeded(0)).tolist()
        eot = free[0][3]  # so one row ends within four tokens
        new = sample.generate(model, idx, 10, decode, generator=seeded(0), eot=eot, callback=columns.append)
        lengths = [row.index(eot) + 1 if eot in row else 10 for row in free]
        n = max(lengths)  # no column after the end of the last row
        assert new.tolist() == [row[:length] + [eot] * (n - length) for row, length in zip(free, lengths)]
        assert torch.stack(columns, 1).equal(new)
        ragged += len(set(lengths)) > 1
    assert ragged >= 4


def test_dropout_is_off_and_arguments_out_of_range_are_refused():
    model, idx = tiny(dropout=0.5), tokens(2, 3)
    assert sample.generate(model, idx, 12).equal(sample.generate(model.train(), idx, 12))
    assert all(sample.generate(model, idx, 0, decode).shape == (2, 0) for decode in sample.DECODERS)
    bad = [("decode", "best"), ("top_k", 0), ("beam_width", 0), ("max_new_tokens", -1), ("top_p", 1.5), ("top_p", -0.1)]
    for name, value in [*bad, *(("temperature", value) for value in (-1.0, math.nan, math.inf))]:
        with pytest.raises(ValueError, match=name):
            sample.generate(model, idx, **{"max_new_tokens": 4, name: value})
    for shape in ((3,), (2, 0)):
        with pytest.raises(ValueError, match=r"expected \(B, T\)"):
            sample.generate(model, torch.zeros(shape, dtype=torch.long), 4)


# --- the command line


@pytest.fixture(scope="module")
def ckpt(data, tmp_path_factory):
    """A step of training writes the checkpoint; then weights so large that every token of a prompt matters."""
    path = tmp_path_factory.mktemp("out") / "ckpt.pt"
    shape = "--block-size 32 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 2 --micro-batch 2 --max-steps 1"
    gpt2.main(f"--data {data} --out {path.parent} --device cpu {shape}".split())
    state = torch.load(path, weights_only=True)
    for name, w in state["model"].items():
        state["model"][name] = w.normal_(std=0.4, generator=seeded(len(name))) if w.dim() == 2 else w
    torch.save(state, path)
    return path


@pytest.fixture
def say(ckpt, capsys):
    """say(options) -> what sample.py prints to standard output, or the line on stderr with which it exits, code 1."""

    def say(*options):
        capsys.readouterr()
        try:
            sample.main(["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "20", *map(str, options)])
        except SystemExit as end:
            assert "\n" not in end.code and capsys.readouterr().out == ""
            return end.code
        return capsys.readouterr().out

    return say


@pytest.mark.parametrize(
    "decode, options", [*CASES, ("greedy", {}), ("beam", {"beam_width": 3, "length_penalty": 0.5})]
)
def test_the_command_line_prints_what_generate_returns(say, ckpt, decode, options):
    model, tokenizer = sample.load(ckpt)
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    if decode == "temperature":
        options = {"temperature": 0.7, **options}
    for prompt in ("the naïve model", "<|endoftext|>", ""):  # special tokens in a prompt are plain text
        idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]])
        new = sample.generate(model, idx, 20, decode, **options, eot=tokenizer.eot_token, generator=seeded(1337))
        text = tokenizer.decode([i for i in new[0].tolist() if i != tokenizer.eot_token])
        printed = say("--decode", decode, "--prompt", prompt, *flags)
        assert printed.rstrip("\ufffd\n") == (prompt + text).rstrip("\ufffd\n") and printed[-1] == "\n"


def test_all_decoders_many_samples_and_a_long_prompt(say, ckpt, capsys):
    printed = say("--decode", "all", "--prompt", "the model", "--dtype", "bfloat16", "--top-k", 3, "--no-cache")
    parts = [part.split(" ---\n") for part in printed.split("--- ")[1:]]
    assert [decode for decode, _ in parts] == [*sample.DECODERS]
    assert all(text.startswith("the model") and "tokens/s)" in text for _, text in parts)
    samples = say("--prompt", "the", "--num-samples", 3).split("[")[1:]
    assert [s[:6] for s in samples] == ["1] the", "2] the", "3] the"] and len({s[6:] for s in samples}) == 3
    sample.main(["--ckpt", str(ckpt), "--decode", "all", "--prompt", "the model learns " * 20])
    assert capsys.readouterr().err.count("tokens are left out") == 1


def test_prompts_of_a_session_draw_on_and_the_seed_fixes_the_session(say, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("naïve\nreads", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("naïve\nreads"))
    assert say() == say("--prompt-file", tmp_path / "prompt.txt") == say("--prompt", "naïve\nreads")
    sessions = []
    for seed in (1, 1, 2):
        monkeypatch.setattr("sys.stdin", io.StringIO("the\nthe\n"))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        sessions.append([text.strip() for text in say("--seed", seed).split("prompt (Ctrl-D ends)> ")])
    assert sessions[0] == sessions[1] != sessions[2]
    assert sessions[0][1] != sessions[0][2] and sessions[0][1] == say("--prompt", "the", "--seed", 1).strip()


def test_the_printer_never_cuts_a_character(capsys):
    show, decoder = sample.printer(load_tokenizer("bytes"), ""), codecs.getincrementaldecoder("utf-8")()
    for byte in [*"naïve 你好, мир 🏳️‍🌈".encode(), 0xFF, 0x62]:
        show(torch.tensor([byte]))
        expected = decoder.decode(bytes([byte])) if byte != 0xFF else "\ufffd"
        assert capsys.readouterr().out == expected  # every character as soon as it is complete


@pytest.mark.parametrize("stop", ["interrupt", "close"])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(ckpt, stop):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the", "--max-new-tokens", "1000000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(3)
    child.send_signal(signal.SIGINT) if stop == "interrupt" else child.stdout.close()
    assert child.wait(60) == (130 if stop == "interrupt" else 0)
    assert child.stderr.read().strip() == b""


@pytest.mark.parametrize(
    "options, message",
    [
        ("--decode greedy --temperature 1", "--temperature has no effect with --decode greedy"),
        ("--decode beam --num-samples 2", "--num-samples has no effect with --decode beam"),
        ("--decode top-k --beam-width 2", "--beam-width has no effect with --decode top-k, only with beam"),
        ("--prompt the --prompt-file prompt.txt", "not allowed with"),
        ("--prompt the --top-k 0", "top_k"),
        ("--num-samples 0", "--num-samples"),
        ("--decode best", "--decode"),
        ("--prompt-file nothing.txt", "nothing.txt"),
        ("--ckpt nothing.pt", "nothing.pt: no such checkpoint"),
        ("--device nothing", "--device nothing"),
    ],
)
def test_options_that_are_out_of_range_or_have_no_effect(say, options, message):
    assert message in say(*options.split())


def test_unusable_checkpoints_and_prompts(say, ckpt, tmp_path, data):
    folder, state = tmp_path / "a folder", torch.load(ckpt, weights_only=True)
    folder.mkdir()
    assert say("--ckpt", folder).endswith("Checkpoints in it: none")
    torch.save({**state, "config": {**state["config"], "no_such_field": 1}}, folder / "key.pt")
    torch.save({**state, "model_file": "gpt3.py"}, folder / "file.pt")
    assert "key.pt does not fit gpt2.py: " in say("--ckpt", folder / "key.pt")
    assert "file.pt does not fit gpt3.py: " in say("--ckpt", folder / "file.pt")
    assert say("--ckpt", folder).endswith(f"'{folder}/file.pt', '{folder}/key.pt'")
    (folder / "text.pt").write_bytes("naïve".encode("latin-1"))
    assert "text.pt: " in say("--ckpt", folder / "text.pt")
    assert "text.pt is not UTF-8" in say("--prompt-file", folder / "text.pt")
    for name, error in (("text", ValueError), ("none", FileNotFoundError)):  # the same in a Python session
        with pytest.raises(error, match=rf"{name}\.pt: "):
            sample.load(folder / f"{name}.pt")
    exhibit = f"--data {data} --expander sequence --block-size 64 --max-steps 1 --device cpu --n-embd 12 --n-head 2"
    load("conv_attention").main([*exhibit.split(), "--out", str(folder / "exhibit")])
    assert "cannot sample" in say("--ckpt", folder / "exhibit" / "ckpt.pt", "--prompt", "the")
