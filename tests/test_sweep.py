import csv
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks.folder import Folder, difference

PATHS = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
TINY = """
deltas:
  untied: [tiny.yaml, {trainer.callbacks.strength: 0.0}]
  soft: [tiny.yaml]
axes:
  strength: {key: trainer.callbacks.strength, values: [1.0e-3, 1.0e-1], deltas: [soft]}
seed_keys: [seed_everything, data.seed]
figures: {accuracy: test/accuracy, gap: tying/gap}
curves: [val/accuracy, tying/gap]
"""
CONFIG = """
trainer:
  max_epochs: 3
  limit_train_batches: 4
  limit_test_batches: 1
  limit_val_batches: 1
  log_every_n_steps: 1
  enable_model_summary: false
  callbacks:
    - class_path: tying.callbacks.RandomState
    - class_path: tying.callbacks.TyingMonitor
    - class_path: faults.Fault
      init_args: {armed: armed, kind: raise}
    - class_path: tying.callbacks.SoftTying
      init_args: {ties: ["network.3.weight ~ network.5.weight"]}
model:
  class_path: tying.models.Classifier
  init_args: {network: {class_path: tying.models.MLP, init_args: {sizes: [64, 8, 8, 8, 10]}}}
data: {class_path: faults.Few}
"""
NAMES = [f"{setting},seed=0" for setting in ("untied", "soft,strength=0.001", "soft,strength=0.1")]
FILES = {
    *("definition.json", "config.yaml", "configs", "logs", "metrics.csv", "log.txt", "progress.json", "checkpoints"),
    *("result.json", "lock"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "mine.yaml").write_text(TINY)


def run(*arguments, jobs=2):
    return benchmarks.main(["run", "mine.yaml", f"--jobs={jobs}", *arguments])


def figures(folder):
    """Return what is the same however often a run was interrupted."""
    result = Folder(folder).result()
    with (folder / "metrics.csv").open() as file:
        rows = [
            {key: value for key, value in row.items() if not key.endswith("seconds")} for row in csv.DictReader(file)
        ]
    metrics = {key: value for key, value in result["metrics"].items() if not key.endswith("seconds")}
    return metrics, result["data"], result["parameters"], rows


def compare(out, other):
    names = sorted(path.name for path in Path(other).iterdir() if path.is_dir())
    assert sorted(path.name for path in Path(out).iterdir() if path.is_dir()) == names
    for name in names:
        assert figures(Path(out, name)) == figures(Path(other, name))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The runs, done once without any trouble."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setenv("PYTHONPATH", PATHS)  # for the process that the runs are forked from
        Path("tiny.yaml").write_text(CONFIG)
        Path("mine.yaml").write_text(TINY)
        assert run("--out=out") == 0
    return out / "out"


def test_run_and_report(undisturbed, capsys):
    out = undisturbed
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(NAMES)
    for name in NAMES:
        assert {path.name for path in (out / name).iterdir()} == FILES
        assert not list((out / name).glob(".*"))
        result = Folder(out / name).result()
        assert result["exit"] == "complete"
        assert result["attempts"] == 1
        assert result["data"]["description"] == "a hundred random images"
        assert result["machine"]["versions"]["torch"] in result["machine"]["versions"].values()
        assert result["parameters"]["unique"] == 64 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 10 + 10
        assert 0 < result["seconds"]["training"] < result["seconds"]["last attempt"]
        assert result["seconds"]["processor"] > 0
        assert result["peak_memory"] > 2**26
        _, _, _, rows = figures(out / name)
        assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8"), ("3", "12")]
        assert float(rows[-1]["val/accuracy"]) == result["metrics"]["val/accuracy"]
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert config["trainer"]["max_epochs"] == 3
        assert Folder(out / name).progress().items() >= {"share": 1.0, "epoch": 3, "step": 12, "left": 0.0}.items()
        assert Folder(out / name).progress()["loss"] > 0
    gaps = [Folder(out / name).result()["metrics"]["tying/gap"] for name in NAMES]
    assert gaps == sorted(gaps, reverse=True)  # untied, weakly, strongly
    assert benchmarks.main(["report", "mine.yaml", f"--out={out}", "--save"]) == 0
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")] == [
        "run",
        "untied",
        "soft, strength=0.001",
        "soft, strength=0.1",
    ]
    assert "Command: `python -m benchmarks run mine.yaml --seeds 1" in printed
    assert Path("results/mine.md").read_text().strip() in printed
    with Path("results/mine.csv").open() as file:
        assert [(row["run"], row["epoch"]) for row in csv.DictReader(file)] == [
            ("untied", "3"),
            ("soft,strength=0.001", "3"),
            ("soft,strength=0.1", "3"),
        ]
    with Image.open(out / "mine.png") as image:
        assert image.size[0] > 100
    with (out / "mine.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["strength"], row["epoch"]) for row in rows[3:5]] == [
        ("soft,strength=0.001", "0.001", "1"),
        ("soft,strength=0.001", "0.001", "2"),
    ]
    assert [bool(row["test/accuracy"]) for row in rows] == [False, False, True] * 3


def test_runs_are_kept_and_put_back(undisturbed, tmp_path, capsys):
    """What was saved is a report's own again, elsewhere; runs that are there are left alone, a lost one comes back."""
    assert benchmarks.main(["report", "mine.yaml", f"--out={undisturbed}", "--save"]) == 0
    archive = Path("results/runs/mine.tar.xz")
    before, content = capsys.readouterr().out.partition("Written")[0], archive.read_bytes()
    assert benchmarks.main(["restore", "mine.yaml", "--out=elsewhere"]) == 0
    assert capsys.readouterr().out == "3 runs put back in elsewhere\n"
    assert benchmarks.main(["report", "mine.yaml", "--out=elsewhere", "--save"]) == 0
    assert capsys.readouterr().out.partition("Written")[0] == before
    assert archive.read_bytes() == content
    shutil.rmtree(Path("elsewhere", NAMES[1]))
    Path("elsewhere", NAMES[0], "result.json").unlink()
    assert benchmarks.main(["restore", "mine.yaml", "--out=elsewhere"]) == 0
    assert capsys.readouterr().out == "1 runs put back in elsewhere\n"
    assert not Path("elsewhere", NAMES[0], "result.json").exists()
    assert benchmarks.main(["report", "mine.yaml", "--out=elsewhere", "--save"]) == 0
    assert archive.read_bytes() == content  # a run that is no longer there is not lost


def test_kept_runs_that_cannot_be_put_back(tmp_path, capsys):
    assert benchmarks.main(["restore", "mine.yaml"]) == 2
    assert "there is no results/runs/mine.tar.xz; runs are kept in folders of these names: none" in (
        capsys.readouterr().err.replace(f"{tmp_path}/", "")
    )
    archive = Path("results/runs/mine.tar.xz")
    archive.parent.mkdir(parents=True)
    for content in (b"", b"nonsense", lzma.compress(b"nonsense")[:-3]):
        archive.write_bytes(content)
        assert benchmarks.main(["restore", "mine.yaml", "--out=out"]) == 2
        assert "mine.tar.xz is truncated or corrupted" in capsys.readouterr().err
        assert not list(Path("out").iterdir())


def test_a_plan_times_steps_and_starts_nothing(capsys):
    assert (
        run("--out=out", "--seeds=5", "--plan", "--trainer.max_epochs=1000000", "--trainer.limit_train_batches=5") == 0
    )
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+) +\| +5 \| +(\d+\.\d) h \| +(\d+\.\d+) \| +\d+ \|$", printed, re.MULTILINE)
    assert [setting for setting, _, _ in rows] == ["untied", "soft,strength=0.001", "soft,strength=0.1"]
    assert all(float(hours) == pytest.approx(5 * float(of_a_run), abs=0.3) for _, of_a_run, hours in rows)
    assert re.search(
        r"^15 runs, 2 at a time: \d+\.\d+ h and \d\.\d GiB, without validation and test\.$", printed, re.MULTILINE
    )
    assert not Path("out").exists()


def test_what_is_complete_is_left_alone(undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/**/*")}
    assert run(f"--out={undisturbed}") == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/**/*")} == before


@pytest.mark.parametrize("kind", ["raise", "kill", pytest.param("disk", marks=pytest.mark.slow)])
def test_failures_stay_alone_and_are_retried(kind, undisturbed, tmp_path, capfd):
    config = CONFIG.replace("kind: raise", f"kind: {kind}")
    (tmp_path / "tiny.yaml").write_text(config.replace("armed: armed", "armed: never"))
    (tmp_path / "faulty.yaml").write_text(config)
    suite = TINY.replace("soft: [tiny.yaml]", "soft: [faulty.yaml]").replace("1.0e-3, ", "")
    (tmp_path / "mine.yaml").write_text(suite)
    (tmp_path / "armed").touch()
    assert run("--out=out", jobs=1) == 1
    said = {
        "raise": "RuntimeError: it went wrong; see out/soft,strength=0.1,seed=0/log.txt",
        "kill": "its process was killed by a signal",
        "disk": "File too large",
    }
    printed = capfd.readouterr().out
    assert re.search(rf"failed: soft,strength=0.1,seed=0: .*{said[kind]}", printed)
    assert re.search(r"Missing are 1 of 2 runs: 1 (failed|interrupted) \(", printed)
    assert "| untied | 1 |" in printed
    (tmp_path / "armed").unlink()
    assert run("--out=out", jobs=1) == 0
    compare_one = Path("out", "soft,strength=0.1,seed=0")
    assert Folder(compare_one).result()["attempts"] == 2
    assert "Restored all states from the checkpoint" in (compare_one / "log.txt").read_text()
    assert figures(compare_one) == figures(undisturbed / compare_one.name)
    assert [path.name for path in Folder(compare_one).checkpoints()] == ["epoch=2.ckpt"]


def test_an_unusable_folder_stays_alone(tmp_path, capfd):
    Path("out").mkdir()
    Path("out", NAMES[1]).write_text("in the way")
    assert run("--out=out") == 1
    printed = capfd.readouterr().out
    assert f"failed: {NAMES[1]}: FileExistsError" in printed
    assert "Missing are 1 of 3 runs" in printed
    Path("out", NAMES[1]).unlink()
    Path("out", NAMES[0], "metrics.csv").unlink()
    assert run("--out=out") == 1
    printed = capfd.readouterr().out
    assert f"failed: {NAMES[0]}: out/{NAMES[0]} is complete, but lacks metrics.csv. Remove the run's folder" in printed
    assert Path("out", NAMES[0], "result.json").exists()


def test_conflicting_definitions(undisturbed, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("max_epochs: 3", "max_epochs: 4"))
    for command in (["run"], ["report"]):
        assert benchmarks.main([*command, "mine.yaml", f"--out={undisturbed}"]) == 2
        printed = capsys.readouterr().err
        assert (
            f"{undisturbed}/untied,seed=0 holds a run of another definition: trainer.max_epochs is 3 there and 4 here (and 2 more). Give another --out, or remove what is there"
            in printed
        )
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    assert run(f"--out={undisturbed}", f"--data={tmp_path}") == 2
    assert f"data is 'configured' there and '{tmp_path.name}' here" in capsys.readouterr().err


def test_other_data_of_the_same_name_is_refused(undisturbed, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("faults.Few", "faults.Other"))
    one = tmp_path / "one" / "images"
    other = tmp_path / "other" / "images"
    for root in (one, other):
        root.mkdir(parents=True)
    (other / "other").touch()
    assert run("--out=out", "--only=untied,*", f"--data={one}") == 0
    assert "| untied | 1 |" in capsys.readouterr().out
    assert run("--out=out", "--only=untied,*", f"--data={other}") == 2
    assert re.search("data key is '[0-9a-f]{8}' there and '[0-9a-f]{8}' here", capsys.readouterr().err)


def test_rows_hold_what_was_logged_in_their_epoch(tmp_path, capsys):
    """Also by the module's own hook, and not what an earlier epoch left behind; the same after an interruption."""
    config = CONFIG.replace("max_epochs: 3", "max_epochs: 3\n  check_val_every_n_epoch: 2")
    config = config.replace("tying.models.Classifier", "faults.Logs").replace("kind: raise", "kind: kill")
    for out in ("whole", "parts"):
        (tmp_path / "tiny.yaml").write_text(config)
        assert run(f"--out={out}", "--only=untied,*") == 0
    (tmp_path / "armed").touch()
    assert run("--out=killed", "--only=untied,*") == 1
    (tmp_path / "armed").unlink()
    assert run("--out=killed", "--only=untied,*") == 0
    _, _, _, rows = figures(Path("whole", NAMES[0]))
    assert [row["own/epoch"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert [bool(row["val/accuracy"]) for row in rows] == [False, True, False]
    assert figures(Path("killed", NAMES[0])) == figures(Path("whole", NAMES[0]))
    assert "val/accuracy" in Folder(Path("whole", NAMES[0])).result()["metrics"]


@pytest.mark.slow
def test_random_state_is_kept_whatever_the_configuration_says(tmp_path):
    config = CONFIG.replace("    - class_path: tying.callbacks.RandomState\n", "").replace("kind: raise", "kind: kill")
    (tmp_path / "tiny.yaml").write_text(config.replace("tying.models.Classifier", "faults.Noisy"))
    assert run("--out=whole", "--only=untied,*") == 0
    (tmp_path / "armed").touch()
    assert run("--out=parts", "--only=untied,*") == 1
    (tmp_path / "armed").unlink()
    assert run("--out=parts", "--only=untied,*") == 0
    assert Folder(Path("parts", NAMES[0])).result()["attempts"] == 2
    compare("parts", "whole")


def test_files_may_change_while_a_sweep_runs(tmp_path):
    """The first run edits the file; those after it go by what was read at first."""
    config = CONFIG.replace("kind: raise", f"kind: edit, path: {tmp_path / 'tiny.yaml'}")
    (tmp_path / "tiny.yaml").write_text(config)
    (tmp_path / "armed").touch()
    assert run("--out=out", jobs=1) == 2  # only the report sees another definition
    assert "max_epochs: 1" in (tmp_path / "tiny.yaml").read_text()
    assert [len(figures(Path("out", name))[3]) for name in NAMES] == [3, 3, 3]


@pytest.mark.slow
def test_two_definitions_started_together_are_not_mixed(tmp_path):
    runners = [
        start("out", f"--trainer.max_epochs={epochs}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for epochs in (2, 3)
    ]
    printed = [runner.communicate()[0] for runner in runners]
    assert any("holds a run of another definition" in text for text in printed)
    assert sorted(runner.returncode for runner in runners)[1] in (1, 2)


def test_errors_of_any_length_are_told(tmp_path, capfd):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("kind: raise", "kind: long"))
    (tmp_path / "armed").touch()
    assert run("--out=out", "--only=untied,*") == 1
    printed = capfd.readouterr().out
    assert "RuntimeError: long long long" in printed
    assert len(printed) < 5000


def test_difference_by_hand():
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b is 2 there and 3 here"
    assert difference({"a": 1}, {"a": 1, "b": None}) == "b is not set there and None here"
    assert difference([1], [1, 2]) == "[1] is not set there and 2 here"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--model.lrr=1"], r"untied: .*lrr"),
        (["--trainer.callbacks.ties=[network.9.weight ~ network.5.weight]"], "untied: .*network.9.weight.*matches no"),
        (["--jobs=0"], "jobs must be 1 or more, not 0"),
        (["--data=nowhere"], "--data: there is no nowhere; give the data module's root, or 'sample'"),
        (["--only=sotf*"], r"no run of suite mine fits 'sotf\*'"),
        (["--trainer.max_epochs=none"], "untied: .*max_epochs"),
        (["--trainer.devices=2", "--trainer.accelerator=cpu"], "untied: a run trains in one process: set devices"),
        (["--trainer.callbacks+=TQDMProgressBar"], "untied: .*enable_progress_bar"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(arguments, printed, capsys):
    assert run("--out=out", *arguments) == 2
    assert re.search(printed, capsys.readouterr().err)
    assert not Path("out").exists()


def test_nothing_to_report(capsys):
    assert benchmarks.main(["report", "mine.yaml", "--out=out"]) == 2
    assert "no run of suite mine is complete in out" in capsys.readouterr().err


def test_list(capsys):
    assert benchmarks.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "soft: Untied against soft tying by each of its updates. 10 runs a seed; none done." in printed


def test_the_report_of_a_run_covers_all_there_is(capsys):
    assert run("--out=out", "--only=untied,*", "--trainer.max_epochs=1", "--seeds=2") == 0
    assert run("--out=out", "--only=soft*0.1,*", "--trainer.max_epochs=1") == 0
    printed = capsys.readouterr().out.rpartition("| run")[2]
    assert "| untied             | 2 |" in printed
    assert re.search(r"soft, strength=0.1 \| 1 \|.*[+-]\d\.\d{4} \|", printed)
    assert "All runs with --trainer.max_epochs=1." in printed
    with Path("out", "mine.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_files_that_cannot_be_written(tmp_path, undisturbed, capsys):
    for kind in ("csv", "png"):
        (undisturbed / f"mine.{kind}").unlink(missing_ok=True)
    (undisturbed / "mine.csv").mkdir()
    assert benchmarks.main(["report", "mine.yaml", f"--out={undisturbed}"]) == 0
    printed = capsys.readouterr()
    assert "| untied" in printed.out
    assert "CSV and plot could not be written" in printed.err
    (undisturbed / "mine.csv").rmdir()


def start(out, *arguments, **kwargs):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "run", "mine.yaml", f"--out={out}", "--jobs=2"]
    command += arguments
    return subprocess.Popen(command, start_new_session=True, **kwargs)


def test_two_runners_share_the_work(undisturbed):
    runners = [start("out", stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [runner.communicate()[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0]
    assert all("Missing" not in text for text in printed)
    compare("out", undisturbed)
    assert [Folder(path).result()["attempts"] for path in Path("out").glob("*,seed=0")] == [1, 1, 1]


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runners_lose_nothing(kills, undisturbed):
    """SIGKILL of the runner at random moments: its children end too, and the next one goes on."""
    moments = random.Random(0)
    finished = {}
    for _ in range(kills):
        runner = start("out", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = time.monotonic()
        before = attempts()
        while attempts() == before and runner.poll() is None:  # until its first run has begun
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        runner.kill()
        runner.wait()
        finished |= {
            path: path.stat().st_mtime_ns for path in Path("out").glob("*/result.json") if path not in finished
        }
        assert time.monotonic() - begun < 120
    last = start("out")
    assert last.wait() == 0
    compare("out", undisturbed)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())


def attempts():
    paths = Path("out").glob("*/definition.json")
    return sum(json.loads(path.read_text())["attempts"] for path in paths)
