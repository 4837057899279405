"""What all callbacks of this package share."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from tying.errors import ConfigurationError
from tying.selection.tie import Tie, TiedGroup

SHARDING = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy  # they split weights over processes


class TyingCallback(pl.Callback):
    """A callback that holds ties, and their groups once it has met the model.

    Attributes:
        ties: what it ties.
        name: tells several of a class apart.
    """

    ties: Sequence[Tie]
    name: str | None

    @property
    def groups(self) -> list[TiedGroup]:
        """The tied groups of the model in training; empty before training starts."""
        raise NotImplementedError

    def check(self, groups: Sequence[TiedGroup]) -> None:
        """Raise a ConfigurationError if the callback could not tie these groups."""


class Choosing(pl.Callback):
    """A callback that acts on weights which patterns name, without ties; training and ``inspect`` ask it alike."""

    def choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights that it is to act on, by name.

        Raises:
            ConfigurationError: a pattern matches nothing, or it could not act on what a pattern matches.
        """
        raise NotImplementedError

    def refuse(self, model: nn.Module, held: Iterable[tuple[pl.Callback, nn.Parameter]]) -> None:
        """Raise a ConfigurationError if it could not act on weights that other callbacks hold."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's callbacks."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by the trainer's connector, untyped


def picture_folder(trainer: pl.Trainer) -> Path | None:
    """Return where pictures go, the logger's directory; ``None`` in all processes but the first, and in trial runs.

    Nor where none can be written, which is warned of: no training ends for want of a picture.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: the processes agree on it
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(f"pictures are left out, since {folder} cannot be written: {error}", stacklevel=2)
        return None


def tied_groups(trainer: pl.Trainer) -> list[tuple[str, TiedGroup]]:
    """Return every group that a callback of the trainer holds, with the name of the callback's class."""
    return [
        (" ".join([type(callback).__name__, *([callback.name] if callback.name else [])]), group)
        for callback in callbacks_of(trainer)
        if isinstance(callback, TyingCallback)
        for group in callback.groups
    ]


def held_by(callback: pl.Callback) -> list[nn.Parameter]:
    """Return the parameters that a callback ties or pulls, once training has started."""
    if isinstance(callback, TyingCallback):
        return [parameter for group in callback.groups for parameter in group.parameters]
    return list(getattr(callback, "pulled", ()))


def reject_copies(trainer: pl.Trainer, context: str, why: str, processes: bool = True) -> None:
    """Raise where a callback that averages weights, or other processes, hold copies of what training is to change.

    Args:
        trainer: of the run.
        context: the callback's name.
        why: what the copies would keep.
        processes: whether other processes would not make the same change themselves.
    """
    holders: list[object] = [
        c for c in callbacks_of(trainer) if isinstance(c, WeightAveraging | StochasticWeightAveraging)
    ]
    holders += [trainer.strategy] if processes and isinstance(trainer.strategy, SHARDING) else []
    if holders or (processes and trainer.world_size > 1):
        what = type(holders[0]).__name__ if holders else "several processes"
        raise ConfigurationError(f"{context} does not go with {what}, which would keep {why}")


def warn_if_too_late(trainer: pl.Trainer, who: str, start_epoch: int) -> None:
    """Warn where training ends before the epoch in which a callback begins."""
    if 0 <= (trainer.max_epochs or -1) <= start_epoch:
        warnings.warn(
            f"{who} begins in epoch {start_epoch}, and training ends before: max_epochs is {trainer.max_epochs}",
            stacklevel=3,
        )
