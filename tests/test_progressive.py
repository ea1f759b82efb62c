"""progressive.py: a switch changes no logit, all that is not frozen learns, and gpt2.py loads the finished model."""

import io
import re
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, fields

import pytest
import torch
from conftest import argv, load, refused, rows, run, same_rows, train
from test_models import small

import gpt2
import progressive
import sample

each_stage = pytest.mark.parametrize("stage", [1, 2, 3])
each_rank = pytest.mark.parametrize("rank", [4, 0])


def tiny(stage=1, rank=4, **kwargs):
    size = {"n_layer": 8, "n_embd": 24, "n_head": 2, "block_size": 16}
    return small("progressive", stage=stage, lora_rank=rank, lora_alpha=6.0, stages="0.3,0.7", **size, **kwargs)


def origin(name, n):
    """The name of the tensor that a block's tensor was copied from, where n blocks in a row were one."""
    return re.sub(r"^h\.(\d+)", lambda m: f"h.{int(m[1]) // n}", name)


def frozen(model):
    """The names of the attention matrices, where LoRA trains them."""
    names = {f"h.{i}.attn.{m}.weight" for i in range(len(model.h)) for m in ("c_attn", "c_proj")}
    return names if model.cfg.stage > 1 and model.cfg.lora_rank else set()


@each_rank
@each_stage
def test_gradients_of_a_shared_block_are_the_sum_over_the_layers_of_an_unrolled_gpt2(stage, rank):
    model = tiny(stage, rank).double()
    own, known = dict(model.named_parameters()), {f.name for f in fields(gpt2.Config)}
    plain = gpt2.Model(gpt2.Config(**{k: v for k, v in asdict(model.cfg).items() if k in known})).double()
    lora = {name: [own[f"{name[:-6]}lora_{k}"] for k in "ab"] for name in frozen(model)}
    for layer_name, p in plain.named_parameters():
        name = origin(layer_name, 4 // 2 ** (stage - 1))
        p.data.copy_(own[name] + (6 / 4 * lora[name][1] @ lora[name][0] if name in lora else 0))
    idx, total = torch.randint(50, (2, 17)), defaultdict(float)
    logits = plain(idx[:, :-1])
    assert logits.std() > 0.5 and torch.allclose(model(idx[:, :-1]), logits, atol=1e-10)
    for each in (model, plain):
        each(idx[:, :-1], idx[:, 1:]).backward()
    for layer_name, p in plain.named_parameters():
        total[origin(layer_name, 4 // 2 ** (stage - 1))] += p.grad
    assert total.keys() == {name for name in own if "lora" not in name}
    for name, grad in total.items():
        pairs = [(own[name].grad, grad)]
        if name in lora:
            a, b = lora[name]
            assert own[name].grad is None and a.grad.abs().max() > 1e-4
            pairs = [(a.grad, 6 / 4 * b.T @ grad), (b.grad, 6 / 4 * grad @ a.T)]
        assert all(torch.allclose(ours, theirs, atol=1e-10) for ours, theirs in pairs), name


def test_initial_weights():
    for name, p in progressive.Model(progressive.Config(vocab_size=4096, stage=2)).named_parameters():
        std = 192**-0.5 if "lora_a" in name else 0.02 / 24**0.5 if "c_proj" in name else 0.02
        zero = "lora_b" in name or name.endswith("bias")
        assert not p.any() if zero else p.dim() < 2 or abs(p.std().item() / std - 1) < 0.06, name


def learn(model, optimizer):
    for _ in range(3):  # lora_a has a gradient only once lora_b is not zero
        idx = torch.randint(50, (4, 17))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@each_rank
def test_switches_keep_every_logit_and_moment_and_then_all_that_is_not_frozen_learns(rank, data):
    model, idx = tiny(rank=rank, data=str(data), vocab_size=300, max_steps=10), torch.randint(50, (2, 16))
    optimizer = progressive.configure_optimizer(model, model.cfg)
    for stage, step in ((2, 3), (3, 7)):
        learn(model, optimizer)
        before, state = model(idx), optimizer.state
        old = {n: {k: v.clone() for k, v in state.get(p, {}).items()} for n, p in model.named_parameters()}
        assert [progressive.grow(model, optimizer, model.cfg, step + i) for i in (-1, 0, 1)] == [False, True, False]
        assert torch.equal(model(idx), before)
        assert model.cfg.stage == stage and len(model.h) == 2**stage
        params = dict(model.named_parameters())
        trained = {name: p for name, p in params.items() if p.requires_grad}
        assert params.keys() - trained.keys() == frozen(model)
        # The optimizer holds what is trained, once, with Adam's moments of the original; A and B have none yet.
        held = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        decay = [0.0 if "ln_" in name or name.endswith("bias") else 0.1 for name in trained]
        assert sorted(held) == sorted(zip(map(id, trained.values()), decay))
        for name, p in trained.items():
            state, theirs = optimizer.state.get(p, {}), old[origin(name, 2)] if "lora" not in name else {}
            assert state.keys() == theirs.keys() == (set() if "lora" in name else {"exp_avg", "exp_avg_sq", "step"})
            assert all(torch.equal(state[k], theirs[k]) for k in state), name
        tensors = [*params.values(), *(v for state in optimizer.state.values() for v in state.values())]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        assert len({p.sum().item() for name, p in trained.items() if "lora_a" in name}) == len(frozen(model))
        then = {name: p.detach().clone() for name, p in params.items()}
        learn(model, optimizer)
        assert {name for name, p in params.items() if torch.equal(p, then[name])} == frozen(model)
        assert all(optimizer.state[p]["exp_avg_sq"].any() for p in trained.values())  # not only decay moved it
        assert not torch.equal(model.h[0].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight)  # copies are independent


@each_rank
@each_stage
def test_an_export_is_a_gpt2_checkpoint_of_the_same_function(stage, rank, data, tmp_path):
    model, idx = tiny(stage, rank, data=str(data), export=str(tmp_path / "new" / "gpt2.pt")), torch.randint(50, (2, 16))
    progressive.export(model, model.cfg, 7)
    theirs, tokenizer = sample.load(model.cfg.export)
    assert type(theirs) is gpt2.Model and tokenizer.decode(tokenizer.encode("the model")) == "the model"
    assert torch.equal(theirs(idx), model(idx))


# --- runs of 6 steps, with switches before steps 2 and 4

SMALL = "--n-layer 4 --n-embd 24 --n-head 2 --block-size 32 --lora-rank 4 --lora-alpha 8 --micro-batch 4".split()
SMALL += "--stages 0.33,0.67 --max-steps 6 --learning-rate 1e-2 --eval-interval 1 --eval-tokens 9999".split()
SWITCH = r"step (\d): from (\d) to (\d) blocks, (.+) parameters, (.+) of them trained, evaluation loss (.+) -> (.+)"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts: its folder, its output."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with redirect_stdout(io.StringIO()) as text:
        train("progressive", data, out, *SMALL, "--export", out / "gpt2.pt")
    return out, text.getvalue()


def test_losses_are_equal_around_a_switch_and_the_export_scores_what_the_finished_network_does(whole, capsys):
    out, text = whole
    evaluated, found = {r["step"]: r["val_loss"] for r in rows(out)}, re.findall(SWITCH, text)
    assert all(before == after == f"{float(evaluated[step]):.6f}" for step, *_, before, after in found)
    # Outside the blocks (320 + 32 + 2) x 24 = 8,496. A block 12 C^2 + 13 C = 7,224, A and B 24 C = 576, W 4 C^2 = 2,304
    assert [line[:5] for line in found] == [("2", "1", "2", "24,096", "19,488"), ("4", "2", "4", "39,696", "30,480")]
    for name, options in (("progressive", ["--out", str(out)]), ("gpt2", ["--init-from", str(out / "gpt2.pt")])):
        load(name).main(["--eval-only", "--device", "cpu", *options])
        line = re.search("all of val: .*", capsys.readouterr().out)[0]
        assert line in text and f"{float(evaluated['6']):.4f} nats" in line


def test_resuming_before_at_and_after_each_switch_is_the_run_that_never_stopped(whole, data, tmp_path, monkeypatch):
    stops, schedule, parts = [1, 2, 3, 4, 5], progressive.learning_rate, tmp_path / "parts"

    def kill(step, cfg):
        assert step not in stops[:1]
        return schedule(step, cfg)

    monkeypatch.setattr(progressive, "learning_rate", kill)
    for stage in (1, 1, 2, 2, 3):
        with pytest.raises(AssertionError):
            progressive.main(["--resume", "--out", str(parts)] if parts.exists() else argv(data, parts, *SMALL))
        saved = torch.load(parts / "ckpt.pt", weights_only=True)
        assert (saved["step"], saved["config"]["stage"]) == (stops.pop(0), stage)
    progressive.main(["--resume", "--out", str(parts)])
    assert same_rows(rows(parts), rows(whole[0]))


def test_two_processes_grow_as_one(whole, data, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = run(*torchrun, "progressive.py", *argv(data, tmp_path / "two", *SMALL, "--export", tmp_path / "gpt2.pt"))
    assert len(re.findall(SWITCH, out)) == 2 and out.count("a checkpoint of gpt2.py") == 1
    for column in ("step", "train_loss", "val_loss", "grad_norm"):
        a, b = ([float(r[column]) for r in rows(out)] for out in (whole[0], tmp_path / "two"))
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5), column


def test_wrong_options_are_refused_in_one_line_before_there_is_a_run(data, tmp_path):
    for option in ("--stages=0.5", "--stages=a,b", "--stages=-1,0.5", "--n-layer=10", "--stage=4"):
        line = refused(progressive.main, *argv(data, tmp_path / "run", *SMALL, option))
        assert option[2:].split("=")[0].replace("-", "_") in line and not (tmp_path / "run").exists()
