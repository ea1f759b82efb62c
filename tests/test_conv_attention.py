"""conv_attention.py: what rows see, plain convolutions, the cache at every length, and the leak."""

import itertools
import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_models import small

import conv_attention

sys.path.append(str(ROOT / "bench"))
import leak

both_objectives = pytest.mark.parametrize("ahead", [1, 64])


def tiny(**kwargs):
    """In float64, so that any difference is an error and not rounding."""
    sizes = dict(n_embd=12, n_head=2, n_layer="1,1,1,1,1,1,1", block_size=250)
    return small("conv_attention", **sizes | kwargs).double()


def levels(model):
    return [module for module in model.modules() if isinstance(module, conv_attention.Level)]


@both_objectives
@torch.no_grad()
def test_a_row_sees_exactly_the_blocks_up_to_its_own(ahead):
    """Blocks of `ahead` tokens end where the text ends. A row scores a token of the next block."""
    model = tiny(ahead=ahead)
    for length in (128, 100, 63):
        idx, every = torch.randint(50, (1, length)), torch.arange(length)
        changed = idx.repeat(length, 1)
        changed[every, every] = (idx[0] + 1) % 50
        moved = (model(changed) - model(idx)).abs().amax(-1) > 1e-5  # (token, row of the logits)
        block = (every - length) // ahead
        assert torch.equal(moved, block >= block[:, None])


def plain_level(level, x, ahead):
    """A level that is shortened by convolutions whose stride is their kernel size."""
    T, C = x.shape[1:]
    for block in level.down:
        x = block(x)
    if level.depth < 3:
        C2 = level.compress.out_features
        y = level.ln_c(F.pad(x, (0, 0, 3 * (ahead == 1), 0))).transpose(1, 2)  # (B, C, T or T + 3)
        kernel = level.compress.weight.view(C2, 4, C).transpose(1, 2)
        y = F.conv1d(y, kernel, level.compress.bias, stride=4).transpose(1, 2)
        y = level.ln_e(plain_level(level.inner, y, ahead)).transpose(1, 2)
        kernel = level.expand.weight.view(4, C, C2).permute(2, 1, 0)
        y = F.conv_transpose1d(y, kernel, stride=4).transpose(1, 2)  # (B, T or more, C)
        y = y + level.expand.bias.view(4, C).repeat(y.size(1) // 4, 1)
        x = x + y[:, :T] if ahead == 1 else y
    for block in level.up:
        x = block(x)
    return x


@both_objectives
@pytest.mark.parametrize("length, eot", [(192, -1), (101, 7), (70, -1)])
@torch.no_grad()
def test_it_computes_what_plain_convolutions_do(ahead, length, eot):
    """64 ahead, end of text fills up the first block: -1 is the last id. Blocks are gpt2.py's."""
    model = tiny(ahead=ahead, widths="1.5,2,2.5", n_layer="1,2,1,1,0,1,1", eot=eot)
    idx = torch.randint(50, (2, length))
    text = torch.cat([torch.full((2, -length % ahead), eot % 50), idx], dim=1)
    x = model.wte(text) + model.wpe.weight[: text.size(1)]
    x = model.ln_f(plain_level(model.level, x, ahead))[:, -length:]
    logits = (x @ model.wte.weight.T)[..., :50]
    assert torch.allclose(model(idx), logits, rtol=0, atol=1e-9)


def test_n_layer_and_widths_set_the_blocks_and_the_width_of_each_level():
    """What makes no network is refused by name."""
    model = tiny(widths="1.5,2,2.5", n_layer="1,2,3,4,5,6,7")
    sizes = [(len(x.down), len(x.up), len(x.down[0].ln_1.weight)) for x in levels(model)]
    assert sizes == [(1, 7, 12), (2, 6, 18), (3, 5, 24), (4, 0, 30)]
    wrong = [("n_layer", n) for n in ("1,2,3", "1,2,2,two,2,2,1", "1,2,2,-2,2,2,1")]
    wrong += [("widths", n) for n in ("2,-4,8", "2,4", "1.25,4,8", "0.001,4,8")] + [("ahead", 2)]
    for name, value in wrong:
        with pytest.raises(conv_attention.UserError, match=name):
            tiny(**{name: value})


def test_at_first_a_group_becomes_its_mean_and_a_vector_four_copies():
    model = conv_attention.Model(conv_attention.Config(n_embd=8, n_head=2, widths="2,4,1"))
    for level in levels(model)[:3]:
        group = torch.randn(4, level.cfg.n_embd)
        y = level.compress(group.flatten())
        more = len(y) - group.size(1)
        assert torch.allclose(y, F.pad(group.mean(0), (0, more)), atol=1e-6)
        assert torch.equal(level.expand(y), F.pad(y, (0, -more)).repeat(4))


@both_objectives
@torch.no_grad()
def test_a_cache_gives_the_last_rows_of_the_text_so_far_however_it_is_cut_and_selected(ahead):
    """At every offset in a group of four, with another and with the same number of texts."""
    model, idx = tiny(ahead=ahead), torch.randint(50, (3, 250))
    rng = random.Random(0)
    cuts = [range(1, 67), range(64, 250, 64), range(12, 250, 64)]
    cuts += [sorted(rng.sample(range(1, 251), n)) for n in (2, 8, 16)]
    cuts += [(start, start + 1, start + 65) for start in (64, 65, 66, 67, 128)]
    for ends, rows in itertools.product(cuts, ([2, 0, 1], [0, 2, 2, 1])):
        cache, text = model.new_cache(3), idx
        for end in ends:
            logits = model(text[:, cache.length : end], cache=cache)
            assert logits.shape == (len(text), ahead, 50) and cache.length == end
            plain = model(text[:, :end])[:, -ahead:]
            assert torch.allclose(logits[:, -end:], plain, rtol=0, atol=1e-8), (ends, rows, end)
            if end == ends[0]:
                cache.select(rows)
                text = idx[rows]
        with pytest.raises(conv_attention.UserError, match="251 tokens do not fit block_size 250"):
            model(text[:, :1].repeat(1, 251 - end), cache=cache)


@torch.no_grad()
def test_a_cache_computes_each_level_no_more_often_than_its_groups_are_complete():
    """64 ahead, one more token costs the whole text. Autocast leaves levels in float32."""
    tokens = [[1] * n for n in (128, 32, 8, 2)]
    blocks = [[n, n, 3 * n, n] for n in (64, 16, 4, 1)]
    for ahead, pieces, expected in (1, [1] * 128, tokens), (64, [64, 64, 1, 64], blocks):
        model, runs = tiny(ahead=ahead).float(), []
        for level in levels(model):
            runs.append([])
            level.register_forward_hook(lambda _, args, x, own=runs[-1]: own.append(x[0, :, 0]))
        cache = model.new_cache(1)
        for n in pieces:
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.randint(50, (1, n)), cache=cache)
        assert [[len(x) for x in own] for own in runs] == expected
        assert all(x.dtype == torch.float32 for own in runs for x in own)


def test_the_expander_of_the_source_predicts_random_tokens_that_it_sees_and_ours_predicts_none():
    """No loss is below ln 4 without a leak. Sampling uses the last 64 rows alone: bench/leak.py."""
    leaking = leak.train(ahead=64, source=True, steps=120)[1]
    honest = leak.train(ahead=64, source=False, steps=120)[1]
    assert leaking[:64].mean() < math.log(4) - 0.05
    assert leaking[64:].mean() > math.log(4) - 0.01
    assert (honest.view(2, 64).mean(1) - math.log(4)).abs().max() < 0.01
