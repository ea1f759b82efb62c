"""Faults that the tests must notice: each is planted alone in a copy of the repository.

    python tests/mutants.py            all of them, two at a time: make mutants; ten minutes
    python tests/mutants.py sample     those whose file or text has this word

A mutant is (old text, new text, which tests: pytest's -k). The exit code is 1 if a mutant survives
that EQUIVALENT has no reason for, or an old text is no longer there exactly once."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from conftest import BANNER, MODEL_FILES, ROOT

# {(files, test files): mutants}. "training" is the training section, and "networks" what stands
# above it, in every model file that has the old text.
MUTANTS = {
    ("training", "test_training.py"): [
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
    ],
    ("training", "test_gpt2.py"): [
        ("p_target.clamp(min=1e-38).log()", "p_target.log()", "no_probability"),
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
    ("mixer.py", "test_mixer.py"): [
        ("y = torch.tril(W, past) @ x", "y = W @ x", "none_before"),
        ("cfg.block_size**-0.5", "1.0", "initial or drowned"),
    ],
    ("progressive.py", "test_progressive.py"): [
        ("self.scale = cfg.lora_alpha / cfg.lora_rank", "self.scale = 1.0", "gradients"),
        ("torch.manual_seed(cfg.seed + cfg.stage)", "pass", "killed"),
    ],
    ("conv_attention.py", "test_conv_attention.py"): [
        ("(-tokens.size(1) % 64, 0)", "(0, -tokens.size(1) % 64)", "row_sees"),
        ("            level.length = 0\n", "            pass\n", "however"),
    ],
    ("scratch_former.py", "test_scratch_former.py"): [
        ("(noise[1] * cfg.vocab_size)", "(noise[1] * 2)", "masked_texts"),
        ("manual_seed(sum(ids))", "manual_seed(0)", "evaluation_hides"),
        ("min(cfg.warmup_steps, cfg.max_steps // 2)", "cfg.warmup_steps", "peak"),
    ],
    # One file departs from gpt2.py.
    ("mixer.py", "test_style.py"): [
        ('F.gelu(self.c_fc(x), approximate="tanh")', "F.relu(self.c_fc(x))", ""),
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.999)", ""),
        ('"GOMP_SPINCOUNT", "1000"', '"GOMP_SPINCOUNT", "100000"', ""),
    ],
    ("conv_attention.py", "test_style.py"): [
        ("q / math.sqrt(hs)", "q", ""),
        ("(step + 1) / warmup", "step / warmup", ""),
    ],
    ("progressive.py", "test_style.py test_models.py"): [
        ("x + self.drop(self.mlp(self.ln_2(x)))", "x + self.mlp(self.ln_2(x))", "text_of_gpt2"),
        ("self.length : end] = v", "self.length : end] = k", "text_of_gpt2"),
        ("std = 0.02", "std = 0.2", "training_begins"),
    ],
    ("scratch_former.py", "test_style.py"): [
        ("default_rng([cfg.seed, step])", "default_rng([step])", ""),
        ("import numpy as np", "import gpt2\nimport numpy as np", ""),
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

# Mutants that no test can notice: {old text: reason}.
EQUIVALENT = {}


def plant(folder, files, old, new):
    """Replaces the text in a copy. Returns what the files were, or {} if old is not there once."""
    before = {}
    names = MODEL_FILES if files in ("training", "networks") else [files.removesuffix(".py")]
    for path in (folder / f"{name}.py" for name in names):
        text = part = path.read_text(encoding="utf-8")
        if files == "training":
            part = text[text.index(BANNER) :]
        elif files == "networks":
            part = text[: text.index(BANNER)]
            if old not in part:
                continue
        if part.count(old) != 1:
            return {}
        before[path] = text
        path.write_text(text.replace(part, part.replace(old, new)), encoding="utf-8")
    return before


def tests_pass(folder, test_files, keyword):
    """Runs the tests until one fails. From 3 on, exit codes of pytest are mistakes of this file."""
    command = [sys.executable, *"-m pytest -x -q -p no:cacheprovider".split(), "-k", keyword]
    env = os.environ | dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    where = dict(cwd=folder / "tests", env=env)
    done = subprocess.run([*command, *test_files.split()], **where, capture_output=True, text=True)
    assert done.returncode < 3, f"{test_files} -k '{keyword}': {done.stdout}{done.stderr}"
    return done.returncode == 0


def attempt(folders, test_files, keyword, files=None, old="", new=""):
    """What became of a mutant or, without one, whether the tests pass."""
    folder = folders.get()  # a copy that is free
    try:
        before = plant(folder, files, old, new) if files else {}
        if files and not before:
            return "GONE"
        passed = tests_pass(folder, test_files, keyword)
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
        if not files:
            return "pass" if passed else "FAIL"
        survives = f"survives: {EQUIVALENT[old]}" if old in EQUIVALENT else "SURVIVED"
        return survives if passed else "noticed"
    finally:
        folders.put(folder)


def main():
    word = " ".join(sys.argv[1:])
    folders, jobs, found = Queue(), [], []
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:
        for i in "12":
            ignored = shutil.ignore_patterns(".*", "data", "out", "__pycache__")
            folders.put(Path(shutil.copytree(ROOT, f"{parent}/{i}", ignore=ignored)))
        for (files, test_files), mutants in MUTANTS.items():
            chosen = [m for m in mutants if word in f"{files} {m[0]} {m[1]}"]
            every = {keyword for *_, keyword in chosen}
            every = "" if "" in every else " or ".join(every)
            if chosen:
                job = pool.submit(attempt, folders, test_files, every)
                jobs.append((f"{test_files} without a mutant", job))
            for old, new, keyword in chosen:
                job = pool.submit(attempt, folders, test_files, keyword, files, old, new)
                jobs.append((f"{files}: {old!r} -> {new!r}", job))
        for what, job in jobs:
            found.append(job.result())
            print(f"{found[-1]:9} {what}", flush=True)
    bad = sum(result.isupper() for result in found)
    print(f"{found.count('noticed')} mutants were noticed; {bad} survived, are gone, or fail")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
