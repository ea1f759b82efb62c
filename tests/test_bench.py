"""The comparisons in bench/: what they replace, choose, count and resume. They train for hours, so
here are their parts, and trainings of a few steps."""

import importlib.util
import math
import signal
import sys

import pytest
import torch
from conftest import ROOT, TINY, load, rows, run

sys.path.insert(0, str(ROOT / "bench"))
pytest.importorskip("matplotlib")
import ablate
import compare
import runs
import train

PAGES = {"ablations": "gpt2", "march": "scratch_former"}
ROWS = []  # (model file, row) of both pages
for page, model_file in PAGES.items():
    ROWS += [(model_file, row) for _, *table in ablate.read_tables(page) for row in table]


def test_the_price_of_every_line_has_some_thirty_rows():
    assert sum(name == "gpt2" for name, _ in ROWS) > 25


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[row[0] for _, row in ROWS])
def test_each_row_is_found_in_the_model_file_and_the_result_learns(
    name, row, tmp_path, monkeypatch
):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    changes, options = ablate.read_row(*row[1:4])
    text = train.replace(source, changes, row[0])
    assert (text != source) == bool(changes)
    path = tmp_path / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed", module)  # where dataclasses look
    spec.loader.exec_module(module)

    _, _, command, *_ = ablate.EXPERIMENTS["full" if name == "gpt2" else "march"]
    options = f"{command.split(' ', 1)[1]} {options} --dtype float32 --vocab-size 64".split()
    torch.manual_seed(0)
    cfg = module.parse(options)[0]
    model = module.Model(cfg)
    optimizer = module.configure_optimizer(model, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    idx = torch.randint(64, (2, 1)).repeat(1, 65)  # a text of one token, again and again
    losses = []
    for _ in range(3):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_line_that_gpt2_no_longer_has_is_named():
    for text in ("no such line", "import"):  # none, and too many
        with pytest.raises(SystemExit, match=f"a row: .* times: {text}"):
            train.replace((ROOT / "gpt2.py").read_text(), [(text, "x")], "a row")


def test_all_models_have_four_layers_and_as_many_parameters_within_five_percent():
    sizes = {name: compare.count_parameters(compare.FINAL[name]) for name in compare.MODELS}
    for name, size in sizes.items():
        assert abs(size / sizes["gpt2"] - 1) < 0.05, name
        layers = compare.build(compare.FINAL[name]).cfg.n_layer
        layers = sum(map(int, str(layers).split(",")))
        assert layers == (12 if "12" in name else 4), name


def end(bits):
    """A training as runs.train returns it, that ended with so many bits per byte."""
    return f"all of val: 1.5 nats per token, {bits} bits per byte; perplexity 2 per token\n", []


def test_a_rate_is_not_stable_if_a_seed_ends_a_tenth_above_the_median():
    settings = {
        "close": [end(1.90), end(1.95), end(1.80)],
        "one seed high": [end(1.90), end(2.01), end(1.85)],
        "one seed low": [end(1.90), end(1.91), end(1.50)],
        "diverged": [end("inf"), end("inf"), end("inf")],
    }
    assert set(compare.unstable(settings)) == {"one seed high", "diverged"}


def test_rates_are_added_until_the_best_lies_between_two_others():
    asked = []

    def measure(pairs):
        asked.append(pairs)
        best = {"low": 1 / 8, "high": 4.0}
        return {(name, rate): abs(math.log(rate / best[name])) for name, rate in pairs}

    rates = {"low": [0.5, 1.0, 2.0], "high": [0.5, 1.0, 2.0]}
    assert runs.best_rates(rates, measure) == {"low": 1 / 8, "high": 4.0}
    assert sorted(rates["low"]) == [1 / 16, 1 / 8, 1 / 4, 0.5, 1, 2]
    assert sorted(rates["high"]) == [0.5, 1, 2, 4, 8]
    assert runs.best_rates({"low": [0.5, 1.0, 2.0]}, measure, widen=False) == {"low": 0.5}


def test_a_token_costs_as_many_flops_as_nanogpt_counts():
    cfg = load("gpt2").Config(vocab_size=512, block_size=64, n_layer=3, n_head=4, n_embd=64)
    model = load("gpt2").Model(cfg)
    idx, targets = torch.randint(512, (2, 1, 64))
    with torch.autocast("cpu", torch.bfloat16):  # attention by formula: its products are counted
        flops = train.flops_per_token(model, idx, targets)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.wpe.weight.numel()
    assert flops == 6 * matrices + 12 * 3 * 64 * 64


def test_a_part_of_a_card_has_no_known_peak():
    names = ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    peaks = [next((train.PEAKS[key] for key in train.PEAKS if key in name), None) for name in names]
    assert peaks == [756, 989, None]


def test_machine_needs_no_younger_torch(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert torch.__version__ in train.machine()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for trainings, from which the comparisons start as from the repository's root."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.symlink_to(file)
    runs.copy_code.cache_clear()
    handler = signal.getsignal(signal.SIGTERM)  # side_by_side sets its own
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def tiny(data):
    """Options of a tiny run; the comparisons add --out."""
    return f"{' '.join(TINY)} --data {data} --n-layer 1"


def test_a_constant_rate_serves_as_the_beginning_of_a_run_that_decays(data, folder):
    runs.copy_code("out")
    command = f"bench/long.py KIND gpt2.py {tiny(data)} --learning-rate 1e-3 --max-steps"
    runs.train("out", "steady", f"{command} 8".replace("KIND", "steady"))
    runs.train("out", "decayed", f"{command} 10".replace("KIND", "decayed"), begin="steady")
    steady = rows(folder / "out/steady")
    decayed = rows(folder / "out/decayed")
    assert decayed[:8] == steady
    rates = [float(row["lr"]) for row in decayed]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, *[1e-3] * 5, 5e-4])


def test_what_is_complete_is_not_trained_again_and_a_failure_is_told(data, folder):
    def command(name, rate):
        return f"{name}.py {tiny(data)} --max-steps 2 --learning-rate {rate:g}"

    found = runs.train_all("out", [("gpt2", 1e-3), ("gpt2", 1e30)], command)
    assert runs.final(found["gpt2", 1e-3], "nats per token") < 7
    assert runs.final(found["gpt2", 1e30], "bits per byte") == math.inf  # it diverged
    (folder / "out/code/gpt2.py").write_text("raise SystemExit(1)")
    assert runs.train_all("out", [("gpt2", 1e-3)], command)["gpt2", 1e-3] == found["gpt2", 1e-3]
    with pytest.raises(SystemExit, match=r"gpt2.py .*: stopped"):
        runs.train_all("out", [("gpt2", 2e-3)], command)


def test_a_page_keeps_its_text_and_gets_new_numbers(folder):
    (folder / "results").mkdir()
    page = folder / "results/page.md"
    page.write_text(
        "# Title\n\nMeasured: old\n\n    python a\n    python b\n\n| |\n| --- |\n| 1 |\n\nEnd\n"
    )
    runs.fill_page("page.md", "results", "today", ["c", "d", "e"], [[["", "x"], ["y", 2]]])
    wanted = "# Title\n\nMeasured: today\n\n    python c\n    python d\n    python e\n\n"
    assert page.read_text() == wanted + "|  | x |\n| --- | --- |\n| y | 2 |\n\nEnd\n"


def test_plot_leaves_out_a_run_without_evaluation(tmp_path):
    header = load("gpt2").LOG
    for name, row in (("none", "1,64,6.0,,,1,1,1,1"), ("one", "1,64,6.0,5.5,3.1,1,1,1,1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(f"{header}\n{row}\n")
    said = run("bench/runs.py", tmp_path / "none", tmp_path / "one")
    assert said == f"{tmp_path / 'none'}: no evaluation yet, not drawn\n"
    assert "No run" in run("bench/runs.py", tmp_path / "none", expect=1)
