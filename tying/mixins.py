"""The callbacks for people who inherit rather than configure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
from typing_extensions import override

from tying.callbacks import Coupling, HardTying, ResidualMerging, SoftTying, WeightHashing
from tying.errors import ConfigurationError

Brought = TypeVar("Brought", bound=pl.Callback)


class SoftTyingMixin(pl.LightningModule):
    """Brings :class:`tying.callbacks.SoftTying` along; ``soft_tying`` holds its keyword arguments.

    Like every callback that a module returns, it replaces one of the same class given to the Trainer.

    Raises:
        ConfigurationError: ``soft_tying`` is not set, or is not a dictionary of SoftTying's arguments.

    Example:
        >>> class Model(SoftTyingMixin):
        ...     soft_tying = {"ties": ["encoder.weight ~ decoder.weight"], "strength": 1e-3}
        >>> Model().configure_callbacks()[0].strength
        0.001
    """

    soft_tying: ClassVar[Mapping[str, Any]]

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [*_inherited(super().configure_callbacks()), _brought(self, SoftTying, "soft_tying")]


class CouplingMixin(pl.LightningModule):
    """Brings :class:`tying.callbacks.Coupling` along; ``coupling`` holds its keyword arguments.

    Raises:
        ConfigurationError: ``coupling`` is not set, or is not a dictionary of Coupling's arguments.

    Example:
        >>> class Model(CouplingMixin):
        ...     coupling = {"first": "classifier.encoder", "second": "autoencoder.encoder", "alpha": 0.4}
        >>> Model().configure_callbacks()[0].alpha
        0.4
    """

    coupling: ClassVar[Mapping[str, Any]]

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [*_inherited(super().configure_callbacks()), _brought(self, Coupling, "coupling")]


class HardTyingMixin(pl.LightningModule):
    """Brings :class:`tying.callbacks.HardTying` along; ``hard_tying`` holds its keyword arguments.

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

    hard_tying: ClassVar[Mapping[str, Any]]

    @override
    def configure_model(self) -> None:
        super().configure_model()
        _brought(self, HardTying, "hard_tying").apply(self)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [*_inherited(super().configure_callbacks()), _brought(self, HardTying, "hard_tying")]


class WeightHashingMixin(pl.LightningModule):
    """Brings :class:`tying.callbacks.WeightHashing` along; ``weight_hashing`` holds its keyword arguments.

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

    weight_hashing: ClassVar[Mapping[str, Any]]

    @override
    def configure_model(self) -> None:
        super().configure_model()
        _brought(self, WeightHashing, "weight_hashing").apply(self)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [*_inherited(super().configure_callbacks()), _brought(self, WeightHashing, "weight_hashing")]


class ResidualMergingMixin(pl.LightningModule):
    """Brings :class:`tying.callbacks.ResidualMerging` along; ``residual_merging`` holds its keyword arguments.

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

    residual_merging: ClassVar[Mapping[str, Any]]

    @override
    def configure_model(self) -> None:
        super().configure_model()
        _brought(self, ResidualMerging, "residual_merging").apply(self)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [*_inherited(super().configure_callbacks()), _brought(self, ResidualMerging, "residual_merging")]


def _inherited(callbacks: Sequence[pl.Callback] | pl.Callback) -> Sequence[pl.Callback]:
    return [callbacks] if isinstance(callbacks, pl.Callback) else callbacks


def _brought(module: pl.LightningModule, kind: Callable[..., Brought], attribute: str) -> Brought:
    """Return the callback that a module brings along: one for all calls, since it may count steps."""
    if f"_{attribute}" not in module.__dict__:
        arguments, inheritor = getattr(module, attribute, None), type(module).__name__
        name = kind.__name__
        if not isinstance(arguments, Mapping):
            raise ConfigurationError(
                f"{inheritor} inherits {name}Mixin and must set {attribute} to a dictionary of {name}'s arguments, "
                f"not {arguments!r}"
            )
        try:
            module.__dict__[f"_{attribute}"] = kind(**arguments)
        except TypeError as error:
            raise ConfigurationError(f"{inheritor}.{attribute}: {error}") from None
    brought: Brought = module.__dict__[f"_{attribute}"]
    return brought
