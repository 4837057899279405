"""The base of callbacks that change the model before the optimizers are made."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from inspect import signature
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import SHARDING, TyingCallback, configure_model, parameters_beside
from tying.errors import ConfigurationError, listed
from tying.lightning_workarounds import callbacks_of, finetuning_groups
from tying.selection.index import clean_name
from tying.selection.resolve import select
from tying.weights.derived import derived_weights, eval_mode


class ModelTransform(TyingCallback):
    """Changes the model before the optimizers are made, once; a subclass says how in :meth:`change`.

    Args:
        parameters: patterns of names of the weights to change; a leading ``!`` excludes. Subclasses that select weights
            otherwise have their own constructors.

    Raises:
        ConfigurationError: a callback that averages weights stands before it, the strategy splits weights, or an
            optimizer holds weights of before the change.
    """

    parameters: Sequence[str] = ()
    _optimizer_size = 0

    def __init__(self, parameters: list[str]) -> None:
        self.parameters = parameters

    def change(self, model: nn.Module) -> list[str]:
        """Change the model; return the names of the weights that it computes from now on."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> object:
        """Change the model, unless it is changed already; return the names of the changed weights."""
        if not self.is_applied(model):
            record(model, self, self.change(model))
        return self.changed(model)

    def is_applied(self, model: nn.Module) -> bool:
        """Return whether the model is changed already, by this callback or an equal one."""
        names = self.changed(model)
        return bool(names) and derived_weights(model, aliases=True).keys() >= {*names}

    def changed(self, model: nn.Module) -> list[str]:
        """Return the names of the weights that were changed, none before that."""
        return recorded(model, self)

    def describe(self, model: nn.Module) -> str:
        """Describe what was changed, for reports."""
        return f"{len(self.changed(model))} weights: {listed(self.changed(model))}"

    @override
    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        self.apply(model)

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self.ties:
            return super().affected(model)
        if self.parameters and not self.is_applied(model):
            return select(model, self.parameters)
        return parameters_of(model, self.changed(model))

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return parameters_beside(model, self.changed(model))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._optimizer_size = 0
        kind = type(self).__name__
        if isinstance(trainer.strategy, SHARDING):
            raise ConfigurationError(
                f"{kind} does not support {type(trainer.strategy).__name__}: change the model in configure_model, "
                "before it is sharded, and shard tied modules together, as tying.hard.audit says"
            )
        problem = averaging_before(self, callbacks_of(trainer))
        if problem and not self.is_applied(pl_module):  # a copy of a changed model is right
            raise ConfigurationError(problem)
        configure_model(trainer, pl_module)
        self.apply(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        dedupe_param_groups(trainer)
        with eval_mode(pl_module):
            shapes = {name: attrgetter(name)(pl_module).shape for name in self.changed(pl_module)}
        check_optimizer_current(trainer, pl_module, shapes)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        size = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if size != self._optimizer_size:  # a callback has added a parameter group
            self._optimizer_size = size
            dedupe_param_groups(trainer)
            self.check_optimizers(trainer)

    def check_optimizers(self, trainer: pl.Trainer) -> None:
        """Raise a ConfigurationError if optimizers hold a weight several times."""


def arguments_of(callback: pl.Callback) -> str:
    """Return a callback's class and arguments, which are the same for equal callbacks."""
    # those of all its classes: a subclass may pass on others than it takes, or store none
    names = dict.fromkeys(name for cls in type(callback).__mro__ for name in signature(cls).parameters)
    arguments = [f"{name}={getattr(callback, name)!r}" for name in names if hasattr(callback, name)]
    return f"{type(callback).__name__}({', '.join(arguments)})"


def record(model: nn.Module, callback: pl.Callback, names: list[str]) -> None:
    """Record in a model which weights a callback, and any equal one, has changed or is to change."""
    model.__dict__.setdefault("_computed_by", {})[arguments_of(callback)] = names


def recorded(model: nn.Module, callback: pl.Callback) -> list[str]:
    """Return the names that :func:`record` has stored for a callback, or none."""
    names: list[str] = model.__dict__.get("_computed_by", {}).get(arguments_of(callback), [])
    return names


def parameters_of(model: nn.Module, weights: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are weights of these names, pruned or not, or from which these are computed."""
    derived = derived_weights(model, aliases=True)
    originals = {id(p) for name in weights if name in derived for p in derived[name].originals}
    every = model.named_parameters(remove_duplicate=False)
    parameters = {clean_name(name).removesuffix("_orig"): parameter for name, parameter in every}
    return {name: p for name, p in parameters.items() if id(p) in originals or name in weights}


def shared_with(
    callback: TyingCallback, model: nn.Module, others: Sequence[pl.Callback]
) -> Iterator[tuple[str, TyingCallback]]:
    """Yield the name of each affected weight that another callback ties or pulls, too, with that callback.

    Transforms without ties do not count: they have replaced the weights that they affect.
    """
    names = {id(weight): name for name, weight in callback.affected(model).items()}
    for other in (other for other in others if isinstance(other, TyingCallback) and other is not callback):
        if other.ties or not isinstance(other, ModelTransform):
            yield from ((names[id(w)], other) for w in other.affected(model).values() if id(w) in names)


def averaging_before(callback: pl.Callback, callbacks: Sequence[pl.Callback]) -> str:
    """Return what is wrong where a callback that averages weights stands before one that changes the model."""
    for other in callbacks[: [*callbacks].index(callback)]:
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            kind = type(callback).__name__
            return (
                f"{type(other).__name__} stands before {kind} and would average the weights of a copy that it has not "
                f"changed: list {kind} first. A mixin adds it as the last callback: call self.configure_model() at "
                "the end of the module's __init__ instead"
            )
    return ""


def dedupe_param_groups(trainer: pl.Trainer) -> None:
    """Keep each weight once per parameter group, although modules from which the group was made share it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group in [*groups, *finetuning_groups(callbacks_of(trainer))]:
        group["params"] = [*dict.fromkeys(group["params"])]


def check_optimizer_current(trainer: pl.Trainer, model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise if an optimizer holds weights of before the model was changed.

    Args:
        trainer: of the run.
        model: the changed model.
        shapes: of the weights that were changed, by name.

    Raises:
        ConfigurationError: an optimizer holds a tensor of such a shape that is no parameter of the model.
    """
    parameters = {id(parameter) for parameter in model.parameters()}
    optimized = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    strangers = {parameter.shape for parameter in optimized if id(parameter) not in parameters}
    if stale := [name for name, shape in shapes.items() if shape in strangers]:
        raise ConfigurationError(
            f"an optimizer holds tensors of the shape of {stale[0]!r} that are not the model's: it was made before the "
            "model was changed. Make it in configure_optimizers"
        )
