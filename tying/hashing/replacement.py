"""Tables in the place of weights, in any module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tying.errors import ConfigurationError
from tying.hard.places import Place, check_free
from tying.hashing.layers import Hashed, HashedConv2d, HashedEmbedding, HashedLinear, computed_weight, put_table
from tying.hashing.virtual import VirtualWeight

LAYERS: dict[type[nn.Module], type[Hashed]] = {
    nn.Linear: HashedLinear,
    nn.Conv2d: HashedConv2d,
    nn.Embedding: HashedEmbedding,
}


def table_names(kind: type[nn.Module], weight: str) -> tuple[str, str]:
    """Return the names of a weight's table, and of the map from it, in what becomes of a module of this class."""
    layer = kind in LAYERS and weight == "weight"
    return ("table", "virtual") if layer else (f"{weight}_table", f"{weight}_virtual")


def hash_attribute(module: nn.Module, name: str, virtual: VirtualWeight, table: nn.Parameter) -> str:
    """Put a table in the place of a weight of any module; return the table's name.

    Linear, convolution and embedding layers become hashed ones. Any other module gets a class of its own, as torch's
    parametrizations give it one, whose weight is a property.
    """
    kind = type(module)
    names = table_names(kind, name)
    if names == ("table", "virtual"):
        module.__class__ = LAYERS[kind]
    else:
        computes = {**getattr(kind, "computes", {}), name: names}
        plain = next(one for one in kind.__mro__ if "computes" not in vars(one))
        content: dict[str, Any] = {
            "computes": computes,
            **{weight: computed_weight(*both) for weight, both in computes.items()},
        }
        for reset in ("reset_parameters", "_reset_parameters"):
            if hasattr(plain, reset):
                content[reset] = _resetting(reset)
        if issubclass(plain, nn.RNNBase):  # whose copies hold what is computed, too: as numbers, without a graph
            content["__getstate__"] = torch.no_grad()(plain.__getstate__)
        module.__class__ = type(f"Hashed{plain.__name__.removeprefix('Hashed')}", (plain,), content)
    put_table(module, name, names, table, virtual)
    return names[0]


def _resetting(reset: str) -> Callable[[nn.Module], None]:
    """Return the method that draws tables, and all else, as the plain module's method of that name draws weights."""

    @torch.no_grad()
    def draw(module: nn.Module) -> None:
        hashed: Any = type(module)
        plain = hashed.__bases__[0]
        computes = {name: both for name, both in hashed.computes.items() if name not in getattr(plain, "computes", {})}
        parts = {name: (getattr(module, held), getattr(module, own)) for name, (held, own) in computes.items()}
        weights = {name: nn.Parameter(table.new_empty(own.shape)) for name, (table, own) in parts.items()}
        module.__class__ = plain
        module._parameters |= weights
        try:
            getattr(module, reset)()
        finally:
            for name in weights:
                del module._parameters[name]
            module.__class__ = hashed
        for name, (table, own) in parts.items():
            table.copy_(own.drawn_from(weights[name].flatten() / own.scale))

    return draw


def check_hashable(name: str, places: Mapping[str, Place]) -> None:
    """Raise where a weight cannot be replaced by a table.

    Args:
        name: of the weight.
        places: of the whole model's weights.

    Raises:
        ConfigurationError: it is parametrized, or tied, or its embedding has an option that a hashed one lacks.
    """
    check_free(name, places)
    place = places[name]
    if not place.parameter.numel():
        raise ConfigurationError(f"{name!r} has no entries to hash")
    if isinstance(place.owner, nn.Embedding | nn.EmbeddingBag):
        exact = type(place.owner) is nn.Embedding  # which becomes a layer of ours
        lacking = ("max_norm", "sparse", "scale_grad_by_freq") if exact else ("sparse",)
        if odd := [option for option in lacking if getattr(place.owner, option)]:
            raise ConfigurationError(f"{name!r} belongs to an embedding with {odd[0]}, which a hashed one lacks")
