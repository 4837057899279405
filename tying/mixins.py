"""Mixins that add a callback to a LightningModule by inheritance."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tying.callbacks import Coupling, HardTying, ResidualMerging, SoftTying, TyingCallback, WeightHashing
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError
from tying.lightning_namespace import check_namespace, pl

MixinType = TypeVar("MixinType", bound="type[Mixin]")


def adds(kind: type[TyingCallback], attribute: str) -> Callable[[MixinType], MixinType]:
    """Return a class decorator: the mixin adds a callback to a model, after those of its bases.

    Args:
        kind: the class of the callback. A :class:`ModelTransform` also changes the model, in ``configure_model``.
        attribute: the class attribute of the model that holds the callback's keyword arguments.
    """

    def decorate(mixin: MixinType) -> MixinType:
        def configure_callbacks(module: Any) -> list[pl.Callback]:
            inherited = super(mixin, module).configure_callbacks()  # type: ignore[arg-type]  # a class
            callback = _callback(module, mixin.__name__, kind, attribute)
            return [*([inherited] if isinstance(inherited, pl.Callback) else inherited), callback]

        def configure_model(module: Any) -> None:
            super(mixin, module).configure_model()  # type: ignore[arg-type]  # a class
            _callback(module, mixin.__name__, kind, attribute).apply(module)

        setattr(mixin, "configure_callbacks", configure_callbacks)  # noqa: B010  # mypy takes methods for constant
        if issubclass(kind, ModelTransform):
            setattr(mixin, "configure_model", configure_model)  # noqa: B010
        return mixin

    return decorate


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


class Mixin(pl.LightningModule):
    """A mixin that refuses a LightningModule of the other Lightning when a class inherits both."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_namespace(cls, next(base.__name__ for base in cls.__mro__ if base.__module__ == __name__))


@adds(SoftTying, "soft_tying")
class SoftTyingMixin(Mixin):
    """Adds :class:`tying.callbacks.SoftTying` to a model; ``soft_tying`` holds its keyword arguments.

    Like every callback that a module returns, it replaces one of the same class given to the Trainer.

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
