"""conv_attention.py: what each row sees, the cache at every length, the end of text, and the exhibit that leaks."""

import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_models import small

import conv_attention
import sample


def tiny(**kwargs):
    """In float64, so that any difference is an error and not rounding."""
    sizes = dict(n_embd=12, n_head=2, n_layer="1,1,1,1,1,1,1", block_size=256)
    return small("conv_attention", **sizes | kwargs).double()


@torch.no_grad()
def influence(model, idx):
    """(T, T) booleans: whether changing token t moves row i of the logits."""
    length = idx.size(1)
    changed = idx.repeat(length, 1)
    changed[range(length), range(length)] = (idx[0] + 1) % 50
    return (model(changed) - model(idx.repeat(length, 1))).abs().amax(-1) > 1e-5


@pytest.mark.parametrize("ahead, expander", [(1, "local"), (64, "local"), (64, "sequence")])
@pytest.mark.parametrize("length", [128, 100, 63])
def test_a_row_sees_exactly_the_blocks_up_to_its_own_and_in_the_exhibit_all(ahead, expander, length):
    """Blocks of `ahead` tokens end where the text ends. The token that a row scores is in the block after its own."""
    moved = influence(tiny(ahead=ahead, expander=expander), torch.randint(50, (1, length)))
    block = (torch.arange(length) - length) // ahead
    assert torch.equal(moved, (block >= block[:, None]) | (expander == "sequence"))


def test_64_ahead_mixes_its_softmax_with_attention_over_the_tokens():
    model, text, outputs, block = tiny(), torch.randint(8, (192,)), [], torch.arange(192) // 64
    model.ln_f.register_forward_hook(lambda module, args, x: outputs.append(x[0]))
    log_p, keys, (x,) = model(text[None])[0], model.wte(text) + model.wpe.weight[:192], outputs
    a = (model.pointer.query(x) @ keys.T / 12**0.5).exp() * (block <= block[:, None])
    copied, g = a / a.sum(1, keepdim=True) @ F.one_hot(text, 50).double(), model.pointer.gate(x).sigmoid()
    assert torch.allclose(log_p.exp(), (1 - g) * model.lm_head(x)[:, :50].softmax(-1) + g * copied)


@pytest.mark.parametrize("expander", ["local", "sequence"])
def test_the_exhibit_predicts_random_tokens_that_it_can_see_and_no_others(expander):
    """I.i.d. tokens over 4 symbols: no loss is below ln 4 without a leak."""
    torch.manual_seed(0)
    model = conv_attention.Model(conv_attention.Config(4, 128, "0,0,0,0,0,0,0", 2, 48, expander=expander))
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    for _ in range(150):
        tokens = torch.randint(4, (16, 128 + 64))
        model(tokens[:, :-64], tokens[:, 64:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.randint(4, (256, 128 + 64))
    losses = F.cross_entropy(model(tokens[:, :-64]).transpose(1, 2), tokens[:, 64:], reduction="none").mean(0)
    seen, unseen = losses[:-64].mean().item(), losses[-64:].mean().item()  # of targets in the window, and after it
    print(f"--expander {expander}: {seen:.3f} and {unseen:.3f} nats, ln 4 = {math.log(4):.3f}")
    assert seen < 1.3 if expander == "sequence" else abs(seen - math.log(4)) < 0.02
    assert unseen > math.log(4) - 0.02  # these rows are all that sampling uses


@pytest.mark.parametrize("ahead, expander", [(1, "local"), (64, "local"), (1, "sequence"), (64, "sequence")])
@torch.no_grad()
def test_a_cache_gives_the_last_rows_of_the_text_so_far_however_it_is_cut(ahead, expander):
    model, idx, rng = tiny(ahead=ahead, expander=expander), torch.randint(50, (1, 256)), random.Random(0)
    walks = [sorted(rng.sample(range(1, 257), k)) for k in (1, 2, 4, 8, 16)]
    for ends in (range(1, 67), range(64, 257, 64), range(12, 256, 64), *walks):
        cache, start = model.new_cache(1), 0
        for end in ends:
            logits, start = model(idx[:, start:end], cache=cache), end
            assert logits.shape == (1, ahead, 50) and cache.length == end
            assert torch.allclose(logits[:, -end:], model(idx[:, :end])[:, -ahead:], atol=1e-8), (ends, end)


@pytest.mark.parametrize("ahead", [1, 64])
def test_beam_search_is_the_same_with_and_without_a_cache(ahead):
    """From prompts shorter and longer than a block, and past block_size, where the window slides."""
    model = tiny(ahead=ahead, block_size=100, widths="1.5,2,2.5")
    for idx in (torch.randint(50, (2, 5)), torch.randint(50, (2, 90))):
        texts = [sample.generate(model, idx, 20, "beam", beam_width=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*texts)


@torch.no_grad()
def test_one_ahead_each_level_is_computed_at_every_fourth_step_of_the_one_above():
    model = tiny(ahead=1)
    cache, runs = model.new_cache(1), []
    for level in (module for module in model.modules() if isinstance(module, conv_attention.Level)):
        level.register_forward_hook(lambda module, *_: runs.append(module.depth))
    for token in torch.randint(50, (128, 1, 1)):
        model(token, cache=cache)
    assert [runs.count(depth) for depth in range(4)] == [128, 32, 8, 2]


@pytest.mark.parametrize("ahead, expander", [(1, "local"), (64, "local"), (64, "sequence")])
@torch.no_grad()
def test_every_parameter_has_an_effect(ahead, expander):
    model, idx = tiny(ahead=ahead, expander=expander), torch.randint(50, (1, 256))
    before = model(idx)
    for name, p in model.named_parameters():
        old = p.clone()
        p += torch.randn(p.shape)
        assert (model(idx) - before).abs().max() > 1e-4, name
        p.copy_(old)


def test_sizes_and_those_that_make_no_network():
    wrong = [dict(n_layer="1,2,3"), dict(n_layer="1,2,2,two,2,2,1"), dict(widths="2,-4,8"), dict(widths="1.3,4,8")]
    for options in [*wrong, dict(ahead=2), dict(expander="global")]:
        with pytest.raises(ValueError, match=next(iter(options))):
            small("conv_attention", **options)
    model = tiny(widths="1.5,2,2.5", n_layer="1,2,3,4,5,6,7")
    levels = [m for m in model.modules() if isinstance(m, conv_attention.Level)]
    assert [(m.cfg.n_embd, len(m.down), len(m.up)) for m in levels] == [(12, 1, 7), (18, 2, 6), (24, 3, 5), (30, 4, 0)]


@pytest.mark.parametrize("ahead, expander", [(1, "local"), (64, "local"), (64, "sequence")])
def test_trains_and_samples_with_the_end_of_text_of_its_data(ahead, expander, data, tmp_path, capsys):
    """Short prompts are padded with it, whether or not it is the last id."""
    out, meta = str(tmp_path / "out"), shutil.copytree(data, tmp_path / "data") / "meta.json"
    meta.write_text(meta.read_text(encoding="utf-8").replace('"eot": 299', '"eot": 7'), encoding="utf-8")
    size = f"--block-size 128 --n-embd 24 --n-layer 1,0,0,1,0,0,1 --max-steps 2 --ahead {ahead} --expander {expander}"
    conv_attention.main([*size.split(), "--device", "cpu", "--data", str(meta.parent), "--out", out])
    assert ("leaks" in capsys.readouterr().err) == (expander == "sequence")
    sample.main(["--ckpt", f"{out}/ckpt.pt", "--prompt", "the", "--max-new-tokens", "70", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the")
    model, idx = sample.load(f"{out}/ckpt.pt")[0], torch.randint(300, (1, 70))
    padded = torch.cat([torch.full((1, -70 % ahead), 7), idx], 1)
    assert model.cfg.eot == 7 and torch.allclose(model(idx), model(padded)[:, -70:], atol=1e-5)
