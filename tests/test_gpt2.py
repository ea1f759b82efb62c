"""gpt2.py is the published network, as Hugging Face has it, and attention and loss are what the plain formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

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


def as_hugging_face(model):
    """Hugging Face's GPT-2 with the weights of ours. load_state_dict raises if a name or shape does not fit."""
    cfg, weights = model.cfg, {}
    config = GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
                        n_head=cfg.n_head, bos_token_id=None, eos_token_id=None)  # fmt: skip
    for name, w in model.named_parameters():  # they keep OpenAI's (in, out) layout; nn.Linear's is (out, in)
        w = w.T if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else w
        weights[f"transformer.{name}"] = w[: cfg.vocab_size] if name == "wte.weight" else w  # theirs is not padded
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs = GPT2LMHeadModel(config).to(model.wte.weight.dtype)
    theirs.load_state_dict(weights)
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, dict(vocab_size=127, block_size=16, n_head=3, n_embd=24, n_layer=3)])
def test_logits_equal_hugging_face(config):
    model = random_model(**config).double()
    idx = torch.randint(model.cfg.vocab_size, (3, model.cfg.block_size))
    ours, theirs = model(idx), as_hugging_face(model)(idx).logits
    assert ours.shape == (3, model.cfg.block_size, model.cfg.vocab_size) and theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("preset, published", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                               ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(preset, published):
    with torch.device("meta"):
        model = gpt2.Model(gpt2.Config(**gpt2.PRESETS[preset]))
    padding = (50304 - 50257) * model.cfg.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == published


def test_initial_weights():
    torch.manual_seed(0)
    model = gpt2.Model(gpt2.Config(vocab_size=1024, block_size=128, n_layer=3, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
        exact = p == (0.0 if name.endswith("bias") else 1.0)
        assert exact.all() if p.dim() < 2 else abs(p.std().item() / std - 1) < 0.05, name  # 9 standard errors or more
        assert p.dim() < 2 or abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("S, T", [(1, 1), (16, 16), (16, 15), (16, 5), (16, 1)])
def test_attention_is_the_plain_formula(S, T, dtype, tolerance):
    """For the last T of S positions: by the fused function, and in bfloat16 on a CPU by the formula in the code."""
    model = random_model().double()
    attn, x = model.h[0].attn, torch.randn(2, S, 32, dtype=torch.float64)
    q, k, v = (part.view(2, S, 4, 8).transpose(1, 2) for part in attn.c_attn(x).chunk(3, dim=-1))
    weights = q[:, :, S - T :] @ k.transpose(-2, -1) / math.sqrt(8)  # (B, nh, T, S)
    weights = weights.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -math.inf)
    expected = attn.c_proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(2, T, 32))
    x, cache = x.to(dtype), model.to(dtype).new_cache(2)
    if T < S:
        attn(x[:, : S - T], cache)
        cache.length = S - T
    for y in [attn(x[:, S - T :], cache)] + [attn(x)] * (T == S):
        assert (y - expected).norm() <= tolerance * expected.norm()


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, without = random_model(dropout=0.5), random_model(dropout=0.0)
    idx, x = torch.randint(50, (2, 32)), torch.randn(2, 32, 32)
    parts = [lambda: model(idx), lambda: model.h[0].attn(x), lambda: model.h[0](x)]
    assert torch.equal(model(idx), without(idx)) and all(torch.equal(part(), part()) for part in parts)
    model.train()
    assert not any(torch.allclose(part(), part()) for part in parts)


def test_weight_decay_falls_on_matrices_and_embeddings_alone():
    model = random_model()
    decayed, rest = gpt2.configure_optimizer(model, gpt2.Config(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in rest["params"])
    assert not any(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in decayed["params"])


def test_learning_rate_warms_up_then_falls_as_a_cosine_to_zero():
    cfg = gpt2.Config(max_steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [gpt2.learning_rate(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert [rates[10], rates[60], rates[110]] == pytest.approx([1, 0.5, 0], abs=1e-12)


# --- the loss


def loss_and_gradients(loss, x, weight, dtype):
    x, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight))
    value = loss(x, weight)
    value.backward()
    return value.detach(), x.grad, weight.grad


@pytest.mark.parametrize("vocab_size, rows", [(64, 80), (50, 300), (1000, 600)])  # with padding, with several chunks
def test_loss_and_gradients_are_those_of_cross_entropy(vocab_size, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows // 2, 16), torch.randn(math.ceil(vocab_size / 64) * 64, 16)
    weight[vocab_size:] *= 10  # padding that would take most of the probability, if it were let
    targets = torch.randint(vocab_size, (2, rows // 2))
    targets[torch.rand(targets.shape) < 0.2] = -1

    def plain(x, weight):
        return F.cross_entropy((x @ weight[:vocab_size].T).flatten(0, 1), targets.flatten(), ignore_index=-1)

    def ours(x, weight):
        return gpt2.linear_cross_entropy(x, weight, targets, vocab_size)

    expected = loss_and_gradients(plain, x, weight, torch.float64)
    assert expected[0] > 1 and (expected[2][vocab_size:] == 0).all()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for a, b in zip(loss_and_gradients(ours, x, weight, dtype), expected):
            assert (a - b).norm() <= tolerance * b.norm()
    with torch.no_grad():
        assert ours(x, weight).item() == pytest.approx(expected[0].item(), rel=1e-6)


@pytest.mark.parametrize("nats", [6, 2, 0.5])
def test_loss_in_bfloat16_is_as_exact_as_cross_entropy_under_autocast(nats):
    """No further from float64's gradients than twice F.cross_entropy, at mean losses of so many nats."""
    torch.manual_seed(0)
    noise, weight, targets = torch.randn(1024, 64), 0.2 * torch.randn(1024, 64), torch.randint(1000, (1024,))
    low, high = 0.0, 60.0
    while high - low > 1e-3:  # how far each x must lie towards its target for such a loss
        middle = (low + high) / 2
        x = 0.5 * noise + middle * weight[targets]
        low, high = (middle, high) if F.cross_entropy(x @ weight[:1000].T, targets) > nats else (low, middle)

    def plain(x, weight):
        return F.cross_entropy(F.linear(x, weight)[:, :1000], targets)

    def autocast(loss):
        with torch.autocast("cpu", torch.bfloat16):
            torch.set_float32_matmul_precision("medium")  # as training does
            result = loss_and_gradients(loss, x, weight, torch.float32)
            torch.set_float32_matmul_precision("highest")
        return result

    exact = loss_and_gradients(plain, x, weight, torch.float64)
    ours = autocast(lambda x, weight: gpt2.linear_cross_entropy(x[None], weight, targets[None], 1000))
    theirs = autocast(plain)
    assert exact[0].item() == pytest.approx(nats, abs=0.01) and ours[1].dtype == torch.float32
    for a, b, c in zip(ours, theirs, exact):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-4 * c.norm()


def test_loss_of_the_model_is_cross_entropy_of_its_logits():
    model = random_model().double()
    idx, targets = torch.randint(50, (2, 3, 32))
    targets[0, :5] = targets[2, -1] = -1  # these do not count
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-12)
