"""Train every cell under some shardings and save what each process ends with: run by torchrun, or alone for one.

Arguments: a folder that has the results of one process and receives others, and the names of shardings, or of parts.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sharded_faults
import sharded_functions
import sharded_pulls
import sharded_weights
import torch
import torch.distributed
from sharded_models import EPOCHS, PHASES, SAVED, SHARDINGS, Cell, data

PARTS = {"functions": sharded_functions.run, "faults": sharded_faults.run}
CELLS = sharded_pulls.CELLS | sharded_weights.CELLS


class Record(pl.Callback):
    """Saves a checkpoint in the middle of training, and keeps the values logged after each step."""

    def __init__(self, path: Path) -> None:
        self.path, self.logged = path, dict[int, dict[str, float]]()

    def on_train_batch_end(self, trainer, *_):
        self.logged[trainer.global_step] = {key: float(value) for key, value in trainer.callback_metrics.items()}

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step == SAVED and trainer.ckpt_path is None:
            trainer.save_checkpoint(self.path)


def fit(cell: Cell, sharding: str, ckpt_path: Path | None, path: Path) -> dict[str, Any]:
    """Train a cell; return the weights at the end, what was logged, and further ends, as full tensors by name."""
    way = SHARDINGS[sharding]
    torch.manual_seed(0)
    record = Record(path)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=way.processes,
        strategy=way.strategy(),
        callbacks=[*cell.callbacks(), record],
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        default_root_dir=path.parent,
        log_every_n_steps=1,
        **{
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "limit_val_batches": 1,
            **cell.arguments,
        },
    )
    model = cell.model(way.shard)
    replica = int(os.environ.get("RANK", 0)) * way.replicas // way.processes
    batches = data(way.replicas, replica)
    trainer.fit(model, batches, batches, ckpt_path=ckpt_path)
    for part in model.modules():
        if hasattr(part, "reshard"):  # after a last pass without backward
            part.reshard()
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    return {"weights": weights, "logged": record.logged, "ends": cell.ends(trainer)}


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def run(out: Path, sharding: str, names: list[str], phases: list[str]) -> None:
    """Run the phases of cells; save the results of each process, or the error."""
    rank = int(os.environ.get("RANK", 0))
    for name in names:
        cell = CELLS[name]
        if sharding in cell.excluded:
            continue
        path = out / sharding / f"{name}.ckpt"
        sources = {"train": None, "resume": path, "load full": out / "one process" / f"{name}.ckpt"}
        if origin := SHARDINGS[sharding].origin:
            sources["other size"] = out / origin / f"{name}.ckpt"
        for phase in (phase for phase in phases if phase in cell.phases and phase in sources):
            result: Any
            try:
                result = fit(cell, sharding, sources[phase], path)
            except Exception:
                result = {"error": traceback.format_exc()}
            file = out / sharding / f"{name}, {phase}, {rank}.pt"
            file.parent.mkdir(exist_ok=True)
            torch.save(result, file)
            if "error" in result:
                break


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    names = [name for name in os.environ.get("CELLS", "").split(";") if name] or [*CELLS]
    torch.distributed.init_process_group("gloo")
    for sharding in sys.argv[2:]:
        if sharding in PARTS:
            torch.save(PARTS[sharding](), Path(sys.argv[1], f"{sharding}, {torch.distributed.get_rank()}.pt"))
        else:
            run(Path(sys.argv[1]), sharding, names, PHASES)
    torch.distributed.barrier()
