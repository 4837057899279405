"""A small model, the strategies that shard it, and the cells of the table of callbacks and strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tying.depth import Residual

TIES = [
    "network.encoder.{i}.weight ~ network.decoder.{-i}.weight | o i -> i o",
    "network.encoder.0.bias ~ network.decoder.0.bias",
]
EPOCHS, STEPS = 5, 4  # the number of epochs, and of steps in each
SAVED = 2 * STEPS  # the step of the checkpoint


class Network(nn.Module):
    """A mirrored autoencoder whose shards are uneven, behind residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(nn.Linear(6, 6)) for _ in range(3)))
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
        self.scale = nn.Linear(6, 1)  # the second of two processes holds none of its rows

    def forward(self, x):
        x = self.blocks(x)
        return self.decoder(self.encoder(x)) * self.scale(x).sigmoid()


class Net(pl.LightningModule):
    """Trains the network on random vectors; a subclass may change it before it is sharded.

    Args:
        shard: shards the model, given the mesh of Lightning's strategy; None for one process and DDP.
    """

    def __init__(self, shard: Callable[[Net, Any], None] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = Network().double()
        self.shard = shard
        self.is_configured = False

    def change(self) -> None:
        """Change the model before it is sharded."""

    def units(self) -> list[list[nn.Module]]:
        """Return the modules that each ``fully_shard`` call takes."""
        return [[self.network.encoder], [self.network.decoder], *([block] for block in self.network.blocks)]

    def configure_model(self) -> None:
        if not self.is_configured:
            self.is_configured = True
            self.change()
            if self.shard is not None:
                self.shard(self, self.device_mesh)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self(batch[0])  # after which FSDP2 keeps whole weights

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def shard_by_layer(module: Net, mesh: Any) -> None:
    for unit in module.units():
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh)
    fully_shard(module.network, mesh=mesh)


def shard_root(module: Net, mesh: Any) -> None:
    fully_shard(module.network, mesh=mesh)


def parallelize(module: Net, mesh: Any) -> None:
    kinds = {"0": lambda: ColwiseParallel(use_local_output=False), "2": RowwiseParallel}  # plain outputs must be even
    plan = {f"{part}.{layer}": kind() for part in ("encoder", "decoder") for layer, kind in kinds.items()}
    parallelize_module(module.network, mesh, plan)


@dataclass(frozen=True)
class Sharding:
    """A way to distribute training.

    Attributes:
        processes: how many.
        strategy: returns Lightning's strategy.
        shard: see :class:`Net`.
        replicas: the number of processes that get different samples.
        origin: another sharding, from whose checkpoints this one resumes, too.
    """

    processes: int
    strategy: Callable[[], Strategy | str]
    shard: Callable[[Net, Any], None] | None = None
    replicas: int = 2
    origin: str | None = None


def parallel(data: int, tensor: int, full: bool = False) -> Callable[[], Strategy]:
    """Return a function that makes the strategy; with ``full``, it saves checkpoints as those of one process."""
    return lambda: ModelParallelStrategy(data, tensor, save_distributed_checkpoint=not full)


def by_layer(module: Net, mesh: Any) -> None:
    shard_by_layer(module, mesh["data_parallel"])


SHARDINGS = {
    "one process": Sharding(1, lambda: "auto", replicas=1),
    "DDP": Sharding(2, lambda: "ddp_find_unused_parameters_true"),
    "FSDP2 by layer": Sharding(2, parallel(2, 1), by_layer),
    "FSDP2 root": Sharding(2, parallel(2, 1, full=True), lambda m, mesh: shard_root(m, mesh["data_parallel"])),
    "HSDP": Sharding(
        2, parallel(2, 1), lambda m, _: shard_by_layer(m, init_device_mesh("cpu", (1, 2), mesh_dim_names=("r", "s")))
    ),
    "TP": Sharding(2, parallel(1, 2), lambda m, mesh: parallelize(m, mesh["tensor_parallel"]), replicas=1),
    "FSDP2 and TP": Sharding(
        4,
        parallel(2, 2),
        lambda m, mesh: (parallelize(m, mesh["tensor_parallel"]), shard_by_layer(m, mesh["data_parallel"])),
        origin="TP",
    ),
    "FSDP2 on four": Sharding(4, parallel(4, 1), by_layer, replicas=4, origin="FSDP2 by layer"),
    "FSDP2 on one": Sharding(1, parallel(1, 1), by_layer, replicas=1, origin="FSDP2 by layer"),
}
PHASES = ["train", "resume", "load full", "other size"]  # of each cell, in order


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        callbacks: returns new callbacks.
        model: the class of the model.
        excluded: the names of shardings that refuse it.
        phases: those in which it equals one process.
        short: whether the short tests run it: all phases under FSDP2 by layer, and training under others.
        ends: returns what else must be equal at the end, by name, as full tensors; every process calls it.
        arguments: further arguments of the Trainer.
    """

    callbacks: Callable[[], list[pl.Callback]]
    model: type[Net] = Net
    excluded: tuple[str, ...] = ()
    phases: tuple[str, ...] = tuple(PHASES)
    short: bool = False
    ends: Callable[[pl.Trainer], dict[str, torch.Tensor]] = lambda trainer: {}
    arguments: dict[str, Any] = field(default_factory=dict)


def data(replicas: int, replica: int) -> DataLoader:
    """Return labelled batches of which all replicas together have 8 samples, the same for any number of replicas."""
    x = torch.randn(8 * STEPS, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dataset = TensorDataset(x, x.argmax(dim=1))
    sampler = DistributedSampler(dataset, num_replicas=replicas, rank=replica, shuffle=False)
    return DataLoader(dataset, batch_size=8 // replicas, sampler=sampler)
