"""Mixins that add a callback to a LightningModule by inheritance."""

from collections.abc import Mapping
from typing import ClassVar

import lightning.pytorch as pl
from typing_extensions import override

from tying.callbacks import Coupling, HardTying, ResidualMerging, SoftTying, TyingCallback, WeightHashing
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError


class CallbackMixin(pl.LightningModule):
    """Adds the callbacks of all mixins that a model inherits; base classes come first.

    The attribute ``_brings`` of a mixin contains the class of its callback, and the name of the class attribute that
    holds the callback's keyword arguments.
    """

    _brings: ClassVar[tuple[type[TyingCallback], str]]

    @override
    def configure_model(self) -> None:
        super().configure_model()
        for callback in self._callbacks():
            if isinstance(callback, ModelTransform):
                callback.apply(self)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        inherited = super().configure_callbacks()
        return [*([inherited] if isinstance(inherited, pl.Callback) else inherited), *self._callbacks()]

    def _callbacks(self) -> list[TyingCallback]:
        """Return the mixins' callbacks, the same objects in all calls: they may count steps."""
        callbacks: dict[type, TyingCallback] = self.__dict__.setdefault("_mixin_callbacks", {})
        mixins = [mixin for mixin in reversed(type(self).__mro__) if "_brings" in vars(mixin)]
        for mixin in (mixin for mixin in mixins if mixin not in callbacks):
            kind, attribute = vars(mixin)["_brings"]
            if not isinstance(arguments := getattr(self, attribute, None), Mapping):
                raise ConfigurationError(
                    f"{type(self).__name__} inherits {mixin.__name__} and must set {attribute} to a dictionary of "
                    f"{kind.__name__}'s arguments, not {arguments!r}"
                )
            try:
                callbacks[mixin] = kind(**arguments)
            except TypeError as error:
                raise ConfigurationError(f"{type(self).__name__}.{attribute}: {error}") from None
        return [*callbacks.values()]


class SoftTyingMixin(CallbackMixin):
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

    _brings = SoftTying, "soft_tying"


class CouplingMixin(CallbackMixin):
    """Adds :class:`tying.callbacks.Coupling` to a model; ``coupling`` holds its keyword arguments.

    Raises:
        ConfigurationError: ``coupling`` is not set, or is not a dictionary of Coupling's arguments.

    Example:
        >>> class Model(CouplingMixin):
        ...     coupling = {"first": "classifier.encoder", "second": "autoencoder.encoder", "alpha": 0.4}
        >>> Model().configure_callbacks()[0].alpha
        0.4
    """

    _brings = Coupling, "coupling"


class HardTyingMixin(CallbackMixin):
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

    _brings = HardTying, "hard_tying"


class WeightHashingMixin(CallbackMixin):
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

    _brings = WeightHashing, "weight_hashing"


class ResidualMergingMixin(CallbackMixin):
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

    _brings = ResidualMerging, "residual_merging"
