"""What callbacks that tie weights have in common."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_configure_model
from torch import nn
from typing_extensions import override

from tying.callbacks.finite import Watching
from tying.errors import ConfigurationError
from tying.ties import Tie, TiedGroup

SHARDING = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy  # they split weights over processes


class ChangesModel(Watching):
    """A callback that changes the model before the optimizers are made.

    Raises:
        ConfigurationError: a callback that averages weights stands before it, or the strategy splits weights.
    """

    _held_by_optimizers = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._held_by_optimizers = 0
        kind = type(self).__name__
        if isinstance(trainer.strategy, SHARDING):
            raise ConfigurationError(
                f"{kind} does not support {type(trainer.strategy).__name__}: change the model in configure_model, "
                "before it is sharded, and shard tied modules together, as tying.hard.audit says"
            )
        problem = averaging_before(self, callbacks_of(trainer))
        if problem and not self.is_applied(pl_module):  # a copy of what is changed already is right
            raise ConfigurationError(problem)
        # layers that configure_model makes must be there; Lightning calls it again, which it must stand
        _call_configure_model(trainer)
        self.apply(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        drop_repeats(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        held = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if held != self._held_by_optimizers:  # something has added a parameter group
            self._held_by_optimizers = held
            drop_repeats(trainer)
            self.check_optimizers(trainer)

    def check_optimizers(self, trainer: pl.Trainer) -> None:
        """Raise a ConfigurationError where optimizers hold a weight several times."""

    def is_applied(self, model: nn.Module) -> bool:
        """Tell whether the model is changed already, by this callback or one that does the same."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> object:
        """Change the model, unless it is changed already."""
        raise NotImplementedError

    def told(self, model: nn.Module) -> str:
        """Return what the callback has changed, in words, where a look at the parameters does not show it."""
        return ""


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


def arguments_of(callback: pl.Callback) -> str:
    """Return a callback as it was constructed, by which another one of the same arguments is known."""
    # those of all its classes: a subclass may hand on others than it takes, or keep none
    names = dict.fromkeys(name for kind in type(callback).__mro__ for name in signature(kind).parameters)
    held = [f"{name}={getattr(callback, name)!r}" for name in names if hasattr(callback, name)]
    return f"{type(callback).__name__}({', '.join(held)})"


def averaging_before(callback: pl.Callback, callbacks: Sequence[pl.Callback]) -> str:
    """Return what is wrong where a callback that averages weights stands before one that changes the model."""
    for other in callbacks[: [*callbacks].index(callback)]:
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            kind = type(callback).__name__
            return (
                f"{type(other).__name__} stands before {kind} and would average the weights of a copy that it has not "
                f"changed: list {kind} first. Where a mixin brings it, it stands last: call self.configure_model() at "
                "the end of the module's __init__ instead"
            )
    return ""


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


def drop_repeats(trainer: pl.Trainer) -> None:
    """Let each parameter group hold a weight once, though modules whose parameters it was made of share it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning):  # it keeps the names in groups, by which a resumed run makes them
            groups += [group for held in callback._internal_optimizer_metadata.values() for group in held]
    for group in groups:
        group["params"] = [*dict.fromkeys(group["params"])]


def refuse_older(trainer: pl.Trainer, model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise where an optimizer holds what weights of these names and shapes were before the model was changed."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [p for optimizer in trainer.optimizers for one in optimizer.param_groups for p in one["params"]]
    others = {parameter.shape for parameter in held if id(parameter) not in own}
    if found := [name for name, shape in shapes.items() if shape in others]:
        raise ConfigurationError(
            f"an optimizer holds tensors of the shape of {found[0]!r} that are not the model's: it was made before the "
            "model was changed. Make it in configure_optimizers"
        )


def held_by(callback: pl.Callback) -> list[nn.Parameter]:
    """Return the parameters that a callback ties or pulls, once training has started."""
    if isinstance(callback, TyingCallback):
        return [parameter for group in callback.groups for parameter in group.parameters]
    return list(getattr(callback, "pulled", ()))


def refuse_copies(trainer: pl.Trainer, asker: str, why: str, processes: bool = True) -> None:
    """Raise where a callback that averages weights, or other processes, hold copies of what training is to change.

    Args:
        trainer: of the run.
        asker: the callback's name.
        why: what the copies would keep.
        processes: whether other processes would not make the same change themselves.
    """
    holders: list[object] = [
        c for c in callbacks_of(trainer) if isinstance(c, WeightAveraging | StochasticWeightAveraging)
    ]
    holders += [trainer.strategy] if processes and isinstance(trainer.strategy, SHARDING) else []
    if holders or (processes and trainer.world_size > 1):
        what = type(holders[0]).__name__ if holders else "several processes"
        raise ConfigurationError(f"{asker} does not go with {what}, which would keep {why}")


def warn_if_too_late(trainer: pl.Trainer, who: str, start_epoch: int) -> None:
    """Warn where training ends before the epoch in which a callback begins."""
    if 0 <= (trainer.max_epochs or -1) <= start_epoch:
        warnings.warn(
            f"{who} begins in epoch {start_epoch}, and training ends before: max_epochs is {trainer.max_epochs}",
            stacklevel=3,
        )
