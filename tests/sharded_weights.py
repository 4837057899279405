"""The cells of callbacks that change weights: shared, relaxed and computed ones."""

from __future__ import annotations

from sharded_models import TIES, Cell, Net

from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    RelaxedTying,
    TemplateWeights,
    TyingMonitor,
    WeightHashing,
)
from tying.hard import LowRankResidual, generate_weights, lower_rank, relax, shard_groups, share_templates, tie
from tying.hashing import hash_weights

BLOCKS = ["network.blocks.*.branch.weight"]
SHARED = ["network.blocks.{0..2}"]
TENSOR_PARALLEL = ("TP", "FSDP2 and TP")


class Joined(Net):
    """Shards together what shares parameters."""

    def units(self):
        return shard_groups(self, ["network.encoder", "network.decoder", "network.blocks.*"])


class Tied(Joined):
    """Ties before fully_shard, and after parallelize_module."""

    def change(self):
        if self.shard is None or self.device_mesh["tensor_parallel"].size() == 1:
            tie(self, TIES)

    def units(self):
        tie(self, TIES)
        return super().units()


def changed_by(function, *arguments, **keywords):
    """Return a model that a function changes before it is sharded."""

    class Changed(Joined):
        def change(self):
            function(self, *arguments, **keywords)

    return Changed


CELLS: dict[str, Cell] = {
    "hard": Cell(lambda: [HardTying(TIES), TyingMonitor()], Tied),
    "relaxed": Cell(
        lambda: [RelaxedTying(SHARED, LowRankResidual(1))],
        changed_by(relax, SHARED, LowRankResidual(1)),
        TENSOR_PARALLEL,
    ),
    "low rank": Cell(lambda: [LowRankWeights(BLOCKS, 2)], changed_by(lower_rank, BLOCKS, 2), TENSOR_PARALLEL),
    "templates": Cell(lambda: [TemplateWeights(BLOCKS, 2)], changed_by(share_templates, BLOCKS, 2), TENSOR_PARALLEL),
    "generated": Cell(
        lambda: [GeneratedWeights(BLOCKS, 4, 2, 2)], changed_by(generate_weights, BLOCKS, 4, 2, 2), TENSOR_PARALLEL
    ),
    "hashed": Cell(lambda: [WeightHashing(BLOCKS, 0.5)], changed_by(hash_weights, BLOCKS, 0.5), TENSOR_PARALLEL),
    "hashed, one table": Cell(
        lambda: [WeightHashing(BLOCKS, 0.5, scope="network")],
        changed_by(hash_weights, BLOCKS, 0.5, scope="network"),
        TENSOR_PARALLEL,
    ),
}
