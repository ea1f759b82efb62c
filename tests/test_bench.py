"""The comparisons in bench/: what they replace, choose, count and resume, in a few steps."""

import math
import signal
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY, load, rows, run
from test_models import small

sys.path.insert(0, str(ROOT / "bench"))
pytest.importorskip("matplotlib")
import ablate
import compare
import runs
import train

OPTIONS = f"{' '.join(TINY)} --n-layer 1"
ROWS = []  # (experiment, cells of a row) of all pages
for experiment, page in [("full", "ablations"), ("march", "march"), ("stages", "stages")]:
    ROWS += [(experiment, row) for _, *found in ablate.read_tables(page) for row in found]


@pytest.mark.parametrize(("experiment", "row"), ROWS, ids=[row[0] for _, row in ROWS])
def test_each_row_is_found_in_the_model_file_and_the_result_learns(experiment, row, monkeypatch):
    file, command = ablate.EXPERIMENTS[experiment][2].split(" ", 1)
    changes, options = ablate.read_row(*row[1:])
    text = train.replace((ROOT / file).read_text("utf-8"), changes, row[0])
    module = types.ModuleType("changed")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, "changed", module)  # where dataclasses look
    exec(text, module.__dict__)
    torch.manual_seed(0)
    model = module.Model(module.parse(f"{command} {options} --vocab-size 64".split())[0])
    optimizer = module.configure_optimizer(model, model.cfg)
    idx = torch.randint(64, (2, 1)).repeat(1, 65)  # a text of one token, again and again
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    assert model(idx[:, :-1], idx[:, 1:]) < loss


def test_a_line_that_is_gone_is_named():
    for text in ("no such line", "import"):  # none, and too many
        with pytest.raises(SystemExit, match=f"a row: .* times: {text}"):
            train.replace((ROOT / "gpt2.py").read_text("utf-8"), [(text, "x")], "a row")
    assert sum(experiment == "full" for experiment, _ in ROWS) > 25  # and no row is overlooked


def test_all_models_have_four_layers_and_as_many_parameters_within_five_percent():
    sizes = {name: compare.count_parameters(compare.FINAL[name]) for name in compare.MODELS}
    for name, size in sizes.items():
        assert abs(size / sizes["gpt2"] - 1) < 0.05, name
        layers = str(compare.build(compare.FINAL[name]).cfg.n_layer).split(",")
        assert sum(map(int, layers)) == (12 if "12" in name else 4), name


def test_a_rate_is_not_stable_if_a_seed_ends_a_tenth_above_the_median():
    good = {(1.90, 1.95, 1.80), (1.90, 1.91, 1.50)}
    bad = {(1.90, 2.01, 1.85), (math.inf, math.inf, math.inf)}
    found = {ends: [(f"{bits} bits per byte", []) for bits in ends] for ends in good | bad}
    assert compare.unstable(found).keys() == bad


def test_rates_are_added_until_the_best_lies_between_two_others():
    def measure(pairs):
        return {(best, rate): abs(math.log(rate / best)) for best, rate in pairs}

    rates = {best: [0.5, 1.0, 2.0] for best in (1 / 8, 4)}
    assert runs.best_rates(rates, measure) == {1 / 8: 1 / 8, 4: 4}
    assert sorted(rates[1 / 8]) == [1 / 16, 1 / 8, 1 / 4, 0.5, 1, 2]
    assert runs.best_rates({1 / 8: [0.5, 1.0, 2.0]}, measure, widen=False) == {1 / 8: 0.5}


def test_a_token_costs_as_many_flops_as_nanogpt_counts():
    model = small("gpt2", vocab_size=512, block_size=64, n_layer=3, n_head=4, n_embd=64).train()
    with torch.autocast("cpu", torch.bfloat16):  # attention by formula: its products are counted
        flops = train.flops_per_token(model, *torch.randint(512, (2, 1, 64)))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.wpe.weight.numel()
    assert flops == 6 * matrices + 12 * 3 * 64 * 64


def test_a_constant_rate_serves_as_the_beginning_of_a_run_that_decays(data, tmp_path):
    runs.copy_code(tmp_path)
    options = f"{OPTIONS} --data {data} --learning-rate 1e-3 --max-steps"
    runs.train(tmp_path, "steady", f"bench/long.py steady gpt2.py {options} 8")
    runs.train(tmp_path, "decayed", f"bench/long.py decayed gpt2.py {options} 10", begin="steady")
    decayed = rows(tmp_path / "decayed")
    assert decayed[:8] == rows(tmp_path / "steady")
    assert [float(row["lr"]) for row in decayed[3:]] == pytest.approx([8e-4, *[1e-3] * 5, 5e-4])


def test_what_is_complete_is_not_trained_again_and_a_failure_is_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's handler stays
    command = f"{{}}.py {OPTIONS} --data {data} --max-steps 2 --learning-rate {{:g}}".format
    found = runs.train_all(tmp_path, [("gpt2", 1e-3), ("gpt2", 1e30)], command)
    assert runs.final(found["gpt2", 1e30], "bits per byte") == math.inf  # it diverged
    assert runs.final(("all of val: nan nats per token", []), "nats per token") == math.inf
    (tmp_path / "code/gpt2.py").write_text("raise SystemExit(1)")
    assert runs.train_all(tmp_path, [("gpt2", 1e-3)], command)["gpt2", 1e-3] == found["gpt2", 1e-3]
    with pytest.raises(SystemExit, match=r"gpt2.py .*: stopped"):
        runs.train_all(tmp_path, [("gpt2", 2e-3)], command)


def test_a_page_keeps_its_text_and_gets_new_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Measured: old\n\n    python a\n    python b\n\n| |\n| --- |\n| 1 |\n\nEnd\n")
    runs.fill_page(page, "results", "now", ["c"], [[["", "x"], ["y", 2]]])
    table = "|  | x |\n| --- | --- |\n| y | 2 |\n"
    assert page.read_text() == f"Measured: now\n\n    python c\n\n{table}\nEnd\n"


def test_plot_leaves_out_a_run_without_evaluation(tmp_path):
    for name, row in (("none", "1,64,6.0,,,1,1,1,1"), ("one", "1,64,6.0,5.5,3.1,1,1,1,1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(f"{load('gpt2').LOG}\n{row}\n")
    assert "none: no evaluation yet" in run("bench/runs.py", tmp_path / "none", tmp_path / "one")
    assert "No run" in run("bench/runs.py", tmp_path / "none", expect=1)
