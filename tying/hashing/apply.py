"""Hash the weights of any model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, listed
from tying.hard import tie
from tying.hashing.hashes import Hash, UniformHash
from tying.hashing.layers import (
    Hashed,
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    computed_weight,
    of_rows,
    put_table,
)
from tying.hashing.parametrization import HashedParametrization, Index, table_entries
from tying.hashing.report import HashReport, report
from tying.selection.resolve import select
from tying.selection.tie import Tie
from tying.weights.derived import ParameterLocation, check_free, derived_in, locate_parameters
from tying.weights.optimizers import check_alike

LAYERS: dict[type[nn.Module], type[Hashed]] = {
    nn.Linear: HashedLinear,
    nn.Conv2d: HashedConv2d,
    nn.Embedding: HashedEmbedding,
}


def table_names(kind: type[nn.Module], weight: str) -> tuple[str, str]:
    """Return the names of a weight's table, and of the map from it, in what becomes of a module of this class."""
    layer = kind in LAYERS and weight == "weight"
    return ("table", "virtual") if layer else (f"{weight}_table", f"{weight}_virtual")


def hash_attribute(module: nn.Module, name: str, virtual: HashedParametrization, table: nn.Parameter) -> str:
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


def check_hashable(name: str, places: Mapping[str, ParameterLocation]) -> None:
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


Init = Literal["fresh", "mean"]


@torch.no_grad()
def hash_weights(
    model: nn.Module,
    parameters: Sequence[str],
    table_ratio: float | None = None,
    hash: Hash = UniformHash(),  # noqa: B008  # frozen
    scope: Literal["layer", "network"] = "layer",
    init: Init = "fresh",
    sign: bool = False,
    density: float = 1.0,
    index: Index = "auto",
    scaled: bool = True,
) -> HashReport:
    """Let weights of a model share the entries of a table each, or of one for all.

    Linear, convolution and embedding layers become :class:`HashedLinear` and so on, in place; other modules get a
    class of their own, whose weight is computed. With ``scope="layer"`` each weight has a table of its own, and draws
    of its own, since its name is mixed into the seed. With ``scope="network"`` identifiers go on from weight to weight,
    the tables are one parameter, as by :func:`tying.hard.tie`, and each weight is that times a constant, its scale: as
    initialised, over that of all weights, unless ``scaled=False``.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` leaves out. Those of fewer than two dimensions are skipped,
            unless the hash is recurrent.
        table_ratio: entries of a table for each weight, in (0, 1].
        hash: h; uniform by default.
        scope: a table for each weight, or one.
        init: ``"fresh"``: entries are drawn from the weights as they are; ``"mean"``: each is the mean over its uses.
        sign: multiply by ±1.
        density: fraction of weights that are kept.
        index: how the hash is evaluated.
        scaled: with ``scope="network"``, multiply by each weight's own scale; or let weights be the entries as they
            are, as in the papers.

    Raises:
        ConfigurationError: a pattern matches nothing that can be hashed, a weight is tied, parametrized or hashed
            already, weights of one table differ in dtype, device or whether
            they are trained, or the hash does not fit; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> report = hash_weights(model, ["*.weight"], table_ratio=0.1, scope="network")
        >>> report.stored, report.virtual, sum(p.numel() for p in model.parameters())
        (25, 250, 40)
    """
    check_choices(table_ratio, hash, scope, init)
    found = select(model, parameters)
    places = locate_parameters(model)
    chosen = {name: found[name] for name in places if name in found}  # in the model's order
    chosen = {name: weight for name, weight in chosen.items() if hash.include_biases or weight.ndim >= 2}
    for name in found:
        if any(places[name].attribute in one.prefixes for one in derived_in(places[name].owner)):
            raise ConfigurationError(f"{name!r} is the table of a hashed layer already")
    if lazy := [name for name, weight in found.items() if is_lazy(weight)]:
        raise ConfigurationError(f"{listed(lazy)}: not initialised yet; call the model on a batch first")
    if not chosen:
        raise ConfigurationError(f"parameters {list(parameters)} match nothing of two dimensions or more")
    for name in chosen:
        check_hashable(name, places)
    hash.check_layers([weight.shape for weight in chosen.values()], scope)

    def make(name: str, own: Hash, size: int, salt: int = 0, **of_network: Any) -> _Plan:
        owner = places[name].owner
        special: dict[str, Any] = {"index": index}
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and places[name].attribute == "weight":
            special = of_rows(owner, index)
        options = {"sign": sign, "density": density, "salt": salt, **of_network, **special}
        return _Plan(name, chosen[name], HashedParametrization(chosen[name].shape, size, own, **options))

    groups: list[list[_Plan]] = []  # those of one table
    if scope == "layer":
        for name, weight in chosen.items():
            salt = zlib.crc32(name.encode())
            own = hash.with_salt(salt)
            size = table_entries(weight.numel(), table_ratio, own)
            groups.append([make(name, own, size, salt=salt if own is hash else 0)])
    else:
        (source, weight), *others = chosen.items()
        for name, other in others:
            check_alike(weight, other, f"{source!r} and {name!r} cannot share a table")
        size = table_entries(sum(weight.numel() for weight in chosen.values()), table_ratio, hash)
        scales = _scales(chosen) if scaled and not hash.include_biases else dict.fromkeys(chosen, 1.0)
        groups.append([])
        first, common = 0, None
        for name, weight in chosen.items():
            groups[0].append(make(name, hash, size, first=first, scale=scales[name], state=common))
            first += weight.numel()
            common = groups[0][0].virtual.state
    tables = [_table(group, init) for group in groups]
    names = []  # of the tables
    for group, table in zip(groups, tables, strict=True):
        for one in group:
            place, own_table = places[one.name], nn.Parameter(table.clone(), one.weight.requires_grad)
            held = hash_attribute(place.owner, place.attribute, one.virtual.to(table.device), own_table)
            names.append(one.name.removesuffix(place.attribute) + held)
    if scope == "network" and len(names) > 1:
        tie(model, [Tie(names[0], other) for other in names[1:]])
    return report(model, chosen, tuple(name for name in found if name not in chosen))


def check_choices(table_ratio: float | None, hash: Hash, scope: str, init: str) -> None:
    """Raise where an argument of :func:`hash_weights` is wrong whatever the model.

    Raises:
        ConfigurationError: it is.
    """
    if not isinstance(hash, Hash):
        raise ConfigurationError(f"hash must be one of tying.hashing, such as UniformHash(seed=0), not {hash!r}")
    if table_ratio is not None and not 0 < table_ratio <= 1:
        raise ConfigurationError(f"table_ratio is in (0, 1], not {table_ratio}")
    for what, value, known in (("scope", scope, ("layer", "network")), ("init", init, ("fresh", "mean"))):
        if value not in known:
            raise ConfigurationError(f"{what} is {' or '.join(map(repr, known))}, not {value!r}")


class _Plan(NamedTuple):
    name: str
    weight: nn.Parameter
    virtual: HashedParametrization


def _scales(weights: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return the standard deviation of each weight over the root mean square of those of all.

    So a table is as large as the weights, and a step moves these about as far as if they were dense.
    """
    own = {name: _deviation(weight) for name, weight in weights.items()}
    count = sum(weight.numel() for weight in weights.values())
    common = math.sqrt(sum(weights[name].numel() * value**2 for name, value in own.items()) / count)
    return {name: value / common for name, value in own.items()}


def _deviation(weight: Tensor) -> float:
    """Return the standard deviation of a weight, or where it is constant that of torch's linear layers."""
    deviation = 0.0 if weight.is_meta or weight.numel() < 2 else float(weight.double().std())
    fan_in = max(1, weight.shape[1:].numel())
    return deviation if deviation > 0 else (3 * fan_in) ** -0.5


def _table(group: Sequence[_Plan], init: Init) -> Tensor:
    """Return the table that a group of weights begins with."""
    _, first, virtual = group[0]
    if first.is_meta:
        return first.new_empty(virtual.table_size)
    if init == "mean":
        return virtual.joint_inverse([(one.virtual, one.weight) for one in group], first.new_zeros(virtual.table_size))
    return virtual.drawn_from(torch.cat([one.weight.flatten() / one.virtual.scale for one in group]))
