"""What every model file promises. A new model file is picked up by its training banner."""

import ast
import math
import sys

import pytest
import torch
from conftest import BANNER, MODEL_FILES, ROOT, load

each_model = pytest.mark.parametrize("name", MODEL_FILES)


def small(name, seed=0, **kwargs):
    """A small network in eval mode with weights large enough that every token matters."""
    torch.manual_seed(seed)
    module = load(name)
    model = module.Model(module.Config(**{"vocab_size": 50, "block_size": 128, "n_embd": 48, "n_head": 6, **kwargs}))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape) * (0.2 if p.dim() >= 2 else 0.1)
    return model.eval()


@each_model
def test_training_section_is_the_same_in_every_file(name):
    first, this = ((ROOT / f"{n}.py").read_text(encoding="utf-8").partition(BANNER)[2] for n in (MODEL_FILES[0], name))
    assert this == first and this.rstrip().endswith("main()") and this.count("\n") <= 240


@each_model
def test_imports_torch_numpy_and_the_standard_library_alone(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert roots <= set(sys.stdlib_module_names) | {"torch", "numpy"}


@each_model
def test_config_has_what_every_config_has(name):
    fields = """vocab_size block_size n_embd n_head dropout data out device dtype compile seed max_steps batch_size
                micro_batch eval_interval log_interval learning_rate"""
    assert set(fields.split()) <= set(vars(load(name).Config())) and load(name).Config().out == f"out/{name}"
    for preset in load(name).PRESETS.values():
        load(name).Config(**preset)


@each_model
def test_shapes(name):
    model = small(name)
    idx = torch.randint(50, (2, 128))
    assert model(idx).shape == (2, 128, 50) and model(idx, idx).shape == ()
    cache = model.new_cache(2)
    assert model(idx[:, :64], cache=cache).shape == (2, model.ahead, 50) and cache.length == 64
    with pytest.raises(ValueError, match="129 tokens do not fit block_size 128"):
        model(torch.zeros(1, 129, dtype=torch.long))


@each_model
@torch.no_grad()
def test_no_logit_depends_on_a_token_at_or_after_the_one_it_predicts(name):
    model, idx = small(name).double(), torch.randint(50, (1, 128))
    before = model(idx)
    changed = idx.repeat(128, 1)
    changed[range(128), range(128)] = (changed[range(128), range(128)] + 1 + torch.randint(48, (128,))) % 50
    moved = (model(changed) - before).abs().amax(-1)  # (128 changed tokens, T)
    for t in range(128):
        blind = max(0, t + 1 - model.ahead)  # rows that score token t or an earlier one
        assert (moved[t, :blind] < 1e-9).all(), f"token {t} is seen too early"
        assert moved[t].max() > 1e-3, f"token {t} is never seen"


def loss_on_random_tokens(name):
    """Nats above ln V after 100 steps on i.i.d. uniform tokens. Short windows: a leak shows there at once."""
    module = load(name)
    torch.manual_seed(0)
    length = max(16, getattr(module.Config, "ahead", 1))
    few = {} if isinstance(module.Config.n_layer, str) else {"n_layer": 4}
    cfg = module.Config(vocab_size=4, block_size=length, n_embd=48, n_head=6, **few)
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
    """The best honest loss is ln V; lower means that the answer is in the input."""
    assert abs(loss_on_random_tokens(name)) < 0.02


def test_a_gpt2_without_its_mask_goes_below_ln_v(monkeypatch):
    """The test above would notice: without the mask gpt2.py sees 15 of its 16 targets."""
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attend(q, k, v))
    assert loss_on_random_tokens("gpt2") < -0.5


@each_model
@torch.no_grad()
def test_cached_equals_uncached_however_the_text_is_cut(name):
    model, idx = small(name).double(), torch.randint(50, (2, 128))
    plain = model(idx)
    for step in (1, 3, 64, 128):
        cache = model.new_cache(2)
        for t in range(0, 128, step):
            logits, end = model(idx[:, t : t + step], cache=cache), min(t + step, 128)
            if end % model.ahead == 0:
                assert torch.allclose(logits, plain[:, end - model.ahead : end], atol=1e-6)


@each_model
@torch.no_grad()
def test_cache_rows_can_be_kept_repeated_and_reordered(name):
    model, idx = small(name).double(), torch.randint(50, (3, 128))
    for rows in ([2, 0, 1], [1], [0, 0, 2, 2, 1]):
        cache = model.new_cache(3)
        model(idx[:, :64], cache=cache)
        cache.select(rows)
        logits = model(idx[rows, 64:], cache=cache)
        assert torch.allclose(logits, model(idx[rows])[:, -model.ahead :], atol=1e-6)


@each_model
def test_overfits_one_batch(name):
    module = load(name)
    torch.manual_seed(0)
    model = module.Model(module.Config(vocab_size=50, block_size=64, n_embd=48, n_head=6))
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
def test_every_weight_gets_a_gradient_and_is_in_the_optimizer_once(name):
    model = small(name)
    idx = torch.randint(50, (2, 128))
    model(idx, idx).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    groups = load(name).configure_optimizer(model, load(name).Config()).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@each_model
@torch.no_grad()
def test_every_parameter_has_an_effect(name):
    """Noise in any of them moves a logit. The one exception is OpenAI's: softmax cancels the biases of the keys."""
    model, idx = small(name).double(), torch.randint(50, (1, 128))
    before = model(idx)
    for key, p in model.named_parameters():
        parts = p.chunk(3) if key.endswith("c_attn.bias") else [p]  # of queries, keys and values
        for i, part in enumerate(parts):
            old = part.clone()
            part += torch.randn(part.shape)
            moved, part[:] = (model(idx) - before).abs().max(), old
            assert (moved > 1e-4) == (len(parts) == 1 or i != 1), f"{key}, part {i}: {moved}"


@each_model
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_losses_of_the_cpu(name):
    model, idx = small(name), torch.randint(50, (2, 128))
    assert abs(model(idx, idx).item() - model.cuda()(idx.cuda(), idx.cuda()).item()) < 1e-3
