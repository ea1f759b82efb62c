"""scratch_former.py: what it writes out is what torch's own transformer layers and the paper's formulas compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, train

import sample
import scratch_former


def tiny(**config):
    """6 heads of 4 channels in float64, where a difference is an error and not rounding. Biases and norms matter."""
    torch.manual_seed(0)
    config = {"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 6, "n_embd": 24, "n_ff": 40, **config}
    model = scratch_former.Model(scratch_former.Config(**config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def same(ours, theirs):
    return torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def as_torch(block, cfg):
    """torch's own layer with the weights of a block. load_state_dict raises if a name or shape does not fit."""
    layer = torch.nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, cfg.n_ff, dropout=0.0, activation="relu",
                                             batch_first=True, norm_first=False, dtype=torch.float64)  # fmt: skip
    attn, heads = block.attn, []
    for w in (attn.w_q, attn.w_k, attn.w_v):  # torch has a key and a value head for each query head
        head = w.weight.view(-1, cfg.n_embd // cfg.n_head, cfg.n_embd)
        heads.append(head.repeat_interleave(cfg.n_head // len(head), dim=0).flatten(0, 1))
    state = {k: torch.zeros_like(p) for k, p in layer.state_dict().items()}  # our attention has no biases
    parts = {"linear1": block.ff.w_1, "linear2": block.ff.w_2, "norm1": block.ln_1, "norm2": block.ln_2}
    state |= {f"{name}.{k}": p for name, part in parts.items() for k, p in part.state_dict().items()}
    state |= {"self_attn.in_proj_weight": torch.cat(heads), "self_attn.out_proj.weight": attn.w_o.weight}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("n_kv_head", [0, 6, 3, 1])
def test_the_network_equals_torch_s_own_layers(n_kv_head):
    model, idx = tiny(n_kv_head=n_kv_head), torch.randint(50, (2, 32))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(32, dtype=torch.float64)
    x = 24**0.5 * model.embedding.weight[idx] + scratch_former.positions(32, 24)
    for block in model.h:
        ours, x = block(x, mask), as_torch(block, model.cfg)(x, mask)
        assert same(ours, x)
    assert same(model(idx), (x @ model.head.weight.T + model.head.bias)[:, :, :50])


def test_positions_are_the_sinusoids_of_the_paper():
    table, C = scratch_former.positions(256, 512), 512
    for pos in range(256):
        angles = [pos / 10000 ** (2 * i / C) for i in range(C // 2)]
        expected = torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)], dtype=torch.float64)
        assert (table[pos] - expected).abs().max() < 1e-7
    assert (table.amax(0) - table.amin(0) > 1e-4).all()  # all columns vary: two would without the division by C


def test_parameters_and_initial_weights_of_the_default_size():
    V, C, hidden = 4032, 512, 1024  # 4,000 ids, padded to a multiple of 64
    model = scratch_former.Model(scratch_former.Config(vocab_size=4000))
    block = 4 * C * C + (C * hidden + hidden) + (hidden * C + C) + 2 * 2 * C  # attention has no biases
    assert sum(p.numel() for p in model.state_dict().values()) == V * C + 4 * block + (V * C + V)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = C**-0.5 if name == "embedding.weight" else (2 / sum(p.shape)) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=0.01) and abs(p.mean().item()) < 0.01 * std, name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_nothing_is_borrowed():
    text = (ROOT / "scratch_former.py").read_text(encoding="utf-8")
    for name in "scaled_dot_product_attention multi_head_attention_forward MultiheadAttention nn.Transformer".split():
        assert name not in text


def test_dropout_applies_to_the_embedding_and_to_each_sublayer_before_the_sum():
    model, idx = tiny(dropout=1.0), torch.randint(50, (2, 32))
    x, mask, block = torch.randn(2, 32, 24).double(), torch.zeros(32, 32), model.h[0]
    assert torch.equal(model(idx), tiny()(idx))
    model.train()
    assert same(block(x, mask), block.ln_2(block.ln_1(x)))  # both sublayers give 0
    assert same(model(idx), model(idx)[:1, :1].expand(2, 32, 50))  # no token and no position is left


@pytest.mark.parametrize("n_kv_head", [1, 3])  # 6: tests/test_models.py
@torch.no_grad()
def test_cached_equals_uncached_with_shared_key_heads(n_kv_head):
    model, idx = tiny(n_kv_head=n_kv_head), torch.randint(50, (3, 32))
    assert model.new_cache(3).k.numel() == model.new_cache(3).v.numel() == 2 * 3 * n_kv_head * 32 * 4
    for rows in ([2, 0, 1], [1], [0, 2, 2, 0, 1]):
        cache, text = model.new_cache(3), idx
        for start, end in ((0, 5), (5, 6), (6, 13), (13, 31), (31, 32)):
            logits = model(text[:, start:end], cache=cache)
            assert same(logits, model(text)[:, end - 1 : end]) and cache.length == end
            if end == 6:
                cache.select(rows)
                text = text[rows]


def test_impossible_sizes_are_refused():
    for config in ({"n_head": 5}, {"n_embd": 21, "n_head": 3}, {"n_kv_head": 4}):
        with pytest.raises(ValueError, match="is not"):
            tiny(**config)
    model, idx = tiny(), torch.zeros(1, 33, dtype=torch.long)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    for args in ({"idx": idx}, {"idx": idx[:, :3], "cache": cache}):
        with pytest.raises(ValueError, match="33 tokens do not fit block_size 32"):
            model(**args)


# --- the training


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_and_its_gradients_are_those_of_smoothed_cross_entropy(smoothing):
    model = tiny(label_smoothing=smoothing).train()
    with torch.no_grad():  # padded ids that would take most of the probability if they counted
        model.head.weight[50:] *= 10
        model.head.bias[50:] += 10
    idx, targets = torch.randint(50, (2, 9, 32))  # 288 targets: more than the 256 of a chunk
    targets[0, :5] = targets[-1, -1] = -1  # these do not count

    def expected(smoothing):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=smoothing)

    ours, theirs = model(idx, targets), expected(smoothing)
    assert ours.shape == () and same(ours, theirs) and theirs > 1
    names, parameters = zip(*model.named_parameters())
    for name, a, b in zip(names, torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        assert same(a, b), name
    assert same(model.eval()(idx, targets), expected(0.0))


def test_smoothing_is_float32_under_autocast():
    model, x, targets = tiny().float(), torch.randn(2, 32, 24), torch.randint(50, (2, 32))
    plain = model.smoothing(x, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.smoothing(x, targets), plain)
        assert model.smoothing(x.bfloat16(), targets).item() == pytest.approx(plain.item(), rel=0.01)
        assert model.train()(targets, targets).dtype == torch.float32


def test_the_optimizer_and_learning_rates_are_those_of_the_paper():
    cfg = scratch_former.Config(n_embd=128, warmup_steps=200, max_steps=10_000)
    expected = [128**-0.5 * min(s**-0.5, s * 200**-1.5) for s in range(1, 10_001)]
    assert [scratch_former.learning_rate(step, cfg) for step in range(10_000)] == pytest.approx(expected)
    optimizer = scratch_former.configure_optimizer(tiny(), cfg)
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-9


@pytest.mark.parametrize("warmup_steps, max_steps, top", [(40, 1000, 40), (4000, 100, 50), (0, 10, 1), (4000, 1, 1)])
def test_a_given_peak_is_reached_however_short_the_run(warmup_steps, max_steps, top):
    cfg = scratch_former.Config(learning_rate=3e-3, warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [scratch_former.learning_rate(step, cfg) for step in range(max_steps)]
    assert max(rates) == 3e-3 and rates.index(3e-3) + 1 == top


def test_multi_query_attention_trains_and_samples(data, tmp_path):
    train("scratch_former", data, tmp_path, "--n-kv-head", 1, "--n-layer", 2, "--max-steps", 4)
    model, tokenizer = sample.load(tmp_path / "ckpt.pt")
    idx = torch.tensor([tokenizer.encode("the model")])
    slow, fast = (sample.generate(model, idx, 20, "beam", beam_width=10, use_cache=u) for u in (False, True))
    assert torch.equal(slow, fast) and model.cfg.n_kv_head == 1
