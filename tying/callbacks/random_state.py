"""Save random generators in checkpoints."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from tying.callbacks.base import Callback, replica_of
from tying.lightning_namespace import pl
from tying.lightning_workarounds import restart_loader
from tying.weights.sharding import all_gather_object


class RandomState(Callback):
    """Save the states of each process's random generators in checkpoints, and restore them when training resumes.

    These are the global generators of Python, NumPy and torch, on the CPU and on the process's GPUs. If the checkpoint
    is from another number of processes, the generators are seeded anew, from its first state, and a warning says so.

    Example:
        >>> sorted(RandomState().state_dict()["processes"][0])
        ['cuda', 'numpy', 'python', 'torch']
    """

    _restored: Sequence[dict[str, Any]] = ()  # the states of the processes, until they are restored

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._restored = ()  # states from an evaluation; a checkpoint to resume from is loaded after this

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"processes": all_gather_object(generator_states())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["processes"]

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "loops" in checkpoint:
            _correct_progress(checkpoint["loops"]["fit_loop"], by_steps=trainer.max_steps != -1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(trainer)
        origin = "continue from the checkpoint" if self._restored else "are saved in checkpoints"
        pl.utilities.rank_zero_info(f"RandomState: the random generators of each process {origin}")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if self._restored and (progress.is_last_batch or progress.current.ready == 0):  # an epoch begins
            restart_loader(trainer)  # Lightning shuffled before the states were restored

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run that resumes within an epoch may have drawn numbers to skip batches
        if batch_idx > 0:
            self._restore(trainer)
        self._restored = ()

    def _restore(self, trainer: pl.Trainer) -> None:
        if len(self._restored) == trainer.world_size:
            restore_generators(self._restored[trainer.global_rank])
        elif self._restored:
            pl.utilities.rank_zero_warn(
                f"the checkpoint holds random states of {len(self._restored)} processes, not of {trainer.world_size}: "
                "the generators are seeded anew, and random numbers will differ from those of the uninterrupted run"
            )
            restore_generators(self._restored[0])
            seed_generators(int(torch.randint(2**31, ())) + replica_of(trainer)[0])
            self._restored = ()


def _correct_progress(loop: dict[str, Any], by_steps: bool) -> None:
    """Correct the progress in a checkpoint from the end of an epoch: Lightning 2.6 resumes two cases wrongly.

    Args:
        loop: the state of the fit loop.
        by_steps: whether training ends after a number of steps: Lightning then resumes within the complete epoch.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] < epochs["current"]["ready"]:
        return  # the checkpoint is from within an epoch
    for progress in (epochs["current"], epochs["total"]):
        if not batches["is_last_batch"]:  # training ended within the epoch, but Lightning assumes that it is complete
            progress["processed"] = progress["completed"] = progress["ready"] - 1
        elif by_steps:
            progress["completed"] = progress["processed"]
    if batches["is_last_batch"] and by_steps:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


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


def seed_generators(seed: int) -> None:
    """Seed all global random generators with a number in [0, 2³²)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
