"""The training section, through the command line of each model file: it learns, logs, saves, resumes, evaluates, and
says in one line what is wrong."""

import csv
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL_FILES, ROOT, load, run

each_model = pytest.mark.parametrize("name", MODEL_FILES)
TINY = "--n-embd 48 --n-head 6 --block-size 64 --batch-size 4 --micro-batch 2 --warmup-steps 5 --log-interval 1".split()
TINY += ["--dtype", "float32"]  # `auto` is bfloat16 on newer CPUs, whose rounding would hide what is compared


def argv(data, out, *more):
    return [*TINY, "--data", str(data), "--out", str(out), "--device", "cpu", "--eval-tokens", "512", *map(str, more)]


def train(name, data, out, *more):
    load(name).main(argv(data, out, *more))
    return rows(out)


def rows(out):
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(out, file="ckpt.pt"):
    return torch.load(out / file, weights_only=True)["model"]


def fails(name, data, out, *more, replace=()):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        load(name).main(argv(data, out, *more))
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and len(e.value.code) < 400, e.value.code
    return e.value.code


@each_model
def test_learns_logs_and_saves(name, data, tmp_path):
    out = tmp_path / "run"
    log = train(name, data, out, "--max-steps", 30, "--eval-interval", 10, "--learning-rate", 3e-3)
    assert list(log[0]) == "step,tokens,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,tokens_per_s,seconds".split(
        ","
    )
    assert [int(r["step"]) for r in log] == list(range(1, 31))
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"]) - 0.3
    assert [int(r["step"]) for r in log if r["val_loss"]] == [10, 20, 30]
    assert log[0]["val_loss"] == "" and int(log[-1]["tokens"]) == 30 * 4 * 64
    assert sorted(p.name for p in out.iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]


@each_model
def test_a_checkpoint_is_plain_and_carries_all_it_needs(name, data, tmp_path):
    train(name, data, tmp_path / "run", "--max-steps", 1)
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert ckpt["model_file"] == f"{name}.py" and ckpt["step"] == 1 and ckpt["config"]["n_embd"] == 48
    assert ckpt["tokenizer"]["ranks"] == (data / "tokenizer.tiktoken").read_text(encoding="utf-8")
    assert not [k for k in ckpt["model"] if k.startswith(("module.", "_orig_mod."))]


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in MODEL_FILES), ("gpt2", "bfloat16")])
def test_resuming_is_bit_for_bit_the_run_that_never_stopped(name, dtype, data, tmp_path):
    more = ("--dropout", 0.1, "--eval-interval", 7, "--dtype", dtype)
    whole = train(name, data, tmp_path / "whole", "--max-steps", 20, *more)
    # The same schedule of 20 steps, ended by SIGTERM in step 7 as a machine that is taken away would.
    handler = load(name).learning_rate

    def terminate(step, cfg):
        if step == 6 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return handler(step, cfg)

    load(name).learning_rate = terminate
    try:
        with pytest.raises(SystemExit) as e:
            train(name, data, tmp_path / "parts", "--max-steps", 20, *more)
    finally:
        load(name).learning_rate = handler
    assert e.value.code == 143 and len(rows(tmp_path / "parts")) == 7
    parts = train(name, data, tmp_path / "parts", "--resume", "--max-steps", 20, *more)
    assert [r["step"] for r in parts] == [r["step"] for r in whole]
    for column in ("train_loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm"):
        assert [r[column] for r in parts] == [r[column] for r in whole]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_do_not_change_the_losses(data, tmp_path):
    one = train("gpt2", data, tmp_path / "one", "--max-steps", 5, "--micro-batch", 4)
    three = train("gpt2", data, tmp_path / "three", "--max-steps", 5, "--micro-batch", 3)  # 3 + 1
    assert [float(r["train_loss"]) for r in one] == pytest.approx([float(r["train_loss"]) for r in three], abs=1e-5)


def test_two_processes_train_as_one(data, tmp_path):
    one = train("gpt2", data, tmp_path / "one", "--max-steps", 6, "--eval-interval", 3)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(*torchrun, "gpt2.py", *argv(data, tmp_path / "two", "--max-steps", 6, "--eval-interval", 3))
    two = rows(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for column in ("train_loss", "val_loss"):
        pairs = [(float(a[column]), float(b[column])) for a, b in zip(one, two) if a[column]]
        assert pairs and all(abs(a - b) < 1e-5 for a, b in pairs)


def test_batches_are_a_function_of_seed_and_step_and_shared_out_by_rank():
    import gpt2

    tokens, cfg = np.arange(5000, dtype="<u2"), gpt2.Config(block_size=16, batch_size=6, seed=3)
    idx, targets = gpt2.batch(tokens, cfg, 1, 7, 0, 1)
    again, _ = gpt2.batch(tokens, cfg, 1, 7, 0, 1)
    other, _ = gpt2.batch(tokens, cfg, 1, 8, 0, 1)
    assert torch.equal(idx, again) and not torch.equal(idx, other) and torch.equal(targets, idx + 1)
    ranks = [gpt2.batch(tokens, cfg, 1, 7, r, 2)[0] for r in range(2)]
    assert sorted(torch.cat(ranks)[:, 0].tolist()) == sorted(idx[:, 0].tolist())
    _, far = gpt2.batch(tokens, cfg, 64, 7, 0, 1)
    assert far.shape == (6, 16)


@pytest.mark.parametrize("stride", [1, 5, 16, None])
@pytest.mark.parametrize("n", [7, 16, 17, 50, 64])
def test_evaluation_scores_every_token_once_as_a_slow_loop_does(n, stride):
    import gpt2

    torch.manual_seed(0)
    cfg = gpt2.Config(vocab_size=40, block_size=16, n_embd=48, n_head=6, n_layer=2, micro_batch=3)
    model = gpt2.Model(cfg).eval()
    tokens, eot = np.random.default_rng(0).integers(40, size=n).astype("<u2"), 39
    text, total, seen, step = [eot, *tokens.tolist()], 0.0, 0, stride or 16
    while seen < n:  # the window ends where the next `step` tokens do, and reaches back block_size tokens
        end = min(n, 16 if seen == 0 else seen + step)
        start = max(0, end - 16)
        logp = model(torch.tensor([text[start:end]])).log_softmax(-1)[0]
        total -= sum(logp[i - start, text[i + 1]].item() for i in range(seen, end))
        seen = end
    amp = torch.autocast("cpu", torch.bfloat16, enabled=False)
    assert gpt2.evaluate(model, tokens, eot, cfg, 1, amp, stride=stride) == pytest.approx(total / n, abs=1e-5)


def test_eval_only_gives_perplexity_a_token_a_word_and_a_byte(data, tmp_path, capsys):
    log = train("gpt2", data, tmp_path / "run", "--max-steps", 3)
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    load("gpt2").main(["--out", str(tmp_path / "run"), "--eval-only"])
    plain = capsys.readouterr().out
    load("gpt2").main(["--out", str(tmp_path / "run"), "--eval-only", "--stride", "8"])
    strided = capsys.readouterr().out
    nats = float(log[-1]["val_loss"])
    n = json.loads((data / "meta.json").read_text(encoding="utf-8"))["splits"]["val"]
    plain, strided = " ".join(plain.split()), " ".join(strided.split())
    assert f"{nats:.4f} nats" in plain and f"{math.exp(nats):.3f} a token" in plain
    assert f"{math.exp(nats * n['tokens'] / n['words']):.3f} a word" in plain
    assert f"{nats / math.log(2) * n['tokens'] / n['bytes']:.4f} bits a byte" in plain
    assert re.search(r"[\d.]+ nats", strided)[0] != re.search(r"[\d.]+ nats", plain)[0]  # tokens saw more context
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_init_from_takes_the_weights_and_starts_anew(data, tmp_path):
    train("gpt2", data, tmp_path / "a", "--max-steps", 20, "--learning-rate", 3e-3)
    more = ["--init-from", tmp_path / "a" / "ckpt.pt", "--max-steps", 2]
    log = train("gpt2", data, tmp_path / "b", *more)
    assert int(log[0]["step"]) == 1 and float(log[0]["train_loss"]) < float(rows(tmp_path / "a")[0]["train_loss"]) - 0.3


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(data, tmp_path):
    log = train("gpt2", data, tmp_path / "run", "--max-steps", 12, "--eval-interval", 3, "--learning-rate", 0.03)
    values = {int(r["step"]): float(r["val_loss"]) for r in log if r["val_loss"]}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["best"] <= min(v for s, v in values.items() if s < 12) + 1e-6 and best["step"] in values


def test_trains_without_a_validation_split(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    meta = json.loads((tmp_path / "set" / "meta.json").read_text(encoding="utf-8"))
    del meta["splits"]["val"]
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    log = train("gpt2", tmp_path / "set", tmp_path / "run", "--max-steps", 3)
    assert log[-1]["val_loss"] == "" and not (tmp_path / "run" / "best.pt").exists()


def test_bad_data_folders(data, tmp_path):
    out = tmp_path / "run"

    def broken(change):
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data, folder)
        change(folder)
        line = fails("gpt2", folder, out, "--max-steps", 1)
        assert not out.exists(), "a run that cannot start leaves nothing behind"
        return line

    def edit(**changes):
        def change(folder):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            (folder / "meta.json").write_text(json.dumps({**meta, **changes}), encoding="utf-8")

        return change

    def resize(n):
        def change(folder):
            (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:n])
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            meta["splits"]["train"]["tokens"] = n // 2
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

        return change

    assert "prepare_data.py" in fails("gpt2", tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "meta.json is missing" in fails("gpt2", tmp_path / "empty", out)
    assert "meta.json is missing" in broken(lambda f: (f / "meta.json").unlink())
    assert "train.bin" in broken(lambda f: (f / "train.bin").unlink())
    assert "train.bin has" in broken(lambda f: (f / "train.bin").write_bytes(b"abc"))
    assert "train.bin has 0 bytes" in broken(lambda f: (f / "train.bin").write_bytes(b""))
    assert "holds id" in broken(edit(vocab_size=270, eot=269))
    assert "one window" in broken(resize(100))
    assert "meta.json" in broken(lambda f: (f / "meta.json").write_text("{", encoding="utf-8"))
    assert "meta.json" in broken(lambda f: (f / "meta.json").write_text("[1]", encoding="utf-8"))
    assert "meta.json" in broken(edit(splits=3))
    assert "counts" in broken(edit(splits={"train": {"tokens": math.inf, "bytes": 1, "words": 1}}))
    assert "tokenizer.tiktoken" in broken(lambda f: (f / "tokenizer.tiktoken").unlink())


def test_bad_options(data, tmp_path):
    out = tmp_path / "run"
    assert "n_embd" in fails("gpt2", data, out, "--n-embd", 50)
    assert "batch-size" in fails("gpt2", data, out, "--batch-size", 0)
    assert "max-steps" in fails("gpt2", data, out, "--max-steps", "many")
    assert "dtype" in fails("gpt2", data, out, "--dtype", "int8")
    for option in ("--batch-size", "--micro-batch", "--eval-tokens"):
        assert option in fails("gpt2", data, out, option, 10**20)
    for device in ("tpu", "meta"):
        assert "not to be had" in fails("gpt2", data, out, "--device", device)
    for size in (10, 5000):  # more ids than the tokenizer has would be sampled sooner or later
        assert "vocab-size" in fails("gpt2", data, out, "--vocab-size", size)
    assert "no such checkpoint" in fails("gpt2", data, out, "--resume")
    if not torch.cuda.is_available():
        assert "--device cpu" in fails("gpt2", data, out, "--device", "cuda")
    assert not out.exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "file" in fails("gpt2", data, tmp_path / "file" / "run")


def test_a_run_is_never_started_over_another(data, tmp_path):
    before = train("gpt2", data, tmp_path / "run", "--max-steps", 2)
    line = fails("gpt2", data, tmp_path / "run", "--max-steps", 2)
    assert "--resume" in line and "--out" in line and rows(tmp_path / "run") == before


def test_bad_checkpoints(data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    path = tmp_path / "run" / "ckpt.pt"
    whole = path.read_bytes()
    assert "n_layer" in fails("gpt2", data, tmp_path / "run", "--resume", "--n-layer", 3)
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "ckpt.pt" in fails("gpt2", data, tmp_path / "run", "--resume")
    for content in ({"a": 1}, [1], 3):
        torch.save(content, path)
        assert "ckpt.pt" in fails("gpt2", data, tmp_path / "run", "--resume")
    path.write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    assert "ckpt.pt" in fails("gpt2", data, tmp_path / "run", "--resume")
    assert not (tmp_path / "sprung").exists()
    path.write_bytes(whole)
    ckpt = torch.load(path, weights_only=True)
    for n_head, about in ((torch.zeros(5), "config"), (math.nan, "n_head")):
        torch.save({**ckpt, "config": {**ckpt["config"], "n_head": n_head}}, path)
        assert about in fails("gpt2", data, tmp_path / "run", "--resume")
        assert about in fails("gpt2", data, tmp_path / "new", "--init-from", path)
    torch.save({**ckpt, "model_file": "mixer.py"}, path)
    assert "mixer.py" in fails("gpt2", data, tmp_path / "run", "--resume")
    torch.save({**ckpt, "tokenizer": {**ckpt["tokenizer"], "name": "gpt2"}}, path)
    assert "ids" in fails("gpt2", data, tmp_path / "run", "--resume")


class Trap:
    """What a hostile pickle does: run code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_losses_are_the_eager_ones(data, tmp_path):
    small = ["--max-steps", 3, "--n-layer", 1, "--dropout", 0]
    eager = train("gpt2", data, tmp_path / "eager", *small)
    compiled = train("gpt2", data, tmp_path / "compiled", *small, "--compile")
    for a, b in zip(eager, compiled):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), abs=1e-4)
    assert not [k for k in weights(tmp_path / "compiled") if "_orig_mod" in k]


def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 2)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    command = shlex.join([sys.executable, "gpt2.py", *argv(data, tmp_path / "run", "--resume", "--max-steps", 4)])
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "disk" in done.stderr, done.stderr
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_bfloat16_autocast_trains(data, tmp_path):
    exact = train("gpt2", data, tmp_path / "a", "--max-steps", 10, "--dtype", "float32")
    half = train("gpt2", data, tmp_path / "b", "--max-steps", 10, "--dtype", "bfloat16")
    assert float(half[-1]["train_loss"]) == pytest.approx(float(exact[-1]["train_loss"]), rel=0.01)


def test_help_lists_every_field_of_config(capsys):
    with pytest.raises(SystemExit):
        load("gpt2").main(["--help"])
    text = capsys.readouterr().out
    for field in ("--n-layer", "--block-size", "--compile", "--no-compile", "--eval-only", "--init-from"):
        assert field in text
    assert "attention heads (default: 6)" in " ".join(text.split())
