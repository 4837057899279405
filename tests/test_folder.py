import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import folder as module
from benchmarks.folder import Folder, is_alive, this_process
from benchmarks.json_files import write_json

RESULT = {**dict.fromkeys(module.RESULT, 0), "metrics": {"accuracy": 0.5}}


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path / "runs" / "soft,seed=0")


def begun(run, **claim):
    return run.claim({"definition": {"layers": [1]}, **claim})


def complete(run):
    (run.path / "metrics.csv").write_text("epoch")
    write_json(run.path / "result.json", {**RESULT, "name": run.name, "definition": {"layers": [1]}})


def of_the_dead(attempt, **changes):
    """Let a claim be that of a process that is no more."""
    claim = json.loads((attempt / "claim.json").read_text())
    claim["process"] = {**claim["process"], "started": "1", **changes}
    (attempt / "claim.json").write_text(json.dumps(claim))


def test_life_of_a_run(run):
    assert run.state() == "pending"
    assert run.definition() is None
    attempt = begun(run)
    assert run.state() == "running"
    assert run.definition() == {"layers": [1]}
    of_the_dead(attempt)
    assert run.state() == "interrupted"
    second = begun(run)
    assert second.name == "001"
    assert run.state() == "running"
    write_json(second / "failure.json", {"error": "no room"})
    assert (run.state(), run.failure()) == ("failed", "no room")
    begun(run)
    complete(run)
    assert run.state() == "complete"


def test_only_one_process_claims(run):
    """Of several that start at once, each attempt goes to one."""
    code = "import sys; from pathlib import Path; from benchmarks.folder import Folder\n"
    code += "sys.stdin.read(1)\nfolder = Folder(Path(sys.argv[1])); Folder.attempts = lambda _: []\n"
    code += "print(folder.claim({'definition': {}}) is not None)"
    command = [sys.executable, "-c", code, str(run.path)]
    root = str(Path(__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    answers = [process.communicate("x")[0].strip() for process in processes]
    assert sorted(answers) == ["False"] * 3 + ["True"]
    assert [path.name for path in (run.path / "attempts").iterdir()] == ["000"]


def test_other_machines_live_as_long_as_they_are_heard(run):
    attempt = begun(run)
    of_the_dead(attempt, machine="another")
    assert is_alive(attempt)
    assert run.state() == "running"
    written = (attempt / "claim.json").stat().st_mtime
    os.utime(attempt / "claim.json", times=(0, written - module.SILENCE - 1))
    assert run.state() == "interrupted"
    module.touch(attempt)
    assert run.state() == "running"
    assert [path.name for path in attempt.parent.iterdir()] == ["000"]


def test_a_process_of_the_same_number_is_another(run):
    attempt = begun(run)
    assert is_alive(attempt)
    of_the_dead(attempt)
    assert not is_alive(attempt)
    of_the_dead(attempt, started=this_process()["started"], pid=2**22 + 1)
    assert not is_alive(attempt)


@pytest.mark.parametrize(
    ("lost", "state"),
    [
        ("attempts", "complete"),
        ("attempts/000/claim.json", "complete"),
        ("metrics.csv", "damaged"),
        ("result.json", "interrupted"),
    ],
)
def test_half_deleted(run, lost, state):
    of_the_dead(begun(run))
    complete(run)
    path = run.path / lost
    path.rename(run.path / "elsewhere")
    assert run.state() == state
    assert run.definition() == {"layers": [1]}
    if state == "damaged":
        assert run.damage() == f"{run.path} is complete, but lacks {lost}"


def test_other_definitions_are_refused(run):
    of_the_dead(begun(run))
    with pytest.raises(ValueError, match=r"holds a run of another definition:  ?is 1 there and 2 here"):
        run.claim({"definition": {"layers": [2]}})
    assert [path.name for path in run.attempts()] == ["000"]
    assert (
        run.conflict({"layers": [1], "data key": "a"})
        == f"{run.path} holds a run of another definition: data key is None there and 'a' here"
    )


def test_a_dead_process_nobody_has_buried_is_dead(run):
    child = subprocess.Popen([sys.executable, "-c", ""])
    attempt = begun(run)
    of_the_dead(attempt, pid=child.pid, started=module._started(child.pid))
    assert is_alive(attempt)
    while is_alive(attempt):
        time.sleep(0.01)
    assert child.returncode is None  # still a zombie
    child.wait()
    assert not is_alive(attempt)


def test_other_files_among_attempts(run):
    attempt = begun(run)
    (attempt.parent / "000 (conflicted copy)").mkdir()
    assert run.attempts() == [attempt]


def test_attempts_without_claims_are_passed_over(run):
    (begun(run) / "claim.json").unlink()
    assert run.state() == "pending"
    assert begun(run).name == "001"


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
    begun(run)
    complete(run)
    (run.path / "result.json").write_text(content)
    assert run.state() == "damaged"
    assert run.damage() == f"{run.path / 'result.json'} is truncated or corrupted"


def test_moved_results(run):
    begun(run)
    complete(run)
    moved = Folder(run.path.rename(run.path.with_name("soft,seed=1")))
    assert moved.state() == "damaged"
    assert "is the result of 'soft,seed=0'" in moved.damage()


def test_corrupted_claim(run):
    attempt = begun(run)
    (attempt / "claim.json").write_text("{")
    assert run.state() == "damaged"
    assert run.damage() == f"{attempt / 'claim.json'} is truncated or corrupted"
