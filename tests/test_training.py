"""The training section: it learns, logs, evaluates, resumes, survives kills, says what is wrong."""

import functools
import math
import os
import random
import re
import shutil
import signal
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import MODEL_FILES, argv, refused, rows, same_rows, start, start_two, train, wait_for
from test_models import small

import gpt2


def checkpoint(out, file="ckpt.pt"):
    return torch.load(out / file, weights_only=True)


def same_state(a, b):
    """Whether two runs have the same weights and moments, to the last bit."""
    states = []
    for ckpt in (checkpoint(a), checkpoint(b)):
        moments = [m for state in ckpt["optimizer"]["state"].values() for m in state.values()]
        states.append([tensor.tolist() for tensor in (*ckpt["model"].values(), *moments)])
    return states[0] == states[1]


def column(log, name):
    return [float(row[name]) for row in log if row[name]]


@pytest.fixture(scope="session")
def ended(data, tmp_path_factory):
    """A run of gpt2.py that came to its end after 6 steps."""
    out = tmp_path_factory.mktemp("ended") / "run"
    train("gpt2", data, out, "--max-steps", 6, "--learning-rate", 3e-3, "--eval-tokens", 9999)
    return out


@pytest.fixture
def again(ended, tmp_path):
    """A copy of that run, which a test may change."""
    return shutil.copytree(ended, tmp_path / "run")


@pytest.mark.parametrize(
    "dtype, clip, tolerance",
    [("float32", 0.3, 1e-4), ("float32", 0, 1e-4), ("bfloat16", 0.3, 0.03), ("float16", 0.3, 4e-3)],
)
def test_a_run_is_what_a_plain_loop_in_float32_computes(dtype, clip, tolerance, data, tmp_path):
    """The micro-batch does not divide the batch, and the log has rows between evaluations."""
    options = "--max-steps 8 --log-interval 3 --eval-interval 5 --micro-batch 3 --warmup-steps 3"
    options += f" --learning-rate 1e-2 --weight-decay 0.5 --grad-clip {clip} --seed 5"
    log = train("gpt2", data, tmp_path, *options.split(), "--dtype", dtype)

    meta, _, splits = gpt2.open_data(data)
    cfg = gpt2.Config(**checkpoint(tmp_path)["config"])
    torch.manual_seed(5)
    model = gpt2.Model(cfg)
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.5}]
    for p in model.parameters():
        groups[p.dim() > 1]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    expected = {}
    for step in range(8):
        batch = gpt2.get_batch(splits["train"], 65, cfg, step)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9).item()
        for group in optimizer.param_groups:
            group["lr"] = gpt2.learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        row = [step + 1, 256 * (step + 1), loss.item(), group["lr"], norm]
        if step + 1 in (5, 8):  # the first 512 tokens, in windows of 64 after an end of text
            text = torch.tensor([meta["eot"], *splits["val"][:512].tolist()]).unfold(0, 65, 64)
            val, counts = model(text[:, :-1], text[:, 1:]).item(), meta["splits"]["val"]
            row[3:3] = [val, val / math.log(2) * counts["tokens"] / counts["bytes"]]
        expected[step + 1] = row
    columns = "step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_s seconds"
    assert list(log[0]) == columns.split() and column(log, "step") == [1, 3, 5, 6, 8]
    found = [[float(value) for value in list(row.values())[:-2] if value] for row in log]
    for rel, holds in ((tolerance, True), (1e-4, dtype == "float32")):
        assert all(row == pytest.approx(expected[row[0]], rel=rel) for row in found) == holds
    assert norm > 0.4 and loss < float(log[0]["train_loss"]) - 0.3


def test_batches_are_random_windows_and_each_step_has_its_own_seed(data, tmp_path, monkeypatch):
    """Windows come from all over the training split. Each run and each process has its own."""
    get_batch, manual_seed = gpt2.get_batch, torch.manual_seed
    calls, starts, seeds = [], [], []
    monkeypatch.setattr(gpt2, "get_batch", lambda *args: calls.append(args) or get_batch(*args))
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or manual_seed(n))
    for seed in (1, 2):
        more = ("--max-steps", 20, "--seed", seed, "--batch-size", 8, "--n-embd", 6)
        train("gpt2", data, tmp_path / f"{seed}", *more)
    for tokens, *more in calls:
        assert tokens.filename == data / "train.bin"
        starts += get_batch(np.arange(len(tokens)), *more)[:, 0].tolist()
    assert len({*starts}) > 310 and np.histogram(starts, 8, (0, len(tokens)))[0].min() > 20
    few = get_batch(np.arange(12), 9, gpt2.Config(batch_size=200), 0)
    assert {*few[:, 0].tolist()} == {0, 1, 2, 3}, "the first and the last token are read, too"

    monkeypatch.setattr(gpt2, "rank", 1)  # another process
    gpt2.main(argv(data, tmp_path / "rank 1", "--max-steps", 20, "--seed", 1, "--n-layer", 1))
    assert [seeds.pop(i) for i in (42, 21, 0)] == [1, 2, 1]  # of the initial weights
    assert len(set(seeds)) == len(seeds) == 60


def test_two_processes_train_and_evaluate_as_one_and_a_signal_to_either_stops_both(data, tmp_path):
    """A batch of 5 is 3 rows, in two micro-batches, and 2. The first process evaluates one more."""
    out = tmp_path / "two"
    more = "--eval-interval 4 --eval-tokens 9999 --batch-size 5 --log-interval 9999 --n-layer 1"
    options = argv(data, out, *more.split(), "--max-steps", 9999)
    two = start_two("gpt2", *options, log=tmp_path / "log")
    wait_for("step 4/", tmp_path / "log 0")
    os.kill(two[1].pid, signal.SIGTERM)
    for child in two:
        child.join(60)
    said = [(tmp_path / f"log {i}").read_text(encoding="utf-8") for i in (0, 1)]
    assert [child.exitcode for child in two] == [128, 143], said  # 128 + 15, which is SIGTERM
    assert "--resume" in said[0] and not re.search("warn|all of val", said[0]) and said[1] == ""
    one = train("gpt2", data, tmp_path / "one", *more.split(), "--max-steps", 10)[:2]
    for name in ("step", "train_loss", "val_loss", "grad_norm"):
        assert column(one, name) == pytest.approx(column(rows(out)[:2], name), abs=1e-5), name
    assert int(rows(out)[-1]["step"]) == checkpoint(out)["step"] >= 4


def test_float16_skips_steps_that_overflow(data, tmp_path, monkeypatch):
    """The scaler begins with a factor of 2^36, and halves it until all gradients are finite."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    log = train("gpt2", data, tmp_path, *"--max-steps 40 --dtype float16 --eval-interval 1".split())
    n = sum(not math.isfinite(norm) for norm in column(log, "grad_norm"))
    val = column(log, "val_loss")
    assert 2 < n < 35 and val[:n] == [val[0]] * n and val[n] != val[0]
    assert checkpoint(tmp_path)["scaler"]["scale"] == 2.0 ** (36 - n)


@pytest.mark.parametrize("name", [name for name in MODEL_FILES if name != "progressive"])
def test_a_run_killed_and_resumed_is_the_run_that_never_stopped(name, data, tmp_path):
    """Bit for bit, and in another process. progressive.py has a test of its own."""
    out, log = tmp_path / "parts", tmp_path / "log"
    more = "--dropout 0.1 --eval-interval 2 --max-steps 8 --seed 5 --dtype".split()
    more.append("float16" if name == "gpt2" else "float32")
    whole = train(name, data, tmp_path / "whole", *more)
    options = ("--n-layer", checkpoint(tmp_path / "whole")["config"]["n_layer"], *more)
    child = start(name, *argv(data, out, *options), log=log, pause=0.03)
    wait_for("step 5/", log)
    child.join(random.random() / 5)
    child.kill()
    child.join()
    start(name, "--out", out, "--resume", "--device", "cpu", log=log).join()  # it knows the rest
    assert same_rows(rows(out), whole) and same_state(tmp_path / "whole", out)
    assert checkpoint(out)["scaler"] == checkpoint(tmp_path / "whole")["scaler"]


def test_a_log_column_is_one_quantity(again, data):
    """Tokens are those seen, whatever the batch size was; rows after the checkpoint are removed."""
    with open(again / "log.csv", "a", encoding="utf-8") as file:
        file.write("7,9999,1,1,1,1,1,1,1\n1")  # after the checkpoint; half of a row from 10 to 19
    more = "--resume --max-steps 10 --batch-size 2 --log-interval 3".split()
    log = train("gpt2", data, again, *more)
    assert column(log, "step") == [1, 2, 3, 4, 5, 6, 9, 10]
    assert column(log, "tokens")[-3:] == [6 * 256, 6 * 256 + 3 * 128, 6 * 256 + 4 * 128]
    seconds = np.diff(column(log, "seconds")[-3:])
    assert column(log, "tokens_per_s")[-2:] == pytest.approx([3 * 128, 128] / seconds)


def test_best_has_the_lowest_validation_loss(data, tmp_path, capsys, monkeypatch):
    """The loss rises from step 4 on. A resumed run keeps the best, unless val is another text."""
    out, other = tmp_path / "run", shutil.copytree(data, tmp_path / "set")
    monkeypatch.setattr(gpt2, "learning_rate", lambda step, cfg: 2e-3 if step < 4 else -2e-3)
    values = column(train("gpt2", data, out, "--max-steps=8", "--eval-interval=2"), "val_loss")
    assert min(values) == values[1] == checkpoint(out)["best"] < values[3] - 0.01
    printed = capsys.readouterr().out
    assert f"best: {values[1]:.4f} at step 4, {out}/best.pt" in printed
    times = 8 * 256 / len(gpt2.open_data(data)[2]["train"])
    assert f"8 steps read the text {times:.1f} times" in printed
    monkeypatch.setattr(gpt2, "learning_rate", lambda step, cfg: 0.0)
    for steps, folder, n, of_step in (10, data, 512, 4), (12, other, 512, 12), (14, other, 99, 14):
        train("gpt2", folder, out, "--resume", "--max-steps", steps, "--eval-tokens", n)
        assert checkpoint(out, "best.pt")["step"] == of_step
        assert f"at step {of_step}, " in capsys.readouterr().out


def test_init_from_takes_the_weights_and_no_option(again, data, tmp_path):
    out = tmp_path / "new"
    gpt2.main(argv(data, out, "--init-from", again / "ckpt.pt"))
    new = checkpoint(out)
    assert (new["step"], new["tokens"], new["config"]["n_layer"]) == (1, 256, 1)
    assert new["config"]["learning_rate"] == gpt2.Config.learning_rate
    assert float(rows(out)[0]["train_loss"]) < float(rows(again)[0]["train_loss"]) - 0.3
    cfg = gpt2.parse(["--preset", "gpt2", "--n-layer", "3"])[0]
    assert (cfg.n_layer, cfg.n_head, cfg.seed) == (3, 12, gpt2.Config.seed)


def test_a_checkpoint_s_memory_is_free_in_training(again, monkeypatch):
    loaded = gpt2.parse(["--resume", "--out", str(again), "--device", "cpu", "--max-steps", "7"])
    weight, found = weakref.ref(loaded[2]["model"]["wte.weight"]), []
    monkeypatch.setattr(gpt2, "grow", lambda *arguments: found.append(weight()))
    (again / "log.csv").unlink()  # the run goes on without it
    gpt2.train(*loaded)
    assert found == [None, None] and column(rows(again), "step") == [7]


@pytest.mark.parametrize("n, stride", [(7, None), (16, 5), (17, None), (50, 1), (64, 5), (64, 99)])
def test_evaluation_scores_every_token_once_as_a_slow_loop_does(n, stride):
    """Windows have one shape: another one would be compiled again."""
    model = small("gpt2", vocab_size=40, block_size=16, n_layer=1, micro_batch=3, dropout=0.5)
    tokens, eot = np.random.default_rng(0).integers(40, size=n).astype("<u2"), 39
    text, T, scores = [eot, *tokens.tolist()], min(n, 16), {}
    for first in [*range(0, n - T, min(stride or T, T)), n - T]:
        logp = model(torch.tensor([text[first : first + T]])).log_softmax(-1)[0]
        for i in range(T):  # a target counts in the first window that has it
            scores.setdefault(first + i, -logp[i, text[first + i + 1]].item())
    shapes, amp = set(), torch.autocast("cpu", enabled=False)
    model.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape))
    nats = gpt2.evaluate(model.train(), tokens, eot, amp, stride)
    assert nats == pytest.approx(sum(scores.values()) / n, abs=1e-5) and shapes == {(3, T)}


def test_the_final_evaluation_is_of_a_whole_split_and_eval_only_repeats_it(data, tmp_path, capsys):
    log = train("gpt2", data, tmp_path, "--eval-tokens", 9999)
    nats, bits = (float(log[0][name]) for name in ("val_loss", "val_bits_per_byte"))
    said, files = [capsys.readouterr().out], {p: p.read_bytes() for p in tmp_path.iterdir()}
    for more in ([], ["--stride", "8"], ["--split", "train"]):
        gpt2.main(["--out", str(tmp_path), "--eval-only", "--device", "cpu", *more])
        said.append(capsys.readouterr().out)
    lines = [re.search("all of .*", text)[0] for text in said]
    assert lines[0].startswith(f"all of val: {nats:.4f} nats per token, {bits:.4f} bits per byte")
    assert lines[0] == lines[1] and len({*lines}) == 3 and "all of train" in lines[3]
    assert files == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_loss_is_given_per_token_byte_and_word_in_nats_bits_and_perplexity():
    """Without spaces there are no words, or one huge word."""
    line = "5.0000 nats per token, 3.6067 bits per byte; perplexity 148.4132 per token,"
    for words, of_words in ((300, " 3,269,017.3725 per word,"), (1, ""), (0, "")):
        counts = dict(tokens=900, bytes=1800, words=words)
        assert gpt2.describe(5.0, counts, True) == f"{line}{of_words} 12.1825 per byte"
    assert gpt2.describe(5.0, counts, False) == "5.0000 nats per token"


# --- what goes wrong


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, file, fsync, replace = [], tmp_path / "new" / "file", os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: done.append("fsync") or fsync(*args))
    monkeypatch.setattr(os, "replace", lambda *args: done.append("replace") or replace(*args))
    gpt2.write_atomically(file, lambda f: f.write(b"text"))
    assert done == ["fsync", "replace"] and file.read_bytes() == b"text"
    with pytest.raises(ZeroDivisionError):
        gpt2.write_atomically(file, lambda f: f.write(b"more") / 0)
    monkeypatch.setattr(gpt2, "rank", 1)  # only the first process writes
    gpt2.write_atomically(file, lambda f: f.write(b"other"))
    assert file.read_bytes() == b"text" and [*file.parent.iterdir()] == [file]


def test_the_first_ctrl_c_is_noted_and_the_second_ends_a_run(again, monkeypatch, capfd):
    """Not print: a signal may come in the middle of one. A final evaluation ends at the first."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a terminal has it
    with monkeypatch.context() as patch, gpt2.catch_signals() as caught:
        patch.setattr("builtins.print", None)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGTERM, signal.SIGINT]
    assert capfd.readouterr().err.count("once more stops at once") == 2
    monkeypatch.setattr(gpt2, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as e:
        gpt2.main(["--out", str(again), "--device", "cpu", "--eval-only"])
    assert e.value.code == 130 and capfd.readouterr().err == "gpt2.py: interrupted\n"
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(size, again, tmp_path):
    before, log = {p: p.read_bytes() for p in again.iterdir()}, tmp_path / "log"
    options = ("--out", again, "--resume", "--device", "cpu", "--max-steps", 9)
    child = start("gpt2", *options, log=log, file_limit=size)
    child.join()
    said = log.read_text(encoding="utf-8")
    assert child.exitcode == 1 and "disk" in said.splitlines()[-1] and "Traceback" not in said, said
    assert before == {p: p.read_bytes() for p in again.iterdir()}


@pytest.mark.parametrize("dtype, rate", [("float32", 1e30), ("float16", 1e30), ("float32", 0)])
def test_a_loss_or_gradient_that_is_not_finite_ends_a_run(dtype, rate, ended, again, monkeypatch):
    """Nothing is saved. The rate breaks the weights in one step; then the evaluation is not finite
    or, if there is none, the next loss. With a rate of 0, the gradients are not finite."""
    if rate == 0:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    more = f"--resume --device cpu --max-steps 9 --eval-interval {1 if dtype == 'float32' else 9}"
    options = (*more.split(), "--dtype", dtype, "--learning-rate", rate)
    line = refused(gpt2.main, "--out", again, *options)
    assert ("loss nan" if rate else "step 7: loss 4.") in line
    assert "ckpt.pt is from before it" in line and same_state(again, ended)


def test_what_cannot_be_done_is_one_line_and_leaves_nothing_behind(again, data, tmp_path):
    new, notes = tmp_path / "new", tmp_path / "my notes.txt"
    notes.write_text("some text", encoding="utf-8")
    short, bare = (shutil.copytree(data, tmp_path / name) for name in ("short", "bare"))
    (short / "train.bin").write_bytes(bytes(101))
    (bare / "tokenizer.tiktoken").unlink()
    n = (data / "train.bin").stat().st_size // 2
    for options, expected in (
        (["--data", tmp_path / "nowhere"], "prepare_data.py stdlib"),
        (["--data", notes], f"prepare_data.py '{notes}'"),
        (["--data", short], "meta.json says"),
        (["--data", bare], "tokenizer.tiktoken"),
        (["--block-size", n], "lower --block-size"),
        (["--block-size", 10**13], "memory"),
        (["--device", "mps:9"], "Try --device cpu"),
        (["--dropout", 1], "--dropout must be below 1"),
        (["--n-head", 0], "--n-head: 0: at least 1 is needed"),
        (["--seed=-1"], "--seed: -1: at least 0 is needed"),
        (["--grad-clip=-0.1"], "--grad-clip: -0.1: at least 0 is needed"),
        (["--learning-rate", "nan"], "--learning-rate: nan: at least 0 is needed"),
        (["--resume"], "No such file"),
        (["--out", again], "--resume continues it"),
        (["--out", again, "--resume", "--n-layer", 3], "another n_layer"),
        (["--out", again, "--n-layer", 1, "--eval-only", "--split", "test"], "train, val"),
    ):
        assert expected in refused(gpt2.main, *argv(data, new, *options)), options
    assert not new.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch itself
def test_without_a_compiler_one_line_names_the_option(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert "--no-compile" in refused(gpt2.main, *argv(data, tmp_path, "--n-layer", 1, "--compile"))


def test_damaged_and_foreign_checkpoints_are_one_line(again):
    path = again / "ckpt.pt"
    whole, ckpt = path.read_bytes(), checkpoint(again)
    flipped = bytearray(whole)  # torch.load would not notice
    flipped[whole.index(ckpt["model"]["wte.weight"].numpy().tobytes()) + 1001] ^= 1
    weights = {k: ckpt[k] for k in ("model_file", "config", "tokenizer", "model")}
    options = ["--out", again, "--resume", "--device", "cpu", "--data", ckpt["config"]["data"]]
    damaged = "ckpt.pt: no checkpoint of this repository, or damaged"
    for content, expected in [
        *((text, damaged) for text in (b"", b"a text", whole[:999], whole[:-1], bytes(flipped))),
        *((value, damaged) for value in ({"a": 1}, [1], ckpt | {"best": os.abort})),
        (ckpt | {"model_file": "mixer.py"}, "mixer.py: run that file"),
        (weights, "--init-from starts"),
        (ckpt | {"tokenizer": {"name": "gpt2", "ranks": ""}}, "has another tokenizer"),
        (weights | {"config": {}, "tokenizer": {"name": "gpt2", "ranks": ""}}, "--tokenizer gpt2"),
    ]:
        if isinstance(content, dict | list):
            torch.save(content, path)
        else:
            path.write_bytes(content)
        assert expected in refused(gpt2.main, *options)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError])
def test_a_student_s_own_mistake_shows_its_line(kind, data, tmp_path, monkeypatch):
    """Only a UserError becomes one line. It is a ValueError for those who call from Python."""
    monkeypatch.setattr(gpt2.Attention, "forward", Mock(side_effect=kind("a mistake")))
    with pytest.raises(kind, match="a mistake"):
        gpt2.main(argv(data, tmp_path, "--n-layer", 1))
    assert issubclass(gpt2.UserError, ValueError)


def test_auto_is_a_type_that_the_device_is_fast_at(monkeypatch):
    for has in ("avx512_vnni", "amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {has: True}, False)
        assert gpt2.choose_device("cpu")[1] == (torch.bfloat16 if "bf16" in has else torch.float32)
    card = Mock(device=torch.device("cuda:3"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda n, device: {"cuda:3": card}[device])
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=has))
        assert gpt2.choose_device("cuda") == (card.device, dtype)
    torch.cuda.set_device.assert_called_with(card.device)
