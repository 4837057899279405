"""Runs of a suite that a program does: several fits, or none."""

import csv
import os
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import __main__ as benchmarks
from benchmarks.declared import load
from benchmarks.folder import Folder
from benchmarks.program import parse_program
from tying.errors import ConfigurationError

PATHS = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
SUITE = """
program: faults.program
base: [{data: {class_path: faults.Few}}]
deltas: {slow: [{rate: 0.01}], fast: []}
axes: {rate: {key: rate, values: [0.1, 0.2], deltas: [fast]}}
figures: {sum: test/sum}
curves: [val/loss]
plots: [{name: rate, x: rate, y: test/sum}]
orders: [{claim: fast is further, y: test/sum, higher: "fast,rate=0.2", lower: slow}]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    (tmp_path / "mine.yaml").write_text(SUITE)


def figures(out):
    results = {path.name: Folder(path).result() for path in Path(out).iterdir() if path.is_dir()}
    rows = {name: Path(out, name, "metrics.csv").read_text() for name in results}
    return {name: (result["metrics"], result["parameters"], rows[name]) for name, result in results.items()}


def test_a_program_is_swept_killed_resumed_archived_and_judged(tmp_path, capsys):
    """As a fit is: the same figures whether it was killed or not, and put back elsewhere."""
    assert benchmarks.main(["run", "mine.yaml", "--out=out", "--jobs=2", "--save"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\| ([a-z].*?) +\| (\d) \| +-?\d", printed, re.MULTILINE)[:3] == [
        ("slow", "1"),
        ("fast, rate=0.1", "1"),
        ("fast, rate=0.2", "1"),
    ]
    assert "s / epoch" not in printed
    assert "Claim: fast is further: " in printed
    assert "Data: noise (key None)." in printed
    result = Folder(Path("out/slow,seed=0")).result()
    assert result["parameters"] == {"unique": 5, "virtual": 5, "bytes": 20}
    assert result["seconds"]["training"] == 1.5
    assert result["definition"]["program"] == "faults.program"
    assert result["definition"]["data key"]
    assert yaml.safe_load(Path("out/slow,seed=0/config.yaml").read_text())["rate"] == 0.01
    with Path("out/mine.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"] * 3
    assert {path.name for path in Path("results").glob("*.*")} == {"mine.csv", "mine.md", "mine.png", "mine_rate.png"}

    Path("armed").touch()
    assert benchmarks.main(["run", "mine.yaml", "--out=killed", "--only=slow,*"]) == 1
    Path("armed").unlink()
    assert benchmarks.main(["run", "mine.yaml", "--out=killed", "--only=slow,*"]) == 0
    assert Folder(Path("killed/slow,seed=0")).result()["attempts"] == 2
    assert figures("killed") == {"slow,seed=0": figures("out")["slow,seed=0"]}

    assert benchmarks.main(["restore", "mine.yaml", "--out=back"]) == 0
    assert figures("back") == figures("out")
    capsys.readouterr()
    assert benchmarks.main(["sizes", "mine.yaml", "--out=out"]) == 2
    assert "faults.program makes its models" in capsys.readouterr().err
    Path("mine.yaml").write_text(SUITE.replace("faults.program", "faults.silent"))
    assert benchmarks.main(["report", "mine.yaml", "--out=out"]) == 2
    assert "program is 'faults.program' there and 'faults.silent' here" in capsys.readouterr().err


def test_a_failed_run_is_tried_again(capsys):
    Path("mine.yaml").write_text("{program: faults.program, deltas: {all: [{fault: once}], bad: [{fault: raise}]}}")
    Path("armed").touch()
    assert benchmarks.main(["run", "mine.yaml", "--out=out", "--jobs=2", "--retry=1"]) == 1
    printed = capsys.readouterr().out
    assert [printed.count(f"failed: {name},seed=0: RuntimeError: it went wrong; see") for name in ("all", "bad")] == [
        1,
        2,
    ]
    assert "1 failed (bad,seed=0)." in printed
    assert Folder(Path("out/all,seed=0")).result()["attempts"] == 2


def test_a_program_is_planned_by_its_progress(capsys):
    assert benchmarks.main(["run", "mine.yaml", "--out=out", "--seeds=2", "--only=fast,*", "--plan"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\S+) +\| +2 \| +0 s \| +0.00 \| +\d+ \|$", printed, re.MULTILINE) == [
        "fast,rate=0.1",
        "fast,rate=0.2",
    ]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("suite", "printed"),
    [
        (SUITE.replace("faults.program", "faults.porgram"), "module faults has no function porgram"),
        (SUITE.replace("faults.program", "falts.program"), "program 'falts.program': No module named 'falts'"),
        (SUITE.replace("{rate: 0.01}", "{rat: 0.01}"), "slow: .*rat"),
        (SUITE.replace("{rate: 0.01}", "{rate: much}"), "slow: .*rate"),
        (SUITE + "seed_keys: [sead]", "slow: .*sead"),
        ("{like: demo, program: faults.program}", "program and like exclude each other"),
    ],
)
def test_mistakes_in_a_program(suite, printed, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(suite)
    assert benchmarks.main(["run", "mine.yaml", "--out=out"]) == 2
    assert re.search(printed, capsys.readouterr().err)
    assert not Path("out").exists()


def test_a_program_must_log_something_and_have_a_name(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("{program: faults.silent, deltas: {all: []}}")
    assert load("mine.yaml").seed_keys == ("seed",)
    assert benchmarks.main(["run", "mine.yaml", "--out=out"]) == 1
    assert "failed: all,seed=0: program 'faults.silent' has logged nothing" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="program 'run': Empty module name"):
        parse_program("run", [])
