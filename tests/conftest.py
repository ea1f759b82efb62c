"""What several test files need: the model files there are, a small data set, and a way to run a file as a user does."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other

ROOT = Path(__file__).parent.parent
BANNER = "# --- training: the same lines in every model file ---"
MODEL_FILES = sorted(p.stem for p in ROOT.glob("*.py") if BANNER in p.read_text(encoding="utf-8"))


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of some 12,000 tokens: made-up prose in 60 documents, 300 ids."""
    import prepare_data

    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["the", "model", "reads", "a", "token", "and", "learns", "what", "follows", "it", "slowly", "naïve"]
    lines = (" ".join(rng.choices(words, k=150)) + "." for _ in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    prepare_data.main([str(folder / "text.jsonl"), "--tokenizer", "bpe:300", "--out", str(folder / "set")])
    return folder / "set"


def run(*args, expect=0):
    """Runs `python ARGS...` in the repository, as a user does; returns its stdout, or stderr if it should fail."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout
