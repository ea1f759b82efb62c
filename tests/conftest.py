"""What several test files need: the model files, a small data set, tiny runs, and processes that can be killed."""

import csv
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other

ROOT = Path(__file__).parent.parent
BANNER = "# --- training: the same lines in every model file ---"
MODEL_FILES = sorted(p.stem for p in ROOT.glob("*.py") if BANNER in p.read_text(encoding="utf-8"))
# float32, because `auto` is bfloat16 on newer CPUs, whose rounding would hide what is compared
TINY = """--n-embd 48 --n-head 6 --block-size 64 --batch-size 4 --micro-batch 2 --warmup-steps 5 --log-interval 1
          --eval-tokens 512 --device cpu --dtype float32""".split()


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of some 12,000 tokens: made-up prose in 60 documents, a vocabulary of 300."""
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder):
    rng = random.Random(0)
    words = ["the", "model", "reads", "a", "token", "and", "learns", "what", "follows", "it", "slowly", "naïve"]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=150)) + "."}) + "\n" for _ in range(60))
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    load("prepare_data").main([str(folder / "text.jsonl"), "--tokenizer", "bpe:300", "--out", str(folder / "set")])
    return folder / "set"


def argv(data, out, *more):
    """Options of a tiny run."""
    return [*TINY, "--data", str(data), "--out", str(out), *map(str, more)]


def train(name, data, out, *more):
    """A tiny run in this process; returns the rows of its log."""
    load(name).main(argv(data, out, *more))
    return rows(out)


def rows(out):
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_rows(a, b):
    """Whether two logs agree to the last bit in everything but the last two columns, which are of time."""
    return [list(r.values())[:-2] for r in a] == [list(r.values())[:-2] for r in b]


def refused(main, *options):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        main([str(o) for o in options])
    assert isinstance(e.value.code, str) and "\n" not in e.value.code and len(e.value.code) < 400, e.value.code
    return e.value.code


def run(*args, expect=0):
    """Runs `python ARGS...` in the repository, as a user does; returns its stdout, or stderr if it should fail."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout


def in_child(name, options, log, pause, file_limit):
    """In a process of its own: main(options) of a file, on a disk as slow as `pause` and as small as `file_limit`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    fsync, replace = os.fsync, os.replace
    os.fsync = lambda fd: (time.sleep(pause), fsync(fd))  # so that a kill often falls into a write
    os.replace = lambda a, b: (time.sleep(pause), replace(a, b), time.sleep(pause))
    load(name).main([str(o) for o in options])


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "torch.utils.flop_counter", "tiktoken"])  # imported once, not by each child


def start(name, *options, log, pause=0.0, file_limit=0):
    """Starts main(options) of a file in another process, which can be killed. Its output goes to the file `log`."""
    log.touch()
    child = forks.Process(target=in_child, args=(name, options, log, pause, file_limit))
    child.start()
    return child


def wait_for(text, log, seconds=60):
    """Waits until a process has written `text` to its log."""
    end = time.monotonic() + seconds
    while text not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.002)
