"""Every callback under every way to shard: the weights of one process, also resumed. See sharded_run.py."""

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
from sharded_models import EPOCHS, PHASES, SHARDINGS, STEPS
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


def launch(out, count, parts):
    """Train all cells in several processes."""
    done = start(count, [sharded_run.__file__, out, *parts], timeout=3000)
    (out / f"{count}.log").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of results, with those of one process."""
    out = tmp_path_factory.mktemp("sharded")
    sharded_run.run(out, "one process", [*sharded_run.CELLS], PHASES[:2])
    return out


@pytest.fixture(scope="module")
def two(alone):
    launch(alone, 2, [*sharded_run.PARTS, *IN_TWO])
    return alone


@pytest.fixture(scope="module")
def others(two):
    for count in (1, 4):
        launch(two, count, [name for name in IN_OTHERS if SHARDINGS[name].processes == count])
    return two


def load(out, sharding, cell, phase, rank):
    file = out / sharding / f"{cell}, {phase}, {rank}.pt"
    assert file.exists(), (out / f"{SHARDINGS[sharding].processes}.log").read_text()[-3000:]
    result = torch.load(file, weights_only=True)
    assert "error" not in result, result["error"]
    return result


def check_cell(out, sharding, cell, phase):
    """Compare what each process ends with, and has logged, with the uninterrupted run of one process."""
    expected = load(out, "one process", cell, "train", 0)
    for rank in range(SHARDINGS[sharding].processes):
        result = load(out, sharding, cell, phase, rank)
        for part in ("weights", "ends"):
            torch.testing.assert_close(result[part], expected[part], rtol=0, atol=1e-10)
        steps = {step: expected["logged"][step] for step in result["logged"]}
        torch.testing.assert_close(result["logged"], steps, rtol=1e-6, atol=1e-6)  # Lightning logs in float32


def cells(shardings):
    return [
        pytest.param(sharding, cell, phase, id=f"{cell} - {sharding} - {phase}")
        for sharding in shardings
        for cell in sharded_run.CELLS
        if sharding not in sharded_run.CELLS[cell].excluded
        for phase in sharded_run.CELLS[cell].phases
        if phase != "other size" or SHARDINGS[sharding].origin
    ]


@pytest.mark.parametrize("cell", sharded_run.CELLS)
def test_one_process_resumes_exactly(alone, cell):
    whole, resumed = (load(alone, "one process", cell, phase, 0) for phase in PHASES[:2])
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.parametrize(("sharding", "cell", "phase"), cells(IN_TWO))
def test_two_processes_equal_one(two, sharding, cell, phase):
    check_cell(two, sharding, cell, phase)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "cell", "phase"), cells(IN_OTHERS))
def test_one_and_four_processes_equal_one(others, sharding, cell, phase):
    check_cell(others, sharding, cell, phase)


@pytest.mark.parametrize("name", sharded_functions.CHECKS)
def test_functions_on_shards(two, name):
    for rank in (0, 1):
        pairs = torch.load(two / f"functions, {rank}.pt", weights_only=True)[name]
        assert pairs
        torch.testing.assert_close(*(list(side) for side in zip(*pairs, strict=True)), rtol=1e-15, atol=0)


ERRORS = {
    **dict.fromkeys(
        (f"NaN, {name}" for name in sharded_faults.PULLING),
        r"step [23], NonFiniteError: \w+: 'network.decoder.0.weight' holds NaN",
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
    begin = time.monotonic()
    done = run_killed(tmp_path, step)
    assert done.returncode
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert time.monotonic() - begin < 60
    assert len([*tmp_path.glob("*.ckpt")]) == (step - 1) // STEPS
    assert run_killed(tmp_path).returncode == 0
    for rank in (0, 1):
        resumed = torch.load(tmp_path / f"weights, {rank}.pt", weights_only=True)
        assert all(torch.equal(resumed[name], value) for name, value in never_killed.items())


@pytest.mark.parametrize(
    "cell", [name for name, cell in sharded_weights.CELLS.items() if "FSDP2 by layer" not in cell.excluded]
)
def test_a_sharded_checkpoint_becomes_one_file_that_one_process_loads_and_bakes(two, cell, tmp_path):
    checkpoint = two / "FSDP2 by layer" / f"{cell}.ckpt"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.ckpt")
    state = torch.load(tmp_path / "whole.ckpt", weights_only=False)["state_dict"]
    model = sharded_weights.CELLS[cell].model()
    model.configure_model()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(NEED)})
    expected = torch.load(two / "one process" / f"{cell}.ckpt", weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert all(torch.isfinite(value).all() for value in bake(model).values())


def test_every_callback_that_changes_models_has_a_cell_by_itself_and_as_a_mixin():
    cells = sharded_run.CELLS.values()
    for callbacks in ([cell.callbacks() for cell in cells], [getattr(cell.model, "tying", ()) for cell in cells]):
        kinds = {type(callback) for several in callbacks for callback in several}
        assert kinds >= {cls for cls in ModelTransform.__subclasses__() if cls.__module__.startswith("tying.")}
