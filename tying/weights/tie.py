"""One parameter under several names: tie and untie."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, listed
from tying.selection.index import clean_name
from tying.selection.relation import Relation
from tying.selection.resolve import resolve, resolve_each
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.weights.derived import ParameterLocation, locate_parameters
from tying.weights.link import unlink
from tying.weights.optimizers import check_alike
from tying.weights.record import (
    GUARD,
    RECORD,
    TieRecord,
    install_record,
    orphaned_guards,
    record_in,
    record_tokens,
    restore_ties,
    share_parameter,
    tie_records,
)

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
    parsed = parse_ties(ties)
    record = record_in(model)
    new = [each for each in parsed if each not in record.ties]
    resolve(model, new)  # raises before anything is changed
    restore_ties(model)
    if new:
        alone = zip(new, resolve_each(model, new), strict=True)
        names = {
            each: frozenset(name for group in found for name in group.names)
            for each, found in alone
            if not isinstance(found, ConfigurationError)  # none is, as together they resolve
        }
        tie_groups(model, resolve(model, new), init)
        record = record_in(model)
        record.ties |= names
    own = {name for each in parsed for name in record.ties[each]}
    return [group for group in tied(model) if not own.isdisjoint(group.names)]


@torch.no_grad()
def tie_groups(model: nn.Module, groups: Sequence[TiedGroup], init: Init = "source") -> list[TiedGroup]:
    """Make the weights of each group one, as :func:`tie` does; return the groups."""
    planned = plan(model, groups)
    places = locate_parameters(model)
    means = [_mean(group) for group in groups] if init == "mean" else []
    for group, mean in zip(groups, means, strict=False):
        group.parameters[0].copy_(mean)
    for group, shared in zip(groups, planned, strict=True):
        share_parameter(shared, group.parameters[0], places)
    touched = {name for shared in planned for name in shared.names}
    for path, module in [*model.named_modules()]:  # what a part has tied is the whole's, once that adds to it
        if record := module.__dict__.get(RECORD):
            kept = [shared for shared in record.groups if touched.isdisjoint(shared.within(clean_name(path)).names)]
            install_record(module, replace(record, groups=kept))
    record = record_in(model)
    install_record(model, replace(record, groups=record.groups + planned))
    return [group for group in tied(model) if not touched.isdisjoint(group.names)]


def untie(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Give each weight that :func:`tie` has made one with another a parameter of its own, of equal value.

    Names that held one parameter before they were tied hold one again. What something else has taken apart, or
    replaced, is left as it is.

    Args:
        model: the tied model, or one that has it as a part.
        names: only groups that hold one of these names; all by default.

    Returns:
        How many weights have got one.

    Raises:
        ConfigurationError: the ties were made in a model of which this is a part.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> untie(model), model[0].weight is model[1].weight
        (1, False)
    """
    known, guards, count = record_tokens(model), orphaned_guards(model), 0
    if above := [name for guard in guards if guard.token not in known for name in guard.whole.names]:
        raise ConfigurationError(f"{listed(above)}: tied in a model of which this is a part; untie that one")
    for guard in guards:  # the others came with copies of a part
        if names is None or not {*names}.isdisjoint(guard.whole.names):
            count += _release(guard.whole, locate_parameters(model))
            guard.part.__dict__[GUARD][guard.token].remove(guard.shared)
    for path, module in [*model.named_modules()]:
        if RECORD not in module.__dict__:
            continue
        record, kept = record_in(module), []
        for shared in record.groups:
            if names is not None and {*names}.isdisjoint(shared.within(clean_name(path)).names):
                kept.append(shared)
            else:
                count += _release(shared, locate_parameters(module))
        left = {name for shared in kept for name in shared.names}
        ties = {tie: own for tie, own in record.ties.items() if own <= left}
        install_record(module, replace(record, ties=ties, groups=kept))
    return count


def tied(model: nn.Module) -> list[TiedGroup]:
    """Return the groups of weights that :func:`tie` has made one, in ``model`` or in a part of it.

    Raises:
        ConfigurationError: some are one no longer; tying again, or loading a state dict into the model, mends that.
    """
    everything = tie_records(model)
    places = locate_parameters(model) if everything else {}
    groups = []
    for shared in everything:
        source = places.get(shared.names[0])
        for name, relation in zip(shared.names, shared.relations, strict=True):
            place = places.get(name)
            was = f"{name!r} was tied to {shared.names[0]!r}, and"
            if place is None or source is None:
                raise ConfigurationError(
                    f"{was} one of them is no parameter of the model any more: something has removed or parametrized "
                    "it. Untie them first"
                )
            if place.relation != relation:
                raise ConfigurationError(
                    f"{was} something has parametrized it since. Untie them first, or parametrize neither"
                )
            if place.parameter is not source.parameter:
                found, needed = tuple(place.parameter.shape), tuple(source.parameter.shape)
                remedy = "Tie again, or load a state dict into the whole model"
                if found != needed:
                    remedy = f"Its shape is {found}, where {needed} belongs: untie them"
                raise ConfigurationError(f"{was} is another tensor now: something has replaced it. {remedy}")
        assert source is not None
        groups.append(TiedGroup(shared.names, (source.parameter,) * len(shared.names), shared.relations, shared=True))
    return groups


def plan(model: nn.Module, groups: Sequence[TiedGroup]) -> list[TieRecord]:
    """Return all names that will hold the weight of each group.

    Raises:
        ConfigurationError: the members of a group cannot be one.
    """
    places = locate_parameters(model)
    before = {
        name: (shared.names, member)
        for shared in tie_records(model)
        for name, member in zip(shared.names, shared.members, strict=True)
    }
    return [_plan(group, places, before) for group in groups]


def _plan(group: TiedGroup, places: dict[str, ParameterLocation], before: Mapping[str, object]) -> TieRecord:
    """Return all names that hold the parameters of a group, or raise where they cannot be one.

    Args:
        group: what is to be one.
        places: of the model.
        before: what names of one parameter have in common that another tie has made one.
    """
    first, named = group.parameters[0], group.names[0]
    names: dict[str, Relation] = {}
    members: dict[object, int] = {}
    numbers = []
    for name, parameter, relation in zip(group.names, group.parameters, group.relations, strict=True):
        told = f"{name!r} cannot be tied to {named!r}" if name != named else f"{name!r} cannot be tied"
        check_alike(parameter, first, told)
        if name not in places:
            raise ConfigurationError(
                f"{told}: it is no parameter of the model any more: something has pruned, parametrized or removed it"
            )
        own = places[name].relation
        if own is None:
            raise ConfigurationError(f"{told}: it is parametrized: it is computed from other weights")
        for alias, place in places.items():
            if place.parameter is parameter:
                whole = relation.then(place.relation or Relation())
                names[alias] = Relation() if whole.agrees_with(Relation(), first.shape) else whole
                numbers.append(members.setdefault(before.get(alias, name), len(members)))
                if names[alias].steps and isinstance(place.owner, nn.RNNBase):
                    raise ConfigurationError(
                        f"{alias!r} cannot be tied through a relation: {type(place.owner).__name__} keeps its weights "
                        "where they cannot be computed. Make it the source of the tie"
                    )
    return TieRecord(tuple(names), tuple(names.values()), tuple(numbers))


def _mean(group: TiedGroup) -> Tensor:
    if not group.parameters[0].is_floating_point() and not group.parameters[0].is_complex():
        raise ConfigurationError(f"{group.names[0]!r} holds integers, which have no mean: use init='source'")
    return torch.stack(group.tensors()).mean(dim=0)


def _release(shared: TieRecord, places: dict[str, ParameterLocation]) -> int:
    """Let all but the source's parameter be parameters of their own, of equal value; return how many these are."""
    source = places[shared.names[0]].parameter if shared.names[0] in places else None
    made: dict[int, nn.Parameter] = {}
    for name, member in zip(shared.names, shared.members, strict=True):
        place = places.get(name)
        if place is None or place.parameter is not source or member == shared.members[0]:
            continue  # another name of the module may have released it
        if place.relation and place.relation.steps:
            unlink(place.owner, place.attribute)
            place = replace(place, holder=place.owner, original=place.attribute)
            made.setdefault(member, place.parameter)
        elif member not in made:
            made[member] = nn.Parameter(source.detach().clone(), source.requires_grad)
        setattr(place.holder, place.original, made[member])
    return len(made)
