"""Decoders agree with Hugging Face, exhaustive search and exact distributions; the command line does what it says."""

import copy
import io
import itertools
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import MODEL_FILES, ROOT, load, train
from test_gpt2 import as_hugging_face, random_model

import gpt2
import sample
import scratch_former
from prepare_data import load_tokenizer


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tokens(*shape, vocab_size=12, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def tiny(seed=0, **config):
    """A GPT-2 whose most probable token of 12 has about half the mass. In float64, rounding decides no tie."""
    config = {"vocab_size": 12, "block_size": 16, "n_layer": 1, "n_embd": 16, "n_head": 2, **config}
    return random_model(seed, std=0.4, **config).double()


@pytest.mark.parametrize("width, length_penalty", [(1, 1.0), (3, 0.0), (3, 1.0), (3, 2.0), (5, 1.0)])
def test_greedy_and_beam_search_equal_hugging_face_token_for_token(width, length_penalty):
    """Greedy is also what a beam of width 1 gives, and what drawing gives at a temperature of 0, or almost 0."""
    theirs = dict(num_beams=width, early_stopping="never", length_penalty=length_penalty, do_sample=False)
    ended_early = 0
    for seed, end in itertools.product(range(12), (False, True)):
        V = [6, 12, 30][seed % 3]
        model, eot, idx = tiny(seed, vocab_size=V), V - 1, tokens(1 + seed % 2, 1 + seed % 5, vocab_size=V, seed=seed)
        model.wte.weight.data[eot] *= 3  # often the best token or the worst: some rows end early
        theirs |= dict(max_new_tokens=10, eos_token_id=eot if end else None, pad_token_id=eot)
        new = as_hugging_face(model).generate(idx, attention_mask=torch.ones_like(idx), **theirs)[:, idx.size(1) :]
        ours = dict(beam_width=width, length_penalty=length_penalty, eot=eot if end else None)
        for decode in sample.DECODERS if width == 1 else ["beam"]:
            temperature = (0, 1e-46, 1e-38, 1e-10)[seed % 4]
            assert sample.generate(model, idx, 10, decode, temperature, **ours).equal(new)
        ended_early += end and (new == eot).any().item()
    assert ended_early >= 4


@torch.no_grad()
def slow_search(model, text, n, width=1, eot=None, length_penalty=1.0):
    """Beam search for the next n tokens of a text (T), with a forward pass for every token: greedy if width is 1, and
    exhaustive if it is V^n. A pass gives `model.ahead` tokens; a full window slides by a quarter."""
    running, finished, start, T = [(0.0, text.tolist())], [], 0, len(text)
    for i in range(n):
        if i % model.ahead == 0 and T + i - start > model.cfg.block_size:
            start = T + i - model.cfg.block_size * 3 // 4
        end = T + i - i % model.ahead
        logits = model(torch.tensor([tokens[start:end] for _, tokens in running]))[:, -model.ahead :]
        logp = logits[:, i % model.ahead].log_softmax(-1).tolist()
        longer = [(score + p, [*old, v]) for (score, old), row in zip(running, logp) for v, p in enumerate(row)]
        finished += [x for x in longer if x[1][-1] == eot]
        running = sorted((x for x in longer if x[1][-1] != eot), reverse=True)[:width]
    return max(running + finished, key=lambda x: x[0] / (len(x[1]) - T) ** length_penalty)[1][T:]


@pytest.mark.parametrize("eot, length_penalty", [(None, 1.0), (0, 0.0), (0, 1.0), (0, 2.0)])
def test_a_beam_that_is_wide_enough_finds_what_exhaustive_search_finds(eot, length_penalty):
    for seed in range(8):
        model, idx = tiny(seed, vocab_size=4), tokens(2, 5, vocab_size=4, seed=seed)
        new = sample.generate(model, idx, 4, "beam", beam_width=64, length_penalty=length_penalty, eot=eot)
        best = [slow_search(model, prompt, 4, 256, eot, length_penalty) for prompt in idx]
        assert new.tolist() == [row + [eot] * (new.size(1) - len(row)) for row in best]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_cached_uncached_and_plain_forward_passes_give_the_same_text_while_the_window_slides(name):
    module = load(name)
    block_size = max(32, 2 * getattr(module.Config, "ahead", 1))
    torch.manual_seed(0)
    model = module.Model(module.Config(vocab_size=12, block_size=block_size, n_embd=24, n_head=2)).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    idx, n = tokens(2, block_size * 3 // 4), block_size * 7 // 8

    def both(prompts, **options):
        options |= dict(max_new_tokens=n, beam_width=4)
        new = sample.generate(model, prompts, **options, generator=seeded(0))
        assert new.equal(sample.generate(model, prompts, **options, generator=seeded(0), use_cache=False))
        return new.tolist()

    for decode in sample.DECODERS:
        free = both(idx, decode=decode)
        if decode in ("greedy", "beam"):
            assert free == [slow_search(model, row, n, 4 if decode == "beam" else 1) for row in idx]
        both(idx, decode=decode, eot=free[0][3])
        both(idx[:1].expand(3, -1), decode=decode)  # equal rows are computed once


def test_a_cached_step_computes_new_tokens_only_and_equal_prompts_once():
    model, idx, shapes = tiny(), tokens(1, 3).expand(2, -1), []
    model.register_forward_pre_hook(lambda model, args: shapes.append(tuple(args[0].shape)))
    for use_cache in (True, False):
        sample.generate(model, idx, 3, "nucleus", generator=seeded(1), use_cache=use_cache)
    assert shapes == [(1, 3), (2, 1), (2, 1), (1, 3), (2, 4), (2, 5)]


def test_a_long_prompt_keeps_what_leaves_room_for_the_new_tokens(capsys):
    model, text = tiny(), tokens(33)
    for T, n, kept in ((16, 9, 16), (17, 1, 15), (33, 2, 14), (33, 4, 12), (33, 40, 12)):
        new = sample.generate(model, text[None, :T], n)[0].tolist()
        assert new == slow_search(model, text[T - kept : T], n)
        assert (f"first {T - kept} tokens" in capsys.readouterr().err) == (T > 16)


# --- blanks


def for_blanks(objective, seed=0):
    """A network of scratch_former.py with peaked distributions, in float64, which takes up to two spans."""
    torch.manual_seed(seed)
    cfg = dict(vocab_size=5, block_size=16, n_layer=1, n_embd=16, n_head=2, n_ff=32, hide=0.4, objective=objective)
    model = scratch_former.Model(scratch_former.Config(**cfg)).double().eval()
    for p in model.parameters():
        p.data += 0.5 * torch.randn(p.shape)
    return model


@torch.no_grad()
def test_greedy_and_beam_search_for_spans_equal_a_brute_force_search():
    """Two blanks: their sentinels are 5 and 6, and 7 ends the second span."""
    prompt, outcomes = torch.tensor([[1, 5, 2, 3, 5, 0]]), set()
    for seed, penalty in itertools.product(range(6), (0.0, 1.0)):
        model = for_blanks("spans", seed)
        source = model.run(model.encoder, torch.tensor([[1, 5, 2, 3, 6, 0]]), causal=False)

        def logp(texts, model=model, source=source):  # of the tokens after 5 and of what follows, (B, T + 1, V)
            idx = torch.tensor([[5, *text] for text in texts])
            memory = [block.cross.keys_and_values(source.expand(len(idx), -1, -1)) for block in model.h]
            return model.head(model.run(model.h, idx, True, memory=memory))[..., :8].log_softmax(-1)

        scores, greedy = {}, []
        for n in range(1, 5):  # all texts that end with 7, or have 4 tokens
            texts = [t for t in itertools.product(range(8), repeat=n) if 7 not in t[:-1] and (n == 4 or t[-1] == 7)]
            total = logp(texts)[:, :-1].gather(2, torch.tensor(texts)[:, :, None]).sum((1, 2)) / n**penalty
            scores |= dict(zip(texts, total.tolist()))
            greedy += [] if 7 in greedy else [logp([greedy])[0, -1].argmax().item()]
        for decode, best in (("greedy", greedy), ("beam", max(scores, key=scores.get))):
            spans = [[*map(int, part)] for part in re.split("[567]", "".join(map(str, best)))]
            expected = [1, *spans[0], 2, 3, *(spans[1] if len(spans) > 1 else []), 0]
            assert sample.fill(model, prompt, 4, decode, beam_width=400, length_penalty=penalty) == [expected]
            outcomes.add(len(best))
    assert len(outcomes) > 1


@torch.no_grad()
def test_masked_tokens_are_named_the_most_certain_first_and_impossible_prompts_are_refused():
    orders = []
    for seed, row in itertools.product(range(3), ([1, 5, 2, 5, 5, 0], [5, 3, 5, 0, 1, 5])):
        model, text = for_blanks("masked", seed), list(row)
        while 5 in text:
            probs = model(torch.tensor([text]))[0].softmax(-1).tolist()
            i = max((i for i, token in enumerate(text) if token == 5), key=lambda i: max(probs[i]))
            text[i] = max(range(5), key=probs[i].__getitem__)
            orders.append(i)
        assert sample.fill(model, torch.tensor([row, row[::-1]]))[0] == text
    assert any(a > b for a, b in itertools.pairwise(orders[:3]))
    drawn = sample.fill(model, torch.tensor([row]).expand(200, -1), decode="top-k", top_k=2, generator=seeded(0))
    assert 2 < len({tuple(text) for text in drawn}) <= 8
    # The window of 16 has room for the source, the first sentinel and one token more: it must not slide.
    assert len(sample.fill(for_blanks("spans"), torch.tensor([[5] + [1] * 13]))[0]) in (13, 14)
    refused = [("masked", [5, 1], "beam", "one at a time"), ("masked", [2, 1], "greedy", "no blanks")]
    refused += [
        ("spans", [5, 5, 5], "greedy", "at most 2 in 15"),
        ("spans", [5] + [1] * 15, "greedy", "at most 2 in 15"),
    ]
    for objective, prompt, decode, error in refused:
        with pytest.raises(ValueError, match=error):
            sample.fill(for_blanks(objective), torch.tensor([prompt]), decode=decode)


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from, one id at a time: temperature, then top-k, then nucleus."""
    weights = [math.exp(x / temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    mass = [*itertools.accumulate(weights[i] for i in kept)]
    kept = kept[: 1 + sum(m < top_p * mass[-1] for m in mass)] if top_p is not None else kept
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def drawn(logits, n, top_k=None, top_p=None, temperature=1.0):
    """How often each id comes in n draws, (B, V)."""
    ids = sample.choose(logits.repeat_interleave(n, 0), "temperature", temperature, top_k, top_p, seeded(0))
    return torch.nn.functional.one_hot(ids.view(-1, n), logits.size(1)).sum(1)


def test_the_filters_equal_a_loop_over_ids_and_keep_exactly_what_they_should():
    logits, n = 2 * torch.randn(20, 10, generator=seeded(0)), 10_000
    for values in itertools.product((0.5, 1.0, 2.0), (None, 1, 3, 50), (None, 0.0, 0.3, 0.9, 1.0)):
        filters = dict(zip(("temperature", "top_k", "top_p"), values))
        p, counts = torch.tensor([exact(row, **filters) for row in logits.tolist()]), drawn(logits, n, **filters)
        bound = (5.4 * (n * p * (1 - p)).sqrt() + 4.8) * (p > 0)  # Bernstein's inequality: one in a million is beyond
        assert (abs(counts - n * p) <= bound + 1e-3).all(), filters
    for k, ties in itertools.product((1, 2, 5, 8, 9), (torch.zeros(1, 8), torch.tensor([[1.0, 2, 2, 2, 2, 2, 0, 0]]))):
        assert (drawn(ties, n, top_k=k) > 0).sum() == min(k, 8)
    assert (drawn(torch.zeros(1, 8), n, top_p=0.3) > 0).sum() == 3  # 3/8 is the smallest mass that reaches it
    assert (drawn(torch.zeros(1, 600), 20_000, top_p=0.75) > 0).sum() == pytest.approx(450, abs=1)


CASES = [("temperature", {}), ("temperature", {"temperature": 0.5}), ("top-k", {}), ("top-k", {"temperature": 2.0})]
CASES += [("top-k", {"top_k": 9, "top_p": 0.8}), ("nucleus", {}), ("nucleus", {"temperature": 1.5, "top_k": 9})]
CASES += [("greedy", {}), ("beam", {"beam_width": 3, "length_penalty": 0.5})]


@pytest.mark.parametrize("decode, options", CASES[:-2])
def test_draws_have_the_exact_distribution(decode, options):
    filters = {**{"top-k": {"top_k": 50}, "nucleus": {"top_p": 0.95}}.get(decode, {}), **options}
    model, prompt, n = tiny(1, vocab_size=60), tokens(1, 4, vocab_size=60), 20_000
    new = sample.generate(model, prompt.expand(n, -1), 1, decode, generator=seeded(0), **options)[:, 0]
    for count, p in zip(torch.bincount(new, minlength=60).tolist(), exact(model(prompt)[0, -1].tolist(), **filters)):
        bound = 5.4 * math.sqrt(n * p * (1 - p)) + 4.8  # Bernstein's inequality: exceeded once in a million counts
        assert abs(count - n * p) <= (bound if p > 0 else 0)  # what a filter took out is never drawn


def test_dropout_is_off_equal_logits_and_arguments_out_of_range():
    model, idx = tiny(dropout=0.5), tokens(2, 3)
    assert sample.generate(model, idx, 12).equal(sample.generate(model.train(), idx, 12))
    assert all(sample.generate(model, idx, 0, decode).shape == (2, 0) for decode in sample.DECODERS)
    temperatures = [{"temperature": value} for value in (-1.0, math.nan, math.inf)]
    for wrong in [*temperatures, {"top_p": 1.5}, {"top_p": -0.1}, {"top_k": 0}]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample.generate(model, idx, 4, "nucleus", **wrong)
    for shape in ((3,), (2, 0)):
        with pytest.raises(ValueError, match=r"expected \(B, T\)"):
            sample.generate(model, torch.zeros(shape, dtype=torch.long), 4)
    torch.nn.init.zeros_(model.wte.weight)  # all logits are equal
    assert sample.generate(model, idx, 12, "nucleus", temperature=0).equal(sample.generate(model, idx, 12))


@pytest.fixture(scope="module")
def ckpt(data, tmp_path_factory):
    """A step of training writes the checkpoint; then weights so large that every token of a prompt matters."""
    path = tmp_path_factory.mktemp("out") / "ckpt.pt"
    train("gpt2", data, path.parent, "--block-size", 32, "--n-layer", 1, "--max-steps", 1)
    state = torch.load(path, weights_only=True)
    for w in state["model"].values():
        w.normal_(std=0.4, generator=seeded(w.numel()))
    torch.save(state, path)
    return path


@pytest.fixture
def say(ckpt, capsys):
    """say(options) -> what sample.py prints to standard output, or the line on stderr with which it exits, code 1."""

    def say(*options):
        capsys.readouterr()
        try:
            sample.main(["--ckpt", str(ckpt), "--dtype", "float32", "--max-new-tokens", "20", *map(str, options)])
        except SystemExit as end:
            assert "\n" not in end.code and capsys.readouterr().out == ""
            return end.code
        return capsys.readouterr().out

    return say


@pytest.mark.parametrize("decode, options", CASES)
def test_the_command_line_prints_what_generate_returns(say, ckpt, decode, options):
    model, tokenizer = sample.load(ckpt)
    flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    options = {"temperature": 0.7, **options} if decode == "temperature" else options
    for prompt in ("the naïve model", "<|endoftext|>", ""):  # special tokens in a prompt are plain text
        idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]])
        new = sample.generate(model, idx, 20, decode, **options, eot=tokenizer.eot_token, generator=seeded(1337))
        text = tokenizer.decode([i for i in new[0].tolist() if i != tokenizer.eot_token])
        printed = say("--decode", decode, "--prompt", prompt, *flags)
        assert printed.rstrip("\ufffd\n") == (prompt + text).rstrip("\ufffd\n") and printed[-1] == "\n"


def test_all_decoders_many_samples_no_cache_and_a_long_prompt(say, ckpt, capsys, monkeypatch):
    printed = say("--decode", "all", "--prompt", "the model", "--dtype", "bfloat16", "--top-k", 3)
    parts = [part.split(" ---\n") for part in printed.split("--- ")[1:]]
    assert [decode for decode, _ in parts] == [*sample.DECODERS]
    assert all(text.startswith("the model") and "tokens/s)" in text for _, text in parts)
    samples = say("--prompt", "the", "--num-samples", 40, "--temperature", 2).split("\n[")
    assert [text[: text.index("] the")] for text in samples] == ["[1", *map(str, range(2, 41))]
    assert len({text.split("] ", 1)[1] for text in samples}) == 40 and "<|endoftext|>" not in str(samples)
    caches, new_cache = [], gpt2.Model.new_cache
    monkeypatch.setattr(gpt2.Model, "new_cache", lambda self, n: caches.append(n) or new_cache(self, n))
    assert say("--prompt", "the") == say("--prompt", "the", "--no-cache") and len(caches) > 2
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
    show, data, printed = sample.printer(load_tokenizer("bytes"), "> "), "naïve 你好, мир 🏳️‍🌈".encode(), ""
    for i, token in enumerate([*data, 256], 1):  # at last the end of text, which is not printed
        show(torch.tensor([token]))
        printed += capsys.readouterr().out
        assert printed == "> " + data[:i].decode(errors="ignore")  # every character as soon as it is complete


@pytest.mark.parametrize("stop", ["interrupt", "close"])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(ckpt, stop):
    command = [sys.executable, "-E", ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the", "--max-new-tokens", "99999"]
    listens = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also if pytest ignores Ctrl-C
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **listens)
    child.stdout.read(3)
    child.send_signal(signal.SIGINT) if stop == "interrupt" else child.stdout.close()
    assert child.wait(60) == (130 if stop == "interrupt" else 0)
    assert child.stderr.read().strip() == b""


def test_what_has_no_effect_or_cannot_be_used_is_one_line(say, ckpt, tmp_path):
    options = ("--temperature", "--num-samples", "--beam-width", "--length-penalty")
    for decode, option in zip(("greedy", "beam", "top-k", "nucleus"), options):
        assert f"{option} has no effect with --decode {decode}, only with " in say("--decode", decode, option, 1)
    assert "--prompt-file: not allowed with" in say("--prompt", "the", "--prompt-file", "nothing.txt")
    assert "top_k >= 1" in say("--prompt", "the", "--top-k", 0)
    for option in ("--decode", "--device", "--prompt-file", "--ckpt"):
        assert "nothing" in say(option, "nothing")
    assert "ckpt.pt continues a text: it cannot fill a <blank>" in say("--prompt", "def <blank>(")
    folder, state = tmp_path / "a folder", torch.load(ckpt, weights_only=True)
    folder.mkdir()
    assert say("--ckpt", folder).endswith("Checkpoints in it: none")
    states = {"key": {**state, "config": {"no_such_field": 1}}, "file": {**state, "model_file": "gpt3.py"}}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
        assert f"{name}.pt does not fit {state['model_file']}: " in say("--ckpt", folder / f"{name}.pt")
    assert say("--ckpt", folder).endswith(f"'{folder}/file.pt', '{folder}/key.pt'")
    (folder / "text.pt").write_bytes("naïve".encode("latin-1"))
    assert "text.pt is not UTF-8" in say("--prompt-file", folder / "text.pt")
    for name in ("text", "none"):  # in a Python session, too, an error that can be caught
        assert f"{name}.pt" in say("--ckpt", folder / f"{name}.pt")
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}\.pt"):
            sample.load(folder / f"{name}.pt")


@pytest.mark.parametrize("objective", ["masked", "spans"])
def test_the_command_line_fills_blanks(objective, say, data, tmp_path):
    train("scratch_former", data, tmp_path, "--objective", objective, "--max-steps", 1)
    (model, tokenizer), ckpt = sample.load(tmp_path / "ckpt.pt"), ("--ckpt", tmp_path / "ckpt.pt")
    before, after = (tokenizer.encode_ordinary(part) for part in ("the", " model"))
    text = sample.fill(model, torch.tensor([[*before, 300, *after]]), 20)
    assert say(*ckpt, "--prompt", "the <blank> model") == tokenizer.decode(text[0]) + "\n"
    printed = say(*ckpt, "--prompt", "<blank>model<blank>", "--decode", "all")
    assert printed.count("model") >= 4 and ("--- beam" in printed) == (objective == "spans")
    assert "ckpt.pt fills blanks: the prompt needs a <blank>" in say(*ckpt, "--prompt", "the model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_multiplies_few_rows_as_exactly_as_linear(dtype, ckpt, monkeypatch):
    layers = [layer for layer in sample.load(ckpt)[0].modules() if type(layer) is torch.nn.Linear]
    assert len(layers) == 4 + 1 and all(layer.forward.func is sample.few_rows for layer in layers)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": dtype == torch.bfloat16})
    for shape, bias in itertools.product([(1, 1), (8, 1), (32, 1), (2, 3)], (True, False)):
        layer, x = torch.nn.Linear(96, 160, bias).to(dtype), torch.randn(*shape, 96, generator=seeded(0)).to(dtype)
        exact = copy.deepcopy(layer).double()(x.double())
        ours, theirs = ((y - exact).abs().mean() for y in (sample.few_rows(layer, x), layer(x)))
        assert sample.few_rows(layer, x).shape == exact.shape and ours <= 3 * theirs  # both are rounding
