"""Loaders and data modules that resume at the batch where a run was interrupted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from typing_extensions import override

from tying.lightning_namespace import check_namespace, pl


class ResumableLoader:
    """A loader that saves and restores its position: the epoch, the number of restarts within it, and the next batch.

    Lightning sets the epoch through ``batch_sampler``. A subclass defines ``__iter__``, which yields one batch for
    each number from :meth:`_numbers`.
    """

    def __init__(self) -> None:
        self._place = {"epoch": 0, "cycle": 0, "batch": 0}
        self._first = 0  # the number of the batch at which the next iteration begins

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """The object on which Lightning calls ``sampler.set_epoch``.

        The loader itself has no ``sampler``: Lightning would rebuild it for ``overfit_batches``.
        """
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; keep a restored position of the same epoch."""
        if epoch != self._place["epoch"]:
            self._place = {"epoch": epoch, "cycle": 0, "batch": 0}
            self._first = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, the number of restarts, and the next batch."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration at a saved position."""
        self._place = {key: int(state[key]) for key in self._place}
        self._first = self._place["batch"]

    def _numbers(self, count: int) -> Iterator[int]:
        """Yield the numbers of an epoch's batches, from 0 or the restored one, and update the position."""
        first, self._first = self._first, 0
        for number in range(first, count):
            self._place = {**self._place, "batch": number + 1}  # copies of the loader share the old dictionary
            yield number
        self._place = {**self._place, "cycle": self._place["cycle"] + 1, "batch": 0}


class ResumableData(pl.LightningDataModule):
    """A data module that saves the positions of its training loaders in checkpoints.

    A subclass defines :meth:`make_loader`.

    Attributes:
        key: checksum of the content, set by ``setup``; it does not depend on where or in which format the data is
            stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key = ""
        self._training: dict[str, ResumableLoader] = {}  # by split
        self._positions: dict[str, Any] = {}  # positions from a checkpoint, by split

    def make_loader(self, split: str, train: bool, rank: int, world: int) -> ResumableLoader:
        """Create the loader of a split for the process ``rank`` of ``world`` processes."""
        raise NotImplementedError(f"{type(self).__name__} must define make_loader(split, train, rank, world)")

    def _loader(self, split: str, train: bool = False) -> Any:
        ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        loader = self.make_loader(split, train, *ranks)
        if train:
            self._training[split] = loader
            if split in self._positions:
                loader.load_state_dict(self._positions.pop(split))
        return loader

    @override
    def __setattr__(self, name: str, value: object) -> None:
        if name == "trainer":
            check_namespace(type(value), type(self).__name__)
        super().__setattr__(name, value)

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning also saves the state of stateful loaders, but does not restore it if `estimated_stepping_batches`
        # was read before training started
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

    predict_dataloader = test_dataloader
