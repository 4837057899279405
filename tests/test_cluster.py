"""Runs on the workers of a scheduler of dask.distributed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import LocalCluster, versions

from benchmarks import __main__ as benchmarks
from benchmarks import cluster as module
from benchmarks.folder import Folder

PATHS = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
RATES = [number / 100 for number in range(1, 11)]
SUITE = f"""
program: faults.program
base: [{{armed: ARMED, fault: none}}]
deltas: {{steady: [], fatal: [{{fault: worker}}], broken: [{{fault: raise}}]}}
axes: {{rate: {{key: rate, values: {RATES}, deltas: [steady]}}}}
figures: {{sum: test/sum}}
curves: [val/loss]
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The scheduler of two worker processes."""
    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=":0",
            local_directory=tmp_path_factory.mktemp("dask"),
        ) as cluster,
    ):
        patch.setenv("PYTHONPATH", PATHS)
        yield cluster.scheduler_address


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    Path("mine.yaml").write_text(SUITE.replace("ARMED", str(tmp_path / "armed")))


def run(*arguments):
    return benchmarks.main(["run", "mine.yaml", *arguments])


def results(out):
    """Return what each complete run came to, to the last digit, and the rows of its curve."""
    folders = [folder for path in Path(out).glob("*,seed=0") if (folder := Folder(path)).state() == "complete"]
    rows = {folder.name: (folder.path / "metrics.csv").read_text() for folder in folders}
    return {folder.name: (folder.result()["metrics"], rows[folder.name]) for folder in folders}


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The same runs, one after the other on this machine."""
    folder = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", PATHS)
        Path("mine.yaml").write_text(SUITE.replace("ARMED", str(folder / "armed")))
        assert run("--out=serial") == 1
    return results(folder / "serial")


def test_a_full_disk_on_a_worker(address, serial, tmp_path, capfd):
    """The run fails that finds it; what others leave in a worker's own folder comes back."""
    suite = "{program: faults.program, base: [{armed: ARMED}], deltas: {fatal: [], full: [{fault: disk}]}}"
    Path("mine.yaml").write_text(suite.replace("ARMED", str(tmp_path / "armed")))
    assert run("--out=out", f"--executor={address}") == 1
    assert re.search(r"failed: full,seed=0: \[Errno 27\] File too large\. ", capfd.readouterr().out)
    assert results("out") == {"fatal,seed=0": serial["fatal,seed=0"]}
    files = {path.name for path in Path("out/fatal,seed=0").iterdir()}
    assert files >= {"config.yaml", "definition.json", "log.txt", "metrics.csv", "progress.json", "result.json"}
    assert "checkpoints" not in files


def test_what_a_cluster_lacks(address, monkeypatch, capfd):
    def refused(*arguments, executor=address):
        assert run("--out=out", "--only=broken", f"--executor={executor}", *arguments) == 2
        [line] = capfd.readouterr().err.strip().splitlines()
        assert not [*Path("out").glob("*")]
        return line

    monkeypatch.setattr(module, "ANSWER", 1)
    assert "error: no scheduler answers at tcp://127.0.0.1:9: " in refused(executor="tcp://127.0.0.1:9")
    assert "error: no scheduler answers at nowhere: " in refused(executor="nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(module.tempfile, "NamedTemporaryFile", lambda dir: nullcontext(SimpleNamespace(name="gone")))
        assert re.search(r"error: worker tcp://\S+ does not see /\S+/out: leave out --shared", refused("--shared"))
    version = versions._version_cached
    monkeypatch.setattr(versions, "_version_cached", lambda name: "0.1" if name == "einops" else version(name))
    assert re.search(r"error: worker tcp://\S+ has einops \S+ \(0\.1 here\): runs of other versions", refused())


@pytest.mark.parametrize(
    ("where", "rates"), [(["--shared"], 10), pytest.param([], 2, marks=pytest.mark.slow)], ids=["shared", "own"]
)
def test_a_worker_is_killed_and_a_run_fails(where, rates, address, serial, capfd):
    """The others come out as on one machine, and the run whose worker died goes on from its checkpoint."""
    Path("armed").touch()
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace(str(RATES), str(RATES[:rates])))
    assert run("--out=out", f"--executor={address}", *where) == 1
    assert not Path("armed").exists()
    expected = {
        name: serial[name] for name in [*[f"steady,rate={rate},seed=0" for rate in RATES[:rates]], "fatal,seed=0"]
    }
    assert results("out") == expected
    assert sorted(Path("finished").read_text().split()) == sorted(expected)
    assert Folder(Path("out/fatal,seed=0")).result()["attempts"] == 2
    broken = Folder(Path("out/broken,seed=0"))
    assert (broken.state(), broken.failure()) == ("failed", "RuntimeError: it went wrong")
    assert "in program" in (broken.path / "log.txt").read_text()
    assert (broken.path / "checkpoints").exists() == bool(where)
    printed = capfd.readouterr().out
    assert "failed: broken,seed=0: RuntimeError: it went wrong; see out/broken,seed=0/log.txt" in printed
    assert f"Missing are 1 of {rates + 2} runs: 1 failed (broken,seed=0)." in printed


def start(tool, *arguments, **kwargs):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", f"distributed.cli.{tool}", *arguments], **kwargs)


@pytest.mark.slow
def test_a_scheduler_goes_away_and_a_worker_lacks_the_package(tmp_path, monkeypatch, capfd):
    """What is complete is kept, and the command ends; workers are started as the page says."""
    kept = tmp_path / "scheduler.json"
    where = ["--scheduler-file", str(kept)]
    scheduler = start("dask_scheduler", *where, "--port=0", "--no-dashboard", "--host=127.0.0.1")
    while not kept.exists():
        time.sleep(0.05)
    address = json.loads(kept.read_text())["address"]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    worker = ["--no-nanny", "--nthreads=1", "--no-dashboard"]
    assert run("--out=out", f"--executor={address}") == 2
    assert "error: no worker has joined tcp://127.0.0.1:" in capfd.readouterr().err
    with start("dask_worker", *where, *worker) as bare:
        wait_for_worker(address)
        assert run("--out=out", f"--executor={address}") == 2
        assert re.search(r"error: worker \S+ cannot run this package: .*'benchmarks'", capfd.readouterr().err)
        bare.terminate()
    suite = (
        "{program: faults.program, base: [{armed: ARMED, fault: none}], deltas: {first: [], second: [{fault: wait}]}}"
    )
    Path("mine.yaml").write_text(suite.replace("ARMED", str(tmp_path / "armed")))
    Path("armed").touch()
    with start("dask_worker", *where, *worker, "--death-timeout=1", env={**os.environ, "PYTHONPATH": PATHS}) as able:
        wait_for_worker(address)
        threading.Thread(target=kill_when, args=(scheduler, lambda: not Path("armed").exists())).start()
        assert run("--out=out", f"--executor={address}", "--shared") == 2
        able.terminate()
    printed = capfd.readouterr().err
    assert re.search(r"error: the scheduler at tcp://\S+ went away: what is complete is kept, and the same", printed)
    assert Folder(Path("out/first,seed=0")).state() == "complete"
    scheduler.wait()


def wait_for_worker(address):
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(1)


def kill_when(process, ready):
    while not ready():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
