"""The suite of language models whose blocks share weights."""

import pytest

from benchmarks.perform import arguments
from benchmarks.suite import load
from tying.callbacks.transform import ModelTransform
from tying.cli import parse
from tying.weights.derived import count_parameters

SIZE, BLOCKS = 256, 6
MATRICES = 12 * SIZE**2  # of a block
VECTORS = 13 * SIZE  # of a block: biases and norms
RANK_ONE = 16 * SIZE  # of a block: rows and columns of four matrices
REST = (128 + SIZE + 128) * SIZE + 128 + 2 * SIZE  # embedding, positions, head and last norm
PARAMETERS = {
    "untied": REST + BLOCKS * (MATRICES + VECTORS),
    "narrow": (128 + 256 + 128) * 132 + 128 + 2 * 132 + BLOCKS * (12 * 132**2 + 13 * 132),
    "hard": REST + BLOCKS * VECTORS + MATRICES,
    "relaxed, rank 4": REST + BLOCKS * VECTORS + MATRICES + 4 * BLOCKS * RANK_ONE,
    "relaxed, rank 16": REST + BLOCKS * VECTORS + MATRICES + 16 * BLOCKS * RANK_ONE,
    "low rank": REST + BLOCKS * VECTORS + 48 * BLOCKS * RANK_ONE,
    "loop, middle": REST + BLOCKS * (MATRICES + VECTORS),
    "loop, late": REST + BLOCKS * (MATRICES + VECTORS),
}
PARAMETERS["narrow, 3 epochs"] = PARAMETERS["narrow"]


@pytest.mark.parametrize("run", load("relaxed").runs(), ids=lambda run: run.setting)
def test_parameters(run, tmp_path):
    cli = parse(arguments(run, tmp_path))
    cli.model.configure_model()
    for callback in cli.trainer.callbacks:
        if isinstance(callback, ModelTransform):
            callback.apply(cli.model)
    unique, virtual = count_parameters(cli.model)
    assert unique == PARAMETERS[run.setting]
    assert virtual == PARAMETERS["narrow" if run.setting.startswith("narrow") else "untied"]


def test_equal_sizes():
    assert PARAMETERS["low rank"] == PARAMETERS["relaxed, rank 16"]
    assert PARAMETERS["narrow"] == pytest.approx(PARAMETERS["relaxed, rank 16"], rel=0.002)
