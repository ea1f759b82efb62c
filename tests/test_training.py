"""The training section, through the command line of the model files: it learns, logs, saves,
resumes, evaluates, survives kills and full disks, and says in one line what is wrong.

The section is the same in all model files, so one of them is enough for most of it."""

import functools
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import types
import weakref
from contextlib import redirect_stdout
from io import BufferedWriter, RawIOBase, StringIO, TextIOWrapper

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FEW_LAYERS,
    MODEL_FILES,
    ROOT,
    argv,
    load,
    refused,
    rows,
    same_rows,
    start,
    start_two,
    train,
    wait_for,
)

import gpt2

each_model = pytest.mark.parametrize("name", MODEL_FILES)


def checkpoint(out, file="ckpt.pt"):
    return torch.load(out / file, weights_only=True)


def same_state(a, b):
    """Whether two checkpoints have the same weights and moments, to the last bit."""
    tensors = []
    for ckpt in (checkpoint(a), checkpoint(b)):
        moments = ckpt["optimizer"]["state"]
        named = {(i, key): v for i, state in moments.items() for key, v in state.items()}
        tensors.append(ckpt["model"] | named)
    one, two = tensors
    return one.keys() == two.keys() and all(torch.equal(v, two[key]) for key, v in one.items())


def change(folder, **changes):
    """Changes meta.json, and returns what it was."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")
    return meta


def numbers(text):
    return [float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


def column(log, name):
    return [float(row[name]) for row in log if row[name]]


@pytest.fixture(scope="session")
def ended(data, tmp_path_factory):
    """A run of gpt2.py that came to its end, and what it printed."""
    out = tmp_path_factory.mktemp("ended") / "run"
    with redirect_stdout(StringIO()) as text:
        more = ("--eval-interval", 3, "--learning-rate", 3e-3, "--no-compile")
        train("gpt2", data, out, "--max-steps", 6, *more)
    return out, text.getvalue()


@pytest.fixture
def again(ended, tmp_path):
    """A copy of that run, which a test may change."""
    return shutil.copytree(ended[0], tmp_path / "run")


# --- a run


@each_model
def test_a_run_leaves_a_log_and_checkpoints(name, data, tmp_path, capsys):
    log = train(name, data, tmp_path / "run", "--max-steps", 2)
    columns = "step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_s seconds"
    assert list(log[0]) == columns.split() and column(log, "step") == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]
    ckpt = checkpoint(tmp_path / "run")
    assert ckpt["model_file"] == f"{name}.py" and ckpt["step"] == 2
    assert ckpt["config"] == vars(load(name).Config(**ckpt["config"]))
    assert ckpt["tokenizer"]["ranks"] == (data / "tokenizer.tiktoken").read_text(encoding="utf-8")
    assert not [key for key in ckpt["model"] if key.startswith(("module.", "_orig_mod."))]
    printed = capsys.readouterr().out
    n_params = sum({w.data_ptr(): w.numel() for w in ckpt["model"].values()}.values())
    if name != "progressive":  # it has grown since then
        assert f"{n_params:,} parameters, cpu, torch.float32" in printed
    assert "all of val: " in printed


def slow_clock():
    """What a clock shows at the begin and at the end of each step."""
    seconds = 0.0
    for step in itertools.count(1):
        yield seconds
        seconds += 60 * step
        yield seconds


@pytest.mark.parametrize("clip", [0.3, 0])
def test_a_run_is_what_a_plain_loop_computes(clip, data, tmp_path, monkeypatch, capsys):
    """Losses, norms, rates and validation losses, with a micro-batch that does not divide the
    batch, gradients that are clipped, and rows of the log between the evaluations. Step n takes
    n minutes."""
    clock = types.SimpleNamespace(perf_counter=slow_clock().__next__)
    monkeypatch.setattr(gpt2, "time", clock)
    options = "--max-steps 8 --log-interval 3 --eval-interval 5 --micro-batch 3 --warmup-steps 3"
    more = ("--learning-rate", 1e-2, "--weight-decay", 0.5, "--grad-clip", clip, "--seed", 5)
    log = train("gpt2", data, tmp_path / "run", *options.split(), *more)

    meta, _, splits = gpt2.open_data(data)
    cfg = gpt2.Config(**checkpoint(tmp_path / "run")["config"])
    torch.manual_seed(5)
    model = gpt2.Model(cfg)
    bias_or_norm = {False: [], True: []}
    for name, p in model.named_parameters():
        bias_or_norm[name.endswith("bias") or "ln_" in name].append(p)
    groups = [{"params": p, "weight_decay": 0.0 if b else 0.5} for b, p in bias_or_norm.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)

    def loss(text):
        return F.cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:])

    expected = {}
    for step in range(8):
        rate = (step + 1) / 3 if step < 3 else 0.5 + 0.5 * math.cos(math.pi * (step - 3) / 5)
        value = loss(gpt2.get_batch(splits["train"], 65, cfg, step))
        value.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, clip / norm) if clip else 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.step()
        optimizer.zero_grad()
        row = [step + 1, 256 * (step + 1), value.item(), 1e-2 * rate, norm]
        if step + 1 in (5, 8):  # the first 512 tokens, in windows of 64 after an end of text
            text = torch.tensor([meta["eot"], *splits["val"][:512].tolist()]).unfold(0, 65, 64)
            row.insert(3, loss(text).item())
            row.insert(4, row[3] / math.log(2) * meta["splits"]["val"]["tokens"])
            row[4] /= meta["splits"]["val"]["bytes"]
        expected[step + 1] = row
    assert column(log, "step") == [1, 3, 5, 6, 8]
    for row in log:
        values = [float(value) for value in list(row.values())[:7] if value]
        assert values == pytest.approx(expected[int(row["step"])], rel=1e-4, abs=1e-6)
    assert norm > 0.4 and values[2] < float(log[0]["train_loss"]) - 0.3
    steps = np.array([0, 1, 3, 5, 6, 8])
    seconds = 60 * steps * (steps + 1) / 2
    speeds = 256 * np.diff(steps) / np.diff(seconds)  # since the row before
    assert column(log, "seconds") == pytest.approx(seconds[1:])
    assert column(log, "tokens_per_s") == pytest.approx(speeds)
    minutes = [int(n) for n in re.findall(r"(\d+) min left", capsys.readouterr().out)]
    assert minutes == [round(x) for x in (8 - steps[1:]) * 256 / speeds / 60]


def test_batches_are_windows_from_all_over_the_training_split(data, tmp_path, monkeypatch):
    """Each step and each seed has its own. Targets are the inputs, one token later."""
    text = (data / "train.bin").read_bytes()
    starts = []

    def watch(self, idx, targets):
        if self.training:
            for row, target in zip(idx, targets):
                assert torch.equal(row[1:], target[:-1])
                window = [*row.tolist(), target[-1].item()]
                starts.append(text.find(np.array(window, "<u2").tobytes()) // 2)
        return forward(self, idx, targets)

    forward = gpt2.Model.forward
    monkeypatch.setattr(gpt2.Model, "forward", watch)
    size = ("--n-embd", 6, "--n-head", 1, "--eval-interval", 10, "--batch-size", 8)
    for seed in (1, 2):
        train("gpt2", data, tmp_path / f"{seed}", "--max-steps", 20, "--seed", seed, *size)
    assert len(starts) == 320 and min(starts) >= 0  # a window that is not there would be -1
    assert len(set(starts)) > 310, "batches repeat"
    assert np.histogram(starts, 8, (0, len(text) // 2))[0].min() > 20


def test_processes_share_a_batch(data, monkeypatch):
    tokens, cfg = gpt2.open_data(data)[2]["train"], gpt2.Config(batch_size=5)
    whole = gpt2.get_batch(tokens, 9, cfg, 3)
    assert whole.shape == (5, 9)
    monkeypatch.setattr(gpt2, "world_size", 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(gpt2, "rank", rank)
        parts.append(gpt2.get_batch(tokens, 9, cfg, 3))
    assert len(parts[0]) == 3 and torch.equal(torch.cat(parts)[[0, 3, 1, 4, 2]], whole)
    monkeypatch.undo()
    few = gpt2.get_batch(np.arange(12), 9, gpt2.Config(batch_size=200), 0)
    assert set(few[:, 0].tolist()) == {0, 1, 2, 3}, "the first and the last token are read, too"


def test_each_step_of_each_process_has_its_own_random_numbers(data, tmp_path, monkeypatch):
    seeds = []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or manual_seed(n))
    for rank, seed in ((0, 7), (1, 7), (0, 8)):
        monkeypatch.setattr(gpt2, "rank", rank)
        more = ("--n-layer", 1, "--max-steps", 3, "--seed", seed)
        gpt2.main(argv(data, tmp_path / f"{rank} {seed}", *more))
    assert [seeds.pop(i) for i in (8, 4, 0)] == [8, 7, 7]  # of the initial weights
    assert len(set(seeds)) == 9


def test_two_processes_train_and_evaluate_as_one(data, tmp_path, capsys):
    """Of a batch of 5 the first process has 3 rows, in two micro-batches; the other has 2. The
    printed perplexities have so many digits that losses agree to 1e-6."""
    more = ("--max-steps", 4, "--eval-interval", 2, "--batch-size", 5, "--n-layer", 1)
    two = start_two("gpt2", *argv(data, tmp_path / "two", *more), log=tmp_path / "log")
    for child in two:
        child.join(100)
    said = [(tmp_path / f"log {rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert [child.exitcode for child in two] == [0, 0], said
    one = train("gpt2", data, tmp_path / "one", *more)
    for name in ("step", "tokens", "train_loss", "val_loss", "grad_norm"):
        a, b = column(one, name), column(rows(tmp_path / "two"), name)
        assert a == pytest.approx(b, abs=1e-5), name
    capsys.readouterr()
    gpt2.main(["--out", str(tmp_path / "two"), "--eval-only", "--device", "cpu"])
    alone = re.search("all of val: .*", capsys.readouterr().out)[0]
    together = re.search("all of val: .*", said[0])[0]
    assert numbers(together) == pytest.approx(numbers(alone), rel=3e-6)
    assert "warn" not in said[0].lower() and said[1] == ""  # only the first process prints


def test_a_signal_to_one_of_two_processes_stops_both(data, tmp_path):
    out = tmp_path / "run"
    two = start_two("gpt2", *argv(data, out, "--max-steps", 10**6), log=tmp_path / "log")
    wait_for("step 2/", tmp_path / "log 0")
    os.kill(two[1].pid, signal.SIGTERM)
    for child in two:
        child.join(60)
    assert [child.exitcode for child in two] == [128, 143]  # as in a shell: 128 + 15, SIGTERM
    assert checkpoint(out)["step"] == len(rows(out)) >= 2


def test_bfloat16_and_float16_train_as_float32_does(data, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        more = ("--max-steps", 10, "--learning-rate", 3e-3, "--dtype", dtype)
        losses[dtype] = column(train("gpt2", data, tmp_path / dtype, *more), "train_loss")
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.002)
    assert len({*map(tuple, losses.values())}) == 3


def test_float16_skips_steps_that_overflow(data, tmp_path, monkeypatch):
    """The scaler begins with a factor of 2^36, and halves it until all gradients are finite."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    out = tmp_path / "run"
    log = train("gpt2", data, out, "--max-steps", 40, "--dtype", "float16", "--eval-interval", 1)
    skipped = [not math.isfinite(norm) for norm in column(log, "grad_norm")]
    n = sum(skipped)
    assert 2 < n < 35 and skipped == [True] * n + [False] * (40 - n)
    val = column(log, "val_loss")
    assert val[:n] == [val[0]] * n and val[n] != val[0]
    assert checkpoint(out)["scaler"]["scale"] == 2.0 ** (36 - n)


# --- resuming


IN_FLOAT32 = [(name, "float32") for name in MODEL_FILES if name != "progressive"]


@pytest.mark.parametrize("name, dtype", [*IN_FLOAT32, ("gpt2", "float16")])
def test_a_resumed_run_is_the_run_that_never_stopped(name, dtype, data, tmp_path, monkeypatch):
    """Bit for bit. It is told to stop between two evaluations; in float16, its first steps
    overflow. progressive.py has a test of its own."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**27)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    more = f"--dropout 0.1 --eval-interval 2 --max-steps 8 --seed 5 --dtype {dtype}".split()
    whole = train(name, data, tmp_path / "whole", *more)
    rate = load(name).learning_rate

    def in_step_5(step, cfg):
        if step == 4:  # as when a machine is taken away
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, cfg)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(load(name), "learning_rate", in_step_5)
        train(name, data, parts, *more)
    assert e.value.code == 128 + signal.SIGTERM and len(rows(parts)) == 5
    before = checkpoint(parts)
    load(name).main(["--out", str(parts), "--resume", "--device", "cpu"])  # it knows the rest
    log = rows(parts)
    assert same_rows(log, whole) and same_state(tmp_path / "whole", parts)
    assert checkpoint(parts)["scaler"] == checkpoint(tmp_path / "whole")["scaler"]
    seconds = column(log, "seconds")[4:6]
    assert seconds[0] == before["seconds"]
    assert column(log, "tokens_per_s")[5] == pytest.approx(256 / (seconds[1] - seconds[0]))
    assert checkpoint(parts)["best"] == min(column(log, "val_loss"))


def test_a_log_column_is_one_quantity(again, data):
    """Tokens are those seen, whatever the batch size was; rows after the checkpoint are removed."""
    with open(again / "log.csv", "a", encoding="utf-8") as file:
        file.write("7,9999,1,1,1,1,1,1,1\n1")  # after the checkpoint; half of a row from 10 to 19
    more = ("--resume", "--max-steps", 8, "--batch-size", 2)
    log = train("gpt2", data, again, *more)
    assert column(log, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert column(log, "tokens")[-3:] == [6 * 256, 6 * 256 + 128, 6 * 256 + 256]
    assert checkpoint(again)["config"]["batch_size"] == 2


def test_best_has_the_lowest_validation_loss(data, tmp_path, capsys, monkeypatch):
    """From step 4 on the rate is negative, so that the loss rises. A resumed run keeps the best,
    unless another text is evaluated."""
    out = tmp_path / "run"
    monkeypatch.setattr(gpt2, "learning_rate", lambda step, cfg: 2e-3 if step < 4 else -2e-3)
    log = train("gpt2", data, out, "--max-steps", 8, "--eval-interval", 2)
    values = column(log, "val_loss")
    assert values.index(min(values)) == 1 and values[3] > values[1] + 0.01
    best = checkpoint(out, "best.pt")
    assert best["step"] == 4 and best["best"] == values[1] and checkpoint(out)["best"] == values[1]
    assert re.search(rf"best: {values[1]:.4f}, .*best.pt", capsys.readouterr().out)
    monkeypatch.setattr(gpt2, "learning_rate", lambda step, cfg: 0.0)
    shutil.copytree(data, tmp_path / "set")
    other = tmp_path / "set"
    runs = (10, 512, data, 4), (12, 500, data, 12), (14, 500, other, 14), (16, 500, other, 14)
    for steps, eval_tokens, folder, of_step in runs:
        more = ("--resume", "--max-steps", steps, "--eval-tokens", eval_tokens)
        train("gpt2", folder, out, *more)
        assert checkpoint(out, "best.pt")["step"] == of_step


def test_resume_keeps_the_options_and_init_from_does_not(ended, again, data, tmp_path):
    gpt2.main(["--out", str(again), "--resume", "--weight-decay", "0.3"])
    old, new = checkpoint(ended[0])["config"], checkpoint(again)["config"]
    of_this_run = dict(out=str(again), weight_decay=0.3, device="auto", compile=None)
    assert new == old | of_this_run
    assert checkpoint(again)["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    out, default = tmp_path / "new", vars(gpt2.Config())
    more = f"--data {data} --device cpu --max-steps 1 --dtype float32 --batch-size 2".split()
    gpt2.main(["--out", str(out), "--init-from", str(again / "ckpt.pt"), *more])
    config = checkpoint(out)["config"]
    assert [config[k] for k in ("n_embd", "block_size", "n_layer")] == [48, 64, 1]
    for name in ("learning_rate", "warmup_steps", "eval_interval", "seed", "micro_batch"):
        assert config[name] == default[name], name
    assert [row["step"] for row in rows(out)] == ["1"] and checkpoint(out)["tokens"] == 128
    first = float(rows(ended[0])[0]["train_loss"])
    assert float(rows(out)[0]["train_loss"]) < first - 0.3
    of_preset = gpt2.parse(["--preset", "gpt2", "--n-layer", "3"])[0]  # and one that is typed
    assert (of_preset.n_layer, of_preset.n_head, of_preset.seed) == (3, 12, default["seed"])


def test_a_checkpoint_s_memory_is_free_in_training(again, data, monkeypatch):
    """Also when the optimizer lets go of the moments that were loaded, as in progressive.py."""
    loaded, alive = [], []
    read = gpt2.read_checkpoint

    def watch(path):
        ckpt = read(path)
        loaded.extend(map(weakref.ref, ckpt["model"].values()))
        moments = [s["exp_avg"] for s in ckpt["optimizer"]["state"].values()]
        loaded.extend(map(weakref.ref, moments))
        return ckpt

    def let_go(model, optimizer, cfg, step):
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].clone()
        gc.collect()
        alive.append(sum(ref() is not None for ref in loaded))

    monkeypatch.setattr(gpt2, "read_checkpoint", watch)
    monkeypatch.setattr(gpt2, "grow", let_go)
    train("gpt2", data, again, "--resume", "--max-steps", 7)
    assert len(loaded) > 20 and alive[0] == 0


# --- evaluation


SIZES = [(7, None), (7, 3), (16, 5), (17, None), (50, 1), (50, 16), (64, 5), (64, 99)]


@pytest.mark.parametrize("n, stride", SIZES)
def test_evaluation_scores_every_token_once_as_a_slow_loop_does(n, stride):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, block_size=16, n_embd=48, n_layer=1, micro_batch=3, dropout=0.5)
    model = gpt2.Model(gpt2.Config(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    tokens, eot = np.random.default_rng(0).integers(40, size=n).astype("<u2"), 39
    text, total, seen, step = [eot, *tokens.tolist()], 0.0, 0, min(stride or 16, 16)
    while seen < n:  # a window ends where the next `step` tokens do, and has block_size tokens
        end = min(n, 16 if seen == 0 else seen + step)
        start = max(0, end - 16)
        logp = model(torch.tensor([text[start:end]])).log_softmax(-1)[0]
        total -= sum(logp[i - start, text[i + 1]].item() for i in range(seen, end))
        seen = end
    amp = torch.autocast("cpu", torch.bfloat16, enabled=False)
    shapes = set()
    model.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape))
    nats = gpt2.evaluate(model.train(), tokens, eot, amp, stride=stride)
    assert nats == pytest.approx(total / n, abs=1e-5)
    assert shapes == {(3, min(n, 16))}, "another shape would be compiled again"


def test_the_final_evaluation_is_of_the_whole_split_and_eval_only_repeats_it(ended, data, capsys):
    """Per token, per byte and per word, in nats, bits and perplexity. Nothing is written."""
    out, text = ended
    trained = re.search("all of val: .*", text)[0]
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    found = []
    for more in ([], ["--stride", "8"], ["--split", "train"]):
        gpt2.main(["--out", str(out), "--eval-only", "--device", "cpu", *more])
        found.append(re.search("all of .*", capsys.readouterr().out)[0])
    assert found[0] == trained and len(set(found)) == 3 and "all of train: " in found[2]
    assert files == {p.name: p.read_bytes() for p in out.iterdir()}

    meta, _, splits = gpt2.open_data(data)
    model = gpt2.Model(gpt2.Config(**checkpoint(out)["config"])).eval()
    model.load_state_dict(checkpoint(out)["model"])
    text, total = torch.tensor([meta["eot"], *splits["val"].tolist()]), 0.0
    with torch.no_grad():
        for start in range(0, len(text) - 64, 64):
            logits = model(text[None, start : start + 64])[0]
            total += F.cross_entropy(logits, text[start + 1 : start + 65], reduction="sum").item()
        rest = (len(text) - 1) % 64  # the last window reaches back
        logits = model(text[None, -65:-1])[0]
        total += F.cross_entropy(logits[64 - rest :], text[-rest:], reduction="sum").item()
    n = meta["splits"]["val"]
    assert n["tokens"] > 600 > 512 and rest
    expected = [total / n["tokens"], total / n["bytes"] / math.log(2)]
    expected += [math.exp(total / n[f"{unit}s"]) for unit in ("token", "word", "byte")]
    assert numbers(trained) == pytest.approx(expected, rel=1e-4)
    assert re.sub(r"[\d.,]+", "N", trained) == (
        "all of val: N nats per tokenN N bits per byte; perplexity "
        "N per tokenN N per wordN N per byte"
    )


def test_perplexity_per_word_needs_words():
    """Without spaces there are no words, or a single one: its perplexity is no number."""
    for words in (0, 1):
        line = gpt2.describe(5.0, dict(tokens=900, bytes=1800, words=words), True)
        assert "word" not in line and "148.4132 per token, 12.1825 per byte" in line
    hidden = gpt2.describe(5.0, dict(tokens=900, bytes=1800, words=9), False)
    assert hidden == "5.0000 nats per token"


def test_compiled_losses_are_the_eager_ones(data, tmp_path, monkeypatch):
    """Without g++, which takes half a minute: it is torch's own, and tests/soak.py runs it. This
    data set has no validation split."""
    compilation, compiled = torch.compile, []

    def compiler(model):
        compiled.append(model)
        return compilation(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiler)
    folder = shutil.copytree(data, tmp_path / "set")
    change(folder, splits={"train": change(folder)["splits"]["train"]})
    eager = train("gpt2", folder, tmp_path / "eager", "--max-steps", 2)
    assert compiled == []
    other = train("gpt2", folder, tmp_path / "compiled", "--max-steps", 2, "--compile")
    assert len(compiled) == 1, "compiled once, since the network does not grow"
    losses = [column(log, "train_loss") for log in (eager, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    names = [checkpoint(tmp_path / run)["model"].keys() for run in ("eager", "compiled")]
    assert names[0] == names[1]
    assert eager[-1]["val_loss"] == "" and not (tmp_path / "compiled" / "best.pt").exists()


def test_a_network_that_grew_is_compiled_anew(monkeypatch):
    """torch keeps 8 versions of a function, and runs the next one without the compiler."""
    calls = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda model: calls.append("compile") or model)
    gpt2.prepare_model(torch.nn.Linear(1, 1), True)
    gpt2.prepare_model(torch.nn.Linear(1, 1), False)
    assert calls == ["reset", "compile"]


# --- what goes wrong


def test_a_run_killed_at_random_moments_is_resumed_to_the_last_bit(data, tmp_path):
    more = ("--max-steps", 20, "--eval-interval", 4, "--dropout", 0.1, "--n-layer", 1)
    rng, out, kills = random.Random(1), tmp_path / "run", 0
    whole = train("gpt2", data, tmp_path / "whole", *more)
    for i in range(3):
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        child = start("gpt2", *argv(data, out, *more), *resume, log=tmp_path / f"{i}", pause=0.03)
        wait_for("step", tmp_path / f"{i}")
        child.join(rng.uniform(0, 0.4))
        kills += child.is_alive()
        child.kill()
        child.join()
        if (out / "ckpt.pt").exists():
            gpt2.read_checkpoint(out / "ckpt.pt")
    assert kills >= 2 and same_rows(train("gpt2", data, out, "--resume", *more), whole)
    assert same_state(out, tmp_path / "whole")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, file = [], tmp_path / "new" / "file"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: done.append("fsync") or fsync(*args))
    monkeypatch.setattr(os, "replace", lambda *args: done.append("replace") or replace(*args))
    gpt2.write_atomically(file, lambda f: f.write(b"text"))
    assert done == ["fsync", "replace"] and file.read_bytes() == b"text"
    with pytest.raises(ZeroDivisionError):
        gpt2.write_atomically(file, lambda f: f.write(b"more") / 0)
    monkeypatch.setattr(gpt2, "rank", 1)  # only the first process writes
    gpt2.write_atomically(file, lambda f: f.write(b"other"))
    assert file.read_bytes() == b"text" and [*file.parent.iterdir()] == [file]


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    more = ("--max-steps", 10**6, "--n-layer", 1, "--log-interval", 10**6)
    child = start("gpt2", *argv(data, out, *more), log=log)
    wait_for("step 1/", log)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    said, step = log.read_text(encoding="utf-8"), checkpoint(out)["step"]
    assert child.exitcode == 130 and "--resume" in said and "all of val" not in said
    assert column(rows(out), "step") == [1, step]


@pytest.fixture
def handlers():
    """Of Ctrl-C and SIGTERM, as a terminal has them: pytest in the background ignores Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, signal.default_int_handler) for n in numbers]
    yield lambda: [signal.getsignal(n) for n in numbers]
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_second_ctrl_c_ends_a_run_at_once_and_handlers_are_put_back(handlers, data, tmp_path):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), gpt2.catch_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGTERM, signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("a second Ctrl-C has no effect")
    assert handlers() == before
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    assert handlers() == before
    more = ("gpt2", data, tmp_path / "thread", "--max-steps", 1)
    thread = threading.Thread(target=train, args=more)  # there, Python allows no handlers
    thread.start()
    thread.join()
    assert checkpoint(tmp_path / "thread")["step"] == 1


def test_ctrl_c_may_come_in_the_middle_of_a_line_that_is_printed(handlers, monkeypatch):
    """A handler that prints would then fail: a buffer cannot be entered twice."""

    class Terminal(RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not caught:
                signal.raise_signal(signal.SIGINT)
            return len(data)

    monkeypatch.setattr("sys.stdout", TextIOWrapper(BufferedWriter(Terminal())))
    with gpt2.catch_signals() as caught:
        gpt2.print0("a line")
    assert caught == [signal.SIGINT]


@pytest.mark.parametrize("options", [["--eval-only"], ["--resume", "--max-steps", "7"]])
def test_ctrl_c_in_a_final_evaluation_is_one_line(options, handlers, again, monkeypatch, capsys):
    evaluate = gpt2.evaluate

    def interrupted(model, tokens, *more):
        if len(tokens) > 512:
            signal.raise_signal(signal.SIGINT)
        return evaluate(model, tokens, *more)

    monkeypatch.setattr(gpt2, "evaluate", interrupted)
    with pytest.raises(SystemExit) as e:
        gpt2.main(["--out", str(again), "--device", "cpu", *options])
    assert e.value.code == 130 and capsys.readouterr().err == "gpt2.py: interrupted\n"


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(size, again, data, tmp_path):
    before = (again / "ckpt.pt").read_bytes()
    child = start(
        "gpt2",
        *argv(data, again, "--resume", "--max-steps", 9),
        log=tmp_path / "log",
        file_limit=size,
    )
    child.join()
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert child.exitcode == 1 and "disk" in said.splitlines()[-1] and "Traceback" not in said, said
    assert (again / "ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in again.iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(value, again, data, tmp_path):
    state = checkpoint(again)
    state["model"]["wte.weight"][:, 0] = value
    torch.save(state, tmp_path / "bad.pt")
    more = ("--init-from", tmp_path / "bad.pt", "--n-layer", 1, "--max-steps", 9)
    for dtype in ("float32", "float16"):
        new = tmp_path / dtype
        line = refused(gpt2.main, *argv(data, new, *more, "--dtype", dtype))
        assert "step 1:" in line and "ckpt.pt" in line and len(rows(new)) == 0


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(again, data, monkeypatch):
    """Its loss is finite. So is the checkpoint from before it."""
    clip = torch.nn.utils.clip_grad_norm_

    def broken(parameters, max_norm):
        parameters = [*parameters]
        parameters[3].grad[0] = math.nan
        return clip(parameters, max_norm)

    before = checkpoint(again)["model"]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    more = ("--resume", "--n-layer", 1, "--max-steps", 9)
    line = refused(gpt2.main, *argv(data, again, *more))
    assert "step 7: loss 4." in line and "norm nan" in line
    assert all(torch.equal(w, before[key]) for key, w in checkpoint(again)["model"].items())


def test_a_wreck_is_not_saved(again, data):
    """The rate breaks the weights in one step, and the evaluation after it is not finite."""
    more = ("--resume", "--n-layer", 1, "--max-steps", 40, "--learning-rate", 1e30)
    assert "step" in refused(gpt2.main, *argv(data, again, *more, "--eval-interval", 1))
    for file in ("ckpt.pt", "best.pt"):
        assert all((w.abs() < 1000).all() for w in checkpoint(again, file)["model"].values())


def test_bad_data_folders(data, tmp_path):
    def fails(folder):
        return refused(gpt2.main, *argv(folder, tmp_path / "run"))

    notes, folder = tmp_path / "my notes.txt", tmp_path / "a set"
    notes.write_text("some text", encoding="utf-8")
    assert "prepare_data.py stdlib" in fails(tmp_path / "nowhere")
    assert f"prepare_data.py '{notes}'" in fails(notes)
    shutil.copytree(data, folder)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-2])
    assert "train.bin" in fails(folder)
    splits = change(folder)["splits"]
    splits["train"]["tokens"] = 64
    change(folder, splits=splits)
    (folder / "train.bin").write_bytes(whole[:128])  # one token is missing
    assert "--block-size" in fails(folder)
    (folder / "tokenizer.tiktoken").unlink()
    assert "tokenizer.tiktoken" in fails(folder)
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing behind"


def test_numbers_out_of_range_are_one_line_before_a_folder_is_made(data, tmp_path, monkeypatch):
    def fails(*more):
        return refused(gpt2.main, *argv(data, tmp_path / "run", *more))

    least = dict.fromkeys("seed max-steps warmup-steps".split(), 0) | {"eot": -1}
    for name in """block-size n-layer n-head n-embd batch-size micro-batch eval-interval eval-tokens
                   log-interval stride""".split():
        least[name] = 1
    for name, value in least.items():
        line = fails(f"--{name}={value - 1}")
        assert f"--{name}: {value - 1}: at least {value} is needed" in line
        gpt2.parse([f"--{name}={value}"])
        assert "invalid" in fails(f"--{name}", "many")
    for name in ("learning-rate", "weight-decay", "grad-clip", "dropout"):
        for value in ("-0.1", "nan"):
            assert f"--{name}: {value}: at least 0 is needed" in fails(f"--{name}={value}")
        gpt2.parse([f"--{name}=0"])
    assert "--dropout" in fails("--dropout", 1)
    monkeypatch.setattr(gpt2, "world_size", 5)
    assert "--batch-size at least 5" in fails("--batch-size", 4)
    assert not (tmp_path / "run").exists()


def test_bad_options(again, data, tmp_path):
    def fails(*more, out=tmp_path / "new"):
        return refused(gpt2.main, *argv(data, out, *more))

    assert "n_embd" in fails("--n-embd", 50)
    assert "--device" in fails("--device", "tpu") and "bfloat16" in fails("--dtype", "half")
    line = fails("--resume")
    assert "ckpt.pt" in line and "No such file" in line and "damaged" not in line
    assert "not allowed with" in fails("--resume", "--init-from", "x.pt")
    assert "memory" in fails("--block-size", 10**13)
    if not torch.cuda.is_available():
        assert "--device cpu" in fails("--device", "cuda")
    assert not (tmp_path / "new").exists()
    assert "--resume" in fails(out=again) and "--out" in fails(out=again)
    assert "n_layer" in fails("--resume", "--n-layer", 3, out=again)
    assert "train, val" in fails("--eval-only", "--n-layer", 1, "--split", "test", out=again)


def test_damaged_and_foreign_checkpoints(again, data, tmp_path):
    path = again / "ckpt.pt"
    whole, ckpt = path.read_bytes(), checkpoint(again)

    def resume(content, name="gpt2"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        more = ("--resume", "--n-layer", FEW_LAYERS[name], "--max-steps", 7)
        return refused(load(name).main, *argv(data, again, *more))

    flipped = bytearray(whole)  # torch.load would not notice
    flipped[whole.index(ckpt["model"]["wte.weight"].numpy().tobytes()) + 1001] ^= 1

    class Trap:  # pickle would run this when it is loaded
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    half, sprung = whole[: len(whole) // 2], ckpt | {"best": Trap()}
    for content in (b"", half, whole[:-1], b"a text", bytes(flipped), {"a": 1}, [1], sprung):
        assert "ckpt.pt: no checkpoint of this repository, or damaged" in resume(content)
    assert not (tmp_path / "sprung").exists()
    assert "mixer.py" in resume(ckpt | {"model_file": "mixer.py"})
    assert "gpt2.py" in resume(whole, "mixer")
    assert "tokenizer" in resume(ckpt | {"tokenizer": ckpt["tokenizer"] | {"name": "gpt2"}})


def test_a_student_s_own_mistake_shows_its_line(data, tmp_path, monkeypatch):
    """Only a UserError becomes one line. It is a ValueError for those who call from Python."""
    mistakes = [ValueError("a mistake"), RuntimeError("a mistake"), KeyError("a mistake")]

    def forward(self, x, *more):
        raise mistakes[0]

    monkeypatch.setattr(gpt2.Attention, "forward", forward)
    while mistakes:
        with pytest.raises(type(mistakes[0]), match="a mistake"):
            gpt2.main(argv(data, tmp_path / f"{len(mistakes)}", "--n-layer", 1))
        mistakes.pop(0)
    assert issubclass(gpt2.UserError, ValueError)


def test_help_shows_the_comments_of_config(capsys, tmp_path, monkeypatch):
    """Also in the file of a student, where one has a percent sign, and another one is missing."""
    text = (ROOT / "gpt2.py").read_text(encoding="utf-8").replace("  # blocks\n", "\n")
    text = text.replace("  # attention heads", "  # 50% of them")
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name, shown in (("gpt2", "blocks (default: 12)"), ("mine", "50% of them (default: 6)")):
        with pytest.raises(SystemExit):
            load(name).main(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert shown in said and "--no-compile" in said and "--eval-only" in said
        assert "--n-layer N_LAYER" in said and "(default: 12)" in said


def test_auto_is_a_type_that_the_device_is_fast_at(monkeypatch):
    def auto(device, **capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        return gpt2.choose_device(device)[1]

    assert auto("cpu", avx512_vnni=True) == torch.float32
    assert auto("cpu", amx_bf16=True) == auto("cpu", avx512_bf16=True) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch < 2.11 has none
    assert gpt2.choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert gpt2.choose_device("cpu", "float16")[1] == torch.float16
    used = []
    card = types.SimpleNamespace(device=torch.device("cuda:3"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda n, device: card if device == "cuda:3" else None)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert auto("cuda") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert auto("cuda") == torch.float16 and used == [card.device] * 2
