import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from benchmarks import folder as module
from benchmarks.folder import Folder
from benchmarks.json_files import write_json

ROOT = Path(__file__).parents[1]
RESULT = {**dict.fromkeys(module.RESULT, 0), "metrics": {"accuracy": 0.5}}
HOLD = """
import sys
from pathlib import Path
from benchmarks.folder import Folder
with Folder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path / "runs" / "soft,seed=0")


@pytest.fixture
def holder(run):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def begin(run, layers=1, threads=1):
    return run.begin({"layers": [layers]}, threads)


def complete(run):
    (run.path / "metrics.csv").write_text("epoch")
    write_json(run.path / "result.json", {**RESULT, "name": run.name, "definition": {"layers": [1]}})


def test_life_of_a_run(run):
    assert run.state() == "pending"
    with run.lock():
        assert run.state() == "running"
        assert begin(run, threads=2) == {"definition": {"layers": [1]}, "threads": 2, "attempts": 1}
        assert run.state() == "running"
    assert run.state() == "interrupted"
    write_json(run.path / "failure.json", {"error": "no room"})
    assert (run.state(), run.failure()) == ("failed", "no room")
    assert begin(run, threads=1) == {"definition": {"layers": [1]}, "threads": 2, "attempts": 2}  # sums depend on it
    assert (run.state(), run.failure()) == ("interrupted", "")
    complete(run)
    assert run.state() == "complete"


def test_a_run_belongs_to_a_process_as_long_as_it_lives(run, holder):
    assert run.state() == "running"
    with pytest.raises(Timeout), run.lock():
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run.state() == "pending"
    with run.lock():
        pass


@pytest.mark.parametrize(
    ("lost", "state"), [("definition.json", "complete"), ("metrics.csv", "damaged"), ("result.json", "interrupted")]
)
def test_half_deleted(run, lost, state):
    begin(run)
    complete(run)
    (run.path / lost).unlink()
    assert run.state() == state
    assert not run.conflict({"layers": [1]})
    assert run.conflict({"layers": [2]})
    if state == "damaged":
        assert run.damage() == f"{run.path} is complete, but lacks {lost}"


def test_other_definitions_are_refused(run):
    begin(run)
    with pytest.raises(ValueError, match=r"holds a run of another definition:  ?is 1 there and 2 here"):
        begin(run, layers=2)
    assert run.state() == "interrupted"
    assert (
        run.conflict({"layers": [1], "data key": "a"})
        == f"{run.path} holds a run of another definition: data key is None there and 'a' here"
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        json.dumps({**RESULT, "name": "soft,seed=0", "metrics": {"a": None}}),
        '{"name": "soft',
        "[]",
        '{"name": "soft,seed=0"}',
    ],
)
def test_corrupted_results(run, content):
    begin(run)
    complete(run)
    (run.path / "result.json").write_text(content)
    assert run.state() == "damaged"
    assert run.damage() == f"{run.path / 'result.json'} is truncated or corrupted"


def test_moved_results(run):
    begin(run)
    complete(run)
    moved = Folder(run.path.rename(run.path.with_name("soft,seed=1")))
    assert moved.state() == "damaged"
    assert "is the result of 'soft,seed=0'" in moved.damage()


def test_corrupted_definition(run):
    begin(run)
    (run.path / "definition.json").write_text("{")
    assert run.state() == "damaged"
    assert run.damage() == f"{run.path / 'definition.json'} is truncated or corrupted"


def test_unknown_progress(run):
    assert run.progress() == {}
    begin(run)
    (run.path / "progress.json").write_text("{")
    assert run.progress() == {}
