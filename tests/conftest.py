"""What several test files need: model files, a small data set, tiny runs, processes to kill."""

import csv
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in tiny networks, threads only wait

ROOT = Path(__file__).parent.parent
BANNER = "# --- training: the same lines in every model file ---"
MODEL_FILES = sorted(p.stem for p in ROOT.glob("*.py") if BANNER in p.read_text(encoding="utf-8"))
# float32, because `auto` is bfloat16 on newer CPUs, whose rounding would hide what is compared.
TINY = """--n-embd 48 --block-size 64 --batch-size 4 --micro-batch 2 --warmup-steps 5
          --log-interval 1 --eval-tokens 512 --device cpu --dtype float32 --max-steps 1""".split()
FEW_LAYERS = {"gpt2": 1, "mixer": 1, "progressive": 4, "scratch_former": 1}
FEW_LAYERS["conv_attention"] = "1,0,0,1,0,0,1"


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of some 12,000 tokens: made-up prose in 60 documents, a vocabulary of 300."""
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder):
    rng = random.Random(0)
    words = "the model reads a token and learns what follows it slowly naïve".split()
    texts = [" ".join(rng.choices(words, k=150)) + "." for _ in range(60)]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    out = folder / "set"
    load("prepare_data").main([str(source), "--tokenizer", "bpe:300", "--out", str(out)])
    return out


def argv(data, out, *more):
    """Options of a tiny run."""
    return [*TINY, "--data", str(data), "--out", str(out), *map(str, more)]


def train(name, data, out, *more):
    """A tiny run of few layers in this process; returns the rows of its log."""
    load(name).main(argv(data, out, "--n-layer", FEW_LAYERS[name], *more))
    return rows(out)


def rows(out):
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_rows(a, b):
    """Whether two logs agree to the last bit, except in the last two columns, which are of time."""
    return [list(r.values())[:-2] for r in a] == [list(r.values())[:-2] for r in b]


def refused(main, *options):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        main([str(o) for o in options])
    line = e.value.code
    assert isinstance(line, str) and "\n" not in line and len(line) < 400, line
    return line


def run(*args, expect=0):
    """Runs `python ARGS...` as a user does; returns its stdout, or stderr if it should fail."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout


def in_child(name, options, log, pause, file_limit, env):
    """main(options) of a file, on a disk as slow as `pause` and as small as `file_limit`."""
    os.environ.update({key: str(value) for key, value in env.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    fsync, replace = os.fsync, os.replace
    os.fsync = lambda fd: (time.sleep(pause), fsync(fd))  # so that a kill often falls into a write
    os.replace = lambda a, b: (time.sleep(pause), replace(a, b), time.sleep(pause))
    load(name).main([str(o) for o in options])


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "tiktoken"])  # imported once, not by each child


def start(name, *options, log, pause=0.0, file_limit=0, **env):
    """Starts main(options) of a file in a process that can be killed. It prints to `log`."""
    log.touch()
    arguments = (name, options, log, pause, file_limit, env)
    child = forks.Process(target=in_child, args=arguments, daemon=True)
    child.start()
    return child


def start_two(name, *options, log):
    """Two processes that train as one, as torchrun starts them. Their logs are `log` 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(name, *options, log=Path(f"{log} {rank}"), RANK=rank, **env) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def wait_for(text, log, seconds=60):
    """Waits until a process has written `text` to its log."""
    end = time.monotonic() + seconds
    while text not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.002)
