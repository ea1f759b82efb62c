"""GPT-2 is the published network, by Hugging Face's word, and attention and loss are what the plain formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_training import argv, train
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import gpt2


def random_model(seed=0, std=0.2, **config):
    """A small network in eval mode whose weights, biases and norms are large enough that each of them matters."""
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, **config}
    model = gpt2.Model(gpt2.Config(**config))
    with torch.no_grad():
        for p in model.parameters():
            p += std * torch.randn(p.shape)
    return model.eval()


def transposed(name):
    """Hugging Face keeps OpenAI's (in, out) layout for these; nn.Linear's is (out, in)."""
    return name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))


def as_hugging_face(model):
    """Hugging Face's GPT-2 with the weights of ours. load_state_dict raises if a name or shape does not fit."""
    cfg = model.cfg
    config = GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
                        n_head=cfg.n_head, bos_token_id=None, eos_token_id=None)  # fmt: skip
    weights = {f"transformer.{name}": w.T if transposed(name) else w for name, w in model.state_dict().items()}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: cfg.vocab_size]  # theirs is not padded
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs = GPT2LMHeadModel(config).to(model.wte.weight.dtype)
    theirs.load_state_dict(weights)
    return theirs.eval()


# --- the network


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vocab_size": 64, "n_layer": 1, "n_head": 1},
        {"vocab_size": 127, "block_size": 16, "n_head": 3, "n_embd": 24, "n_layer": 3},
        {"vocab_size": 300, "block_size": 100, "n_head": 6, "n_embd": 48, "n_layer": 6},
    ],
)
def test_logits_equal_hugging_face(config):
    model = random_model(**config)
    cfg = model.cfg
    idx = torch.randint(cfg.vocab_size, (3, cfg.block_size))
    with torch.no_grad():
        ours, theirs = model(idx), as_hugging_face(model)(idx).logits
    assert ours.shape == (3, cfg.block_size, cfg.vocab_size)  # no padding to be seen
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-4


def test_weight_names_map_one_to_one_onto_openai_s():
    model = random_model(vocab_size=64)  # a multiple of 64, so that wte has no padding
    ours = {name: w.T.shape if transposed(name) else w.shape for name, w in model.state_dict().items()}
    theirs = {name.removeprefix("transformer."): w.shape for name, w in as_hugging_face(model).state_dict().items()}
    del theirs["lm_head.weight"]  # the same tensor as wte.weight
    assert ours == {name: shape for name, shape in theirs.items() if not name.endswith((".attn.bias", ".masked_bias"))}


@pytest.mark.parametrize(
    "preset, published",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    with torch.device("meta"):
        model = gpt2.Model(gpt2.Config(**gpt2.PRESETS[preset]))
    padding = (50304 - 50257) * model.cfg.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == published


def test_initial_weights():
    torch.manual_seed(0)
    n_layer = 3
    model = gpt2.Model(gpt2.Config(vocab_size=1024, block_size=128, n_layer=n_layer, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name  # 16,384 weights or more: 9 standard errors
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


def plain_attention(attn, x, T):
    """Of the last T positions of x (B, S, C): the comment in Attention.forward."""
    B, S, _ = x.shape
    q, k, v = (part.view(B, S, attn.n_head, -1).transpose(1, 2) for part in attn.c_attn(x).chunk(3, dim=-1))
    weights = q[:, :, S - T :] @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, S)
    weights = weights.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -math.inf)
    y = weights.softmax(-1) @ v  # (B, nh, T, hs)
    return attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))


@pytest.mark.parametrize("head_dim", [0, 5, 20])
@pytest.mark.parametrize("S, T", [(1, 1), (16, 16), (16, 15), (16, 5), (16, 2), (16, 1)])
def test_attention_is_the_plain_formula(S, T, head_dim):
    model = random_model(head_dim=head_dim).double()
    attn, x = model.h[0].attn, torch.randn(2, S, 32, dtype=torch.float64)
    assert attn.c_attn.out_features == 3 * 4 * (head_dim or 8)
    cache = model.new_cache(2)
    if T < S:
        attn(x[:, : S - T], cache)
        cache.length = S - T
    with torch.no_grad():
        y = attn(x[:, S - T :], cache)
        assert torch.allclose(y, plain_attention(attn, x, T), atol=1e-12)
        if T == S:
            assert torch.allclose(attn(x), y, atol=1e-12)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = random_model(dropout=0.5)
    idx, x = torch.randint(50, (2, 32)), torch.randn(2, 32, 32)
    parts = [
        lambda: model(idx),
        lambda: model.h[0].attn(x),  # of the attention weights
        lambda: model.h[0](x),
    ]
    without = random_model(dropout=0.0)
    assert torch.equal(model(idx), without(idx))
    for part in parts:
        assert torch.equal(part(), part())
    model.train()
    for part in parts:
        assert not torch.allclose(part(), part())
    without.train()
    assert torch.equal(without(idx), without(idx))


def test_flops_of_a_step_are_those_of_its_products():
    """6 N + 12 L T C a token (Chowdhery et al. 2022, appendix B), N the weights that multiply. Not every kernel of
    attention tells what it computes."""
    model = random_model(vocab_size=64)
    weights, attention = 12 * 2 * 32**2 + 64 * 32, 2 * 32 * 32
    assert 6 * weights <= gpt2.flops_per_token(model, model.cfg) <= 6 * weights + 12 * attention


def test_a_text_longer_than_block_size_is_refused():
    model = random_model()
    model(torch.zeros(1, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="33 tokens do not fit block_size 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    cache = model.new_cache(1)
    model(torch.zeros(1, 30, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="33 tokens"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    assert cache.length == 30


@pytest.mark.parametrize("mlp, hidden_act", [("swiglu", "silu"), ("geglu", "gelu_pytorch_tanh")])
def test_a_gated_feed_forward_layer_is_hugging_face_s(mlp, hidden_act):
    ours, x = random_model(mlp=mlp, n_embd=36).h[0].mlp, torch.randn(2, 5, 36)
    sizes = dict(hidden_size=36, intermediate_size=96, num_attention_heads=2)
    theirs = LlamaMLP(LlamaConfig(**sizes, hidden_act=hidden_act, mlp_bias=True))
    (gate, up), (gate_bias, up_bias) = ours.c_fc.weight.chunk(2), ours.c_fc.bias.chunk(2)
    weights = {"gate_proj.weight": gate, "gate_proj.bias": gate_bias, "up_proj.weight": up, "up_proj.bias": up_bias}
    theirs.load_state_dict({**weights, "down_proj.weight": ours.c_proj.weight, "down_proj.bias": ours.c_proj.bias})
    assert torch.allclose(ours(x), theirs(x), atol=1e-5) and ours(x).std() > 0.1


def test_a_gated_feed_forward_layer_has_as_many_parameters():
    plain, gated = (sum(p.numel() for p in random_model(mlp=mlp, n_embd=96).parameters()) for mlp in ("gelu", "geglu"))
    assert abs(gated / plain - 1) < 0.005


@pytest.mark.parametrize("options", [{"head_dim": 20, "mlp": "swiglu"}, {"head_dim": 3, "mlp": "geglu"}])
def test_other_shapes_keep_their_cache_and_do_not_look_ahead(options):
    model, idx = random_model(**options).double(), torch.randint(50, (2, 32))
    logits, cache = model(idx), model.new_cache(2)
    pieces = [model(part, cache=cache) for part in idx.split([7, 1, 20, 4], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), logits[:, [6, 7, 27, 31]], atol=1e-10)
    changed = idx.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 50
    assert torch.equal(model(changed)[:, :20], logits[:, :20]) and not torch.allclose(model(changed), logits)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_embd": 50}, "n_embd 50 is not a multiple of n_head 4, and head_dim not given"),
        ({"head_dim": -8}, "head_dim -8 is not in 0 to 2,147,483,647"),
        ({"mlp": "relu"}, "mlp 'relu' is none of gelu, geglu, swiglu"),
    ],
)
def test_a_config_that_makes_no_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_model(**options)


def test_trains_other_shapes_and_speaks(data, tmp_path):
    shape = ["--n-layer", 1, "--head-dim", 24, "--mlp", "swiglu"]
    train("gpt2", data, tmp_path / "o", "--max-steps", 4, *shape)
    resumed = [*argv(data, tmp_path / "o", "--max-steps", 6, *shape), "--resume"]
    gpt2.main(resumed)
    how = ["--decode", "all", "--prompt", "the", "--max-new-tokens", 9, "--device", "cpu"]
    assert run("sample.py", "--ckpt", tmp_path / "o" / "ckpt.pt", *how).count("tokens/s)") == 5
    with pytest.raises(SystemExit, match="has mlp 'swiglu', not geglu: a checkpoint fixes the network"):
        gpt2.main([*argv(data, tmp_path / "o"), "--resume", "--mlp", "geglu"])


# --- the loss


def assert_close(ours, theirs, tolerance=1e-5):
    """Within `tolerance` of the largest number. The loss is summed in float32 whatever the network's type."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_loss_and_gradients_are_those_of_cross_entropy_on_the_logits():
    model = random_model().double()
    idx, targets = torch.randint(50, (2, 3, 32))
    targets[0, :5] = targets[2, -1] = -1  # these do not count
    loss = model(idx, targets)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    assert loss.shape == () and expected > 1
    assert_close(loss, expected)
    for name, p in model.named_parameters():
        assert_close(ours[name], p.grad)
    assert (ours["wte.weight"][50:] == 0).all()  # rows that are no token


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "vocab_size, rows",
    [
        (64, 80),
        (50, 80),
        (8192, 300),  # chunks of 128 rows
        (8200, 300),
        (50, 17_000),  # of 16,384
    ],
)
def test_chunked_cross_entropy_with_label_smoothing(vocab_size, rows, smoothing):
    torch.manual_seed(0)
    padded = math.ceil(vocab_size / 64) * 64
    x = torch.randn(2, rows // 2, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(padded, 16, dtype=torch.float64)
    weight[vocab_size:] *= 10  # padding that would take most of the probability, if it were let
    weight.requires_grad_()
    targets = torch.randint(vocab_size, (2, rows // 2))
    targets[torch.rand(targets.shape) < 0.2] = -1

    loss = gpt2.linear_cross_entropy(x, weight, targets, vocab_size, smoothing)
    dx, dw = torch.autograd.grad(3 * loss, (x, weight))
    logits = (x @ weight[:vocab_size].T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)
    assert_close(loss, expected)
    assert (dw[vocab_size:] == 0).all() and (dx[targets < 0] == 0).all()
    for ours, theirs in zip((dx, dw), torch.autograd.grad(3 * expected, (x, weight)), strict=True):
        assert_close(ours, theirs)


def test_loss_where_no_target_counts_is_zero_and_not_nan():
    model = random_model()
    idx = torch.zeros(1, 4, dtype=torch.long)
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_loss_under_bfloat16_autocast_is_close_to_float32_s():
    model = random_model(std=0.1)
    idx, targets = torch.randint(50, (2, 8, 32))
    losses, grads = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] != losses[1]  # bfloat16 was at work
    assert abs(losses[1] / losses[0] - 1) < 0.005
    assert F.cosine_similarity(*grads, dim=0) > 0.999


def test_chunked_cross_entropy_under_bfloat16_autocast():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 150, 16), torch.randn(8256, 16), torch.randint(8200, (2, 150))
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt2.linear_cross_entropy(x, weight, targets, 8200, 0.1)  # chunks of 128 rows
    logits = (x @ weight[:8200].T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.1)
    assert abs(loss / expected - 1) < 0.005
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight)) for y in (loss, expected)), strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
