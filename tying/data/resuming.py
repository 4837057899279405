"""Loaders and data modules that resume at the batch where a run was interrupted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override


class ResumableLoader:
    """A loader whose position can be saved: the epoch, how often it was restarted within it, and the next batch.

    Lightning sets the epoch through ``batch_sampler``. ``__iter__`` of a subclass yields one batch for each number of
    :meth:`_numbers`.
    """

    def __init__(self) -> None:
        self._place = {"epoch": 0, "cycle": 0, "batch": 0}
        self._resumed = False

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for ``set_epoch``: it rebuilds a loader with a ``sampler`` for ``overfit_batches``."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. A position that was restored in the same epoch stays."""
        if epoch != self._place["epoch"]:
            self._place = {"epoch": epoch, "cycle": 0, "batch": 0}
            self._resumed = False

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, how often the loader was restarted, and the next batch."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin at a saved position."""
        self._place = {key: int(state[key]) for key in self._place}
        self._resumed = True

    def _numbers(self, count: int) -> Iterator[int]:
        """Yield the numbers of an epoch's batches, from 0 or the restored one, and keep the position up to date."""
        if not self._resumed:
            self._place = {**self._place, "batch": 0}
        self._resumed = False
        for number in range(self._place["batch"], count):
            self._place = {**self._place, "batch": number + 1}  # a new dictionary: copies of the loader share the old
            yield number
        self._place = {**self._place, "cycle": self._place["cycle"] + 1, "batch": 0}


class ResumableData(pl.LightningDataModule):
    """A data module that saves the positions of its training loaders in checkpoints.

    Subclasses write :meth:`make_loader`.

    Attributes:
        key: checksum of the content after ``setup``, the same wherever and in whatever form the data is stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key = ""
        self._training: dict[str, ResumableLoader] = {}  # by split
        self._positions: dict[str, Any] = {}  # restored; by split

    def make_loader(self, split: str, train: bool, rank: int, world: int) -> ResumableLoader:
        """Return a loader of a split, for the process ``rank`` of ``world``."""
        raise NotImplementedError

    def _loader(self, split: str, train: bool = False) -> Any:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        loader = self.make_loader(split, train, rank, world)
        if train:
            self._training[split] = loader
            if split in self._positions:
                loader.load_state_dict(self._positions.pop(split))
        return loader

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning also saves the state of stateful loaders, but does not restore it where the number of steps was
        # asked for (`estimated_stepping_batches`) before training started
        return {split: loader.state_dict() for split, loader in self._training.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._positions = dict(state_dict)

    @override
    def train_dataloader(self) -> Any:
        return self._loader("fit", train=True)

    @override
    def val_dataloader(self) -> Any:
        return self._loader("val")

    @override
    def test_dataloader(self) -> Any:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> Any:
        return self._loader("test")
