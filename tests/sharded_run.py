"""Train every cell under some shardings and save what each process ends with: run by torchrun, or alone for one.

Arguments: a folder that has the results of one process, and the jobs to run in ``jobs.json``; and names of further parts.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sharded_faults
import sharded_functions
import sharded_pulls
import sharded_weights
import torch
import torch.distributed
from sharded_models import EPOCHS, SAVED, SHARDINGS, Cell, data

PARTS = {"functions": sharded_functions.run, "faults": sharded_faults.run}
CELLS = sharded_pulls.CELLS | sharded_weights.CELLS
Job = tuple[str, str, str]  # a sharding, a cell and a phase


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


def jobs(shardings: Iterable[str]) -> list[Job]:
    """Return all jobs under some shardings, in an order in which each finds the checkpoint that it resumes from."""
    return [
        (sharding, name, phase)
        for sharding in shardings
        for name, cell in CELLS.items()
        if sharding not in cell.excluded
        for phase in cell.phases
        if not (phase == "load full" and sharding == "one process")
        if not (phase == "other size" and SHARDINGS[sharding].origin is None)
    ]


def is_short(job: Job) -> bool:
    """Return whether the short tests run a job."""
    sharding, name, phase = job
    is_whole = sharding in ("one process", "FSDP2 by layer")
    return CELLS[name].short and SHARDINGS[sharding].origin is None and (is_whole or phase == "train")


def run(out: Path, job: Job) -> None:
    """Run a job; save the results of this process, or the error."""
    sharding, name, phase = job
    path = out / sharding / f"{name}.ckpt"
    result: Any
    try:
        source = {
            "train": None,
            "resume": path,
            "load full": out / "one process" / path.name,
            "other size": out / str(SHARDINGS[sharding].origin) / path.name,
        }[phase]
        result = fit(CELLS[name], sharding, source, path)
    except Exception:
        result = {"error": traceback.format_exc()}
    file = out / sharding / f"{name}, {phase}, {os.environ.get('RANK', 0)}.pt"
    file.parent.mkdir(exist_ok=True)
    torch.save(result, file)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.distributed.init_process_group("gloo")
    folder, *parts = map(Path, sys.argv[1:])
    for part in map(str, parts):
        torch.save(PARTS[part](), folder / f"{part}, {torch.distributed.get_rank()}.pt")
    for job in json.loads((folder / "jobs.json").read_text()):
        run(folder, tuple(job))
    torch.distributed.barrier()
