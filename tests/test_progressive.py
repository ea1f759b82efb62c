"""progressive.py: a switch changes no logit, whatever is not frozen learns, and gpt2.py loads the
finished model."""

import io
import re
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, fields

import pytest
import torch
from conftest import argv, load, refused, rows, same_rows, start_two, train
from test_models import small

import gpt2
import progressive
import sample

each_stage = pytest.mark.parametrize("stage", [1, 2, 3])
each_rank = pytest.mark.parametrize("rank", [4, 0])
ALPHA = 6.0
SCALE = ALPHA / 4  # of B A: alpha / rank


def tiny(stage=1, rank=4, **options):
    """8 layers: 2, 4 or 8 blocks."""
    sizes = dict(n_layer=8, n_embd=24, n_head=2, block_size=16)
    own = dict(stage=stage, lora_rank=rank, lora_alpha=ALPHA, stages="0.3,0.7")
    return small("progressive", **sizes, **own, **options)


def original(name, copies):
    """The name of what a tensor was copied from, if `copies` blocks in a row come from one."""
    if not name.startswith("h."):
        return name
    _, block, rest = name.split(".", 2)
    return f"h.{int(block) // copies}.{rest}"


def frozen(model):
    """The names of the attention matrices W, if LoRA learns in their place."""
    if model.cfg.stage == 1 or model.cfg.lora_rank == 0:
        return set()
    layers = ("attn.c_attn", "attn.c_proj")
    return {f"h.{i}.{layer}.weight" for i in range(len(model.h)) for layer in layers}


def unrolled(model):
    """The gpt2.Model of 8 blocks that computes the same, and for each of its tensors the name of
    the tensor of `model` that it came from."""
    own = dict(model.named_parameters())
    known = {field.name for field in fields(gpt2.Config)}
    options = {name: value for name, value in asdict(model.cfg).items() if name in known}
    plain = gpt2.Model(gpt2.Config(**options)).to(model.wte.weight.dtype)
    names = {}
    with torch.no_grad():
        for name, p in plain.named_parameters():
            names[name] = original(name, copies=8 // len(model.h))
            p.copy_(own[names[name]])
            if names[name] in frozen(model):
                layer = names[name].removesuffix(".weight")
                p += SCALE * own[f"{layer}.lora_b"] @ own[f"{layer}.lora_a"]
    return plain, names


# --- the network


@each_rank
@each_stage
def test_gradients_of_a_block_are_the_sum_of_those_of_its_layers_in_gpt2(stage, rank):
    model = tiny(stage, rank).double()
    plain, names = unrolled(model)
    rows = torch.randint(50, (2, 17))
    idx, targets = rows[:, :-1], rows[:, 1:]
    logits = plain(idx)
    assert logits.std() > 0.5 and torch.allclose(model(idx), logits, atol=1e-10)

    model(idx, targets).backward()
    plain(idx, targets).backward()
    sums = defaultdict(float)
    for name, p in plain.named_parameters():
        sums[names[name]] += p.grad
    own = dict(model.named_parameters())
    assert sums.keys() == {name for name in own if "lora" not in name}
    for name, expected in sums.items():
        if name not in frozen(model):
            assert torch.allclose(own[name].grad, expected, atol=1e-10), name
            continue
        layer = name.removesuffix(".weight")
        a, b = own[f"{layer}.lora_a"], own[f"{layer}.lora_b"]
        assert own[name].grad is None and a.grad.abs().max() > 1e-4
        assert torch.allclose(a.grad, SCALE * b.T @ expected, atol=1e-10), name
        assert torch.allclose(b.grad, SCALE * expected @ a.T, atol=1e-10), name


@each_stage
@torch.no_grad()
def test_dropout_is_where_gpt2_has_it_and_in_training_alone(stage):
    """With the same random numbers both compute the same."""
    model, idx = tiny(stage, dropout=0.3).double(), torch.randint(50, (2, 16))
    plain, _ = unrolled(model)
    logits = []
    for network in (model, plain):
        torch.manual_seed(1)
        logits.append(network.train()(idx))
    assert torch.allclose(*logits, atol=1e-10)
    assert (model.eval()(idx) - logits[0]).abs().max() > 0.1
    assert torch.allclose(model(idx), unrolled(tiny(stage).double())[0](idx), atol=1e-10)


def test_initial_weights():
    torch.manual_seed(0)
    model = progressive.Model(progressive.Config(vocab_size=4096, stage=2))
    for name, p in model.named_parameters():
        if "lora_b" in name or name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02
            if "lora_a" in name:
                std = 192**-0.5
            elif "c_proj" in name:
                std /= 24**0.5  # the residual stream has 24 sums
            assert p.std().item() == pytest.approx(std, rel=0.06), name


# --- switches


def learn(model, optimizer):
    for _ in range(3):  # A has a gradient once B is not zero
        rows = torch.randint(50, (4, 17))
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_optimizer(model, optimizer, before):
    """It trains what is not frozen, with the moments of the originals: before[name]."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in held
            held[id(p)] = group["weight_decay"]
    vectors = [name for name in trained if "ln_" in name or name.endswith("bias")]
    expected = {id(p): 0.0 if name in vectors else 0.1 for name, p in trained.items()}
    assert held == expected

    for name, p in trained.items():
        state = optimizer.state.get(p, {})
        if "lora" in name:
            assert state == {}, name
            continue
        assert state.keys() == {"exp_avg", "exp_avg_sq", "step"}
        for key, value in state.items():
            assert torch.equal(value, before[original(name, copies=2)][key]), (name, key)


@each_rank
def test_a_switch_keeps_every_logit_and_moment_and_then_all_that_is_not_frozen_learns(rank, data):
    model = tiny(rank=rank, data=str(data), vocab_size=300, max_steps=10)
    idx = torch.randint(50, (2, 16))
    optimizer = progressive.configure_optimizer(model, model.cfg)
    for stage, step in ((2, 3), (3, 7)):
        learn(model, optimizer)
        logits = model(idx)
        states = {}
        for name, p in model.named_parameters():
            state = optimizer.state.get(p, {})
            states[name] = {key: value.clone() for key, value in state.items()}

        grown = [progressive.grow(model, optimizer, model.cfg, step + i) for i in (-1, 0, 1)]
        assert grown == [False, True, False]
        assert torch.equal(model(idx), logits)
        assert model.cfg.stage == stage and len(model.h) == 2**stage
        params = dict(model.named_parameters())
        trained = {name: p for name, p in params.items() if p.requires_grad}
        assert params.keys() - trained.keys() == frozen(model)
        check_optimizer(model, optimizer, states)

        # No two tensors share memory, and no two A are equal.
        tensors = list(params.values())
        for state in optimizer.state.values():
            tensors += state.values()
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert len(places) == len(tensors)
        sums = {p.sum().item() for name, p in params.items() if "lora_a" in name}
        assert len(sums) == len(frozen(model))

        old = {name: p.detach().clone() for name, p in params.items()}
        learn(model, optimizer)
        unmoved = {name for name, p in params.items() if torch.equal(p, old[name])}
        assert unmoved == frozen(model)
        for p in trained.values():  # it was moved by a gradient, and not by weight decay alone
            assert optimizer.state[p]["exp_avg_sq"].any()
        assert not torch.equal(model.h[0].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight)


def test_a_switch_before_the_first_step_and_none_at_the_fraction_1(data):
    model = tiny(data=str(data), vocab_size=300, max_steps=10)
    model.cfg.stages = "0,1"
    optimizer = progressive.configure_optimizer(model, model.cfg)
    grown = [progressive.grow(model, optimizer, model.cfg, step) for step in (0, 1, 9, 10)]
    assert grown == [True, False, False, False] and model.cfg.stage == 2
    assert not any(optimizer.state_dict()["state"].values())  # there are no moments yet
    learn(model, optimizer)


@each_rank
@each_stage
def test_an_export_is_a_gpt2_checkpoint_of_the_same_function(stage, rank, data, tmp_path):
    path = tmp_path / "new" / "gpt2.pt"
    model = tiny(stage, rank, data=str(data), export=str(path))
    progressive.export(model, model.cfg)
    exported, tokenizer = sample.load(path)
    assert type(exported) is gpt2.Model
    assert tokenizer.decode(tokenizer.encode("the model")) == "the model"
    idx = torch.randint(50, (2, 16))
    assert torch.equal(exported(idx), model(idx))


# --- runs of 6 steps, with switches before steps 2 and 4

SMALL = """--n-layer 4 --n-embd 24 --n-head 2 --block-size 32 --lora-rank 4 --lora-alpha 8
           --micro-batch 4 --stages 0.33,0.67 --max-steps 6 --learning-rate 1e-2
           --eval-interval 1 --eval-tokens 9999""".split()
SWITCH = (
    r"step (\d): from (\d) to (\d) blocks, (.+) parameters, (.+) of them trained, "
    r"evaluation loss (.+) -> (.+)"
)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with redirect_stdout(io.StringIO()) as text:
        train("progressive", data, out, *SMALL, "--export", out / "gpt2.pt")
    return out, text.getvalue()


def test_a_run_prints_equal_losses_around_each_switch(whole):
    """The network has (320 + 32 + 2) x 24 = 8,496 parameters beside its blocks. A block has
    12 C^2 + 13 C = 7,224, A and B in it 24 C = 576; W in it has 4 C^2 = 2,304."""
    out, text = whole
    losses = {row["step"]: row["val_loss"] for row in rows(out)}
    found = re.findall(SWITCH, text)
    assert [line[:5] for line in found] == [
        ("2", "1", "2", "24,096", "19,488"),
        ("4", "2", "4", "39,696", "30,480"),
    ]
    for step, *_, before, after in found:
        assert before == after == f"{float(losses[step]):.6f}"


def test_the_export_has_the_score_of_the_finished_network(whole, capsys):
    out, text = whole
    last = f"{float(rows(out)[-1]['val_loss']):.4f} nats"
    for name, options in (
        ("progressive", ["--out", out]),
        ("gpt2", ["--init-from", out / "gpt2.pt"]),
    ):
        load(name).main(["--eval-only", "--device", "cpu", *map(str, options)])
        line = re.search("all of val: .*", capsys.readouterr().out)[0]
        assert line in text and last in line


def test_a_run_killed_before_at_and_after_each_switch_is_the_run_that_never_stopped(
    whole, data, tmp_path, monkeypatch
):
    """The schedule is asked at each step, after a switch: the run dies there."""
    schedule = progressive.learning_rate
    out = tmp_path / "parts"
    options = argv(data, out, *SMALL)
    for stop, stage in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):  # the stage of the checkpoint

        def kill(step, cfg, stop=stop):
            assert step != stop
            return schedule(step, cfg)

        monkeypatch.setattr(progressive, "learning_rate", kill)
        with pytest.raises(AssertionError):
            progressive.main(options)
        saved = torch.load(out / "ckpt.pt", weights_only=True)
        assert (saved["step"], saved["config"]["stage"]) == (stop, stage)
        options = ["--resume", "--out", str(out)]
    monkeypatch.setattr(progressive, "learning_rate", schedule)
    progressive.main(options)
    assert same_rows(rows(out), rows(whole[0]))


def test_two_processes_grow_as_one(whole, data, tmp_path):
    out, log = tmp_path / "two", tmp_path / "log"
    two = start_two(
        "progressive", *argv(data, out, *SMALL, "--export", tmp_path / "gpt2.pt"), log=log
    )
    for child in two:
        child.join(100)
    said = [(tmp_path / f"log {rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert [child.exitcode for child in two] == [0, 0], said
    assert len(re.findall(SWITCH, said[0])) == 2 and said[0].count("a checkpoint of gpt2.py") == 1
    assert said[1] == ""
    for column in ("step", "train_loss", "val_loss", "grad_norm"):
        together = [float(row[column]) for row in rows(out)]
        alone = [float(row[column]) for row in rows(whole[0])]
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5), column


@pytest.mark.parametrize(
    "option", ["--stages=0.5", "--stages=a,b", "--stages=-1,0.5", "--n-layer=10", "--stage=4"]
)
def test_a_wrong_option_is_refused_in_one_line_before_there_is_a_run(option, data, tmp_path):
    line = refused(progressive.main, *argv(data, tmp_path / "run", *SMALL, option))
    name = option.removeprefix("--").split("=")[0]
    assert name.replace("-", "_") in line and not (tmp_path / "run").exists()
