"""mixer.py computes what its formulas say, in every form: no position reads a later one, with or
without a cache, and everything up to the position itself is learned."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import argv
from test_models import small

import mixer
import sample

T, C = 20, 12  # positions, channels
FORMS = {
    "flat": dict(mixing="flat"),
    "softmax": dict(mixing="softmax"),
    "expanded": dict(mixing="expanded"),
    "flat, rotary, tied": dict(mixing="flat", rotary=True, tie_weights=True),
    "softmax, rotary": dict(mixing="softmax", rotary=True),
    "expanded, rotary, tied": dict(mixing="expanded", rotary=True, tie_weights=True),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def tiny(**options):
    """A model in float64, so that a difference is an error and no rounding."""
    sizes = dict(block_size=T, n_embd=C, n_layer=2)
    return small("mixer", **(sizes | options)).double()


def close(a, b):
    return a.shape == b.shape and a.std() > 0.01 and torch.allclose(a, b, rtol=0, atol=1e-10)


# --- the formulas, written another way


def rotated(x):
    """At position t, pairs of channels, as complex numbers, are multiplied by exp(i t angle)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (C // 2, 2)))
    angles = 10_000 ** (-torch.arange(C // 2).double() / (C // 2))
    turns = torch.exp(1j * torch.arange(T)[:, None] * angles)
    return torch.view_as_real(pairs * turns).flatten(-2)


def plain_mix(mix, x):
    """The output of a Mix for x (B, T, C)."""
    if mix.rotary:
        x = rotated(x)
    position = torch.arange(T)
    if mix.mixing != "expanded":
        rows = [mix.W[t, : t + 1] for t in range(T)]
        if mix.mixing == "softmax":
            rows = [row.softmax(0) for row in rows]
        sums = [sum(w * x[:, s] for s, w in enumerate(row)) for row in rows]
        return torch.stack(sums, dim=1)
    # Two matrices, each masked by the positions of the 2 T hidden units.
    of_unit = position.repeat(2)  # 0 .. T-1, and again
    into = mix.W_in.flatten(0, 1)  # (2 T, T)
    into = into * (of_unit[:, None] >= position)
    out = torch.cat([mix.W[0], mix.W[1]], dim=1)  # (T, 2 T)
    out = out * (position[:, None] >= of_unit)
    hidden = into @ x + mix.bias[:, None]
    return out @ F.gelu(hidden, approximate="tanh")


def plain_logits(model, idx, p=0.0):
    """The whole network, with dropout of probability p."""
    weights = dict(model.named_parameters(remove_duplicate=False))

    def norm(x, name):
        return F.layer_norm(x, (C,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = F.dropout(model.wte.weight[idx], p)
    for i, block in enumerate(model.h):
        x = x + F.dropout(plain_mix(block.mix, norm(x, f"h.{i}.ln_1")), p)
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # GELU
        x = x + F.dropout(linear(h, f"h.{i}.mlp.c_proj"), p)
    return (norm(x, "ln_f") @ weights["lm_head.weight"].T)[..., :50]


@each_form
@torch.no_grad()
def test_logits_are_those_of_the_formulas(form):
    model, idx = tiny(**form), torch.randint(50, (3, T))
    assert (model.lm_head.weight is model.wte.weight) == form.get("tie_weights", False)
    if not form.get("rotary"):
        assert close(model(idx), plain_logits(model, idx))
    else:  # the angles of the model are float32
        assert torch.allclose(model(idx), plain_logits(model, idx), atol=1e-5)


@torch.no_grad()
def test_dropout_follows_the_embedding_and_each_sublayer_in_training_alone():
    model, idx = tiny(dropout=0.3), torch.randint(50, (3, T))
    assert close(model(idx), plain_logits(model, idx))
    torch.manual_seed(1)
    trained = model.train()(idx)
    torch.manual_seed(1)  # the same random numbers, in the same order
    assert close(trained, plain_logits(model, idx, p=0.3))


# --- who reads whom


@each_form
@torch.no_grad()
def test_a_token_moves_all_logits_from_its_own_on_and_none_before(form):
    model, idx = tiny(**form), torch.randint(50, (1, T))
    every = torch.arange(T)
    changed = idx.repeat(T, 1)
    changed[every, every] = (idx[0] + 1) % 50
    moved = (model(changed) - model(idx)).abs().amax(-1)  # (token, position)
    assert torch.equal(moved > 1e-10, every >= every[:, None])
    assert close(model(idx[:, :7]), model(idx)[:, :7])  # a shorter text


@each_form
@torch.no_grad()
@pytest.mark.parametrize(
    "pieces, rows",
    [([1, 6, 1, 1, 11], [0, 1, 2]), ([9, 11], [1]), ([12, 1, 7], torch.tensor([2, 0, 0, 1]))],
    ids=str,
)
def test_a_cache_changes_no_logit_however_a_text_is_cut_and_texts_are_selected(form, pieces, rows):
    model, idx = tiny(**form), torch.randint(50, (3, T))
    expected = model(idx)
    cache = model.new_cache(3)
    first, *others = idx.split(pieces, dim=1)
    assert close(model(first, cache=cache)[:, 0], expected[:, pieces[0] - 1])
    cache.select(rows)
    for piece in others:
        logits = model(piece[rows], cache=cache)
        assert close(logits[:, 0], expected[rows, cache.length - 1]), cache.length


def test_a_cache_has_one_vector_for_each_position_and_layer_half_as_much_as_gpt2s():
    gpt2s = small("gpt2", n_layer=3).new_cache(5)
    for form in ({}, {"mixing": "expanded"}):  # its hidden units are computed again
        model = small("mixer", n_layer=3, **form)
        cache = model.new_cache(5)
        model(torch.zeros(5, model.cfg.block_size, dtype=torch.long), cache=cache)  # full
        assert 2 * sum(x.numel() for x in cache.x) == gpt2s.k.numel() + gpt2s.v.numel()


# --- what learns


@pytest.mark.parametrize("mixing", ["flat", "softmax", "expanded"])
def test_every_entry_up_to_the_diagonal_has_a_gradient_and_none_above_it(mixing):
    model, rows = tiny(mixing=mixing), torch.randint(50, (8, T + 1))
    model(rows[:, :-1], rows[:, 1:]).backward()
    learns = torch.ones(T, T).tril().bool()
    learns[0, 0] = mixing != "softmax"  # of a single position it is 1, whatever its weight
    matrices = [p for name, p in model.named_parameters() if ".mix.W" in name]
    assert len(matrices) == (4 if mixing == "expanded" else 2)
    for W in matrices:
        assert torch.equal(W.grad != 0, learns.expand_as(W))


@each_form
@torch.no_grad()
def test_every_parameter_has_an_effect(form):
    model, idx = tiny(**form), torch.randint(50, (2, T))
    before = model(idx)
    for name, p in model.named_parameters():
        old = p.clone()
        p += torch.randn(p.shape)
        assert (model(idx) - before).abs().max() > 1e-3, name
        p.copy_(old)


@pytest.mark.parametrize("mixing", ["flat", "softmax", "expanded"])
def test_initial_weights(mixing):
    torch.manual_seed(0)
    cfg = mixer.Config(vocab_size=1024, block_size=100, n_layer=3, n_embd=64, mixing=mixing)
    for name, p in mixer.Model(cfg).named_parameters():
        if "ln_1.weight" in name:  # small, so that a sum of 100 vectors does not drown one of them
            assert (p == 0.1).all(), name
        elif p.dim() == 1:
            assert (p == (1.0 if "ln_" in name and "weight" in name else 0.0)).all(), name
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 0.03 * std, name


def test_a_token_is_not_drowned_by_the_sum_of_those_before_it():
    """One of four tokens follows each token: ln 4 = 1.4. With norms that start at 1, the loss stays
    at ln 64 = 4.2."""
    torch.manual_seed(0)
    model = mixer.Model(mixer.Config(vocab_size=64, block_size=256, n_layer=3, n_embd=32))
    follows = torch.stack([torch.randperm(64) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(30):
        tokens = [torch.randint(64, (2,))]
        for _ in range(256):
            tokens.append(follows[torch.randint(4, (2,)), tokens[-1]])
        rows = torch.stack(tokens, dim=1)
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.log(4) < loss < 3


# --- as a user runs it


@pytest.mark.parametrize("mixing", ["softmax", "expanded"])
def test_every_option_trains_and_its_checkpoint_computes_the_same(
    data, tmp_path, monkeypatch, mixing
):
    models = []  # grow is called with the network, at each step
    monkeypatch.setattr(mixer, "grow", lambda model, *rest: models.append(model))
    options = f"--mixing {mixing} --rotary --tie-weights --n-layer 2 --max-steps 2 --dropout 0.1"
    mixer.main(argv(data, tmp_path, *options.split()))
    model, _ = sample.load(tmp_path / "ckpt.pt")
    assert model.lm_head.weight is model.wte.weight and model is not models[-1]
    idx = torch.randint(300, (2, 64))
    assert torch.equal(model(idx), models[-1].eval()(idx))


def test_an_invalid_config_is_refused():
    with pytest.raises(mixer.UserError, match="mixing 'foo'"):
        small("mixer", mixing="foo")
