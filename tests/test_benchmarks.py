import re
from importlib.util import find_spec

import pytest
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks import machine, report
from benchmarks.speed import data as speed_data
from benchmarks.speed import depth as speed_depth
from benchmarks.speed import fairness as speed_fairness
from benchmarks.speed import features as speed_features
from benchmarks.speed import growth as speed_growth
from benchmarks.speed import hard as speed_hard
from benchmarks.speed import harness as speed_harness
from benchmarks.speed import hashing as speed_hashing
from benchmarks.speed import imports as speed_imports
from benchmarks.speed import recurrent as speed_recurrent
from benchmarks.speed import scale as speed_scale
from benchmarks.speed import soft as speed_soft
from benchmarks.speed.timing import Race
from tying.figures import new_figure
from tying.files import save_figure

SMALL = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--model.network.depth=20",
]
SMALL += ["--trainer.limit_test_batches=1", "--trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")


def test_speed(monkeypatch, capsys):
    monkeypatch.setattr(speed_soft, "PAIRS", 2)
    monkeypatch.setattr(speed_soft, "SIDE", 16)
    monkeypatch.setattr(speed_soft, "MIXTURE_WEIGHTS", 1000)
    quick = speed_soft.race
    monkeypatch.setattr(speed_soft, "race", lambda sides, **_: quick(sides, races=1, rounds=1))
    assert benchmarks.main(["speed", "soft"]) == 0
    out = capsys.readouterr().out
    assert "| gradient " in out
    assert re.search(r"^\| soft.yaml +\| +[\d.]+ \| [\d.]+ \(", out, re.MULTILINE)
    assert "| as the components begin " in out
    assert ("compiled / passes of exp" in out) == bool(find_spec("numba"))
    assert "Command: `python -m benchmarks speed soft`" in out


def test_speed_of_features(monkeypatch, capsys):
    for name, value in {"STEPS": 3, "SKIPPED": 1, "ROUNDS": 1}.items():
        monkeypatch.setattr(speed_features, name, value)
    monkeypatch.setattr(speed_features, "BATCH", 2)
    assert benchmarks.main(["speed", "features"]) == 0
    out = capsys.readouterr().out
    for name in speed_features.FEATURES:
        assert f"| {name} " in out


def test_speed_of_data(monkeypatch, capsys):
    quick = speed_data.race
    monkeypatch.setattr(speed_data, "race", lambda sides, **_: quick(sides, races=1, rounds=1))
    assert benchmarks.main(["speed", "data"]) == 0
    assert "| tying.data.CIFAR10, in memory " in capsys.readouterr().out


def test_speed_of_imports(monkeypatch, capsys):
    """Whether the ratio is small enough depends on the machine; tests/test_imports.py holds what is imported."""
    seconds = {"torch": 2.0, "tying": 2.1}
    monkeypatch.setattr(speed_imports, "PEERS", {"torch": "torch", "tying": "torch"})
    monkeypatch.setattr(speed_imports, "seconds_of", seconds.__getitem__)
    assert benchmarks.main(["speed", "imports"]) == 0
    assert "| import tying | 2.10 | 1.05 (1.05–1.05) | torch |" in capsys.readouterr().out


def test_speed_of_depth(monkeypatch, capsys):
    small = {"DEPTH": 8, "BATCH": 32, "BLOCKS": 2, "ROUNDS": 1, "KEEPS": (0.5,), "LAYERS": 2, "WIDTH": 32, "TOKENS": 8}
    for name, value in small.items():
        monkeypatch.setattr(speed_depth, name, value)
    quick = speed_depth.means
    monkeypatch.setattr(speed_depth, "means", lambda steps, rounds=1: quick(steps, 1))
    assert benchmarks.main(["speed", "depth"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.startswith("|")}
    assert {"plain", "stochastic depth, batch", "swapout", "torch's Dropout after each block", "0.5"} <= rows.keys()
    assert {"ViT, batch", "ViT, subset", "ViT, row", "ViT, DropPath", "GPT-2, batch", "GPT-2, subset"} <= rows.keys()
    assert {"encoder, repeats written out", "encoder, loop", "encoder, loop, norms of each pass"} <= rows.keys()
    held = {side: float(rows[side][5]) for side in ("plain", "stochastic depth, batch", "stochastic depth, row")}
    assert held["stochastic depth, batch"] <= held["plain"] <= held["stochastic depth, row"] + 1


def test_speed_of_recurrent_networks(monkeypatch, capsys):
    for name, value in {"BATCH": 2, "STEPS": 20, "SIZE": 8, "RANK": 2}.items():
        monkeypatch.setattr(speed_recurrent, name, value)
    quick = speed_recurrent.race
    monkeypatch.setattr(speed_recurrent, "race", lambda sides, **_: quick(sides, races=1, rounds=1))
    assert benchmarks.main(["speed", "recurrent"]) == 0
    out = capsys.readouterr().out
    assert out.count("| zoneout LSTM, rates 0.15 ") == out.count("| HM-LSTM, 3 layers ") == 2


@pytest.mark.slow
def test_speed_of_the_harness(monkeypatch, capsys):
    monkeypatch.setattr(speed_harness, "EPOCHS", 1)
    monkeypatch.setattr(speed_harness, "RUNS", 20)
    monkeypatch.setitem(benchmarks.SPEED, "harness", lambda: speed_harness.measure(SMALL[1:3] + SMALL[4:5]))
    quick = speed_harness.race
    monkeypatch.setattr(speed_harness, "race", lambda sides, **_: quick(sides, races=1, rounds=1))
    assert benchmarks.main(["speed", "harness"]) == 0
    out = capsys.readouterr().out
    assert "| the same by the harness " in out
    assert "| the same by a worker of a cluster " in out
    assert "A report over 20 runs, with plot and CSV, takes " in out


def test_speed_of_hard_ties(monkeypatch, capsys):
    monkeypatch.setattr(speed_hard, "PAIRS", 4)
    monkeypatch.setattr(speed_hard, "ROUNDS", 2)
    monkeypatch.setattr(speed_hard, "SIZES", (32, 16, 8))
    monkeypatch.setattr(speed_hard, "RELAXED_WIDTH", 64)
    assert benchmarks.main(["speed", "hard"]) == 0
    out = capsys.readouterr().out
    assert "| autoencoder 32–16–8, transposed | " in out
    assert "| 8 linear layers of 1024, plain  |   96.1 | 12.1 | 0.8741 | " in out
    assert "linear layers of 64 that share a weight up to a residual of rank 8, over separate layers:" in out
    assert "| 4 layers | " in out
    assert "| rank 32 of 64×64   | " in out
    assert "| two layers by hand | " in out


def test_speed_of_hashing(monkeypatch, capsys):
    monkeypatch.setattr(speed_hashing, "PAIRS", 3)
    monkeypatch.setattr(speed_hashing, "LINEAR", {(40, 20): (4,)})
    monkeypatch.setattr(speed_hashing, "CONVOLUTIONS", [(2, 3, 2, 6, 2)])
    monkeypatch.setattr(speed_hashing, "ROWS", 1000)
    assert benchmarks.main(["speed", "hashing"]) == 0
    out = capsys.readouterr().out
    assert "| 40×20, 4: uniform, ratio 0.1, stored " in out
    assert "| uniform, ratio 0.1, computed |                     0.1000 | " in out
    assert "| embedding of 1,000×64: blocks of 32, ratio 0.1 " in out
    assert "| uniform with sign, stored | " in out
    assert ("95 % interval, compiled" in out) == bool(find_spec("numba"))


@pytest.mark.slow
def test_speed_on_two_processes(monkeypatch, capsys):
    small = {"FAMILIES": {"stage-shared": ["hard.yaml"]}, "BATCH": 2, "STEPS": 4, "SKIPPED": 1, "ROUNDS": 1}
    for name, value in {**small, "WEIGHTS": 4096, "SIDE": 32}.items():
        monkeypatch.setattr(speed_scale, name, value)
    quick = speed_scale.race
    monkeypatch.setattr(speed_scale, "race", lambda sides, **_: quick(sides, races=1, rounds=1))
    assert benchmarks.main(["speed", "scale"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("|")}
    assert float(rows["stage-shared"][5]) == round(4 * 73882 / 1024)  # its own weights, once
    assert all(float(milliseconds) > 0 for milliseconds in rows["stage-shared"][:3])
    weights = 4 * 7e9 / 2**30
    held = {
        row: float(cells[1]) for row, cells in rows.items() if re.fullmatch(r"[ \d.]+", cells[-1]) and len(cells) == 7
    }
    assert held["untied"] == pytest.approx(weights / 8, abs=0.01)
    plain, transposed = (
        [float(cell) for cell in rows[row][1:]]
        for row in ("soft ties of all weights", "soft ties of all weights to transposes")
    )
    assert transposed[1] - plain[1] == pytest.approx(weights / 8 * 7 / 8, abs=0.1)
    assert transposed[4] - plain[4] == pytest.approx(weights / 64 * 63 / 64, abs=0.1)
    assert held["an anchor of all weights"] == pytest.approx(2 * weights / 8, abs=0.01)
    assert held["hashed at 1/16, index of 4 bytes stored"] == pytest.approx(weights * (1 + 1 / 128), abs=0.01)
    assert [float(cell) for cell in rows["hard ties of pairs"][1:]] == [1.63, 34.2, 0, 0.2, 38.5, 0]


def test_a_run_that_fails_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"fit --config=.* failed: .*nowhere\.yaml"):
        speed_scale.train(["nowhere.yaml"], 1)


def test_speed_says_how_fair_it_is(monkeypatch, capsys):
    monkeypatch.setattr(speed_fairness, "TRIALS", 2)
    monkeypatch.setattr(speed_fairness, "SECONDS", 0.002)
    assert benchmarks.main(["speed", "fairness"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| race") or "autorange" in line]
    assert len(rows) == 3
    assert all(float(ratio) > 0 for row in rows for ratio in re.findall(r"\d+\.\d{3}", row))


def test_unknown_family(capsys):
    assert benchmarks.main(["speed", "sofd"]) == 2
    assert (
        "unknown family 'sofd': there is data, depth, fairness, features, growth, hard, hashing, harness, imports, recurrent, scale, soft. Nearest"
        in capsys.readouterr().err
    )


def test_what_only_workers_share(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["run", "soft", "--shared"])
    assert "--shared is for the workers of an --executor" in capsys.readouterr().err


def test_race_statistics_by_hand():
    result = Race({"a": [2.0, 3.0, 8.0], "b": [1.0, 2.0, 2.0]})
    assert result.median("a") == 3.0
    assert result.told("a", "b") == "2.00 (1.50–4.00)"


def test_paste(tmp_path):
    report.write(tmp_path / "results" / "x.md", "new\n")
    assert report.paste("a\n<!-- results x -->\nold\n<!-- end -->\nb") == "a\n<!-- results x -->\nnew\n<!-- end -->\nb"
    with pytest.raises(ValueError, match=r"there is no y\.md"):
        report.paste("<!-- results y -->\n<!-- end -->")


RESULT = """| run  | n | accuracy |
|------|--:|---------:|
| soft | 3 |      0.5 |

Command: `python -m benchmarks run x`.

Claim: soft ties help: reproduced on 1 of 2 lines, undecided on the others.
"""


def test_paste_of_a_figure_and_a_verdict(tmp_path):
    report.write(tmp_path / "results" / "x.md", RESULT)
    page = "Soft: <!-- cell x :: soft :: accuracy -->?<!-- end -->, <!-- claim x :: soft ties help --><!-- end -->."
    pasted = report.paste(page)
    assert "accuracy -->0.5<!-- end -->, " in pasted
    assert "help -->reproduced on 1 of 2 lines, undecided on the others<!-- end -->." in pasted
    assert report.paste(pasted) == pasted
    assert "-->`python -m benchmarks run x`<!--" in report.paste("<!-- command x --><!-- end -->")
    with pytest.raises(ValueError, match=r"x\.md has no cell 'soft :: acuracy'\. .*: soft :: accuracy"):
        report.paste("<!-- cell x :: soft :: acuracy --><!-- end -->")
    with pytest.raises(ValueError, match=r"x\.md has no claim 'soft ties'"):
        report.paste("<!-- claim x :: soft ties --><!-- end -->")


def test_a_page_of_all_that_is_kept(tmp_path, monkeypatch):
    report.write(tmp_path / "results" / "soft.md", RESULT)
    report.write(tmp_path / "results" / "mine.md", RESULT)
    for name in ("soft_strength", "softer"):
        Image.new("RGB", (2, 2)).save(tmp_path / "results" / f"{name}.png")
    save_figure(new_figure(2, 2, "Accuracy against time"), tmp_path / "results" / "soft.png")
    pages = [tmp_path / f"{name}.md" for name in ("README", "GUIDE", "PAPERS")]
    for page in pages:
        page.write_text(
            f"# {page.stem}\n\n## Soft tying\n\n[row](results/soft.md) <!-- cell soft :: soft :: accuracy --><!-- end -->"
        )
    monkeypatch.setattr(benchmarks, "PAGES", pages)
    assert benchmarks.main(["readme"]) == 0
    assert all("-->0.5<!--" in page.read_text() for page in pages)
    written = (tmp_path / "results" / "README.md").read_text()
    assert (
        written.index("## Soft tying")
        < written.index("### soft\n")
        < written.index("![Accuracy against time](soft.png)")
        < written.index("![The picture of soft_strength](soft_strength.png)")
    )
    assert "### mine" in written
    assert "softer" not in written
    assert "Not kept yet: cifar10, " in written


def test_speed_by_size(tmp_path, monkeypatch, capsys):
    small = {"RACES": 1, "ROUNDS": 1, "BATCH": 2}
    small |= {"WIDTHS": (8, 16), "NUMBERS": (2, 4), "DEPTHS": (8, 14), "PAIRS": (20, 40)}
    for name, value in small.items():
        monkeypatch.setattr(speed_growth, name, value)
    assert benchmarks.main(["speed", "growth"]) == 0
    assert "| soft tie, gradient, 4 pairs " in capsys.readouterr().out
    with Image.open(tmp_path / "runs" / "speed_growth.png") as image:
        assert image.size[0] > 100


def test_machine():
    assert "cores of" in machine.describe()
