"""The weights of anybody's model, in tables."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError
from tying.hard import tie
from tying.hard.places import Place, places_of
from tying.hashing.hashes import Hash
from tying.hashing.layers import check_free, hash_attribute, of_rows
from tying.hashing.report import HashReport, report
from tying.hashing.seeded import UniformHash
from tying.hashing.virtual import Index, VirtualWeight, table_entries
from tying.names import clean_name, computed_in
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
            already, weights of one table differ in dtype or device, or the hash does not fit; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> report = hash_weights(model, ["*.weight"], table_ratio=0.1, scope="network")
        >>> report.stored, report.virtual, sum(p.numel() for p in model.parameters())
        (25, 250, 40)
    """
    check_choices(table_ratio, hash, scope, init)
    found = select(model, parameters)
    every = model.named_parameters(remove_duplicate=False)
    named = {clean_name(name): parameter for name, parameter in every}  # in the model's order
    chosen = {n: p for n, p in named.items() if n in found and (hash.takes_vectors or p.ndim >= 2)}
    places = places_of(model)
    for name in found:
        if any(places[name].attribute in one.prefixes for one in computed_in(places[name].owner)):
            raise ConfigurationError(f"{name!r} is the table of a hashed layer already")
    if not chosen:
        raise ConfigurationError(f"parameters {list(parameters)} match nothing of two dimensions or more")
    for name in chosen:
        check_free(name, places)
    hash.check_layers([weight.shape for weight in chosen.values()], scope)

    def make(name: str, own: Hash, size: int, first: int = 0, scale: float = 1.0) -> VirtualWeight:
        owner = places[name].owner
        special = of_rows(owner, index) if type(owner) is nn.Embedding else {"index": index}
        options = {"sign": sign, "density": density, "first": first, "scale": scale, **special}
        return VirtualWeight(chosen[name].shape, size, own, **options)

    virtuals: list[VirtualWeight] = []
    if scope == "layer":
        for name, weight in chosen.items():
            own = hash.seeded(zlib.crc32(name.encode()))
            virtuals.append(make(name, own, table_entries(weight.numel(), table_ratio, own)))
    else:
        _check_alike(chosen)
        size = table_entries(sum(weight.numel() for weight in chosen.values()), table_ratio, hash)
        scales = _scales(chosen) if scaled and not hash.takes_vectors else dict.fromkeys(chosen, 1.0)
        first = 0
        for name, weight in chosen.items():
            virtuals.append(make(name, hash, size, first, scales[name]))
            first += weight.numel()
    hashed = [_Plan(*one) for one in zip(chosen, chosen.values(), virtuals, strict=True)]
    groups = [hashed] if scope == "network" else [[one] for one in hashed]
    tables = [_table(group, init) for group in groups]
    names = []
    for group, table in zip(groups, tables, strict=True):
        names += [_hash_one(places[one.name], one, table) for one in group]
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


def _check_alike(chosen: dict[str, nn.Parameter]) -> None:
    (first, weight), *others = chosen.items()
    for name, other in others:
        for what in ("dtype", "device", "requires_grad"):
            if getattr(other, what) != getattr(weight, what):
                raise ConfigurationError(
                    f"{first!r} and {name!r} cannot share a table: {what} is {getattr(weight, what)} for one and "
                    f"{getattr(other, what)} for the other"
                )


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
    pool = torch.cat([one.weight.flatten() / one.virtual.scale for one in group])
    if virtual.hash.takes_vectors:
        return pool[: virtual.table_size]
    return pool[torch.randperm(len(pool))[: virtual.table_size].to(pool.device)]


def _hash_one(place: Place, one: _Plan, values: Tensor) -> str:
    """Hash a weight; return the name of its table."""
    table = nn.Parameter(values.clone(), one.weight.requires_grad)
    one.virtual.to(table.device)
    held = hash_attribute(place.owner, place.attribute, one.virtual, table)
    return one.name.removesuffix(place.attribute) + held
