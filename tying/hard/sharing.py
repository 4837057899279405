"""Weights that are equal because they are one: tie, and untie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError
from tying.hard.related import relate, related, unrelate
from tying.names import clean_name
from tying.relations import Relation
from tying.selection import resolve
from tying.ties import Tie, TiedGroup

Init = Literal["source", "mean"]


@dataclass(frozen=True)
class Shared:
    """The names of one weight, the source first, and the map from the source's layout to that of each."""

    names: tuple[str, ...]
    relations: tuple[Relation, ...]


@dataclass
class Record:
    """What is tied in a model; kept in it, to tie again what loading or moving it takes apart."""

    ties: dict[Tie, frozenset[str]] = field(default_factory=dict)  # with the names that were tied in the same call
    groups: list[Shared] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a model holds a parameter.

    Attributes:
        owner: the module whose weight it is.
        attribute: the weight's name there.
        holder: the module that holds the parameter: the owner, or a parametrization of its weight.
        original: the parameter's name there.
    """

    owner: nn.Module
    attribute: str
    holder: nn.Module
    original: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter there."""
        parameter = self.holder._parameters[self.original]
        assert parameter is not None
        return parameter

    @property
    def relation(self) -> Relation | None:
        """The map from the parameter to the weight; ``None`` if others than :func:`tie` have made one."""
        if self.holder is self.owner:
            return Relation()
        return next((one.relation for name, _, one in related(self.owner) if name == self.attribute), None)


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
    record: Record = model.__dict__.get("_hard_ties") or Record()
    parsed = [Tie.parse(each) if isinstance(each, str) else each for each in ties]
    new = [each for each in parsed if each not in record.ties]
    if new:
        made = merge(model, resolve(model, new), init)
        names = frozenset(name for group in made for name in group.names)
        record = model.__dict__["_hard_ties"]
        record.ties |= dict.fromkeys(new, names)
    else:
        _tie_again(model)
    own = {name for each in parsed for name in record.ties[each]}
    return [group for group in tied(model) if not own.isdisjoint(group.names)]


@torch.no_grad()
def merge(model: nn.Module, groups: Sequence[TiedGroup], init: Init = "source") -> list[TiedGroup]:
    """Make the weights of each group one, as :func:`tie` does; return the groups."""
    places = places_of(model)
    planned = [_plan(group, places) for group in groups]
    for group, shared in zip(groups, planned, strict=True):
        if init == "mean":
            group.parameters[0].copy_(torch.stack(group.tensors()).mean(dim=0))
        _join(shared, group.parameters[0], places)
    record: Record = model.__dict__.get("_hard_ties") or Record()
    touched = {name for shared in planned for name in shared.names}
    record.groups = [shared for shared in record.groups if touched.isdisjoint(shared.names)] + planned
    if "_hard_ties" not in model.__dict__:
        model.register_load_state_dict_pre_hook(_refuse_unequal)  # type: ignore[no-untyped-call]  # torch's
        model.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]  # torch's
    model.__dict__["_hard_ties"] = record
    return [group for group in tied(model) if not touched.isdisjoint(group.names)]


def untie(model: nn.Module) -> int:
    """Give each weight that :func:`tie` has made one with another a parameter of its own, of equal value.

    Returns:
        How many weights have got one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> untie(model), model[0].weight is model[1].weight
        (1, False)
    """
    record: Record = model.__dict__.get("_hard_ties") or Record()
    places = places_of(model)
    count = 0
    for shared in record.groups:
        for name in shared.names[1:]:
            _release(places[name])
            count += 1
    model.__dict__["_hard_ties"] = Record()
    return count


def tied(model: nn.Module) -> list[TiedGroup]:
    """Return the groups of weights in ``model`` that :func:`tie` has made one.

    Raises:
        ConfigurationError: some are one no longer; loading a state dict into the model ties them again.
    """
    record: Record = model.__dict__.get("_hard_ties") or Record()
    places = places_of(model) if record.groups else {}
    groups = []
    for shared in record.groups:
        source = places[shared.names[0]].parameter
        for name in shared.names[1:]:
            if places[name].parameter is not source:
                raise ConfigurationError(
                    f"{name!r} was tied to {shared.names[0]!r}, and is another tensor now: something has replaced it. "
                    "Tie again, or load a state dict into the whole model"
                )
        groups.append(TiedGroup(shared.names, (source,) * len(shared.names), shared.relations, shared=True))
    return groups


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return where a model holds its parameters, by clean names, aliases included."""
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in module._parameters:
            if module._parameters[attribute] is None:
                continue
            name = clean_name(f"{path}.{attribute}" if path else attribute)
            places[name] = Place(module, attribute, module, attribute)
            if isinstance(module, ParametrizationList):
                *_, weight = path.split(".")
                owner = model.get_submodule(path.rpartition("parametrizations.")[0].removesuffix("."))
                places[name] = Place(owner, weight, module, attribute)
    return places


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
            raise ConfigurationError(f"{told}: it is parametrized already. Tie first, and parametrize the source")
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


def _join(shared: Shared, source: nn.Parameter, places: dict[str, Place]) -> None:
    """Let all names hold ``source``, each in its own layout."""
    for name, relation in zip(shared.names, shared.relations, strict=True):
        place = places[name]
        if place.relation == relation:
            setattr(place.holder, place.original, source)
            continue
        if place.relation and place.relation.steps:
            unrelate(place.owner, place.attribute)
        if relation.steps:
            relate(place.owner, place.attribute, source, relation)
        else:
            setattr(place.owner, place.attribute, source)


def _release(place: Place) -> None:
    """Let a weight be a parameter of its own, of equal value."""
    if place.relation and place.relation.steps:
        unrelate(place.owner, place.attribute)
    else:
        source = place.parameter
        setattr(place.owner, place.attribute, nn.Parameter(source.detach().clone(), source.requires_grad))


def _refuse_unequal(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise unless the copies of each tied weight are equal; add those that are missing."""
    record: Record = module.__dict__["_hard_ties"]
    keys = {clean_name(key[len(prefix) :]): key for key in state_dict if key.startswith(prefix)}
    for shared in record.groups:
        known = [
            (name, relation) for name, relation in zip(shared.names, shared.relations, strict=True) if name in keys
        ]
        if not known:
            continue
        first, to_first = known[0]
        weight = to_first.inverse()(state_dict[keys[first]])
        for name, relation in known[1:]:
            other = relation.inverse()(state_dict[keys[name]])
            if not are_equal(weight, other):
                raise ConfigurationError(
                    f"{keys[first]!r} and {keys[name]!r} are tied, but differ in this state dict. To load it all the "
                    "same, use tying.hard.load_plain(model, state_dict, unequal='source') or 'mean'; to load it as it "
                    "is, tying.hard.untie(model) first"
                )
        for name, relation in zip(shared.names, shared.relations, strict=True):
            if name not in keys:
                state_dict[prefix + name] = relation(weight)


def _tie_again(module: nn.Module, *_: Any) -> None:
    """Mend what ``load_state_dict(assign=True)`` or moving to the meta device has taken apart."""
    record: Record = module.__dict__["_hard_ties"]
    places = places_of(module) if record.groups else {}
    for shared in record.groups:
        _join(shared, places[shared.names[0]].parameter, places)


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal bit by bit.

    Example:
        >>> are_equal(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]))
        True
        >>> are_equal(torch.tensor(0.0), torch.tensor(-0.0))
        False
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or other.is_meta:
        return True
    bits = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other.to(one.device))]
    return torch.equal(*bits)
