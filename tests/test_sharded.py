"""Every callback under every way to shard: the weights of one process, also resumed. See sharded_run.py."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import sharded_faults
import sharded_functions
import sharded_run
import sharded_weights
import torch
from sharded_models import EPOCHS, SHARDINGS, STEPS
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tying.callbacks.transform import ModelTransform
from tying.files import NEED
from tying.hard import bake

IN_TWO = [name for name, sharding in SHARDINGS.items() if sharding.processes == 2]
IN_OTHERS = [name for name, sharding in SHARDINGS.items() if sharding.origin]  # resume from checkpoints of two


def start(out, count, parts=()):
    """Start processes that run some parts, and then the jobs that they read from their standard inputs."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = str(unused.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, sharded_run.__file__, out, *parts]
    with (out / f"{count}.log").open("w") as log:
        options = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "text": True}
        ranks = ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        return [subprocess.Popen(command, env=environment, **options) for environment in ranks]


def finish(processes, jobs):
    """Let processes run jobs, and wait for their end."""
    for process in processes:
        with suppress(BrokenPipeError):  # it has failed: its log says why
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
    for process in processes:
        process.wait(timeout=3000)


def run_all(out, short, parts=()):
    """Run the short jobs, or all others, in one process and in two."""
    alone, together = (
        [job for job in sharded_run.jobs(names) if sharded_run.is_short(job) == short]
        for names in (["one process"], IN_TWO)
    )
    processes = start(out, 2, parts)
    for job in alone:  # meanwhile
        sharded_run.run(out, job)
    finish(processes, together)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of results of the short jobs, in one process and in two."""
    out = tmp_path_factory.mktemp("sharded")
    run_all(out, True, sharded_run.PARTS)
    return out


@pytest.fixture(scope="module")
def others(two):
    """The same folder with the results of all jobs."""
    run_all(two, False)
    for count in (1, 4):
        finish(start(two, count), sharded_run.jobs(name for name in IN_OTHERS if SHARDINGS[name].processes == count))
    return two


@pytest.fixture
def out(request):
    """The folder of results, which has those of all jobs if the test is slow."""
    return request.getfixturevalue("others" if request.node.get_closest_marker("slow") else "two")


def load(out, sharding, cell, phase, rank):
    file = out / sharding / f"{cell}, {phase}, {rank}.pt"
    assert file.exists(), (out / f"{SHARDINGS[sharding].processes}.log").read_text()[-3000:]
    result = torch.load(file, weights_only=True)
    assert "error" not in result, result["error"]
    return result


def params(shardings):
    """Return each job as an argument of a test, which is slow unless the job is short."""
    return [
        pytest.param(*job, id=" - ".join(job), marks=() if sharded_run.is_short(job) else pytest.mark.slow)
        for job in sharded_run.jobs(shardings)
    ]


@pytest.mark.parametrize(("sharding", "cell", "phase"), params(SHARDINGS))
def test_all_processes_end_as_one_does(out, sharding, cell, phase, record_property):
    """Compare what each process ends with, and has logged, with the uninterrupted run of one process."""
    record_property("cell", ("sharded", sharding, cell))
    record_property("remark", phase)
    expected = load(out, "one process", cell, "train", 0)
    for rank in range(SHARDINGS[sharding].processes):
        result = load(out, sharding, cell, phase, rank)
        for part in ("weights", "ends"):
            torch.testing.assert_close(result[part], expected[part], rtol=0, atol=1e-10)
        steps = {step: expected["logged"][step] for step in result["logged"]}
        if phase != "train":  # what the run logged at the end of earlier epochs is not in a resumed one
            steps = {step: {key: steps[step][key] for key in values} for step, values in result["logged"].items()}
        torch.testing.assert_close(result["logged"], steps, rtol=1e-6, atol=1e-6)  # Lightning logs in float32


@pytest.mark.parametrize("name", sharded_functions.CHECKS)
def test_functions_on_shards(two, name):
    for rank in (0, 1):
        pairs = torch.load(two / f"functions, {rank}.pt", weights_only=True)[name]
        assert pairs
        torch.testing.assert_close(*(list(side) for side in zip(*pairs, strict=True)), rtol=1e-15, atol=0)


NAN = "'network.decoder.0.weight' holds NaN"
TIED = "network.decoder.0.weight is tied to network.encoder.2.weight"
ERRORS = {
    **dict.fromkeys(sharded_faults.PULLING, rf"step [23], NonFiniteError: \w+: {NAN}"),
    **dict.fromkeys(("soft, decoupled", "soft, proximal"), f"step [23], NonFiniteError: SoftTying: {NAN}; {TIED}"),
    "soft, gradient": f"step [23], NonFiniteError: SoftTying: 'network.encoder.2.weight' holds NaN, {NAN}",
    "not all sharded": "step 0, ConfigurationError: SoftTying: 'network.encoder.0.bias' is sharded over processes, and "
    "'network.decoder.0.bias' is not: shard both, .*, or neither$",
    "other mesh": "step 0, ConfigurationError: SoftTying: 'network.encoder.0.bias' is sharded over the mesh "
    "data_parallel 2, and 'network.decoder.0.bias' over replicas 1 × shards 2: shard both over one mesh$",
}


@pytest.mark.parametrize("name", ERRORS)
def test_faults_end_all_processes_with_one_sentence(two, name):
    first, second = (torch.load(two / f"faults, {rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["errors"][name] == second["errors"][name]
    assert re.match(ERRORS[name], first["errors"][name])


@pytest.mark.parametrize("name", sharded_faults.PULLING)
def test_all_processes_end_within_30_seconds_of_a_nan_in_one(two, name):
    for rank in (0, 1):
        assert 0 < torch.load(two / f"faults, {rank}.pt", weights_only=True)["seconds"][name] < 30


def run_faulty(out, step=0, fault="kill", sharding="FSDP2 by layer"):
    script = Path(sharded_run.__file__).with_name("sharded_failing.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*command, *map(str, (script, out, step, fault, sharding))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["DDP", "FSDP2 by layer"])
def test_the_job_ends_within_30_seconds_of_a_nan_in_one_process(sharding, tmp_path):
    done = run_faulty(tmp_path, 3, "NaN", sharding)
    assert time.time() - (tmp_path / "faulty").stat().st_mtime < 30
    assert done.returncode
    assert re.search(f"NonFiniteError: SoftTying: {NAN}.*{TIED}", done.stderr)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run_faulty(out).returncode == 0
    return torch.load(out / "weights, 0.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", random.Random(0).sample(range(1, EPOCHS * STEPS + 1), 20))
def test_a_killed_process_ends_all_and_training_resumes_exactly(never_killed, step, tmp_path):
    done = run_faulty(tmp_path, step)
    assert time.time() - (tmp_path / "faulty").stat().st_mtime < 60
    assert done.returncode
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert len([*tmp_path.glob("*.ckpt")]) == (step - 1) // STEPS
    assert run_faulty(tmp_path).returncode == 0
    for rank in (0, 1):
        resumed = torch.load(tmp_path / f"weights, {rank}.pt", weights_only=True)
        assert all(torch.equal(resumed[name], value) for name, value in never_killed.items())


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(job[1], marks=() if sharded_run.is_short(job) else pytest.mark.slow)
        for job in sharded_run.jobs(["FSDP2 by layer"])
        if job[2] == "train" and job[1] in sharded_weights.CELLS
    ],
)
def test_a_sharded_checkpoint_becomes_one_file_that_one_process_loads_and_bakes(out, cell, tmp_path):
    checkpoint = out / "FSDP2 by layer" / f"{cell}.ckpt"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.ckpt")
    state = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]  # as ``tying bake`` does
    model = sharded_weights.CELLS[cell].model()
    model.configure_model()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(NEED)})
    expected = torch.load(out / "one process" / f"{cell}.ckpt", weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert all(torch.isfinite(value).all() for value in bake(model).values())


def test_every_callback_that_changes_models_has_a_cell_by_itself_and_as_a_mixin():
    cells = sharded_run.CELLS.values()
    for callbacks in ([cell.callbacks() for cell in cells], [getattr(cell.model, "tying", ()) for cell in cells]):
        kinds = {type(callback) for several in callbacks for callback in several}
        assert kinds >= {cls for cls in ModelTransform.__subclasses__() if cls.__module__.startswith("tying.")}
