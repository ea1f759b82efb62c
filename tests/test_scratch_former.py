"""scratch_former.py computes what torch's own transformer, T5's layer, and the papers' formulas in
slow loops compute; it hides what BERT and T5 hide; and no token is seen that must not be."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused, train
from test_models import loss_on_random_tokens

import scratch_former

POSITIONS = ("sinusoid", "learned", "rotary", "relative")
each_position = pytest.mark.parametrize("position", POSITIONS)


def tiny(**config):
    """6 heads of 4 channels in float64, where a difference is an error and not rounding. With noise
    in all weights, so that biases and norms matter."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, block_size=32, n_layer=2, n_head=6, n_embd=24, n_ff=40)
    model = scratch_former.Model(scratch_former.Config(**sizes | config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-9)


def embed(model, idx):
    """Scaled embeddings plus sinusoids (3.4, 3.5)."""
    return 24**0.5 * model.wte.weight[idx] + scratch_former.positions(32, 24)[: idx.size(1)]


def head(model, x):
    return (x @ model.lm_head.weight.T + model.lm_head.bias)[..., : model.n_logits]


# --- the layers


def as_torch(block, cfg):
    """torch's own layer with the weights of a block. load_state_dict raises if a name or a shape
    does not fit."""
    cross = hasattr(block, "cross")
    kind = torch.nn.TransformerDecoderLayer if cross else torch.nn.TransformerEncoderLayer
    layer = kind(cfg.n_embd, cfg.n_head, cfg.n_ff, dropout=0.0, batch_first=True).double()
    state = {key: torch.zeros_like(p) for key, p in layer.state_dict().items()}  # biases are 0
    parts = {"linear1": block.mlp.c_fc, "linear2": block.mlp.c_proj, "norm1": block.ln_1}
    attentions = {"self_attn": block.attn}
    if cross:
        parts |= {"norm2": block.ln_cross, "norm3": block.ln_2}
        attentions["multihead_attn"] = block.cross
    else:
        parts["norm2"] = block.ln_2
    for name, part in parts.items():
        state |= {f"{name}.{key}": p for key, p in part.state_dict().items()}
    for name, attn in attentions.items():
        weights = []
        for layer_of_heads in (attn.c_q, attn.c_k, attn.c_v):
            # torch has a key and a value head for each query head.
            heads = layer_of_heads.weight.view(-1, attn.d_k, cfg.n_embd)
            heads = heads.repeat_interleave(cfg.n_head // len(heads), dim=0)
            weights.append(heads.flatten(0, 1))
        state[f"{name}.in_proj_weight"] = torch.cat(weights)
        state[f"{name}.out_proj.weight"] = attn.c_proj.weight
    layer.load_state_dict(state)
    return layer


def causal_mask(length):
    return torch.full((length, length), -math.inf).double().triu(1)


@pytest.mark.parametrize("n_kv_head", [0, 6, 3, 1])
def test_the_decoder_equals_torch_s_own_layers(n_kv_head):
    model = tiny(n_kv_head=n_kv_head)
    idx = torch.randint(50, (2, 32))
    x = embed(model, idx)
    for block in model.h:
        expected = as_torch(block, model.cfg)(x, causal_mask(32))
        x = block(x, causal_mask(32))
        assert same(x, expected)
    assert same(model(idx), head(model, x))


def test_encoder_and_decoder_equal_torch_s_own_transformer():
    model = tiny(objective="spans", n_kv_head=3)
    peer = torch.nn.Transformer(24, 6, 2, 2, 40, dropout=0.0, batch_first=True).double().eval()
    peer.encoder.norm = peer.decoder.norm = None  # torch has one more norm after each stack
    for blocks, stack in ((model.encoder, peer.encoder), (model.h, peer.decoder)):
        for block, layer in zip(blocks, stack.layers):
            layer.load_state_dict(as_torch(block, model.cfg).state_dict())
    idx = torch.randint(50, (2, 32))
    source, spans = scratch_former.hide_spans(idx, model.noise(idx), model.cfg)
    read, answers = spans[:, :-1], spans[:, 1:]
    x = peer(embed(model, source), embed(model, read), tgt_mask=causal_mask(read.size(1)))
    logits = head(model, x)
    assert same(model(idx), logits)
    assert same(model(idx, idx), F.cross_entropy(logits.mT, answers))
    fills_up = torch.tensor([[1], [-1]]).expand(2, 32)  # a row that evaluation adds to a batch
    assert same(model(idx, fills_up), F.cross_entropy(logits[0], answers[0]))


def slow_attention(attn, x, source, bias=None, turn=None):
    """Attention by loops over positions and heads: x (T, C) looks at source (S, C). bias(h, i, j)
    is added to scores; turn(vector, i) changes queries and keys."""
    d = attn.d_k
    out = []
    for i, h in itertools.product(range(len(x)), range(attn.c_proj.in_features // d)):
        own = slice(h * d, (h + 1) * d)
        shared = slice(h // attn.group * d, (h // attn.group + 1) * d)
        q = attn.c_q(x[i])[own]
        keys = [attn.c_k(y)[shared] for y in source]
        if turn:
            q = turn(q, i)
            keys = [turn(k, j) for j, k in enumerate(keys)]
        scores = torch.stack([q @ k / d**0.5 for k in keys])
        if bias:
            scores += torch.stack([bias(h, i, j) for j in range(len(keys))])
        weights = scores.softmax(0)
        out.append(sum(w * attn.c_v(y)[shared] for w, y in zip(weights, source)))
    return attn.c_proj(torch.stack(out).view(len(x), -1))


def as_complex_numbers(vector, i):
    """Two pairs of channels, turned by i times 1 and 1/100 radian (head_dim 4)."""
    angles = torch.tensor([i, i / 10_000 ** (2 / 4)]).double()
    turned = torch.view_as_complex(vector.view(2, 2)) * torch.exp(1j * angles)
    return torch.view_as_real(turned).flatten()


@each_position
@torch.no_grad()
def test_an_encoder_equals_a_loop_over_heads_and_positions(position):
    sizes = dict(n_layer=1, n_kv_head=3, block_size=12, ff="geglu")
    model = tiny(objective="masked", position=position, **sizes)
    block = model.h[0]
    idx = torch.randint(51, (1, 12))  # 50 is the mask id
    x = model.wte.weight[idx[0]]
    if position == "learned":
        x = x + model.wpe.weight
    x = 24**0.5 * x
    if position == "sinusoid":
        x = x + scratch_former.positions(12, 24)

    def bias(h, i, j):
        """T5's buckets up to 11 tokens: 8 .. 11 are 8, the 11th is 8 or 9: see below."""
        d = abs(j - i)
        bucket = d if d < 8 else 8 + (d >= 12)
        return block.relative_bias[bucket + 16 * (j > i), h]

    forms = {"rotary": dict(turn=as_complex_numbers), "relative": dict(bias=bias)}
    y = block.ln_1(x + slow_attention(block.attn, x, x, **forms.get(position, {})))
    mlp = block.mlp
    y = block.ln_2(y + mlp.c_proj(F.gelu(mlp.c_fc(y)) * mlp.c_gate(y)))
    expected = model.lm_head(y)[:, :50]  # the mask id cannot be chosen
    assert torch.allclose(model(idx)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_layer_with_relative_positions_and_cross_attention_equals_t5_s():
    """A T5Block of transformers, without norms and biases. T5 does not divide scores by sqrt(d_k),
    which is 2."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    model = tiny(objective="spans", position="relative")
    block = model.h[0]
    x, source = torch.randn(2, 2, 200, 24).double()
    cfg = t5.T5Config(d_model=24, d_kv=4, d_ff=40, num_heads=6, dropout_rate=0.0, is_decoder=True)
    peer = t5.T5Block(cfg, has_relative_attention_bias=True).double()
    state = {"0.SelfAttention.relative_attention_bias": block.relative_bias}
    for name, attn in {"0.SelfAttention": block.attn, "1.EncDecAttention": block.cross}.items():
        state[f"{name}.q"] = attn.c_q.weight / 2
        state[f"{name}.k"] = attn.c_k.weight
        state[f"{name}.v"] = attn.c_v.weight
        state[f"{name}.o"] = attn.c_proj.weight
    for name, layer in {"wi": block.mlp.c_fc, "wo": block.mlp.c_proj}.items():
        state[f"2.DenseReluDense.{name}"] = layer.weight
        layer.bias.zero_()
    state = {f"{name}.weight": w for name, w in state.items()}
    left = peer.layer.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("layer_norm" in name for name in left.missing_keys)
    block.ln_1 = block.ln_cross = block.ln_2 = torch.nn.Identity()
    for layer in peer.layer:
        layer.layer_norm = torch.nn.Identity()

    distance = torch.arange(200) - torch.arange(200)[:, None]
    bias = block.relative_bias[scratch_former.buckets(distance, True)].permute(2, 0, 1)
    y = block(x, causal_mask(200) + bias, memory=block.cross.keys_and_values(source))
    mask = causal_mask(200)
    assert same(y, peer(x, attention_mask=mask, encoder_hidden_states=source)[0])

    bucket = t5.T5Attention._relative_position_bucket
    left = distance.clamp(max=0)  # what a decoder may see
    assert scratch_former.buckets(left, True).equal(bucket(left, bidirectional=False))
    assert scratch_former.buckets(distance, False).equal(bucket(distance, bidirectional=True))


@pytest.mark.parametrize("error", [-1e-6, 1e-6])
def test_buckets_do_not_depend_on_the_rounding_of_the_device_s_log(error, monkeypatch):
    distance = torch.arange(-300, 301)
    exact = [scratch_former.buckets(distance, causal) for causal in (True, False)]
    log = torch.Tensor.log
    monkeypatch.setattr(torch.Tensor, "log", lambda x: log(x) * (1 + error))
    for causal, bucket in zip((True, False), exact):
        assert scratch_former.buckets(distance, causal).equal(bucket)
    docstring = [scratch_former.buckets(torch.tensor(-d), True).item() for d in range(129)]
    assert docstring[:16] == [*range(16)] and docstring[16] == 16
    assert docstring[127:] == [31, 31] and docstring == sorted(docstring)


def test_relative_positions_begin_with_what_is_near():
    config = dict(vocab_size=50, n_head=2, n_embd=24, position="relative")
    for objective in ("next", "masked", "spans"):
        model = scratch_former.Model(scratch_former.Config(objective=objective, **config))
        stacks = [(model.h, model.causal)]
        if objective == "spans":
            stacks.append((model.encoder, False))
        for blocks, causal in stacks:
            number = torch.arange(32) if causal else torch.arange(16).repeat(2)
            near = -number[:, None] * torch.tensor([1, 0.5])
            assert blocks[0].relative_bias.equal(near)


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone():
    table = scratch_former.positions(64, 8).double()
    q, k = torch.randn(2, 1, 1, 20, 8).double()
    scores = []
    for positions in (table[:20], table[37:57]):
        scores.append(scratch_former.rotate(q, positions) @ scratch_former.rotate(k, positions).mT)
    assert torch.allclose(*scores, atol=1e-5) and not torch.allclose(scores[0], q @ k.mT, atol=0.1)


@torch.no_grad()
def test_without_matrices_a_source_is_its_own_keys_and_values():
    attn = tiny(objective="spans", cross_kv=False).h[0].cross
    x, source = torch.randn(2, 1, 7, 24).double()
    y = attn(x, memory=attn.keys_and_values(source))
    assert same(y[0], slow_attention(attn, x[0], source[0]))
    assert [name for name, _ in attn.named_parameters()] == ["c_q.weight", "c_proj.weight"]


@pytest.mark.parametrize(
    "ff, activation",
    [("relu", F.relu), ("gelu", F.gelu), ("geglu", F.gelu), ("swiglu", F.silu)],
)
def test_a_gate_multiplies_the_hidden_units_and_adds_no_parameters(ff, activation):
    mlp = tiny(ff=ff, n_ff=96).h[0].mlp
    x = torch.randn(2, 24).double()
    hidden = activation(mlp.c_fc(x))
    if ff.endswith("glu"):
        hidden = hidden * mlp.c_gate(x)
    assert same(mlp(x), mlp.c_proj(hidden))
    n_params = sum(p.numel() for p in mlp.parameters())
    assert n_params == pytest.approx(2 * 24 * 96 + 24 + 96, rel=0.01)


def test_positions_are_the_sinusoids_of_the_paper():
    table = scratch_former.positions(256, 512)
    for pos, row in enumerate(table):
        angles = [pos / 10_000 ** (2 * i / 512) for i in range(256)]
        expected = torch.tensor([[math.sin(angle), math.cos(angle)] for angle in angles])
        assert (row - expected.flatten()).abs().max() < 1e-6
    assert (table.amax(0) - table.amin(0) > 1e-4).all()  # in the source, only two columns vary


def test_parameters_and_initial_weights_of_the_default_size():
    V, C, n_ff = 4032, 512, 1024  # 4,000 ids, padded to a multiple of 64
    model = scratch_former.Model(scratch_former.Config(vocab_size=4000))
    block = 4 * C * C + (C * n_ff + n_ff) + (n_ff * C + C) + 2 * 2 * C
    n_params = sum(p.numel() for p in model.state_dict().values())
    assert n_params == V * C + 4 * block + (V * C + V)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = (2 / sum(p.shape)) ** 0.5  # Glorot and Bengio 2010
            if name == "wte.weight":
                std = C**-0.5
            assert p.std().item() == pytest.approx(std, rel=0.01), name
            assert abs(p.mean().item()) < 0.01 * std, name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
    learned = scratch_former.Model(scratch_former.Config(vocab_size=64, position="learned"))
    assert learned.wpe.weight.std().item() == pytest.approx(C**-0.5, rel=0.02)


def test_nothing_is_borrowed():
    text = (ROOT / "scratch_former.py").read_text(encoding="utf-8")
    for name in (
        "scaled_dot_product",
        "multi_head_attention",
        "MultiheadAttention",
        "Transformer(",
    ):
        assert name not in text


# --- dropout


def test_dropout_is_after_the_embedding_and_after_each_sublayer_in_training_alone():
    """With a probability of 1 at one place at a time, what comes from there is missing."""
    model = tiny(objective="spans", dropout=1.0)
    x, source = torch.randn(2, 2, 32, 24).double()
    idx = torch.randint(50, (2, 32))
    assert torch.equal(model(idx), tiny(objective="spans")(idx))  # evaluation

    block = model.h[0].train()
    memory = block.cross.keys_and_values(source)
    nothing = block.ln_2(block.ln_cross(block.ln_1(x)))
    assert same(block(x, causal_mask(32), memory=memory), nothing)

    model = tiny(dropout=1.0).train()
    for block in model.h:
        block.drop.p = 0.0
    assert same(model(idx), model((idx + 1) % 50))  # nothing is left of the embedding


# --- encoder and decoder


@each_position
@pytest.mark.parametrize("more", [{}, dict(cross_kv=False, n_head=8, head_dim=6, n_kv_head=2)])
@torch.no_grad()
def test_a_decoder_sees_the_whole_source_and_no_later_token(position, more, monkeypatch):
    model = tiny(objective="spans", position=position, **more)
    idx = torch.randint(50, (3, 32))
    source, spans = scratch_former.hide_spans(idx, model.noise(idx), model.cfg)
    monkeypatch.setattr(scratch_former, "hide_spans", lambda *_: (source, spans))
    before = model(idx)
    for texts in (source, spans[:, :-1]):
        for t in range(texts.size(1)):
            old = texts[:, t].clone()
            texts[:, t] = (old + 7) % 50
            moved = (model(idx) - before).abs().amax((0, 2))  # of each position of the decoder
            texts[:, t] = old
            first = 0 if texts is source else t
            assert (moved[:first] == 0).all() and (moved[first:] > 1e-6).all()
    with torch.enable_grad():  # all weights are in use
        model(idx, idx).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@each_position
@pytest.mark.parametrize("more", [{}, dict(cross_kv=False, n_head=8, head_dim=6, n_kv_head=2)])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 2, 2, 0, 1]])
@torch.no_grad()
def test_a_cache_gives_the_same_logits_and_reads_a_source_once(position, more, rows):
    model = tiny(objective="spans", position=position, **more)
    idx = torch.randint(50, (3, 32))
    source, spans = scratch_former.hide_spans(idx, model.noise(idx), model.cfg)
    plain = model(idx)
    text = torch.cat([source, spans[:, :-1]], dim=1)
    S = source.size(1)
    calls = []
    model.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    cache = model.new_cache(3)
    kept = [0, 1, 2]
    for start, end in itertools.pairwise((0, S + 1, S + 3, S + 4, text.size(1))):
        if start == S + 3:
            cache.select(rows)
            kept = rows
        logits = model(text[kept, start:end], cache=cache)
        assert same(logits[:, 0], plain[kept, end - S - 1])
        assert cache.length == end and cache.source == S
    assert len(calls) == 1


# --- what is hidden


def test_the_examples_in_the_docstrings():
    a, b, c, d, e, f, g, h = range(8)
    text = torch.tensor([[a, b, c, d, e, f, g, h]])
    cfg = scratch_former.Config(vocab_size=50, hide=0.5)
    noise = torch.rand(2, 1, 8)
    noise[0, 0] = torch.tensor([6, 1, 4, 0, 7, 3, 5, 2]) / 8  # the ranks
    noise[1, 0, 5] = 0.47  # of 50 ids: 23
    idx, targets = scratch_former.hide_tokens(text, noise, cfg, True)
    M = 50
    assert idx.tolist() == [[a, M, c, M, e, 23, g, M]]
    assert targets.tolist() == [[-1, b, -1, d, -1, f, -1, h]]

    cfg = scratch_former.Config(vocab_size=50, hide=0.4, span_length=1.5)
    noise = torch.zeros(2, 1, 8)
    noise[0, 0, 0] = 1.0  # the 3 hidden tokens are cut after the first of them
    noise[1, 0, [1, 3]] = 1.0  # spans come after 1 and after 3 of the 5 other tokens
    source, target = scratch_former.hide_spans(text, noise, cfg)
    assert source.tolist() == [[a, 50, c, d, 51, g, h]]
    assert target.tolist() == [[50, b, 51, e, f, 52]]


N, M = 24, 8  # 15% of 160 tokens are hidden, in spans of 3


def test_10000_span_corruptions():
    """Texts can be put together again, and lengths and places are random."""
    cfg = scratch_former.Config(vocab_size=1000)
    text = torch.randint(1000, (10_000, 160))
    source, target = scratch_former.hide_spans(text, torch.rand(2, 10_000, 160), cfg)
    assert source.shape == (10_000, 160 - N + M) and target.shape == (10_000, N + M + 1)
    lengths = []
    for row, read, written in zip(text.tolist(), source.tolist(), target.tolist()):
        where = [i for i, token in enumerate(written) if token >= 1000]
        assert [written[i] for i in where] == [*range(1000, 1000 + M + 1)]
        assert where[0] == 0 and where[-1] == N + M
        spans = {written[i]: written[i + 1 : j] for i, j in itertools.pairwise(where)}
        whole = []
        for token in read:
            whole += spans.get(token, [token])
        assert whole == row
        assert [token for token in read if token >= 1000] == [*spans]
        assert not any(i >= 1000 and j >= 1000 for i, j in itertools.pairwise(read))  # gaps
        lengths += map(len, spans.values())
    assert min(lengths) == 1 and max(lengths) > 12 and sum(lengths) / len(lengths) == 3
    # 8 of 137 places between the 136 other tokens, so the first and the last with 8/137 each.
    for at_the_edge in (source[:, 0] == 1000, source[:, -1] == 1000 + M - 1):
        assert at_the_edge.float().mean() == pytest.approx(8 / 137, abs=0.01)


def test_pick_equals_a_boolean_index():
    values = torch.rand(100, 9)
    wanted = torch.rand(100, 9).argsort(1) < 4
    assert scratch_former.pick(values, wanted, 4).equal(values[wanted].view(100, 4))


@pytest.mark.parametrize("training", [True, False])
def test_10000_masked_texts(training):
    cfg = scratch_former.Config(vocab_size=1000)
    text = torch.randint(1000, (10_000, 160))
    noise = torch.rand(2, 10_000, 160)
    idx, targets = scratch_former.hide_tokens(text, noise, cfg, training)
    hidden = targets >= 0
    assert (hidden.sum(1) == N).all()
    assert targets[hidden].equal(text[hidden]) and idx[~hidden].equal(text[~hidden])
    assert (hidden.float().mean(0) - N / 160).abs().max() < 0.02  # each position as often
    n_masked = 19 if training else N  # 80%, or all
    assert ((idx == 1000).sum(1) == n_masked).all()
    if training:  # 22 - 19 of 24 are random tokens: any of them, equally often, at any position
        drawn = idx[hidden & (idx < 1000) & (idx != text)]
        assert len(drawn) == pytest.approx(30_000 * 0.999, rel=0.002)
        assert drawn.bincount(minlength=1000).float().std() < 1.3 * 30**0.5  # Poisson
        assert (drawn.bincount(minlength=1000) > 0).all()


@pytest.mark.parametrize("objective", ["masked", "spans"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 31, 32])
@pytest.mark.parametrize("hide, span_length", [(0.01, 3.0), (0.5, 1.0), (0.6, 2.0), (0.75, 3.0)])
def test_texts_of_any_length_can_be_hidden_in(objective, length, hide, span_length):
    model = tiny(objective=objective, hide=hide, span_length=span_length, n_layer=1)
    idx = torch.randint(50, (2, length))
    for training in (True, False):
        assert model.train(training)(idx, idx).isfinite()


@pytest.mark.parametrize("objective", ["masked", "spans"])
@torch.no_grad()
def test_evaluation_hides_the_same_tokens_of_a_text_in_every_batch(objective):
    """In training, and in another text, they are other ones."""
    model = tiny(objective=objective)
    idx = torch.randint(50, (6, 32))
    losses = torch.stack([model(row[None], row[None]) for row in idx])
    assert same(model(idx, idx), losses.mean()) and losses.std() > 0.01
    assert same(model(idx.flip(0), idx), losses.mean())
    noise = model.noise(idx)
    assert 0.2 < noise.std() < 0.4 and noise.mean() == pytest.approx(0.5, abs=0.1)
    hidden = scratch_former.hide_tokens(idx, noise, model.cfg, False)[1] >= 0
    assert len(hidden.unique(dim=0)) == 6
    if objective == "masked":  # what is under the mask id cannot be seen
        text, targets = scratch_former.hide_tokens(idx, noise, model.cfg, False)
        logits = model(text)
        expected = F.cross_entropy(logits.mT, targets, ignore_index=-1)
        assert (text[targets >= 0] == 50).all() and same(model(idx, idx), expected)
        fills_up = torch.tensor([1, -1, 1, 1, -1, 1])[:, None].expand(6, 32)
        assert same(model(idx, fills_up), losses[fills_up[:, 0] > 0].mean())
    model.train()
    torch.manual_seed(0)
    noises = [model.noise(idx), model.noise(idx)]
    assert not noises[0].equal(noises[1])
    torch.manual_seed(0)
    assert model.noise(idx).equal(noises[0])  # of the step's random state


def test_no_loss_below_ln_v_unless_hidden_tokens_are_visible(monkeypatch):
    class Masked(scratch_former.Config):
        def __init__(self, **config):
            masked = dict(objective="masked", hide=0.5, n_ff=64, n_layer=1)
            super().__init__(**config | masked)

    monkeypatch.setattr(scratch_former, "Config", Masked)
    assert -0.01 < loss_on_random_tokens("scratch_former") < 0.02
    monkeypatch.setattr(scratch_former, "hide_tokens", lambda text, *_: (text, text))
    assert loss_on_random_tokens("scratch_former") < -0.5


@pytest.mark.parametrize("objective", ["masked", "spans"])
def test_the_compiler_reads_a_training_step_as_one_graph_up_to_the_loss(objective):
    model = tiny(objective=objective, n_layer=1).train()
    idx = torch.randint(50, (2, 32))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    losses = []
    for forward in (model, compiled):
        torch.manual_seed(0)
        losses.append(forward(idx, idx))
    assert same(*losses) and len(graphs) == 2  # before the loss, and after it: label smoothing
    assert "torch.rand" in graphs[0].code  # the noise is in it


# --- errors in one line


WRONG = [
    (dict(ff="glu"), "--ff: choose one of relu, gelu, geglu, swiglu"),
    (dict(position="no"), "--position: choose one of sinusoid, learned, rotary, relative"),
    (dict(objective="all"), "--objective: choose one of next, masked, spans"),
    (dict(n_head=5), "n_embd 24 is not a multiple of n_head 5"),
    (dict(n_kv_head=4), "n_head 6 is not a multiple of 4 key"),
    (dict(n_embd=21, n_head=3), "21 channels"),
    (dict(position="rotary", head_dim=5), "5 channels"),
    (dict(objective="spans", cross_kv=False, head_dim=8, n_head=4), "n_head 4 .* of 3 key"),
    (dict(objective="spans", cross_kv=False, head_dim=48), "n_embd 24 .* of head_dim 48"),
    (dict(hide=0.0), "--hide 0.0 must be"),
    (dict(hide=1.5), "--hide 1.5 must be"),
    (dict(span_length=0.5), "--span-length 0.5 must be"),
    (dict(objective="spans", hide=0.9), "--hide 0.9 leaves too few tokens"),
]


@pytest.mark.parametrize("config, message", WRONG)
def test_impossible_names_and_sizes_are_refused(config, message):
    with pytest.raises(scratch_former.UserError, match=message):
        tiny(**config)


def test_a_text_that_is_longer_than_block_size_is_refused():
    model = tiny()
    idx = torch.zeros(1, 33, dtype=torch.long)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    for args in (dict(idx=idx), dict(idx=idx[:, :3], cache=cache)):
        with pytest.raises(scratch_former.UserError, match="33 tokens do not fit block_size 32"):
            model(**args)


def test_a_wrong_option_is_one_line_and_leaves_no_folder(data, tmp_path):
    for wrong in (["--hide", 1.5], ["--objective", "spans", "--hide", 0.9]):
        options = ["--data", data, "--out", tmp_path / "run", "--n-layer", 1, *wrong]
        assert "--hide" in refused(scratch_former.main, *options)
        assert not (tmp_path / "run").exists()


# --- the training


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_and_its_gradients_are_those_of_smoothed_cross_entropy(smoothing):
    model = tiny(label_smoothing=smoothing).train()
    with torch.no_grad():  # padded ids that would take most of the probability if they counted
        model.lm_head.weight[50:] *= 10
        model.lm_head.bias[50:] += 10
    idx, targets = torch.randint(50, (2, 9, 32))
    targets[0, :5] = targets[-1, -1] = -1  # these do not count

    def expected(smoothing):
        logits = model(idx).flatten(0, 1)
        options = dict(ignore_index=-1, label_smoothing=smoothing)
        return F.cross_entropy(logits, targets.flatten(), **options)

    ours, torch_s = model(idx, targets), expected(smoothing)
    assert ours.shape == () and same(ours, torch_s) and torch_s > 1
    parameters = [*model.parameters()]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, torch_s)]
    assert all(same(a, b) for a, b in zip(*gradients))
    assert same(model.eval()(idx, targets), expected(0.0))


def test_smoothing_is_float32_under_autocast():
    model = tiny().float()
    x = torch.randn(2, 32, 24)
    targets = torch.randint(50, (2, 32))
    plain = model.smoothing(x, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.smoothing(x, targets), plain)
        half = model.smoothing(x.bfloat16(), targets).item()
        assert half == pytest.approx(plain.item(), rel=0.01)
        assert model.train()(targets, targets).dtype == torch.float32


def test_the_optimizer_and_learning_rates_are_those_of_the_paper():
    cfg = scratch_former.Config(n_embd=128, warmup_steps=200, max_steps=10_000)
    expected = [128**-0.5 * min(s**-0.5, s * 200**-1.5) for s in range(1, 10_001)]
    rates = [scratch_former.learning_rate(step, cfg) for step in range(10_000)]
    assert rates == pytest.approx(expected)
    optimizer = scratch_former.configure_optimizer(tiny(), cfg)
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-9


@pytest.mark.parametrize("given, peak", [(3e-3, 3e-3), (0.0, (512 * 4000) ** -0.5)])
@pytest.mark.parametrize("max_steps, top", [(10_000, 4000), (100, 50), (1, 1)])
def test_the_peak_is_the_same_however_short_the_run_is(given, peak, max_steps, top):
    cfg = scratch_former.Config(learning_rate=given, warmup_steps=4000, max_steps=max_steps)
    rates = [scratch_former.learning_rate(step, cfg) for step in range(max_steps)]
    assert max(rates) == pytest.approx(peak) and rates.index(max(rates)) + 1 == top


def test_a_run_without_warm_up_begins_at_the_peak():
    cfg = scratch_former.Config(learning_rate=3e-3, warmup_steps=0)
    assert scratch_former.learning_rate(0, cfg) == 3e-3


@pytest.mark.parametrize("objective", ["masked", "spans"])
def test_other_objectives_train_and_have_no_bits_per_byte(objective, data, tmp_path, capsys):
    rows = train("scratch_former", data, tmp_path, "--preset", objective, "--max-steps", 4)
    assert {row["val_bits_per_byte"] for row in rows} == {""}
    assert 4 < float(rows[-1]["val_loss"]) < math.log(300)
    printed = capsys.readouterr().out
    assert "all of val: " in printed and "bits" not in printed and "perplexity" not in printed
