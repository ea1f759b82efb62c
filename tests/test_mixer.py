"""mixer.py: no form sees the future, all of the triangle learns, and it computes what the source writes."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_conv_attention import influence
from test_models import small
from test_training import argv, fails, rows, train

import gpt2
import mixer
import sample

NAME, L = "mixer", 132  # positions: Triangular takes 128 of them, then 4
MIXINGS = ("flat", "expanded", "softmax")
ALL = {"mixing": "expanded", "n_head": 3, "kernel": 4, "rotary": True, "tie_weights": True}  # at once
FORMS = [dict(zip(ALL, form)) for form in product(MIXINGS, (1, 3), (1, 4), (False, True), (False, True))]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
some_forms = pytest.mark.parametrize("form", [*({"mixing": mixing} for mixing in MIXINGS), ALL], ids=str)
each_mixing = pytest.mark.parametrize("mixing", MIXINGS)
each_kernel = pytest.mark.parametrize("kernel", [1, 4])


def tiny(**kwargs):
    """In float64, in which any difference is an error and not a rounding, with biases that are not zero and a norm
    before mixing that does not make it small."""
    model = small(NAME, **{"block_size": L, "n_embd": 12, "n_head": 1, "n_layer": 2, **kwargs}).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p += 0.2 * torch.randn_like(p) + ("ln_1.weight" in name)
    return model


def mix(**kwargs):
    """That of a block, and what it could be given, (3, L, 12)."""
    return tiny(**kwargs).h[0].mix, torch.randn(3, L, 12, dtype=torch.float64)


def close(a, b):
    return a.std() > 1e-3 and torch.allclose(a, b, rtol=0, atol=1e-10)


def learn(model, steps):
    """Steps of AdamW on i.i.d. uniform tokens."""
    optimizer = mixer.configure_optimizer(model, model.cfg)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(steps):
        idx = torch.randint(model.cfg.vocab_size, (8, model.cfg.block_size + 1))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- what every form promises


@each_form
def test_a_token_moves_its_own_row_and_the_later_ones_and_no_other(form):
    moved = influence(tiny(n_layer=1, **form), torch.randint(50, (1, L)))
    assert torch.equal(moved, torch.ones(L, L).triu().bool())


@each_form
@torch.no_grad()
def test_a_shorter_text_gives_the_beginning_of_a_longer_one_s_logits(form):
    model, idx = tiny(**form), torch.randint(50, (2, L))
    plain = model(idx)
    for n in (1, 127, 128, 129):
        assert close(model(idx[:, :n]), plain[:, :n]), n


@each_form
@torch.no_grad()
def test_cached_equals_uncached_however_the_text_is_cut(form):
    model, idx = tiny(**form), torch.randint(50, (2, L))
    plain = model(idx)
    for pieces in ([131, 1], [1, 126, 1, 1, 1, 2], [22] * 6):
        cache = model.new_cache(2)
        for piece in idx.split(pieces, 1):
            logits = model(piece, cache=cache)
            assert close(logits[:, 0], plain[:, cache.length - 1]), (pieces, cache.length)
        assert cache.length == L


@each_form
@torch.no_grad()
def test_rows_of_a_cache_can_be_kept_repeated_and_reordered(form):
    model, idx = tiny(**form), torch.randint(50, (3, L))
    plain = model(idx)
    for order in ([1], [2, 0, 0, 1]):
        cache = model.new_cache(3)
        model(idx[:, :100], cache=cache)
        cache.select(order)
        assert close(model(idx[order, 100:], cache=cache)[:, 0], plain[order, -1]), order


@some_forms
def test_random_tokens_stay_random(form):
    torch.manual_seed(0)
    model = mixer.Model(mixer.Config(vocab_size=4, block_size=16, n_layer=2, n_embd=24, **form))
    learn(model, 100)
    idx = torch.randint(4, (512, 17))
    with torch.no_grad():
        assert abs(model.eval()(idx[:, :-1], idx[:, 1:]).item() - math.log(4)) < 0.02


@some_forms
@pytest.mark.parametrize("decode", sample.DECODERS)
def test_decoders_say_the_same_with_and_without_a_cache_past_the_context(decode, form):
    model = tiny(block_size=8, **form)
    for length in (1, 10):
        idx = torch.randint(50, (2, length))
        texts = [
            sample.generate(model, idx, 20, decode, generator=torch.Generator().manual_seed(0), use_cache=use)
            for use in (True, False)
        ]
        assert texts[0].shape == (2, 20) and torch.equal(*texts)


@torch.no_grad()
def test_a_text_longer_than_the_context_is_refused():
    model, idx = tiny(), torch.randint(50, (1, L + 1))
    cache = model.new_cache(1)
    model(idx[:, :100], cache=cache)
    for wrong, how in ((idx, None), (idx[:, 100:], cache)):
        with pytest.raises(ValueError, match=f"{L + 1} tokens do not fit"):
            model(wrong, cache=how)


# --- what learns


def learns(mixing):
    """(L, L) booleans: the entries of a matrix that have a say."""
    some = torch.ones(L, L).tril().bool()
    some[0, 0] = mixing != "softmax"  # a softmax over one position is 1
    return some


@each_mixing
@each_kernel
def test_every_entry_up_to_the_diagonal_has_a_gradient_and_none_above_it(mixing, kernel):
    model, idx = tiny(mixing=mixing, kernel=kernel, n_head=3), torch.randint(50, (8, L + 1))
    model(idx[:, :-1], idx[:, 1:]).backward()
    for block in model.h:
        for positions in block.mix.maps:
            assert torch.equal(positions.weight.grad != 0, learns(mixing).expand_as(positions.weight))
            assert positions.bias.grad.all()


@each_mixing
def test_adamw_moves_every_entry_up_to_the_diagonal_and_none_above_it(mixing):
    model = tiny(mixing=mixing, weight_decay=0.0)  # decay would move them, too
    before = [positions.weight.detach().clone() for block in model.h for positions in block.mix.maps]
    learn(model, 2)
    after = [positions.weight for block in model.h for positions in block.mix.maps]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new != old, learns(mixing).expand_as(new))
        assert torch.equal(new.triu(1), old.triu(1))


def test_no_hidden_unit_of_expanded_is_dead_and_half_of_the_source_s_are():
    ours, x = mix(mixing="expanded")
    ours(x).square().sum().backward()
    into, out = (positions.weight.grad[:, 0, :, 0] for positions in ours.maps)  # (2, 1, L, L), (1, 2, L, L)
    assert into[:, 0].any(-1).all() and out[0].any(-2).all()  # a unit's row, its column
    conv, back = torch.nn.Conv1d(L, 2 * L, 1).double(), torch.nn.Conv1d(2 * L, L, 1).double()
    F.conv1d(F.gelu(F.conv1d(x, tril(conv.weight))), tril(back.weight)).square().sum().backward()
    assert conv.weight.grad[..., 0].any(-1).tolist() == [True] * L + [False] * L


def test_a_tied_matrix_is_one_and_its_gradient_that_of_both_uses():
    (tied, apart), idx = (tiny(tie_weights=tie) for tie in (True, False)), torch.randint(50, (2, L))
    with torch.no_grad():
        for name, p in tied.named_parameters():
            apart.get_parameter(name).copy_(p)
        apart.lm_head.weight.copy_(tied.wte.weight)
    for model in (tied, apart):
        model(idx, idx).backward()
    assert tied.lm_head.weight is tied.wte.weight
    assert close(tied.wte.weight.grad, apart.wte.weight.grad + apart.lm_head.weight.grad)
    held = [p for group in mixer.configure_optimizer(tied, tied.cfg).param_groups for p in group["params"]]
    assert sum(p is tied.wte.weight for p in held) == 1


# --- what it computes


def tril(weight):
    """The source's mask of a Conv1d's weights, (f, d, p): 'f d p -> f (d p)', tril, and back, of each p."""
    return weight.movedim(2, 0).tril().movedim(0, 2)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@each_kernel
@torch.no_grad()
def test_flat_is_the_source_s_masked_convolution_over_positions(kernel):
    ours, x = mix(kernel=kernel)
    conv = torch.nn.Conv1d(L, L, kernel, padding="same").double()  # in: (B, positions, channels)
    conv.weight.copy_(ours.maps[0].weight[0, :, 0, 0].permute(1, 2, 0))  # (kernel, L, L) -> (L, L, kernel)
    conv.weight.copy_(tril(conv.weight))
    conv.bias.copy_(ours.maps[0].bias)
    assert close(ours(x), conv(x))


@torch.no_grad()
def test_expanded_is_two_matrices_masked_by_the_position_of_each_hidden_unit():
    ours, x = mix(mixing="expanded")
    into, out = (positions.weight[:, 0, :, 0] for positions in ours.maps)  # (2, 1, L, L), (1, 2, L, L)
    position = torch.arange(2 * L) // 2
    first = into[:, 0].transpose(0, 1).reshape(2 * L, L) * (position[:, None] >= torch.arange(L))
    second = out[0].permute(1, 2, 0).reshape(L, 2 * L) * (torch.arange(L)[:, None] >= position)
    hidden = first @ x + ours.maps[0].bias.view(2, L).T.reshape(2 * L, 1)
    assert close(ours(x), second @ F.gelu(hidden, approximate="tanh") + ours.maps[1].bias[:, None])


@each_kernel
@torch.no_grad()
def test_softmax_rows_are_weights_that_sum_to_1_over_the_past(kernel):
    positions = mix(mixing="softmax", kernel=kernel, n_head=2)[0].maps[0]
    positions.bias.zero_()
    left, right = (kernel - 1) // 2, kernel // 2
    ones = positions(torch.ones(1, 2, L, 1, 12, dtype=torch.float64))
    assert torch.allclose(ones[..., left : 12 - right], torch.ones((), dtype=torch.float64), atol=1e-12)
    unit = torch.zeros(1, 2, L, L, 12, dtype=torch.float64)  # text s of the batch is 1 at position s, channel 5
    unit[..., range(L), range(L), 5] = 1
    y = positions(unit)[0].movedim(3, 0)  # (12, nh, L, L)
    rows = y[5 - right : 6 + left].flip(0)  # (kernel, nh, L, L): an entry stands left of the channel that it weighs
    assert y.sum() == pytest.approx(rows.sum().item()) and (rows >= 0).all() and not rows.triu(1).any()
    for t in range(L):
        past = positions.weight[0, :, 0, :, t, : t + 1]
        assert torch.allclose(rows[:, :, t, : t + 1], past.exp() / past.exp().sum(-1, keepdim=True) / kernel)


@each_mixing
@each_kernel
@torch.no_grad()
def test_a_head_is_a_mix_of_its_own_that_reads_and_writes_its_slice_of_the_width(mixing, kernel):
    whole, x = mix(mixing=mixing, kernel=kernel, n_head=3)
    alone, parts = mix(mixing=mixing, kernel=kernel, n_embd=4)[0], []
    for h, part in enumerate(x.split(4, dim=-1)):
        for ours, theirs in zip(whole.maps, alone.maps, strict=True):
            theirs.weight.copy_(ours.weight[..., h : h + 1, :, :])
            theirs.bias.copy_(ours.bias.view(-1, 3, L)[:, h].flatten())
        parts.append(alone(part))
    assert close(whole(x), torch.cat(parts, dim=-1))


def test_rotate_is_a_complex_product_and_counts_from_past():
    x = torch.randn(2, 300, 10, dtype=torch.float64)
    angle = torch.arange(300.0).double()[:, None] * 10_000 ** (-torch.arange(5.0).double() / 5)
    pairs = torch.view_as_complex(x.view(2, 300, 5, 2)) * torch.polar(torch.ones_like(angle), angle)
    turned = mixer.rotate(x, 0)
    assert torch.allclose(turned, torch.view_as_real(pairs).flatten(2), atol=1e-4)  # its angles are float32
    assert torch.allclose(turned.unflatten(2, (5, 2)).norm(dim=-1), x.unflatten(2, (5, 2)).norm(dim=-1), rtol=1e-6)
    assert torch.equal(mixer.rotate(x[:, 7:], 7), turned[:, 7:])


@torch.no_grad()
def test_rotary_rotates_before_mixing():
    (plain, x), (rotary, _) = mix(), mix(rotary=True)
    assert close(rotary(x), plain(mixer.rotate(x, 0))) and not torch.allclose(rotary(x), plain(x), atol=0.1)


@torch.no_grad()
def test_a_cache_of_flat_holds_half_of_gpt2_s():
    shape = {"n_layer": 3, "n_embd": 12, "n_head": 2, "block_size": 20}
    ours, theirs = small(NAME, **shape).new_cache(5), small("gpt2", **shape).new_cache(5)
    assert type(theirs) is gpt2.Cache
    assert 2 * sum(t.nbytes for t in ours.read.values()) == theirs.k.nbytes + theirs.v.nbytes > 0


# --- Triangular


def draw(T, S, M=2, H=3, N=4, dtype=torch.float64):
    """weight, x, and a gradient of what they give."""
    torch.manual_seed(0)
    weight, x = torch.randn(M, H, T, S, dtype=dtype), torch.randn(H, S, N, dtype=dtype)
    return weight.requires_grad_(), x.requires_grad_(), torch.randn(M, H, T, N, dtype=dtype)


@pytest.mark.parametrize("T, S", [(5, 5), (3, 5), (1, 5)])
def test_triangular_passes_gradcheck(T, S):
    assert torch.autograd.gradcheck(mixer.Triangular.apply, draw(T, S)[:2])


@pytest.mark.parametrize("T, S", [(300, 300), (256, 256), (170, 300), (40, 300), (1, 300)])
def test_triangular_is_tril_times_x(T, S):
    weight, x, dy = draw(T, S)
    ours, theirs = mixer.Triangular.apply(weight, x), weight.tril(S - T) @ x
    assert close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (weight, x), dy) for y in (ours, theirs))):
        assert close(a, b)


@pytest.mark.parametrize("T, S", [(300, 300), (170, 300)])
def test_triangular_under_bfloat16_autocast(T, S):
    weight, x, dy = draw(T, S, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = mixer.Triangular.apply(weight, x)
    assert ours.dtype == torch.bfloat16
    theirs = weight.tril(S - T) @ x
    ours, theirs = ((y, *torch.autograd.grad(y, (weight, x), dy.to(y.dtype))) for y in (ours, theirs))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.01 * b.norm()
    assert [grad.dtype for grad in ours[1:]] == [torch.float32] * 2 and not ours[1].triu(S - T + 1).any()


def test_compiles_as_one_graph_with_the_same_logits_and_gradients():
    model, idx = tiny(n_layer=1, block_size=20, **{**ALL, "kernel": 2}), torch.randint(50, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # all but the minute that C++ takes
    logits = [net(idx) for net in (model, compiled)]
    grads = [torch.autograd.grad(y.logsumexp(-1).mean(), [*model.parameters()]) for y in logits]
    assert torch.allclose(*logits, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*grads))


# --- runs


def test_trains_resumes_and_speaks(data, tmp_path):
    out = tmp_path / "o"
    options = "--mixing expanded --kernel 2 --n-head 2 --rotary --tie-weights --n-layer 2".split()
    assert "4 steps in" in run("mixer.py", *argv(data, out, *options, "--max-steps", 4))
    mixer.main(["--resume", "--out", str(out), "--max-steps", "6"])
    assert [row["step"] for row in rows(out)] == [*"123456"]
    how = ["--decode", "all", "--prompt", "the", "--max-new-tokens", 80, "--device", "cpu"]
    said = run("sample.py", "--ckpt", out / "ckpt.pt", *how)
    assert all(f"--- {decoder} ---" in said for decoder in sample.DECODERS)


def test_a_checkpoint_with_tied_weights_reloads(data, tmp_path, monkeypatch):
    seen, idx = [], torch.randint(300, (2, 64))
    monkeypatch.setattr(mixer, "grow", lambda model, *_: seen.append(model))  # is shown the network at every step
    train(NAME, data, tmp_path, "--max-steps", 2, "--tie-weights", "--n-layer", 2)
    model, _ = sample.load(tmp_path / "ckpt.pt")
    assert model.lm_head.weight is model.wte.weight and model is not seen[-1]
    assert torch.equal(model(idx), seen[-1].eval()(idx))


@pytest.mark.parametrize(
    "wrong",
    ["--mixing foo", "--kernel 0", "--n-head 7", "--n-embd 47 --n-head 1 --rotary"],
)
def test_an_option_that_makes_no_network_is_one_line(wrong, data, tmp_path):
    said = fails(NAME, data, tmp_path / "run", *wrong.split())
    assert wrong.split()[0][2:].replace("-", "_") in said and wrong.split()[1] in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mixing", ["flat", "expanded", "softmax"])
def test_a_token_is_heard_over_the_sum_of_those_before_it(mixing):
    """What follows depends on the last token alone. A mixer whose norms start at 1 stays at ln 512 = 6.2 here."""
    torch.manual_seed(0)
    cfg = mixer.Config(vocab_size=512, block_size=256, n_layer=4, n_embd=64, mixing=mixing)
    model, follows = mixer.Model(cfg), torch.stack([torch.randperm(512) for _ in range(4)])  # one of four tokens: ln 4
    optimizer = mixer.configure_optimizer(model, cfg)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 4e-3
    for _ in range(60):
        idx = [torch.randint(512, (4,))]
        for _ in range(cfg.block_size):
            idx.append(follows[torch.randint(4, (4,)), idx[-1]])
        idx = torch.stack(idx, dim=1)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.log(4) < loss < 4
