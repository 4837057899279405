"""Hash the weights of any model."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, check_choice, check_range, listed, nearest
from tying.hashing.hashes import Hash, UniformHash
from tying.hashing.layers import Hashed, HashedConv2d, HashedEmbedding, HashedLinear, embedding_options
from tying.hashing.parametrization import HashedParametrization, HashState, Index, table_slots
from tying.hashing.report import HashReport, report
from tying.mappings import subclasses
from tying.selection.index import check_shape
from tying.selection.relation import Relation
from tying.weights.derived import (
    Locations,
    ParameterLocation,
    derived_in,
    install,
    locate_parameters,
    swap_class,
)
from tying.weights.optimizers import check_alike
from tying.weights.replace import Selection, check_free, select_weights
from tying.weights.state_dict import TieRecord, forget_ties, install_record
from tying.weights.values import check_finite, check_real

LAYERS: dict[type[nn.Module], type[Hashed]] = {
    nn.Linear: HashedLinear,
    nn.Conv2d: HashedConv2d,
    nn.Embedding: HashedEmbedding,
}
Init = Literal["fresh", "mean"]


def table_names(kind: type[nn.Module], weight: str) -> tuple[str, str]:
    """Return the attribute names, in a hashed module, of a weight's table and of the map from the table to the weight.

    Args:
        kind: the class of the module before it is hashed.
        weight: the weight's attribute name.
    """
    is_layer = kind in LAYERS and weight == "weight"
    return ("table", "virtual") if is_layer else (f"{weight}_table", f"{weight}_virtual")


def hash_attribute(module: nn.Module, name: str, virtual: HashedParametrization, table: nn.Parameter) -> str:
    """Replace a weight of any module by a table; return the table's attribute name.

    Linear, convolution and embedding layers become hashed layers. Any other module computes its weight from the table.
    """
    keys = table_names(type(module), name)
    if keys[0] == "table":
        swap_class(module, LAYERS[type(module)])
    install(module, name, virtual, table, keys)
    return keys[0]


def check_hashable(name: str, locations: Locations) -> None:
    """Raise an error unless a weight can be replaced by a table.

    Args:
        name: the weight's name.
        locations: locations of all parameters of the model.

    Raises:
        ConfigurationError: the weight is not initialised, not real, parametrized, or tied through a relation.
    """
    check_shape(name, locations[name].parameter)
    check_free(name, locations)
    check_real(name, locations[name].parameter)


def check_fits_table(owners: Sequence[ParameterLocation]) -> None:
    """Raise an error if a table cannot do what the owners of a weight need.

    Args:
        owners: the locations of the weight.

    Raises:
        ConfigurationError: the weight is empty, or belongs to embeddings with an option that hashed embeddings do not
            support, or to several that differ in the row that is zero.
    """
    if not owners[0].parameter.numel():
        raise ConfigurationError("an empty weight cannot be hashed")
    embeddings = [location.owner for location in owners if isinstance(location.owner, nn.Embedding | nn.EmbeddingBag)]
    for embedding in embeddings:
        # only an nn.Embedding becomes a HashedEmbedding
        options = ("max_norm", "sparse", "scale_grad_by_freq") if type(embedding) is nn.Embedding else ("sparse",)
        if lacking := [option for option in options if getattr(embedding, option)]:
            raise ConfigurationError(f"it belongs to an embedding with {lacking[0]}, which a hashed one lacks")
    rows = {embedding.padding_idx for embedding in embeddings} - {None}
    if len(rows) > 1:
        raise ConfigurationError(f"it belongs to embeddings that differ in padding_idx, {listed(map(str, rows))}")


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
    """Replace weights of a model by smaller tables of shared slots: one table for each weight, or one for all.

    Linear, convolution and embedding layers become :class:`HashedLinear` and so on; other modules compute their weights
    from the table. With ``scope="layer"`` each weight's name is mixed into the hash's seed; with ``"network"``
    identifiers continue from weight to weight, and weights are scaled by their initial standard deviation. In-place
    writes (``.data``, ``nn.init``, an adapter's merge) to a computed weight are lost, unless it is a view: assign the
    weight, or load ``bake(model)`` into the untied model first.

    Args:
        model: changed in place.
        parameters: patterns of names; ``!`` excludes. Skips vectors, unless the hash is recurrent.
        table_ratio: slots over weights, in (0, 1]; default: what the hash requires, or 0.1.
        hash: h.
        scope: ``"layer"``: a table for each weight; ``"network"``: one table.
        init: ``"fresh"``: slots are a sample of the weights; ``"mean"``: means of the weights per slot.
        sign: multiply by ±1.
        density: fraction of weights that are kept.
        index: see :class:`HashedParametrization`.
        scaled: with ``scope="network"``, multiply by each weight's scale; if False, weights equal their slots.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight or the hash does not fit. Nothing is changed.
        NonFiniteError: a weight is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> report = hash_weights(model, ["*.weight"], table_ratio=0.1, scope="network")
        >>> report.stored, report.virtual, sum(p.numel() for p in model.parameters())
        (25, 250, 40)
    """
    check_choices(table_ratio, hash, scope, init)
    locations, selection = locate_parameters(model), select_hashable(model, parameters, hash)
    selection = _fitting(selection, locations, hash, scope)
    options, scaled = {"sign": sign, "density": density, "index": index}, scaled and not hash.include_biases
    groups = _plan(selection.weights, locations, table_ratio, hash, scope, scaled, options)
    selection.report("hash_weights")
    _install_tables(model, locations, groups, init)
    return report(model, selection.weights, selection.skipped, selection.tied, selection.unfit)


def check_choices(table_ratio: float | None, hash: object, scope: str, init: str) -> None:
    """Raise a ConfigurationError if an argument of :func:`hash_weights` is wrong for any model."""
    if not isinstance(hash, Hash):
        close = nearest(str(hash), [cls.__name__ for cls in subclasses(Hash)])
        raise ConfigurationError(
            f"hash must be one of tying.hashing, such as UniformHash(seed=0), not {hash!r}{close and '.' + close}"
        )
    if table_ratio is not None:
        check_range("table_ratio", table_ratio, "(0, 1]")
    check_choice("scope", scope, ("layer", "network"))
    check_choice("init", init, ("fresh", "mean"))


def select_hashable(model: nn.Module, parameters: Sequence[str], hash: Hash) -> Selection:
    """Return the weights that :func:`hash_weights` replaces, in the order of the patterns. This changes nothing."""
    return select_weights(model, parameters, least_dims=0 if hash.include_biases else 2)


def _fitting(selection: Selection, locations: Locations, hash: Hash, scope: Literal["layer", "network"]) -> Selection:
    """Return the selection with the weights to hash in the model's order.

    Raises:
        ConfigurationError: nothing can be hashed, or a weight or the hash does not fit.
    """
    if tables := [
        name
        for name in (*selection.weights, *selection.skipped)
        if any(locations[name].attribute in derived.prefixes for derived in derived_in(locations[name].owner))
    ]:
        raise ConfigurationError(f"{tables[0]!r} is the table of a hashed layer already")
    ordered = {name: selection.weights[name] for name in locations if name in selection.weights}
    for name, weight in ordered.items():
        check_hashable(name, locations)
        check_finite(name, weight)
    trained = (name for name, weight in ordered.items() if weight.requires_grad)
    first = next(trained, next(iter(ordered)))

    def check(name: str, weight: nn.Parameter) -> None:
        check_fits_table(locations.owners(name))
        if scope == "network":
            check_alike(ordered[first], weight, f"it cannot share a table with {first!r}")

    fitting = replace(selection, weights=ordered).fitting(check)
    with naming(fitting.weights):
        hash.check_layers([weight.shape for weight in fitting.weights.values()], scope)
    return fitting


@contextmanager
def naming(weights: Iterable[str]) -> Iterator[None]:
    """A context in which errors about a hash name the weights."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{listed(map(repr, weights), limit=3)}: {error}") from None


def _plan(
    weights: Mapping[str, nn.Parameter],
    locations: Locations,
    table_ratio: float | None,
    hash: Hash,
    scope: Literal["layer", "network"],
    scaled: bool,
    options: Mapping[str, Any],
) -> list[dict[str, HashedParametrization]]:
    """Return, for each table, the maps from the table to the weights that share it, by name."""
    special = {name: {**options, **_embedding_options(locations.owners(name), options["index"])} for name in weights}
    if scope == "network":
        return [_plan_table(weights, table_ratio, hash, special, scaled)]
    return [
        _plan_table({name: weight}, table_ratio, hash, special, salt=zlib.crc32(name.encode()))
        for name, weight in weights.items()
    ]


def _embedding_options(owners: Sequence[ParameterLocation], index: Index) -> dict[str, Any]:
    """Return the arguments of the one parametrization that all owners of a weight share.

    Only embeddings do without a stored index, and the row that is zero for one owner is zero for all.
    """
    options = [embedding_options(location.owner, location.attribute, index) for location in owners]
    rows = [option["zero_row"] for option in options if option.get("zero_row") is not None]
    same = options[0] if all(option == options[0] for option in options) else {}
    return same | ({"zero_row": rows[0]} if rows else {})


def _plan_table(
    weights: Mapping[str, nn.Parameter],
    table_ratio: float | None,
    hash: Hash,
    options: Mapping[str, Mapping[str, Any]],
    scaled: bool = False,
    salt: int | None = None,
) -> dict[str, HashedParametrization]:
    """Return the maps from one table to all weights; identifiers continue from weight to weight."""
    salted = hash if salt is None else hash.with_salt(salt)
    counts = [weight.numel() for weight in weights.values()]
    scales = _scales(weights) if scaled else dict.fromkeys(weights, 1.0)
    with naming(weights):
        size = table_slots(sum(counts), table_ratio, salted)
        state = HashState(salted.state(size))
        return {
            name: HashedParametrization(
                weights[name].shape,
                size,
                salted,
                salt=(salt or 0) if salted is hash else 0,
                first=first,
                scale=scales[name],
                state=state,
                **options[name],
            )
            for name, first in zip(weights, accumulate(counts[:-1], initial=0), strict=True)
        }


def _scales(weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Return the standard deviation of each weight over the root mean square of the deviations of all weights.

    The table then has the scale of the weights, and an optimizer step moves weights about as far as dense ones.
    """
    deviations = {name: _deviation(weight) for name, weight in weights.items()}
    squares = sum(weights[name].numel() * value**2 for name, value in deviations.items())
    rms = math.sqrt(squares / sum(weight.numel() for weight in weights.values()))
    return {name: value / rms for name, value in deviations.items()}


def _deviation(weight: Tensor) -> float:
    """Return the standard deviation of a weight; if it is constant, use torch's initial value for linear weights."""
    deviation = 0.0 if weight.is_meta or weight.numel() < 2 else float(weight.double().std())
    return deviation if deviation > 0 else (3 * max(1, weight.shape[1:].numel())) ** -0.5


def _install_tables(
    model: nn.Module,
    locations: Locations,
    groups: Sequence[Mapping[str, HashedParametrization]],
    init: Init,
) -> None:
    """Replace the weights of each group by a table, which is one parameter."""
    # all tables are computed before the first change of the model
    tables = [
        _initial_table([(virtual, locations[name].parameter) for name, virtual in group.items()], init)
        for group in groups
    ]
    parameters = [
        nn.Parameter(table.clone(), locations[next(iter(group))].parameter.requires_grad)
        for group, table in zip(groups, tables, strict=True)
    ]
    put_tables(model, locations, groups, parameters)


def put_tables(
    model: nn.Module,
    locations: Locations,
    groups: Sequence[Mapping[str, HashedParametrization]],
    tables: Sequence[nn.Parameter],
) -> None:
    """Let weights of a model read tables, each in all modules that own it.

    Args:
        model: changed in place.
        locations: the locations of its parameters.
        groups: for each table, the maps from it to the weights, by name.
        tables: the tables.
    """
    records, replaced = [], list[str]()
    for group, table in zip(groups, tables, strict=True):
        keys = {
            location: hash_attribute(location.owner, location.attribute, virtual.to(table.device), table)
            for name, virtual in group.items()
            for location in locations.owners(name)
        }
        weights = {alias: name for name in group for alias in locations.aliases(name)}
        replaced += weights
        if len(keys) > 1:
            names = [alias.removesuffix(locations[alias].attribute) + keys[locations[alias]] for alias in weights]
            records.append(TieRecord((*names,), (Relation(),) * len(names), (*weights.values(),), is_table=True))
    forget_ties(model, replaced)
    if records:
        install_record(model, records)


def _initial_table(parts: Sequence[tuple[HashedParametrization, nn.Parameter]], init: Init) -> Tensor:
    """Return the initial table for weights that share it."""
    virtual, weight = parts[0]
    if weight.is_meta:
        return weight.new_empty(virtual.table_size)
    if init == "mean":
        return virtual.nearest_table(parts, weight.new_zeros(virtual.table_size))
    return virtual.drawn_from(torch.cat([weight.flatten() / virtual.scale for virtual, weight in parts]))
