"""Weights that are equal because they are one: tie, and untie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import nn

from tying.errors import ConfigurationError
from tying.hard.guard import RECORD, Record, Shared, join, keep, record_of, shared_in, tie_again
from tying.hard.places import Place, places_of
from tying.hard.related import unrelate
from tying.relations import Relation
from tying.selection import resolve
from tying.ties import Tie, TiedGroup

Init = Literal["source", "mean"]


def tie(model: nn.Module, ties: Sequence[Tie | str], init: Init = "source") -> list[TiedGroup]:
    """Make the weights that each tie names one weight.

    Without a relation, all names hold the same ``Parameter``. With one, a weight is computed from the source by a
    parametrization. A ``state_dict`` has the names and shapes of the untied model. Loading one whose copies of a weight
    are not bitwise equal is refused, before anything of ``model`` is written; a copy that it lacks is taken from
    another. Ties that have been made already are mended where something has taken them apart.

    Args:
        model: the module whose names the patterns match; changed in place.
        ties: ties, or their string form ``"source ~ target | relation"``.
        init: what the one weight is: that of the source, or the mean.

    Returns:
        The groups of these ties, merged with earlier ones; ``parameters`` holds the one parameter for each name.

    Raises:
        ConfigurationError: the ties do not fit the model, or the members of a group are of different dtype or device,
            partly frozen, or parametrized otherwise; nothing is changed.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 8)})
        >>> [group] = tie(model, ["encoder.weight ~ decoder.weight | o i -> i o"])
        >>> torch.equal(model["decoder"].weight, model["encoder"].weight.T), len([*model.parameters()])
        (True, 3)
        >>> sorted(model.state_dict())
        ['decoder.bias', 'decoder.weight', 'encoder.bias', 'encoder.weight']
    """
    if init not in ("source", "mean"):
        raise ConfigurationError(f"init is 'source' or 'mean', not {init!r}")
    if isinstance(ties, str | Tie):
        raise ConfigurationError(f"ties must be a list; write [{str(ties)!r}]")
    record = record_of(model)
    parsed = [Tie.parse(each) if isinstance(each, str) else each for each in ties]
    new = [each for each in parsed if each not in record.ties]
    tie_again(model)
    if new:
        made = merge(model, resolve(model, new), init)
        record = record_of(model)
        record.ties |= dict.fromkeys(new, frozenset(name for group in made for name in group.names))
    own = {name for each in parsed for name in record.ties[each]}
    return [group for group in tied(model) if not own.isdisjoint(group.names)]


@torch.no_grad()
def merge(model: nn.Module, groups: Sequence[TiedGroup], init: Init = "source") -> list[TiedGroup]:
    """Make the weights of each group one, as :func:`tie` does; return the groups."""
    planned = plan(model, groups)
    places = places_of(model)
    for group, shared in zip(groups, planned, strict=True):
        if init == "mean":
            group.parameters[0].copy_(torch.stack(group.tensors()).mean(dim=0))
        join(shared, group.parameters[0], places)
    record = record_of(model)
    touched = {name for shared in planned for name in shared.names}
    record.groups = [shared for shared in record.groups if touched.isdisjoint(shared.names)] + planned
    keep(model, record)
    return [group for group in tied(model) if not touched.isdisjoint(group.names)]


def untie(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Give each weight that :func:`tie` has made one with another a parameter of its own, of equal value.

    Args:
        model: the tied model, or one that has it as a part.
        names: only groups that hold one of these names; all by default.

    Returns:
        How many weights have got one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> untie(model), model[0].weight is model[1].weight
        (1, False)
    """
    count = 0
    for path, module in [*model.named_modules()]:
        if RECORD not in module.__dict__:
            continue
        record, places, kept = record_of(module), places_of(module), []
        for shared in record.groups:
            if names is not None and {*names}.isdisjoint(shared.within(path).names):
                kept.append(shared)
                continue
            for name in shared.names[1:]:
                _release(places[name])
                count += 1
        left = {name for shared in kept for name in shared.names}
        keep(module, Record({tie: own for tie, own in record.ties.items() if own <= left}, kept))
    return count


def tied(model: nn.Module) -> list[TiedGroup]:
    """Return the groups of weights that :func:`tie` has made one, in ``model`` or in a part of it.

    Raises:
        ConfigurationError: some are one no longer; tying again, or loading a state dict into the model, mends that.
    """
    everything = shared_in(model)
    places = places_of(model) if everything else {}
    groups = []
    for shared in everything:
        source = places.get(shared.names[0])
        for name, relation in zip(shared.names, shared.relations, strict=True):
            place = places.get(name)
            if place is None or source is None or place.relation != relation:
                raise ConfigurationError(
                    f"{name!r} was tied to {shared.names[0]!r}, and something has parametrized it since: it is a "
                    "weight of its own now. Untie them first, or parametrize neither"
                )
            if place.parameter is not source.parameter:
                raise ConfigurationError(
                    f"{name!r} was tied to {shared.names[0]!r}, and is another tensor now: something has replaced it. "
                    "Tie again, or load a state dict into the whole model"
                )
        assert source is not None
        groups.append(TiedGroup(shared.names, (source.parameter,) * len(shared.names), shared.relations, shared=True))
    return groups


def plan(model: nn.Module, groups: Sequence[TiedGroup]) -> list[Shared]:
    """Return all names that will hold the weight of each group.

    Raises:
        ConfigurationError: the members of a group cannot be one.
    """
    places = places_of(model)
    return [_plan(group, places) for group in groups]


def _plan(group: TiedGroup, places: dict[str, Place]) -> Shared:
    """Return all names that hold the parameters of a group, or raise where they cannot be one."""
    first, named = group.parameters[0], group.names[0]
    names: dict[str, Relation] = {}
    for name, parameter, relation in zip(group.names, group.parameters, group.relations, strict=True):
        told = f"{name!r} cannot be tied to {named!r}" if name != named else f"{name!r} cannot be tied"
        for what in ("requires_grad", "dtype", "device"):
            if getattr(parameter, what) != getattr(first, what):
                raise ConfigurationError(
                    f"{told}: {what} is {getattr(parameter, what)} for one and {getattr(first, what)} for the other"
                )
        own = places[name].relation
        if own is None:
            raise ConfigurationError(f"{told}: it is parametrized: it is computed from other weights")
        if own.steps:
            raise ConfigurationError(
                f"{told}: it is tied already, through the relation {str(own)!r}. Name the weight that it is tied to"
            )
        for alias, place in places.items():
            if place.parameter is parameter:
                whole = relation.then(place.relation or Relation())
                names[alias] = Relation() if whole.agrees_with(Relation(), first.shape) else whole
                if names[alias].steps and isinstance(place.owner, nn.RNNBase):
                    raise ConfigurationError(
                        f"{alias!r} cannot be tied through a relation: {type(place.owner).__name__} keeps its weights "
                        "where they cannot be computed. Make it the source of the tie"
                    )
    return Shared(tuple(names), tuple(names.values()))


def _release(place: Place) -> None:
    """Let a weight be a parameter of its own, of equal value."""
    if place.relation and place.relation.steps:
        unrelate(place.owner, place.attribute)
    else:
        source = place.parameter
        setattr(place.owner, place.attribute, nn.Parameter(source.detach().clone(), source.requires_grad))
