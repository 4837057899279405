"""Loaders that say where they are, and go on from there."""

from __future__ import annotations

from typing import Self


class ResumableLoader:
    """A loader whose place is saved: the epoch, how often it was started over within it, and the next batch.

    Lightning sets the epoch through ``sampler``. A subclass calls :meth:`_begin` when it is iterated, keeps
    ``_place["batch"]``, and calls :meth:`_finish` at its end.
    """

    batch_sampler = None  # Lightning looks here before it looks at `sampler`

    def __init__(self) -> None:
        self._place = {"epoch": 0, "cycle": 0, "batch": 0}
        self._resumed = False

    @property
    def sampler(self) -> Self:
        """Where Lightning looks for ``set_epoch``."""
        return self

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

    def _begin(self) -> None:
        if not self._resumed:
            self._place["batch"] = 0
        self._resumed = False

    def _finish(self) -> None:
        self._place = {**self._place, "cycle": self._place["cycle"] + 1, "batch": 0}
