"""conv_attention.py: what each row sees, the network against plain convolutions, the cache at every
length, the end of text that fills up short prompts, and the leak of the source."""

import json
import math
import random
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused
from test_models import small

import conv_attention
import sample

sys.path.append(str(ROOT / "bench"))
import leak

both_objectives = pytest.mark.parametrize("ahead", [1, 64])


def tiny(**kwargs):
    """In float64, so that any difference is an error and not rounding."""
    sizes = dict(n_embd=12, n_head=2, n_layer="1,1,1,1,1,1,1", block_size=256)
    return small("conv_attention", **sizes | kwargs).double()


def levels(model):
    return [module for module in model.modules() if isinstance(module, conv_attention.Level)]


# --- the network


@both_objectives
@pytest.mark.parametrize("length", [128, 100, 63])
@torch.no_grad()
def test_a_row_sees_exactly_the_blocks_up_to_its_own(ahead, length):
    """Blocks of `ahead` tokens end where the text ends. A row scores a token of the next block."""
    model = tiny(ahead=ahead)
    idx = torch.randint(50, (1, length))
    every = torch.arange(length)
    changed = idx.repeat(length, 1)
    changed[every, every] = (idx[0] + 1) % 50
    moved = (model(changed) - model(idx)).abs().amax(-1) > 1e-5  # (token, row of the logits)
    block = (every - length) // ahead
    assert torch.equal(moved, block >= block[:, None])


def plain_block(block, x):
    """A block of gpt2.py, with the formulas of its papers."""
    B, T, C = x.shape
    heads = block.attn.n_head
    qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
    q, k, v = (part.view(B, T, heads, -1).transpose(1, 2) for part in qkv)
    scores = q @ k.transpose(2, 3) / math.sqrt(C / heads)
    scores[:, :, torch.ones(T, T).triu(1).bool()] = -math.inf
    x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
    h = block.mlp.c_fc(block.ln_2(x))
    gelu = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return x + block.mlp.c_proj(gelu)


def plain_level(level, x, ahead):
    """A level that is shortened by convolutions whose stride is their kernel size."""
    T, C = x.shape[1:]
    for block in level.down:
        x = plain_block(block, x)
    if level.depth < 3:
        shift = 3 if ahead == 1 else 0
        C2 = level.compress.out_features
        y = level.ln_c(F.pad(x, (0, 0, shift, 0))).transpose(1, 2)  # (B, C, shift + T)
        kernel = level.compress.weight.view(C2, 4, C).transpose(1, 2)
        y = F.conv1d(y, kernel, level.compress.bias, stride=4).transpose(1, 2)
        y = level.ln_e(plain_level(level.inner, y, ahead)).transpose(1, 2)
        kernel = level.expand.weight.view(4, C, C2).permute(2, 1, 0)
        y = F.conv_transpose1d(y, kernel, stride=4).transpose(1, 2)  # (B, T or more, C)
        y = y + level.expand.bias.view(4, C).repeat(y.size(1) // 4, 1)
        x = x + y[:, :T] if ahead == 1 else y
    for block in level.up:
        x = plain_block(block, x)
    return x


@both_objectives
@pytest.mark.parametrize("length", [192, 101])
@torch.no_grad()
def test_it_computes_what_plain_convolutions_and_the_formula_of_attention_do(ahead, length):
    model = tiny(ahead=ahead, widths="1.5,2,2.5", n_layer="1,2,1,1,0,1,1", eot=7)
    idx = torch.randint(50, (2, length))
    text = idx
    if ahead == 64:
        text = torch.cat([torch.full((2, -length % 64), 7), idx], dim=1)
    x = model.wte(text) + model.wpe.weight[: text.size(1)]
    x = model.ln_f(plain_level(model.level, x, ahead))[:, -length:]
    logits = (x @ model.wte.weight.T)[..., :50]
    assert torch.allclose(model(idx), logits, rtol=0, atol=1e-9)
    rounded = model.train().bfloat16()(idx)  # on a CPU, by the formula in Attention
    assert (rounded - logits).norm() < 0.06 * logits.norm()


@both_objectives
@torch.no_grad()
def test_every_parameter_has_an_effect(ahead):
    """But for the biases of the keys, which softmax cancels."""
    model = tiny(ahead=ahead)
    idx = torch.randint(50, (1, 256))
    before = model(idx)
    for key, p in model.named_parameters():
        parts = p.chunk(3) if key.endswith("c_attn.bias") else [p]  # of queries, keys and values
        for i, part in enumerate(parts):
            old = part.clone()
            part += torch.randn(part.shape)
            moved = (model(idx) - before).abs().max()
            part[:] = old
            assert (moved > 1e-4) == (len(parts) == 1 or i != 1), f"{key}, part {i}: {moved}"


def test_n_layer_and_widths_set_the_blocks_and_the_width_of_each_level():
    model = tiny(widths="1.5,2,2.5", n_layer="1,2,3,4,5,6,7")
    sizes = []
    for level in levels(model):
        width = level.down[0].ln_1.weight.numel()
        sizes.append((len(level.down), len(level.up), width))
    assert sizes == [(1, 7, 12), (2, 6, 18), (3, 5, 24), (4, 0, 30)]


@pytest.mark.parametrize(
    "option, value",
    [
        ("n_layer", "1,2,3"),
        ("n_layer", "1,2,2,two,2,2,1"),
        ("n_layer", "1,2,2,-2,2,2,1"),
        ("widths", "2,-4,8"),
        ("widths", "2,4"),
        ("widths", "1.3,4,8"),
        ("widths", "0.001,4,8"),
        ("ahead", 2),
    ],
)
def test_sizes_that_make_no_network_end_in_one_line(option, value, data, tmp_path):
    name = f"--{option.replace('_', '-')}={value}"
    run = ["--data", data, "--out", tmp_path / "out", "--device", "cpu", "--max-steps", 1]
    assert option in refused(conv_attention.main, *run, name)


# --- the cache


@both_objectives
@torch.no_grad()
def test_a_cache_gives_the_last_rows_of_the_text_so_far_however_it_is_cut(ahead):
    model = tiny(ahead=ahead)
    idx = torch.randint(50, (2, 256))
    rng = random.Random(0)
    cuts = [sorted(rng.sample(range(1, 257), n)) for n in (1, 2, 4, 8, 16)]
    for ends in (range(1, 67), range(64, 257, 64), range(12, 256, 64), *cuts):
        cache = model.new_cache(2)
        for end in ends:
            logits = model(idx[:, cache.length : end], cache=cache)
            assert logits.shape == (2, ahead, 50) and cache.length == end
            plain = model(idx[:, :end])[:, -ahead:]
            assert torch.allclose(logits[:, -end:], plain, rtol=0, atol=1e-8), (ends, end)


@both_objectives
@torch.no_grad()
def test_a_cache_whose_texts_were_selected_goes_on_with_them(ahead):
    """At every offset in a group of four, with another and with the same number of texts."""
    model = tiny(ahead=ahead)
    idx = torch.randint(50, (3, 256))
    for start in (64, 65, 66, 67, 128):
        for rows in ([2, 0, 1], [1, 1, 2], [1], [0, 2, 2, 1]):
            cache = model.new_cache(3)
            model(idx[:, :start], cache=cache)
            cache.select(rows)
            for end in (start + 1, start + 65):
                logits = model(idx[rows, cache.length : end], cache=cache)
                plain = model(idx[rows, :end])[:, -ahead:]
                assert torch.allclose(logits, plain, rtol=0, atol=1e-8), (start, rows, end)


@both_objectives
def test_a_cache_takes_block_size_tokens_and_no_more(ahead):
    model = tiny(ahead=ahead, block_size=100)
    idx = torch.randint(50, (1, 100))
    cache = model.new_cache(1)
    model(idx, cache=cache)
    with pytest.raises(conv_attention.UserError, match="101 tokens do not fit block_size 100"):
        model(idx[:, :1], cache=cache)


@both_objectives
def test_beam_search_is_the_same_with_and_without_a_cache(ahead):
    """From prompts shorter and longer than a block, and past block_size, where the window moves."""
    model = tiny(ahead=ahead, block_size=100, widths="1.5,2,2.5")
    for length in (5, 90):
        idx = torch.randint(50, (2, length))
        cached, plain = (
            sample.generate(model, idx, 20, "beam", beam_width=3, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, plain)


def computed(model):
    """A list for each level. Whenever the level runs, the number of its positions is appended."""
    runs = []
    for level in levels(model):
        runs.append([])
        level.register_forward_hook(lambda _, args, x, own=runs[-1]: own.append(x.size(1)))
    return runs


@torch.no_grad()
def test_one_ahead_the_levels_run_at_every_1st_4th_16th_and_64th_token():
    model = tiny(ahead=1)
    runs = computed(model)
    cache = model.new_cache(1)
    for token in torch.randint(50, (128, 1, 1)):
        model(token, cache=cache)
    assert runs == [[1] * 128, [1] * 32, [1] * 8, [1] * 2]


@torch.no_grad()
def test_64_ahead_another_block_costs_one_block_and_another_token_the_whole_text():
    model = tiny()
    runs = computed(model)
    cache = model.new_cache(1)
    for n in (64, 64, 1, 64):
        model(torch.randint(50, (1, n)), cache=cache)
    assert runs == [[64, 64, 192, 64], [16, 16, 48, 16], [4, 4, 12, 4], [1, 1, 3, 1]]


# --- with data


@both_objectives
def test_trains_and_samples_with_the_end_of_text_of_its_data(ahead, data, tmp_path, capsys):
    """It fills up short prompts, whether or not it is the last id."""
    folder = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"eot": 7}), encoding="utf-8")
    out = tmp_path / "out"
    size = f"--block-size 128 --n-embd 24 --n-layer 1,0,0,1,0,0,1 --max-steps 2 --ahead {ahead}"
    options = [*size.split(), "--device", "cpu", "--data", str(folder), "--out", str(out)]
    conv_attention.main(options)
    capsys.readouterr()
    prompt = ["--prompt", "the", "--max-new-tokens", "70", "--device", "cpu"]
    sample.main(["--ckpt", f"{out}/ckpt.pt", *prompt])
    assert capsys.readouterr().out.startswith("the")

    model = sample.load(f"{out}/ckpt.pt")[0]
    assert model.cfg.eot == 7
    idx = torch.randint(300, (1, 70))
    padded = torch.cat([torch.full((1, -70 % ahead), 7), idx], dim=1)
    assert torch.allclose(model(idx), model(padded)[:, -70:], atol=1e-5)


def test_without_an_end_of_text_the_last_id_fills_up_short_prompts():
    idx = torch.randint(50, (1, 70))
    padded = torch.cat([torch.full((1, 58), 49), idx], dim=1)
    model = tiny(eot=-1)
    assert torch.allclose(model(idx), model(padded)[:, -70:], rtol=0, atol=1e-12)


# --- the leak (bench/leak.py)


def test_the_expander_of_the_source_predicts_random_tokens_that_it_sees_and_ours_predicts_none():
    """No loss is below ln 4 without a leak. Sampling uses the last 64 rows alone."""
    leaking = leak.train(ahead=64, source=True, steps=100)[1]
    honest = leak.train(ahead=64, source=False, steps=100)[1]
    assert leaking[:64].mean() < math.log(4) - 0.05
    assert leaking[64:].mean() > math.log(4) - 0.01
    assert abs(honest[:64].mean() - math.log(4)) < 0.01
    assert abs(honest[64:].mean() - math.log(4)) < 0.01
