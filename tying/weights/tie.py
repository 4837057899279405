"""One parameter under several names: tie and untie."""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, check_choice, listed
from tying.selection.relation import Relation
from tying.selection.resolve import resolve_named
from tying.selection.tie import AnyTie, TiedGroup, parse_ties
from tying.torch_workarounds import foreach_norm, has_values
from tying.weights.derived import Locations, ParameterLocation, locate_parameters
from tying.weights.optimizers import check_alike
from tying.weights.sharding import check_meshes, is_sharded, sharded_modules
from tying.weights.state_dict import (
    TieRecord,
    install_record,
    put_parameter,
    record_in,
    records_below,
    restore_ties,
    share_parameter,
    tie_records,
)
from tying.weights.values import check_finite

Init = Literal["source", "mean"]
FEWEST_VALUES = 16  # of a weight whose scale is compared: of fewer random values, it is chance
LARGEST_RATIO = 5.0  # of the initial scales of a source and of a weight that takes its values, without a warning


def tie(model: nn.Module, ties: Sequence[AnyTie], init: Init = "source") -> list[TiedGroup]:
    """Tie weights: replace the weights that each tie names by one parameter.

    Without a relation, all names hold the same ``Parameter``. With a relation, a parametrization computes the weight
    from the source. The ``state_dict`` has the names and shapes of the untied model. ``load_state_dict`` raises an
    error before it changes ``model`` if the copies of a weight are not bitwise equal; it fills in missing copies.
    Earlier ties that other code has broken are repaired; see :func:`restore`.

    In-place writes (``.data``, ``nn.init``, an adapter's merge) to a weight that a relation computes are lost, unless
    the weight is a view of its source, as a transposed one is: assign the weight, or load ``bake(model)`` into the
    untied model first.

    Args:
        model: the module whose names the patterns match; changed in place.
        ties: ties, their string form ``"source ~ target | relation"``, or mappings of :class:`tying.Tie`'s arguments.
            The left side of ``~`` is the source.
        init: initial value of the shared weight: the source's value, or the mean over the members.

    Returns:
        The groups of these ties, merged with earlier ones; ``parameters`` holds the shared parameter for each name.

    Raises:
        ConfigurationError: the ties do not fit the model, or the members of a group differ in dtype or device, are
            partly frozen, or have other parametrizations. The model is not changed.

    Warns:
        UserWarning: a source has more than five times the scale of a weight that takes its values. An embedding, say,
            is initialised at scale 1 and a linear layer far below: ``"head.weight ~ embedding.weight"`` trains,
            and the other order begins with outputs that are too large.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 8)})
        >>> [group] = tie(model, ["encoder.weight ~ decoder.weight | o i -> i o"])
        >>> torch.equal(model["decoder"].weight, model["encoder"].weight.T), len([*model.parameters()])
        (True, 3)
        >>> sorted(model.state_dict())
        ['decoder.bias', 'decoder.weight', 'encoder.bias', 'encoder.weight']
    """
    groups, warning = make_ties(model, ties, init)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return groups


def make_ties(model: nn.Module, ties: Sequence[AnyTie], init: Init) -> tuple[list[TiedGroup], str]:
    """Tie weights as :func:`tie` does; return the groups, and the warning, which is empty if there is none."""
    check_choice("init", init, ("source", "mean"))
    parsed = parse_ties(ties)
    new = [tie for tie in parsed if tie not in record_in(model).ties]
    groups, names = resolve_named(model, new)  # raises before anything is changed
    if tie_records(model):
        restore_ties(model)
        groups, names = resolve_named(model, new)
    warning = _compare_scales(groups) if init == "source" else ""
    _share(model, groups, init)
    ties_made = record_in(model).ties
    ties_made.update(names)
    members = {name for tie in parsed for name in ties_made[tie]}
    return [group for group in tied(model) if not members.isdisjoint(group.names)], warning


def restore(model: nn.Module) -> list[TiedGroup]:
    """Repair the ties of a model that other code has broken; return all groups.

    ``to_empty`` breaks them: it gives each name of a model on the meta device a parameter, which train apart. So does
    replacing a tied parameter. :func:`audit` reports broken ties. All names hold the source's parameter again. Loading
    a state dict into the whole model repairs ties too, and callbacks and mixins do so before training.

    Args:
        model: the tied model; changed in place.

    Returns:
        All groups of tied weights.

    Raises:
        ConfigurationError: a tied weight has another shape now, or has been parametrized or removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> model = model.to("meta").to_empty(device="cpu")
        >>> model[0].weight is model[1].weight, len(restore(model)), model[0].weight is model[1].weight
        (False, 1, True)
    """
    restore_ties(model)
    return tied(model)


@torch.no_grad()
def _compare_scales(groups: Sequence[TiedGroup]) -> str:
    """Describe the pair of source and member with the largest ratio of scales, or return "" if none is too large.

    The scale of a weight is the root of its mean square. Weights of few values, without values or sharded, and
    weights that are zero are not compared.
    """
    plain = [group for group in groups if all(map(_is_comparable, group.parameters))]
    if not plain:
        return ""
    parameters = [parameter.detach() for group in plain for parameter in group.parameters]
    norms = zip(foreach_norm(parameters, 2.0), parameters, strict=True)
    scales = (float(norm) / math.sqrt(parameter.numel()) for norm, parameter in norms)
    warning, largest = "", LARGEST_RATIO
    for group in plain:
        source, *others = islice(scales, len(group))
        for name, scale in zip(group.names[1:], others, strict=True):
            if scale and source / scale > largest:
                largest = source / scale
                warning = (
                    f"{name!r} takes the values of {group.names[0]!r}, whose scale is {largest:.0f} times as large: "
                    f"{source:.2g}, not {scale:.2g}. Name {name!r} first to begin with its values, as in "
                    f"'{name} ~ {group.names[0]}'"
                )
    return warning


def _is_comparable(parameter: nn.Parameter) -> bool:
    is_large = parameter.is_floating_point() and parameter.numel() >= FEWEST_VALUES
    return is_large and has_values(parameter) and not is_sharded(parameter)


def tie_groups(model: nn.Module, groups: Sequence[TiedGroup], init: Init = "source") -> list[TiedGroup]:
    """Make the weights of each group one parameter, as :func:`tie` does; return the groups."""
    names = _share(model, groups, init)
    return [group for group in tied(model) if not names.isdisjoint(group.names)]


@torch.no_grad()
def _share(model: nn.Module, groups: Sequence[TiedGroup], init: Init) -> set[str]:
    """Make the weights of each group one parameter; return all their names."""
    locations = locate_parameters(model)
    records = plan(model, groups, locations)
    means = [mean_of(group) for group in groups] if init == "mean" else []
    for group, mean in zip(groups, means, strict=False):
        group.parameters[0].copy_(mean)
    for group, record in zip(groups, records, strict=True):
        share_parameter(record, group.parameters[0], locations)
    names = {name for record in records for name in record.names}
    for path, kept in records_below(model):  # a larger group replaces its former record
        kept.groups = [record for record in kept.groups if names.isdisjoint(record.within(path).names)]
    install_record(model, records)
    return names


def untie(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Replace the weights that :func:`tie` has tied by separate parameters of equal value.

    Names that shared a parameter before the tie share one again. Weights that other code has replaced since the tie do
    not change.

    Args:
        model: the tied model, or a model that contains it.
        names: untie only groups that contain one of these names; default: all groups.

    Returns:
        The number of new parameters.

    Raises:
        ConfigurationError: the ties were made in a model that contains this one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight"])
        >>> untie(model), model[0].weight is model[1].weight
        (1, False)
    """
    records, count = records_below(model), 0
    tokens = {record.token for _, record in records}
    if above := [name for group in tie_records(model) if group.root not in tokens for name in group.names]:
        raise ConfigurationError(f"{listed(above)}: tied in a model of which this is a part; untie that one")
    chosen, locations = None if names is None else {*names}, locate_parameters(model)
    for path, record in records:
        kept = []
        for group in record.groups:
            whole = group.within(path)
            if chosen is None or not chosen.isdisjoint(whole.names):
                count += _release(whole, locations)
            else:
                kept.append(group)
        record.groups = kept
    tied_names = {name for group in tie_records(model) for name in group.names}
    for path, record in records:
        record.ties = {
            tie: members
            for tie, members in record.ties.items()
            if tied_names.issuperset(f"{path}.{name}".lstrip(".") for name in members)
        }
    return count


def tied(model: nn.Module) -> list[TiedGroup]:
    """Return the groups of weights that :func:`tie` has tied, in ``model`` or in its submodules.

    Raises:
        ConfigurationError: some weights are separate again. To repair them, see :func:`restore`.
    """
    records = tie_records(model)
    locations = locate_parameters(model) if records else {}
    return [
        TiedGroup(record.names, (shared_by(record, locations),) * len(record.names), record.relations, shared=True)
        for record in (record.among(locations) for record in records)
        if record.names
    ]


def broken(model: nn.Module) -> list[str]:
    """Describe, for each group of tied weights that are separate again, what happened and the remedy."""
    records, locations = tie_records(model), locate_parameters(model)
    messages = []
    for record in (record.among(locations) for record in records):
        try:
            if record.names:
                shared_by(record, locations)
        except ConfigurationError as error:
            messages.append(str(error))
    return messages


def shared_by(record: TieRecord, locations: Mapping[str, ParameterLocation]) -> nn.Parameter:
    """Return the parameter that all names of a record hold; raise an error if they hold different ones."""
    source = locations.get(record.names[0])
    for name, relation in zip(record.names, record.relations, strict=True):
        location = locations.get(name)
        if location is None or source is None:
            problem = (
                "one of them is no longer a parameter of the model: something has removed or parametrized it. Untie "
                "them first"
            )
        elif location.relation != relation:
            problem = "something has parametrized it since. Untie them first, or parametrize neither"
        elif location.parameter is not source.parameter:
            shape, expected = tuple(location.parameter.shape), tuple(source.parameter.shape)
            problem = "is another tensor now: something, such as to_empty, has replaced it. " + (
                "Repair the ties by tying.hard.restore(model), or load a state dict into the whole model"
                if shape == expected
                else f"Its shape is {shape}, where {expected} belongs: untie them"
            )
        else:
            continue
        raise ConfigurationError(f"{name!r} was tied to {record.names[0]!r}, and {problem}")
    return locations[record.names[0]].parameter


def plan(model: nn.Module, groups: Sequence[TiedGroup], locations: Locations | None = None) -> list[TieRecord]:
    """Return the record of each group, with all names that will hold its weight.

    Args:
        model: the model.
        groups: groups of its weights.
        locations: the locations of its parameters, if they are known.

    Raises:
        ConfigurationError: the members of a group cannot be one parameter.
    """
    locations = locations or locate_parameters(model)
    former: dict[str, object] = {  # an identifier of the parameter that a name held before it was tied
        name: (record.names, member)
        for record in tie_records(model)
        for name, member in zip(record.names, record.members, strict=True)
    }
    records, units = [], sharded_modules(model)
    for group in groups:
        check_meshes(dict(zip(group.names, group.parameters, strict=True)))
        _check_unsharded(group.names, units)
        names: dict[str, Relation] = {}
        for name, parameter, relation in zip(group.names, group.parameters, group.relations, strict=True):
            message = f"{name!r} cannot be tied" + (f" to {group.names[0]!r}" if name != group.names[0] else "")
            check_alike(parameter, group.parameters[0], message)
            if name not in locations:
                raise ConfigurationError(
                    f"{message}: it is no longer a parameter of the model: something has pruned, parametrized or "
                    "removed it"
                )
            if locations[name].relation is None:
                raise ConfigurationError(f"{message}: it is parametrized: it is computed from other weights")
            for alias in locations.names.get(id(parameter), ()):
                location = locations[alias]
                whole = relation.then(location.relation or Relation())
                names[alias] = Relation() if whole.agrees_with(Relation(), group.parameters[0].shape) else whole
                former.setdefault(alias, name)
                if names[alias].steps and isinstance(location.owner, nn.RNNBase):
                    raise ConfigurationError(
                        f"{alias!r} cannot be tied through a relation: {type(location.owner).__name__} keeps its "
                        "weights where they cannot be computed. Make it the source of the tie"
                    )
        records.append(TieRecord(tuple(names), tuple(names.values()), tuple(former[alias] for alias in names)))
    return records


def _check_unsharded(names: Sequence[str], units: Sequence[str]) -> None:
    """Raise an error if a module that ``fully_shard`` has sharded contains one of the named weights."""
    for name in names:
        if any(f"{name}.".startswith(f"{unit}.".lstrip(".")) for unit in units):
            raise ConfigurationError(
                f"{name!r} cannot be tied: fully_shard has sharded it already. Tie in configure_model before, and "
                f"shard {listed(owners_of(names))} together: tying.hard.shard_groups(model, units) returns the lists "
                "of modules for fully_shard"
            )


def owners_of(names: Iterable[str]) -> list[str]:
    """Return the names of the modules that hold the named weights."""
    return [*dict.fromkeys(name.rpartition(".")[0] or "the model" for name in names)]


def mean_of(group: TiedGroup) -> Tensor:
    """Return the mean over the members of a group, in the source's layout.

    Raises:
        ConfigurationError: the members hold integers.
        NonFiniteError: a member is not finite.
    """
    if not group.parameters[0].is_floating_point() and not group.parameters[0].is_complex():
        raise ConfigurationError(f"{group.names[0]!r} holds integers, which have no mean: use init='source'")
    for name, parameter in zip(group.names, group.parameters, strict=True):
        check_finite(name, parameter)  # the mean would spread it
    return torch.stack(group.tensors()).mean(dim=0)


def _release(group: TieRecord, locations: Mapping[str, ParameterLocation]) -> int:
    """Replace all members but the source by separate parameters of equal value; return the number of new parameters."""
    members = {
        locations[name]: member for name, member in zip(group.names, group.members, strict=True) if name in locations
    }
    source = locations[group.names[0]].parameter if group.names[0] in locations else None
    released: dict[object, nn.Parameter] = {}
    for location, member in members.items():  # a module may have several names
        if source is not None and location.parameter is source and member != group.members[0]:
            weight = (location.relation or Relation())(source).detach().clone()
            separate = released.setdefault(member, nn.Parameter(weight, source.requires_grad))
            put_parameter(location, separate, Relation())
    return len(released)
