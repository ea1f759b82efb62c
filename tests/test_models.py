"""What every model file promises. A new model file is picked up by its training banner."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW_LAYERS, MODEL_FILES, load

each_model = pytest.mark.parametrize("name", MODEL_FILES)
# test_conv_attention.py and test_mixer.py are stricter: they say which token moves which row.
each_other_model = pytest.mark.parametrize(
    "name", [name for name in MODEL_FILES if name not in ("conv_attention", "mixer")]
)


def config(name, **kwargs):
    """A small Config."""
    Config = load(name).Config
    sizes = dict(vocab_size=50, block_size=128, n_embd=48)
    if hasattr(Config, "n_head"):
        sizes["n_head"] = 6
    return Config(**sizes | kwargs)


def small(name, seed=0, **kwargs):
    """A small network in eval mode with weights so large that every token matters."""
    torch.manual_seed(seed)
    model = load(name).Model(config(name, **kwargs))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * (0.2 if p.dim() >= 2 else 0.1)
    return model.eval()


@each_model
def test_config_has_what_every_config_has(name):
    fields = """vocab_size eot block_size n_embd dropout data out device dtype compile seed
                max_steps batch_size micro_batch eval_interval log_interval learning_rate"""
    module = load(name)
    assert set(fields.split()) <= set(vars(module.Config()))
    assert module.Config().out == f"out/{name}" and "demo" in module.PRESETS
    for preset in module.PRESETS.values():
        module.Config(**preset)


@each_model
def test_shapes(name):
    model = small(name)
    idx = torch.randint(50, (2, 128))
    assert model(idx).shape == (2, 128, 50) and model(idx, idx).shape == ()
    cache = model.new_cache(2)
    assert model(idx[:, :64], cache=cache).shape == (2, model.ahead, 50) and cache.length == 64
    with pytest.raises(load(name).UserError, match="129 tokens do not fit block_size 128"):
        model(torch.zeros(1, 129, dtype=torch.long))


@each_model
def test_loss_is_the_cross_entropy_of_the_logits_and_targets_of_minus_1_do_not_count(name):
    model = small(name).double()
    idx, targets = torch.randint(50, (2, 3, 128))
    targets[0, :5] = targets[2] = -1
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-12)


@each_model
def test_a_vocabulary_that_is_padded_has_no_more_probability_than_its_ids(name):
    model = small(name)  # 50 ids, 64 rows
    idx = torch.randint(50, (2, 128))
    before = model(idx, idx).item()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if len(p) == 64 and "." in key:
                p[51:] += 100
    assert model(idx, idx).item() == pytest.approx(before, rel=1e-6)


@each_other_model
@torch.no_grad()
def test_no_logit_depends_on_a_token_at_or_after_the_one_it_predicts(name):
    model, idx = small(name).double(), torch.randint(50, (1, 128))
    every = torch.arange(128)
    changed = idx.repeat(128, 1)
    changed[every, every] = (idx[0] + 1 + torch.randint(48, (128,))) % 50
    moved = (model(changed) - model(idx)).abs().amax(-1)  # (token, row of the logits)
    seen = every >= every[:, None]
    assert torch.equal(moved > 1e-9, seen) and (moved.amax(1) > 1e-3).all()


def loss_on_random_tokens(name):
    """Nats above ln V after 100 steps on i.i.d. uniform tokens. Windows are short: a leak shows
    there at once."""
    torch.manual_seed(0)
    module = load(name)
    length = max(16, getattr(module.Config, "ahead", 1))
    layers = {} if name == "conv_attention" else {"n_layer": 4}
    cfg = config(name, vocab_size=4, block_size=length, **layers)
    model = module.Model(cfg)
    ahead, optimizer = model.ahead, module.configure_optimizer(model, cfg)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        rows = torch.randint(4, (512 // length, length + ahead))
        model(rows[:, :-ahead], rows[:, ahead:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.randint(4, (256, length + ahead))
    with torch.no_grad():
        return model.eval()(rows[:, :-ahead], rows[:, ahead:]).item() - math.log(4)


@each_model
def test_no_loss_below_ln_v_on_tokens_that_nothing_predicts(name):
    """The best honest loss is ln V; a lower one means that the answer is in the input."""
    assert abs(loss_on_random_tokens(name)) < 0.02


def test_a_gpt2_without_its_mask_goes_below_ln_v(monkeypatch):
    """The test above would notice: without the mask gpt2.py sees 15 of its 16 targets."""
    attend = F.scaled_dot_product_attention
    name = "scaled_dot_product_attention"
    monkeypatch.setattr(F, name, lambda q, k, v, *mask, **causal: attend(q, k, v))
    assert loss_on_random_tokens("gpt2") < -0.5


@each_other_model
@torch.no_grad()
def test_cached_equals_uncached_however_the_text_is_cut(name):
    model, idx = small(name).double(), torch.randint(50, (2, 128))
    plain = model(idx)
    for step in (1, 3, 64, 128):
        cache = model.new_cache(2)
        for piece in idx.split(step, dim=1):
            logits = model(piece, cache=cache)[:, 0]
            assert torch.allclose(logits, plain[:, cache.length - 1], atol=1e-6)


@each_model
@torch.no_grad()
def test_cache_rows_can_be_kept_repeated_and_reordered(name):
    model, idx = small(name).double(), torch.randint(50, (3, 128))
    for rows in ([2, 0, 1], [1, 1, 2], [1], [0, 0, 2, 2, 1], torch.tensor([0, 2, 0])):
        cache = model.new_cache(3)
        model(idx[:, :64], cache=cache)
        cache.select(rows)
        logits = model(idx[rows, 64:], cache=cache)
        assert torch.allclose(logits, model(idx[rows])[:, -model.ahead :], atol=1e-6)


@each_model
def test_overfits_one_batch(name):
    torch.manual_seed(0)
    model = load(name).Model(config(name, block_size=64, n_layer=FEW_LAYERS[name]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = torch.randint(50, (2, 64 + model.ahead))
    idx, targets = rows[:, : -model.ahead], rows[:, model.ahead :]
    before = model.eval()(idx, targets).item()
    for _ in range(80):
        model.train()(idx, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 3.5 and model.eval()(idx, targets).item() < 1.0


@each_model
def test_training_begins_with_small_weights_and_a_loss_near_ln_v(name):
    """Of 0.02, and those before a sum of the residual stream are divided by the root of the number
    of sums. scratch_former.py has the paper's: test_scratch_former.py."""
    torch.manual_seed(0)
    model = load(name).Model(config(name, vocab_size=1024, n_embd=96))
    n_blocks = sum(type(m).__name__ == "Block" for m in model.modules())
    n_layer = 12 if name == "progressive" else n_blocks  # there, layers share blocks
    for key, p in model.named_parameters():
        if name == "scratch_former":
            break
        std = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in key else 0.02
        if p.dim() < 2:
            assert key.endswith("bias") <= (p == 0).all(), key
        elif p.numel() > 1000:
            assert abs(p.std().item() / std - 1) < 0.08, key
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), key
    idx, targets = torch.randint(1024, (2, 2, 128))
    assert model(idx, targets).item() == pytest.approx(math.log(1024), abs=0.6)


@each_model
def test_every_weight_gets_a_gradient_and_is_in_the_optimizer_once(name):
    model = small(name)
    idx = torch.randint(50, (2, 128))
    model(idx, idx).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, p in trained.items() if p.grad is None] == []
    groups = load(name).configure_optimizer(model, model.cfg).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained.values())


@each_other_model
@torch.no_grad()
def test_every_parameter_has_an_effect(name):
    """Noise in any of them moves a logit. There is one exception, which is OpenAI's: softmax
    cancels the biases of the keys."""
    model, idx = small(name).double(), torch.randint(50, (1, 128))
    before = model(idx)
    for key, p in model.named_parameters():
        parts = p.chunk(3) if key.endswith("c_attn.bias") else [p]  # of queries, keys and values
        for i, part in enumerate(parts):
            old = part.clone()
            part += torch.randn(part.shape)
            moved = (model(idx) - before).abs().max()
            part[:] = old
            assert (moved > 1e-4) == (len(parts) == 1 or i != 1), f"{key}, part {i}: {moved}"


@each_model
@torch.no_grad()
def test_dropout_is_at_its_places_in_training_and_nowhere_in_evaluation(name):
    """After the embeddings and after each sublayer: with a probability of 1, nothing is left."""
    idx = torch.randint(50, (2, 128))
    assert torch.equal(small(name, dropout=0.5)(idx), small(name)(idx))

    model = small(name, dropout=1.0, n_layer=FEW_LAYERS[name]).train()
    blocks = [m for m in model.modules() if type(m).__name__ == "Block"]
    for block in blocks:
        if hasattr(block, "attn"):
            block.attn.dropout = 0.0
        x = torch.randn(2, 8, len(block.ln_1.weight))
        if name == "scratch_former":  # its norms come after the sums
            assert torch.equal(block(x, torch.zeros(8, 8)), block.ln_2(block.ln_1(x)))
        else:
            assert torch.equal(block(x), x)
        block.drop.p = 0.0
    assert torch.equal(model(idx), model((idx + 1) % 50)), "the embeddings are not dropped"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch's function; the formula
@pytest.mark.parametrize("name", ["gpt2", "conv_attention", "progressive"])
def test_attention_weights_are_dropped_in_training(name, dtype):
    """The mean of many draws is what evaluation computes."""
    model = small(name, n_layer=FEW_LAYERS[name], dropout=0.5).to(dtype)
    attention = next(m for m in model.modules() if type(m).__name__ == "Attention")
    x = torch.randn(1, 8, attention.c_proj.in_features, dtype=dtype)
    exact = attention(x).float()
    draws = torch.stack([attention.train()(x).float() for _ in range(400)])
    assert (draws[0] - draws[1]).norm() > 0.1 * exact.norm()
    assert (draws.mean(0) - exact).norm() < 0.2 * exact.norm()


@each_model
def test_a_compiled_network_computes_what_it_is_without_the_compiler(name):
    """Loss and gradients. This is the compiler's reading of our code; the code for CPUs that it
    would write takes half a minute of g++ (tests/soak.py)."""
    model = small(name, n_layer=FEW_LAYERS[name])
    idx, targets = torch.randint(50, (2, 2, 128))
    results = []
    for forward in (model, torch.compile(model, backend="eager")):
        loss = forward(idx, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    torch.compiler.reset()
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-6)


@each_model
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_losses_of_the_cpu(name):
    model, idx = small(name), torch.randint(50, (2, 128))
    on_cpu = model(idx, idx).item()
    assert abs(model.cuda()(idx.cuda(), idx.cuda()).item() - on_cpu) < 1e-3
