"""Loaders that say where they are, and go on from there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace


class ResumableLoader:
    """A loader whose place is saved: the epoch, how often it was started over within it, and the next batch.

    Lightning sets the epoch through ``batch_sampler``. A subclass that is iterated makes the batches of the numbers
    that :meth:`_numbers` yields, and no others.
    """

    def __init__(self) -> None:
        self._place = {"epoch": 0, "cycle": 0, "batch": 0}
        self._resumed = False

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for ``set_epoch``: a loader with a ``sampler`` is rebuilt for ``overfit_batches``."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, which begins with its first batch; a restored place in it stays."""
        if epoch != self._place["epoch"]:
            self._place = {"epoch": epoch, "cycle": 0, "batch": 0}
            self._resumed = False

    def state_dict(self) -> dict[str, int]:
        """Return where the loader is: the epoch, how often it was started over, and the next batch."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin where ``state`` was taken."""
        self._place = {key: int(state[key]) for key in self._place}
        self._resumed = True

    def _numbers(self, count: int) -> Iterator[int]:
        """Yield the numbers of an epoch's batches, from the first, or a restored one; the place is that of the next."""
        if not self._resumed:
            self._place = {**self._place, "batch": 0}
        self._resumed = False
        for number in range(self._place["batch"], count):
            self._place = {**self._place, "batch": number + 1}  # not in place: a copy's place is its own
            yield number
        self._place = {**self._place, "cycle": self._place["cycle"] + 1, "batch": 0}
