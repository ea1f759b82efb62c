"""A switch changes no logit, what is not frozen learns, and gpt2.py loads the finished model."""

import copy
import re
from collections import defaultdict
from contextlib import suppress

import pytest
import torch
from conftest import argv, refused, rows, same_rows, start_two, train
from test_models import small

import gpt2
import progressive
import sample

each_rank = pytest.mark.parametrize("rank", [4, 0])
SCALE = 1.5  # of B A: alpha / rank, or 6 / 4


def tiny(data, rank, **options):
    """8 layers: 2, 4 or 8 blocks."""
    sizes = dict(n_layer=8, n_embd=24, n_head=2, block_size=16, vocab_size=300)
    own = dict(stages="0.3,0.7", max_steps=10, lora_rank=rank, lora_alpha=6.0, data=str(data))
    return small("progressive", **sizes | own | options)


def original(name, copies):
    """The name of what a tensor was copied from, if `copies` blocks in a row come from one."""
    return re.sub(r"^h\.(\d+)", lambda match: f"h.{int(match[1]) // copies}", name)


def frozen(model):
    """The names of the attention matrices W, if LoRA learns in their place."""
    names = {name for name, _ in model.named_parameters() if re.search(r"attn\.\w+\.weight", name)}
    return names if model.cfg.stage > 1 and model.cfg.lora_rank else set()


@each_rank
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_export_has_equal_logits_and_gradients_are_sums_over_layers(stage, rank, data, tmp_path):
    path = tmp_path / "new" / "gpt2.pt"
    model = tiny(data, rank, stage=stage, export=str(path))
    progressive.export(model, model.cfg)
    plain, tokenizer = sample.load(path)
    assert type(plain) is gpt2.Model
    assert tokenizer.decode(tokenizer.encode("the model")) == "the model"
    idx, targets = torch.randint(50, (2, 2, 16))
    logits = plain(idx)
    assert logits.std() > 0.5 and torch.equal(model(idx), logits)

    model(idx, targets).backward()
    plain(idx, targets).backward()
    sums = defaultdict(float)
    for name, p in plain.named_parameters():
        sums[original(name, copies=8 // len(model.h))] += p.grad
    own = dict(model.named_parameters())
    assert sums.keys() == {name for name in own if "lora" not in name}
    for name, expected in sums.items():
        pairs = [(own[name].grad, expected)]
        if name in frozen(model):
            assert own[name].grad is None
            a, b = (own[name.replace("weight", part)] for part in ("lora_a", "lora_b"))
            pairs = [(a.grad, SCALE * b.T @ expected), (b.grad, SCALE * expected @ a.T)]
        for found, wanted in pairs:
            assert (found - wanted).norm() < 1e-4 * wanted.norm(), name


def learn(model, optimizer):
    for _ in range(3):  # A has a gradient once B is not zero
        model(*torch.randint(50, (2, 4, 16))).backward()
        optimizer.step()
        optimizer.zero_grad()


@each_rank
def test_a_switch_keeps_every_logit_and_moment_and_then_all_that_is_not_frozen_learns(rank, data):
    model = tiny(data, rank)
    idx = torch.randint(50, (2, 16))
    optimizer = progressive.configure_optimizer(model, model.cfg)
    for stage, step in ((2, 3), (3, 7)):
        learn(model, optimizer)
        logits = model(idx)
        params = dict(model.named_parameters())
        moments = {name: copy.deepcopy(optimizer.state.get(p)) for name, p in params.items()}
        grown = [progressive.grow(model, optimizer, model.cfg, step + i) for i in (-1, 0, 1)]
        assert grown == [False, True, False] and torch.equal(model(idx), logits)
        assert model.cfg.stage == stage and len(model.h) == 2**stage
        rate = gpt2.learning_rate(5, model.cfg)  # divided by how many of the 8 layers share a block
        assert progressive.learning_rate(5, model.cfg) == rate * len(model.h) / 8

        # The optimizer trains what is not frozen, with the moments of the originals.
        params = dict(model.named_parameters())
        trained = {name: p for name, p in params.items() if p.requires_grad}
        assert params.keys() - trained.keys() == frozen(model)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, trained.values()))
        for name, p in trained.items():
            expected = {} if "lora" in name else moments[original(name, copies=2)]
            state = optimizer.state.get(p, {})
            assert state.keys() == expected.keys(), name
            assert all(torch.equal(value, expected[key]) for key, value in state.items()), name
        # No two tensors share memory. A is random, in each layer another one.
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*params.values(), *states]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        drawn = [p for name, p in params.items() if "lora_a" in name]
        assert len({p.sum().item() for p in drawn}) == len(frozen(model))
        assert all(0.7 < p.std() * 24**0.5 < 1.3 for p in drawn)
        old = copy.deepcopy(params)
        learn(model, optimizer)
        assert {name for name, p in params.items() if torch.equal(p, old[name])} == frozen(model)
        for p in trained.values():  # it was moved by a gradient, and not by weight decay alone
            assert optimizer.state[p]["exp_avg_sq"].any()


def test_a_switch_before_the_first_step_and_none_at_the_fraction_1(data):
    model = tiny(data, rank=4, stages="0,1")
    optimizer = progressive.configure_optimizer(model, model.cfg)
    grown = [progressive.grow(model, optimizer, model.cfg, step) for step in (0, 1, 9, 10)]
    assert grown == [True, False, False, False] and model.cfg.stage == 2
    assert not any(optimizer.state_dict()["state"].values())  # there are no moments yet
    learn(model, optimizer)


# Runs of 6 steps, with switches before steps 2 and 4.
SMALL = """--n-layer 4 --lora-rank 4 --lora-alpha 8 --micro-batch 4 --stages 0.33,0.67 --max-steps 6
           --learning-rate 1e-2 --eval-interval 1 --eval-tokens 9999""".split()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train("progressive", data, out, *SMALL, "--export", out / "gpt2.pt")
    return out


def test_gpt2_gives_an_export_the_loss_at_the_end_of_its_run(whole, capsys):
    gpt2.main(["--eval-only", "--device", "cpu", "--init-from", str(whole / "gpt2.pt")])
    loss = float(rows(whole)[-1]["val_loss"])
    assert f"all of val: {loss:.4f} nats" in capsys.readouterr().out


def test_a_run_killed_around_switches_is_one_that_never_stopped(whole, data, tmp_path, monkeypatch):
    """The schedule is asked at each step, after a switch: there the run dies of a division by 0."""
    options, rate = argv(data, tmp_path, *SMALL), progressive.learning_rate
    monkeypatch.setattr(progressive, "learning_rate", lambda n, cfg: rate(n, cfg) / (n != stop))
    for stop, stage in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)):  # after 6 it is complete
        with suppress(ZeroDivisionError):
            progressive.main(options)
        saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        assert (saved["step"], saved["config"]["stage"]) == (stop, stage)
        options = ["--resume", "--out", str(tmp_path)]
    assert same_rows(rows(tmp_path), rows(whole))


def test_two_processes_grow_as_one_with_equal_losses_around_each_switch(whole, data, tmp_path):
    two = start_two("progressive", *argv(data, tmp_path, *SMALL), log=tmp_path / "log")
    for child in two:
        child.join(100)
    said = [(tmp_path / f"log {rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert [child.exitcode for child in two] == [0, 0] and said[1] == "", said
    for column in ("step", "train_loss", "val_loss", "grad_norm"):
        a, b = ([float(row[column]) for row in rows(out)] for out in (tmp_path, whole))
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5), column
    found = re.findall(r"from (\d) to (\d) blocks, .*, evaluation loss (.+) -> (.+)", said[0])
    loss = [f"{float(row['val_loss']):.6f}" for row in rows(tmp_path)]  # after steps 1 to 6
    assert found == [("1", "2", loss[1], loss[1]), ("2", "4", loss[3], loss[3])]


def test_a_wrong_option_is_refused_in_one_line_before_there_is_a_run(data, tmp_path):
    for option in ("stages=0.5", "stages=a,b", "stages=5,15", "n-layer=10", "stage=4"):
        line = refused(progressive.main, *argv(data, tmp_path / "run", *SMALL, f"--{option}"))
        assert option.split("=")[0].replace("-", "_") in line
    assert not (tmp_path / "run").exists()
