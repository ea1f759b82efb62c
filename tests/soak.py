"""The long tests: what kills, many times over. Some ten minutes; `make soak`.

    python tests/soak.py                all parts
    python tests/soak.py kill prepare   some of: kill, prepare, processes

One line per part. A broken promise is an AssertionError, and the files stay in the folder that the last line names.
"""

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

from conftest import ROOT, argv, load, make_data, rows, same_rows, start, train, wait_for

sys.path.insert(0, str(ROOT))
import torch


def checkpoint(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Two folders hold the same run: log, weights and moments to the last bit."""
    assert same_rows(rows(a), rows(b)), f"the logs of {a} and {b} differ"
    one, two = checkpoint(a / "ckpt.pt"), checkpoint(b / "ckpt.pt")
    assert all(torch.equal(w, two["model"][k]) for k, w in one["model"].items()), f"{a} and {b}: weights"
    for i, state in one["optimizer"]["state"].items():
        assert all(torch.equal(m, two["optimizer"]["state"][i][k]) for k, m in state.items()), f"{a} and {b}: moments"


def whole_data(folder):
    """meta.json of a data set in which every file is what it says."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for split, counts in meta["splits"].items():
        assert sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == counts["sha256"], folder / split
    assert (folder / "tokenizer.tiktoken").exists() == meta["tokenizer"].startswith("bpe:"), folder
    return meta


def kill(folder, data, rng, kills=20):
    """Training, killed at random moments and resumed, a new run where one came to its end."""
    counts = {}
    for name, more in (("gpt2", ("--n-layer", 1)), ("progressive", ("--n-layer", 4, "--lora-rank", 2))):
        more = ("--max-steps", 24, "--eval-interval", 2, "--dropout", 0.1, *more)
        train(name, data, folder / name, *more)
        killed = torn = runs = saved = 0
        while killed < kills or runs == 0:
            out, log = folder / f"{name} {runs}", folder / f"{name} {runs} {killed}.txt"
            resume = ["--resume"] if (out / "ckpt.pt").exists() else []
            child = start(name, *argv(data, out, *more), *resume, log=log, pause=0.03)
            if killed < kills:
                wait_for("parameters", log)
                child.join(rng.uniform(0, 1))
                killed += child.is_alive()
                child.kill()
            child.join()
            torn += bool(list(out.glob("*.tmp")))
            if (out / "ckpt.pt").exists():
                last, saved = saved, load("gpt2").read_checkpoint(out / "ckpt.pt")["step"]
                assert saved >= last, f"{out}: step {last} was saved, {saved} is left"
            if child.exitcode == 0:
                assert_same_run(folder / name, out)
                runs, saved = runs + 1, 0
        counts[name] = f"{killed} kills, {torn} of them in a write, {runs} resumed runs equal to the last bit"
    return str(counts)


def prepare(folder, data, rng, kills=10):
    """prepare_data.py, killed while it replaces an older data set, which must stay, be replaced, or be plainly gone."""
    (folder / "text.txt").write_text(" ".join(rng.choices("the model learns what follows".split(), k=60_000)), "utf-8")
    out, found = folder / "set", {"the old": 0, "the new": 0, "no": 0}
    options = [folder / "text.txt", "--out", out, "--force", "--tokenizer"]
    for tokenizer in ("bytes", "bpe:270"):  # the second one is timed
        begin = time.monotonic()
        start("prepare_data", *options, tokenizer, log=folder / "log", pause=0.05).join()
    whole = time.monotonic() - begin
    for _ in range(kills):
        start("prepare_data", *options, "bytes", log=folder / "log").join()
        old = whole_data(out)
        child = start("prepare_data", *options, "bpe:270", log=folder / "log", pause=0.05)
        child.join(rng.uniform(0.2, 1.0) * whole)
        child.kill()
        child.join()
        there = (out / "meta.json").exists()
        found["no" if not there else "the old" if whole_data(out) == old else "the new"] += 1
    start("prepare_data", *options, "bpe:270", log=folder / "log").join()
    assert whole_data(out)["tokenizer"] == "bpe:270"
    return f"{kills} kills left {found} data set"


def processes(folder, data, rng, times=3):
    """Two processes under torchrun: one is killed, or both are told to stop; one process then ends the run."""
    more = ("--max-steps", 30, "--eval-interval", 2)
    train("gpt2", data, folder / "whole", *more)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "gpt2.py"]
    for i in range(2 * times):
        out, log = folder / f"run {i}", folder / f"{i}.txt"
        with open(log, "w", encoding="utf-8") as file:
            command = [*torchrun, *argv(data, out, *more)]
            parent = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        wait_for("step 5/", log)
        children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
        if i % 2:
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to torchrun and to each of its workers
        else:
            os.kill(int(rng.choice(children)), signal.SIGKILL)
        parent.wait(60)
        train("gpt2", data, out, "--resume", *more)
        one, two = ([float(r["train_loss"]) for r in rows(f)] for f in (folder / "whole", out))
        assert len(one) == len(two) and max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    return f"{times} runs of which a process was killed and {times} stopped by Ctrl-C were resumed by one process"


def main():
    parts = sys.argv[1:] or ["kill", "prepare", "processes"]
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
