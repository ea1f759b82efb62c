"""Runs the exercises of results/exercises.md, and writes what they print into the page.

    python bench/exercises.py          all of them: a quarter of an hour on two cores
    python bench/exercises.py 3 7      these two; most need what the first one has trained

An exercise has lines to change, as a diff, and commands. They run in out/exercises, on a copy of
the code in which this exercise alone is done. Of a training, the page gets the first step and the
loss of all of val.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time

from train import ROOT, machine, prepare, replace

FOLDER = ROOT / "out/exercises"
IGNORED = shutil.ignore_patterns(".*", "data", "out", "__pycache__")  # what is no code
PAGE = ROOT / "results/exercises.md"
SHOWN = re.compile(r"step 1/|step .* blocks, |all of |\w+\.py: |\|")  # of what a training prints


def exercises(page):
    """[(number, file, [(old text, new text)], commands)] of a page."""
    found = []
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        file = re.search(r"^In `(\w+\.py)`", section, re.M)
        diff = re.search(r"```diff\n(.*?)```", section, re.S)
        pairs = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff[1] if diff else "", re.M)
        changes = [[re.sub("^.", "", text, flags=re.M) for text in pair] for pair in pairs]
        commands = re.findall(r"^    python (.*)", section, re.M)
        found.append((int(section.split(".")[0]), file and file[1], changes, commands))
    return found


def run(command):
    """The lines that the page shows of what a command prints."""
    print("$ python", command, flush=True)
    words = [sys.executable, *shlex.split(command)]
    if "--out" in words and "--resume" not in words:  # a training of an earlier run
        shutil.rmtree(FOLDER / words[words.index("--out") + 1], ignore_errors=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = subprocess.run(words, cwd=FOLDER, **pipes).stdout.rstrip().splitlines()
    if "sample.py" not in command:
        lines = [line for line in lines if SHOWN.match(line)]
    print(*lines, sep="\n", flush=True)
    return lines[:20]


def main(numbers):
    prepare("prepare_data.py stdlib --out data/stdlib")
    page = PAGE.read_text(encoding="utf-8")
    start = time.perf_counter()
    for number, file, changes, commands in exercises(page):
        if numbers and number not in numbers:
            continue
        shutil.copytree(ROOT, FOLDER, ignore=IGNORED, dirs_exist_ok=True)
        if changes:
            source = replace((ROOT / file).read_text(encoding="utf-8"), changes, file)
            (FOLDER / file).write_text(source, encoding="utf-8")
        if not (FOLDER / "data").exists():
            (FOLDER / "data").symlink_to(ROOT / "data")
        printed = "\n".join(line for command in commands for line in run(command))
        begin = page.index("```text\n", page.index(f"\n## {number}. "))
        end = page.index("```", begin + 3)
        page = f"{page[:begin]}```text\n{printed}\n{page[end:]}"
    if not numbers:
        seconds = time.perf_counter() - start
        measured = f"Measured: {seconds / 60:.0f} minutes in all, {machine()}."
        page = re.sub("^Measured: .*", measured, page, count=1, flags=re.M)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
