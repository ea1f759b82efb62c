"""Decoders agree with Hugging Face, slow search and exact distributions; sample.py uses them."""

import io
import itertools
import math
import os
import pty
import re
import signal
import subprocess
import sys
import tty
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import FEW_LAYERS, MODEL_FILES, ROOT, load, train
from test_gpt2 import as_hugging_face

import gpt2
import sample
from prepare_data import load_tokenizer


@torch.no_grad()
def tiny(seed=0, name="gpt2", std=0.35, **config):
    """A network whose most probable token of 12 has about half the probability. In float64, so that
    rounding never decides which of two tokens is the better one."""
    config = dict(vocab_size=12, block_size=16, n_layer=1, n_embd=24) | config
    torch.manual_seed(seed)
    model = load(name).Model(load(name).Config(**config))
    for p in model.parameters():
        p += std * torch.randn(p.shape)
    return model.double().eval()


def for_blanks(objective, seed=0):
    return tiny(seed, "scratch_former", 0.5, objective=objective, vocab_size=5, n_ff=32, hide=0.4)


@torch.no_grad()
def slow_search(model, text, n, width=1, eot=None, penalty=1.0):
    """Beam search for the next n tokens of a text (T), which is read anew for every token. It is
    greedy if width is 1, and exhaustive if it is V^n. A full window slides by a quarter."""
    T, start = len(text), 0
    running, finished = [(0.0, text.tolist())], []  # (log-probability, tokens)
    for i in range(n):
        done = i % model.ahead  # tokens of the last pass, which gives the logits of `ahead` tokens
        if done == 0 and T + i - start > model.cfg.block_size:
            start = T + i - model.cfg.block_size * 3 // 4
        windows = torch.tensor([tokens[start : T + i - done] for _, tokens in running])
        logits = model(windows, cache=model.new_cache(len(windows)))[:, done]
        longer = []
        for (total, tokens), row in zip(running, logits.log_softmax(-1).tolist()):
            longer += [(total + p, [*tokens, token]) for token, p in enumerate(row)]
        finished += [x for x in longer if x[1][-1] == eot]
        running = sorted((x for x in longer if x[1][-1] != eot), reverse=True)[:width]
    return max(running + finished, key=lambda x: x[0] / (len(x[1]) - T) ** penalty)[1][T:]


@pytest.mark.parametrize("width, penalty", [(1, 1.0), (3, 0.0), (3, 1.0), (3, 2.0), (5, 1.0)])
def test_greedy_and_beam_search_equal_hugging_face_where_texts_end_among_the_best(width, penalty):
    """Greedy is also what a beam of width 1 gives, and drawing at a temperature of (almost) 0."""
    ended_early = 0
    for seed, V, end in itertools.product(range(4), (6, 12, 30), (False, True)):
        eot = V - 1 if end else None
        model = tiny(seed, vocab_size=V)
        model.wte.weight.data[V - 1] *= 2  # often the best token, or the worst: some rows end early
        idx = torch.randint(V - 1, (1 + seed % 2, 1 + seed))
        names = dict(num_beams=width, length_penalty=penalty, eos_token_id=eot, pad_token_id=V - 1)
        names |= dict(max_new_tokens=10, do_sample=False, early_stopping="never")
        expected = as_hugging_face(model).generate(idx, **names)[:, idx.size(1) :]
        options = dict(beam_width=width, length_penalty=penalty, eot=eot)
        options["temperature"] = (0, 1e-46, 1e-38, 1e-10)[seed]
        for decode in sample.DECODERS if width == 1 else ["beam"]:
            assert sample.generate(model, idx, 10, decode, **options).equal(expected)
        ended_early += end and (expected == eot).any().item()
    assert ended_early >= 2


@pytest.mark.parametrize("name", MODEL_FILES)
def test_cached_and_uncached_texts_are_those_of_a_slow_search_while_the_window_slides(name):
    block_size = max(32, 2 * getattr(load(name).Config, "ahead", 1))
    model = tiny(0, name, 0.2, block_size=block_size, n_layer=FEW_LAYERS[name])
    idx = torch.randint(12, (2, block_size * 3 // 4))[[0, 1, 0]]  # equal rows are read once
    n = block_size * 7 // 8
    for decode, eot in itertools.product(sample.DECODERS, (None, 5)):
        found = []
        for use_cache in (True, False):
            options = dict(eot=eot, generator=torch.manual_seed(0), use_cache=use_cache)
            found.append(sample.generate(model, idx, n, decode, **options))
        assert found[0].equal(found[1])
        if eot is None and decode in ("greedy", "beam"):
            width = 4 if decode == "beam" else 1
            assert found[0][:2].tolist() == [slow_search(model, row, n, width) for row in idx[:2]]


def test_a_long_prompt_keeps_what_leaves_room_for_the_new_tokens_and_dropout_is_off(capsys):
    for T, n, kept in ((16, 9, 16), (17, 1, 15), (33, 2, 14), (33, 4, 12), (33, 40, 12)):
        model, text = tiny(dropout=0.5).train(), torch.randint(12, (T,))
        new = sample.generate(model, text[None], n)[0].tolist()
        assert new == slow_search(model, text[T - kept :], n)
        assert (f"first {T - kept} tokens" in capsys.readouterr().err) == (T > 16)


def test_prompts_and_arguments_that_cannot_be_used_are_refused_by_name():
    gpt, masked, spans = tiny(), for_blanks("masked"), for_blanks("spans")
    assert sample.fill(spans, torch.tensor([[5] + [1] * 14])) == [[1] * 14]
    assert len(sample.fill(masked, torch.tensor([[5] + [1] * 15]))[0]) == 16
    for model, idx, options, error in [
        (gpt, [[1]], {"beam_width": 0}, "beam_width goes from"),
        (gpt, [[1]], {"decode": "beams"}, "'beams'.*greedy, beam, top-k, temperature, nucleus"),
        (masked, [[2, 1]], {}, "no blanks"),
        (masked, [[5, 1]], {"decode": "beam"}, "one at a time"),
        (spans, [[5] + [1] * 15], {}, "16 tokens: at most 15"),
        (spans, [[5, 5, 5]], {}, "3 blanks: at most 2"),
        (spans, [[5, 1], [5, 5]], {}, "not as many in each row"),
    ]:
        function = sample.generate if model is gpt else sample.fill
        with pytest.raises(gpt2.UserError, match=error):
            function(model, torch.tensor(idx), 4, **options)
    for prompt in ("def main(", [1, 2], torch.ones(1, 2), torch.tensor([1, 2]), torch.tensor([[]])):
        with pytest.raises(TypeError, match="a LongTensor: torch"):
            sample.generate(gpt, prompt, 4)


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from, one id at a time: temperature, then top-k, then nucleus."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    if top_p is not None:
        mass = [*itertools.accumulate(weights[i] for i in kept)]
        kept = kept[: 1 + sum(m < top_p * mass[-1] for m in mass)]
    total = sum(weights[i] for i in kept)
    return torch.tensor([w / total if i in kept else 0.0 for i, w in enumerate(weights)])


def assert_drawn_with(p, ids):
    """The n ids each come as often as the probabilities p (V) say. By Bernstein's inequality, one
    count in a million is further away than this. What has probability 0 is never drawn."""
    n, counts = len(ids), torch.bincount(ids, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    assert (abs(counts - n * p) <= 5.4 * (n * p * (1 - p)).sqrt() + 4.8).all()


def test_the_filters_equal_a_loop_over_ids():
    logits = 2 * torch.randn(3, 10, generator=torch.manual_seed(0))
    values = itertools.product((0.5, 2.0), (None, 0, 1, 3, 50), (None, 0.0, 0.3, 0.9, 1.0), logits)
    for *filters, row in values:
        ids = sample.choose(row.expand(20_000, -1), "temperature", *filters)
        assert_drawn_with(exact(row, *filters), ids)


def test_equally_probable_tokens_are_kept_up_to_exactly_k_or_p_and_drawn_evenly_in_16_bits():
    rows = torch.tensor([1.0, 0, 0, 0, 0, 0, -1, -1]).expand(10_000, -1)
    for k in (1, 2, 5, 8, 9):
        assert len(sample.choose(rows, "temperature", top_k=k).unique()) == min(k, 8)
    ids = sample.choose(torch.zeros(10_000, 8), "temperature", top_p=0.3)
    assert len(ids.unique()) == 3  # 3/8 is the first sum that reaches 0.3
    model = tiny(vocab_size=300).bfloat16()  # in which sums of probabilities have only 256 steps
    torch.nn.init.zeros_(model.wte.weight)
    new = sample.generate(model, torch.zeros(20_000, 1, dtype=torch.long), 1, "temperature")
    assert_drawn_with(torch.full((300,), 1 / 300), new[:, 0])


def test_draws_have_the_exact_distribution_and_the_loop_on_the_first_screen_does_the_same():
    model, idx = tiny(1, vocab_size=60), torch.randint(60, (1, 4))
    logits, prompts = model(idx)[0, -1], idx.expand(20_000, -1)
    for decode, options, default in [
        ("top-k", {"temperature": 3.0}, {"top_k": 50}),
        ("top-k", {"temperature": 3.0, "top_k": 0}, {}),
        ("nucleus", {"temperature": 1.5, "top_k": 9}, {"top_p": 0.95}),
    ]:
        new = sample.generate(model, prompts, 1, decode, generator=torch.manual_seed(0), **options)
        assert_drawn_with(exact(logits, **default, **options), new[:, 0])
    assert_drawn_with(exact(logits, 0.8), sample.plain_generate(model, prompts, 1, 0.8)[:, -1])
    assert sample.plain_generate(model, idx, 12, 1e-4)[:, 4:].equal(sample.generate(model, idx, 12))


def test_beam_search_for_spans_equals_an_exhaustive_search():
    """Two blanks: the sentinels before their spans are 5 and 6, and 7 ends the second span."""
    idx, source = torch.tensor([[1, 5, 2, 3, 5, 0]]), torch.tensor([1, 5, 2, 3, 6, 0, 5])
    for seed, penalty in itertools.product(range(6), (0.0, 1.0)):
        model = for_blanks("spans", seed)
        best = slow_search(model, source, 4, 8**4, 7, penalty)
        text = "".join(map(str, best)) + "7"  # so that there is a second span, if an empty one
        spans = [[*map(int, span)] for span in re.split("[567]", text)]
        new = sample.fill(model, idx, 4, "beam", beam_width=400, length_penalty=penalty)
        assert new == [[1, *spans[0], 2, 3, *spans[1], 0]]


def test_masked_tokens_are_chosen_the_most_certain_first():
    rows = ([1, 5, 5, 2, 5, 5, 5, 5, 5, 0], [5, 5, 3, 5, 5, 5, 0, 5, 5, 1])
    for seed, row in itertools.product(range(6), rows):
        model, text = for_blanks("masked", seed), list(row)
        while 5 in text:
            probs = model(torch.tensor([text]))[0].softmax(-1)  # (T, V)
            i = max((i for i in range(10) if text[i] == 5), key=lambda i: probs[i].max())
            text[i] = probs[i].argmax().item()
        assert sample.fill(model, torch.tensor([row, row[::-1]]))[0] == text


def test_a_space_before_a_blank_belongs_to_what_fills_it_and_a_million_spaces_are_encoded(data):
    """Where tokens are bytes, a space is no part of what follows."""
    assert sample.encode("a <blank>b <blank>", load_tokenizer("bytes"), 7) == [97, 32, 7, 98, 32, 7]
    tokenizer = load_tokenizer(**gpt2.open_data(data)[1])
    a, b, c = (tokenizer.encode_ordinary(text) for text in ("the model", "reads", " it"))
    assert sample.encode("the model <blank>reads<blank> it", tokenizer, 7) == [*a, 7, *b, 7, *c]
    for text in (" " * 1_000_000, "the" * 300_000, "a b  \n" * 50_000):
        assert tokenizer.decode(sample.encode(text, tokenizer, 7)) == text


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A network of bytes, with which end of text comes now and then."""
    model = tiny(vocab_size=257, block_size=32)
    model.wte.weight.data[256] *= 1.5
    state = dict(model_file="gpt2.py", config=vars(model.cfg), model=model.state_dict())
    path = tmp_path_factory.mktemp("out") / "ckpt.pt"
    torch.save(state | {"tokenizer": {"name": "bytes", "ranks": ""}}, path)
    return path


@pytest.fixture
def say(ckpt, capsys):
    """say(options): what sample.py prints, or its line at exit; say.err: what goes to stderr."""

    def say(*options):
        capsys.readouterr()
        always = f"--ckpt {ckpt} --dtype float32 --max-new-tokens 20".split()
        try:
            sample.main([*always, *map(str, options)])
        except SystemExit as end:
            assert "\n" not in end.code and capsys.readouterr().out == ""
            return end.code
        out, say.err = capsys.readouterr()
        return out

    return say


def test_a_wrong_checkpoint_is_one_line_and_imports_nothing(say, ckpt, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere.py").write_text("raise SystemExit('executed')\n# --- training")
    path = tmp_path / "other.pt"
    state = torch.load(ckpt, weights_only=True)
    wrong = {"no_such_field": {"config": state["config"] | {"no_such_field": 1}}}
    wrong["48"] = {"config": state["config"] | {"n_embd": 48}}
    wrong["tokenizer nothing"] = {"tokenizer": {"name": "nothing", "ranks": ""}}
    for name in ("elsewhere.py", f"{tmp_path}/elsewhere.py", "this", "./gpt2.py", "sample.py", ""):
        wrong[f"{path} is of {name}, which is none of conv_attention.py"] = {"model_file": name}
    for error, change in wrong.items():
        torch.save(state | change, path)
        assert error in say("--ckpt", path)
    monkeypatch.setattr(gpt2, "Model", Mock(side_effect=TypeError("of a student")))
    with pytest.raises(TypeError, match="of a student"):  # which is not the checkpoint's fault
        say("--prompt", "the")


def test_a_cpu_without_memory_is_one_line_and_a_student_s_mistake_shows_its_line(say, monkeypatch):
    monkeypatch.setattr(gpt2.Attention, "forward", lambda *args: torch.empty(10**15))
    assert "you tried to allocate" in say("--prompt", "the", "--decode", "beam")
    monkeypatch.setattr(gpt2.Attention, "forward", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        say("--prompt", "the")


def test_few_rows_are_used_where_they_are_faster_and_in_plain_layers_alone(monkeypatch):
    for amx, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx}, False)
        lora = load("progressive").LoRALinear(8, 8, load("progressive").Config())
        layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), lora]).to(dtype)
        sample.use_few_rows(layers)
        assert ["forward" in vars(x) for x in layers] == [(dtype == torch.bfloat16) == amx, False]


def test_sample_py_prints_what_generate_returns_and_tokens_after_the_end_do_not_count(say, ckpt):
    model, tokenizer = sample.load(ckpt)
    eot, notes = tokenizer.eot_token, set()
    cases = {"greedy": {}, "beam": {"beam_width": 3, "length_penalty": 0.5}, "temperature": {}}
    cases["top-k"] = {"temperature": 2.0, "num_samples": 3, "seed": 5}
    cases["nucleus"] = {"temperature": 1.5, "top_k": 99, "top_p": 0.99}
    prompts = ("the naïve", "<|endoftext|>", "")  # special tokens are plain text
    for (decode, options), prompt in itertools.product(cases.items(), prompts):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        printed = say("--prompt", prompt, "--decode", decode, *flags)
        more = sample.DECODERS[decode] | options
        B, generator = more.pop("num_samples", 1), torch.manual_seed(more.pop("seed", 1337))
        idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [eot]]).expand(B, -1)
        new = sample.generate(model, idx, 20, decode, eot=eot, generator=generator, **more)
        rows = [[*itertools.takewhile(eot.__ne__, row)] for row in new.tolist()]
        number = "[{}] " if B > 1 else ""
        texts = [number.format(i) + prompt + tokenizer.decode(row) for i, row in enumerate(rows, 1)]
        assert printed.rstrip("\ufffd\n") == "\n".join(texts).rstrip("\ufffd\n")
        note = ", end of text" if new.size(1) < 20 else ""
        assert say.err.startswith(f"({sum(map(len, rows))} tokens{note}, ")
        notes.add(note)
    assert len(notes) == 2


def test_all_decoders_no_cache_and_dtype_is_that_of_the_weights(say, monkeypatch):
    printed = say("--decode", "all", "--prompt", "the model learns " * 20, "--num-samples", 2)
    assert re.findall("--- (.+) ---", printed) == [*sample.DECODERS]
    assert printed.count("[2] the") == 3 and say.err.count("tokens are left out") == 1
    monkeypatch.setattr(sample, "use_few_rows", Mock(side_effect=sample.use_few_rows))
    options = ("--prompt", "a", "--num-samples", 300, "--dtype")
    assert len({say(*options, name) for name in ("float32", "bfloat16", "float16")}) == 3
    assert sample.use_few_rows.call_count == 3
    monkeypatch.setattr(gpt2, "Cache", Mock(side_effect=gpt2.Cache))
    options = ("--prompt", "a", "--num-samples", 2, "--max-new-tokens", 3)
    assert say(*options) == say(*options, "--no-cache")
    # One cache that begins with a single text, as the prompts are equal; then one for each token.
    assert [call.args[1] for call in gpt2.Cache.call_args_list] == [1, 1, 2, 2]


def test_a_piped_prompt_or_a_prompt_file_loses_one_newline(say, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    for typed, prompt in (("ï\na", "ï\na"), ("ï\r\na\r\n", "ï\na"), ("ï\na\n\n", "ï\na\n")):
        text = say("--prompt", prompt)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed, newline=""))
        assert say() == text
        path.write_bytes(typed.encode("utf-8-sig"))  # a byte order mark is no text
        assert say("--prompt-file", path) == text


@pytest.mark.parametrize("stop", ["interrupt", "close"])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(ckpt, stop):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the мир"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipes["env"] = os.environ | {"PYTHONIOENCODING": "ascii"}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # if it is ignored
    child = subprocess.Popen([*command, "--max-new-tokens", "99999"], **pipes)
    assert child.stdout.read(8)[:7] == b"the ???"  # what the terminal lacks is replaced
    if stop == "interrupt":
        child.send_signal(signal.SIGINT)
    else:
        child.stdout.close()
    assert child.wait(60) == (130 if stop == "interrupt" else 0)
    assert child.stderr.read().strip() == b""


def test_an_option_that_cannot_be_used_is_one_line_with_its_name_and_its_range(say):
    wrong = dict(max_new_tokens=(0, 1_000_001), num_samples=(0,), seed=(-1, 2**64), top_k=(-1,))
    wrong |= dict(temperature=(-0.1, math.nan, math.inf), top_p=(-0.1, 1.1, math.nan))
    wrong |= dict(beam_width=(0,), length_penalty=(10.5, math.nan))
    for name, values in wrong.items():
        option = f"--{name.replace('_', '-')}"
        _, least, largest, *_ = sample.OPTIONS[name]
        for value in values:
            line = say("--decode", "all", "--prompt", "the", option, value)
            assert line == f"sample.py: {option} {value}: {name} goes from {least:,} to {largest:,}"
    for decode, option in (("greedy", "--seed"), ("beam", "--top-p"), ("top-k", "--beam-width")):
        error = f"{option} has no effect with --decode {decode}, only with "
        assert error in say("--decode", decode, option, 1)
    for option in ("--seed", "--decode", "--device", "--prompt-file"):
        assert "nothing" in say(option, "nothing")
    assert "<blank> has to be in" in say("--prompt", "def <blank>(")


def test_the_newest_checkpoint_is_taken_and_a_wrong_one_lists_others(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"out: no checkpoint.*python gpt2.py --preset demo"):
        sample.main(["--prompt", "the"])
    paths = [Path("out/old/best.pt"), Path("out/new run/deep/ckpt.pt"), Path("out/old/ckpt.pt")]
    for n, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (n, 1000 - n))  # by the time of their last change, the first is the newest
    assert sample.find_checkpoint(None) == paths[0]
    assert say("--ckpt", "out/old").endswith(f"There are {', '.join(map(str, paths))}")


def test_blanks_are_filled_and_a_terminal_underlines_them_and_has_a_history(say, data, tmp_path):
    for objective in ("spans", "masked"):
        rows = train("scratch_former", data, tmp_path / objective, "--objective", objective)
        assert rows[0]["val_loss"] and not rows[0]["val_bits_per_byte"]  # for it is no likelihood
        ckpt = ("--ckpt", tmp_path / objective / "ckpt.pt")
        model, tokenizer = sample.load(ckpt[1])
        ids = torch.tensor([sample.encode("the <blank> model", tokenizer, 300)])
        text = tokenizer.decode(sample.fill(model, ids, 20)[0])
        assert say(*ckpt, "--prompt", "the <blank> model") == text + "\n"
        printed = say(*ckpt, "--prompt", "<blank>model<blank>", "--decode", "all")
        assert ("--- beam" in printed) == (objective == "spans")
    # At a terminal, a prompt that cannot be used, a good one, arrow up for the same, and Ctrl-D.
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # so that what is typed too early waits
    os.write(ours, b"the model\nthe <blank> model\n\x1b[A\n\x04")
    command = [sys.executable, ROOT / "sample.py", *ckpt, "--dtype", "float32", "--decode", "top-k"]
    pipes = dict(stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "dumb"})
    subprocess.run(command, **pipes, timeout=60, check=True)
    seen = os.read(ours, 10_000).decode()
    assert "has to be in a prompt" in seen
    options = dict(decode="top-k", generator=torch.manual_seed(1337))
    for _ in range(2):  # the seed is of the whole session
        a, b, c = map(tokenizer.decode, sample.fill_parts(model, ids, 1, **options)[0])
        assert f"{a}\x1b[4m{b}\x1b[24m{c}" in seen
