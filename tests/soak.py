"""The long tests, some ten minutes: python tests/soak.py [kill] [prepare] [processes] [compile]

A broken promise is an AssertionError; the files stay in the folder that the first line names."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import conftest
from conftest import ROOT, argv, load, rows, start, train, wait_for

sys.path.insert(0, str(ROOT))
import torch


def kill(folder, data, rng, kills=20):
    """Training, killed at random moments and resumed; a new run where one came to its end."""
    from test_training import same_state

    for name, rank in (("gpt2", []), ("progressive", ["--lora-rank", 2])):
        more = ("--max-steps", 24, "--eval-interval", 2, "--dropout", 0.1, *rank)
        train(name, data, folder / name, *more)
        killed = runs = 0
        while killed < kills or runs == 0:
            out, log = folder / f"{name} {runs}", folder / f"{name} {runs} {killed}.txt"
            resume = ["--resume"] if (out / "ckpt.pt").exists() else []
            options = argv(data, out, "--n-layer", conftest.FEW_LAYERS[name], *more, *resume)
            child = start(name, *options, log=log, pause=0.03)
            if killed < kills:
                wait_for("parameters", log)
                child.join(rng.uniform(0, 1))
                killed += child.is_alive()
                child.kill()
            child.join()
            if child.exitcode == 0:
                same = conftest.same_rows(rows(folder / name), rows(out))
                assert same and same_state(folder / name, out), f"{out} differs"
                runs += 1


def prepare(folder, data, rng, kills=10):
    """prepare_data.py, killed while it replaces a data set: that stays, is replaced, or is gone."""
    (folder / "text.txt").write_text("the model learns what follows " * 10_000, "utf-8")
    command = ("prepare_data", folder / "text.txt", "--out", folder, "--force", "--tokenizer")
    found = {"bytes": 0, "bpe:270": 0, "no": 0}
    for _ in range(kills):  # in the second in which files are written and moved
        start(*command, "bytes", log=folder / "log").join()
        child = start(*command, "bpe:270", log=folder / "log", pause=0.1)
        while child.is_alive() and not [*folder.glob(f"*{child.pid}.partial/tokenizer.tiktoken")]:
            child.join(0.002)
        child.join(rng.uniform(0, 1.6))
        child.kill()
        child.join()
        left = "no"
        if (folder / "meta.json").exists():
            load("prepare_data").check(folder)
            left = load("prepare_data").read_meta(folder)["tokenizer"]
        found[left] += 1
    return f"the killed ones left {found} data set"


def same_losses(log, other):
    for a, b in zip(log, other, strict=True):
        for name in ("train_loss", "val_loss"):
            assert a[name] == b[name] or abs(float(a[name]) - float(b[name])) < 1e-4


def processes(folder, data, rng, times=3):
    """Two processes under torchrun: one is killed, or both are stopped; then one ends the run."""
    more = ("--max-steps", 30, "--eval-interval", 2)
    whole = train("gpt2", data, folder / "whole", *more)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 gpt2.py --n-layer 1"
    for i in range(2 * times):
        out, log = folder / f"run {i}", folder / f"{i}.txt"
        command = [sys.executable, *torchrun.split(), *argv(data, out, *more)]
        with open(log, "w", encoding="utf-8") as file:
            parent = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        wait_for("step 5/", log)
        children = subprocess.check_output(["pgrep", "-P", str(parent.pid)], text=True).split()
        sent = signal.SIGINT if i % 2 else signal.SIGKILL
        for pid in (parent.pid, *children) if i % 2 else children[:1]:  # Ctrl-C reaches all
            os.kill(int(pid), sent)
        parent.wait(60)
        same_losses(whole, train("gpt2", data, out, "--resume", *more))


def compile(folder, data, rng):
    """The losses of a network that g++ has compiled are those of the same network without it."""
    if torch.__version__.startswith("2.6."):
        return "left out: torch 2.6 compiles a wrong gradient of nn.Embedding on CPUs with AVX512"
    options = ("--max-steps", 4, "--eval-interval", 2)
    eager = train("gpt2", data, folder / "eager", *options)
    same_losses(eager, train("gpt2", data, folder / "compiled", *options, "--compile"))


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{folder} gets the files", flush=True)
    for part in sys.argv[1:] or ["kill", "prepare", "processes", "compile"]:
        (folder / part).mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            data = conftest.make_data(folder)
            said = globals()[part](folder / part, data, random.Random(0))
        print(f"{part}: {said or 'every promise was kept'}", flush=True)
