"""Train the LSTMs of a model with zoneout."""

import warnings
from contextlib import suppress
from typing import Any

from torch import nn
from typing_extensions import override

from tying.callbacks.base import counted
from tying.callbacks.transform import ModelTransform, arguments_of
from tying.depth import zone_out
from tying.depth.rnn.convert import distinct_modules
from tying.depth.rnn.zoneout import ZoneoutRates
from tying.errors import ConfigurationError, check_range, listed
from tying.selection.index import clean_name


class ZoneoutStates(ModelTransform):
    """Let units of LSTMs randomly keep their old values; see :func:`tying.depth.zone_out`.

    The keys of the state dict stay the same: a model that loads it without this callback or mixin computes plain LSTMs.
    When a Trainer loads a checkpoint, Lightning warns if the callback is missing, and this callback warns if its
    probabilities differ from those in training. List it before callbacks that put merges or loops around the LSTMs.

    Args:
        modules: a pattern of names of ``nn.LSTM`` or ``nn.LSTMCell`` modules, or several; a leading ``!`` excludes.
        cell: probability that a unit of the cell keeps its old value, at each step.
        hidden: probability that a unit of the hidden state keeps its old value, at each step.

    Raises:
        ConfigurationError: a probability is not in [0, 1]; when the model is set up, see ``zone_out``.

    Example:
        >>> ZoneoutStates("**.lstm", cell=0.15, hidden=0.15).cell
        0.15

    Source: D. Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.
    """

    distinguished_by = "modules"

    def __init__(self, modules: str | list[str], cell: float, hidden: float) -> None:
        check_range("cell", cell, "[0, 1]")
        check_range("hidden", hidden, "[0, 1]")
        self.modules = modules if isinstance(modules, str) else [*modules]
        self.cell, self.hidden = cell, hidden

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning warns if a checkpoint has the state of a missing callback
        return {"rates": [self.cell, self.hidden]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        cell, hidden = state_dict["rates"]
        if (cell, hidden) != (self.cell, self.hidden):
            warnings.warn(
                f"ZoneoutStates: the checkpoint was trained with cell={cell:g} and hidden={hidden:g}; now they are "
                f"{self.cell:g} and {self.hidden:g}",
                stacklevel=2,
            )

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return bool(self._made(model))

    @override
    def adopt(self, model: nn.Module) -> None:
        with suppress(ConfigurationError):  # apply raises it
            for layer in distinct_modules(model, self.modules).values():
                if isinstance(layer, ZoneoutRates) and self._has_rates(layer):
                    layer.__dict__.setdefault("_zoned_by", arguments_of(self))

    def _has_rates(self, layer: ZoneoutRates) -> bool:
        return (layer.zoneout_cell, layer.zoneout_hidden) == (self.cell, self.hidden)

    @override
    def apply(self, model: nn.Module) -> int:
        self.adopt(model)
        if not self.is_applied(model):
            zone_out(model, self.modules, self.cell, self.hidden)
            for layer in distinct_modules(model, self.modules).values():
                layer.__dict__["_zoned_by"] = arguments_of(self)
        return len(self._made(model))

    def _made(self, model: nn.Module) -> list[str]:
        """Return the names of the layers that this callback, or an equal one, has changed."""
        arguments = arguments_of(self)
        return [clean_name(name) for name, m in model.named_modules() if vars(m).get("_zoned_by") == arguments]

    @override
    def describe(self, model: nn.Module) -> str:
        layers = self._made(model)
        rates = f"cell={self.cell:g}, hidden={self.hidden:g}"
        return f"{counted(len(layers), 'LSTM')} with zoneout, {rates}: {listed(layers)}"
