"""scratch_former.py computes what the papers and T5 compute, and hides what BERT and T5 hide."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_models import small

import scratch_former


def tiny(**config):
    """6 heads of 4 channels in float64, where a difference is an error and not rounding."""
    sizes = dict(block_size=32, n_layer=2, n_embd=24, n_ff=40)
    return small("scratch_former", **sizes | config).double()


def turns(length, channels):
    """exp(i angle), (length, channels / 2): the cosines and sines of 3.5 as complex numbers."""
    pairs = torch.arange(0, channels, 2).double() / channels
    return torch.exp(1j * torch.arange(length)[:, None] / 10_000**pairs)


def rotated(x):
    """x (T, nh, d_k): pairs of channels are complex numbers, and are turned."""
    pairs = torch.view_as_complex(x.unflatten(2, (-1, 2)))
    return torch.view_as_real(pairs * turns(len(x), x.size(2))[:, None]).flatten(2)


def plain_attention(attn, x, source, bias, rotary=False):
    """x (T, C) looks at source (S, C), whose heads the heads of x share."""
    parts = attn.c_q(x), attn.c_k(source), attn.c_v(source)
    q, k, v = (part.unflatten(1, (-1, attn.d_k)) for part in parts)
    if rotary:
        q, k = rotated(q), rotated(k)
    heads = []
    for h in range(q.size(1)):
        shared = h * k.size(1) // q.size(1)
        scores = q[:, h] @ k[:, shared].T / attn.d_k**0.5 + bias[h]
        heads.append(scores.softmax(1) @ v[:, shared])
    return attn.c_proj(torch.cat(heads, dim=1))


def plain_stack(model, blocks, text, memory=None):
    """The encoder or the decoder for a text (T)."""
    cfg, T = model.cfg, len(text)
    x = model.wte.weight[text]
    if cfg.position == "learned":
        x = x + model.wpe.weight[:T]
    x = cfg.n_embd**0.5 * x
    if cfg.position == "sinusoid":
        sines = turns(T, cfg.n_embd)
        x = x + torch.stack([sines.imag, sines.real], 2).flatten(1)
    distance = torch.arange(T) - torch.arange(T)[:, None]
    decoder = blocks is model.h and cfg.objective != "masked"
    bias = torch.zeros(cfg.n_head, T, T)
    if cfg.position == "relative":
        bias = blocks[0].relative_bias.T[:, scratch_former.buckets(distance, decoder)]
    if decoder:
        bias = bias.masked_fill(distance > 0, -math.inf)
    activation = {"relu": F.relu, "swiglu": F.silu}.get(cfg.ff, F.gelu)
    for block in blocks:
        x = block.ln_1(x + plain_attention(block.attn, x, x, bias, cfg.position == "rotary"))
        if memory is not None:
            x = block.ln_cross(x + plain_attention(block.cross, x, memory, [0] * cfg.n_head))
        hidden = activation(block.mlp.c_fc(x))
        if cfg.ff.endswith("glu"):
            hidden = hidden * block.mlp.c_gate(x)
        x = block.ln_2(x + block.mlp.c_proj(hidden))
    return x


FORMS = [
    dict(position="learned", ff="gelu", n_kv_head=1),
    dict(objective="masked", ff="geglu"),
    dict(objective="spans", position="rotary", cross_kv=False, n_head=8, head_dim=6, n_kv_head=2),
    dict(objective="spans", position="relative", ff="swiglu", n_kv_head=3),
]
THOUSAND = scratch_former.Config(vocab_size=1000)
TEXTS = torch.randint(1000, (10_000, 160))  # in each, 24 tokens are hidden, in 8 spans


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_formulas_with_and_without_a_cache(form):
    """So a decoder sees the whole source and no later token. A cache reads the source first."""
    model, text = tiny(**form), torch.randint(50, (3, 32))
    found, S, V = model(text), 0, 50
    assert model.cfg.cross_kv or len([*model.h[0].cross.parameters()]) == 2  # no keys and values
    if form.get("objective") == "spans":
        source, spans = scratch_former.hide_spans(text, model.noise(text), model.cfg)
        text = torch.cat([source, spans[:, :-1]], dim=1)
        S, V = source.size(1), 53  # there are three sentinels
    x = []
    for row in text:
        memory = plain_stack(model, model.encoder, row[:S]) if S else None
        x.append(plain_stack(model, model.h, row[S:], memory))
    logits = (torch.stack(x) @ model.lm_head.weight.T + model.lm_head.bias)[..., :V]
    assert torch.allclose(found, logits, atol=1e-6)  # the model has sines in float32
    for rows in ([2, 0, 1], [1], [0, 2, 2, 0, 1]) if model.causal else ():
        cache, kept = model.new_cache(3), [0, 1, 2]
        for start, end in itertools.pairwise((0, S + 1, S + 3, S + 4, text.size(1))):
            if start == S + 3:
                cache.select(rows)
                kept = rows
            cached, plain = model(text[kept, start:end], cache=cache), logits[kept, end - S - 1]
            assert torch.allclose(cached[:, 0], plain, atol=1e-6) and cache.length == end
        with pytest.raises(scratch_former.UserError, match="tokens do not fit block_size 32"):
            model(text[kept, :30], cache=cache)


@torch.no_grad()
def test_a_layer_with_relative_positions_and_cross_attention_is_t5_s(monkeypatch):
    """But for its norms. T5 does not divide scores by sqrt(d_k), which is 2."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    model = tiny(objective="spans", position="relative", n_layer=1, block_size=200)
    block = model.h[0]
    cfg = t5.T5Config(d_model=24, d_kv=4, d_ff=40, num_heads=6, dropout_rate=0.0, is_decoder=True)
    peer = t5.T5Block(cfg, has_relative_attention_bias=True).double()
    one, two, three = peer.layer
    for theirs, ours in ((one.SelfAttention, block.attn), (two.EncDecAttention, block.cross)):
        theirs.q.weight.copy_(ours.c_q.weight / 2)
        theirs.k, theirs.v, theirs.o = ours.c_k, ours.c_v, ours.c_proj
    one.SelfAttention.relative_attention_bias.weight.copy_(block.relative_bias)
    three.DenseReluDense.wi, three.DenseReluDense.wo = block.mlp.c_fc, block.mlp.c_proj
    one.layer_norm = two.layer_norm = three.layer_norm = torch.nn.Identity()
    block.ln_1 = block.ln_cross = block.ln_2 = torch.nn.Identity()

    idx, source = torch.randint(50, (2, 200)), torch.randn(2, 200, 24).double()
    x, mask = 24**0.5 * model.wte(idx), torch.full((200, 200), -math.inf).double().triu(1)
    expected = peer(x, attention_mask=mask, encoder_hidden_states=source)[0]
    memory = [block.cross.keys_and_values(source)]
    assert torch.allclose(model.run(model.h, idx, True, memory=memory), expected)
    block.train().drop.p = 1.0  # of each sublayer
    assert model.run(model.h, idx, True, memory=memory).equal(x)

    bucket = t5.T5Attention._relative_position_bucket
    left, distance = -torch.arange(200), torch.arange(-200, 200)  # left: what a decoder may see
    expected = bucket(left, bidirectional=False), bucket(distance, bidirectional=True)
    log = torch.Tensor.log
    for error in (0, -1e-6, 1e-6):  # the rounding of a device's log
        monkeypatch.setattr(torch.Tensor, "log", lambda x, error=error: log(x) * (1 + error))
        assert scratch_former.buckets(left, True).equal(expected[0])
        assert scratch_former.buckets(distance, False).equal(expected[1])


def test_parameters_and_initial_weights_of_the_default_size():
    """A gate adds no parameters. Relative positions begin with what is near."""
    V, C, n_ff = 4032, 512, 683  # 4,000 ids, padded to a multiple of 64; 1024 * 2/3
    model = scratch_former.Model(scratch_former.Config(4000, position="learned", ff="swiglu"))
    block = 4 * C * C + 2 * (C * n_ff + n_ff) + (n_ff * C + C) + 2 * 2 * C
    assert sum(p.numel() for p in model.state_dict().values()) == (2 * V + 256) * C + 4 * block + V
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = C**-0.5 if name in ("wte.weight", "wpe.weight") else (2 / sum(p.shape)) ** 0.5
            assert p.std().item() == pytest.approx(std, rel=0.01), name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name

    near = -torch.arange(32)[:, None] * torch.tensor([1, 0.5])
    for objective in ("masked", "spans"):
        cfg = scratch_former.Config(64, n_head=2, position="relative", objective=objective)
        model = scratch_former.Model(cfg)
        encoder = model.encoder if objective == "spans" else model.h
        assert encoder[0].relative_bias.equal(near[:16].repeat(2, 1))
    assert model.h[0].relative_bias.equal(near)


def test_impossible_names_and_sizes_are_refused():
    for config, message in (
        (dict(position="no"), "--position: choose one of sinusoid, learned, rotary, relative"),
        (dict(n_head=5), "n_embd 24 is not a multiple of n_head 5"),
        (dict(n_kv_head=4), "n_head 6 is not a multiple of 4 key"),
        (dict(n_embd=21, n_head=3), "21 channels"),
        (dict(position="rotary", head_dim=5), "5 channels"),
        (dict(objective="spans", cross_kv=False, head_dim=48), "n_embd 24 .* of head_dim 48"),
        (dict(hide=0.0), "--hide 0.0 must be"),
        (dict(hide=1.0), "--hide 1.0 must be"),
        (dict(span_length=0.5), "--span-length 0.5 must be"),
        (dict(objective="spans", hide=0.9), "--hide 0.9 leaves too few tokens"),
    ):
        with pytest.raises(scratch_former.UserError, match=message):
            tiny(**config)


def test_10000_span_corruptions_can_be_undone_and_have_random_lengths_and_places():
    source, target = scratch_former.hide_spans(TEXTS, torch.rand(2, 10_000, 160), THOUSAND)
    lengths = []
    for row, read, written in zip(TEXTS.tolist(), source.tolist(), target.tolist()):
        where = [i for i, token in enumerate(written) if token >= 1000]
        assert [written[i] for i in where] == [*range(1000, 1009)]
        spans = {written[i]: written[i + 1 : j] for i, j in itertools.pairwise(where)}
        assert row == [x for token in read for x in spans.get(token, [token])]
        assert not any(i >= 1000 and j >= 1000 for i, j in itertools.pairwise(read))  # gaps
        lengths += map(len, spans.values())
    assert min(lengths) == 1 and max(lengths) > 12 and sum(lengths) / len(lengths) == 3
    for at_the_edge in (source[:, 0] == 1000, source[:, -1] == 1007):  # 8 of 137 places
        assert at_the_edge.float().mean() == pytest.approx(8 / 137, abs=0.01)


def test_10000_masked_texts():
    """What is hidden may be at any position. Random tokens are any of the 1,000."""
    noise = torch.rand(2, 10_000, 160)
    for training, n_masked, n_random in (True, 19, 3), (False, 24, 0):
        idx, targets = scratch_former.hide_tokens(TEXTS, noise, THOUSAND, training)
        hidden = targets >= 0
        assert (hidden.sum(1) == 24).all() and ((idx == 1000).sum(1) == n_masked).all()
        assert targets[hidden].equal(TEXTS[hidden]) and idx[~hidden].equal(TEXTS[~hidden])
        assert (hidden.float().mean(0) - 24 / 160).abs().max() < 0.02
        drawn = idx[hidden & (idx < 1000) & (idx != TEXTS)].bincount(minlength=1000).float()
        assert drawn.sum() == pytest.approx(n_random * 9_990, rel=0.002)
        assert drawn.std() <= 1.3 * (n_random * 10) ** 0.5  # Poisson


@pytest.mark.parametrize("sizes", [{}, dict(hide=0.5, span_length=1.0), dict(hide=0.75)])
@pytest.mark.parametrize("objective", ["masked", "spans"])
@torch.no_grad()
def test_evaluation_hides_the_same_tokens_of_a_text_in_every_batch(objective, sizes):
    """In training, and in another text, they are other ones. A row of -1 does not count."""
    model, idx = tiny(objective=objective, **sizes), torch.randint(50, (6, 32))
    losses = torch.stack([model(row[None], row[None]) for row in idx])
    counts = torch.tensor([1, -1, 1, 1, -1, 1])
    assert torch.allclose(model(idx, counts[:, None].expand(6, 32)), losses[counts > 0].mean())

    text, answers = scratch_former.hide_tokens(idx, model.noise(idx), model.cfg, False)
    assert len((answers >= 0).unique(dim=0)) > 4
    if objective == "spans":
        text, answers = idx, scratch_former.hide_spans(idx, model.noise(idx), model.cfg)[1][:, 1:]
    expected = F.cross_entropy(model(text).mT, answers, ignore_index=-1)
    assert torch.allclose(losses.mean(), expected) and losses.std() > 0.01
    assert not model.train().noise(idx).equal(model.noise(idx))

    read = []  # by the network in training: not all hidden tokens become the mask id, 50
    model.wte.register_forward_pre_hook(lambda wte, args: read.append(args[0]))
    for length in (32, 31, 8, 3, 2, 1):  # a text may have any
        assert model(idx[:, :length], idx[:, :length]).isfinite()
    assert objective == "spans" or 0 < (read[0] == 50).sum() < (text == 50).sum()


def test_the_loss_and_its_gradients_are_those_of_smoothed_cross_entropy():
    """Without smoothing in evaluation, and in float32 in autocast."""
    model = tiny(label_smoothing=0.5)
    model.lm_head.bias.data[50:] += 10  # padded ids: the most probable ones if they counted
    idx, targets = torch.randint(50, (2, 9, 32))
    targets[0, :5] = targets[-1, -1] = -1  # these do not count
    for training, smoothing in (True, 0.5), (False, 0.0):
        plain = F.cross_entropy(model(idx).mT, targets, ignore_index=-1, label_smoothing=smoothing)
        losses = model.train(training)(idx, targets), plain
        found = [[loss, *torch.autograd.grad(loss, [*model.parameters()])] for loss in losses]
        assert all(torch.allclose(a, b) for a, b in zip(*found))

    x = torch.randn(9, 32, 24)
    plain = model.float().smoothing(x, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.smoothing(x, targets).equal(plain)


def test_two_threads_compute_the_same_gradients_again_and_again():
    """So that a resumed run is the run that never stopped. Few different tokens: sums are long."""
    model = tiny(vocab_size=4096, block_size=256, n_embd=120, label_smoothing=0.5).float().train()
    idx = torch.randint(50, (8, 256))
    torch.set_num_threads(2)
    gradients = [torch.autograd.grad(model(idx, idx), [*model.parameters()]) for _ in range(20)]
    torch.set_num_threads(1)
    assert all(g.equal(first) for grads in gradients for g, first in zip(grads, gradients[0]))


def test_adam_and_the_learning_rates_are_the_paper_s_and_a_short_run_has_the_same_peak():
    runs = [(0.0, 4000, 10_000, 4000), (0.0, 4000, 100, 50), (3e-3, 4000, 1, 1), (3e-3, 0, 9, 1)]
    for given, warmup, max_steps, top in runs:
        cfg = scratch_former.Config(learning_rate=given, warmup_steps=warmup, max_steps=max_steps)
        rates = [scratch_former.learning_rate(step, cfg) for step in range(max_steps)]
        peak = given or (512 * 4000) ** -0.5  # n_embd, warmup_steps
        expected = [peak * min((s / top) ** -0.5, s / top) for s in range(1, max_steps + 1)]
        assert rates == pytest.approx(expected)
    optimizer = scratch_former.configure_optimizer(tiny(), cfg)
    paper_s = dict(betas=(0.9, 0.98), eps=1e-9, weight_decay=0)
    assert type(optimizer) is torch.optim.Adam and paper_s.items() <= optimizer.defaults.items()
