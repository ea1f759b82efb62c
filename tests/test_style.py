"""The model files differ where their ideas do and nowhere else, and no line of them is dense."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import BANNER, MODEL_FILES, ROOT

# The definitions that may differ from those of the same name in gpt2.py.
IDEAS = {
    "mixer": "Config Block Model Cache",
    "progressive": "Config Attention Model learning_rate grow",
    "conv_attention": "Config Model Cache",
    "scratch_former": "Config Attention MLP Block Model Cache configure_optimizer learning_rate",
}
# Code tokens at most: how much is enough.
BUDGETS = {"gpt2": 5800, "mixer": 5400, "progressive": 6600, "conv_attention": 7100}
BUDGETS |= {"scratch_former": 7700, "prepare_data": 5300, "sample": 4100}
each_other = pytest.mark.parametrize("name", [name for name in MODEL_FILES if name != "gpt2"])


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODEL_FILES)
def test_imports_torch_numpy_and_the_standard_library_alone(name):
    nodes = [*ast.walk(ast.parse(source(name)))]
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names) | {"torch", "numpy"}


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
@pytest.mark.parametrize("name, most", [("mixer", 20), ("progressive", 15), ("conv_attention", 20)])
def test_a_diff_with_gpt2_has_few_hunks(name, most):
    command = ["diff", "gpt2.py", f"{name}.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert sum(line[0].isdigit() for line in lines) <= most


@each_other
def test_the_training_section_and_what_is_no_idea_of_a_file_are_the_text_of_gpt2(name):
    texts, found = (source(name), source("gpt2")), []
    training, its_training = (text.partition(BANNER)[2] for text in texts)
    assert training == its_training and training.endswith("    main()\n")
    for text in texts:
        nodes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        found.append({n.name: ast.get_source_segment(text, n) for n in nodes})
    ours, gpt2 = found
    for own in ours.keys() & gpt2.keys() - set(IDEAS[name].split()):
        assert ours[own] == gpt2[own], own
    if name == "progressive":  # its attention has other layers, and nothing else of its own
        plain = re.sub(r"LoRALinear\((.*), cfg\)", r"nn.Linear(\1)", ours["Attention"])
        assert plain == gpt2["Attention"].replace("values of all heads", "values")
    interface = re.search(r"# What every model file has.*?(?=\n\n\n)", texts[1], re.S)[0]
    assert interface in texts[0]


@each_other
def test_imports_and_the_options_of_a_run_are_those_of_gpt2(name):
    """Their comments, too, which are help texts. Defaults may differ."""
    imports, fields = [], []
    for text in (source(name), source("gpt2")):
        lines = re.search(r"import argparse.*?@dataclass", text, re.S)[0].splitlines()
        imports.append([line for line in lines if not line.startswith("from ")])
        options = re.search(r"    data: str.*?\n\n\n", text, re.S)[0].splitlines()
        pairs = [line.split("  # ") for line in options if line]
        fields.append({code.split(" = ")[0].strip(): comment for code, comment in pairs})
    assert imports[0] == imports[1]
    ours, gpt2 = fields
    own = {"dropout: float", "learning_rate: float", "warmup_steps: int"}
    assert all(ours[field] == gpt2[field] for field in ours.keys() & gpt2.keys() - own)
    assert gpt2.keys() - ours.keys() <= {"weight_decay: float"}


def tokens_per_line(text):
    """{line: tokens of code}. Comments and docstrings are no code; an f-string is one token."""
    counts, statement, inside = {}, [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "NEWLINE":
            if [token.type for token in statement] != [tokenize.STRING]:
                for part in statement:
                    counts[part.start[0]] = counts.get(part.start[0], 0) + 1
            statement = []
        elif kind not in ("NL", "COMMENT", "INDENT", "DEDENT", "ENDMARKER") and inside == 0:
            statement.append(token)
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")  # since Python 3.12
    return counts


@pytest.mark.parametrize("name", BUDGETS)
def test_code_is_within_its_budget_and_no_line_is_dense(name):
    """On average at most 11 tokens a line, and at most 6% of the lines have 25 or more."""
    text = source(name)
    counts = tokens_per_line(text)
    assert sum(counts.values()) <= BUDGETS[name]
    assert sum(counts.values()) / len(counts) <= 11
    assert sum(n >= 25 for n in counts.values()) <= 0.06 * len(counts)
    assert max(map(len, text.splitlines())) <= 100 and "# fmt:" not in text
    assert sum(tokens_per_line(text.partition(BANNER)[2]).values()) <= 3900  # training
