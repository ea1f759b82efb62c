"""progressive.py: a switch changes no logit, everything that should train does, and the end is a gpt2.py model."""

import io
import os
import re
import shutil
import signal
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import load, run
from test_models import small
from test_training import argv, fails, rows, train, weights

import gpt2
import progressive
import sample

NAME = "progressive"
LAYERS_A_BLOCK = {1: 4, 2: 2, 3: 1}
each_stage = pytest.mark.parametrize("stage", [1, 2, 3])
each_rank = pytest.mark.parametrize("rank", [4, 0])


def tiny(stage=1, rank=4, **kwargs):
    """8 layers. Its switches are before steps 3 and 6 of 10; there is no data that grow could measure a loss on."""
    kwargs = {"n_layer": 8, "n_embd": 24, "n_head": 2, "block_size": 16, **kwargs}
    when = {"stages": "0.3,0.6", "max_steps": 10, "data": "nowhere"}
    return small(NAME, stage=stage, lora_rank=rank, lora_alpha=6.0, **when, **kwargs)


def begin(**kwargs):
    model = tiny(**kwargs)
    return model, progressive.configure_optimizer(model, model.cfg), model.cfg


def learn(model, optimizer, steps=3):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        idx = torch.randint(50, (4, 17))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def grow(model, optimizer, cfg):
    stage, step = cfg.stage, {1: 3, 2: 6}[cfg.stage]
    assert not progressive.grow(model, optimizer, cfg, step - 1) and cfg.stage == stage
    assert progressive.grow(model, optimizer, cfg, step) and cfg.stage == stage + 1
    assert len(model.h) == 8 // LAYERS_A_BLOCK[cfg.stage]


def shared(name, n):
    """The name of the tensor that a layer's tensor is, or was copied from, where n in a row are one."""
    return re.sub(r"^h\.(\d+)", lambda m: f"h.{int(m[1]) // n}", name)


def lora(parameters, name):
    """(A, B) of a matrix."""
    return [parameters[name.removesuffix("weight") + part] for part in ("lora_a", "lora_b")]


def attention_matrices(model):
    return {f"h.{i}.attn.{m}.weight" for i in range(len(model.h)) for m in ("c_attn", "c_proj")}


# --- the network


@torch.no_grad()
def unrolled(model):
    """gpt2.py's network with the weights of each layer, LoRA added up."""
    cfg, own = model.cfg, dict(model.named_parameters())
    known = {f.name for f in fields(gpt2.Config)}
    plain = gpt2.Model(gpt2.Config(**{k: v for k, v in asdict(cfg).items() if k in known})).to(model.wte.weight.dtype)
    for layer_name, p in plain.named_parameters():
        name = shared(layer_name, LAYERS_A_BLOCK[cfg.stage])
        p.copy_(own[name])
        if cfg.stage > 1 and cfg.lora_rank and name in attention_matrices(model):
            a, b = lora(own, name)
            p += cfg.lora_alpha / cfg.lora_rank * b @ a
    return plain


@each_rank
@each_stage
def test_gradients_of_a_shared_block_are_the_sum_over_the_layers_of_an_unrolled_gpt2(stage, rank):
    model = tiny(stage, rank).double()
    plain, idx = unrolled(model), torch.randint(50, (2, 17))
    logits, theirs = model(idx[:, :-1]), plain(idx[:, :-1])
    assert theirs.std() > 0.5 and torch.allclose(logits, theirs, atol=1e-10)
    for each in (logits, theirs):
        F.cross_entropy(each.flatten(0, 1), idx[:, 1:].flatten()).backward()
    total, own = defaultdict(float), dict(model.named_parameters())
    for name, p in plain.named_parameters():
        total[shared(name, LAYERS_A_BLOCK[stage])] += p.grad
    assert total.keys() == {name for name in own if "lora" not in name}
    for name, grad in total.items():
        if stage > 1 and rank and name in attention_matrices(model):
            a, b = lora(own, name)
            assert own[name].grad is None and a.grad.abs().max() > 1e-4
            assert torch.allclose(a.grad, 6 / 4 * b.T @ grad, atol=1e-10)
            assert torch.allclose(b.grad, 6 / 4 * grad @ a.T, atol=1e-10)
        else:
            assert torch.allclose(own[name].grad, grad, atol=1e-10), name


def counts(model):
    """(all parameters, those that are trained)."""
    params = list(model.parameters())
    return sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)


@each_rank
@each_stage
def test_parameters_are_as_many_as_by_hand(stage, rank):
    C, T, V = 24, 16, 64  # 50 ids, padded
    attention = (3 * C * C + 3 * C) + (C * C + C)
    block = attention + (4 * C * C + 4 * C) + (4 * C * C + C) + 2 * 2 * C
    extra = (rank * C + 3 * C * rank) + (rank * C + C * rank) if stage > 1 else 0
    frozen = 3 * C * C + C * C if stage > 1 and rank else 0
    blocks = {1: 2, 2: 4, 3: 8}[stage]
    rest = V * C + T * C + 2 * C
    assert counts(tiny(stage, rank)) == (rest + blocks * (block + extra), rest + blocks * (block + extra - frozen))


@pytest.mark.parametrize(
    "stage, rank, total, trained",
    [
        (1, 16, 2_170_560, 2_170_560),
        (2, 16, 3_615_744, 2_731_008),
        (3, 16, 6_395_520, 4_626_048),
        (2, 0, 3_505_152, 3_505_152),
        (3, 0, 6_174_336, 6_174_336),
    ],
)
def test_parameters_of_the_default_size_with_4096_ids(stage, rank, total, trained):
    model = progressive.Model(progressive.Config(vocab_size=4096, stage=stage, lora_rank=rank))
    assert counts(model) == (total, trained)


@torch.no_grad()
@each_stage
def test_no_row_sees_a_later_token(stage):
    model, idx = tiny(stage), torch.randint(50, (1, 16))
    changed = idx.repeat(16, 1)
    changed[range(16), range(16)] = (idx[0] + 1) % 50
    moved = (model(changed) - model(idx)).abs().amax(-1) > 1e-5  # (16, 16): whether changing token t moves row i
    assert torch.equal(moved, torch.ones(16, 16).triu().bool())


@torch.no_grad()
@each_stage
def test_cached_equals_uncached_in_each_stage(stage):
    model, idx = tiny(stage), torch.randint(50, (2, 16))
    plain = model(idx)
    for size in (1, 5, 16):
        cache, pieces = model.new_cache(2), idx.split(size, 1)
        logits = torch.cat([model(piece, cache=cache) for piece in pieces], 1)
        ends = torch.tensor([piece.size(1) for piece in pieces]).cumsum(0) - 1
        assert cache.length == 16 and torch.allclose(logits, plain[:, ends], atol=1e-5)


# --- growing


@each_rank
def test_growing_changes_no_logit(rank):
    model, optimizer, cfg = begin(rank=rank)
    idx = torch.randint(50, (2, 16))
    for _ in range(2):
        learn(model, optimizer)
        before = model(idx)
        if rank and cfg.stage == 2:  # there is something to merge
            without = tiny(2, rank=0)
            without.load_state_dict(model.state_dict(), strict=False)
            assert (without(idx) - before).abs().max() > 1e-2
        grow(model, optimizer, cfg)
        assert (model(idx) - before).abs().max() < 1e-5


def test_two_switches_at_one_step_change_no_logit():
    model, optimizer, cfg = begin()
    learn(model, optimizer)
    idx = torch.randint(50, (2, 16))
    before = model(idx)
    assert progressive.grow(model, optimizer, cfg, 6) and cfg.stage == 3
    assert (model(idx) - before).abs().max() < 1e-5
    assert not progressive.grow(model, optimizer, cfg, 10)


@each_rank
def test_in_each_stage_what_trains_is_in_the_optimizer_once_and_moves_and_what_is_frozen_does_not(rank):
    model, optimizer, cfg = begin(rank=rank)
    for stage in (1, 2, 3):
        if stage > 1:
            grow(model, optimizer, cfg)
        params = dict(model.named_parameters())
        frozen = attention_matrices(model) if rank and stage > 1 else set()
        assert {name for name, p in params.items() if not p.requires_grad} == frozen
        assert any("lora" in name for name in params) == bool(frozen)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
        assert decay == {
            id(p): 0.0 if "ln_" in name or name.endswith("bias") else cfg.weight_decay
            for name, p in params.items()
            if name not in frozen
        }
        before = {name: p.detach().clone() for name, p in params.items()}
        learn(model, optimizer, 2)  # lora_a has a gradient only once lora_b is not zero
        assert {name for name, p in params.items() if torch.equal(p, before[name])} == frozen
        assert {id(p) for p in optimizer.state} == decay.keys()
        assert all(state["exp_avg_sq"].any() for state in optimizer.state.values())  # it was not decay that moved it


@each_rank
def test_copies_keep_the_moments_of_adam_as_their_own_and_lora_starts_without(rank):
    model, optimizer, cfg = begin(rank=rank)
    for steps in (3, 3 + 1 + 3):
        learn(model, optimizer)
        old = {n: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for n, p in model.named_parameters()}
        grow(model, optimizer, cfg)
        params = dict(model.named_parameters())
        for name, p in params.items():
            if "lora" in name or not p.requires_grad:
                assert p not in optimizer.state
            else:
                state, theirs = optimizer.state[p], old[shared(name, 2)]
                assert state.keys() == theirs.keys() == {"exp_avg", "exp_avg_sq", "step"} and state["step"] == steps
                assert all(torch.equal(state[k], theirs[k]) for k in state), name
        tensors = [*params.values(), *(v for state in optimizer.state.values() for v in state.values())]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        new_a, new_b = ([p for name, p in params.items() if name.endswith(part)] for part in ("lora_a", "lora_b"))
        assert len(new_a) == len(new_b) == (2 * len(model.h) if rank else 0)
        assert len({p.sum().item() for p in new_a}) == len(new_a) and not any(p.any() for p in new_b)
        learn(model, optimizer, 1)
        for name, p in params.items():  # from here on the two go ways of their own
            if name.startswith("h.0.") and p.requires_grad:
                assert not torch.equal(p, params[name.replace("h.0.", "h.1.", 1)]), name


# --- runs: 12 steps, switches before steps 4 and 8

SMALL = "--n-layer 8 --n-embd 24 --n-head 2 --block-size 32 --lora-rank 4 --lora-alpha 8 --dtype float32".split()
SMALL += "--max-steps 12 --learning-rate 1e-2 --eval-interval 4 --eval-tokens 100000".split()
STAGES = {1: "2,3", 2: "0.33,2", 3: "0.33,0.67"}  # to end there
BECOME = r"step (\d+): (\d+) blocks become (\d+): ([\d,]+) parameters, ([\d,]+) of them trained"
SWITCH = BECOME + r", validation loss (.+) -> (.+)"


def said(name, *args):
    """What main prints."""
    with redirect_stdout(io.StringIO()) as out:
        load(name).main([*map(str, args), "--device", "cpu"])
    return out.getvalue()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with 1, 2 and 3, runs that ended in that stage, and the export and the output of each beside them."""
    top = tmp_path_factory.mktemp("runs")
    for stage, where in STAGES.items():
        more = [*SMALL, "--stages", where, "--export", top / f"gpt2-{stage}" / "ckpt.pt"]
        (top / f"{stage}.txt").write_text(said(NAME, *argv(data, top / str(stage), *more)), encoding="utf-8")
    return top


def test_the_log_shows_two_switches_with_the_same_loss_before_and_after(runs):
    found = re.findall(SWITCH, (runs / "3.txt").read_text(encoding="utf-8"))
    evaluated = {int(row["step"]): float(row["val_loss"]) for row in rows(runs / "3") if row["val_loss"]}
    assert [line[:3] for line in found] == [("4", "2", "4"), ("8", "4", "8")]
    for step, _, blocks, total, trained, before, after in found:
        assert float(before) == pytest.approx(float(after), abs=2e-6)
        assert float(before) == pytest.approx(evaluated[int(step)], abs=2e-6)
        model = progressive.Model(progressive.Config(vocab_size=300, block_size=32, n_layer=8, n_embd=24, n_head=2,
                                                     lora_rank=4, stage=1 + int(blocks) // 4))  # fmt: skip
        assert (total, trained) == tuple(f"{n:,}" for n in counts(model))
    assert len(set(evaluated.values())) == 3


@each_stage
def test_evaluation_is_of_the_network_that_the_run_ended_with(stage, data, runs):
    model, _ = sample.load(runs / str(stage) / "ckpt.pt")
    assert model.cfg.stage == stage and len(model.h) == 8 // LAYERS_A_BLOCK[stage]
    assert len({block.mlp.c_fc.weight.sum().item() for block in model.h}) == len(model.h)  # no two are the same
    meta, _, splits = progressive.open_data(data)
    amp = torch.autocast("cpu", enabled=False)
    nats = progressive.evaluate(model, splits["val"], meta["eot"], model.cfg, 1, amp)
    assert nats == pytest.approx(float(rows(runs / str(stage))[-1]["val_loss"]), abs=1e-6)
    best = torch.load(runs / str(stage) / "best.pt", weights_only=True)
    losses = [float(row["val_loss"]) for row in rows(runs / str(stage)) if row["val_loss"]]
    assert best["best"] == pytest.approx(min(losses), abs=1e-6)


@each_stage
def test_an_export_is_a_gpt2_checkpoint_of_the_same_function(stage, runs):
    ours, _ = sample.load(runs / str(stage) / "ckpt.pt")
    export, tokenizer = sample.load(runs / f"gpt2-{stage}" / "ckpt.pt")
    idx = torch.randint(300, (2, 32))
    assert type(export) is gpt2.Model and tokenizer.decode(tokenizer.encode("the model")) == "the model"
    with torch.no_grad():
        assert export(idx).std() > 0.1 and torch.allclose(ours(idx), export(idx), atol=1e-5)
        assert torch.allclose(export(idx), unrolled(ours)(idx), atol=1e-5)
    said_by_ours = said(NAME, "--eval-only", "--out", runs / str(stage))
    assert "nats a token" in said_by_ours
    assert said_by_ours == said("gpt2", "--eval-only", "--out", runs / f"gpt2-{stage}")


@each_stage
def test_gpt2_goes_on_from_an_export(stage, runs, tmp_path):
    for folder, name in (("ours", str(stage)), ("gpt2", f"gpt2-{stage}")):
        shutil.copytree(runs / name, tmp_path / folder)
    said(NAME, "--resume", "--out", tmp_path / "ours", "--max-steps", 14, "--export", "")
    said("gpt2", "--resume", "--out", tmp_path / "gpt2", "--max-steps", 14)
    ours, theirs = rows(tmp_path / "ours")[12:], rows(tmp_path / "gpt2")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == ["13", "14"]
    assert float(ours[0]["train_loss"]) == pytest.approx(float(theirs[0]["train_loss"]), abs=1e-5)


def test_a_finished_run_is_exported_later(runs, tmp_path):
    shutil.copytree(runs / "3", tmp_path / "run")
    assert "is finished" in said(NAME, "--resume", "--out", tmp_path / "run", "--export", tmp_path / "new" / "gpt2.pt")
    then, now = weights(runs / "gpt2-3"), weights(tmp_path / "new", "gpt2.pt")
    assert then.keys() == now.keys() and all(torch.equal(then[k], now[k]) for k in then)


@each_stage
def test_a_checkpoint_of_each_stage_speaks_the_same_with_and_without_a_cache_and_exported(stage, runs):
    def text(folder, *more):
        return said("sample", "--ckpt", runs / folder / "ckpt.pt", "--prompt", "the", "--max-new-tokens", 40, *more)

    for how in (["--decode", "greedy"], ["--decode", "temperature", "--temperature", 1]):
        cached = text(str(stage), *how)
        assert len(cached) > 20 and cached == text(str(stage), *how, "--no-cache") == text(f"gpt2-{stage}", *how)


@each_rank
def test_resuming_before_at_and_after_each_switch_is_the_run_that_never_stopped(rank, data, tmp_path, monkeypatch):
    more = [*SMALL, "--dropout", 0.1, "--lora-rank", rank]
    whole = train(NAME, data, tmp_path / "whole", *more)
    stops, schedule = [3, 4, 5, 7, 8, 9], progressive.learning_rate

    def terminate(step, cfg):  # as a machine that is taken away would
        if step + 1 in stops:
            stops.remove(step + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, cfg)

    monkeypatch.setattr(progressive, "learning_rate", terminate)
    parts, resume = tmp_path / "parts", ["--resume", "--out", str(tmp_path / "parts"), "--device", "cpu"]
    for stop, stage, how in zip([*stops], (1, 1, 2, 2, 2, 3), (argv(data, parts, *more), *[resume] * 5)):
        with pytest.raises(SystemExit) as e:
            progressive.main(how)
        saved = torch.load(parts / "ckpt.pt", weights_only=True)
        assert e.value.code == 143 and (saved["step"], saved["config"]["stage"]) == (stop, stage)
    progressive.main(resume)
    for column in ("step", "train_loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm"):
        assert [r[column] for r in rows(parts)] == [r[column] for r in whole], column
    ends = [torch.load(tmp_path / end / "ckpt.pt", weights_only=True) for end in ("whole", "parts")]
    for a, b in ([end["model"] for end in ends], *zip(*(end["optimizer"]["state"].values() for end in ends))):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_grow_as_one(data, tmp_path):
    one = train(NAME, data, tmp_path / "one", *SMALL)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = run(*torchrun, "progressive.py", *argv(data, tmp_path / "two", *SMALL, "--export", tmp_path / "gpt2.pt"))
    two = rows(tmp_path / "two")
    assert len(re.findall(SWITCH, out)) == 2 and out.count("the same model for gpt2.py") == 1
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for column in ("train_loss", "val_loss", "grad_norm"):
        pairs = [(float(a[column]), float(b[column])) for a, b in zip(one, two) if a[column]]
        assert pairs and all(a == pytest.approx(b, rel=1e-5, abs=1e-5) for a, b in pairs), column


def test_traced_losses_are_the_eager_ones_through_both_switches(data, tmp_path, monkeypatch):
    """As --compile, but for the C++ that it would write: that takes minutes, and does not know of growing."""
    more = [*SMALL, "--n-layer", 4, "--max-steps", 3, "--batch-size", 1, "--micro-batch", 1]  # one shape
    eager = train(NAME, data, tmp_path / "eager", *more)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    traced = train(NAME, data, tmp_path / "traced", *more, "--compile")
    for column in ("train_loss", "val_loss"):
        pairs = [(float(a[column]), float(b[column])) for a, b in zip(eager, traced) if a[column]]
        assert pairs and all(a == pytest.approx(b, abs=1e-4) for a, b in pairs), column
    assert weights(tmp_path / "traced").keys() == weights(tmp_path / "eager").keys()


@pytest.mark.parametrize(
    "option, wrong",
    [
        ("--stages", "0.5"),
        ("--stages", "0.7,0.3"),
        ("--stages", "a,b"),
        ("--stages", "0.5,nan"),
        ("--stages", "0.5,nan"),
        ("--stages", "-1,0.5"),
        ("--n-layer", 10),
        ("--stage", 4),
        ("--lora-rank", -1),
    ],
)
def test_wrong_options(option, wrong, data, tmp_path):
    line = fails(NAME, data, tmp_path / "run", *SMALL, f"{option}={wrong}")
    assert option[2:].replace("-", "_") in line and not (tmp_path / "run").exists()


def test_a_checkpoint_fixes_stage_and_rank(runs):
    for option, other in (("--stage", 2), ("--lora-rank", 8)):
        with pytest.raises(SystemExit, match=option[2:].replace("-", "_")):
            progressive.main(["--resume", "--out", str(runs / "3"), option, str(other)])
