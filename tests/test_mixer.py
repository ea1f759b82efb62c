"""mixer.py computes what its formulas say, in every form, with or without a cache."""

import pytest
import torch
import torch.nn.functional as F
from conftest import argv, refused
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
    return small("mixer", block_size=T, n_embd=C, n_layer=2, **options).double()


def close(a, b, atol=1e-10):
    return a.shape == b.shape and a.std() > 0.01 and torch.allclose(a, b, rtol=0, atol=atol)


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
    into = mix.W_in.flatten(0, 1) * (of_unit[:, None] >= position)  # (2 T, T)
    out = torch.cat([mix.W[0], mix.W[1]], dim=1) * (position[:, None] >= of_unit)  # (T, 2 T)
    return out @ F.gelu(into @ x + mix.bias[:, None], approximate="tanh")


@each_form
def test_logits_and_gradients_are_those_of_the_formulas(form):
    model, idx = tiny(**form), torch.randint(50, (3, T))
    assert (model.lm_head.weight is model.wte.weight) == form.get("tie_weights", False)
    x = model.wte.weight[idx]
    for block in model.h:
        x = x + plain_mix(block.mix, block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    logits = (model.ln_f(x) @ model.lm_head.weight.T)[..., :50]
    assert close(model(idx), logits, atol=1e-5 if form.get("rotary") else 1e-10)  # float32 angles
    grads = [torch.autograd.grad(y.std(), [*model.parameters()]) for y in (model(idx), logits)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


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
def test_a_cache_changes_no_logit_however_a_text_is_cut_and_texts_are_selected(form):
    """One vector for each position and layer, half of keys and values; `expanded` has three."""
    model, idx = tiny(**form), torch.randint(50, (3, T))
    expected = model(idx)
    selected = ([0, 1, 2], [1], torch.tensor([2, 0, 0, 1]))
    for pieces, rows in zip(([1, 6, 1, 1, 11], [9, 11], [12, 1, 7]), selected):
        cache, kept = model.new_cache(3), [0, 1, 2]
        for piece in idx.split(pieces, dim=1):
            logits = model(piece[kept], cache=cache)
            assert close(logits[:, 0], expected[kept, cache.length - 1]), cache.length
            if cache.length == pieces[0]:
                cache.select(rows)
                kept = rows
        vectors = 3 if form["mixing"] == "expanded" else 1
        numbers = sum(x.numel() for x in cache.x.values())
        assert numbers == vectors * model.cfg.n_layer * len(rows) * T * C


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


@pytest.mark.parametrize("mixing", ["flat", "expanded"])
def test_initial_weights_are_small_and_those_of_norms_before_a_sum_of_100_vectors_a_tenth(mixing):
    torch.manual_seed(0)
    cfg = mixer.Config(vocab_size=64, block_size=100, n_layer=1, n_embd=64, mixing=mixing)
    for name, p in mixer.Model(cfg).named_parameters():
        if ".mix.W" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif p.dim() == 1:
            weight = 0.1 if "ln_1" in name else 1.0
            assert (p == (weight if name.endswith("weight") else 0.0)).all(), name


def test_options_are_trained_and_saved_and_a_wrong_mixing_is_refused(data, tmp_path, monkeypatch):
    models = []  # grow is called with the network, at each step
    monkeypatch.setattr(mixer, "grow", lambda model, *rest: models.append(model))
    options = "--mixing expanded --rotary --tie-weights --n-layer 2 --max-steps 2 --dropout 0.1"
    mixer.main(argv(data, tmp_path, *options.split()))
    model, _ = sample.load(tmp_path / "ckpt.pt")
    assert model.lm_head.weight is model.wte.weight and model is not models[-1]
    idx = torch.randint(300, (2, 64))
    assert torch.equal(model(idx), models[-1].eval()(idx))
    said = refused(mixer.main, *argv(data, tmp_path / "no", "--mixing", "foo"))
    assert "mixing 'foo' is not flat, softmax or expanded" in said
