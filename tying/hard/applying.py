"""Parametrize many weights of a model, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from tying.errors import ConfigurationError
from tying.hard.places import check_free, places_of
from tying.hard.related import own_class
from tying.names import computed_weights
from tying.selection import select


def parametrize_all(
    model: nn.Module, parameters: Sequence[str], make: Callable[[str, nn.Parameter], nn.Module]
) -> list[str]:
    """Parametrize the weights that patterns name; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` leaves out.
        make: returns the parametrization of a weight; it must have a ``right_inverse``.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight is tied or parametrized already, or does not fit its
            parametrization; nothing is changed.
    """
    chosen = select(model, parameters)
    places = places_of(model)
    made: dict[str, nn.Module] = {}
    for name, weight in chosen.items():
        check_free(name, places, ", which would not follow it")
        try:
            made[name] = make(name, weight)
            made[name].right_inverse(weight.detach())  # type: ignore[operator]  # a method
        except ConfigurationError as error:
            raise ConfigurationError(f"{name!r}: {error}") from None
    for name, parametrization in made.items():
        own_class(places[name].owner)
        register_parametrization(places[name].owner, places[name].attribute, parametrization)
    return list(made)


def are_computed(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether these weights of a model, at least one, are computed."""
    return bool(names) and computed_weights(model).keys() >= {*names}
