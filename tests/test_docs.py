"""The Makefile and the README say what is there."""

import functools
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress

import pytest
import torch
from conftest import ROOT, load, train

sys.path.insert(0, str(ROOT / "bench"))
import exercises

PAGES = [ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))]


def test_make_prints_help_and_demo_passes_its_prompt_whole():
    pipes = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    text = subprocess.run(["make", "-s"], **pipes).stdout
    for target in ("demo", "data", "train", "test", "lint", "clean"):
        assert f"make {target}" in text
    command = ["make", "-s", "-o", ".venv/installed", "demo"]
    command += ["PY=printf '%s\\n'", 'PROMPT=it\'s a "q" (x']
    assert 'it\'s a "q" (x' in subprocess.run(command, **pipes).stdout.splitlines()


@functools.cache
def options_of(script):
    """The options of a script: those that its --help lists, or, in bench/, that its text has."""
    if "/" in script:
        text = (ROOT / script).read_text(encoding="utf-8")
    else:
        with redirect_stdout(io.StringIO()) as help_text, suppress(SystemExit):
            load(script.removesuffix(".py")).main(["--help"])
        text = help_text.getvalue()
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_exist_and_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"(?:python|nproc-per-node=\d+) ([\w/]+\.py)([^\n`#|]*)", text)
    for script, words in commands:
        for option in re.findall(r" (--[a-z][a-z-]+)", words):
            assert option in options_of(script), f"{script} {option}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):  # of pictures, too
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_what_an_exercise_changes_is_there_once_and_what_it_runs_exists():
    page = (ROOT / "results/exercises.md").read_text(encoding="utf-8")
    found = exercises.exercises(page)
    assert [number for number, *_ in found] == [*range(1, 18)]
    made = set()  # folders of trainings
    for number, file, changes, commands in found:
        assert commands and bool(file) == bool(changes), number
        if file:
            source = (ROOT / file).read_text(encoding="utf-8")
            compile(exercises.replace(source, changes, f"exercise {number}"), file, "exec")
        for script, *words in map(shlex.split, commands):
            assert (ROOT / script).exists(), script
            if "--out" in words:
                made.add(words[words.index("--out") + 1])
            if "--ckpt" in words:
                assert words[words.index("--ckpt") + 1].rpartition("/")[0] in made, words


def test_readme_is_short_and_its_diff_has_lines_of_the_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    block = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert 4 <= len(block) <= 15
    for line in block:
        file = {"-": "gpt2.py", "+": "mixer.py"}[line[0]]
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert line[1:].strip() in [other.strip() for other in lines], line


def test_the_python_block_in_readme_runs(data, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    train("gpt2", data, tmp_path / "out" / "demo", "--n-layer", 2, "--max-steps", 1)
    monkeypatch.chdir(tmp_path)
    names = {}
    capsys.readouterr()
    exec(block, names)
    said = capsys.readouterr().out
    assert said.startswith("def main(") and "nats per token" in said
    weights = names["weights"]  # (T, T)
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights)), atol=1e-5)
    assert (weights.triu(1) == 0).all()
