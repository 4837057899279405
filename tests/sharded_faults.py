"""Faults in a model that is sharded over two processes: each must end with one sentence in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from sharded_models import SHARDINGS, TIES, Net, data
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tying.callbacks import AnchorTying, MixtureTying, SoftTying

WEIGHTS = ["network.encoder.**", "network.decoder.**"]
PULLING: dict[str, Callable[[], pl.Callback]] = {
    "soft, gradient": lambda: SoftTying(TIES, update="gradient"),
    "soft, decoupled": lambda: SoftTying(TIES, update="decoupled"),
    "soft, proximal": lambda: SoftTying(TIES, update="proximal"),
    "anchor": lambda: AnchorTying(WEIGHTS, strength=0.1),
    "mixture": lambda: MixtureTying(WEIGHTS, components=5),
}
POISONED = "network.decoder.0.weight"


class Poison(pl.Callback):
    """Writes NaN into a shard of the second process, before an optimizer's step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            with torch.no_grad():
                module.get_parameter(POISONED).to_local().view(-1)[0] = torch.nan


class Apart(Net):
    """Leaves a tied layer out, or shards it over another mesh."""

    def __init__(self, other: bool) -> None:
        super().__init__(lambda module, mesh: None)
        self.other = other

    def configure_model(self):
        if not self.is_configured:
            self.is_configured = True
            fully_shard(self.network.encoder, mesh=self.device_mesh["data_parallel"])
            if self.other:
                mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
                fully_shard(self.network.decoder, mesh=mesh)


def error_of(model: Net, callbacks: list[pl.Callback], sharding: str = "FSDP2 by layer") -> str:
    """Return the name and the sentence of the error that ends training."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=SHARDINGS[sharding].strategy(),
        callbacks=callbacks,
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, data(2, torch.distributed.get_rank()))
    except Exception as error:
        return f"step {trainer.global_step}, {type(error).__name__}: {error}"
    return "no error"


def run() -> dict[str, Any]:
    """Return the error of each fault."""
    shard = SHARDINGS["FSDP2 by layer"].shard
    errors = {f"NaN, {name}": error_of(Net(shard), [Poison(), make()]) for name, make in PULLING.items()}
    ties = [TIES[1]]
    errors |= {
        "not all sharded": error_of(Apart(other=False), [SoftTying(ties)]),
        "other mesh": error_of(Apart(other=True), [SoftTying(ties)]),
    }
    return errors
