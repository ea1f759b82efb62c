"""gpt2.py is the published network, as Hugging Face has it, and attention and loss are what the
plain formulas say."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2


def random_model(seed=0, **config):
    """A small network in eval mode. Weights, biases and norms are so large that each matters."""
    torch.manual_seed(seed)
    config = dict(vocab_size=50, block_size=32, n_layer=2, n_head=4, n_embd=32) | config
    model = gpt2.Model(gpt2.Config(**config))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model.eval()


def as_hugging_face(model):
    """Hugging Face's GPT-2 with the weights of ours. load_state_dict raises if a name or a shape
    does not fit."""
    cfg = model.cfg
    sizes = dict(n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer)
    ids = dict(vocab_size=cfg.vocab_size, bos_token_id=None, eos_token_id=None)
    theirs = GPT2LMHeadModel(GPT2Config(n_head=cfg.n_head, **sizes, **ids)).double()
    weights = {}
    for name, w in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            w = w.T  # OpenAI's layout is (in, out); that of nn.Linear is (out, in)
        if name == "wte.weight":
            w = w[: cfg.vocab_size]  # Hugging Face's is not padded
        weights[f"transformer.{name}"] = w
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(weights)
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, dict(vocab_size=127, block_size=16, n_head=3, n_embd=24)])
def test_logits_equal_hugging_face(config):
    model = random_model(**config).double()
    idx = torch.randint(model.cfg.vocab_size, (3, model.cfg.block_size))
    ours, theirs = model(idx), as_hugging_face(model)(idx).logits
    assert ours.shape == (*idx.shape, model.cfg.vocab_size) and theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-10


PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
PUBLISHED |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = gpt2.Model(gpt2.Config(**gpt2.PRESETS[preset]))
    padding = (50304 - 50257) * model.cfg.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == PUBLISHED[preset]


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("S, T", [(1, 1), (16, 16), (16, 15), (16, 5), (16, 1)])
def test_attention_is_the_plain_formula(S, T, training, dtype, tolerance):
    """Of the last T of S positions: by torch's function, and in bfloat16, in training, by ours."""
    model = random_model().double().train(training)
    attn, x = model.h[0].attn, torch.randn(2, S, 32, dtype=torch.float64)
    q, k, v = (part.view(2, S, 4, 8).transpose(1, 2) for part in attn.c_attn(x).chunk(3, dim=-1))
    weights = q[:, :, S - T :] @ k.transpose(-2, -1) / math.sqrt(8)  # (B, nh, T, S)
    weights = weights.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -math.inf)
    y = (weights.softmax(-1) @ v).transpose(1, 2).reshape(2, T, 32)
    expected = attn.c_proj(y)
    x, cache = x.to(dtype), model.to(dtype).new_cache(2)
    if T < S:
        attn(x[:, : S - T], cache)
        cache.length = S - T
    for y in [attn(x[:, S - T :], cache)] + [attn(x)] * (T == S):
        assert (y - expected).norm() <= tolerance * expected.norm()


def test_weight_decay_falls_on_matrices_and_embeddings_alone():
    model = random_model()
    optimizer = gpt2.configure_optimizer(model, gpt2.Config(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or "ln_" in name else 0.3), name


def test_learning_rate_warms_up_then_falls_as_a_cosine_to_zero():
    cfg = gpt2.Config(max_steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [gpt2.learning_rate(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert [rates[i] for i in (10, 35, 60, 110)] == pytest.approx([1, 0.853553, 0.5, 0], abs=1e-6)
    short = gpt2.Config(max_steps=4, warmup_steps=100, learning_rate=1.0)  # half of it warms up
    rates = [gpt2.learning_rate(step, short) for step in range(4)]
    assert rates == pytest.approx([0.5, 1, 1, 0.5])


# --- the loss


def case(vocab_size, rows, ignored, seed=0, width=16):
    """x (2, rows / 2, width), weight, bias and targets. The padding of the vocabulary would take
    most of the probability, if it were let."""
    torch.manual_seed(seed)
    x, weight = torch.randn(2, rows // 2, width), torch.randn(-(-vocab_size // 64) * 64, width)
    weight[vocab_size:] *= 10
    targets = torch.randint(vocab_size, (2, rows // 2))
    targets[torch.rand(targets.shape) < ignored] = -1
    return x, weight, torch.randn(len(weight)), targets


def plain(x, weight, bias, targets, vocab_size):
    """What the docstring of linear_cross_entropy says."""
    logits = F.linear(x, weight, bias)[..., :vocab_size].flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def ours(x, weight, bias, targets, vocab_size):
    return gpt2.linear_cross_entropy(x, weight, targets, vocab_size, bias)


def loss_and_gradients(loss, dtype, x, weight, bias, targets, vocab_size, factor=1.0):
    leaves = [t if t is None else t.to(dtype).clone().requires_grad_() for t in (x, weight, bias)]
    value = factor * loss(*leaves, targets, vocab_size)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    "vocab_size, rows, ignored, with_bias, factor",
    [(64, 80, 0, False, 1.0), (50, 600, 0.2, True, 3.7), (1000, 1400, 0.07, True, 1.0)],
)
def test_loss_and_gradients_are_those_of_cross_entropy(
    vocab_size, rows, ignored, with_bias, factor, dtype, tolerance
):
    """With a padded vocabulary, targets that do not count, and rows that do not fill a chunk."""
    x, weight, bias, targets = case(vocab_size, rows, ignored)
    arguments = (x, weight, bias if with_bias else None, targets, vocab_size, factor)
    expected = loss_and_gradients(plain, torch.float64, *arguments)
    found = loss_and_gradients(ours, dtype, *arguments)
    assert expected[0] > 1 and len(found) == 3 + with_bias
    for a, b in zip(found, expected):
        assert a.dtype == dtype and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [6, 2, 0.5, 0.001])
def test_loss_under_autocast_is_as_exact_as_cross_entropy(nats, dtype):
    """No further from float64 than 1.5 times F.cross_entropy, at mean losses of so many nats; at
    0.001 a target has p = 0.999."""
    noise, weight, bias, targets = case(1000, 1400, 0.07, width=64)
    weight *= 0.2
    bias *= 0.1
    toward = weight[targets.clamp(min=0)]

    def sizes(much):  # the smaller the loss, the further x lies towards its target
        return 0.5 * noise + much * toward, weight, bias, targets, 1000

    low, high = 0.0, 60.0
    for _ in range(30):
        middle = (low + high) / 2
        too_large = plain(*sizes(middle)) > nats
        low, high = (middle, high) if too_large else (low, middle)
    arguments = sizes(middle)
    exact = loss_and_gradients(plain, torch.float64, *arguments)
    assert exact[0].item() == pytest.approx(nats, rel=0.01)
    with torch.autocast("cpu", dtype):
        found = loss_and_gradients(ours, torch.float32, *arguments)
        theirs = loss_and_gradients(plain, torch.float32, *arguments)
    for a, b, c in zip(found, theirs, exact):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-5 * c.norm()


def test_loss_of_a_target_of_no_probability_is_finite():
    """p = e^-200 is 0 in float32. The gradient is softmax - one_hot, as always."""
    x, weight = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[200.0, 0], [0, 0]])
    loss, grad_x, grad_weight = loss_and_gradients(
        ours, torch.float32, x, weight, None, torch.tensor([[1]]), 2
    )
    assert loss.item() == pytest.approx(87.5, abs=0.1)
    assert grad_x.tolist() == [[[200, 0]]] and grad_weight.tolist() == [[1, 0], [-1, 0]]


class Watch(TorchDispatchMode):
    """Notes the types of matrix products, and the size of the largest result of any function."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in str(function):
            self.products.append(result.dtype)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_holds_a_chunk_of_logits_and_no_gradients_that_nobody_asks_for(dtype):
    """The products are of the type that autocast asks for."""
    x, weight, bias, targets = case(640, 2048, 0)
    chunks = 2048 // 512
    for grad, products in ((True, 3 * chunks), (False, chunks)):
        autocast = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
        with torch.set_grad_enabled(grad), autocast, Watch() as watch:
            ours(x, weight.requires_grad_(), bias, targets, 640)
        assert watch.products == [dtype] * products and watch.largest == 512 * 640
