import math
from pathlib import Path

import pytest

from benchmarks import experiment
from benchmarks.figures import draw_curves, draw_outcomes
from benchmarks.folder import FILES, Folder
from benchmarks.json_files import write_json
from benchmarks.suite import Axis, Suite
from benchmarks.summary import curves, spread, summarize
from benchmarks.sweep import Sweep
from tying.errors import ConfigurationError

MACHINE = {
    "hardware": "a machine",
    "threads": 1,
    "versions": dict.fromkeys(("Python", "torch", "lightning", "tying"), "1"),
}
SUITE = Suite("s", "", (), {"untied": (), "soft": ()}, {"lr": Axis("lr", (1, 2), ("untied", "soft"))}, figures={"accuracy": "test/accuracy", "gap": "tying/gap"})  # fmt: skip


def write(out, run, accuracy, key="1", epoch=2.0, machine=None, **metrics):
    folder = Folder(out / run.name)
    folder.path.mkdir()
    for name in FILES:
        (folder.path / name).write_text("something")
    result = {
        "name": run.name,
        "definition": {},
        "metrics": {"test/accuracy": accuracy, **metrics},
        "data": {"description": "images", "key": key},
        "machine": machine or MACHINE,
        "parameters": {"unique": 1000, "virtual": 2000, "bytes": 5 * 1024},
        "seconds": {"epoch": epoch, "training": 2 * epoch, "processor": 3 * epoch},
        "peak_memory": 3 * 2**20,
        "attempts": 1,
    }
    write_json(folder.path / "result.json", result)


def test_table_by_hand(tmp_path):
    runs = SUITE.runs(seeds=2)
    accuracies = {"untied": {1: (0.5, 0.6), 2: (0.2, 0.4)}, "soft": {1: (0.6, 0.9), 2: (0.1, None)}}
    for run in runs:
        accuracy = accuracies[run.delta][run.values["lr"]][run.seed]
        if accuracy is not None:
            write(tmp_path, run, accuracy, **({"tying/gap": 0.25} if run.delta == "soft" else {}))
    told = summarize(SUITE, runs, tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("|")]
    assert rows[0] == [
        "run",
        "n",
        "accuracy",
        "gap",
        "− untied",
        "parameters",
        "virtual",
        "KiB",
        "s / epoch",
        "peak MiB",
    ]
    rest = ["1,000", "2,000", "5", "2.0", "3"]
    assert rows[2:] == [
        ["untied, lr=1", "2", "0.5500 ± 0.0707", "–", "–", *rest],
        ["untied, lr=2", "2", "0.3000 ± 0.1414", "–", "–", *rest],
        ["soft, lr=1", "2", "0.7500 ± 0.2121", "0.2500 ± 0.0000", "+0.2000 (-1.0706 to +1.4706)", *rest],
        ["soft, lr=2", "1", "0.1000", "0.2500", "-0.1000", *rest],
    ]
    assert "Data: images (key 1)." in told
    assert "Missing are 1 of 8 runs: 1 pending (soft,lr=2,seed=1)." in told
    assert "different data" not in told


def test_differences_are_taken_at_the_same_values_of_the_axes_that_both_have(tmp_path):
    """Nowhere where several runs of the baseline could be meant, whether they are complete or not."""
    axes = {"lr": Axis("lr", (1, 2), ("wide", "narrow")), "strength": Axis("s", (3, 4), ("wide", "other"))}
    heights = {"base": {}, "wide": {"lr": 0.1, "strength": 0.01}, "narrow": {"lr": 0.2}, "other": {"strength": 0.03}}

    def gains(baseline):
        deltas = dict.fromkeys([baseline, *heights], ())
        suite = Suite("s", "", (), deltas, axes, figures={"accuracy": "test/accuracy"})
        (tmp_path / baseline).mkdir()
        for run in suite.runs(seeds=2):
            if (run.delta, run.seed) != ("narrow", 1) and run.name != "wide,lr=1,strength=4,seed=0":
                height = sum(share * run.values[axis] for axis, share in heights[run.delta].items())
                write(tmp_path / baseline, run, 0.5 + height)
        lines = summarize(suite, suite.runs(seeds=2), tmp_path / baseline).splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return {row[0]: row[3] for row in rows[2:]}

    assert gains("base") == {
        "base": "–",
        "wide, lr=1, strength=3": "+0.1300 (-inf to +inf)",
        "wide, lr=1, strength=4": "+0.1400",
        "wide, lr=2, strength=3": "+0.2300 (-inf to +inf)",
        "wide, lr=2, strength=4": "+0.2400 (-inf to +inf)",
        "narrow, lr=1": "+0.2000",
        "narrow, lr=2": "+0.4000",
        "other, strength=3": "+0.0900 (-inf to +inf)",
        "other, strength=4": "+0.1200 (-inf to +inf)",
    }
    against_narrow = gains("narrow")
    assert against_narrow["wide, lr=1, strength=3"] == "-0.0700 (n = 1)"
    assert against_narrow["wide, lr=1, strength=4"] == "–"  # of one seed there, of the other here
    assert against_narrow["base"] == against_narrow["other, strength=3"] == "–"
    assert gains("other")["wide, lr=2, strength=4"] == "+0.1200 (-inf to +inf)"


def test_different_data_is_told(tmp_path):
    first, second, *_ = SUITE.runs()
    write(tmp_path, first, 0.5)
    write(tmp_path, second, 0.5, key="2")
    told = summarize(SUITE, [first, second], tmp_path)
    assert "The runs used different data: their figures cannot be compared." in told


def test_failures_are_told(tmp_path):
    first, second, *_ = SUITE.runs()
    write(tmp_path, first, 0.5)
    write_json(tmp_path / second.name / "failure.json", {"error": "no room"})
    assert f"Missing are 1 of 2 runs: 1 failed ({second.name}). Failed: {second.name}: no room." in summarize(
        SUITE, [first, second], tmp_path
    )


def test_figures_default_to_those_of_the_test(tmp_path):
    suite = Suite("s", "", (), {"one": ()})
    [run] = suite.runs()
    write(tmp_path, run, 0.5, **{"val/loss": 1.0, "test/loss": 2.0})
    assert summarize(suite, [run], tmp_path).startswith("| run | n | test/accuracy | test/loss | parameters |")


def test_spread_by_hand():
    assert spread([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000"
    assert spread([-0.5]) == "-0.5000"
    assert spread([]) == "–"


def test_a_run_that_diverged_loses_no_table(tmp_path):
    runs = SUITE.runs(seeds=2)
    for run in runs:
        diverged = (run.delta, run.seed, run.values["lr"]) == ("soft", 0, 1)
        write(tmp_path, run, float("nan" if diverged else "0.5"), **{"tying/gap": float("inf" if diverged else "0.25")})
        (tmp_path / run.name / "metrics.csv").write_text(f"epoch,tying/gap\n0,{'-inf' if run.seed else 'inf'}\n")
    [row] = [line for line in summarize(SUITE, runs, tmp_path).splitlines() if line.startswith("| soft, lr=1")]
    assert [cell.strip() for cell in row.split("|")][2:6] == ["2", "nan ± nan", "nan ± nan", "nan"]
    for draw in (draw_curves, draw_outcomes):
        draw(curves(runs, tmp_path), ["tying/gap"], tmp_path / "p.png")


def test_what_the_last_epoch_has_not_logged_is_what_came_out(tmp_path):
    run, *_ = SUITE.runs()
    write(tmp_path, run, 0.5, **{"val/loss": 0.25, "train/loss": 1.0})
    (tmp_path / run.name / "metrics.csv").write_text("epoch,val/loss,train/loss\n0,0.25,2.0\n1,,1.0\n")
    first, last = curves([run], tmp_path).to_dict("records")
    assert (first["val/loss"], last["val/loss"], last["train/loss"]) == ("0.25", "0.25", "1.0")
    assert math.isnan(first["test/accuracy"])
    assert last["test/accuracy"] == "0.5"
    assert (last["seconds / epoch"], last["seconds of training"]) == ("2.0", "4.0")
    assert last["processor seconds of training"] == "6.0"


def test_results_of_other_versions_are_not_mixed(tmp_path):
    first, second, third = SUITE.runs()[:3]
    write(tmp_path, first, 0.5)
    write(tmp_path, second, 0.5)
    write(tmp_path, third, 0.5, machine={**MACHINE, "versions": {**MACHINE["versions"], "torch": "0.1"}})
    told = f"different versions.*torch {MACHINE['versions']['torch']}: 2 runs, .*torch 0.1: 1 run, {third.name}"
    with pytest.raises(ConfigurationError, match=told):
        summarize(SUITE, [first, second, third], tmp_path)
    assert summarize(SUITE, [first, second], tmp_path)


def test_runs_of_other_versions_are_not_added(tmp_path):
    """Before hours are spent on them."""
    first, *_ = runs = SUITE.runs()
    write(tmp_path, first, 0.5)
    with pytest.raises(
        ConfigurationError, match=r"different versions.* torch 1: 1 run, .*torch .*: 1 run, those to come"
    ):
        experiment.check(Sweep(SUITE, runs, tmp_path))


def test_nothing_is_complete():
    with pytest.raises(ValueError, match="no run of suite s is complete in nowhere"):
        summarize(SUITE, SUITE.runs(), Path("nowhere"))
