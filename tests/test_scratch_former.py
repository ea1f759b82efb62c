"""scratch_former.py: what it writes out is what torch's own transformer layers and the papers' formulas compute."""

import itertools
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
    no_kv = {"cross_kv": False, "head_dim": 8, "n_head": 4}
    for config in (
        {"n_head": 5},
        {"n_embd": 21, "n_head": 3},
        {"n_kv_head": 4},
        no_kv,
        {"ff": "glu"},
        {"position": "no"},
    ):
        with pytest.raises(ValueError, match="is not|is invalid: choose one of"):
            tiny(**config)
    model, idx = tiny(), torch.zeros(1, 33, dtype=torch.long)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    for args in ({"idx": idx}, {"idx": idx[:, :3], "cache": cache}):
        with pytest.raises(ValueError, match="33 tokens do not fit block_size 32"):
            model(**args)


# --- three objectives


def spans_of(model, text):
    """What the network sees in evaluation: (source, the decoder's tokens with the last sentinel)."""
    return scratch_former.hide_spans(text, model.noise(text), model.cfg)


def test_an_encoder_and_decoder_equal_torch_s_own_transformer(monkeypatch):
    """nn.Transformer is post-norm with ReLU, as here, on the same weights; shared key heads, too."""
    model, idx = tiny(objective="spans", n_kv_head=3), torch.randint(50, (2, 32))
    theirs = torch.nn.Transformer(24, 6, 2, 2, 40, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    theirs.encoder.norm = theirs.decoder.norm = None  # torch has one more norm after each stack
    for ours, layers in ((model.encoder, theirs.encoder.layers), (model.h, theirs.decoder.layers)):
        for i, block in enumerate(ours):
            layers[i].load_state_dict(as_torch(block, model.cfg).state_dict())
    source, spans = spans_of(model, idx)
    read, written = (
        24**0.5 * model.embedding.weight[x] + scratch_former.positions(32, 24)[: x.size(1)] for x in (source, spans)
    )
    causal = torch.nn.Transformer.generate_square_subsequent_mask(spans.size(1) - 1, dtype=torch.float64)
    x = theirs(read, written[:, :-1], tgt_mask=causal)
    logits = (x @ model.head.weight.T + model.head.bias)[:, :, : model.n_logits]
    assert same(model(idx), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), spans[:, 1:].flatten())
    assert same(model(idx, idx), expected)
    unscored = torch.tensor([[1], [-1]]).expand(2, 32)  # evaluation fills up a batch with a row that does not count
    assert same(model(idx, unscored), F.cross_entropy(logits[0], spans[0, 1:]))


@pytest.mark.parametrize("position", ["sinusoid", "learned", "rotary", "relative"])
@pytest.mark.parametrize("more", [{}, {"cross_kv": False, "n_head": 8, "head_dim": 6, "n_kv_head": 2}])
@torch.no_grad()
def test_a_decoder_sees_the_whole_source_and_no_later_token_with_or_without_a_cache(position, more, monkeypatch):
    model, idx = tiny(objective="spans", position=position, ff="swiglu", hide=0.3, **more), torch.randint(50, (3, 32))
    source, spans = spans_of(model, idx)
    S, T = source.size(1), spans.size(1) - 1
    monkeypatch.setattr(scratch_former, "hide_spans", lambda text, noise, cfg: (source, spans))
    plain, text = model(idx), torch.cat([source, spans[:, :-1]], dim=1)
    for rows in ([2, 0, 1], [1], [0, 2, 2, 0, 1]):
        cache, calls, tokens, start = model.new_cache(3), [], text, 0
        handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.encoder]
        for end in (S + 1, S + 2, S + 6, S + T):
            if end == S + 6:
                cache.select(rows)
                tokens = text[rows]
            logits = model(tokens[:, start:end], cache=cache)
            assert same(logits, plain[rows if end >= S + 6 else [0, 1, 2], end - S - 1 : end - S])
            assert cache.length == end
            start = end
        assert len(calls) == len(model.encoder)  # the source is read once
        [handle.remove() for handle in handles]
    for t in range(T):
        spans[:, t] = (spans[:, t] + 7) % 50
        moved = (model(idx) - plain).abs().amax((0, 2))
        spans[:, :-1] = text[:, S:]
        assert (moved[:t] == 0).all() and (moved[t:] > 1e-6).all(), t
    for t in range(S):
        source[:, t] = (source[:, t] + 7) % 50
        assert ((model(idx) - plain).abs().amax((0, 2)) > 1e-6).all(), t
        source[:] = text[:, :S]


def slow_attention(attn, x, source, bias, turn):
    """Attention by a loop over heads and positions: x (T, C) looks at source (S, C); bias(head, i, j) is added to the
    score, turn(vector, i) is applied to queries and keys."""
    out, d, G = [], attn.d_k, attn.n_head // attn.n_kv_head
    for i in range(len(x)):
        heads = []
        for h in range(attn.n_head):
            rows, shared = slice(h * d, (h + 1) * d), slice(h // G * d, (h // G + 1) * d)
            q = turn(attn.w_q(x[i])[rows], i)
            scores = [q @ turn(attn.w_k(y)[shared], j) / d**0.5 + bias(h, i, j) for j, y in enumerate(source)]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * attn.w_v(y)[shared] for w, y in zip(weights, source)))
        out.append(attn.w_o(torch.cat(heads)))
    return torch.stack(out)


def slow_bucket(distance, causal):
    """The bucket of T5: half of them exact, half logarithmic up to 128."""
    n, offset = (32, 0) if causal else (16, 16 * (distance > 0))
    d = max(0, -distance) if causal else abs(distance)
    if d < n // 2:
        return offset + d
    return offset + min(n - 1, n // 2 + int(math.log(d / (n // 2)) / math.log(128 / (n // 2)) * (n - n // 2) + 1e-9))


@pytest.mark.parametrize("position", ["sinusoid", "learned", "rotary", "relative"])
@torch.no_grad()
def test_an_encoder_equals_a_loop_over_heads_and_positions(position):
    model = tiny(objective="masked", position=position, ff="geglu", n_layer=1, n_kv_head=3, block_size=12)
    idx, block, pairs = torch.randint(51, (1, 12)), model.h[0], range(2)  # 50 is the mask id
    x = 24**0.5 * model.embedding.weight[idx[0]]
    if position == "sinusoid":
        x = x + scratch_former.positions(12, 24)
    if position == "learned":
        x = x + 24**0.5 * model.position_embedding.weight

    def bias(head, i, j):
        return model.relative_embedding[0].weight[slow_bucket(j - i, False), head] if position == "relative" else 0.0

    def turn(vector, i):
        if position != "rotary":
            return vector
        pairs_of = torch.complex(vector[0::2].contiguous(), vector[1::2].contiguous())
        angles = torch.tensor([i / 10000 ** (2 * p / 4) for p in pairs]).double()
        return torch.view_as_real(pairs_of * torch.polar(torch.ones(2).double(), angles)).flatten()

    y = block.ln_1(x + slow_attention(block.attn, x, x, bias, turn))
    hidden = F.gelu(y @ block.ff.w_1.weight.T + block.ff.w_1.bias) * (y @ block.ff.gate.weight.T + block.ff.gate.bias)
    y = block.ln_2(y + hidden @ block.ff.w_2.weight.T + block.ff.w_2.bias)
    assert torch.allclose(model(idx)[0], (y @ model.head.weight.T + model.head.bias)[:, :50], atol=1e-6)
    assert model(idx).size(-1) == 50  # the mask id cannot be chosen


def test_relative_positions_and_cross_attention_are_those_of_t5():
    """T5Attention of transformers, which does not divide by sqrt(d_k): the same is in our queries."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for causal in (False, True):
        distance = torch.arange(-300, 300)
        theirs = t5.T5Attention._relative_position_bucket(distance, bidirectional=not causal)
        assert scratch_former.buckets(distance, causal).equal(theirs)
        assert theirs.tolist() == [slow_bucket(d, causal) for d in distance.tolist()]
        model = tiny(objective="spans", position="relative", block_size=200)
        cfg = t5.T5Config(d_model=24, d_kv=4, num_heads=6, dropout_rate=0.0, is_decoder=causal)
        x, source = torch.randn(2, 2, 200, 24).double()
        self_attn, cross = model.h[0].attn, model.h[0].cross
        mask = torch.full((200, 200), -math.inf).triu(1) if causal else torch.zeros(200, 200)
        table = model.relative_embedding[int(causal)]
        bias = table(scratch_former.buckets(distance[300:500] - distance[300:500, None], causal)).permute(2, 0, 1)
        for attn, relative in ((self_attn, True), (cross, False)):
            other = t5.T5Attention(cfg, has_relative_attention_bias=relative).double()
            weights = dict(q=attn.w_q.weight / 2, k=attn.w_k.weight, v=attn.w_v.weight, o=attn.w_o.weight)  # sqrt(4)
            weights |= {"relative_attention_bias": table.weight} if relative else {}
            other.load_state_dict({f"{name}.weight": w for name, w in weights.items()})
            theirs = other(
                x, mask=mask.double() if relative else None, **({} if relative else dict(key_value_states=source))
            )
            ours = attn(x, mask + bias) if relative else attn(x, memory=attn.keys_and_values(source))
            assert same(ours, theirs[0])


@torch.no_grad()
def test_rotary_scores_depend_on_distances_alone_and_without_key_matrices_the_source_is_keys_and_values():
    table, q, k = scratch_former.positions(64, 8).double(), *torch.randn(2, 1, 1, 20, 8).double()
    turned = [scratch_former.rotate(q, t) @ scratch_former.rotate(k, t).mT for t in (table[:20], table[37:57])]
    assert torch.allclose(*turned, atol=1e-6) and not torch.allclose(turned[0], q @ k.mT, atol=0.1)
    attn = tiny(objective="spans", cross_kv=False).h[0].cross
    x, source = torch.randn(1, 5, 24).double(), torch.randn(1, 7, 24).double()
    slow = slow_attention(attn, x[0], source[0], lambda *_: 0.0, lambda vector, i: vector)
    assert same(attn(x, memory=attn.keys_and_values(source))[0], slow)
    assert [name for name, _ in attn.named_parameters()] == ["w_q.weight", "w_o.weight"]


def test_gated_networks_have_as_many_parameters():
    n = {ff: sum(p.numel() for p in tiny(ff=ff, n_ff=96).parameters()) for ff in ("relu", "gelu", "geglu", "swiglu")}
    assert n["relu"] == n["gelu"] and n["geglu"] == n["swiglu"] == pytest.approx(n["relu"], rel=0.01)
    x, networks = torch.randn(2, 24).double(), {ff: tiny(ff=ff).h[0].ff for ff in n}
    for ff, f in dict(relu=F.relu, gelu=F.gelu, geglu=F.gelu, swiglu=F.silu).items():
        net = networks[ff]
        y = f(net.w_1(x)) * (net.gate(x) if ff.endswith("glu") else 1)
        assert same(net(x), net.w_2(y)), ff


def test_10000_corruptions_hide_what_the_papers_hide():
    cfg = scratch_former.Config(vocab_size=1000)
    text, noise = torch.randint(1000, (10_000, 256)), torch.rand(2, 10_000, 256)
    source, spans = scratch_former.hide_spans(text, noise, cfg)
    n, m = 38, 13  # 15% of 256 tokens, in spans of 3
    assert source.shape == (10_000, 256 - n + m) and spans.shape == (10_000, n + m + 1)
    lengths, first, last = [], 0, 0
    for row, read, written in zip(text.tolist(), source.tolist(), spans.tolist()):
        where = [i for i, token in enumerate(written) if token >= 1000]
        assert [written[i] for i in where] == [*range(1000, 1000 + m + 1)]
        hidden = {written[i]: written[i + 1 : j] for i, j in itertools.pairwise(where)}
        assert [t for token in read for t in hidden.get(token, [token])] == row  # together they give back the text
        assert [token for token in read if token >= 1000] == [*hidden]
        assert not any(a >= 1000 and b >= 1000 for a, b in itertools.pairwise(read))  # spans are apart
        lengths += map(len, hidden.values())
        first, last = first + (read[0] == 1000), last + (read[-1] == 1000 + m - 1)
    assert min(lengths) == 1 and max(lengths) > 12 and sum(lengths) / len(lengths) == pytest.approx(n / m)
    assert 0.03 < first / 10_000 < 0.1 and 0.03 < last / 10_000 < 0.1  # a random gap is empty in 13 of 232 texts
    for training in (True, False):
        idx, targets = scratch_former.hide_tokens(text, noise, cfg, training)
        hidden = targets >= 0
        assert (hidden.sum(1) == n).all() and targets[hidden].equal(text[hidden]) and idx[~hidden].equal(text[~hidden])
        assert hidden.float().mean(0) == pytest.approx(n / 256, abs=0.02)  # every position as often
        assert ((idx == 1000).sum(1) == (30 if training else n)).all()
        changed = (idx != text) & (idx < 1000)
        assert changed.sum() == pytest.approx(40_000 * 0.999 if training else 0, rel=0.01)


@torch.no_grad()
def test_evaluation_hides_the_same_tokens_whatever_the_batch_and_no_hidden_token_is_visible():
    for objective in ("masked", "spans"):
        model, idx = tiny(objective=objective), torch.randint(50, (6, 32))
        losses = [model(row[None], row[None]) for row in idx]
        assert same(model(idx, idx), sum(losses) / 6) and losses[0] != losses[1]
        assert torch.equal(model(idx, idx), model(idx, idx))  # no random state
        model.train()
        assert model(idx, idx) != model(idx, idx)
    model = tiny(objective="masked")
    text, targets = scratch_former.hide_tokens(idx, model.noise(idx), model.cfg, False)
    assert (text[targets >= 0] == 50).all()
    expected = F.cross_entropy(model(text)[targets >= 0], targets[targets >= 0])
    assert same(model(idx, idx), expected)


def loss_on_random_tokens(objective):
    """Nats above ln V after 150 steps on i.i.d. uniform tokens, of which half are hidden."""
    torch.manual_seed(0)
    cfg = scratch_former.Config(vocab_size=4, block_size=16, n_layer=2, n_embd=32, n_head=4, n_ff=64, hide=0.5,
                                objective=objective, label_smoothing=0.0)  # fmt: skip
    model = scratch_former.Model(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(4, (32, 16))
        model(rows, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.randint(4, (512, 16))
    with torch.no_grad():
        return model.eval()(rows, rows).item() - math.log(4)


def test_no_loss_below_ln_v_unless_the_hidden_tokens_are_visible(monkeypatch):
    assert abs(loss_on_random_tokens("masked")) < 0.03
    visible = lambda text, noise, cfg, training: (text, hide(text, noise, cfg, training)[1])  # noqa: E731
    hide = scratch_former.hide_tokens
    monkeypatch.setattr(scratch_former, "hide_tokens", visible)
    assert loss_on_random_tokens("masked") < -0.5


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
