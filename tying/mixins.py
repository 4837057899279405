"""The callbacks for people who inherit rather than configure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from typing_extensions import override

from tying.callbacks import SoftTying
from tying.errors import ConfigurationError


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
        if "_soft_tying" not in self.__dict__:  # one callback for all calls: it counts steps
            self.__dict__["_soft_tying"] = self._make_soft_tying()
        inherited = super().configure_callbacks()
        return [*(inherited if isinstance(inherited, list | tuple) else [inherited]), self.__dict__["_soft_tying"]]

    def _make_soft_tying(self) -> SoftTying:
        arguments = getattr(self, "soft_tying", None)
        if not isinstance(arguments, Mapping):
            raise ConfigurationError(
                f"{type(self).__name__} inherits SoftTyingMixin and must set soft_tying to a dictionary of SoftTying's "
                f"arguments, such as {{'ties': [...], 'strength': 1e-3}}, not {arguments!r}"
            )
        try:
            return SoftTying(**arguments)
        except TypeError as error:
            raise ConfigurationError(f"{type(self).__name__}.soft_tying: {error}") from None
