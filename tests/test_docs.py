"""The Makefile and the README say what is there."""

import re
import subprocess

import pytest
from conftest import ROOT


def test_make_prints_help():
    text = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "data", "train", "test", "lint", "clean"):
        assert f"make {target}" in text


def test_make_demo_passes_its_prompt_whole():
    command = ["make", "-s", "-o", ".venv/installed", "demo", "PY=printf '%s\\n'", 'PROMPT=it\'s a "q" (x']
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'it\'s a "q" (x' in said.splitlines()


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "results").glob("*.md")], ids=lambda page: page.stem)
def test_options_exist_and_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for script, options in re.findall(r"(?:python|nproc-per-node=\d+) ([\w/]+\.py)([^\n`#|]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r" --([a-z][a-z-]+)", options):
            assert f'"--{option}"' in source or f"    {option.replace('-', '_')}: " in source, f"{script} --{option}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):  # of pictures, too
        assert link.startswith("https://") or (page.parent / link).exists(), link
