"""gpt2.py is the published network, and attention and loss are what the plain formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_models import small
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2


def as_hugging_face(model):
    """Hugging Face's GPT-2 with the weights of ours."""
    cfg = model.cfg
    sizes = {name: getattr(cfg, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    ids = dict(n_positions=cfg.block_size, bos_token_id=None, eos_token_id=None)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **ids)).double()
    weights = {}
    for name, w in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            w = w.T  # OpenAI's layout is (in, out); that of nn.Linear is (out, in)
        if name == "wte.weight":
            w = w[: cfg.vocab_size]  # Hugging Face's is not padded
        weights[f"transformer.{name}"] = w
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(weights)  # raises if a name or a shape does not fit
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [dict(n_head=4, n_embd=32), dict(vocab_size=127, n_head=3)])
def test_logits_equal_hugging_face(sizes):
    model = small("gpt2", block_size=32, n_layer=2, **sizes).double()
    idx = torch.randint(model.cfg.vocab_size, (3, model.cfg.block_size))
    ours, theirs = model(idx), as_hugging_face(model)(idx).logits
    assert ours.shape == (*idx.shape, model.cfg.vocab_size) and theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-10


def test_presets_have_the_published_number_of_parameters():
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
    published |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for preset, count in published.items():
        with torch.device("meta"):
            model = gpt2.Model(gpt2.Config(**gpt2.PRESETS[preset]))
        count += (50304 - 50257) * model.cfg.n_embd  # our vocabulary is padded
        assert sum(p.numel() for p in model.parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("S, T", [(1, 1), (16, 16), (16, 15), (16, 5), (16, 1)])
def test_attention_is_the_plain_formula(S, T, training, dtype, tolerance):
    model = small("gpt2", n_layer=1, n_head=4, n_embd=32).double().train(training)
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


def test_learning_rate_warms_up_then_falls_as_a_cosine_to_zero():
    cfg = gpt2.Config(max_steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [gpt2.learning_rate(step, cfg) for step in (0, 1, 9, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.1, 0.2, 1, 1, 0.853553, 0.5, 0], abs=1e-6)
    short = gpt2.Config(max_steps=4, warmup_steps=100, learning_rate=1.0)  # half of it warms up
    assert [gpt2.learning_rate(step, short) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])


def case(vocab_size, rows, ignored, width=16):
    """x (2, rows / 2, width), weight, targets, vocab_size and bias."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows // 2, width), torch.randn(-(-vocab_size // 64) * 64, width)
    weight[vocab_size:] *= 10  # the padding would take most of the probability, if it were let
    targets = torch.randint(vocab_size, (2, rows // 2))
    targets[torch.rand(targets.shape) < ignored] = -1
    return x, weight, targets, vocab_size, torch.randn(len(weight))


def plain(x, weight, targets, vocab_size, bias):
    """What the docstring of linear_cross_entropy says."""
    logits = F.linear(x, weight, bias)[..., :vocab_size].flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def loss_and_gradients(loss, dtype, x, weight, targets, vocab_size, bias, factor=1.0):
    x, weight, bias = leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    value = factor * loss(x, weight, targets, vocab_size, bias)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("sizes, factor", [((64, 80, 0), 1), ((50, 800, 0.2), 3.7)])
def test_loss_and_gradients_are_those_of_cross_entropy(sizes, factor, dtype, tolerance):
    """With a padded vocabulary, targets that do not count, and rows that do not fill a chunk."""
    expected = loss_and_gradients(plain, torch.float64, *case(*sizes), factor)
    found = loss_and_gradients(gpt2.linear_cross_entropy, dtype, *case(*sizes), factor)
    for a, b in zip(found, expected):
        assert a.dtype == dtype and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("much", [0.0, 0.5, 1.0, 2.0])
def test_loss_under_autocast_is_as_exact_as_cross_entropy(much, dtype):
    """Also if targets are almost certain, as x lies `much` towards them."""
    x, weight, targets, *more = case(1000, 1400, 0.07, width=64)
    x, weight = 0.5 * x + much * weight[targets.clamp(min=0)], 0.2 * weight
    arguments = (x, weight, targets, *more)
    exact = loss_and_gradients(plain, torch.float64, *arguments)
    with torch.autocast("cpu", dtype):
        found = loss_and_gradients(gpt2.linear_cross_entropy, torch.float32, *arguments)
        theirs = loss_and_gradients(plain, torch.float32, *arguments)
    for a, b, c in zip(found, theirs, exact):
        assert a.dtype == b.dtype and (a - c).norm() <= 1.5 * (b - c).norm() + 1e-5 * c.norm()


def test_loss_of_a_target_of_no_probability_is_finite():
    """p = e^-200 is 0 in float32. The gradient is softmax - one_hot, as always."""
    x, weight = torch.tensor([[[1.0, 0]]]), torch.tensor([[200.0, 0], [0, 0]])
    arguments = (x, weight, torch.tensor([[1]]), 2, torch.zeros(2))
    loss, *grads = loss_and_gradients(gpt2.linear_cross_entropy, torch.float32, *arguments)
    assert loss.item() == pytest.approx(86.8, abs=0.1)
    assert [grad.tolist() for grad in grads] == [[[[200, 0]]], [[1, 0], [-1, 0]], [1, -1]]


class Watch(TorchDispatchMode):
    """Notes the types of matrix products, and the size of the largest result of any function."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in str(function):
            self.products.append(result.dtype)
        self.largest = max(self.largest, getattr(result, "numel", int)())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_holds_a_chunk_of_logits_and_no_gradients_that_nobody_asks_for(dtype):
    x, weight, *more = case(640, 2048, 0)  # 4 chunks
    watch = Watch()
    for grad, products in ((True, 12), (False, 4)):
        watch.products, watch.largest = [], 0
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, dtype != x.dtype), watch:
            gpt2.linear_cross_entropy(x, weight.requires_grad_(), *more)
        assert watch.products == [dtype] * products and watch.largest == 512 * 640
