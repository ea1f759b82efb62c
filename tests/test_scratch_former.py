"""scratch_former.py: what is written out by hand there is what torch and the paper's formulas compute."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from test_conv_attention import influence
from test_models import small
from test_training import argv, fails, train, weights

import sample
import scratch_former

NAME = "scratch_former"
SHAKESPEARE = ROOT.parent / "shared" / "text" / "shakespeare.txt"
each_n_kv_head = pytest.mark.parametrize("n_kv_head", [0, 1, 3])


def tiny(**kwargs):
    """6 heads of 4 channels, in float64, in which any difference is an error and not a rounding, with biases and norms
    that matter."""
    model = small(NAME, **{"block_size": 32, "n_layer": 2, "n_embd": 24, "n_ff": 40, **kwargs}).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn_like(p)
    return model


def same(ours, theirs):
    return torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def assert_same_loss_and_gradients(model, ours, theirs):
    """To the precision of float32, in which ours is summed. (The gradient of a key's bias is but rounding: it moves all
    scores of a query alike.)"""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and theirs > 1
    names, parameters = zip(*model.named_parameters())
    for name, a, b in zip(names, *(torch.autograd.grad(loss, parameters) for loss in (ours, theirs))):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), name


def learn(model, rows, lr):
    """A step of Adam on each batch of rows; returns the last loss."""
    optimizer = scratch_former.configure_optimizer(model, model.cfg)
    optimizer.param_groups[0]["lr"] = lr
    model.train()
    for row in rows:
        loss = model(row[:, :-1], row[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


# --- the network


@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
def test_attention_is_what_torch_computes_from_the_same_projections(n_kv_head):
    model, x = tiny(n_kv_head=n_kv_head), torch.randn(2, 32, 24, dtype=torch.float64)
    attn = model.h[0].attn
    q, k, v = (w(x).view(2, 32, -1, 4).transpose(1, 2) for w in (attn.w_q, attn.w_k, attn.w_v))
    k, v = (torch.stack([t[:, i * n_kv_head // 6] for i in range(6)], dim=1) for t in (k, v))  # one for each query
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert same(attn(x, model.mask(32, 32, None)), attn.w_o(y.transpose(1, 2).reshape(2, 32, 24)))


@pytest.mark.parametrize("length, n_embd", [(256, 512), (1024, 24), (1, 2)])
def test_positions_are_the_sinusoids_of_the_paper(length, n_embd):
    table, expected = scratch_former.positions(length, n_embd), np.empty((length, n_embd))
    for pos in range(length):
        for i in range(n_embd // 2):
            expected[pos, 2 * i] = math.sin(pos / 10000 ** (2 * i / n_embd))
            expected[pos, 2 * i + 1] = math.cos(pos / 10000 ** (2 * i / n_embd))
    assert table.dtype == torch.float32 and table.shape == expected.shape
    assert np.abs(table.double().numpy() - expected).max() < 1.01 * 2**-25  # the rounding of numbers up to 1
    if length > 1:  # each column tells positions apart; without "/ n_embd" two of 512 would
        assert (table.amax(0) - table.amin(0) > 1e-4).all()


def as_torch_s(block, cfg):
    """torch's own layer with the weights of a block. load_state_dict raises if a name or shape does not fit."""
    layer = torch.nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, cfg.n_ff, dropout=0.0, activation="relu",
                                             batch_first=True, norm_first=False, dtype=torch.float64)  # fmt: skip
    attn, into = block.attn, (block.attn.w_q, block.attn.w_k, block.attn.w_v)
    names = {"self_attn.out_proj": attn.w_o, "linear1": block.ff.w_1, "linear2": block.ff.w_2}
    names |= {"norm1": block.ln_1, "norm2": block.ln_2}
    state = {f"{name}.{k}": v for name, part in names.items() for k, v in part.state_dict().items()}
    state |= {f"self_attn.in_proj_{k}": torch.cat([getattr(w, k) for w in into]) for k in ("weight", "bias")}
    layer.load_state_dict(state)
    return layer


def test_a_block_and_the_whole_network_are_torch_s_own_layers():
    model, idx, x = tiny(), torch.randint(50, (2, 32)), torch.randn(2, 32, 24, dtype=torch.float64)
    layers = [as_torch_s(block, model.cfg) for block in model.h]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(32, dtype=torch.float64)
    assert same(model.h[0](x, model.mask(32, 32, None)), layers[0](x, mask))
    x = 24**0.5 * model.embedding.weight[idx] + scratch_former.positions(32, 24)
    for layer in layers:
        x = layer(x, mask)
    assert same(model(idx), (x @ model.head.weight.T + model.head.bias)[:, :, :50])


def test_as_many_heads_of_keys_as_of_queries_is_plain_multi_head_attention():
    plain, six, idx = tiny(), tiny(n_kv_head=6), torch.randint(50, (2, 32))
    assert torch.equal(plain(idx), six(idx))
    six.load_state_dict(plain.state_dict())


def test_dropout_takes_from_the_embedding_and_from_each_sublayer_before_the_sum():
    model, idx = tiny(dropout=1.0), torch.randint(50, (2, 32))
    x, block = torch.randn(2, 32, 24, dtype=torch.float64), model.h[0]
    assert torch.equal(model(idx), tiny()(idx))
    model.train()
    assert same(block(x, model.mask(32, 32, None)), block.ln_2(block.ln_1(x)))
    assert same(model(idx), model(idx)[:1, :1].expand(2, 32, 50))


def test_parameters_of_the_default_size_are_as_many_as_by_hand():
    with torch.device("meta"):
        model = scratch_former.Model(scratch_former.Config())
    V, C, hidden = 50304, 512, 1024  # 50257 ids, rounded up to a multiple of 64
    block = 4 * (C * C + C) + (C * hidden + hidden) + (hidden * C + C) + 2 * 2 * C
    assert sum(p.numel() for p in model.parameters()) == V * C + 4 * block + (V * C + V)


def test_nothing_is_borrowed():
    text = (ROOT / "scratch_former.py").read_text(encoding="utf-8")
    for name in "scaled_dot_product_attention multi_head_attention_forward MultiheadAttention nn.Transformer".split():
        assert name not in text


def test_a_text_longer_than_block_size_is_refused():
    model, idx = tiny(), torch.zeros(1, 33, dtype=torch.long)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    for how in ({"idx": idx}, {"idx": idx[:, :3], "cache": cache}):
        with pytest.raises(ValueError, match="33 tokens do not fit block_size 32"):
            model(**how)


# --- causality, cache, padding


@each_n_kv_head
def test_each_row_sees_all_tokens_up_to_its_own_and_none_after(n_kv_head):
    moved = influence(tiny(n_kv_head=n_kv_head), torch.randint(50, (1, 32)))
    assert torch.equal(moved, torch.ones(32, 32).triu().bool())


@pytest.mark.parametrize("n_kv_head", [1, 3])  # 0: tests/test_models.py
def test_random_tokens_stay_random(n_kv_head):
    torch.manual_seed(0)
    config = {"vocab_size": 4, "block_size": 32, "n_layer": 2, "n_embd": 24, "n_head": 6, "n_kv_head": n_kv_head}
    model = scratch_former.Model(scratch_former.Config(**config))
    learn(model, torch.randint(4, (100, 8, 33)), 3e-3)
    rows = torch.randint(4, (128, 33))
    with torch.no_grad():
        assert abs(model.eval()(rows[:, :-1], rows[:, 1:]).item() - math.log(4)) < 0.02


@each_n_kv_head
@torch.no_grad()
def test_cached_equals_uncached_however_cut_and_reordered(n_kv_head):
    model, idx = tiny(n_kv_head=n_kv_head), torch.randint(50, (3, 32))
    for cuts in ([*range(1, 33)], [32], [31, 32], [1, 32], [5, 12, 13, 32]):
        for rows in ([0, 1, 2], [2, 0, 1], [1], [0, 2, 2, 0, 1]):
            cache, text, start = model.new_cache(3), idx, 0
            for end in cuts:
                logits = model(text[:, start:end], cache=cache)
                assert logits.shape == (len(text), 1, 50) and cache.length == end
                assert same(logits[:, 0], model(text)[:, end - 1]), (cuts, rows, end)
                if start == 0:
                    cache.select(rows)
                    text = text[rows]
                start = end


@each_n_kv_head
@torch.no_grad()
def test_left_padded_rows_get_the_logits_they_have_alone(n_kv_head):
    model, lengths = tiny(n_kv_head=n_kv_head), torch.tensor([20, 7, 1, 13])
    idx = torch.randint(50, (4, 20))  # anything stands in the padding
    texts = [row[20 - n :] for row, n in zip(idx, lengths.tolist())]
    for row, text in zip(model(idx, lengths=lengths), texts):
        assert same(row[20 - len(text) :], model(text[None])[0])
    cache = model.new_cache(4)
    logits = model(idx, cache=cache, lengths=lengths)
    for rows, more in (([2, 0, 1, 3], 1), ([0, 2, 2, 1, 3], 4), ([1], 1), ([0, 0], 6)):
        assert all(same(row[0], model(text[None])[0, -1]) for row, text in zip(logits, texts))
        cache.select(rows)
        new = torch.randint(50, (len(rows), more))
        texts = [torch.cat([texts[i], t]) for i, t in zip(rows, new)]
        logits = model(new, cache=cache)
    assert all(same(row[0], model(text[None])[0, -1]) for row, text in zip(logits, texts)) and cache.length == 32


@each_n_kv_head
def test_the_loss_of_padded_rows_is_their_mean_weighted_by_length(n_kv_head):
    model, lengths = tiny(n_kv_head=n_kv_head).train(), torch.tensor([20, 7, 1, 13])
    idx, targets = torch.randint(50, (2, 4, 20))
    targets[torch.arange(20) < 20 - lengths[:, None]] = -1
    loss = model(idx, targets, lengths=lengths)
    alone = sum(n * model(i[None, 20 - n :], t[None, 20 - n :]) for i, t, n in zip(idx, targets, lengths.tolist()))
    assert_same_loss_and_gradients(model, loss, alone / 41)


def test_a_cache_is_as_large_as_its_heads_of_keys_are_many():
    def size(n_kv_head):
        cache = tiny(n_kv_head=n_kv_head).float().new_cache(5)
        return sum(t.numel() * t.element_size() for t in vars(cache).values() if torch.is_tensor(t))

    one = 2 * 2 * 5 * 32 * 4 * 4  # keys and values, layers, rows, positions, channels, bytes
    assert [size(n) for n in (1, 2, 3, 6, 0)] == [one, 2 * one, 3 * one, 6 * one, 6 * one]


# --- the training


@pytest.mark.parametrize(
    "config, top", [({}, 4000), ({"n_embd": 128, "warmup_steps": 200, "max_steps": 950}, 200), ({"warmup_steps": 1}, 1)]
)
def test_the_learning_rate_is_the_equation_of_the_paper(config, top):
    cfg = scratch_former.Config(**config)
    rates = [scratch_former.learning_rate(step, cfg) for step in range(cfg.max_steps)]
    expected = [cfg.n_embd**-0.5 * min(s**-0.5, s * cfg.warmup_steps**-1.5) for s in range(1, cfg.max_steps + 1)]
    assert np.allclose(rates, expected, rtol=1e-12, atol=0)
    assert np.argmax(rates) + 1 == cfg.warmup_steps == top
    assert max(rates) == pytest.approx((cfg.n_embd * cfg.warmup_steps) ** -0.5, rel=1e-12)


@pytest.mark.parametrize("warmup_steps, max_steps, top", [(40, 1000, 40), (4000, 100, 50), (0, 10, 1), (4000, 1, 1)])
def test_a_peak_of_one_s_own_is_reached_however_short_the_run(warmup_steps, max_steps, top):
    cfg = scratch_former.Config(learning_rate=3e-3, warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [scratch_former.learning_rate(step, cfg) for step in range(max_steps)]
    assert max(rates) == 3e-3 and rates.index(3e-3) + 1 == top
    assert all(a < b for a, b in zip(rates[:top], rates[1:top])) and all(r > 0 for r in rates)
    assert all(a > b for a, b in zip(rates[top - 1 :], rates[top:]))


def test_the_optimizer_is_the_adam_of_the_paper():
    model, idx = tiny(), torch.randint(50, (4, 32))
    optimizer = scratch_former.configure_optimizer(model, model.cfg)
    optimizer.param_groups[0]["lr"] = 0.01
    ours = [(p.detach().clone(), 0, 0) for p in model.parameters()]  # weights and two moments of their gradients
    for t in (1, 2, 3):
        model(idx, idx).backward()
        for i, ((w, m, v), p) in enumerate(zip(ours, model.parameters())):
            m, v = 0.9 * m + 0.1 * p.grad, 0.98 * v + 0.02 * p.grad**2
            ours[i] = w - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-9), m, v
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.allclose(w, p, rtol=0, atol=1e-12) for (w, _, _), p in zip(ours, model.parameters()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("vocab_size", [50, 8200])  # 8200: chunks of 128 rows
def test_the_loss_is_smoothed_cross_entropy_over_the_ids_there_are(vocab_size, smoothing):
    model = tiny(vocab_size=vocab_size, label_smoothing=smoothing).train()
    with torch.no_grad():  # padding that would take most of the probability, if it were let
        model.head.weight[vocab_size:] *= 10
        model.head.bias[vocab_size:] += 10
    idx, targets = torch.randint(vocab_size, (2, 9, 32))
    targets[0, :5] = targets[-1, -1] = -1  # these do not count

    def expected(smoothing):
        logits = model(idx).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)

    assert_same_loss_and_gradients(model, model(idx, targets), expected(smoothing))
    model.eval()
    assert model(idx, targets).item() == pytest.approx(expected(0.0).item(), rel=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_loss_under_bfloat16_autocast_is_close_to_float32_s(padded):
    model, grads, losses = tiny(n_kv_head=2).float().train(), [], []
    idx, targets = torch.randint(50, (2, 8, 32))
    lengths = torch.arange(25, 33) if padded else None
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(idx, targets, lengths=lengths)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        losses.append(loss.item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)  # bfloat16 was at work
    assert F.cosine_similarity(*grads, dim=0) > 0.99


def test_overfits_one_batch_of_real_text(data):
    tokens = np.fromfile(data / "train.bin", dtype="<u2")
    if SHAKESPEARE.is_file():
        tokens = np.frombuffer(SHAKESPEARE.read_bytes(), dtype=np.uint8)
    torch.manual_seed(0)
    cfg = scratch_former.Config(vocab_size=300, block_size=64, n_layer=2, n_head=4, n_embd=64, n_ff=128, batch_size=4,
                                label_smoothing=0.0)  # fmt: skip
    idx, targets = scratch_former.batch(tokens, cfg, 1, 0, 0, 1)
    rows = torch.cat([idx, targets[:, -1:]], dim=1)
    assert learn(scratch_former.Model(cfg), [rows] * 100, 3e-3) < 0.1


# --- evaluation and the command line


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_sliding_windows_score_each_token_as_reading_its_window_again_does(stride):
    model, tokens = tiny(block_size=64, micro_batch=3).train(), np.random.default_rng(0).integers(50, size=150)
    text, ends, total = torch.tensor([49, *tokens]), [*range(64, 150, stride), 150], 0.0  # 49: end of text
    with torch.no_grad():
        for i in range(150):
            end = next(e for e in ends if e > i)  # the first window that has token i, text[i + 1], among its targets
            logp = model.eval()(text[None, end - 64 : end])[0].log_softmax(-1)
            total -= logp[i - (end - 64), text[i + 1]].item()
    amp = torch.autocast("cpu", enabled=False)
    nats = scratch_former.evaluate(model.train(), tokens, 49, model.cfg, 1, amp, stride=stride)
    assert nats == pytest.approx(total / 150, rel=1e-6)


MULTI_QUERY = ["--n-kv-head", 1, "--n-layer", 2, "--n-ff", 64, "--warmup-steps", 2, "--dropout", 0.1]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of 4 steps with one head of keys and values that was resumed for 4 more."""
    out = tmp_path_factory.mktemp("scratch") / "run"
    assert "4 steps in" in run("scratch_former.py", *argv(data, out, *MULTI_QUERY, "--max-steps", 4))
    scratch_former.main(["--resume", "--out", str(out), "--max-steps", "8"])
    return out


def test_a_run_that_goes_on_is_bit_for_bit_one_that_was_longer(finished, data, tmp_path):
    train(NAME, data, tmp_path / "run", *MULTI_QUERY, "--max-steps", 8)
    whole, parts = weights(tmp_path / "run"), weights(finished)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_the_perplexities_it_prints_agree(finished, data, capsys):
    scratch_former.main(["--out", str(finished), "--eval-only", "--stride", "4"])
    said = capsys.readouterr().out
    n = json.loads((data / "meta.json").read_text(encoding="utf-8"))["splits"]["val"]
    nats, bits = (float(re.search(rf"([\d.]+) {unit}", said)[1]) for unit in ("nats a token", "bits a byte"))
    token, word, byte = map(float, re.search(r"([\d.]+) a token, ([\d.]+) a word, ([\d.]+) a byte", said).groups())
    assert f"{n['tokens']:,} tokens, in windows of 64 that move on by 4" in said and nats > 1
    total = n["tokens"] * nats
    assert math.log(token) * n["tokens"] == pytest.approx(total, rel=1e-4)
    assert math.log(word) * n["words"] == pytest.approx(total, rel=1e-4)
    assert math.log(byte) * n["bytes"] == pytest.approx(total, rel=1e-4)
    assert bits * math.log(2) * n["bytes"] == pytest.approx(total, rel=1e-4)


def test_every_decoder_speaks_with_the_settings_of_the_source(finished):
    settings = "--beam-width 10 --top-k 128 --temperature 0.7 --top-p 0.95 --max-new-tokens 80 --device cpu".split()
    said = run("sample.py", "--ckpt", finished / "ckpt.pt", "--prompt", "the", "--decode", "all", *settings)
    spoken = re.findall(r"^--- (.+) ---\nthe([^(]*)\n\((\d+) tokens", said, re.M)
    assert tuple(decoder for decoder, _, _ in spoken) == sample.DECODERS
    assert all(text and 0 < int(n) <= 80 for _, text, n in spoken)


@pytest.mark.parametrize(
    "options, about",
    [
        (["--n-kv-head", 4], "n_head 6 is not a multiple of n_kv_head 4"),
        (["--n-kv-head", -1], "n_kv_head -1"),
        (["--n-head", 5], "n_head 5"),  # of 48 channels
        (["--n-embd", 49, "--n-head", 7], "n_embd 49"),
    ],
)
def test_an_option_that_makes_no_network_is_one_line(options, about, data, tmp_path):
    assert about in fails(NAME, data, tmp_path / "run", *options) and not (tmp_path / "run").exists()


def test_that_line_is_all_there_is_on_stderr(data, tmp_path):
    said = run("scratch_former.py", *argv(data, tmp_path / "run", "--n-kv-head", 4), expect=1)
    assert said.count("\n") == 1 and "n_kv_head 4" in said
