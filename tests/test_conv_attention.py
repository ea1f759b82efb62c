"""conv_attention.py: local in both directions, honest in both modes, exact in its cache; and the exhibit that leaks."""

import copy
import math
import random

import pytest
import torch
from test_models import small

import conv_attention
import sample

NAME = "conv_attention"
each_mode = pytest.mark.parametrize("ahead", [1, 64])


def test_compressing_is_a_strided_convolution_and_expanding_a_transposed_one():
    level = small(NAME).level
    x, short = torch.randn(2, 32, 48), torch.randn(2, 8, 96)
    conv = torch.nn.Conv1d(48, 96, kernel_size=4, stride=4)
    back = torch.nn.ConvTranspose1d(96, 48, kernel_size=4, stride=4)
    with torch.no_grad():
        conv.weight.copy_(level.compress.weight.view(96, 4, 48).transpose(1, 2))  # (out, in, kernel)
        conv.bias.copy_(level.compress.bias)
        back.weight.copy_(level.expand.weight.view(4, 48, 96).permute(2, 1, 0))  # (in, out, kernel)
        back.bias.zero_()  # ConvTranspose1d has one bias a channel, Linear one a channel and place
        ours = level.compress(x.reshape(2, 8, 4 * 48))
        assert torch.allclose(ours, conv(x.transpose(1, 2)).transpose(1, 2), atol=1e-4)
        ours = (level.expand(short) - level.expand.bias).view(2, 32, 48)
        assert torch.allclose(ours, back(short.transpose(1, 2)).transpose(1, 2), atol=1e-4)


@torch.no_grad()
def influence(model, idx):
    """(T, T) booleans: whether changing token t moves row i of the logits."""
    length = idx.size(1)
    changed = idx.repeat(length, 1)
    changed[range(length), range(length)] = (idx[0] + 1) % 50
    return (model(changed) - model(idx.repeat(length, 1))).abs().amax(-1) > 1e-5


@each_mode
@pytest.mark.parametrize("length", [128, 100, 63])
def test_no_row_sees_the_token_it_scores_or_a_later_one(ahead, length):
    moved = influence(small(NAME, ahead=ahead), torch.randint(50, (1, length)))
    for t in range(length):
        assert not moved[t, : max(0, t + 1 - ahead)].any() and moved[t].any()


def test_64_ahead_a_block_is_scored_from_all_of_the_blocks_before_it():
    moved = influence(small(NAME), torch.randint(50, (1, 128)))
    for t in range(128):
        start = t // 64 * 64  # the first row whose target lies in the next block
        assert moved[t].tolist() == [i >= start for i in range(128)]


def test_one_ahead_every_earlier_token_is_seen():
    moved = influence(small(NAME, ahead=1), torch.randint(50, (1, 128)))
    assert torch.equal(moved, torch.ones(128, 128).triu().bool())


@each_mode
def test_the_exhibit_leaks(ahead, capsys):
    moved = influence(small(NAME, ahead=ahead, expander="sequence"), torch.randint(50, (1, 128)))
    assert "sees the future" in capsys.readouterr().err
    assert all(moved[t, : t + 1 - ahead].any() for t in range(ahead, 125))  # 1 ahead, 125 to 127 are in no group yet


@pytest.mark.parametrize("ahead, expander", [(1, "local"), (64, "local"), (64, "sequence")])
def test_random_tokens_stay_random_to_the_honest_and_not_to_the_exhibit(ahead, expander):
    """300 steps on i.i.d. uniform tokens over 4 symbols, where nothing honest gets below ln 4 on fresh ones."""
    torch.manual_seed(0)
    network = dict(n_layer="1,1,1,1,1,1,1", n_embd=24, n_head=2, ahead=ahead, expander=expander)
    cfg = conv_attention.Config(vocab_size=4, block_size=128, **network)
    model = conv_attention.Model(cfg)
    optimizer = conv_attention.configure_optimizer(model, cfg)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 30)
        rows = torch.randint(4, (16, 128 + ahead))
        model(rows[:, :-ahead], rows[:, ahead:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.randint(4, (128, 128 + ahead))
    with torch.no_grad():
        loss = model.eval()(rows[:, :-ahead], rows[:, ahead:]).item()
    print(f"--ahead {ahead} --expander {expander}: {loss:.3f} nats, ln 4 = {math.log(4):.3f}")
    assert loss < 1.30 if expander == "sequence" else abs(loss - math.log(4)) < 0.02


def tiny(**kwargs):
    """In float64, in which any difference is an error and not a rounding."""
    return small(NAME, **{"block_size": 256, "n_embd": 12, "n_head": 2, "n_layer": "1,1,1,1,1,1,1", **kwargs}).double()


@torch.no_grad()
def test_one_ahead_cached_equals_uncached_after_every_length_and_piece():
    """The cache after n tokens is met in all its states, n from 0 to 200, and continued by pieces of every size."""
    model, idx, rng = tiny(ahead=1), torch.randint(50, (1, 256)), random.Random(0)
    plain, cache = model(idx), model.new_cache(1)
    for n in range(200):
        for piece in (1, 3, 64 - n % 64, *rng.choices(range(1, 257 - n), k=2)):
            piece = min(piece, 256 - n)
            logits = model(idx[:, n : n + piece], cache=copy.deepcopy(cache))
            assert torch.allclose(logits[:, 0], plain[:, n + piece - 1], atol=1e-8), (n, piece)
        model(idx[:, n : n + 1], cache=cache)
        assert cache.length == n + 1


@torch.no_grad()
def test_64_ahead_cached_equals_uncached_for_every_length_however_cut():
    model, idx, rng = tiny(), torch.randint(50, (1, 200)), random.Random(0)
    for n in range(1, 201):
        plain = model(idx[:, :n])
        assert plain.shape == (1, n, 50)
        for cuts in ([], [n % 64] if n > n % 64 > 0 else [], rng.choices(range(1, n), k=2) if n > 1 else []):
            cache, start = model.new_cache(1), 0
            for end in [*sorted(set(cuts)), n]:
                logits, start = model(idx[:, start:end], cache=cache), end
            assert logits.shape == (1, 64, 50) and cache.length == n
            assert torch.allclose(logits[:, -n:], plain[:, -64:], atol=1e-8), (n, cuts)


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 64, 70])
def test_a_short_prompt_is_one_with_end_of_text_before_it(length):
    model, idx = tiny(block_size=128), torch.randint(50, (1, length))
    filled = model(torch.cat([torch.full((1, -length % 64), 49), idx], 1))
    assert torch.allclose(model(idx), filled[:, -length:], atol=1e-8)
    assert torch.allclose(model(idx, cache=model.new_cache(1)), filled[:, -64:], atol=1e-8)


def test_decoding_is_clockwork():
    """Of 256 steps the levels run in 256, 64, 16 and 4."""
    model, runs = tiny(ahead=1), []
    for level in (m for m in model.modules() if isinstance(m, conv_attention.Level)):
        level.register_forward_hook(lambda module, *_: runs.append(module.depth))
    cache = model.new_cache(1)
    with torch.no_grad():
        for token in torch.randint(50, (256,)):
            model(token.view(1, 1), cache=cache)
    assert [runs.count(depth) for depth in range(4)] == [256, 64, 16, 4]


@each_mode
def test_rows_of_a_cache_can_be_chosen_at_any_time(ahead):
    model, idx = tiny(ahead=ahead), torch.randint(50, (3, 140))
    with torch.no_grad():
        for n in (1, 2, 3, 15, 17, 66, 90):
            cache = model.new_cache(3)
            model(idx[:, :n], cache=cache)
            rows = [2, 0, 0, 1]
            cache.select(rows)
            logits = model(idx[rows, n:], cache=cache)
            assert torch.allclose(logits, model(idx[rows])[:, -ahead:], atol=1e-8), n


@each_mode
@pytest.mark.parametrize("decode", ["greedy", "beam", "nucleus"])
def test_decoders_say_the_same_with_and_without_a_cache(ahead, decode):
    """From prompts shorter and longer than a block, past the context, where the window slides."""
    model = tiny(ahead=ahead, block_size=100)
    for length in (1, 5, 64, 90):
        idx = torch.randint(50, (2, length))
        texts = [
            sample.generate(model, idx, 90, decode, eot=49, generator=torch.Generator().manual_seed(0), use_cache=c)
            for c in (True, False)
        ]
        assert torch.equal(*texts)


@each_mode
def test_other_widths_and_blocks(ahead):
    model = small(NAME, ahead=ahead, n_layer="1,0,2,1,0,1,2", widths="1.5,2,2.5", n_embd=96, block_size=100)
    idx = torch.randint(50, (1, 100))
    assert model(idx).shape == (1, 100, 50)
    assert [m.down[0].attn.c_proj.in_features for m in model.modules() if getattr(m, "down", None)] == [96, 192, 240]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_layer": "1,2,3"},
        {"n_layer": "1,2,2,two,2,2,1"},
        {"widths": "2,4"},
        {"widths": "2,-4,8"},
        {"widths": "1.3,4,8"},  # 62 is no multiple of 6 heads
        {"ahead": 2},
        {"expander": "global"},
        {"expander": "sequence", "widths": "1.5,2,2.5", "n_embd": 96},
    ],
)
def test_a_config_that_makes_no_network_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        small(NAME, **wrong)


SMALL = "--block-size 128 --n-embd 24 --n-layer 1,1,1,1,1,1,1 --batch-size 2 --micro-batch 2 --device cpu".split()


@each_mode
def test_trains_resumes_and_speaks(ahead, data, tmp_path, capsys):
    out = str(tmp_path / "o")
    conv_attention.main(["--data", str(data), "--out", out, *SMALL, "--ahead", str(ahead), "--max-steps", "4"])
    conv_attention.main(["--resume", "--out", out, "--max-steps", "6"])
    sample.main(["--ckpt", f"{out}/ckpt.pt", "--decode", "all", "--prompt", "the", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "4 steps in" in said and "6 steps in" in said
    assert all(f"--- {decoder} ---" in said for decoder in sample.DECODERS)


def test_the_exhibit_trains_and_evaluates_and_will_not_sample(data, tmp_path, capsys):
    out = str(tmp_path / "o")
    conv_attention.main(["--data", str(data), "--out", out, *SMALL, "--expander", "sequence", "--max-steps", "2"])
    conv_attention.main(["--eval-only", "--out", out])
    assert "perplexity: " in capsys.readouterr().out
    for how in ([], ["--no-cache"]):
        for prompt in ("the", "the model " * 40):
            with pytest.raises(SystemExit, match="cannot sample"):
                sample.main(["--ckpt", f"{out}/ckpt.pt", "--prompt", prompt, *how])
