"""Faults that the tests must notice: each is planted alone in a copy of the repository.

    python tests/mutants.py            all of them, two at a time: make mutants; four minutes
    python tests/mutants.py sample     those whose file or text has this word

The exit code is 1 if a mutant survives, or its old text is no longer there exactly once."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import BANNER, MODEL_FILES, ROOT

# {(files, test files): [(old text, new text, -k of pytest)]}. "training" is the training section,
# and "networks" what stands above it, in every model file that has the old text.
MUTANTS = {
    ("training", "test_training.py test_gpt2.py"): [
        ('get_batch(splits["train"], length', 'get_batch(splits["val"], length', "batches_are"),
        ("rng.integers(len(tokens) - length + 1,", "rng.integers(len(tokens) // 9,", "batches_are"),
        ("default_rng([cfg.seed, step])", "default_rng([step])", "batches_are"),
        ("SeedSequence([cfg.seed, step, rank])", "SeedSequence([cfg.seed, step])", "random"),
        ("cfg.grad_clip or math.inf", "math.inf", "plain"),
        ("share = len(part)", "share = cfg.micro_batch", "plain"),
        ('val_bits = bits_per_byte(val, meta["splits"]["val"])', "val_bits = val", "plain"),
        ('splits["val"][: cfg.eval_tokens]', 'splits["val"]', "plain"),
        ("if step == 1 or step % cfg.log_interval == 0 or", "if", "plain"),
        ("            model.train()\n", "", "resumed"),
        ('scaler.state_dict() | ckpt["scaler"]', "scaler.state_dict()", "resumed"),
        ("            best = math.inf  #", "            pass  #", "best_has"),
        ("if val < best:", "if True:", "best_has"),
        ("    ckpt.clear()", "    pass", "memory"),
        ("math.isfinite(loss) and (math.isfinite(norm)", "(math.isfinite(loss)", "finite"),
        ("            os.fsync(file.fileno())\n", "", "on_the_disk"),
        ("splits[options.split], cfg", "splits[options.split][:512], cfg", "final"),
        ("range(rank * B, len(starts), world_size * B)", "range(0, len(starts), B)", "two_proc"),
        ("except (UserError,", "except (ValueError,", "student"),
        ("weights_only=True", "weights_only=False", "damaged"),
        ("p_target.clamp(min=2e-38).log()", "p_target.log()", "no_probability"),
        ("grad_weight += grad.T @ part", "grad_weight = grad.T @ part", "loss_and_gradients"),
        ("factor = grad / len", "factor = 1 / len", "loss_and_gradients"),
        ("torch.get_autocast_dtype(device) if autocast else", "", "loss_holds"),
    ],
    ("networks", "test_gpt2.py test_models.py"): [
        ('F.gelu(self.c_fc(x), approximate="tanh")', "F.relu(self.c_fc(x))", "hugging"),
        ("x + self.drop(self.mlp(self.ln_2(x)))", "x + self.mlp(self.ln_2(x))", "dropout"),
        ("self.dropout if self.training else 0.0", "self.dropout", "dropout"),
        ("F.dropout(scores.softmax(-1), dropout)", "scores.softmax(-1)", "dropped"),
        ("q / math.sqrt(hs)", "q", "attention_is"),
        ("std /= math.sqrt(2 * cfg.n_layer)", "pass", "training_begins"),
        ("targets, self.cfg.vocab_size)", "targets, len(self.wte.weight))", "padded"),
        ("(step + 1) / warmup", "step / warmup", "learning_rate"),
    ],
    ("mixer.py", "test_mixer.py test_style.py"): [
        ("return torch.tril(W, past) @ x", "return W @ x", "none_before"),
        ("cfg.block_size**-0.5", "1.0", "initial"),
        ('F.gelu(self.c_fc(x), approximate="tanh")', "F.relu(self.c_fc(x))", "text_of_gpt2"),
        ('"GOMP_SPINCOUNT", "1000"', '"GOMP_SPINCOUNT", "100000"', "imports_and"),
    ],
    ("progressive.py", "test_progressive.py"): [
        ("self.scale = cfg.lora_alpha / cfg.lora_rank", "self.scale = 1.0", "gradients"),
        ("torch.manual_seed(cfg.seed + cfg.stage)", "pass", "killed"),
    ],
    ("conv_attention.py", "test_conv_attention.py"): [
        ("(-tokens.size(1) % 64, 0)", "(0, -tokens.size(1) % 64)", "row_sees"),
        ("            level.length = 0\n", "            pass\n", "however"),
    ],
    ("scratch_former.py", "test_scratch_former.py test_style.py"): [
        ("(noise[1] * cfg.vocab_size)", "(noise[1] * 2)", "masked_texts"),
        ("manual_seed(sum(ids))", "manual_seed(0)", "evaluation_hides"),
        ("min(cfg.warmup_steps, cfg.max_steps // 2)", "cfg.warmup_steps", "peak"),
        ("default_rng([cfg.seed, step])", "default_rng([step])", "text_of_gpt2"),
        ("import numpy as np", "import gpt2\nimport numpy as np", "imports_torch"),
    ],
    ("sample.py", "test_sample.py"): [
        ("logits = logits / max(temperature, 1e-30)", "pass", "filters"),
        (".topk(min(top_k, V))", ".topk(min(top_k + 1, V))", "filters"),
        ("keepdim=True) >= top_p", "keepdim=True) + prob >= top_p", "filters"),
        (" | ((probs == prob) & (ids < token))", "", "equally_probable"),
        ("ends[:, :width].nonzero()", "ends.nonzero()", "among_the_best"),
        ("/ length**length_penalty", "/ length", "beam_search"),
        ("token = token.masked_fill(ended, eot)", "pass", "do_not_count"),
        ("T - (block_size - block_size // 4)", "T - block_size", "window"),
        ("if name not in files:", "if False:", "imports"),
        ("    model.to(dtype)\n", "", "dtype_is"),
    ],
    ("prepare_data.py", "test_prepare_data.py"): [
        ("-counts[pair], rank[a], rank[b]", "-counts[pair], rank[b], rank[a]", "merges"),
        ("if counts[pair] != -n:", "if False:", "merges"),
        ("left -= len(text.encode())", "left -= len(text)", "limit"),
        ("\\S(?=\\s)", "(?=\\s)", "pieces"),
        ("if begins and split in newest:", "if begins:", "position"),
        ('"Accept-Encoding": "identity", ', "", "download_is"),
        ("if response.status_code != 206:", "if False:", "download_is"),
        ("    os.fsync(file.fileno())\n", "", "on_the_disk"),
        ("in reversed(FILES):", "in FILES:", "on_the_disk"),
        ("weight = weight.T.contiguous()", "pass", "weights_give"),
    ],
}


def plant(folder, files, old, new):
    """Writes a fault to a copy of the repository. Returns whether the old text was there once."""
    counts = []
    for name in [files] if files.endswith(".py") else [f"{name}.py" for name in MODEL_FILES]:
        text = (folder / name).read_text(encoding="utf-8")
        above, _, below = text.partition(BANNER)
        part = {"networks": above, "training": below}.get(files, text)
        counts.append(part.count(old))
        text = text.replace(part, part.replace(old, new))
        (folder / name).write_text(text, encoding="utf-8")
    return max(counts) == 1 and (min(counts) == 1 or files == "networks")


def attempt(test_files, keyword, *mutant):
    """What became of a mutant or, without one, whether the tests pass."""
    with tempfile.TemporaryDirectory() as parent:
        ignored = shutil.ignore_patterns(".*", "data", "out", "__pycache__")
        folder = Path(shutil.copytree(ROOT, f"{parent}/copy", ignore=ignored))
        if mutant and not plant(folder, *mutant):
            return "GONE"
        command = [sys.executable, *"-m pytest -x -q -p no:cacheprovider".split(), "-k", keyword]
        env = os.environ | dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        run = dict(cwd=folder / "tests", env=env, capture_output=True, text=True)
        done = subprocess.run([*command, *test_files.split()], **run)
    # From 3 on, exit codes of pytest are mistakes of this file.
    assert done.returncode < 3, f"{test_files} -k '{keyword}': {done.stdout}{done.stderr}"
    if mutant:
        return "noticed" if done.returncode else "SURVIVED"
    return "FAIL" if done.returncode else "pass"


def main():
    word = " ".join(sys.argv[1:])
    jobs, results = [], []
    for (files, test_files), mutants in MUTANTS.items():
        chosen = [m for m in mutants if word in f"{files} {m[0]} {m[1]}"]
        if chosen:  # first without a mutant
            jobs.append((test_files, " or ".join({keyword for *_, keyword in chosen})))
        jobs += [(test_files, keyword, files, old, new) for old, new, keyword in chosen]
    with ThreadPoolExecutor(2) as pool:
        for job, result in zip(jobs, pool.map(lambda job: attempt(*job), jobs)):
            print(f"{result:9}", *map(repr, job[2:] or job), flush=True)
            results.append(result)
    bad = sum(result.isupper() for result in results)
    print(f"{results.count('noticed')} mutants were noticed; {bad} survived, are gone, or fail")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
