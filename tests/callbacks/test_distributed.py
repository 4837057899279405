import os
import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
import torch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that one process and two processes end with, for every case."""
    out = tmp_path_factory.mktemp("weights")
    script = Path(distributed_run.__file__)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        str(out),
        "2",
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    distributed_run.main(out, 1)
    distributed_run.normed(out, 1, distributed_run.Normed)
    distributed_run.important(out, 1)
    assert len(list(out.glob("2-*.pt"))) == 2 * len(distributed_run.CASES), done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


@pytest.mark.parametrize("case", range(len(distributed_run.CASES)), ids=map(str, distributed_run.CASES))
def test_two_processes_equal_one_on_the_joint_batch(weights, case):
    one, first, second = (weights[f"{world}-{rank}-{case}"] for world, rank in [(1, 0), (2, 0), (2, 1)])
    for name in one:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=1e-10)


def test_the_cases_differ(weights):
    ends = [weights[f"1-0-{case}"]["encoder.0.weight"] for case in range(len(distributed_run.CASES))]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_batch_norms_have_the_mean_of_the_processes_statistics(weights):
    one, first, second = (weights[f"Normed-{name}"] for name in ["1-0", "2-0", "2-1"])
    torch.testing.assert_close(first["running_mean"], one["running_mean"], rtol=0, atol=1e-10)
    for found, expected in [("running_mean", "mean"), ("running_var", "variance")]:
        assert torch.equal(first[found], second[found])
        assert not torch.equal(first[expected], second[expected])
        torch.testing.assert_close(first[found], (first[expected] + second[expected]) / 2, rtol=0, atol=1e-10)


def test_where_one_process_fails_all_keep_their_statistics(weights):
    for rank in (0, 1):
        assert int(weights[f"Failing-2-{rank}"]["num_batches_tracked"]) == 20  # those of training


@pytest.mark.parametrize("name", distributed_run.IMPORTANCES)
def test_importances_are_those_of_all_processes(weights, name):
    one, first, second = (weights[f"{name}-{rank}"] for rank in ["1-0", "2-0", "2-1"])
    for key in one:
        assert torch.equal(first[key], second[key])
        if name != "sampled":  # each process draws labels of its own
            torch.testing.assert_close(first[key], one[key], rtol=0, atol=1e-10)
    assert any(key.startswith("F ") and one[key].any() for key in one)


@pytest.mark.parametrize("name", ["boundary", "middle", "language"])
def test_two_processes_go_on_as_if_never_stopped(weights, name):
    """Each process draws other numbers and carries its own state; the checkpoint holds those of both."""
    for rank in (0, 1):
        whole, resumed = (weights[f"{name}-{part}-{rank}"] for part in ("whole", "resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
        assert whole["weight"].any()
    if name == "language":
        assert not torch.equal(*(weights[f"language-whole-{rank}"]["carried"] for rank in (0, 1)))
