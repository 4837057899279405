"""Mixins that add a callback to a LightningModule by inheritance."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, TypeVar

from tying.callbacks import Coupling, HardTying, ResidualMerging, SoftTying, TyingCallback, WeightHashing
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError
from tying.lightning_namespace import check_namespace, pl
from tying.lightning_workarounds import callbacks_of

MixinType = TypeVar("MixinType", bound="type[Mixin]")


def adds(kind: type[TyingCallback], attribute: str) -> Callable[[MixinType], MixinType]:
    """Return a class decorator: the mixin adds a callback to a model, after those of its bases.

    Args:
        kind: the class of the callback. A :class:`ModelTransform` also changes the model, in ``configure_model``.
        attribute: the class attribute of the model that holds the callback's keyword arguments.
    """

    def decorate(mixin: MixinType) -> MixinType:
        def add_callback(module: pl.LightningModule, inherited: Any) -> list[pl.Callback]:
            callbacks = [inherited] if isinstance(inherited, pl.Callback) else [*inherited]
            callback = _callback(module, mixin.__name__, kind, attribute)
            return callbacks if callback in callbacks else [*callbacks, *_beside(module, callback), callback]

        def change_model(module: pl.LightningModule, inherited: None) -> None:
            _callback(module, mixin.__name__, kind, attribute).apply(module)

        hooks: dict[str, Callable[..., Any]] = {"configure_callbacks": add_callback}
        if issubclass(kind, ModelTransform):
            hooks["configure_model"] = change_model
        for hook, complete in hooks.items():
            setattr(mixin, hook, _completed(_inherited(mixin, hook), complete))
        mixin.completions = hooks
        return mixin

    return decorate


def _inherited(mixin: type[pl.LightningModule], hook: str) -> Callable[..., Any]:
    """Return the hook of the classes after a mixin."""
    return lambda module: getattr(super(mixin, module), hook)()


def _completed(hook: Callable[..., Any], complete: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook whose result another function completes."""

    @wraps(hook)
    def completed(module: pl.LightningModule) -> Any:
        return complete(module, hook(module))

    return completed


def _callback(module: pl.LightningModule, mixin: str, kind: type[TyingCallback], attribute: str) -> Any:
    """Return a mixin's callback, the same object in all calls: it may count steps."""
    callbacks: dict[str, TyingCallback] = module.__dict__.setdefault("_mixin_callbacks", {})
    if mixin not in callbacks:
        if not isinstance(arguments := getattr(module, attribute, None), Mapping):
            raise ConfigurationError(
                f"{type(module).__name__} inherits {mixin} and must set {attribute} to a dictionary of "
                f"{kind.__name__}'s arguments, not {arguments!r}"
            )
        try:
            callbacks[mixin] = kind(**arguments)
        except TypeError as error:
            raise ConfigurationError(f"{type(module).__name__}.{attribute}: {error}") from None
    return callbacks[mixin]


def mixin_callbacks(module: pl.LightningModule) -> list[TyingCallback]:
    """Return the callbacks that mixins have added to a module."""
    return [*vars(module).get("_mixin_callbacks", {}).values()]


def _beside(module: pl.LightningModule, callback: TyingCallback) -> list[pl.Callback]:
    """Return the Trainer's callbacks to keep beside a mixin's: same class, other names. Lightning would drop them."""
    try:
        trainer = module.trainer
    except RuntimeError:  # there is none yet
        return []
    others = [other for other in callbacks_of(trainer) if type(other) is type(callback) and other is not callback]
    return kept_beside(callback, others, type(module).__name__)


def kept_beside(callback: TyingCallback, others: Sequence[pl.Callback], model: str) -> list[pl.Callback]:
    """Return the callbacks to keep beside a mixin's callback: those of the same class with other names.

    Args:
        callback: the mixin's.
        others: callbacks of the Trainer.
        model: name of the model's class, for the warning.

    Warns:
        UserWarning: one has the same name, and is replaced.
    """
    same_class = [other for other in others if isinstance(other, TyingCallback) and type(other) is type(callback)]
    kept = [other for other in same_class if other.name != callback.name]
    if len(kept) < len(same_class):
        warnings.warn(
            f"the {callback.label} of {model} replaces the {callback.label} of the Trainer, which has the same name: "
            "leave one of them out, or give them different names if they take a name",
            stacklevel=2,
        )
    return [*kept]


class Mixin(pl.LightningModule):
    """The base of the mixins. A subclass that overrides a hook without ``super()`` keeps the callback.

    Attributes:
        completions: for each hook of a mixin, the function that completes the hook's result.

    Raises:
        ConfigurationError: a class inherits a mixin and a LightningModule of the other Lightning.
    """

    completions: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_namespace(cls, next(base.__name__ for base in cls.__mro__ if base.__module__ == __name__))
        for base in reversed(cls.__mro__):
            for hook, complete in vars(base).get("completions", {}).items():
                if hook in vars(cls):
                    setattr(cls, hook, _completed(vars(cls)[hook], complete))


@adds(SoftTying, "soft_tying")
class SoftTyingMixin(Mixin):
    """Adds :class:`tying.callbacks.SoftTying` to a model; ``soft_tying`` holds its keyword arguments.

    It replaces a callback of the same class and name that the Trainer has, with a warning; those of other names stay.
    This holds for all mixins, also if a class below one overrides ``configure_callbacks`` without ``super()``.

    Raises:
        ConfigurationError: ``soft_tying`` is not set, or is not a dictionary of SoftTying's arguments.

    Example:
        >>> class Model(SoftTyingMixin):
        ...     soft_tying = {"ties": ["encoder.weight ~ decoder.weight"], "strength": 1e-3}
        >>> Model().configure_callbacks()[0].strength
        0.001
    """


@adds(Coupling, "coupling")
class CouplingMixin(Mixin):
    """Adds :class:`tying.callbacks.Coupling` to a model; ``coupling`` holds its keyword arguments.

    Raises:
        ConfigurationError: ``coupling`` is not set, or is not a dictionary of Coupling's arguments.

    Example:
        >>> class Model(CouplingMixin):
        ...     coupling = {"first": "classifier.encoder", "second": "autoencoder.encoder", "alpha": 0.4}
        >>> Model().configure_callbacks()[0].alpha
        0.4
    """


@adds(HardTying, "hard_tying")
class HardTyingMixin(Mixin):
    """Adds :class:`tying.callbacks.HardTying` to a model; ``hard_tying`` holds its keyword arguments.

    The weights are tied in ``configure_model``, hence also by ``load_from_checkpoint``, without a Trainer's callback.

    Raises:
        ConfigurationError: ``hard_tying`` is not set, or is not a dictionary of HardTying's arguments.

    Example:
        >>> import torch
        >>> class Model(HardTyingMixin):
        ...     hard_tying = {"ties": ["encoder.weight ~ decoder.weight"]}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.encoder.weight is model.decoder.weight
        True
    """


@adds(WeightHashing, "weight_hashing")
class WeightHashingMixin(Mixin):
    """Adds :class:`tying.callbacks.WeightHashing` to a model; ``weight_hashing`` holds its keyword arguments.

    The weights are hashed in ``configure_model``, hence also by ``load_from_checkpoint``.

    Raises:
        ConfigurationError: ``weight_hashing`` is not set, or is not a dictionary of WeightHashing's arguments.

    Example:
        >>> import torch
        >>> class Model(WeightHashingMixin):
        ...     weight_hashing = {"parameters": ["network.weight"], "table_ratio": 0.25}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(8, 8)
        >>> model = Model()
        >>> model.configure_model()
        >>> model.network.table.shape
        torch.Size([16])
    """


@adds(ResidualMerging, "residual_merging")
class ResidualMergingMixin(Mixin):
    """Adds :class:`tying.callbacks.ResidualMerging` to a model; ``residual_merging`` holds its keyword arguments.

    The merges are put in by ``configure_model``, hence also by ``load_from_checkpoint``.

    Raises:
        ConfigurationError: ``residual_merging`` is not set, or is not a dictionary of ResidualMerging's arguments.

    Example:
        >>> import torch
        >>> from tying.depth import Residual, StochasticDepth
        >>> class Model(ResidualMergingMixin):
        ...     residual_merging = {"blocks": "network.*", "merge": StochasticDepth(keep=0.5)}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Sequential(Residual(torch.nn.Linear(2, 2)), Residual(torch.nn.Linear(2, 2)))
        >>> model = Model()
        >>> model.configure_model()
        >>> [block.merge.keep for block in model.network]
        [0.75, 0.5]
    """
