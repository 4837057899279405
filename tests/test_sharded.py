"""Every callback under every way to shard: the weights of one process, also resumed. See sharded_run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_functions
import sharded_run
import torch
from sharded_models import PHASES, SHARDINGS

IN_TWO = [name for name, sharding in SHARDINGS.items() if sharding.processes == 2]
IN_FOUR = [name for name, sharding in SHARDINGS.items() if sharding.processes == 4]


def launch(out, count, parts):
    """Run the script in several processes."""
    script = [str(Path(sharded_run.__file__)), str(out), *parts]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    (out / f"{count}.log").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of results, with those of one process."""
    out = tmp_path_factory.mktemp("sharded")
    sharded_run.run(out, "one process", [*sharded_run.CELLS], PHASES[:2])
    return out


@pytest.fixture(scope="module")
def two(alone):
    launch(alone, 2, ["functions", *IN_TWO])
    return alone


@pytest.fixture(scope="module")
def four(alone):
    launch(alone, 4, IN_FOUR)
    return alone


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
    ]


@pytest.mark.parametrize("cell", sharded_run.CELLS)
def test_one_process_resumes_exactly(alone, cell):
    whole, resumed = (load(alone, "one process", cell, phase, 0) for phase in PHASES[:2])
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.parametrize(("sharding", "cell", "phase"), cells(IN_TWO))
def test_two_processes_equal_one(two, sharding, cell, phase):
    check_cell(two, sharding, cell, phase)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "cell", "phase"), cells(IN_FOUR))
def test_four_processes_equal_one(four, sharding, cell, phase):
    check_cell(four, sharding, cell, phase)


@pytest.mark.parametrize("name", sharded_functions.CHECKS)
def test_functions_on_shards(two, name):
    for rank in (0, 1):
        pairs = torch.load(two / f"functions, {rank}.pt", weights_only=True)[name]
        assert pairs
        torch.testing.assert_close(*(list(side) for side in zip(*pairs, strict=True)), rtol=1e-15, atol=0)
