"""mixer.py: no form sees the future, the whole lower triangle learns, and each form computes what the source writes."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_models import small
from test_training import argv

import mixer
import sample

L = 20  # positions
OPTIONS = {"mixing": ("flat", "expanded", "softmax"), "n_head": (1, 3), "kernel": (1, 4), "rotary": (False, True)}
FORMS = [dict(zip(OPTIONS, form)) for form in product(*OPTIONS.values())]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_mixing = pytest.mark.parametrize("mixing", OPTIONS["mixing"])


def tiny(**kwargs):
    """A model in float64, so that any difference is an error and not rounding, whose norms start at about 1."""
    model = small("mixer", **{"block_size": L, "n_embd": 12, "n_head": 1, "n_layer": 2, **kwargs}).double()
    for block in model.h:
        block.ln_1.weight.data += 1
    return model


def mix(**kwargs):
    """The Mix of a block, and an input for it, (3, L, 12)."""
    return tiny(**kwargs).h[0].mix, torch.randn(3, L, 12, dtype=torch.float64)


def close(a, b):
    return a.std() > 1e-3 and torch.allclose(a, b, rtol=0, atol=1e-10)


@each_form
@torch.no_grad()
def test_a_token_moves_no_earlier_logits_and_a_cache_changes_none(form):
    model, idx = tiny(**form), torch.randint(50, (3, L))
    plain, changed = model(idx), idx[:1].repeat(L, 1)
    changed[range(L), range(L)] = (idx[0] + 1) % 50
    moved = (model(changed) - plain[:1]).abs().amax(-1)  # (token, position)
    assert torch.equal(moved > 1e-10, torch.ones(L, L).triu().bool())
    assert close(model(idx[:, :7]), plain[:, :7])
    for pieces, rows in (([1, 6, 1, 1, 11], [0, 1, 2]), ([9, 11], [1]), ([12, 1, 7], [2, 0, 0, 1])):
        cache = model.new_cache(3)
        first, *others = idx.split(pieces, 1)
        logits = model(first, cache=cache)
        cache.select(rows)
        for piece in others:
            logits = model(piece[rows], cache=cache)
            assert close(logits[:, 0], plain[rows, cache.length - 1]), (pieces, cache.length)


@each_form
@torch.no_grad()
def test_every_parameter_has_an_effect(form):
    """With one head, a bias after the last map would have none: it is the same number in all channels."""
    model, idx = tiny(n_layer=1, **form), torch.randint(50, (2, L))
    before = model(idx)
    for name, p in model.named_parameters():
        old = p.clone()
        p += torch.randn_like(p)
        assert (model(idx) - before).abs().max() > 1e-4, name
        p.copy_(old)


@each_mixing
def test_every_entry_up_to_the_diagonal_has_a_gradient_and_none_above_it(mixing):
    model, idx = tiny(mixing=mixing, kernel=4, n_head=3), torch.randint(50, (8, L + 1))
    model(idx[:, :-1], idx[:, 1:]).backward()
    learns = torch.ones(L, L).tril().bool()
    learns[0, 0] = mixing != "softmax"  # the softmax of a single position is 1, whatever its weight
    for position_map in [m for block in model.h for m in block.mix.maps]:
        assert torch.equal(position_map.weight.grad != 0, learns[:, None, :, None].expand_as(position_map.weight))
        assert position_map.bias.grad.all()


def test_a_token_is_not_drowned_by_the_sum_of_those_before_it():
    """One of four tokens follows each token: ln 4 = 1.4. With norms that start at 1, the loss stays at ln 64 = 4.2."""
    torch.manual_seed(0)
    model = mixer.Model(mixer.Config(vocab_size=64, block_size=256, n_layer=3, n_embd=32))
    follows = torch.stack([torch.randperm(64) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95))
    for _ in range(30):
        idx = [torch.randint(64, (2,))]
        for _ in range(256):
            idx.append(follows[torch.randint(4, (2,)), idx[-1]])
        idx = torch.stack(idx, dim=1)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.log(4) < loss < 3


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [1, 4])
@torch.no_grad()
def test_flat_is_the_source_s_masked_convolution_over_positions(kernel):
    ours, x = mix(kernel=kernel)
    conv = torch.nn.Conv1d(L, L, kernel, padding="same", bias=False).double()  # input: (B, positions, channels)
    conv.weight.copy_(ours.maps[0].weight[0, 0, :, 0].movedim(2, 0).tril().movedim(0, 2))  # the mask of each tap
    assert close(ours(x), conv(x))


@torch.no_grad()
def test_expanded_is_two_matrices_masked_by_the_position_of_each_hidden_unit():
    ours, x = mix(mixing="expanded")
    position = torch.arange(2 * L) // 2
    into = ours.maps[0].weight[0, :, :, 0, :, 0].transpose(0, 1).reshape(2 * L, L)
    out = ours.maps[1].weight[0, 0, :, :, :, 0].transpose(1, 2).reshape(L, 2 * L)
    hidden = (into * (position[:, None] >= torch.arange(L))) @ x + ours.maps[0].bias[:, None]
    assert close(ours(x), (out * (torch.arange(L)[:, None] >= position)) @ F.gelu(hidden, approximate="tanh"))


@torch.no_grad()
def test_softmax_is_flat_whose_rows_are_softmaxes_over_the_past():
    (ours, x), (flat, _) = mix(mixing="softmax", kernel=4), mix(kernel=4)
    for t in range(L):
        past = ours.maps[0].weight[0, 0, t, 0, : t + 1].exp()  # (t + 1, kernel)
        flat.maps[0].weight[0, 0, t, 0, : t + 1] = past / past.sum(0) / 4  # so that all of a row sums to 1
    assert close(ours(x), flat(x))


@each_mixing
@torch.no_grad()
def test_each_head_is_a_mix_of_its_own_slice_of_the_channels(mixing):
    (whole, x), (alone, _) = mix(mixing=mixing, n_head=3, kernel=4), mix(mixing=mixing, n_embd=4, kernel=4)
    outputs = []
    for h, part in enumerate(x.split(4, dim=-1)):
        for ours, theirs in zip(whole.maps, alone.maps, strict=True):
            theirs.weight.copy_(ours.weight[h : h + 1])
            bias = ours.bias.view(L, -1, 3)[..., h]  # (L, n_out)
            if theirs.bias is not None:
                theirs.bias.copy_(bias.flatten())
        outputs.append(alone(part) + bias)  # the last map of a single head has no bias
    assert close(whole(x), torch.cat(outputs, dim=-1))


@torch.no_grad()
def test_rotary_multiplies_pairs_of_channels_by_a_complex_number_before_mixing():
    (plain, x), (rotary, _) = mix(), mix(rotary=True)
    angle = torch.arange(L)[:, None] * 10_000 ** (-torch.arange(6).double() / 6)
    rotated = torch.view_as_complex(x.view(3, L, 6, 2)) * torch.exp(1j * angle)
    assert torch.allclose(rotary(x), plain(torch.view_as_real(rotated).flatten(2)), atol=1e-4)  # its angles are float32


def test_a_cache_of_flat_is_half_as_large_as_gpt2_s():
    ours, theirs = (small(name, n_layer=3).new_cache(5) for name in ("mixer", "gpt2"))
    assert 2 * sum(x.nbytes for x in ours.x.values()) == theirs.k.nbytes + theirs.v.nbytes


def test_all_options_train_and_reload_with_tied_weights(data, tmp_path, monkeypatch):
    models, idx = [], torch.randint(300, (2, 64))
    monkeypatch.setattr(mixer, "grow", lambda model, *_: models.append(model))  # called with the network at each step
    options = "--mixing expanded --kernel 2 --n-head 2 --rotary --tie-weights --n-layer 2 --max-steps 2".split()
    mixer.main([str(option) for option in argv(data, tmp_path, *options)])
    model, _ = sample.load(tmp_path / "ckpt.pt")
    assert model.lm_head.weight is model.wte.weight and model is not models[-1]
    assert torch.equal(model(idx), models[-1].eval()(idx))


def test_an_invalid_config_is_refused():
    for wrong in (dict(mixing="foo"), dict(kernel=0), dict(n_head=7), dict(n_embd=47, n_head=1, rotary=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            small("mixer", **wrong)
