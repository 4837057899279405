"""Modules that FSDP2 must shard together, since they share parameters."""

import re
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from torch import nn

from tying.errors import ConfigurationError, listed
from tying.selection.index import clean_name, matching_modules
from tying.weights.derived import Locations, locate_parameters

# what follows the name of a module in the name of a parameter from which it computes; a parametrization may hold others
_PARAMETER = re.compile(r"(^|\.)(parametrizations\..*|[^.]+)$")


def shard_groups(model: nn.Module, units: Sequence[nn.Module | str]) -> list[list[nn.Module]]:
    """Return lists of modules that one ``fully_shard`` call each must take together.

    FSDP2 refuses parameters that modules of different calls share: call ``fully_shard(modules)`` for each list, then
    ``fully_shard(model)``. Units that share parameters, directly or through others, become one list. A module outside
    of all units that shares a parameter with a unit joins the unit's list. A unit that shares a parameter with the
    model's direct attributes is in no list: the call for the whole model shards it.

    Args:
        model: the tied or computed model, before it is sharded; it is not changed.
        units: modules of the model to shard separately, or patterns of their names; a leading ``!`` excludes.

    Returns:
        The lists, those of inner modules first, in the order in which to shard them; the whole model comes last.

    Raises:
        ConfigurationError: a pattern matches nothing, a unit is no module of the model, or two lists each contain a
            part of the other.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 2.weight"])
        >>> shard_groups(model, ["*"]) == [[model[0], model[2]], [model[1]]]
        True
    """
    modules = {clean_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    paths = _paths(modules, units)
    groups = _united(paths, locate_parameters(model))
    lists = [
        [*dict.fromkeys(module for path, module in modules.items() if path in group and not _is_inside(path, group))]
        for group in groups
        if "" not in group
    ]
    inside = {
        index: [
            other
            for other, inner in enumerate(lists)
            if other != index and any(part in {*module.modules()} - {module} for module in outer for part in inner)
        ]
        for index, outer in enumerate(lists)
    }
    try:
        return [lists[index] for index in TopologicalSorter(inside).static_order()]
    except CycleError:
        raise ConfigurationError(
            f"units {listed(map(repr, paths))}: two lists of modules that share parameters each contain a part of the "
            "other: shard either the outer or the inner modules separately"
        ) from None


def _paths(modules: Mapping[str, nn.Module], units: Sequence[nn.Module | str]) -> list[str]:
    """Return the names of units, the first name of each module."""
    first = {module: path for path, module in [*modules.items()][::-1]}
    patterns = [unit for unit in units if isinstance(unit, str)]
    below = {path: module for path, module in modules.items() if path}
    matched = matching_modules(below, patterns, "units") if patterns or not units else {}
    given = [*matched.values(), *(unit for unit in units if not isinstance(unit, str))]
    if unknown := [unit for unit in given if unit not in first]:
        raise ConfigurationError(f"units: {type(unknown[0]).__name__} is no module of the model: pass its own modules")
    return [*dict.fromkeys(first[unit] for unit in given if unit is not modules[""])]


def _united(paths: Iterable[str], locations: Locations) -> list[set[str]]:
    """Return the names of units, and of other owners of their parameters, in sets that share no parameter."""
    groups = {path: {path} for path in paths}
    units = sorted(groups, key=len, reverse=True)
    for names in locations.names.values():
        owners = [_PARAMETER.sub("", name) for name in names]
        places = dict.fromkeys(
            next((unit for unit in units if f"{owner}.".startswith(f"{unit}.")), owner) for owner in owners
        )
        if len(places) > 1 and not groups.keys().isdisjoint(places):
            united = {path for place in places for path in groups.get(place, {place})}
            groups |= dict.fromkeys(united, united)
    return [*{id(group): group for group in groups.values()}.values()]


def _is_inside(path: str, group: Iterable[str]) -> bool:
    """Return whether a module is a part of another of a group."""
    return any(path.startswith(f"{other}.") for other in group)
