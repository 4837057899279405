"""The base of callbacks that change the model before the optimizers are made."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import (
    AVERAGING,
    TyingCallback,
    configure_model,
    counted,
    parameters_beside,
)
from tying.callbacks.conflicts import acting_on
from tying.errors import ConfigurationError, listed
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, finetuning_groups
from tying.selection.index import clean_name
from tying.selection.resolve import parse_patterns, resolve
from tying.weights.derived import DerivedWeight, derived_by_others, derived_weights, eval_mode, gathered
from tying.weights.optimizers import shared_in
from tying.weights.replace import select_weights
from tying.weights.sharding import is_sharded, sharded_modules
from tying.weights.state_dict import check_shards, reconcile, restore_ties
from tying.weights.tie import owners_of


class ModelTransform(TyingCallback):
    """Changes the model once, before the optimizers are created. A subclass implements :meth:`change`.

    Args:
        parameters: patterns of names of the weights to change; a leading ``!`` excludes. Subclasses may define other
            constructors.

    Attributes:
        precedes_sharding: whether ``fully_shard`` must come after the change.

    Raises:
        ConfigurationError: a callback that averages weights comes before it, the model is sharded already, or an
            optimizer holds weights from before the change.
    """

    parameters: Sequence[str] = ()
    distinguished_by = "parameters"
    precedes_sharding = True
    _optimizer_size = 0

    def __init__(self, parameters: list[str]) -> None:
        self.parameters = parse_patterns(parameters)

    def change(self, model: nn.Module) -> list[str]:
        """Change the model; return the names of the weights that become computed."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> object:
        """Change the model unless it is already changed; return the names of the changed weights."""
        restore_ties(model)  # to_empty parts the weights that share a table
        self.adopt(model)
        if not self.is_applied(model):
            record(model, self, self.change(model))
        return self.changed(model)

    def apply_among(self, model: nn.Module, callbacks: Sequence[pl.Callback]) -> None:
        """Change the model unless it is already changed; errors name this callback, and any that conflicts with it."""
        self._check_unsharded(model)
        with nullcontext() if self.is_applied(model) else acting_on(model, self, callbacks):
            self.apply(model)

    def adopt(self, model: nn.Module) -> None:
        """Take over the weights that the model's ``configure_model`` has changed as this callback would."""
        if self.is_applied(model):
            return
        recorded_names = {name for names in model.__dict__.get("_computed_by", {}).values() for name in names}
        names = [
            name
            for name, derived in derived_weights(model).items()
            if name not in recorded_names and self.selects(name) and self._would_compute(derived)
        ]
        if names:
            record(model, self, names)

    def _would_compute(self, derived: DerivedWeight) -> bool:
        """Return whether the callback would compute a weight in the way in which it is computed."""
        return False

    def _check_unsharded(self, model: nn.Module) -> None:
        """Raise a ConfigurationError if the model is sharded, and the callback has not changed it before."""
        try:
            check_shards(model)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.label}: {error}") from None
        self.adopt(model)
        if self.precedes_sharding and sharded_modules(model) and not self.is_applied(model):
            raise ConfigurationError(
                f"{self.label}: fully_shard has sharded the model, which this callback has not changed before. Change "
                f"it first in configure_model, by {type(self).__name__}Mixin and super().configure_model() or by the "
                "function that the callback calls, with the same arguments; then shard together the modules that share "
                "parameters: tying.hard.shard_groups(model, units) returns their lists" + self._joined(model)
            )

    def _sharing(self, model: nn.Module) -> list[Sequence[str]]:
        """Return the names of weights that will share parameters, in groups, before the model is changed."""
        return [group.names for group in resolve(model, self.ties)] if self.ties else []

    def _joined(self, model: nn.Module) -> str:
        """Name the modules that a fully_shard call must take together if the callback changes the model."""
        owners = [owners_of(names) for names in self._sharing(model)]
        groups = dict.fromkeys(f"[{', '.join(modules)}]" for modules in owners if len(modules) > 1)
        return f", such as {listed(groups, limit=3)}" if groups else ""

    def is_applied(self, model: nn.Module) -> bool:
        """Return whether this callback, or an equal one, has already changed the model."""
        names = self.changed(model)
        return bool(names) and derived_weights(model, aliases=True).keys() >= {*names}

    def changed(self, model: nn.Module) -> list[str]:
        """Return the names of the changed weights; empty before the change."""
        return recorded(model, self)

    @override
    def replaced(self, model: nn.Module) -> list[str]:
        computed = derived_by_others(model)
        return [name for name in self.changed(model) if name in computed]

    @override
    def is_needed(self, model: nn.Module) -> bool:
        return self.is_applied(model)

    @override
    def describe(self, model: nn.Module) -> str:
        names = self.changed(model)
        return f"{counted(len(names), 'weight')} {self._how()}".strip() + f": {listed(names)}"

    def _how(self) -> str:
        """Describe in what way the changed weights are computed."""
        return ""

    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights that the callback is going to change. This changes nothing."""
        return select_weights(model, self.parameters, least_dims=2).fitting(self.check_fits).weights

    def check_fits(self, name: str, weight: nn.Parameter) -> None:
        """Raise a ConfigurationError if the callback cannot change a weight, which it leaves out unless it is spelt."""

    @override
    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        self.apply(model)

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self.ties:
            return super().affected(model)
        if self.parameters and not self.is_applied(model):
            return self.selected(model)
        return parameters_of(model, self.changed(model))

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return parameters_beside(model, self.changed(model))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._optimizer_size = 0
        if not self.is_applied(pl_module) and (problem := averaging_before(self, callbacks_of(trainer))):
            raise ConfigurationError(problem)
        try:
            configure_model(trainer, pl_module)
        except (KeyError, RuntimeError) as error:  # torch's words are those of its internals
            self._explain_parallelism(pl_module, error)
            raise
        self.apply_among(pl_module, callbacks_of(trainer))
        path = trainer.ckpt_path
        if path is not None and Path(path).is_file() and any(map(is_sharded, pl_module.parameters())):
            self._load_extra_state(pl_module, path)

    def _load_extra_state(self, model: nn.Module, path: str | Path) -> None:
        """Load what Lightning does not load from a checkpoint of whole tensors into a sharded model.

        It loads each parameter by its name: no hook of the model compares copies of tied weights, or sees the states
        of hashes.

        Raises:
            ConfigurationError: copies of a tied weight differ, or the file contains objects that torch does not load
                by default.
        """
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        except UnpicklingError:
            others = listed(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            raise ConfigurationError(
                f"{self.label}: {path} contains other objects than tensors and plain types: {others}. If you trust the "
                "file, allow them by torch.serialization.add_safe_globals"
            ) from None
        try:
            reconcile(model, {**state})
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.label}: {error}") from None
        extra = {key: value for key, value in state.items() if key.endswith(("._extra_state", ".drawn"))}
        model.load_state_dict(extra, strict=False)

    def _explain_parallelism(self, model: nn.Module, error: Exception) -> None:
        """Raise a ConfigurationError if ``parallelize_module`` failed at a tied or computed weight."""
        message = str(next(iter(error.args), ""))  # str(error) escapes a KeyError's
        if any(words in message for words in ("parameter name can't contain", "found non-leaf tensor")):
            names = [*derived_weights(model)]
            raise ConfigurationError(
                f"{self.label}: parallelize_module cannot take {listed(names, limit=3)}, which the model computes. "
                "Under tensor parallelism, tie after parallelize_module; weights that are computed otherwise are not "
                "supported there: leave their modules out of parallelize_module, or use FSDP2"
            ) from error

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        dedupe_param_groups(trainer)
        self.check_optimizers(trainer)
        parameters = {id(parameter) for parameter in pl_module.parameters()}
        optimized = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        strangers = {parameter.shape for parameter in optimized if id(parameter) not in parameters}
        names = self.changed(pl_module) if strangers else []  # a sharded weight is gathered to be computed
        with eval_mode(pl_module), gathered(derived_weights(pl_module).values() if strangers else ()):
            stale = [name for name in names if attrgetter(name)(pl_module).shape in strangers]
        if stale:
            raise ConfigurationError(
                f"{self.label}: an optimizer holds tensors of the shape of {stale[0]!r} that are not the model's: it "
                "was made before the model was changed. Make it in configure_optimizers"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        size = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if size != self._optimizer_size:  # a callback has added a parameter group
            self._optimizer_size = size
            dedupe_param_groups(trainer)
            self.check_optimizers(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if "more than one parameter group" in str(exception) and (  # torch's words, in configure_optimizers
            shared := shared_in(pl_module, self.affected(pl_module).values())
        ):
            exception.args = (f"{exception}: {self._explain_sharing(shared.values())}",)

    def check_optimizers(self, trainer: pl.Trainer) -> None:
        """Raise a ConfigurationError if the optimizers hold an affected weight several times."""
        model, groups = trainer.lightning_module, [g for o in trainer.optimizers for g in o.param_groups]
        counts = Counter(parameter for group in groups for parameter in group["params"])
        for name, parameter in self.affected(model).items():
            if (count := counts[parameter]) > 1:
                names = shared_in(model, [parameter]).get(parameter, name)
                raise ConfigurationError(
                    f"{self.label}: {name!r} occurs {count} times in the optimizers, so each step would update and "
                    f"decay it {count} times: {self._explain_sharing([names])}"
                )

    def _explain_sharing(self, names: Iterable[str]) -> str:
        return (
            f"{self.label} made {listed(names, limit=3)} one parameter. Build the optimizers from "
            "self.parameters(), which yields each weight once, or give it to the group of one of its modules only"
        )


def arguments_of(callback: pl.Callback) -> str:
    """Return a callback's class and arguments as a string; equal callbacks have equal strings."""
    # includes the arguments of base classes, which a subclass may not have
    names = dict.fromkeys(name for cls in type(callback).__mro__ for name in signature(cls).parameters)
    arguments = [f"{name}={getattr(callback, name)!r}" for name in names if hasattr(callback, name)]
    return f"{type(callback).__name__}({', '.join(arguments)})"


def record(model: nn.Module, callback: pl.Callback, names: list[str]) -> None:
    """Store in a model the names of the weights that a callback changes; equal callbacks share the entry."""
    model.__dict__.setdefault("_computed_by", {})[arguments_of(callback)] = names


def recorded(model: nn.Module, callback: pl.Callback) -> list[str]:
    """Return the names that :func:`record` has stored for a callback; empty if there are none."""
    return [*model.__dict__.get("_computed_by", {}).get(arguments_of(callback), ())]


def grouped(values: Mapping[str, Hashable]) -> list[Sequence[str]]:
    """Return names in groups of equal values.

    Example:
        >>> grouped({"a": 1, "b": 2, "c": 1})
        [['a', 'c'], ['b']]
    """
    groups: dict[Hashable, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return [*groups.values()]


def parameters_of(model: nn.Module, weights: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of the named weights, including those of pruned and of computed weights."""
    originals = {
        id(original)
        for name, derived in derived_weights(model, aliases=True).items()
        if name in weights
        for original in derived.originals
    }
    return {
        name: parameter
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if (name := clean_name(path).removesuffix("_orig")) in weights or id(parameter) in originals
    }


def shared_with(
    callback: TyingCallback, model: nn.Module, others: Sequence[pl.Callback]
) -> Iterator[tuple[str, TyingCallback]]:
    """Yield the name of each affected weight that another callback also ties or pulls, and that callback.

    Transforms without ties are ignored, since they have replaced the weights that they affect.
    """
    names = {id(weight): name for name, weight in callback.affected(model).items()}
    for other in (other for other in others if isinstance(other, TyingCallback) and other is not callback):
        if other.ties or not isinstance(other, ModelTransform):
            yield from ((names[id(w)], other) for w in other.affected(model).values() if id(w) in names)


def averaging_before(callback: pl.Callback, callbacks: Sequence[pl.Callback]) -> str:
    """Describe the error if a callback that averages weights comes before one that changes the model, or return ""."""
    kind = type(callback).__name__
    for other in callbacks[: [*callbacks].index(callback)]:
        if isinstance(other, AVERAGING):
            return (
                f"{type(other).__name__} comes before {kind} and would average the weights of a copy that {kind} has "
                f"not changed: list {kind} first. A mixin adds it as the last callback: call self.configure_model() at "
                "the end of the module's __init__ instead"
            )
    return ""


def dedupe_param_groups(trainer: pl.Trainer) -> None:
    """Remove duplicate weights from parameter groups; modules that share weights cause duplicates."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group in [*groups, *finetuning_groups(callbacks_of(trainer))]:
        group["params"] = [*dict.fromkeys(group["params"])]
