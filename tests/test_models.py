"""What every model file promises. A new model file is picked up by its training banner."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW_LAYERS, MODEL_FILES, load

each_model = pytest.mark.parametrize("name", MODEL_FILES)


def each_but(*names):  # whose own tests are stricter
    return pytest.mark.parametrize("name", [name for name in MODEL_FILES if name not in names])


def config(name, **kwargs):
    Config = load(name).Config
    heads = {"n_head": 6} if hasattr(Config, "n_head") else {}
    return Config(**dict(vocab_size=50, block_size=128, n_embd=48) | heads | kwargs)


def small(name, seed=0, **kwargs):
    """A small network in eval mode with weights so large that every token matters."""
    torch.manual_seed(seed)
    model = load(name).Model(config(name, **kwargs))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * (0.2 if p.dim() >= 2 else 0.1)
    return model.eval()


@each_model
def test_presets_are_configs_and_shapes_are_those_of_the_interface(name):
    module, model = load(name), small(name)
    assert module.Config().out == f"out/{name}" and "demo" in module.PRESETS
    for preset in module.PRESETS.values():
        module.Config(**preset)
    idx = torch.randint(50, (2, 128))
    assert model(idx).shape == (2, 128, 50) and model(idx, idx).shape == ()
    cache = model.new_cache(2)
    assert model(idx[:, :64], cache=cache).shape == (2, model.ahead, 50) and cache.length == 64
    with pytest.raises(module.UserError, match="129 tokens do not fit block_size 128"):
        model(torch.zeros(1, 129, dtype=torch.long))


@each_model
def test_loss_is_the_cross_entropy_of_the_logits_without_padded_ids_and_targets_of_minus_1(name):
    model = small(name).double()  # 50 ids, 64 rows
    idx, targets = torch.randint(50, (2, 3, 128))
    targets[0, :5] = targets[2] = -1
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-12)


@each_but("conv_attention", "mixer")
@torch.no_grad()
def test_no_logit_depends_on_a_token_at_or_after_the_one_it_predicts(name):
    model, idx = small(name).double(), torch.randint(50, (1, 128))
    every = torch.arange(128)
    changed = idx.repeat(128, 1)
    changed[every, every] = (idx[0] + 1 + torch.randint(48, (128,))) % 50
    moved = (model(changed) - model(idx)).abs().amax(-1)  # (token, row of the logits)
    assert torch.equal(moved > 1e-9, every >= every[:, None]) and (moved.amax(1) > 1e-3).all()


@each_model
def test_no_loss_below_ln_v_on_tokens_that_nothing_predicts(name):
    """A lower loss means that the answer is in the input. In short windows a leak shows at once."""
    module = load(name)
    length = max(16, getattr(module.Config, "ahead", 1))
    torch.manual_seed(0)
    model = module.Model(config(name, vocab_size=4, block_size=length, n_layer=FEW_LAYERS[name]))
    ahead, optimizer = model.ahead, torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(100):
        rows = torch.randint(4, (512 // length, length + ahead))
        loss = model(rows[:, :-ahead], rows[:, ahead:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() == pytest.approx(math.log(4), abs=0.02)


@each_but("conv_attention", "mixer")
@torch.no_grad()
def test_cached_equals_uncached_however_a_text_is_cut_and_texts_are_selected(name):
    model, idx = small(name).double(), torch.randint(50, (3, 128))
    plain = model(idx)
    for step, rows in (1, [2, 0, 1]), (3, [0, 2, 0, 1]), (78, torch.tensor([2, 2])):
        cache = model.new_cache(3)
        for part, expected in (idx[:, :50], plain), (idx[rows, 50:], plain[rows]):
            if cache.length == 50:
                cache.select(rows)
            for piece in part.split(step, dim=1):
                logits = model(piece, cache=cache)[:, 0]
                assert torch.allclose(logits, expected[:, cache.length - 1], atol=1e-6)


@each_but("scratch_former")
def test_training_begins_with_small_weights_and_a_loss_near_ln_v(name):
    torch.manual_seed(0)
    model = load(name).Model(config(name, vocab_size=1024, n_embd=96))
    assert model(*torch.randint(1024, (2, 2, 128))).item() == pytest.approx(math.log(1024), abs=0.6)
    n_blocks = sum(type(m).__name__ == "Block" for m in model.modules())
    n_layer = 12 if name == "progressive" else n_blocks  # there, layers share blocks
    for key, p in model.named_parameters():
        variance = 0.02**2 / (2 * n_layer) if "c_proj" in key else 0.02**2
        drawn = p.numel() > 1000 and "compress" not in key and "expand" not in key
        if key.endswith("bias") or drawn:
            assert p.square().mean().item() == pytest.approx(variance * (p.dim() > 1), 0.15), key


@each_model
def test_every_weight_gets_a_gradient_and_is_in_the_optimizer_once(name):
    model = small(name)
    idx = torch.randint(50, (2, 128))
    model(idx, idx).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    groups = load(name).configure_optimizer(model, model.cfg).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


@each_model
def test_dropout_is_at_its_places_in_training_and_nowhere_in_evaluation(name):
    """After the embeddings and after each sublayer: with a probability of 1, nothing is left."""
    idx = torch.randint(50, (2, 128))
    assert torch.equal(small(name, dropout=0.5)(idx), small(name)(idx))
    model = small(name, dropout=1.0, n_layer=FEW_LAYERS[name]).train()
    for block in [m for m in model.modules() if type(m).__name__ == "Block"]:
        x = torch.randn(2, 8, len(block.ln_1.weight))
        if name == "scratch_former":  # its norms come after the sums
            assert torch.equal(block(x, torch.zeros(8, 8)), block.ln_2(block.ln_1(x)))
        else:
            assert torch.equal(block(x), x)
        block.drop.p = 0.0
    assert torch.equal(model(idx), model((idx + 1) % 50)), "the embeddings are not dropped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch's function; the formula
def test_attention_weights_are_dropped_in_training(dtype):
    """The mean of many draws is what evaluation computes."""
    attention = small("gpt2", n_layer=1, dropout=0.5).h[0].attn.to(dtype)
    x = torch.randn(1, 8, 48, dtype=dtype)
    exact = attention(x).float()
    draws = torch.stack([attention.train()(x).float() for _ in range(400)])
    assert (draws[0] - draws[1]).norm() > 0.1 * exact.norm()
    assert (draws.mean(0) - exact).norm() < 0.2 * exact.norm()


@each_model
def test_a_compiled_network_computes_what_it_is_without_the_compiler(name, monkeypatch):
    """By its reading of our code. Its own code takes half a minute of g++ (tests/soak.py)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    model = small(name, n_layer=FEW_LAYERS[name])
    idx, targets = torch.randint(50, (2, 2, 128))
    results = []
    for network in (model, load(name).prepare_model(model, True)[0]):
        loss = network(idx, targets)
        results.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))
    assert network is not model and resets == [True]


@each_model
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_losses_of_the_cpu(name):
    model, idx = small(name), torch.randint(50, (2, 128))
    assert abs(model(idx, idx) - model.cuda()(idx.cuda(), idx.cuda()).cpu()) < 1e-3
