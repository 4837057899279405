"""Parametrize many weights of a model, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from tying.errors import ConfigurationError
from tying.hard.places import places_of
from tying.hard.related import own_class
from tying.names import clean_name, computed_in
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
        if isinstance(places[name].holder, ParametrizationList):
            raise ConfigurationError(f"{name!r} is parametrized already")
        if aliases := [other for other, place in places.items() if place.parameter is weight and other != name]:
            raise ConfigurationError(
                f"{name!r} is tied to {aliases[0]!r}, which would not follow it: untie them, or choose others"
            )
        try:
            made[name] = make(name, weight)
            inverse: Callable[[Tensor], object] = made[name].right_inverse  # type: ignore[assignment]  # a method
            inverse(weight.detach())
        except ConfigurationError as error:
            raise ConfigurationError(f"{name!r}: {error}") from None
    for name, parametrization in made.items():
        own_class(places[name].owner)
        register_parametrization(places[name].owner, places[name].attribute, parametrization)
    return list(made)


def are_computed(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether these weights of a model, at least one, are computed."""
    computed = {
        clean_name(f"{path}.{one.name}".lstrip("."))
        for path, part in model.named_modules()
        for one in computed_in(part)
    }
    return bool(names) and computed.issuperset(names)
