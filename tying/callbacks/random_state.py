"""Save random generators in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override


def all_gather_object(own: Any) -> list[Any]:
    """Return what each process gives, by its rank; all of them take part in making a checkpoint.

    Example:
        >>> all_gather_object("here")
        ['here']
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    processes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(processes, own)
    return processes


class RandomState(pl.Callback):
    """Save the state of each process's random generators in checkpoints, and go on from it when resuming.

    It covers Python's, NumPy's and torch's global generators, on the CPU and on the process's own GPUs. A checkpoint
    of another number of processes is resumed without it, with a warning: its states belong to other processes.

    Example:
        >>> sorted(RandomState().state_dict()["processes"][0])
        ['cuda', 'numpy', 'python', 'torch']
    """

    def __init__(self) -> None:
        super().__init__()
        self._restored: dict[str, Any] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restored = None  # what an evaluation has read; a checkpoint to go on from is restored after this

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"processes": all_gather_object(generator_states())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "loops" in checkpoint:
            _mend_place(checkpoint["loops"]["fit_loop"], by_steps=trainer.max_steps != -1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(trainer)
        if self._restored is not None and _begins_an_epoch(trainer):
            # the loader was started before, with other numbers: shuffled anew, it goes as in the uninterrupted run
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # set by now

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run that goes on within an epoch may just have drawn numbers to get there
        if batch_idx > 0:
            self._restore(trainer)
        self._restored = None

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._restored is None:
            return
        processes = self._restored["processes"]
        if len(processes) == trainer.world_size:
            restore_generators(processes[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint holds random states of {len(processes)} processes, not of {trainer.world_size}: "
                "random numbers will differ from those of the uninterrupted run"
            )
            self._restored = None


def _mend_place(loop: dict[str, Any], by_steps: bool) -> None:
    """Say in a checkpoint of an epoch's end where training goes on: Lightning 2.6 gets two cases wrong.

    Args:
        loop: the state of the fit loop.
        by_steps: whether training ends after a number of steps: an epoch that is over is then gone on with.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] < epochs["current"]["ready"]:
        return  # the checkpoint is from within an epoch
    if not batches["is_last_batch"]:  # training had ended within the epoch, which Lightning takes for over
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] = progress["completed"] = progress["ready"] - 1
    elif by_steps:
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] = progress["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def _begins_an_epoch(trainer: pl.Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == 0


def generator_states() -> dict[str, Any]:
    """Return the states of all global random generators, as plain types and tensors."""
    version, numbers, following = random.getstate()
    name, key, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": [version, list(numbers), following],
        "numpy": [str(name), [int(number) for number in key], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set all global random generators to states from :func:`generator_states`."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    name, key, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"][: torch.cuda.device_count()]])
