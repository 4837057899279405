"""Turn stages of equal blocks into recurrent blocks, and back."""

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from tying.depth.loop import loops_in
from tying.depth.recurrent import Recurrent, check_steps, norms_in
from tying.depth.stages import Stage, children, find_stages, renumber, replace_children
from tying.errors import ConfigurationError, check_choice, listed
from tying.selection.index import check_shape, clean_name
from tying.weights.derived import derived_by_others
from tying.weights.optimizers import check_alike
from tying.weights.state_dict import records_below, tie_records
from tying.weights.tie import Init, untie


def recur(
    model: nn.Module,
    blocks: str | Sequence[str],
    steps: int | None = None,
    per_step_norm: bool = True,
    init: Init = "source",
) -> int:
    """Turn each stage of equal blocks into one :class:`Recurrent`; return the number of stages.

    A stage is a run of consecutive blocks in one ``nn.ModuleList`` or ``nn.Sequential``. The Recurrent takes the place
    of its first block; later entries are renumbered. Step t is block t with the shared weights. State dicts have
    the keys ``{container}.{place}.blocks.{step}.…``, under which each shared weight appears once for each step, as for
    a weight that is tied by hand. A ``config`` of the model, such as transformers', then counts all steps as layers.

    Args:
        model: changed in place.
        blocks: a pattern of names of modules, or several; a leading ``!`` excludes.
        steps: the number of steps of each Recurrent; default: the number of blocks. Further steps are copies of the
            blocks, from the first on.
        per_step_norm: whether step t has the normalisation layers of block t; if False, all use the first block's.
        init: the initial shared weights: the first block's, or the mean over the blocks.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module in no container; a stage has one block, or blocks
            whose classes, weights or kinds differ; weights are tied or computed already; a block is recurrent already.
            The model is then unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, 2))
        >>> recur(model, "{0..5}"), model(torch.zeros(1, 4)).shape, sum(p.numel() for p in model.parameters())
        (1, torch.Size([1, 2]), 30)
        >>> list(model.state_dict())[:2], unrecur(model), len(model)
        (['0.blocks.0.weight', '0.blocks.0.bias'], 1, 7)

    Source: Q. Liao and T. Poggio, Bridging the gaps between residual learning, recurrent neural networks and visual
    cortex, 2016.
    """
    check_choice("init", init, ("source", "mean"))
    if steps is not None:
        check_steps(steps)
    stages = find_stages(model, blocks)
    for stage in stages:
        _check_stage(model, stage)
    for stage in reversed(stages):  # positions of later entries change
        _make_recurrent(model, stage, len(stage.blocks) if steps is None else steps, per_step_norm, init)
    return len(stages)


def unrecur(model: nn.Module) -> int:
    """Turn each :class:`Recurrent` that :func:`recur` has made into separate blocks; return the number of stages.

    The model computes the same function. Step t becomes a block with copies of the shared weights, and the names are
    those before ``recur``, unless ``steps`` has changed.

    Args:
        model: changed in place.

    Raises:
        ConfigurationError: weights of the steps are computed, or tied to weights beyond. The model is then unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> recur(model, "*"), unrecur(model), model[0].weight is model[1].weight
        (1, 1, False)
        >>> torch.equal(model[0].weight, model[1].weight)
        True
    """
    recurrents = {
        name: module for name, module in model.named_modules() if isinstance(module, Recurrent) and module.former_keys
    }
    for name, recurrent in recurrents.items():
        _check_ties(model, clean_name(name), recurrent)
    for name, recurrent in reversed(recurrents.items()):
        path = name.rpartition(".")[0]
        container = model.get_submodule(path)
        blocks, sources = _separate(recurrent)
        keys = [*recurrent.former_keys, *(f"{recurrent.former_keys[-1]}_{step}" for step in range(len(blocks)))]
        entries = [
            entry
            for key, module in children(container)
            for entry in (zip(keys, blocks, strict=False) if module is recurrent else [(key, module)])
        ]
        replace_layers(model, clean_name(path), container, entries, sources)
    return len(recurrents)


def _make_recurrent(model: nn.Module, stage: Stage, steps: int, per_step_norm: bool, init: Init) -> None:
    """Put a :class:`Recurrent` in the place of the blocks of a stage."""
    further = [stage.blocks[step % len(stage.blocks)] for step in range(len(stage.blocks), steps)]
    sources = {copy.deepcopy(block): block for block in further}
    recurrent = Recurrent.of_blocks([*stage.blocks, *sources][:steps], per_step_norm, init)
    entries, end = children(stage.container), stage.start + len(stage.blocks)
    recurrent.former_keys = tuple(key for key, _ in entries[stage.start : end])
    entries[stage.start : end] = [(recurrent.former_keys[0], recurrent)]
    replace_layers(model, stage.path, stage.container, entries, sources)


def _separate(recurrent: Recurrent) -> tuple[list[nn.Module], dict[nn.Module, nn.Module]]:
    """Return a block with separate weights for each step, and the block that each is a copy of, if it is one."""
    untie(recurrent)
    blocks = [*recurrent.blocks]
    for block in blocks[1:]:
        for name, norm in norms_in(block).items():
            if name and norm is norms_in(blocks[0])[name]:  # shared by all steps
                block.set_submodule(name, copy.deepcopy(norm))
    sources = {copy.deepcopy(blocks[-1]): blocks[-1] for _ in range(len(blocks), recurrent.steps)}
    return [*blocks, *sources][: recurrent.steps], sources


def replace_layers(
    model: nn.Module,
    path: str,
    container: nn.Module,
    entries: Sequence[tuple[str, nn.Module]],
    sources: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> list[str]:
    """Replace the entries of a container; indices of layers and configs follow.

    Returns the lists of configs that cannot follow, see :func:`renumber`.

    Args:
        model: changed in place.
        path: the name of the container in the model.
        container: the container.
        entries: the new entries, with keys, made of the blocks of the former entries and of copies.
        sources: the block that each copy is made from.
    """
    former, layers = layers_in(children(container)), layers_in(entries)
    positions = {layer: position for position, layer in enumerate(former)}
    replace_children(container, entries)
    return renumber(model, path, former, layers, [positions[sources.get(layer, layer)] for layer in layers])


def layers_in(entries: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Return the layers of entries of a container: of a :class:`Recurrent`, the blocks of its steps."""
    return [layer for _, entry in entries for layer in (entry.blocks if isinstance(entry, Recurrent) else [entry])]


def _check_stage(model: nn.Module, stage: Stage) -> None:
    """Raise a ConfigurationError unless the blocks of a stage can share their weights."""
    recurrents = [module for module in model.modules() if isinstance(module, Recurrent)]
    inside = {part for recurrent in recurrents for part in recurrent.modules()}
    for name, block in zip(stage.names, stage.blocks, strict=True):
        if block in inside or any(isinstance(module, Recurrent) for module in block.modules()):
            raise ConfigurationError(
                f"blocks: {name!r} is recurrent already: change the steps of the Recurrent, or undo it by unrecur first"
            )
        if loops_in(block):
            raise ConfigurationError(f"blocks: {name!r} is in a loop: call unloop first, or set the passes of the loop")
        if hasattr(block, "backward_pass"):
            raise ConfigurationError(
                f"blocks: {name!r} is reversible, and computes its gradients by itself, which a Recurrent cannot: tie "
                "the weights of the blocks by tying.hard.tie instead"
            )
        if computed := derived_by_others(block):
            raise ConfigurationError(
                f"blocks: {name!r} computes its weights {listed(computed)}: call recur first, then let the weights of "
                "the Recurrent be computed"
            )
    if len({*stage.blocks}) < max(2, len(stage.blocks)):
        raise ConfigurationError(
            f"blocks: {stage.names[0]!r} has no other block beside it in {stage.path or 'the model'!r}: a stage needs "
            "two blocks or more; name consecutive ones, or make a tying.depth.Recurrent of the block"
        )
    for name, block in zip(stage.names[1:], stage.blocks[1:], strict=True):
        if difference := _difference(stage.names[0], stage.blocks[0], name, block):
            raise ConfigurationError(
                f"blocks: {difference}: the blocks of a stage must be equal to share weights; name equal ones only"
            )
    for key, entry in children(stage.container)[stage.start :]:
        _check_ties(model, f"{stage.path}.{key}".lstrip("."), entry)


def _check_ties(model: nn.Module, name: str, entry: nn.Module) -> None:
    """Raise a ConfigurationError if weights of an entry are computed in a Recurrent, or are tied to others."""
    if isinstance(entry, Recurrent) and (computed := derived_by_others(entry)):
        raise ConfigurationError(
            f"{name!r} computes its weights {listed(computed)}: make them parameters again before unrecur"
        )
    tokens = {record.token for _, record in records_below(entry)}
    for group in tie_records(model):
        if group.root not in tokens and any(clean_name(tied).startswith(f"{name}.") for tied in group.names):
            raise ConfigurationError(
                f"{listed(map(repr, group.names))} are tied, and their names would change: untie them by "
                "tying.hard.untie(model) first, and tie them after"
            )


def _difference(first: str, source: nn.Module, second: str, block: nn.Module) -> str:
    """Describe why two blocks cannot share weights, or return an empty string."""
    if type(source) is not type(block):
        return f"{first!r} is a {type(source).__name__} and {second!r} a {type(block).__name__}"
    ours, theirs = dict(source.named_parameters()), dict(block.named_parameters())
    for name in ours | theirs:
        if name not in ours or name not in theirs:
            having, lacking = (first, second) if name in ours else (second, first)
            shape = tuple((ours | theirs)[name].shape)
            return f"{having!r} has a weight {name!r} of shape {shape}, which {lacking!r} lacks"
        for path, parameter in ((first, ours[name]), (second, theirs[name])):
            check_shape(f"{path}.{name}", parameter, "blocks: ")
        if ours[name].shape != theirs[name].shape:
            shapes = f"{tuple(ours[name].shape)} and {tuple(theirs[name].shape)}"
            return f"'{first}.{name}' and '{second}.{name}' have the shapes {shapes}"
        check_alike(theirs[name], ours[name], f"blocks: '{second}.{name}' cannot share the weight of {first!r}")
    texts = [
        {
            f"{name}.{attribute}".lstrip("."): value
            for name, module in part.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, str) and "type" in attribute  # as transformers' layer_type, for which masks differ
        }
        for part in (source, block)
    ]
    unlike = [name for name, value in texts[0].items() if value != texts[1].get(name)]
    return (
        f"{unlike[0]} of {first!r} is {texts[0][unlike[0]]!r}, of {second!r} {texts[1].get(unlike[0])!r}"
        if unlike
        else ""
    )
