"""Nothing lost, nothing wrong: training, sampling and prepare_data.py as real processes that are killed, interrupted,
starved of disk, fed damaged files and set upon one folder. `make soak` does the same at length."""

import ast
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import soak
import torch
from conftest import MODEL_FILES, ROOT, load
from soak import (
    TORCHRUN,
    Child,
    argv,
    assert_same_run,
    checkpoint,
    data_is_whole,
    one_line,
    outcome,
    rows,
    until,
    usage,
)

each_model = pytest.mark.parametrize("name", MODEL_FILES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return soak.make_data(tmp_path_factory.mktemp("data"))


def train(name, data, out, *more):
    load(name).main([*argv(name, data, out), *map(str, more)])


def refused(main, *arguments):
    """The one line with which a command ends."""
    verdict, said = outcome(main, arguments)
    assert verdict == "refused", said
    return said


def steps(out):
    return [int(row["step"]) for row in rows(out)]


# --- kill -9


@pytest.mark.parametrize("name, kills", [("gpt2", 8), ("progressive", 4)])
def test_a_run_killed_at_random_moments_is_resumed_to_the_last_bit(name, kills, data, tmp_path):
    soak.kill_training(name, data, tmp_path, kills, random.Random(f"{name} 1"))


def test_what_a_killed_run_was_writing_does_not_lie_about_for_ever(data, tmp_path):
    out = tmp_path / "run"
    child = Child(tmp_path, "gpt2.py", *argv("gpt2", data, out), "--max-steps", 4, "--eval-interval", 1, pause=0.01)
    child.wait_for("step 1:")
    until(lambda: list(out.glob("*.tmp")), "temporary file")
    child.kill()
    if list(out.glob("*.tmp")):  # else it was renamed in that very moment
        train("gpt2", data, out, "--resume")
        assert not list(out.glob("*.tmp")), "a killed run of a large model would leave gigabytes each time"


def test_a_killed_prepare_data_leaves_the_older_data_set_or_plainly_none(tmp_path):
    soak.kill_prepare(tmp_path, 4, random.Random(1))


# --- Ctrl-C


def test_ctrl_c_saves_and_a_second_one_leaves_at_once_and_damages_nothing(data, tmp_path):
    more = ["--max-steps", 40, "--eval-interval", 20]
    train("gpt2", data, tmp_path / "whole", *more)
    command = ["gpt2.py", *argv("gpt2", data, tmp_path / "run"), *more]
    child = Child(tmp_path, *command, pause=0.003)
    child.wait_for("step      3/")
    child.signal(signal.SIGINT)
    child.end(130, seconds=5)
    first = checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    assert first == steps(tmp_path / "run")[-1] and 3 <= first < 20

    child = Child(tmp_path, *command, "--resume")
    child.wait_for(f"step {first + 2:>6}/")
    child.set_pause(1)  # saving takes a minute from now on
    child.signal(signal.SIGINT)
    until(lambda: list((tmp_path / "run").glob("*.tmp")), "temporary file")
    child.signal(signal.SIGINT)
    _, error = child.end(130, -signal.SIGINT, seconds=5)
    assert not error, error
    assert checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == first

    train("gpt2", data, tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("what", ["first checkpoint", "evaluation", "sampling"])
def test_ctrl_c_at_any_other_time_is_no_traceback(what, data, tmp_path):
    out = tmp_path / "run"
    if what == "first checkpoint":
        child = Child(tmp_path, "gpt2.py", *argv("gpt2", data, out), pause=0.1)
        until(lambda: out.exists() and list(out.glob("*.tmp")), "temporary file")
    else:
        train("gpt2", data, out, "--max-steps", 1)
        if what == "evaluation":
            shutil.copytree(data, tmp_path / "set")
            meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
            meta["splits"]["train"]["tokens"] *= 200
            (tmp_path / "set" / "train.bin").write_bytes((data / "train.bin").read_bytes() * 200)
            (tmp_path / "set" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            options = ["--data", tmp_path / "set", "--eval-only", "--split", "train", "--stride", 1]
            child = Child(tmp_path, "gpt2.py", "--out", out, *options)
            maps = Path(f"/proc/{child.pid}/maps")
            until(lambda: "train.bin" in maps.read_text(encoding="utf-8"), "memory map")
        else:
            options = ["--prompt=the", "--max-new-tokens", 10**9, "--decode", "greedy"]
            child = Child(tmp_path, "sample.py", "--ckpt", out / "ckpt.pt", *options)
            until(lambda: len(child.out) > 20, "text")
    time.sleep(0.3)
    child.signal(signal.SIGINT)
    _, error = child.end(130, -signal.SIGINT, seconds=30)
    assert "Traceback" not in error, error


# --- a full disk


def test_a_disk_full_at_a_log_line_is_one_line_and_the_run_goes_on_later(data, tmp_path):
    more = ["--max-steps", 8, "--eval-interval", 4]
    train("gpt2", data, tmp_path / "whole", *more)
    out = tmp_path / "run"
    command = ["gpt2.py", *argv("gpt2", data, out), *more]
    child = Child(tmp_path, *command, pause=0.01)
    child.wait_for("step      5/")
    child.signal(signal.SIGTERM)
    child.end(143)
    # The largest file is to be log.csv: zeros behind a decimal point change nothing, and there may be many.
    lines = (out / "log.csv").read_text(encoding="utf-8").splitlines()
    log = "\n".join([*lines[:-1], lines[-1] + ("" if "." in lines[-1].split(",")[-1] else ".") + "0" * 100_000]) + "\n"
    (out / "log.csv").write_text(log, encoding="utf-8")
    before = (out / "ckpt.pt").read_bytes()

    _, error = Child(tmp_path, *command, "--resume", file_limit=len(log) + 30).end(1)  # half a line more
    assert re.search("disk|space|large", one_line(error)), error
    assert (out / "ckpt.pt").read_bytes() == before
    train("gpt2", data, out, "--resume")
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_full_at_the_first_checkpoint_leaves_a_folder_that_can_be_used(data, tmp_path):
    command = ["gpt2.py", *argv("gpt2", data, tmp_path / "run"), "--max-steps", 2]
    _, error = Child(tmp_path, *command, file_limit=50_000).end(1)
    assert re.search("disk|space|large", one_line(error)), error
    assert not list((tmp_path / "run").glob("*.tmp"))
    train("gpt2", data, tmp_path / "run", "--max-steps", 2)


@pytest.mark.parametrize("size, what", [(1000, "tokenizer.tiktoken"), (50_000, "train.bin")])
def test_a_disk_full_while_preparing_data_leaves_the_older_data_set_whole(size, what, tmp_path):
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(soak.WORDS, k=50_000)), encoding="utf-8")
    command = ["prepare_data.py", tmp_path / "text.txt", "--out", tmp_path / "set", "--tokenizer"]
    Child(tmp_path, *command, "bytes").end()
    before = {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}
    assert len(before["train.bin"]) > 50_000
    _, error = Child(tmp_path, *command, "bpe:280", file_limit=size).end(1)
    said = error.splitlines()[-1]  # above it stands what it had done
    assert re.search("disk|space|large", said) and "Traceback" not in error, error
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == before, what


# --- torn and hostile files


def test_damaged_files_are_read_rightly_or_refused_in_one_line(data, tmp_path):
    verdicts, broken = soak.fuzz(data, tmp_path, seconds=15, seed=1)
    assert not broken, "\n\n".join([str(dict(sum(verdicts.values(), soak.Counter()))), *broken])


def bits_flipped(path, at, offset=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << offset
    path.write_bytes(data)


def test_a_flipped_bit_in_a_weight_is_noticed(data, tmp_path):
    import sample

    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    path = tmp_path / "run" / "ckpt.pt"
    weight = checkpoint(path)["model"]["wte.weight"].numpy().tobytes()
    bits_flipped(path, path.read_bytes().index(weight) + 1001)
    for main, *options in (
        (load("gpt2").main, "--out", tmp_path / "run", "--resume", "--max-steps", 2),
        (load("gpt2").main, "--out", tmp_path / "run", "--eval-only"),
        (sample.main, "--ckpt", path, "--prompt", "the"),
    ):
        assert "ckpt.pt" in refused(main, *options)


@pytest.mark.parametrize("split", ["train", "val"])
def test_check_notices_a_token_file_that_is_not_the_one_of_meta_json(split, data, tmp_path):
    import prepare_data

    shutil.copytree(data, tmp_path / "set")
    train("gpt2", tmp_path / "set", tmp_path / "intact", "--max-steps", 1, "--check")
    prepare_data.main(["set", "--out", str(tmp_path / "set"), "--check"])
    path = tmp_path / "set" / f"{split}.bin"
    bits_flipped(path, 200)  # the last bit of an id: one that there is, and the file is as long as it was
    train("gpt2", tmp_path / "set", tmp_path / "unchecked", "--max-steps", 1)
    line = refused(load("gpt2").main, *argv("gpt2", tmp_path / "set", tmp_path / "run"), "--max-steps", 1, "--check")
    assert f"{split}.bin" in line and "prepare_data.py" in line and not (tmp_path / "run" / "ckpt.pt").exists()
    assert f"{split}.bin" in refused(prepare_data.main, "set", "--out", tmp_path / "set", "--check")
    assert f"{split}.bin" in refused(load("gpt2").main, "--out", tmp_path / "unchecked", "--eval-only", "--check")


def test_prepare_data_check_of_what_is_no_data_set(tmp_path):
    import prepare_data

    assert "nowhere" in refused(prepare_data.main, "nowhere", "--out", tmp_path / "nowhere", "--check")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "meta.json").write_text('{"splits": {"train": 3}}', encoding="utf-8")
    refused(prepare_data.main, "set", "--out", tmp_path / "set", "--check")


# --- numbers


def poisoned(path, to, value):
    """A checkpoint with `value` in the embedding of every token."""
    state = checkpoint(path)
    next(w for w in state["model"].values() if w.dim() == 2)[:, 0] = value
    torch.save(state, to)
    return to


@each_model
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(name, data, tmp_path):
    more = ["--eval-interval", 2, "--dropout", 0]
    train(name, data, tmp_path / "good", "--max-steps", 2, *more)
    good = tmp_path / "good" / "ckpt.pt"
    for value in (math.nan, math.inf):
        bad, out = poisoned(good, tmp_path / "bad.pt", value), tmp_path / f"{value}"
        line = refused(load(name).main, *argv(name, data, out), "--init-from", bad, "--max-steps", 9, *more)
        assert re.search(r"step \d", line) and "ckpt.pt" in line and re.search("nan|inf", line), line
    if name == "scratch_former":
        more += ["--warmup-steps", 1]

    # A learning rate that breaks the network in its first step: no later checkpoint may be of the wreck.
    before = checkpoint(good)
    line = refused(load(name).main, *argv(name, data, tmp_path / "good"), "--resume", "--max-steps", 40,
                   "--learning-rate", 1e30, "--eval-interval", 1, "--dropout", 0)  # fmt: skip
    assert re.search(r"step \d", line) and "ckpt.pt" in line
    after = checkpoint(good)
    assert all(w.isfinite().all() for w in after["model"].values())
    train(name, data, tmp_path / "good", "--resume", "--max-steps", after["step"] + 1, "--learning-rate", 1e-5, *more)
    last = float(rows(tmp_path / "good")[-1]["train_loss"])
    assert last < 20, f"the last good checkpoint is of step {after['step']}, a run from step {before['step']}: {last}"


@pytest.mark.parametrize("decode", ["greedy", "beam", "top-k", "temperature", "nucleus"])
def test_sampling_from_weights_that_are_no_numbers_is_one_line(decode, data, tmp_path):
    import sample

    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    bad = poisoned(tmp_path / "run" / "ckpt.pt", tmp_path / "bad.pt", math.nan)
    assert "not numbers" in refused(sample.main, "--ckpt", bad, "--prompt", "the", "--decode", decode)


def test_perplexity_of_a_network_that_is_far_off_is_a_number(data, tmp_path, capsys):
    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    state = checkpoint(tmp_path / "run" / "ckpt.pt")
    for key in ("ln_f.weight", "wte.weight"):
        state["model"][key] *= 1e4
    torch.save(state, tmp_path / "run" / "ckpt.pt")
    load("gpt2").main(["--out", str(tmp_path / "run"), "--eval-only"])
    assert "nats a token" in capsys.readouterr().out


# --- several processes


def assert_close_run(a, b):
    """Two processes add in another order than one: losses are equal but for rounding."""
    assert steps(a) == steps(b)
    for column in ("train_loss", "val_loss"):
        pairs = [(float(one[column]), float(two[column])) for one, two in zip(rows(a), rows(b)) if one[column]]
        assert pairs and all(one == pytest.approx(two, abs=1e-4) for one, two in pairs), column


def test_a_killed_rank_ends_the_run_and_one_process_goes_on(data, tmp_path):
    more = ["--max-steps", 60, "--eval-interval", 2, "--dropout", 0]
    train("gpt2", data, tmp_path / "whole", *more)
    said, _ = soak.kill_rank(1, data, tmp_path / "run", tmp_path, *more)
    # Below and above it stands torchrun's own report.
    lines = [line for line in said.splitlines() if re.search("rank|process", line) and re.search("--resume|ckpt", line)]
    assert lines, said
    assert 0 < checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 60
    train("gpt2", data, tmp_path / "run", "--resume", *more)
    assert_close_run(tmp_path / "whole", tmp_path / "run")


def test_one_process_begins_two_go_on_until_ctrl_c_and_one_ends(data, tmp_path, monkeypatch):
    more = ["--max-steps", 60, "--eval-interval", 30, "--dropout", 0]
    train("gpt2", data, tmp_path / "whole", *more)
    gpt2, out = load("gpt2"), tmp_path / "run"
    with monkeypatch.context() as patch:
        rate = gpt2.learning_rate
        patch.setattr(gpt2, "learning_rate", lambda s, c: os.kill(os.getpid(), signal.SIGTERM) or rate(s, c))
        with pytest.raises(SystemExit):
            train("gpt2", data, out, *more)
    assert checkpoint(out / "ckpt.pt")["step"] == 1
    child = Child(tmp_path, *TORCHRUN, "gpt2.py", *argv("gpt2", data, out), *more, "--resume", pause=0.01)
    child.wait_for("step      5/")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to torchrun and to each of its workers
    until(lambda: child.code is not None, "end")
    stopped = checkpoint(out / "ckpt.pt")["step"]
    assert 5 <= stopped == steps(out)[-1]
    train("gpt2", data, out, "--resume", *more)
    assert_close_run(tmp_path / "whole", out)


# --- two of a kind in one folder


def test_a_second_training_in_the_folder_is_refused_and_the_first_goes_on(data, tmp_path):
    import sample

    out = tmp_path / "run"
    child = Child(tmp_path, "gpt2.py", *argv("gpt2", data, out), "--max-steps", 400, "--eval-interval", 50)
    child.wait_for("step      5/")
    child.set_pause(0.1)  # it will not be finished before the others have tried
    for resume in ([], ["--resume"]):
        line = refused(load("gpt2").main, *argv("gpt2", data, out), "--max-steps", 400, *resume)
        assert "--resume" in line and "--out" in line and str(out) in line and re.search("in use|using", line), line
    load("gpt2").main(["--out", str(out), "--eval-only"])  # looking is free
    sample.main(["--ckpt", str(out / "ckpt.pt"), "--prompt", "the", "--max-new-tokens", "2"])
    assert child.code is None, "too fast for this test"
    child.set_pause(0)
    child.end()
    assert steps(out) == list(range(1, 401))
    assert "--resume" in refused(load("gpt2").main, *argv("gpt2", data, out), "--max-steps", 400)


def test_of_two_trainings_started_at_once_one_trains(data, tmp_path):
    soak.start_twice(data, tmp_path)


def test_who_is_refused_leaves_the_folder_of_the_other_alone(data, tmp_path):
    gpt2, out = load("gpt2"), tmp_path / "run"
    with gpt2.claim(out):  # it has not written anything yet
        refused(gpt2.main, *argv("gpt2", data, out), "--max-steps", 1)
        assert out.is_dir()


def test_a_claim_of_a_dead_process_is_no_obstacle(data, tmp_path):
    out = tmp_path / "run"
    child = Child(tmp_path, "gpt2.py", *argv("gpt2", data, out), "--max-steps", 4, pause=0.5)
    until(lambda: out.exists() and any(out.iterdir()), "sign of a run")
    child.kill()  # before there is a checkpoint
    assert not (out / "ckpt.pt").exists()
    train("gpt2", data, out, "--max-steps", 4)
    train("gpt2", data, out, "--resume", "--max-steps", 6)
    assert steps(out) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("i", range(2))
def test_two_prepare_data_at_once_leave_one_whole_data_set(i, tmp_path):
    soak.prepare_twice(tmp_path)


# --- memory


def test_memory_and_open_files_stay_flat(data, tmp_path):
    import sample

    train("gpt2", data, tmp_path / "run", "--max-steps", 1)
    seen = []
    for n in (60, 120, 240):
        train("gpt2", data, tmp_path / "run", "--resume", "--max-steps", n, "--eval-interval", 30)
        for decode in sample.DECODERS * 2:
            options = ["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--prompt=the", "--max-new-tokens", "10"]
            sample.main([*options, "--decode", decode])
        seen.append(usage())
    _, (before, files), (after, files_after) = seen  # the first round warms up
    assert after - before < 8 and files_after <= files, seen


# --- portable


def test_spaces_letters_beyond_ascii_and_windows_line_endings_in_paths_text_and_sources(tmp_path):
    """What a checkout on Windows looks like, in a folder as people name theirs."""
    home = tmp_path / "Эта папка é 漢字"
    home.mkdir()
    for path in ROOT.glob("*.py"):
        (home / path.name).write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode())
    text = "première ligne\r\ndeuxième ligne, naïve\r\n" * 200
    (home / "mon texte.txt").write_bytes(text.encode())
    (home / "le début.txt").write_bytes("première\r\n".encode())

    def script(*command, **options):
        return Child(tmp_path, *command, cwd=home, **options).end()

    script("prepare_data.py", "mon texte.txt", "--tokenizer", "bpe:270")
    meta = data_is_whole(home / "data" / "mon texte")
    assert sum(n["bytes"] for n in meta["splits"].values()) == len(text.encode())
    script("gpt2.py", *argv("gpt2", "data/mon texte", "mes résultats/1"), "--max-steps", 2)
    for name in ("meta.json", "tokenizer.tiktoken"):  # an editor, or git, may do that
        path = home / "data" / "mon texte" / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    log = home / "mes résultats" / "1" / "log.csv"
    log.write_bytes(log.read_bytes().replace(b"\n", b"\r\n"))
    script("gpt2.py", "--out", "mes résultats/1", "--resume", "--max-steps", 4, "--log-interval", 1)
    assert steps(log.parent) == [1, 2, 3, 4] and b"\r" not in log.read_bytes()
    prompt = ["--prompt-file", "le début.txt", "--max-new-tokens", 5]
    out, _ = script("sample.py", "--ckpt", "mes résultats/1/ckpt.pt", *prompt)
    assert out.startswith("première")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_a_letter_stops_nothing(encoding, data, tmp_path):
    """cp1252 is what Windows gives a program whose output goes into a file."""
    out = tmp_path / "漢字"
    Child(tmp_path, "gpt2.py", *argv("gpt2", data, out), "--max-steps", 2, encoding=encoding).end()
    options = ["--ckpt", out / "ckpt.pt", "--max-new-tokens", 5]
    said, _ = Child(tmp_path, "sample.py", *options, "--prompt", "naïve 漢", encoding=encoding).end()
    assert said.startswith("na")


def test_a_read_only_data_folder_is_enough_and_a_read_only_out_is_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(data, folder / "set")
        for path in (*(folder / "set").iterdir(), folder / "set"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {p.name: p.stat().st_mtime_ns for p in (folder / "set").iterdir()}
        (folder / "text.txt").write_text("some text\n" * 100, encoding="utf-8")
        more = ["--max-steps", 2, "--check"]
        Child(folder, "gpt2.py", *argv("gpt2", folder / "set", folder / "run"), *more, humble=True).end()
        for command in (
            ["gpt2.py", *argv("gpt2", folder / "set", folder / "set" / "run"), *more],
            ["prepare_data.py", folder / "text.txt", "--out", folder / "set", "--tokenizer", "bytes"],
        ):
            _, error = Child(folder, *command, humble=True).end(1)
            assert "ermission" in error.splitlines()[-1] and "Traceback" not in error, error
        assert {p.name: p.stat().st_mtime_ns for p in (folder / "set").iterdir()} == before
        (folder / "set").chmod(0o755)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_every_text_file_is_opened_with_an_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
        constants = [n.value for a in given for n in ast.walk(a) if isinstance(n, ast.Constant)]
        words = [value for value in constants if isinstance(value, str)]
        if name.endswith(".open") and node.args and not any(re.fullmatch("[rwaxbt+]+", word) for word in words):
            continue  # of an archive, an address, a descriptor
        if name == "open" or name.endswith((".open", ".read_text", ".write_text", ".fdopen", "NamedTemporaryFile")):
            binary = any(re.fullmatch("[rwax+]*b[rwax+]*", word) for word in words)
            assert binary or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"
