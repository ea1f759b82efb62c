"""Faults that the tests must notice: each is planted alone in a copy of the repository. `make mutants`

    python tests/mutants.py            all of them, two at a time; some ten minutes
    python tests/mutants.py sample     those whose file or text has this word

A mutant is (old text, new text, which tests: pytest's -k). It ends with exit code 1 if a mutant
survives that EQUIVALENT has no reason for, or an old text is no longer there exactly once."""

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
MUTANTS = {}

# Mutants that no test can notice: {old text: reason}.
EQUIVALENT = {}


def plant(folder, files, old, new):
    """Replaces the text in a copy. Returns what the files were, or {} if old is not there once."""
    before = {}
    names = MODEL_FILES if files in ("training", "networks") else [files.removesuffix(".py")]
    for path in (folder / f"{name}.py" for name in names):
        text = path.read_text(encoding="utf-8")
        part = text
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
    """Runs the tests until one fails. Exit codes beside 0 and 1 are mistakes of this file."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [*test_files.split(), "-k", keyword]
    env = os.environ | dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder / "tests", env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), f"{test_files} -k '{keyword}': {done.stdout}{done.stderr}"
    return done.returncode == 0


def try_mutant(folders, files, test_files, old, new, keyword):
    """One line of the result. `folders` has the copies that are free."""
    folder = folders.get()
    try:
        before = plant(folder, files, old, new)
        if not before:
            return "GONE"
        survived = tests_pass(folder, test_files, keyword)
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
        return "SURVIVED" if survived else "noticed"
    finally:
        folders.put(folder)


def main():
    word = " ".join(sys.argv[1:])
    chosen = []
    for (files, test_files), mutants in MUTANTS.items():
        for old, new, keyword in mutants:
            if word in f"{files} {old} {new}":
                chosen.append((files, test_files, old, new, keyword))
    folders = Queue()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:
        for i in "12":
            ignored = shutil.ignore_patterns(".*", "data", "out", "__pycache__")
            folders.put(Path(shutil.copytree(ROOT, f"{parent}/{i}", ignore=ignored)))
        tried = [(each, pool.submit(try_mutant, folders, *each)) for each in chosen]
        bad = 0
        for (files, _, old, new, _), result in tried:
            found = result.result()
            if found == "SURVIVED" and old in EQUIVALENT:
                found = f"survives: {EQUIVALENT[old]}"
            bad += found.isupper()
            print(f"{found:9} {files}: {old!r} -> {new!r}", flush=True)
        for each in {(test_files, keyword) for _, test_files, _, _, keyword in chosen}:
            assert tests_pass(folders.queue[0], *each), f"{each} fails without a mutant, too"
    print(f"{len(chosen)} mutants, {bad} of them survived or have no place")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
