"""Shallower models: LayerDrop's depth on demand."""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from operator import index
from typing import Literal, NamedTuple

from torch import nn

from tying.depth.apply import remove_merge
from tying.depth.loop import loops_in
from tying.depth.recur import replace_layers
from tying.depth.recurrent import Recurrent
from tying.depth.stages import Stage, absent_shortcut, children, find_stages
from tying.errors import ConfigurationError, check_range, listed
from tying.selection.index import clean_name
from tying.selection.relation import Relation
from tying.selection.tie import TiedGroup
from tying.weights.derived import derived_weights, locate_parameters
from tying.weights.state_dict import install_record, record_in, records_below, tie_records
from tying.weights.tie import tie_groups, untie


class TiedWeight(NamedTuple):
    """A tied weight of a module, and its relation to the source of its group."""

    owner: nn.Module
    attribute: str
    relation: Relation


def extract(
    model: nn.Module,
    blocks: str | Sequence[str],
    keep: Literal["every other"] | float | Iterable[int] = "every other",
) -> nn.Module:
    """Return a shallower copy of a model that has only some of its blocks.

    The copy computes exactly what the model computes in evaluation when it skips the other blocks whole. It is plain:
    merges that :func:`tying.depth.apply_merge` has put into the model are removed. The other blocks are gone from their
    ``nn.ModuleList`` or ``nn.Sequential``, whose entries are renumbered, as are layer indices such as ``layer_idx``;
    numbers of layers in a ``config``, and lists such as its ``layer_types``, follow. So a model that is built from the
    changed config loads the copy's state dict. Ties and computed weights stay among the remaining blocks. Mixins
    that have changed a LightningModule do not change its copy again; callbacks of a Trainer do.

    Args:
        model: is not changed.
        blocks: a pattern of names of modules, or several; a leading ``!`` excludes.
        keep: the blocks to keep, of the n matched blocks in the model's order: ``"every other"``, which is 0, 2, 4, …;
            indices; or a fraction f in (0, 1]: ``round(f · n)`` blocks, evenly spaced, the first and last included.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module in no container; ``keep`` is none of these, an index
            is out of range, or an ``nn.ModuleList`` would be left empty; a block to remove changes the shape, or makes
            what the other blocks need, such as the position bias that T5's first block makes; a config computes the
            kind of each layer, and would take the remaining ones for others.

    Example:
        >>> import torch
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        >>> shallow = extract(model, "*", keep=[0, 1, 5])
        >>> len(shallow), torch.equal(shallow[2].weight, model[5].weight), len(model)
        (3, True, 6)

    Source: A. Fan, E. Grave and A. Joulin, Reducing transformer depth on demand with structured dropout, 2019.
    """
    stages = find_stages(model, blocks)
    names = [name for stage in stages for name in stage.names]
    remaining = {names[index] for index in _indices(keep, names)}
    for stage in stages:
        _check_removal(model, stage, remaining)
    shallow = copy.deepcopy(model)
    remove_merge(shallow)
    groups = _separate_ties(shallow, stages)
    for stage in reversed(find_stages(shallow, blocks)):  # positions of later entries change
        positions = _removed_positions(stage, remaining)
        entries = [entry for position, entry in enumerate(children(stage.container)) if position not in positions]
        _check_lists(stage, replace_layers(shallow, stage.path, stage.container, entries))
    _tie_again(shallow, groups)
    shallow.__dict__["_is_extracted"] = True  # for mixins
    return shallow


def _indices(keep: object, names: Sequence[str]) -> list[int]:
    """Return the indices of the blocks that the argument ``keep`` of :func:`extract` selects."""
    count = len(names)
    if isinstance(keep, str) and keep == "every other":
        return [*range(0, count, 2)]
    if isinstance(keep, float | int):
        check_range("keep, if it is a fraction of the blocks,", keep, "(0, 1]")
        wanted = round(keep * count)
        indices = [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]
    else:
        try:
            indices = [*map(index, keep)]  # type: ignore[call-overload]  # the except clause checks it
        except TypeError:
            raise ConfigurationError(
                f"keep must be 'every other', indices of blocks or a fraction, not {keep!r}"
            ) from None
    if outside := [i for i in indices if not 0 <= i < count]:
        raise ConfigurationError(
            f"keep has the indices {listed(map(str, outside))}, and the {count} blocks {listed(names)} have 0 to "
            f"{count - 1}: choose among these"
        )
    if not indices:
        raise ConfigurationError(f"keep={keep!r} would leave none of {listed(names)}: keep one block or more")
    return indices


def _removed_positions(stage: Stage, remaining: Collection[str]) -> dict[int, str]:
    """Return the positions in their container, and the names, of the blocks of a stage that do not remain."""
    return {position: name for position, name in enumerate(stage.names, stage.start) if name not in remaining}


def _check_removal(model: nn.Module, stage: Stage, remaining: Collection[str]) -> None:
    """Raise a ConfigurationError if a block of a stage that is to be removed cannot be."""
    entries = children(stage.container)
    if any(isinstance(module, Recurrent) and module.blocks is stage.container for module in model.modules()):
        raise ConfigurationError(
            f"{stage.names[0]!r} is a step of a tying.depth.Recurrent: set its steps, or call unrecur first"
        )
    removed = _removed_positions(stage, remaining)
    others = [block for position, (_, block) in enumerate(entries) if position not in removed]
    if not others and not isinstance(stage.container, nn.Sequential):  # an empty one passes on its input
        raise ConfigurationError(
            f"{stage.path or 'the model'!r} would be left without a block: keep one of {listed(stage.names)} or more"
        )
    for position, name in removed.items():
        if loops_in(entries[position][1]):
            raise ConfigurationError(f"{name!r} cannot be removed, since it is in a loop: call unloop first")
        if reason := _changes_shape(entries[position][1]):
            raise ConfigurationError(f"{name!r} cannot be removed, since it changes the shape: {reason}. Keep it")
    if 0 in removed:
        first = entries[0][1]
        forward = type(first).forward  # classes of blocks with computed weights differ
        alike = [_weight_names(block) for block in others if type(block).forward is forward]
        alone = [name for name in _weight_names(first) if alike and not any(name in names for names in alike)]
        if alone:
            raise ConfigurationError(
                f"{removed[0]!r} cannot be removed, since only it has the weight {alone[0]!r}, and the other "
                "blocks may need what it computes with it. Keep it"
            )


def _check_lists(stage: Stage, lists: Sequence[str]) -> None:
    """Raise a ConfigurationError if lists of a config, such as its ``layer_types``, could not follow."""
    if lists:
        raise ConfigurationError(
            f"the config above {stage.path!r} computes {listed(lists)} from other values, which would not fit the "
            "remaining blocks: keep blocks that have the kinds of the config's first ones, in this order"
        )


def _weight_names(block: nn.Module) -> dict[str, None]:
    """Return the names of a block's weights, in order; of a computed weight, not those that it is computed from."""
    derived = derived_weights(block)
    hidden = {
        f"{name.removesuffix(weight.name)}{prefix}" for name, weight in derived.items() for prefix in weight.prefixes
    }
    names = [clean_name(name) for name, _ in block.named_parameters()]
    return dict.fromkeys([name for name in names if not name.startswith((*hidden,))] + [*derived])


def _changes_shape(block: nn.Module) -> str:
    """Return how a residual block shows that its output has another shape than its input, or an empty string."""
    for name in ("shortcut", "downsample"):
        shortcut = getattr(block, name, None)
        if isinstance(shortcut, nn.Module) and any(True for _ in shortcut.parameters()):
            return f"its {name} has weights"
    return f"its {flag} is False" if (flag := absent_shortcut(block)) else ""


def _separate_ties(model: nn.Module, stages: Iterable[Stage]) -> list[list[TiedWeight]]:
    """Untie the weights that are tied over several entries of the stages' containers; return each group's weights."""
    records = records_below(model)
    tokens = {record.token for _, record in records}
    if not (groups := tie_records(model)):
        return []
    install_record(model, [])
    for _, record in records:  # the model may be a part of that in which the ties were made, and its copy is not
        record.groups = [
            group if group.root in tokens else replace(group, root=record_in(model).token) for group in record.groups
        ]
    entries = [f"{stage.path}.{key}.".lstrip(".") for stage in stages for key, _ in children(stage.container)]
    spanning = [
        group
        for group in groups
        if any(0 < sum(name.startswith(entry) for name in group.names) < len(group.names) for entry in entries)
    ]
    locations = locate_parameters(model)
    weights = [
        [
            TiedWeight(locations[name].owner, locations[name].attribute, relation)
            for name, relation in zip(group.names, group.relations, strict=True)
        ]
        for group in spanning
    ]
    if spanning:
        untie(model, [group.names[0] for group in spanning])
    return weights


def _tie_again(model: nn.Module, groups: Iterable[Sequence[TiedWeight]]) -> None:
    """Tie the weights of each group that are still in the model."""
    paths = {module: clean_name(path) for path, module in model.named_modules()}
    tied = []
    for group in groups:
        weights = {
            id(parameter := getattr(weight.owner, weight.attribute)): (
                f"{paths[weight.owner]}.{weight.attribute}".lstrip("."),
                parameter,
                weight.relation,
            )
            for weight in group
            if weight.owner in paths
        }
        if len(weights) > 1:
            names, parameters, relations = zip(*weights.values(), strict=True)
            to_source = relations[0].inverse()
            tied.append(TiedGroup(names, parameters, tuple(to_source.then(relation) for relation in relations)))
    if tied:
        tie_groups(model, tied)
