"""Stages, the runs of consecutive blocks in one container: select them, and replace their blocks by fewer or more."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from tying.depth.merge import Merge
from tying.errors import ConfigurationError, listed
from tying.selection.index import clean_name, matching_modules

# names that transformers, torch and timm give to the number of layers
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers")
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers", "layers_block_type")
INDEX_ENDINGS = ("layer_idx", "layer_index", "layer_id", "layer_number", "layer_num", "block_idx", "block_index")


@dataclass(frozen=True)
class Stage:
    """A run of consecutive blocks in one container.

    Attributes:
        path: the name of the container in the model.
        container: an ``nn.ModuleList`` or ``nn.Sequential``, or another module where the blocks stay in place.
        start: the position of the first block in the container.
        names: the names of the blocks in the model.
        blocks: the blocks.
    """

    path: str
    container: nn.Module
    start: int
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]


def match_modules(
    model: nn.Module, patterns: str | Sequence[str], aliases: bool = False, argument: str = "blocks"
) -> dict[str, nn.Module]:
    """Return the modules of a model whose names match patterns, merges apart, by name in the model's order.

    Args:
        model: any module.
        patterns: a pattern of module names, or several; a leading ``!`` excludes.
        aliases: also return the further names of a module that has several.
        argument: the name of the argument that holds the patterns, for errors.

    Raises:
        ConfigurationError: a pattern matches nothing, or the patterns exclude all that they match.
    """
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=not aliases):
        if path and not isinstance(module, Merge):
            modules.setdefault(
                clean_name(path), module
            )  # of a wrapper and its module, which have one name, the wrapper
    return matching_modules(modules, patterns, argument)


def find_stages(model: nn.Module, patterns: str | Sequence[str], any_parent: bool = False) -> list[Stage]:
    """Return the stages that the modules matched by patterns form, in the model's order.

    Args:
        model: any module.
        patterns: a pattern of module names, or several; a leading ``!`` excludes.
        any_parent: whether blocks may be in any module, instead of an ``nn.ModuleList`` or ``nn.Sequential``.

    Raises:
        ConfigurationError: a pattern matches nothing, or a module that is in no container.
    """
    blocks = match_modules(model, patterns, aliases=True)
    containers = {clean_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    parents = {name: name.rpartition(".")[0] for name in blocks}
    for name in blocks:
        if outer := next((other for other in blocks if name.startswith(f"{other}.")), None):
            raise ConfigurationError(
                f"blocks: {name!r} is a part of {outer!r}, which matches too: name only the blocks"
            )
    kinds = nn.Module if any_parent else nn.ModuleList | nn.Sequential
    if loose := [name for name, path in parents.items() if not isinstance(containers[path], kinds)]:
        raise ConfigurationError(
            f"blocks: {listed(map(repr, loose))}: not an entry of an nn.ModuleList or nn.Sequential, the containers "
            "whose blocks can be replaced: name entries of such a container, as in 'layers.*'"
        )
    stages = []
    for path, names in groupby(blocks, parents.__getitem__):
        container = containers[path]
        keys = [f"{path}.{clean_name(key)}".lstrip(".") for key, _ in children(container)]
        places = [(keys.index(name), name) for name in names]
        for _, run in groupby(enumerate(places), lambda pair: pair[1][0] - pair[0]):
            positions, matched = zip(*(place for _, place in run), strict=True)
            stages.append(Stage(path, container, positions[0], matched, tuple(blocks[name] for name in matched)))
    return stages


def absent_shortcut(block: nn.Module) -> str | None:
    """Return the attribute by which a mobile block of torchvision or timm says that it has no shortcut, or None."""
    return next((name for name in ("use_res_connect", "has_skip") if getattr(block, name, True) is False), None)


def children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the entries of a container with their keys; a module with two keys appears twice."""
    return [(key, module) for key, module in container.named_modules(remove_duplicate=False) if key and "." not in key]


def replace_children(container: nn.Module, entries: Sequence[tuple[str, nn.Module]]) -> None:
    """Replace the entries of a container.

    If the keys of the container count up, as ``0, 1, …`` or ``layer_0, layer_1, …``, the new keys do, too.

    Args:
        container: changed in place.
        entries: the new entries, each with its key in a container whose keys do not count up.
    """
    keys = [key for key, _ in children(container)]
    numbered = [re.fullmatch(r"(.*?)(\d+)", key) for key in keys]
    parts = [(match[1], int(match[2])) for match in numbered if match]
    counts_up = parts == [(parts[0][0], parts[0][1] + i) for i in range(len(keys))] if parts else False
    for key in keys:
        delattr(container, key)
    for i, (key, module) in enumerate(entries):
        container.add_module(f"{parts[0][0]}{parts[0][1] + i}" if counts_up else key, module)


def renumber(
    model: nn.Module, path: str, former: Sequence[nn.Module], layers: Sequence[nn.Module], origins: Sequence[int]
) -> list[str]:
    """Give layers the indices of their new positions, and configs the new number of layers.

    An index is an integer attribute such as ``layer_idx``, which counts up over the former layers. The number is set,
    and lists such as ``layer_types`` are cut or extended, where a ``config`` of the container's parents, or an
    attribute of its parent, has them.

    Args:
        model: changed in place.
        path: the name of the container of the layers.
        former: its layers before they were replaced; indices are read there first.
        layers: its layers now: some of the former, or copies of them.
        origins: the position of each layer, or of the one it is a copy of, among the former.

    Returns:
        The names of lists that do not say what each layer is, since a config computes them from other values.
    """
    indices = _layer_indices(former)
    for position, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
        if layers.count(layer) == 1:  # a layer at several positions has no index
            shift_indices(layer, position - origin, indices)
    modules = {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    parts = path.split(".")
    parents = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
    configs = {id(config): config for parent in parents if (config := getattr(parent, "config", None)) is not None}
    return [
        name for owner in (*configs.values(), *parents[-1:]) for name in _set_counts(owner, path, len(former), origins)
    ]


def shift_indices(layer: nn.Module, shift: int, indices: Sequence[tuple[str, str]] | None = None) -> None:
    """Add ``shift`` to the indices of a layer, each the name of a submodule and an attribute; default: all."""
    modules = dict(layer.named_modules())
    for name, attribute in indices_in(layer) if indices is None else indices:
        if name in modules and hasattr(modules[name], attribute):
            setattr(modules[name], attribute, getattr(modules[name], attribute) + shift)


def indices_in(layer: nn.Module) -> dict[tuple[str, str], int]:
    """Return the indices of its position that a layer holds, by submodule and attribute, such as ``layer_idx``."""
    return {
        (name, attribute): value
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is int and attribute.endswith(INDEX_ENDINGS)
    }


def _layer_indices(layers: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """Return the submodules and attributes that count up over the layers."""
    offsets: dict[tuple[str, str], set[int]] = {}
    for position, layer in enumerate(layers):
        for index, value in indices_in(layer).items():
            offsets.setdefault(index, set()).add(value - position)
    return [index for index, values in offsets.items() if len(values) == 1]


def _set_counts(owner: Any, path: str, former: int, origins: Sequence[int]) -> list[str]:
    """Set the number of layers of a container, and lists with an entry for each, in a config or module.

    Returns the names of lists that cannot be set, and have other entries.

    Args:
        owner: changed in place.
        path: the name of the container; configs of encoder–decoder models count the layers of both.
        former: the former number of layers; other numbers and lists stay.
        origins: the former position of each layer.
    """
    decoder = "decoder" in path
    counts = [name for name in (DECODER_COUNTS if decoder else ENCODER_COUNTS) if hasattr(owner, name)]
    if not decoder or not counts or getattr(owner, "is_decoder", False):
        counts += LAYER_COUNTS
    values: dict[str, Any] = {name: len(origins) for name in counts if getattr(owner, name, None) == former}
    for name in LAYER_LISTS:
        entries = getattr(owner, name, None)
        if isinstance(entries, list | tuple) and len(entries) == former:
            values[name] = type(entries)(entries[origin] for origin in origins)
    for name, value in values.items():
        with suppress(AttributeError, NotImplementedError):  # of properties that are computed from others
            setattr(owner, name, value)
    with suppress(AttributeError):
        depths, numbers = getattr(owner, "depths", None), [int(part) for part in path.split(".") if part.isdigit()]
        if isinstance(depths, list) and numbers and depths[numbers[-1] : numbers[-1] + 1] == [former]:
            owner.depths = [*depths[: numbers[-1]], len(origins), *depths[numbers[-1] + 1 :]]
    return [name for name in LAYER_LISTS if name in values and getattr(owner, name) != values[name]]
