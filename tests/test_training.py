"""The training section through the command line of the model files: it learns, logs, saves, resumes, evaluates,
survives kills and full disks, and says in one line what is wrong."""

import json
import math
import os
import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import MODEL_FILES, argv, load, refused, rows, run, same_rows, start, train, wait_for

import gpt2

each_model = pytest.mark.parametrize("name", MODEL_FILES)


def weights(out, file="ckpt.pt"):
    return torch.load(out / file, weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}), encoding="utf-8")
    return meta


# --- a run


@each_model
def test_learns_logs_and_saves(name, data, tmp_path, capsys):
    log = train(name, data, tmp_path / "run", "--max-steps", 30, "--eval-interval", 10, "--learning-rate", 3e-3)
    columns = "step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_s seconds"
    assert list(log[0]) == columns.split() and [int(r["step"]) for r in log] == list(range(1, 31))
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"]) - 0.3
    assert [int(r["step"]) for r in log if r["val_loss"]] == [10, 20, 30] and int(log[-1]["tokens"]) == 30 * 4 * 64
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert ckpt["model_file"] == f"{name}.py" and ckpt["step"] == 30 and ckpt["config"]["n_embd"] == 48
    assert ckpt["tokenizer"]["ranks"] == (data / "tokenizer.tiktoken").read_text(encoding="utf-8")
    assert not [k for k in ckpt["model"] if k.startswith(("module.", "_orig_mod."))]
    assert "all of val: " in capsys.readouterr().out


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in MODEL_FILES), ("gpt2", "bfloat16")])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(name, dtype, data, tmp_path, monkeypatch):
    more = ("--dropout", 0.1, "--eval-interval", 7, "--max-steps", 14, "--dtype", dtype, "--seed", 5)
    whole = train(name, data, tmp_path / "whole", *more)
    rate = load(name).learning_rate

    def in_step_5(step, cfg):
        if step == 4:  # as when a machine is taken away
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(load(name), "learning_rate", in_step_5)
        with pytest.raises(SystemExit) as e:
            train(name, data, tmp_path / "parts", *more)
    assert e.value.code == 128 + signal.SIGTERM and len(rows(tmp_path / "parts")) == 5
    load(name).main(["--out", str(tmp_path / "parts"), "--resume", "--device", "cpu"])  # the rest is in the checkpoint
    assert same_rows(rows(tmp_path / "parts"), whole)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_log_column_is_one_quantity(data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 4, "--eval-interval", 2)
    more = ("--resume", "--max-steps", 6, "--batch-size", 2, "--eval-interval", 1)
    log = train("gpt2", data, tmp_path / "run", *more)
    assert [int(r["tokens"]) for r in log] == [256, 512, 768, 1024, 1152, 1280]
    model, (meta, _, splits) = gpt2.Model(gpt2.Config(300, 64, 12, 6, 48)), gpt2.open_data(data)
    model.load_state_dict(weights(tmp_path / "run"))
    nats = gpt2.evaluate(model, splits["val"][:512], meta["eot"], torch.autocast("cpu", enabled=False))
    assert float(log[-1]["val_loss"]) == pytest.approx(nats, rel=1e-6)


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(data, tmp_path):
    log = train("gpt2", data, tmp_path / "run", "--max-steps", 12, "--eval-interval", 3, "--learning-rate", 0.03)
    values = {int(r["step"]): float(r["val_loss"]) for r in log if r["val_loss"]}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["best"] == min(values.values()) == values[best["step"]]


def test_micro_batches_do_not_change_the_losses(data, tmp_path):
    one = train("gpt2", data, tmp_path / "one", "--max-steps", 4, "--micro-batch", 4)
    three = train("gpt2", data, tmp_path / "three", "--max-steps", 4, "--micro-batch", 3)  # 3 + 1
    assert [float(r["train_loss"]) for r in one] == pytest.approx([float(r["train_loss"]) for r in three], abs=1e-5)


def test_every_step_has_other_random_numbers_and_its_own_learning_rate(data, tmp_path, monkeypatch):
    seeds, seed, batches, rng = [], torch.manual_seed, [], np.random.default_rng
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    monkeypatch.setattr(np.random, "default_rng", lambda n: batches.append(tuple(n)) or rng(n))
    monkeypatch.setattr(gpt2, "learning_rate", lambda step, cfg: 0.0)
    train("gpt2", data, tmp_path / "run", "--max-steps", 4)
    assert len(seeds) == len(set(seeds)) == 5  # of the weights, and of dropout in each step
    assert len(batches) == len(set(batches)) == 4
    seed(1337)
    initial = gpt2.Model(gpt2.Config(300, 64, 12, 6, 48)).state_dict()
    assert all(torch.equal(w, initial[k]) for k, w in weights(tmp_path / "run").items())


def test_two_processes_train_as_one(data, tmp_path):
    more = ("--max-steps", 4, "--eval-interval", 2, "--batch-size", 5)  # one process has 3 rows, the other 2
    one = train("gpt2", data, tmp_path / "one", *more)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(*torchrun, "gpt2.py", *argv(data, tmp_path / "two", *more))
    two = rows(tmp_path / "two")
    for column in ("step", "tokens", "train_loss", "val_loss", "grad_norm"):
        a, b = ([float(r[column]) for r in log if r[column]] for log in (one, two))
        assert a == pytest.approx(b, abs=1e-5), column


def test_bfloat16_trains_as_float32_does(data, tmp_path):
    exact, half = (train("gpt2", data, tmp_path / d, "--max-steps", 10, "--dtype", d) for d in ("float32", "bfloat16"))
    assert exact[-1]["train_loss"] != half[-1]["train_loss"]
    assert float(half[-1]["train_loss"]) == pytest.approx(float(exact[-1]["train_loss"]), rel=0.01)


def test_init_from_takes_the_weights_and_starts_anew(data, tmp_path):
    a = train("gpt2", data, tmp_path / "a", "--max-steps", 20, "--learning-rate", 3e-3)
    b = train("gpt2", data, tmp_path / "b", "--init-from", tmp_path / "a" / "ckpt.pt", "--max-steps", 2)
    assert [r["step"] for r in b] == ["1", "2"] and float(b[0]["train_loss"]) < float(a[0]["train_loss"]) - 0.3


# --- evaluation


@pytest.mark.parametrize("n, stride", [(7, None), (7, 3), (16, 5), (17, None), (50, 1), (50, 16), (64, 5)])
def test_evaluation_scores_every_token_once_as_a_slow_loop_does(n, stride):
    torch.manual_seed(0)
    cfg = gpt2.Config(vocab_size=40, block_size=16, n_embd=48, n_head=6, n_layer=2, micro_batch=3, dropout=0.5)
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
    assert gpt2.evaluate(model.train(), tokens, eot, amp, stride=stride) == pytest.approx(total / n, abs=1e-5)


def test_eval_only_prints_perplexity_per_token_per_word_and_per_byte(data, tmp_path, capsys):
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    trained = re.search("all of val.*", capsys.readouterr().out)[0]
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    found = []
    for more in ([], ["--stride", "8"], ["--split", "train"]):
        gpt2.main(["--out", str(tmp_path / "run"), "--eval-only", *more])
        found.append(re.search("all of .*", capsys.readouterr().out)[0])
    numbers = [float(x.replace(",", "")) for x in re.findall(r"[\d,]+\.\d+", found[0])]
    n = json.loads((data / "meta.json").read_text(encoding="utf-8"))["splits"]["val"]
    nats = numbers[0] * n["tokens"]
    bits, word, byte = nats / math.log(2) / n["bytes"], math.exp(nats / n["words"]), math.exp(nats / n["bytes"])
    assert numbers[1:] == pytest.approx([bits, math.exp(numbers[0]), word, byte], rel=1e-3)
    assert found[0] == trained and len(set(found)) == 3 and "all of train" in found[2]
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_losses_are_the_eager_ones_and_no_validation_split_is_needed(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    edit(tmp_path / "set", splits={"train": edit(tmp_path / "set")["splits"]["train"]})
    small, out = ("--max-steps", 2, "--n-layer", 1), tmp_path / "compiled"
    eager = train("gpt2", tmp_path / "set", tmp_path / "eager", *small)
    compiled = train("gpt2", tmp_path / "set", out, *small, "--compile")
    losses = [[float(r["train_loss"]) for r in log] for log in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and not [k for k in weights(out) if "_orig_mod" in k]
    assert eager[-1]["val_loss"] == "" and not (out / "best.pt").exists()


# --- what goes wrong


def test_a_run_killed_at_random_moments_is_resumed_to_the_last_bit(data, tmp_path):
    more = ("--max-steps", 30, "--eval-interval", 3, "--dropout", 0.1, "--n-layer", 1)
    rng, out = random.Random(1), tmp_path / "run"
    whole, kills = train("gpt2", data, tmp_path / "whole", *more), 0
    for i in range(4):
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
    assert same_weights(out, tmp_path / "whole")


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    child = start("gpt2", *argv(data, out, "--max-steps", 10_000), log=log)
    wait_for("step 3/", log)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert child.exitcode == 130 and "--resume" in log.read_text(encoding="utf-8") and step == len(rows(out)) >= 3


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(size, data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 2)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    child = start("gpt2", *argv(data, tmp_path / "run"), "--resume", log=tmp_path / "log", file_limit=size)
    child.join()
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert child.exitcode == 1 and "disk" in said.splitlines()[-1] and "Traceback" not in said, said
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(value, data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 2)
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    state["model"]["wte.weight"][:, 0] = value
    torch.save(state, tmp_path / "bad.pt")
    line = refused(gpt2.main, *argv(data, tmp_path / "new"), "--init-from", tmp_path / "bad.pt", "--max-steps", 9)
    assert "step 1:" in line and "ckpt.pt" in line and len(rows(tmp_path / "new")) == 0
    # A learning rate that breaks the weights in its first step: no checkpoint holds the wreck.
    more = ("--resume", "--max-steps", 40, "--learning-rate", 1e30, "--eval-interval", 1)
    assert "step" in refused(gpt2.main, *argv(data, tmp_path / "run", *more))
    assert all((w.abs() < 1000).all() for w in weights(tmp_path / "run").values())


def test_bad_data_folders(data, tmp_path):
    out, folder = tmp_path / "run", tmp_path / "a set"
    (tmp_path / "my notes.txt").write_text("some text", encoding="utf-8")
    assert "prepare_data.py stdlib" in refused(gpt2.main, *argv(tmp_path / "nowhere", out))
    assert f"prepare_data.py '{tmp_path / 'my notes.txt'}'" in refused(gpt2.main, *argv(tmp_path / "my notes.txt", out))
    shutil.copytree(data, folder)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-2])
    assert "train.bin" in refused(gpt2.main, *argv(folder, out))
    splits = edit(folder)["splits"]
    splits["train"]["tokens"], _ = 50, (folder / "train.bin").write_bytes(whole[:100])
    edit(folder, splits=splits)
    assert "--block-size" in refused(gpt2.main, *argv(folder, out))
    (folder / "tokenizer.tiktoken").unlink()
    assert "tokenizer.tiktoken" in refused(gpt2.main, *argv(folder, out))
    assert not out.exists(), "a run that cannot start leaves nothing behind"


def test_bad_options(data, tmp_path):
    def fails(*more):
        return refused(gpt2.main, *argv(data, tmp_path / "run", *more))

    assert "n_embd" in fails("--n-embd", 50)
    assert "--max-steps" in fails("--max-steps", "many")
    assert "--device" in fails("--device", "tpu") and "bfloat16" in fails("--dtype", "half")
    assert "ckpt.pt" in fails("--resume") and "No such file" in fails("--resume")
    assert "not allowed with" in fails("--resume", "--init-from", "x.pt")
    assert "memory" in fails("--block-size", 10**13)
    if not torch.cuda.is_available():
        assert "--device cpu" in fails("--device", "cuda")
    assert not (tmp_path / "run").exists()
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    assert "--resume" in fails() and "--out" in fails()
    assert "n_layer" in fails("--resume", "--n-layer", 3) and "train, val" in fails("--eval-only", "--split", "test")


def test_damaged_and_foreign_checkpoints(data, tmp_path):
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    path = tmp_path / "run" / "ckpt.pt"
    whole = path.read_bytes()
    ckpt = torch.load(path, weights_only=True)

    def resume(content, name="gpt2"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return refused(load(name).main, *argv(data, tmp_path / "run", "--resume", "--max-steps", 2))

    flipped = bytearray(whole)
    flipped[whole.index(ckpt["model"]["wte.weight"].numpy().tobytes()) + 1001] ^= 1  # torch.load would not notice
    trap = {**ckpt, "best": Trap(str(tmp_path / "sprung"))}
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"a text", bytes(flipped), {"a": 1}, [1], trap):
        assert "ckpt.pt: no checkpoint of this repository, or damaged" in resume(content)
    assert not (tmp_path / "sprung").exists()
    assert "mixer.py" in resume({**ckpt, "model_file": "mixer.py"})
    assert "gpt2.py" in resume(whole, "mixer")
    assert "tokenizer" in resume({**ckpt, "tokenizer": {**ckpt["tokenizer"], "name": "gpt2"}})


class Trap:
    """What a hostile pickle does: run code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_help_shows_the_comments_of_config(capsys):
    with pytest.raises(SystemExit):
        gpt2.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "attention heads (default: 6)" in text and "--no-compile" in text and "--eval-only" in text
