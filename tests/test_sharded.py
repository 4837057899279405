"""Every callback under every way to shard: the weights of one process, also resumed. See sharded_run.py."""

import json
import os
import random
import re
import subprocess
import sys
import time
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


def start(count, script, timeout):
    """Run a script in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*command, *map(str, script)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=timeout)


def launch(out, count, jobs, parts=()):
    """Run jobs in several processes."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = start(count, [sharded_run.__file__, out, *parts], timeout=3000)
    (out / f"{count}.log").write_text(done.stdout + done.stderr)


def run_all(out, short, parts=()):
    """Run the short jobs, or all others, in one process and in two."""
    for job in sharded_run.jobs(["one process"]):
        if sharded_run.is_short(job) == short:
            sharded_run.run(out, job)
    launch(out, 2, [job for job in sharded_run.jobs(IN_TWO) if sharded_run.is_short(job) == short], parts)


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
        launch(two, count, sharded_run.jobs(name for name in IN_OTHERS if SHARDINGS[name].processes == count))
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


ERRORS = {
    **dict.fromkeys(
        (f"NaN, {name}" for name in sharded_faults.PULLING),
        r"step [23], NonFiniteError: \w+: .*'network.decoder.0.weight' holds NaN",
    ),
    "not all sharded": "step 0, ConfigurationError: SoftTying: 'network.encoder.0.bias' is sharded over processes, and "
    "'network.decoder.0.bias' is not: shard both, .*, or neither$",
    "other mesh": "step 0, ConfigurationError: SoftTying: 'network.encoder.0.bias' is sharded over the mesh "
    "data_parallel 2, and 'network.decoder.0.bias' over replicas 1 × shards 2: shard both over one mesh$",
}


@pytest.mark.parametrize("name", ERRORS)
def test_faults_end_all_processes_with_one_sentence(two, name):
    first, second = (torch.load(two / f"faults, {rank}.pt", weights_only=True)[name] for rank in (0, 1))
    assert first == second
    assert re.match(ERRORS[name], first)


def run_killed(out, step=0):
    script = Path(sharded_run.__file__).with_name("sharded_killed.py")
    return start(2, [script, out, step], timeout=600)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run_killed(out).returncode == 0
    return torch.load(out / "weights, 0.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", random.Random(0).sample(range(1, EPOCHS * STEPS + 1), 20))
def test_a_killed_process_ends_all_and_training_resumes_exactly(never_killed, step, tmp_path):
    done = run_killed(tmp_path, step)
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    assert done.returncode
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert len([*tmp_path.glob("*.ckpt")]) == (step - 1) // STEPS
    assert run_killed(tmp_path).returncode == 0
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
    state = torch.load(tmp_path / "whole.ckpt", weights_only=False)["state_dict"]
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
