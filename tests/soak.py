"""The long tests, some ten minutes: python tests/soak.py [kill] [prepare] [processes] [compile]

A broken promise is an AssertionError; the files stay in the folder that the first line names."""

import contextlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, argv, load, make_data, rows, same_rows, start, train, wait_for

sys.path.insert(0, str(ROOT))
import torch  # after conftest, which sets the number of threads
from test_training import same_state


def kill(folder, data):
    """Training, killed at random moments and resumed; a new run where one came to its end."""
    for name, *more in (["gpt2"], ["progressive", "--lora-rank", 2]):
        more += "--n-layer 4 --max-steps 24 --eval-interval 2 --dropout 0.1".split()
        train(name, data, folder / name, *more)
        ended = 0
        for i in range(25):
            out, log = folder / f"{name} {ended}", folder / f"{name} {i}.txt"
            resume = ["--resume"] if (out / "ckpt.pt").exists() else []
            child = start(name, *argv(data, out, *more, *resume), log=log, pause=0.03)
            if i < 24:  # the last one comes to its end
                wait_for("parameters", log)
                child.join(random.uniform(0, 1))
                child.kill()
            child.join()
            if child.exitcode != -9:  # it was not killed
                assert same_rows(rows(folder / name), rows(out)) and same_state(folder / name, out)
                ended += 1


def prepare(folder, data):
    """prepare_data.py, killed while it replaces a data set: that stays, is replaced, or is gone."""
    out = folder / "again"
    command = ("prepare_data", folder / "text.jsonl", "--out", out, "--force", "--tokenizer")
    left = []
    for _ in range(10):  # in the second in which files are written and moved
        start(*command, "bytes", log=folder / "log").join()
        child = start(*command, "bpe:270", log=folder / "log", pause=0.1)
        while child.is_alive() and not [*out.glob(f"*{child.pid}.partial/tokenizer.tiktoken")]:
            child.join(0.002)
        child.join(random.uniform(0, 1.6))
        child.kill()
        child.join()
        if (out / "meta.json").exists():
            load("prepare_data").check(out)
            left.append(load("prepare_data").read_meta(out)["tokenizer"])
    return f"10 killed ones left these data sets: {', '.join(left)}"


def losses(log):
    return torch.tensor([float(row[key] or 0) for row in log for key in ("train_loss", "val_loss")])


def processes(folder, data):
    """Two processes under torchrun: one is killed, or both are stopped; then one ends the run."""
    more = ("--max-steps", 30, "--eval-interval", 2)
    whole = losses(train("gpt2", data, folder / "whole", *more))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 gpt2.py --n-layer 1"
    for i in range(6):
        out, log = folder / f"two {i}", folder / f"two {i}.txt"
        command = [sys.executable, *torchrun.split(), *argv(data, out, *more)]
        parent = subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)
        wait_for("step 5/", log)
        children = subprocess.check_output(["pgrep", "-P", str(parent.pid)], text=True).split()
        both = ["-INT", str(parent.pid), *children]  # Ctrl-C reaches all
        subprocess.run(["kill", *(both if i % 2 else ["-KILL", children[0]])], check=True)
        parent.wait(60)
        resumed = losses(train("gpt2", data, out, "--resume", *more))
        assert torch.allclose(resumed, whole, rtol=0, atol=1e-4), f"{out} differs"


def compile(folder, data):
    """The losses of a network that g++ has compiled are those of the same network without it."""
    if torch.__version__.startswith("2.6."):
        return "left out: torch 2.6 compiles a wrong gradient of nn.Embedding on CPUs with AVX512"
    more = ("--max-steps", 4, "--eval-interval", 2)
    eager = losses(train("gpt2", data, folder / "eager", *more))
    compiled = losses(train("gpt2", data, folder / "compiled", *more, "--compile"))
    assert torch.allclose(compiled, eager, rtol=0, atol=1e-4)


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{folder} gets the files", flush=True)
    for part in sys.argv[1:] or ["kill", "prepare", "processes", "compile"]:
        with contextlib.redirect_stdout(None):
            said = globals()[part](folder, make_data(folder))
        print(f"{part}: {said or 'every promise was kept'}", flush=True)
