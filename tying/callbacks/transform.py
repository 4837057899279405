"""The base of callbacks that change the model before the optimizers are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.call import _call_configure_model
from torch import nn
from typing_extensions import override

from tying.callbacks.base import SHARDING, callbacks_of
from tying.callbacks.finite_check import Watching, kept_for
from tying.errors import ConfigurationError, listed
from tying.weights.derived import are_computed, eval_mode


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
        dedupe_param_groups(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        held = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if held != self._held_by_optimizers:  # something has added a parameter group
            self._held_by_optimizers = held
            dedupe_param_groups(trainer)
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


def dedupe_param_groups(trainer: pl.Trainer) -> None:
    """Let each parameter group hold a weight once, though modules whose parameters it was made of share it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning):  # it keeps the names in groups, by which a resumed run makes them
            groups += [group for held in callback._internal_optimizer_metadata.values() for group in held]
    for group in groups:
        group["params"] = [*dict.fromkeys(group["params"])]


def check_optimizer_current(trainer: pl.Trainer, model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise where an optimizer holds what weights of these names and shapes were before the model was changed."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [p for optimizer in trainer.optimizers for one in optimizer.param_groups for p in one["params"]]
    others = {parameter.shape for parameter in held if id(parameter) not in own}
    if found := [name for name, shape in shapes.items() if shape in others]:
        raise ConfigurationError(
            f"an optimizer holds tensors of the shape of {found[0]!r} that are not the model's: it was made before the "
            "model was changed. Make it in configure_optimizers"
        )


class Parametrizing(ChangesModel):
    """A callback that lets weights of a model be computed; which, and how, its subclasses say.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
    """

    def __init__(self, parameters: list[str]) -> None:
        super().__init__()
        self.parameters = parameters

    def change(self, model: nn.Module) -> list[str]:
        """Parametrize the weights; return their names."""
        raise NotImplementedError

    def is_in_place(self, model: nn.Module, names: list[str]) -> bool:
        """Tell whether these weights, at least one, are changed already."""
        return are_computed(model, names)

    @override
    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return kept_for(model, self.apply(model))

    @override
    def told(self, model: nn.Module) -> str:
        return f"{len(names := self.apply(model))} weights: {listed(names)}"

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return self.is_in_place(model, model.__dict__.get("_computed_by", {}).get(arguments_of(self), []))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        with eval_mode(pl_module):
            shapes = {name: attrgetter(name)(pl_module).shape for name in self.apply(pl_module)}
        check_optimizer_current(trainer, pl_module, shapes)

    @override
    def apply(self, model: nn.Module) -> list[str]:
        record: dict[str, list[str]] = model.__dict__.setdefault("_computed_by", {})
        if not self.is_applied(model):
            record[arguments_of(self)] = self.change(model)
        return record[arguments_of(self)]
