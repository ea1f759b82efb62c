"""The long tests: what kills, many times over, and the compiler for CPUs. Some ten minutes.

    python tests/soak.py                all parts: make soak
    python tests/soak.py kill prepare   some of: kill, prepare, processes, compile

One line per part. A broken promise is an AssertionError, and the files stay in the folder that the
last line names."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from conftest import (
    FEW_LAYERS,
    ROOT,
    argv,
    load,
    make_data,
    rows,
    same_rows,
    start,
    train,
    wait_for,
)

sys.path.insert(0, str(ROOT))
import torch


def kill(folder, data, rng, kills=20):
    """Training, killed at random moments and resumed; a new run where one came to its end."""
    from test_training import same_state

    counts = {}
    for name, rank in (("gpt2", []), ("progressive", ["--lora-rank", 2])):
        more = ("--max-steps", 24, "--eval-interval", 2, "--dropout", 0.1, *rank)
        train(name, data, folder / name, *more)
        killed = torn = runs = saved = 0
        while killed < kills or runs == 0:
            out, log = folder / f"{name} {runs}", folder / f"{name} {runs} {killed}.txt"
            resume = ["--resume"] if (out / "ckpt.pt").exists() else []
            options = argv(data, out, "--n-layer", FEW_LAYERS[name], *more, *resume)
            child = start(name, *options, log=log, pause=0.03)
            if killed < kills:
                wait_for("parameters", log)
                child.join(rng.uniform(0, 1))
                killed += child.is_alive()
                child.kill()
            child.join()
            torn += len([*out.glob(f"*.{child.pid}")])  # temporary files
            if (out / "ckpt.pt").exists():
                last, saved = saved, load("gpt2").read_checkpoint(out / "ckpt.pt")["step"]
                assert saved >= last, f"{out}: step {last} was saved, {saved} is left"
            if child.exitcode == 0:
                assert same_rows(rows(folder / name), rows(out)), f"the log of {out} differs"
                assert same_state(folder / name, out), f"weights or moments of {out} differ"
                runs, saved = runs + 1, 0
        counts[name] = f"{killed} kills, {torn} of them in a write, {runs} resumed runs bit-equal"
    return str(counts)


def whole_data(folder):
    """meta.json of a data set in which every file is what it says."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for split, counts in meta["splits"].items():
        found = sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        assert found == counts["sha256"], folder / split
    has_table = (folder / "tokenizer.tiktoken").exists()
    assert has_table == meta["tokenizer"].startswith("bpe:"), folder
    return meta


def prepare(folder, data, rng, kills=10):
    """prepare_data.py, killed while it replaces an older data set. The older one must stay, be
    replaced, or be plainly gone."""
    words = "the model learns what follows".split()
    (folder / "text.txt").write_text(" ".join(rng.choices(words, k=60_000)), "utf-8")
    out, found = folder / "set", {"the old": 0, "the new": 0, "no": 0}

    def begin(tokenizer, pause=0.05):
        options = [folder / "text.txt", "--out", out, "--force", "--tokenizer", tokenizer]
        return start("prepare_data", *options, log=folder / "log", pause=pause)

    begin("bytes").join()
    before = time.monotonic()
    begin("bpe:270").join()
    seconds = time.monotonic() - before
    for _ in range(kills):
        begin("bytes", pause=0).join()
        old = whole_data(out)
        child = begin("bpe:270")
        child.join(rng.uniform(0.2, 1.0) * seconds)
        child.kill()
        child.join()
        left = "no"
        if (out / "meta.json").exists():
            left = "the old" if whole_data(out) == old else "the new"
        found[left] += 1
    begin("bpe:270").join()
    assert whole_data(out)["tokenizer"] == "bpe:270"
    return f"{kills} kills left {found} data set"


def processes(folder, data, rng, times=3):
    """Two processes under torchrun: one is killed, or both are told to stop; then a single process
    ends the run."""
    more = ("--max-steps", 30, "--eval-interval", 2)
    train("gpt2", data, folder / "whole", *more)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 gpt2.py --n-layer 1"
    for i in range(2 * times):
        out, log = folder / f"run {i}", folder / f"{i}.txt"
        command = [sys.executable, *torchrun.split(), *argv(data, out, *more)]
        with open(log, "w", encoding="utf-8") as file:
            parent = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        wait_for("step 5/", log)
        pgrep = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True)
        children = [int(pid) for pid in pgrep.stdout.split()]
        if i % 2:  # as a terminal does: to torchrun and to each of its workers
            for pid in (parent.pid, *children):
                os.kill(pid, signal.SIGINT)
        else:
            os.kill(rng.choice(children), signal.SIGKILL)
        parent.wait(60)
        train("gpt2", data, out, "--resume", *more)
        one, two = ([float(r["train_loss"]) for r in rows(f)] for f in (folder / "whole", out))
        assert len(one) == len(two) and max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    return f"one process resumed {times} runs that lost a process, and {times} after Ctrl-C"


def compile(folder, data, rng):
    """The losses of a network that g++ has compiled are those of the same network without it."""
    if torch.__version__.startswith("2.6."):
        return "left out: torch 2.6 compiles a wrong gradient of nn.Embedding on CPUs with AVX512"
    options = ("--max-steps", 4, "--eval-interval", 2)
    eager = train("gpt2", data, folder / "eager", *options)
    compiled = train("gpt2", data, folder / "compiled", *options, "--compile")
    for name in ("train_loss", "val_loss"):
        pairs = [(float(a[name]), float(b[name])) for a, b in zip(eager, compiled) if a[name]]
        assert max(abs(a - b) for a, b in pairs) < 1e-4, pairs
    return "4 compiled steps have the losses of eager ones"


def main():
    parts = sys.argv[1:] or ["kill", "prepare", "processes", "compile"]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with contextlib.redirect_stdout(io.StringIO()):
        data = make_data(folder)
    for part in parts:
        (folder / part).mkdir()
        begin = time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                said = globals()[part](folder / part, data, random.Random(0))
        except AssertionError:
            print(f"{part}: broken; its files are in {folder / part}")
            raise
        print(f"{part}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
