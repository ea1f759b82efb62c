"""Faults, at length: what test_faults.py does for a minute and a half, for a night watch.

    python tests/soak.py                all parts, about twenty minutes on one core
    python tests/soak.py fuzz memory    some of: kill, data, fuzz, processes, memory

One line a part; exit code 1 if a promise was broken, with what broke it. The files of a broken promise stay in the
folder that the last line names.
"""

import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from hashlib import sha256
from pathlib import Path

from conftest import MODEL_FILES, ROOT, load

sys.path.insert(0, str(ROOT))
import torch

import prepare_data
import sample

KILLS, FUZZ_SECONDS, SEED = 50, 300, 0
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WORDS = ["the", "model", "reads", "a", "token", "and", "learns", "what", "follows", "it", "slowly", "naïve"]
SHAPES = {
    "gpt2": "--n-layer 1",
    "conv_attention": "--n-layer 1,0,0,1,0,0,1 --n-embd 8 --block-size 64",
    "progressive": "--n-layer 4 --lora-rank 2",
    "mixer": "--n-layer 1",
    "scratch_former": "--n-layer 1 --n-ff 64",
}
RUN = "--batch-size 2 --micro-batch 2 --warmup-steps 5 --log-interval 1 --eval-tokens 256 --dropout 0.1 --device cpu"
RUN += " --dtype float32"  # exact on every CPU: `auto` is bfloat16 on newer ones


def argv(name, data, out):
    """Options of a tiny run."""
    shape = f"--n-embd 32 --n-head 2 --block-size 32 {SHAPES.get(name, '')}"  # the last word counts
    return [*shape.split(), *RUN.split(), "--data", str(data), "--out", str(out)]


def make_data(folder):
    """A data set of a few KB, 300 ids."""
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=100)) + "."}) + "\n" for _ in range(40))
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare_data.main([str(folder / "text.jsonl"), "--tokenizer", "bpe:300", "--out", str(folder / "set")])
    return folder / "set"


# --- real processes, on a disk that is slow where it matters

SLOW_DISK = """
import builtins, io, os, time
real_open = open

def pause(times):
    with real_open(os.environ["PAUSE"], encoding="utf-8") as file:
        time.sleep(times * float(file.read() or 0))

def slow(function, times):
    def wrapped(*args, **kwargs):
        pause(times)
        result = function(*args, **kwargs)
        pause(times)
        return result
    return wrapped

class SlowFile(io.FileIO):
    def write(self, data):
        pause(1)
        return super().write(data)

def slow_open(path, mode="r", *args, **kwargs):
    return io.BufferedWriter(SlowFile(path, "w")) if mode == "wb" else real_open(path, mode, *args, **kwargs)

os.fsync, os.replace, builtins.open = slow(os.fsync, 10), slow(os.replace, 5), slow_open
"""
SCRIPT = """
import ctypes, os, resource, runpy, signal, sys
for fd, path in enumerate(outputs, 1):
    os.dup2(os.open(path, os.O_WRONLY), fd)
sys.stdout.reconfigure(encoding=encoding, line_buffering=True)
os.environ["PAUSE"] = pause_file
exec(slow_disk, {})
if file_limit:  # writing beyond it fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
if humble:  # root without capabilities: permission bits bind it
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(cwd)
sys.argv, sys.path[0] = command, cwd
runpy.run_path(command[0], run_name="__main__")
"""
nursery = multiprocessing.get_context("forkserver")
nursery.set_forkserver_preload(["__main__", "pytest", "numpy", "tiktoken", "torch", "torch._dynamo"])


class Child:
    """`python COMMAND` in the repository, on a disk as slow as set_pause says. A script runs in a process forked from
    one that has imported torch, which saves four seconds; torchrun does not."""

    number = 0

    def __init__(self, folder, *command, pause=0.0, file_limit=0, humble=False, encoding="utf-8", cwd=ROOT):
        Child.number += 1
        self.folder, command = folder / "child", [str(c) for c in command]
        (self.folder / "hook").mkdir(parents=True, exist_ok=True)
        self.files = [self.folder / f"{Child.number} {name}" for name in ("stdout", "stderr")]
        for file in self.files:
            file.touch()
        self.set_pause(pause)
        if command[0] == "-m":
            (self.folder / "hook" / "sitecustomize.py").write_text(SLOW_DISK, encoding="utf-8")
            env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(self.folder / "hook"),
                   "PAUSE": str(self.folder / "pause")}  # fmt: skip
            with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
                where = dict(cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
                self.process = subprocess.Popen([sys.executable, *command], **where)
        else:
            names = dict(command=command, outputs=[str(f) for f in self.files], pause_file=str(self.folder / "pause"))
            names |= dict(cwd=str(cwd), slow_disk=SLOW_DISK, file_limit=file_limit, humble=humble, encoding=encoding)
            self.process = nursery.Process(target=exec, args=(SCRIPT, names), daemon=True)
            self.process.start()
        self.pid = self.process.pid

    def set_pause(self, seconds):
        """How long each write takes from now on; a flush takes 20 times that, a rename 10 times."""
        (self.folder / "pause.new").write_text(str(seconds), encoding="utf-8")
        (self.folder / "pause.new").replace(self.folder / "pause")

    @property
    def code(self):
        """The exit code, negative for a signal, None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def out(self):
        return self.files[0].read_text(encoding="utf-8", errors="replace")

    @property
    def err(self):
        return self.files[1].read_text(encoding="utf-8", errors="replace")

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()
        self.end(-signal.SIGKILL, 0)

    def wait_for(self, text, seconds=120):
        """Until it has printed that."""
        until(lambda: text in self.out or self.code is not None, repr(text), seconds)
        assert text in self.out, f"ended before it said {text!r}:\n{self.out}{self.err}"

    def end(self, *codes, seconds=300):
        """Waits for its end, which must come in that time and with such an exit code; returns what it said."""
        with suppress(AssertionError):
            until(lambda: self.code is not None, "end", seconds)
        if self.code is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.out}{self.err}")
        assert self.code in (codes or [0]), f"exit code {self.code}:\n{self.out}{self.err}"
        return self.out, self.err


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.005)


def one_line(text):
    """Errors that a user can cause end in one line."""
    assert text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text, text
    return text


# --- what must be equal


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a, b):
    """Equal to the last bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
            a.nan_to_num(0), b.nan_to_num(0))  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def rows(out):
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_run(a, b):
    """Two run folders hold the same run: weights, optimizer, step, best loss, and the log but for its clock."""
    for file in ("ckpt.pt", "best.pt"):
        one, two = checkpoint(a / file), checkpoint(b / file)
        for key in one.keys() - {"config", "seconds"}:
            assert same(one[key], two[key]), f"{file}: {key} differs between {a} and {b}"
    columns = ("step", "tokens", "train_loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm")
    one, two = ([[row[c] for c in columns] for row in rows(out)] for out in (a, b))
    assert [row[0] for row in one] == [row[0] for row in two], f"steps in {b / 'log.csv'}: {[row[0] for row in two]}"
    assert one == two, f"{a / 'log.csv'} and {b / 'log.csv'} differ"


def data_is_whole(folder):
    """A data set in which every file is what meta.json says."""
    meta, tokenizer, _ = load("gpt2").open_data(folder)
    for split, counts in meta["splits"].items():
        data = (folder / f"{split}.bin").read_bytes()
        assert sha256(data).hexdigest() == counts["sha256"], f"{folder}/{split}.bin is not that of meta.json"
    ranks = prepare_data.load_tokenizer(tokenizer["name"], tokenizer["ranks"])
    assert ranks.n_vocab == meta["vocab_size"], f"{folder}: another data set's tokenizer.tiktoken"
    assert (folder / "tokenizer.tiktoken").exists() == meta["tokenizer"].startswith("bpe:"), folder
    return meta


# --- kill -9


def kill_training(name, data, folder, n, rng, steps=24):
    """Kills training with SIGKILL n times, each at a random moment past the imports, resuming in between, and starting
    another run where one came to its end. Returns (kills in the middle of a write, runs that came to their end)."""
    more = ["--max-steps", steps, "--eval-interval", 2]
    Child(folder, f"{name}.py", *argv(name, data, folder / "whole"), *more).end()
    killed = torn = runs = step = 0
    while True:
        out = folder / f"killed {runs}"
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        before = {p: p.stat().st_mtime_ns for p in out.glob("*.tmp")}
        child = Child(folder, f"{name}.py", *argv(name, data, out), *more, *resume, pause=0.001)
        if killed < n:
            child.wait_for("parameters")
            time.sleep(rng.uniform(0, 1))
            child.kill()
        child.end(0, -signal.SIGKILL)
        if child.code == 0:
            assert_same_run(folder / "whole", out)
            runs, step = runs + 1, 0
            if killed == n:
                return torn, runs
        else:
            killed += 1
            torn += any(before.get(p) != p.stat().st_mtime_ns for p in out.glob("*.tmp"))
            shown = [int(line.split()[1].split("/")[0]) for line in child.out.splitlines() if f"/{steps}  " in line]
            last, step = step, checkpoint(out / "ckpt.pt")["step"] if (out / "ckpt.pt").exists() else 0
            assert step >= max([last, *(s - 2 for s in shown)]), f"step {shown[-1:]} was shown, {step} was saved"


def kill_prepare(folder, n, rng):
    """Kills prepare_data.py n times over an older data set; after each there is the old one, the new one, or plainly
    none. Returns how often each."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(2000)), encoding="utf-8")
    out, found = folder / "set", Counter()
    command = ["prepare_data.py", text, "--out", out, "--tokenizer"]
    start = time.monotonic()
    Child(folder, *command, "bpe:270", pause=0.01).end()
    whole = time.monotonic() - start
    Child(folder, *command, "bytes").end()
    old = data_is_whole(out)
    for _ in range(n):
        child = Child(folder, *command, "bpe:270", pause=0.01)
        time.sleep(rng.uniform(0, 1.1 * whole))
        child.kill()
        if (out / "meta.json").exists():
            meta = data_is_whole(out)
            assert meta == old or meta["tokenizer"] == "bpe:270", meta
            found["the old" if meta == old else "the new"] += 1
        else:
            found["no"] += 1
    Child(folder, *command, "bpe:270").end()
    assert data_is_whole(out)["tokenizer"] == "bpe:270"
    return found


# --- several at once


def prepare_twice(folder):
    """Two prepare_data.py write one folder at once: it must hold the data set of one of them, whole."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(5000)), encoding="utf-8")
    command = ["prepare_data.py", text, "--out", folder / "set", "--tokenizer"]
    both = [Child(folder, *command, tokenizer, pause=0.01) for tokenizer in ("bytes", "bpe:270")]
    for child in both:
        child.end(0, 1)
        if child.code:
            assert "set" in one_line(child.err), child.err
    assert not all(child.code for child in both)
    data_is_whole(folder / "set")
    left = {p.name for p in (folder / "set").iterdir()} - {"train.bin", "val.bin", "meta.json", "tokenizer.tiktoken"}
    assert not [name for name in left if "tmp" in name], left


def start_twice(data, folder):
    """Two trainings are started into one folder at the same moment: one trains, the other says why it does not."""
    command = ["gpt2.py", *argv("gpt2", data, folder / "run"), "--max-steps", 30, "--eval-interval", 2]
    both = [Child(folder, *command, pause=0.003) for _ in range(2)]
    for child in both:
        child.end(0, 1)
    assert sorted(child.code for child in both) == [0, 1], [child.err for child in both]
    (refused,) = (child.err for child in both if child.code)
    assert "--resume" in one_line(refused) and "--out" in refused, refused
    assert [int(row["step"]) for row in rows(folder / "run")] == list(range(1, 31))


def workers(child):
    """The process ids of torchrun's workers, by rank."""
    ranks = {}
    for children in Path(f"/proc/{child.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text(encoding="utf-8").split()):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks |= {int(e[5:]): pid for e in environ if e.startswith(b"RANK=")}
    return ranks


def kill_rank(rank, data, out, folder, *more, seconds=90):
    """Two processes train; one is killed in the middle. Returns what was said and how long the end took."""
    child = Child(folder, *TORCHRUN, "gpt2.py", *argv("gpt2", data, out), *more, pause=0.002)
    child.wait_for("step 2:")
    ranks = workers(child)
    os.kill(ranks[rank], signal.SIGKILL)
    start = time.monotonic()
    try:
        child.end(1, seconds=seconds)
    finally:
        hanging = [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]
        for pid in hanging:
            os.kill(pid, signal.SIGKILL)
    assert not hanging, f"rank {rank} was killed, and another lived on"
    return child.out + child.err, time.monotonic() - start


# --- torn and hostile files


class Hang(BaseException):
    """Not an Exception: nothing in the files under test may catch it."""


@contextmanager
def limits(seconds, extra_memory=2**32):
    """Time and address space that a file may cost."""

    def on_alarm(number, frame):
        raise Hang

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, old)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def outcome(main, arguments, seconds=10):
    """(verdict, what was said): "ok", "refused" in one line, or how a promise was broken."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limits(seconds), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            main([str(a) for a in arguments])
    except SystemExit as e:
        if isinstance(e.code, str) and min(e.code) >= " ":  # no line feed, no escape sequence
            return "refused", e.code
        return ("not one line" if isinstance(e.code, str) else "exit code"), repr(e.code)
    except Hang:
        return "hang", traceback.format_exc(limit=-3)
    except BaseException:  # PanicException of tiktoken is no Exception
        return "traceback", traceback.format_exc(limit=-4)
    return ("traceback" if "Traceback" in err.getvalue() else "ok"), out.getvalue() + err.getvalue()


class Trap:
    """What a hostile pickle does: run code when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


JSON_VALUES = [None, True, 0, -1, 1, 7, 1.5, 2**31, 2**63, 10**30, math.nan, math.inf, "", "x", "1", "two\nlines",
               "\x1b[2J", "\0", "bpe:300", [], {}, [1], {"a": 1}, [[]]]  # fmt: skip
VALUES = [*JSON_VALUES, b"x", (), {1, 2}, torch.tensor(math.nan), torch.tensor(1), torch.zeros(0), torch.zeros(3, 5),
          torch.full((32,), 1e30), torch.ones(2, 2).to_sparse(), torch.zeros(32, device="meta"),
          torch.zeros(32, dtype=torch.complex64), torch.zeros(2, 32, dtype=torch.int64)]  # fmt: skip


def twist(rng, tree, values):
    """Changes one node of a tree of dicts and lists, at any depth; returns the tree and what was done."""
    tree, path = {**tree}, []
    node = tree
    while True:
        key = rng.choice(list(node.keys() if isinstance(node, dict) else range(len(node))))
        path.append(key)
        child = node[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
            node[key] = child = child.copy()
            node = child
        else:
            break
    kind = rng.choice(["value", "value", "value", "delete", "rename", "tensor"])
    if kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[rng.choice(["x", 0, f"{key}x"])] = node.pop(key)
    elif kind == "tensor" and isinstance(child, torch.Tensor):
        changes = [lambda t: t[..., :-1] if t.dim() else t, lambda t: t * math.nan, lambda t: t.double(),
                   lambda t: t * 1e20, lambda t: t[None], lambda t: t.flatten(), lambda t: t * math.inf]  # fmt: skip
        node[key] = rng.choice(changes)(child)
    else:
        kind, node[key] = "value", rng.choice(values)
    return tree, f"{kind} at {path}: {str(node.get(key) if isinstance(node, dict) else node)[:80]!r}"


def tear(rng, data):
    """Damages bytes as disks and transfers do; returns them and what was done."""
    kind, at = rng.choice(["cut", "flip", "flip", "zeros", "lost", "more"]), rng.randrange(len(data))
    if kind == "cut":
        data = data[: rng.choice([at, len(data) - 1 - at % 64, at % 64])]
    elif kind == "flip":
        data = bytearray(data)
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(at, len(data))] ^= 1 << rng.randrange(8)
        data = bytes(data)
    elif kind == "zeros":  # a page that never reached the disk
        data = data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :]
    elif kind == "lost":
        data = data[:at] + data[at + rng.choice([1, 2, 4096]) :]
    else:
        data = data + rng.randbytes(rng.choice([1, 2, 4096]))
    return data, f"{kind} at {at}"


def twist_pickle(rng, path):
    """Changes bytes of the pickle within a checkpoint, and makes the zip file around it good again."""
    with zipfile.ZipFile(path) as old:
        entries = [(i, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for info, data in entries:
            if info.filename.endswith("data.pkl"):
                data, said = tear(rng, data)
            new.writestr(info.filename, data)
    return f"data.pkl: {said}"


HOSTILE_OPTIONS = {
    "": ["seed", "max-steps", "batch-size", "micro-batch", "eval-interval", "eval-tokens", "log-interval", "grad-clip",
         "learning-rate", "warmup-steps", "dropout", "block-size", "n-embd", "n-head", "vocab-size", "data", "dtype",
         "device", "preset", "split", "stride", "init-from"],
    "sample": ["prompt", "prompt-file", "decode", "max-new-tokens", "num-samples", "temperature", "top-k", "top-p",
               "beam-width", "length-penalty", "seed", "device", "dtype", "ckpt"],
}  # fmt: skip
HOSTILE_WORDS = ["", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e30", "x", "99999999999999999999", "1000000000000",
                 "/", "/dev/null", "meta", "cpu:7", "\udcff", "é 漢"]  # fmt: skip
KINDS = ["torn checkpoint"] * 6 + ["hostile checkpoint"] * 8 + ["hostile pickle"] * 3 + ["trap", "another model"]
KINDS += ["torn meta.json", "hostile meta.json", "hostile meta.json", "torn .bin", "torn .bin", "torn tokenizer"]
KINDS += ["torn log.csv", "hostile option", "hostile option"]


def fuzz(data, folder, seconds, seed=0, models=MODEL_FILES):
    """Damages one file after the other for so long, and has training, evaluation or sampling read each. Every outcome
    must be correct, or one line and exit code 1. Returns ({kind: Counter of verdicts}, [broken promises])."""
    rng, broken, verdicts = random.Random(seed), [], {kind: Counter() for kind in KINDS}
    for name in models:
        verdict, said = outcome(load(name).main, [*argv(name, data, folder / name), "--max-steps", 2])
        assert verdict == "ok", said
    intact = {name: checkpoint(folder / name / "ckpt.pt") for name in models}
    end, number, case, sprung = time.monotonic() + seconds, 0, folder / "case", folder / "sprung"
    while time.monotonic() < end:
        number += 1
        rng.seed(f"{seed} {number}")  # so that any one case can be had again
        name, kind = rng.choice(models), rng.choice(KINDS)
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / name, case / "run")
        shutil.copytree(data, case / "set")
        ckpt = case / "run" / "ckpt.pt"
        target, main, options = None, load(name).main, argv(name, case / "set", case / "run")
        commands = {
            "resume": [*options, "--resume", "--max-steps", 3],
            "resume as it was": ["--resume", "--out", case / "run", "--max-steps", 3, "--device", "cpu"],
            "init": [*argv(name, case / "set", case / "new"), "--init-from", ckpt, "--max-steps", 1],
            "eval": ["--eval-only", "--out", case / "run", "--data", case / "set", "--device", "cpu"],
            "train": [*argv(name, case / "set", case / "new"), "--max-steps", 1],
            "check": ["--eval-only", "--check", *options],
        }
        of_data = ["train", "resume", "eval", "check"]
        action = rng.choice([*list(commands)[:4], "sample"])
        if kind == "torn checkpoint":
            target = ckpt
        elif kind == "hostile checkpoint":
            state, what = twist(rng, intact[name], VALUES)
            torch.save(state, ckpt)
        elif kind == "hostile pickle":
            what = twist_pickle(rng, ckpt)
        elif kind == "trap":
            trap = rng.choice([Trap(Path.touch, sprung), Trap(os.system, f"touch '{sprung}'"), Trap(open, sprung, "w"),
                               Trap(eval, f"open({str(sprung)!r}, 'w')")])  # fmt: skip
            what = rng.choice(["pickle", "zip", "old format"])
            content = rng.choice([trap, {**intact[name], "step": trap}])
            if what == "pickle":
                ckpt.write_bytes(pickle.dumps(content))
            else:
                torch.save(content, ckpt, _use_new_zipfile_serialization=what == "zip")
        elif kind == "another model":
            other = rng.choice([n for n in models if n != name])
            what = rng.choice([f"of {other}", f"of {other}, called {name}"])
            torch.save({**intact[other], "model_file": f"{name if 'called' in what else other}.py"}, ckpt)
            action = rng.choice(list(commands)[:4])  # sample.py reads them all
        elif kind == "hostile meta.json":
            meta, what = twist(rng, json.loads((case / "set" / "meta.json").read_text(encoding="utf-8")), JSON_VALUES)
            (case / "set" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            action = rng.choice(of_data)
        elif kind == "hostile option":
            script = rng.choice(["", "sample"])
            option, word = rng.choice(HOSTILE_OPTIONS[script]), rng.choice(HOSTILE_WORDS)
            what, action = f"--{option} {word!r}", "sample" if script else rng.choice(["train", "resume", "eval"])
            if option == "max-steps" and len(word) > 4:
                continue  # whoever asks for so many shall have them
            commands[action] = [*commands.get(action, []), f"--{option}={word}"]
        else:
            target = {"torn meta.json": case / "set" / "meta.json", "torn log.csv": case / "run" / "log.csv",
                      "torn tokenizer": case / "set" / "tokenizer.tiktoken",
                      "torn .bin": case / "set" / rng.choice(["train.bin", "val.bin"])}[kind]  # fmt: skip
            action = "resume" if kind == "torn log.csv" else rng.choice(of_data)
        if target is not None:
            before = target.read_bytes()
            damaged, what = tear(rng, before)
            target.write_bytes(damaged)
            what = f"{target.name}: {what}"
        if action == "sample":
            main = sample.main
            commands[action] = ["--ckpt", ckpt, "--prompt=the", "--max-new-tokens", 5, "--device", "cpu", "--decode",
                                rng.choice(sample.DECODERS), *commands.get(action, [])]  # fmt: skip
        harmless = False
        if kind == "torn checkpoint":
            with suppress(Exception):  # torch, zip and pickle each have their own
                harmless = same(checkpoint(ckpt), intact[name])
        verdict, said = outcome(main, commands[action])

        # What was taken must have been right.
        if sprung.exists():
            verdict = "code was run"
            sprung.unlink()
        if verdict == "ok":
            if kind == "torn checkpoint":
                verdict = verdict if harmless else "wrong"
            elif kind in ("trap", "another model"):
                verdict = "wrong"
            elif kind == "torn .bin" and (action == "check" or len(damaged) != len(before)) and damaged != before:
                verdict = "wrong"
            elif kind == "torn tokenizer" and action == "train":
                verdict, said = outcome(sample.main, ["--ckpt", case / "new" / "ckpt.pt", "--prompt=the"])
                verdict = "ok" if verdict == "ok" else "wrong"
            if action.startswith("resume"):
                steps = [int(row["step"]) for row in rows(case / "run")]
                if steps != sorted(set(steps)):
                    verdict, said = "wrong", f"steps in log.csv: {steps}"
        elif verdict == "refused" and kind == "torn .bin" and action == "check" and ".bin" not in said:
            verdict = "wrong"
        verdicts[kind][verdict] += 1
        if verdict not in ("ok", "refused"):
            broken.append(f"{verdict}: case {number}, {name} {action}, {kind}, {what}: {said.strip()}")
            if len(broken) <= 50:
                shutil.copytree(case, folder / f"broken {number}", dirs_exist_ok=True)
    return verdicts, broken


# --- memory and open files


def usage(pid="self"):
    """(resident memory in MB without memory-mapped files, open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kb = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
    return kb / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def train_and_watch(name, data, folder, steps, warm=200):
    """((MB, open files) after `warm` steps, the same near the end) of a training process."""
    more = ["--max-steps", steps, "--eval-interval", max(1, warm // 4)]
    child = Child(folder, f"{name}.py", *argv(name, data, folder / name), *more)
    seen = []
    for at in (warm, steps - steps // 50):
        child.wait_for(f"{at:,}/{steps:,} ", seconds=600)
        seen.append(usage(child.pid))
    child.end()
    return seen


def sample_and_watch(ckpt, samples, warm=20):
    """{decoder: ((MB, open files) after `warm` samples, the same after so many more)} in this process."""
    seen = {}
    for decode in sample.DECODERS:
        arguments = ["--ckpt", ckpt, "--prompt=the", "--max-new-tokens", 40, "--device", "cpu", "--decode", decode]
        for n in (warm, samples):
            for _ in range(n):
                verdict, said = outcome(sample.main, arguments)
                assert verdict == "ok", said
            seen.setdefault(decode, []).append(usage())
    return seen


# --- the parts


def part_kill(data, folder):
    rng, each, torn, runs = random.Random(SEED), KILLS // len(MODEL_FILES), 0, 0
    for name in MODEL_FILES:
        a, b = kill_training(name, data, folder / name, each, rng)
        torn, runs = torn + a, runs + b
    left = sorted(p.name for p in folder.rglob("*.tmp"))
    assert not left, f"left behind for ever: {left}"
    n = each * len(MODEL_FILES)
    return f"{n} of {n} kill -9 survived, {torn} in the middle of a write; {runs} resumed runs equal to the last bit"


def part_data(data, folder):
    found = kill_prepare(folder / "kill", 30, random.Random(SEED))
    for i in range(10):
        prepare_twice(folder / f"twice {i}")
    what = ", ".join(f"{n} with {kind} data set" for kind, n in found.items())
    return f"30 kill -9 survived, {what}; 10 pairs at once made 10 whole data sets"


def part_fuzz(data, folder):
    verdicts, broken = fuzz(data, folder, FUZZ_SECONDS, SEED)
    total = sum(verdicts.values(), Counter())
    for kind, counts in verdicts.items():
        print(f"  {kind:20} " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    said = ", ".join(f"{n} {verdict}" for verdict, n in total.most_common())
    assert not broken, "\n".join([f"{total.total()} files: {said}", *broken])
    return f"{total.total()} files: {said}; 0 tracebacks"


def part_processes(data, folder):
    slowest = 0.0
    for i in range(6):
        more = ["--max-steps", 300, "--eval-interval", 2]
        _, seconds = kill_rank(i % 2, data, folder / f"rank {i}", folder, *more)
        slowest = max(slowest, seconds)
    for i in range(6):
        start_twice(data, folder / f"twice {i}")
    return f"6 runs of which a rank was killed ended within {slowest:.0f} s; 6 pairs started at once: 6 refused"


def part_memory(data, folder):
    growth, files, limit = {}, {}, 4  # MB
    for name in MODEL_FILES:
        (mb, before), (more, after) = train_and_watch(name, data, folder, 2000)
        growth[name], files[name] = more - mb, (before, after)
    for decode, ((mb, before), (more, after)) in sample_and_watch(folder / "gpt2" / "ckpt.pt", 200).items():
        growth[decode], files[decode] = more - mb, (before, after)
    said = ", ".join(f"{what} {mb:+.1f}" for what, mb in growth.items())
    said = f"MB over 2,000 steps and over 200 samples: {said}; open files before and after: {list(files.values())}"
    assert max(growth.values()) < limit and all(a >= b for a, b in files.values()), said
    return said


PARTS = {"kill": part_kill, "data": part_data, "fuzz": part_fuzz, "processes": part_processes, "memory": part_memory}


def main():
    torch.set_num_threads(1)
    folder, failed = Path(tempfile.mkdtemp(prefix="soak ")), 0
    (folder / "prepared").mkdir()
    data = make_data(folder / "prepared")
    for part in sys.argv[1:] or PARTS:
        start = time.monotonic()
        (folder / part).mkdir()
        try:
            said = PARTS[part](data, folder / part)
        except AssertionError as e:
            failed, said = failed + 1, f"BROKEN: {e}"
        print(f"{part}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    if failed:
        sys.exit(f"{failed} parts broke a promise; their files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
