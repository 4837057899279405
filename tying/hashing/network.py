"""The weights of anybody's model, in tables."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, listed
from tying.hard import tie
from tying.hard.places import places_of
from tying.hard.states import check_alike
from tying.hashing.entries import table_entries
from tying.hashing.hashes import Hash
from tying.hashing.layers import of_rows
from tying.hashing.replacement import check_hashable, hash_attribute
from tying.hashing.report import HashReport, report
from tying.hashing.seeded import UniformHash
from tying.hashing.virtual import Index, VirtualWeight
from tying.names import computed_in
from tying.selection import select
from tying.ties import Tie

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
    places = places_of(model)
    chosen = {name: found[name] for name in places if name in found}  # in the model's order
    chosen = {name: weight for name, weight in chosen.items() if hash.takes_vectors or weight.ndim >= 2}
    for name in found:
        if any(places[name].attribute in one.prefixes for one in computed_in(places[name].owner)):
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
        return _Plan(name, chosen[name], VirtualWeight(chosen[name].shape, size, own, **options))

    groups: list[list[_Plan]] = []  # those of one table
    if scope == "layer":
        for name, weight in chosen.items():
            salt = zlib.crc32(name.encode())
            own = hash.seeded(salt)
            size = table_entries(weight.numel(), table_ratio, own)
            groups.append([make(name, own, size, salt=salt if own is hash else 0)])
    else:
        (source, weight), *others = chosen.items()
        for name, other in others:
            check_alike(weight, other, f"{source!r} and {name!r} cannot share a table")
        size = table_entries(sum(weight.numel() for weight in chosen.values()), table_ratio, hash)
        scales = _scales(chosen) if scaled and not hash.takes_vectors else dict.fromkeys(chosen, 1.0)
        groups.append([])
        first, common = 0, None
        for name, weight in chosen.items():
            groups[0].append(make(name, hash, size, first=first, scale=scales[name], common=common))
            first += weight.numel()
            common = groups[0][0].virtual.common
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
    virtual: VirtualWeight


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
