"""Turn the LSTMs of a model into LSTMs with zoneout, and back."""

from collections.abc import Sequence

from torch import nn

from tying.depth.generated_classes import GeneratedType, generate_class
from tying.depth.rnn.zoneout import ZoneoutLSTM, ZoneoutLSTMCell, ZoneoutRates
from tying.depth.stages import match_modules
from tying.errors import ConfigurationError, check_range
from tying.selection.index import clean_name
from tying.weights.derived import plain_class, swap_plain_class

ZONEOUT: dict[type[nn.Module], type[ZoneoutRates]] = {nn.LSTM: ZoneoutLSTM, nn.LSTMCell: ZoneoutLSTMCell}


def zone_out(model: nn.Module, modules: str | Sequence[str], cell: float, hidden: float) -> int:
    """Turn ``nn.LSTM`` layers into :class:`ZoneoutLSTM`, in place; return the number of layers.

    An ``nn.LSTMCell`` becomes a :class:`ZoneoutLSTMCell`. A layer whose class is a subclass of ``nn.LSTM`` or
    ``nn.LSTMCell``, with the same forward, gets a subclass of both classes. Parameters, optimizers, ties and state
    dicts stay the same, and with probabilities of 0 the outputs as well, up to rounding.

    Args:
        model: changed in place.
        modules: a pattern of module names, or several; a leading ``!`` excludes.
        cell: probability that a unit of the cell keeps its old value, at each step.
        hidden: probability that a unit of the hidden state keeps its old value, at each step.

    Raises:
        ConfigurationError: a probability is not in [0, 1]; a pattern matches nothing, or a module that is not an
            ``nn.LSTM`` or ``nn.LSTMCell``, has another forward, or has zoneout already. The model is then unchanged.

    Example:
        >>> model = nn.ModuleDict({"lstm": nn.LSTM(4, 3), "head": nn.Linear(3, 2)})
        >>> zone_out(model, "lstm", cell=0.15, hidden=0.15), model["lstm"]
        (1, ZoneoutLSTM(4, 3, zoneout_cell=0.15, zoneout_hidden=0.15))
        >>> remove_zoneout(model), model["lstm"]
        (1, LSTM(4, 3))

    Source: D. Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden activations, 2017.
    """
    check_range("cell", cell, "[0, 1]")
    check_range("hidden", hidden, "[0, 1]")
    layers = distinct_modules(model, modules)
    for name, layer in layers.items():
        if problem := _problem(layer):
            raise ConfigurationError(f"modules: the {type(layer).__name__} {name!r} {problem}")
    for layer in layers.values():
        layer.__dict__["_class_before"] = plain = plain_class(layer)
        swap_plain_class(layer, _zoneout_class(plain))
        layer.set_rates(cell, hidden)  # type: ignore[operator]  # a method of the new class
    return len(layers)


def remove_zoneout(model: nn.Module) -> int:
    """Turn the layers that :func:`zone_out` has changed into ``nn.LSTM`` again; return the number of layers.

    Each then computes bitwise what an ``nn.LSTM`` with its weights does.

    Args:
        model: changed in place.

    Raises:
        ConfigurationError: the class of a layer has changed since. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2))
        >>> zone_out(model, "0", cell=0.15, hidden=0.15), remove_zoneout(model), type(model[0]) is nn.LSTM
        (1, 1, True)
    """
    layers = {name: module for name, module in model.named_modules() if "_class_before" in vars(module)}
    for name, layer in layers.items():
        if (current := plain_class(layer)) is not _zoneout_class(vars(layer)["_class_before"]):
            raise ConfigurationError(
                f"the class of {clean_name(name)!r} has changed to {current.__name__} after it got zoneout, which "
                "cannot be removed now: call remove_zoneout before what changes the class, such as apply_merge, loop "
                "or fully_shard"
            )
    for layer in layers.values():
        swap_plain_class(layer, vars(layer).pop("_class_before"))
        for name in ("zoneout_cell", "zoneout_hidden", "_zoned_by"):
            vars(layer).pop(name, None)
    return len(layers)


def distinct_modules(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules whose names match patterns; each appears once, by its first name that matches."""
    layers: dict[nn.Module, str] = {}
    for name, module in match_modules(model, modules, aliases=True, argument="modules").items():
        layers.setdefault(module, name)
    return {name: module for module, name in layers.items()}


def _zoneout_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class that adds zoneout to a class of LSTMs."""
    base = _base(plain)
    assert base is not None
    return ZONEOUT[base] if plain is base else generate_class(ZONEOUT[base], plain)


def _base(plain: type[nn.Module]) -> type[nn.Module] | None:
    """Return ``nn.LSTM`` or ``nn.LSTMCell``, of which a class is a subclass; None if it is of neither."""
    return next((base for base in ZONEOUT if issubclass(plain, base)), None)


def _problem(layer: nn.Module) -> str | None:
    """Return why a module cannot have zoneout, or None if it can."""
    plain = plain_class(layer)
    if (base := _base(plain)) is None:
        return "is not an nn.LSTM or nn.LSTMCell: name only these, or exclude it by '!'"
    if isinstance(layer, ZoneoutRates):
        return "has zoneout already: set its zoneout_cell and zoneout_hidden, or call remove_zoneout first"
    if isinstance(plain, GeneratedType):
        return "is in a loop or has a merge: call zone_out before loop and apply_merge"
    if plain.forward is not base.forward or "forward" in vars(layer):
        return f"has another forward than nn.{base.__name__}, which zoneout would replace: exclude it by '!'"
    return None
