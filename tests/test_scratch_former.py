"""scratch_former.py: what it writes out is what torch's own transformer layers and the papers' formulas compute."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, train
from test_models import loss_on_random_tokens

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
    cross = hasattr(block, "cross")
    kind = torch.nn.TransformerDecoderLayer if cross else torch.nn.TransformerEncoderLayer
    layer = kind(cfg.n_embd, cfg.n_head, cfg.n_ff, dropout=0.0, activation="relu", batch_first=True, norm_first=False,
                 dtype=torch.float64)  # fmt: skip
    state = {k: torch.zeros_like(p) for k, p in layer.state_dict().items()}  # our attention has no biases
    parts = {"linear1": block.ff.w_1, "linear2": block.ff.w_2, "norm1": block.ln_1}
    parts |= {"norm2": block.ln_cross, "norm3": block.ln_2} if cross else {"norm2": block.ln_2}
    state |= {f"{name}.{k}": p for name, part in parts.items() for k, p in part.state_dict().items()}
    for name, attn in {"self_attn": block.attn, **({"multihead_attn": block.cross} if cross else {})}.items():
        heads = []
        for w in (attn.w_q, attn.w_k, attn.w_v):  # torch has a key and a value head for each query head
            head = w.weight.view(-1, cfg.n_embd // cfg.n_head, cfg.n_embd)
            heads.append(head.repeat_interleave(cfg.n_head // len(head), dim=0).flatten(0, 1))
        state |= {f"{name}.in_proj_weight": torch.cat(heads), f"{name}.out_proj.weight": attn.w_o.weight}
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


def test_impossible_sizes_are_refused():
    no_kv = {"cross_kv": False, "head_dim": 8, "n_head": 4}
    names = {"ff": "glu"}, {"position": "no"}
    for config in ({"n_head": 5}, {"n_embd": 21, "n_head": 3}, {"n_kv_head": 4}, no_kv, *names):
        with pytest.raises(ValueError, match="is "):
            tiny(**config)
    model, idx = tiny(), torch.zeros(1, 33, dtype=torch.long)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    for args in ({"idx": idx}, {"idx": idx[:, :3], "cache": cache}):
        with pytest.raises(ValueError, match="33 tokens do not fit block_size 32"):
            model(**args)


# --- three objectives

POSITIONS = ("sinusoid", "learned", "rotary", "relative")


def test_encoder_and_decoder_equal_torch_s_own_transformer():
    """nn.Transformer is post-norm with ReLU, too."""
    model, idx = tiny(objective="spans", n_kv_head=3), torch.randint(50, (2, 32))
    theirs = torch.nn.Transformer(24, 6, 2, 2, 40, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    theirs.encoder.norm = theirs.decoder.norm = None  # torch has one more norm after each stack
    for ours, stack in ((model.encoder, theirs.encoder), (model.h, theirs.decoder)):
        for block, layer in zip(ours, stack.layers):
            layer.load_state_dict(as_torch(block, model.cfg).state_dict())
    source, spans = scratch_former.hide_spans(idx, model.noise(idx), model.cfg)
    table = scratch_former.positions(32, 24)
    x, y = (24**0.5 * model.embedding.weight[ids] + table[: ids.size(1)] for ids in (source, spans[:, :-1]))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(y.size(1), dtype=torch.float64)
    logits = (theirs(x, y, tgt_mask=mask) @ model.head.weight.T + model.head.bias)[:, :, : model.n_logits]
    assert same(model(idx), logits)
    assert same(model(idx, idx), F.cross_entropy(logits.mT, spans[:, 1:]))
    one = torch.tensor([[1], [-1]]).expand(2, 32)  # evaluation fills up a batch with rows that do not count
    assert same(model(idx, one), F.cross_entropy(logits[0], spans[0, 1:]))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("more", [{}, {"cross_kv": False, "n_head": 8, "head_dim": 6, "n_kv_head": 2}])
@torch.no_grad()
def test_a_decoder_sees_the_whole_source_and_no_later_token_with_or_without_a_cache(position, more, monkeypatch):
    model, idx, calls = tiny(objective="spans", position=position, **more), torch.randint(50, (3, 32)), []
    source, spans = scratch_former.hide_spans(idx, model.noise(idx), model.cfg)
    monkeypatch.setattr(scratch_former, "hide_spans", lambda text, noise, cfg: (source, spans))
    plain, text, S = model(idx), torch.cat([source, spans[:, :-1]], dim=1), source.size(1)
    model.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    for rows in ([2, 0, 1], [1], [0, 2, 2, 0, 1]):
        cache = model.new_cache(3)
        for start, end in ((0, S + 1), (S + 1, S + 3), (S + 3, S + 4), (S + 4, text.size(1))):
            if start == S + 3:
                cache.select(rows)
            now = rows if start >= S + 3 else [0, 1, 2]
            assert same(model(text[now, start:end], cache=cache), plain[now, end - S - 1 : end - S])
            assert cache.length == end and cache.k.size(2) == (model.cfg.n_kv_head or 6)
        assert len(calls) == 1  # the encoder reads a source once
        calls.clear()
    for ids, t in [(spans, t) for t in range(spans.size(1) - 1)] + [(source, t) for t in range(S)]:
        old = ids[:, t].clone()
        ids[:, t] = (old + 7) % 50
        moved, first = (model(idx) - plain).abs().amax((0, 2)), t if ids is spans else 0
        assert (moved[:first] == 0).all() and (moved[first:] > 1e-6).all()
        ids[:, t] = old
    with torch.enable_grad():  # the encoder and the decoder each have a table of their own
        model(idx, idx).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def slow_attention(attn, x, source, bias=lambda head, i, j: 0.0, turn=lambda vector, i: vector):
    """Attention by a loop over positions and heads: x (T, C) looks at source (S, C). bias is added to scores, turn
    changes queries and keys."""
    out, d, G = [], attn.d_k, attn.n_head // attn.n_kv_head
    for i, h in itertools.product(range(len(x)), range(attn.n_head)):
        own, shared = slice(h * d, (h + 1) * d), slice(h // G * d, (h // G + 1) * d)
        q = turn(attn.w_q(x[i])[own], i)
        scores = [q @ turn(attn.w_k(y)[shared], j) / d**0.5 + bias(h, i, j) for j, y in enumerate(source)]
        out.append(sum(w * attn.w_v(y)[shared] for w, y in zip(torch.stack(scores).softmax(0), source)))
    return attn.w_o(torch.stack(out).view(len(x), -1))


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_an_encoder_equals_a_loop_over_heads_and_positions(position):
    model = tiny(objective="masked", position=position, ff="geglu", n_layer=1, n_kv_head=3, block_size=12)
    idx, block, slow = torch.randint(51, (1, 12)), model.h[0], {}  # 50 is the mask id
    x = model.embedding.weight[idx[0]] + (model.position_embedding.weight if position == "learned" else 0)
    x = 24**0.5 * x + (scratch_former.positions(12, 24) if position == "sinusoid" else 0)

    def turn(vector, i):  # as complex numbers
        angles = torch.tensor([i, i / 10000 ** (2 / 4)], dtype=torch.float64)
        return torch.view_as_real(torch.view_as_complex(vector.view(2, 2)) * torch.exp(1j * angles)).flatten()

    if position == "rotary":
        slow["turn"] = turn
    if position == "relative":  # up to 7 to the left, 8 to 15 are 8 or 9, keys to the right have 16 more
        bucket = [min(abs(d), 8 + (abs(d) >= 12)) + 16 * (d > 0) for d in range(-11, 12)]
        slow["bias"] = lambda h, i, j: model.relative_embedding[0].weight[bucket[j - i + 11], h]
    y = block.ln_1(x + slow_attention(block.attn, x, x, **slow))
    y = block.ln_2(y + block.ff.w_2(F.gelu(block.ff.w_1(y)) * block.ff.gate(y)))
    assert torch.allclose(model(idx)[0], model.head(y)[:, :50], rtol=0, atol=1e-6)  # the mask id cannot be chosen


@torch.no_grad()
def test_a_layer_with_relative_positions_and_cross_attention_equals_t5_s():
    """A T5Block of transformers without norms and biases. T5 does not divide scores by sqrt(d_k), which is 2."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    model, x, source = tiny(objective="spans", position="relative"), *torch.randn(2, 2, 200, 24).double()
    cfg = t5.T5Config(d_model=24, d_kv=4, d_ff=40, num_heads=6, dropout_rate=0.0, is_decoder=True)
    ours, theirs = model.h[0], t5.T5Block(cfg, has_relative_attention_bias=True).double()
    state = {"0.SelfAttention.relative_attention_bias": model.relative_embedding[1].weight}
    for name, attn in {"0.SelfAttention": ours.attn, "1.EncDecAttention": ours.cross}.items():
        state |= {f"{name}.{w}": getattr(attn, f"w_{w}").weight / (2 if w == "q" else 1) for w in "qkvo"}
    for name, w in {"wi": ours.ff.w_1, "wo": ours.ff.w_2}.items():
        state[f"2.DenseReluDense.{name}"] = w.weight
        w.bias.zero_()
    left = theirs.layer.load_state_dict({f"{name}.weight": w for name, w in state.items()}, strict=False)
    assert not left.unexpected_keys and all("layer_norm" in name for name in left.missing_keys)
    ours.ln_1 = ours.ln_cross = ours.ln_2 = torch.nn.Identity()
    for layer in theirs.layer:
        layer.layer_norm = torch.nn.Identity()
    distance = torch.arange(200) - torch.arange(200)[:, None]
    mask = torch.zeros(200, 200).double().masked_fill(distance > 0, -math.inf)
    bias = model.relative_embedding[1](scratch_former.buckets(distance, True)).permute(2, 0, 1)
    y = ours(x, mask + bias, memory=ours.cross.keys_and_values(source))
    assert same(y, theirs(x, attention_mask=mask, encoder_hidden_states=source)[0])
    for causal in (False, True):
        theirs = t5.T5Attention._relative_position_bucket(distance, bidirectional=not causal)
        assert scratch_former.buckets(distance, causal).equal(theirs)


def test_relative_positions_begin_with_what_is_near():
    config = scratch_former.Config(vocab_size=50, n_head=2, n_embd=24, objective="spans", position="relative")
    encoder, decoder = (table.weight for table in scratch_former.Model(config).relative_embedding)
    for bias, distance, causal in ((encoder, torch.arange(-7, 8), False), (decoder, torch.arange(-15, 1), True)):
        near = -distance.abs()[:, None] * torch.tensor([1, 0.5])
        assert bias.requires_grad and bias[scratch_former.buckets(distance, causal)].equal(near)


@torch.no_grad()
def test_rotary_scores_keep_when_positions_move_and_a_source_is_its_own_keys_and_values_without_matrices():
    table, q, k = scratch_former.positions(64, 8).double(), *torch.randn(2, 1, 1, 20, 8).double()
    here, there = (scratch_former.rotate(q, t) @ scratch_former.rotate(k, t).mT for t in (table[:20], table[37:57]))
    assert torch.allclose(here, there, atol=1e-5) and not torch.allclose(here, q @ k.mT, atol=0.1)
    attn, x, source = tiny(objective="spans", cross_kv=False).h[0].cross, *torch.randn(2, 1, 7, 24).double()
    assert same(attn(x, memory=attn.keys_and_values(source))[0], slow_attention(attn, x[0], source[0]))
    assert [name for name, _ in attn.named_parameters()] == ["w_q.weight", "w_o.weight"]


def test_feed_forward_networks_and_that_gated_ones_have_as_many_parameters():
    x = torch.randn(2, 24).double()
    for ff, f in dict(relu=F.relu, gelu=F.gelu, geglu=F.gelu, swiglu=F.silu).items():
        net = tiny(ff=ff, n_ff=96).h[0].ff
        assert same(net(x), net.w_2(f(net.w_1(x)) * (net.gate(x) if ff.endswith("glu") else 1)))
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(2 * 24 * 96 + 24 + 96, rel=0.01)


def test_10000_corruptions():
    cfg, n, m = scratch_former.Config(vocab_size=1000), 24, 8  # 15% of 160 tokens, in spans of 3
    text, noise = torch.randint(1000, (10_000, 160)), torch.rand(2, 10_000, 160)
    source, spans = scratch_former.hide_spans(text, noise, cfg)
    assert source.shape == (10_000, 160 - n + m) and spans.shape == (10_000, n + m + 1)
    lengths = []
    for row, read, written in zip(text.tolist(), source.tolist(), spans.tolist()):
        where = [i for i, token in enumerate(written) if token >= 1000]
        hidden = {written[i]: written[i + 1 : j] for i, j in itertools.pairwise(where)}
        assert [*hidden, written[-1]] == [*range(1000, 1000 + m + 1)]
        assert [t for token in read for t in hidden.get(token, [token])] == row  # together they give back the text
        assert [token for token in read if token >= 1000] == [*hidden]
        assert not any(a >= 1000 and b >= 1000 for a, b in itertools.pairwise(read))  # spans are apart
        lengths += map(len, hidden.values())
    assert min(lengths) == 1 and max(lengths) > 12 and sum(lengths) / len(lengths) == 3
    for edge in (source[:, 0] == 1000, source[:, -1] == 1000 + m - 1):
        assert edge.float().mean() == pytest.approx(8 / 137, abs=0.01)  # 138 lengths of at least 1, in 9 parts
    for training in (True, False):
        idx, targets = scratch_former.hide_tokens(text, noise, cfg, training)
        hidden = targets >= 0
        assert (hidden.sum(1) == n).all() and targets[hidden].equal(text[hidden]) and idx[~hidden].equal(text[~hidden])
        assert (hidden.float().mean(0) - n / 160).abs().max() < 0.02  # every position as often
        assert ((idx == 1000).sum(1) == (19 if training else n)).all()
        assert ((idx != text) & (idx < 1000)).sum() == pytest.approx(30_000 * 0.999 if training else 0, rel=0.01)


@pytest.mark.parametrize("objective", ["masked", "spans"])
@torch.no_grad()
def test_evaluation_hides_the_same_tokens_in_every_batch_and_training_others(objective):
    model, idx = tiny(objective=objective), torch.randint(50, (6, 32))
    losses = torch.stack([model(row[None], row[None]) for row in idx])
    assert same(model(idx, idx), losses.mean()) and losses.std() > 0.01
    if objective == "masked":  # what is under the mask id cannot be seen
        text, targets = scratch_former.hide_tokens(idx, model.noise(idx), model.cfg, False)
        assert (text[targets >= 0] == 50).all()
        assert same(model(idx, idx), F.cross_entropy(model(text).mT, targets, ignore_index=-1))
    model.train()
    assert model(idx, idx) != model(idx, idx)


def test_no_loss_below_ln_v_unless_hidden_tokens_are_visible(monkeypatch):
    class Masked(scratch_former.Config):
        def __init__(self, **config):
            super().__init__(objective="masked", hide=0.5, n_ff=64, **{**config, "n_layer": 1})

    monkeypatch.setattr(scratch_former, "Config", Masked)
    assert -0.01 < loss_on_random_tokens("scratch_former") < 0.02
    monkeypatch.setattr(scratch_former, "hide_tokens", lambda text, noise, cfg, training: (text, text))
    assert loss_on_random_tokens("scratch_former") < -0.5


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


@pytest.mark.parametrize("objective", ["masked", "spans"])
def test_other_objectives_train_and_have_no_bits_per_byte(objective, data, tmp_path, capsys):
    rows = train("scratch_former", data, tmp_path, "--preset", objective, "--max-steps", 4)
    assert {row["val_bits_per_byte"] for row in rows} == {""} and 4 < float(rows[-1]["val_loss"]) < math.log(300)
    assert "all of val: " in (printed := capsys.readouterr().out) and "bits" not in printed and "perpl" not in printed
