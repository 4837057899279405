"""Parametrize many weights of a model, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
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
            for shared in made[name].parameters():
                if (shared.dtype, shared.device) != (weight.dtype, weight.device):
                    raise ConfigurationError(
                        f"it is {weight.dtype} on {weight.device}, and what it would share is {shared.dtype} on "
                        f"{shared.device}: leave it out, and let it share with its like"
                    )
            made[name].right_inverse(weight.detach())  # type: ignore[operator]  # a method
        except ConfigurationError as error:
            raise ConfigurationError(f"{name!r}: {error}") from None
    for name, parametrization in made.items():
        own_class(places[name].owner)
        register_parametrization(places[name].owner, places[name].attribute, parametrization)
    return list(made)


def nearest_combination(columns: Tensor, targets: Tensor) -> Tensor:
    """Return the coefficients with which columns come nearest to targets, by least squares.

    Args:
        columns: (n, k).
        targets: (n, m).

    Returns:
        (k, m), in single precision or better.
    """
    precise = torch.promote_types(targets.dtype, torch.float32)
    if targets.is_meta:  # torch has no least squares there
        return targets.new_empty(columns.shape[1], targets.shape[1], dtype=precise)
    solution: Tensor = torch.linalg.lstsq(columns.to(precise), targets.to(precise)).solution
    return solution


def are_computed(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether these weights of a model, at least one, are computed."""
    return bool(names) and computed_weights(model, aliases=True).keys() >= {*names}
