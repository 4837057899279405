"""The cells of callbacks that change weights or blocks: shared, relaxed, computed and repeated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from sharded_models import SHARDINGS, TIES, Cell, Net
from torch import nn

from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    RecurrentDepth,
    RelaxedTying,
    TemplateWeights,
    UntiedBiases,
    WeightHashing,
    ZoneoutStates,
)
from tying.depth import Residual, loop, recur, zone_out
from tying.hard import (
    LowRankResidual,
    bake,
    generate_weights,
    lower_rank,
    relax,
    shard_groups,
    share_templates,
    tie,
    untie_biases,
)
from tying.hashing import hash_weights
from tying.mixins import TyingMixin

BLOCKS = ["network.blocks.*.branch.weight"]
SHARED = ["network.blocks.{0..2}"]
SPLIT = ["network.encoder.2.weight ~ network.decoder.0.weight | (o g) i -> (i g) o"]


class Joined(Net):
    """Shards together what shares parameters."""

    def units(self):
        return shard_groups(self, ["network.encoder", "network.decoder", "network.blocks.*"])


class Tied(Joined):
    """Ties before fully_shard, and after parallelize_module."""

    ties = TIES

    def change(self):
        if self.shard is None or self.device_mesh["tensor_parallel"].size() == 1:
            tie(self, self.ties)

    def units(self):
        tie(self, self.ties)
        return super().units()


class Split(Tied):
    ties = SPLIT


class Signal(nn.Module):
    """A convolution along the entries of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.convolution(x.unsqueeze(1)).squeeze(1)


class Memory(nn.Module):
    """An LSTM along the entries of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(2))[0]).squeeze(2)


def changed_by(function: Callable[..., Any], *arguments: Any, block: type[nn.Module] | None = None, **keywords: Any):
    """Return the class of a model that a function changes before it is sharded; its first block may be another."""

    class Changed(Joined):
        def __init__(self, shard=None):
            super().__init__(shard)
            if block is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    self.network.blocks[0] = Residual(block()).double()

        def change(self):
            function(self, *arguments, **keywords)

    return Changed


def mixed(*callbacks: pl.Callback) -> type[Net]:
    """Return the class of a model whose ``configure_model`` lets mixins change it before it is sharded."""

    class Mixed(TyingMixin, Joined):
        tying: ClassVar = [*callbacks]

        def configure_model(self):
            was_configured, shard, self.shard = self.is_configured, self.shard, None
            super().configure_model()
            self.shard = shard
            if shard is not None and not was_configured:
                shard(self, self.device_mesh)

    return Mixed


def baked(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return bake(trainer.lightning_module)


OTHERS = tuple(name for name in SHARDINGS if name not in ("one process", "FSDP2 by layer"))
PARALLEL = ("TP", "FSDP2 and TP")  # whose parallelize_module takes no computed weights
EXAMPLE = torch.zeros(1, 6, dtype=torch.float64)
RANK_1 = LowRankResidual(1)

CELLS: dict[str, Cell] = {
    "hard": Cell(lambda: [HardTying(TIES)], Tied, ends=baked),
    "hard, split axes": Cell(lambda: [HardTying(SPLIT)], Split, PARALLEL, ends=baked),
    "hard, after": Cell(
        lambda: [HardTying(TIES)], Net, tuple(name for name in SHARDINGS if "SDP2" in name or "HS" in name)
    ),
    "relaxed": Cell(lambda: [RelaxedTying(SHARED, RANK_1)], changed_by(relax, SHARED, RANK_1), ends=baked),
    "low rank": Cell(lambda: [LowRankWeights(BLOCKS, 2)], changed_by(lower_rank, BLOCKS, 2), ends=baked),
    "templates": Cell(lambda: [TemplateWeights(BLOCKS, 2)], changed_by(share_templates, BLOCKS, 2), ends=baked),
    "generated": Cell(
        lambda: [GeneratedWeights(BLOCKS, 4, 2, 2)], changed_by(generate_weights, BLOCKS, 4, 2, 2), ends=baked
    ),
    "hashed": Cell(lambda: [WeightHashing(BLOCKS, 0.5)], changed_by(hash_weights, BLOCKS, 0.5), ends=baked),
    "hashed, one table": Cell(
        lambda: [WeightHashing(BLOCKS, 0.5, scope="network")],
        changed_by(hash_weights, BLOCKS, 0.5, scope="network"),
        ends=baked,
    ),
    "untied biases": Cell(
        lambda: [UntiedBiases(["network.blocks.0.**.bias"], [6])],
        changed_by(untie_biases, ["network.blocks.0.**.bias"], EXAMPLE, block=Signal),
    ),
    "zoneout": Cell(
        lambda: [ZoneoutStates("**.lstm", 0.0, 0.0)], changed_by(zone_out, "**.lstm", 0.0, 0.0, block=Memory)
    ),
    "looping": Cell(
        lambda: [Looping("network.blocks.*", 2, per_pass="scale")], changed_by(loop, "network.blocks.*", 2, "scale")
    ),
    "recurrent": Cell(lambda: [RecurrentDepth("network.blocks.*")], changed_by(recur, "network.blocks.*")),
    "mixin, hard": Cell(list, mixed(HardTying(TIES)), OTHERS),
    "mixin, relaxed": Cell(list, mixed(RelaxedTying(SHARED, RANK_1)), OTHERS),
    "mixin, low rank and templates": Cell(
        list,
        mixed(LowRankWeights(["network.encoder.*.weight"], 2), TemplateWeights(BLOCKS, 2)),
        OTHERS,
    ),
    "mixin, generated": Cell(list, mixed(GeneratedWeights(BLOCKS, 4, 2, 2)), OTHERS),
    "mixin, hashed": Cell(list, mixed(WeightHashing(BLOCKS, 0.5, scope="network")), OTHERS),
    "mixin, looping": Cell(list, mixed(Looping("network.blocks.*", 2)), OTHERS),
    "mixin, recurrent": Cell(list, mixed(RecurrentDepth("network.blocks.*")), OTHERS),
}
