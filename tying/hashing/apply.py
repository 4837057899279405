"""Hash the weights of any model."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, check_choice, check_range, listed
from tying.hashing.hashes import Hash, UniformHash
from tying.hashing.layers import Hashed, HashedConv2d, HashedEmbedding, HashedLinear, embedding_options
from tying.hashing.parametrization import HashedParametrization, Index, table_entries
from tying.hashing.report import HashReport, report
from tying.selection.resolve import select
from tying.selection.tie import Tie
from tying.weights.derived import ParameterLocation, check_free, derived_in, install, locate_parameters, swap_class
from tying.weights.optimizers import check_alike
from tying.weights.tie import tie

LAYERS: dict[type[nn.Module], type[Hashed]] = {
    nn.Linear: HashedLinear,
    nn.Conv2d: HashedConv2d,
    nn.Embedding: HashedEmbedding,
}
Init = Literal["fresh", "mean"]


def table_names(kind: type[nn.Module], weight: str) -> tuple[str, str]:
    """Return the attribute names of a weight's table and of the map from it, in a hashed module.

    Args:
        kind: the class of the module before it is hashed.
        weight: the weight's attribute name.
    """
    layer = kind in LAYERS and weight == "weight"
    return ("table", "virtual") if layer else (f"{weight}_table", f"{weight}_virtual")


def hash_attribute(module: nn.Module, name: str, virtual: HashedParametrization, table: nn.Parameter) -> str:
    """Put a table in the place of a weight of any module; return the table's attribute name.

    Linear, convolution and embedding layers become hashed layers. Any other module computes its weight from the table.
    """
    kind = type(module)
    keys = table_names(kind, name)
    if keys[0] == "table":
        swap_class(module, LAYERS[kind])
    install(module, name, virtual, table, keys)
    return keys[0]


def check_hashable(name: str, locations: Mapping[str, ParameterLocation]) -> None:
    """Raise where a weight cannot be replaced by a table.

    Args:
        name: the weight's name.
        locations: of all parameters of the model.

    Raises:
        ConfigurationError: the weight is parametrized, or tied, or belongs to an embedding with an option that hashed
            embeddings lack.
    """
    check_free(name, locations)
    owner = locations[name].owner
    if not locations[name].parameter.numel():
        raise ConfigurationError(f"{name!r} has no entries to hash")
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        exact = type(owner) is nn.Embedding  # becomes a HashedEmbedding
        lacking = ("max_norm", "sparse", "scale_grad_by_freq") if exact else ("sparse",)
        for option in lacking:
            if getattr(owner, option):
                raise ConfigurationError(f"{name!r} belongs to an embedding with {option}, which a hashed one lacks")


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
    """Let weights of a model share the entries of a table each, or of one table for all.

    Linear, convolution and embedding layers become :class:`HashedLinear` and so on, in place; other modules compute
    their weights. With ``scope="layer"`` each weight has its own table, and its own draws, because its name is mixed
    into the seed. With ``scope="network"`` identifiers go on from weight to weight, all tables are one parameter, and
    each weight is the table's entries times a constant scale: its initial standard deviation over that of all weights.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes. Weights of fewer than two dimensions are skipped,
            unless the hash is recurrent.
        table_ratio: entries of a table for each weight, in (0, 1].
        hash: h; uniform by default.
        scope: a table for each weight, or one table.
        init: ``"fresh"``: entries are drawn from the present weights; ``"mean"``: each is the mean over its uses.
        sign: multiply by ±1.
        density: fraction of weights that are kept.
        index: how the hash is evaluated.
        scaled: with ``scope="network"``, multiply by each weight's scale; without it, weights equal their entries.

    Raises:
        ConfigurationError: a pattern matches nothing that can be hashed, a weight is tied, parametrized or hashed
            already, weights of one table differ in dtype, device or requires_grad, or the hash does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> report = hash_weights(model, ["*.weight"], table_ratio=0.1, scope="network")
        >>> report.stored, report.virtual, sum(p.numel() for p in model.parameters())
        (25, 250, 40)
    """
    check_choices(table_ratio, hash, scope, init)
    chosen, skipped = _choose(model, parameters, hash, scope)
    options = {"sign": sign, "density": density, "index": index}
    _put_tables(model, _plan(model, chosen, table_ratio, hash, scope, scaled, options), init)
    return report(model, chosen, skipped)


def check_choices(table_ratio: float | None, hash: Hash, scope: str, init: str) -> None:
    """Raise where an argument of :func:`hash_weights` is wrong for any model.

    Raises:
        ConfigurationError: an argument is wrong.
    """
    if not isinstance(hash, Hash):
        raise ConfigurationError(f"hash must be one of tying.hashing, such as UniformHash(seed=0), not {hash!r}")
    if table_ratio is not None:
        check_range("table_ratio", table_ratio, "(0, 1]")
    check_choice("scope", scope, ("layer", "network"))
    check_choice("init", init, ("fresh", "mean"))


def _choose(
    model: nn.Module, parameters: Sequence[str], hash: Hash, scope: Literal["layer", "network"]
) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    """Return the weights to hash, in the model's order, and the names that are skipped.

    Raises:
        ConfigurationError: nothing can be hashed, or a weight or the hash does not fit.
    """
    selected = select(model, parameters)
    locations = locate_parameters(model)
    for name in selected:
        if any(locations[name].attribute in derived.prefixes for derived in derived_in(locations[name].owner)):
            raise ConfigurationError(f"{name!r} is the table of a hashed layer already")
    if lazy := [name for name, weight in selected.items() if is_lazy(weight)]:
        raise ConfigurationError(f"{listed(lazy)}: not initialised yet; call the model on a batch first")
    ordered = {name: selected[name] for name in locations if name in selected}
    chosen = {name: weight for name, weight in ordered.items() if hash.include_biases or weight.ndim >= 2}
    if not chosen:
        raise ConfigurationError(f"parameters {list(parameters)} match nothing of two dimensions or more")
    for name in chosen:
        check_hashable(name, locations)
    hash.check_layers([weight.shape for weight in chosen.values()], scope)
    return chosen, tuple(name for name in selected if name not in chosen)


class _Plan(NamedTuple):
    name: str
    weight: nn.Parameter
    virtual: HashedParametrization


def _plan(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    table_ratio: float | None,
    hash: Hash,
    scope: Literal["layer", "network"],
    scaled: bool,
    options: Mapping[str, Any],
) -> list[list[_Plan]]:
    """Return, for each table, the weights that share it, and their maps from the table."""
    locations = locate_parameters(model)
    special = {
        name: {**options, **embedding_options(locations[name].owner, locations[name].attribute, options["index"])}
        for name in weights
    }
    if scope == "network":
        return [_plan_network(weights, table_ratio, hash, scaled, special)]
    return [[_plan_layer(name, weight, table_ratio, hash, special[name])] for name, weight in weights.items()]


def _plan_layer(
    name: str, weight: nn.Parameter, table_ratio: float | None, hash: Hash, options: Mapping[str, Any]
) -> _Plan:
    """Plan a weight with a table of its own; its name is mixed into the seed."""
    salt = zlib.crc32(name.encode())
    salted = hash.with_salt(salt)
    size = table_entries(weight.numel(), table_ratio, salted)
    virtual = HashedParametrization(weight.shape, size, salted, salt=salt if salted is hash else 0, **options)
    return _Plan(name, weight, virtual)


def _plan_network(
    weights: Mapping[str, nn.Parameter],
    table_ratio: float | None,
    hash: Hash,
    scaled: bool,
    options: Mapping[str, Mapping[str, Any]],
) -> list[_Plan]:
    """Plan weights with one table for all; identifiers go on from weight to weight."""
    source, *others = weights
    for name in others:
        check_alike(weights[source], weights[name], f"{source!r} and {name!r} cannot share a table")
    size = table_entries(sum(weight.numel() for weight in weights.values()), table_ratio, hash)
    scales = _scales(weights) if scaled and not hash.include_biases else dict.fromkeys(weights, 1.0)
    plans: list[_Plan] = []
    first = 0
    for name, weight in weights.items():
        state = plans[0].virtual.state if plans else None
        place: dict[str, Any] = {"first": first, "scale": scales[name], "state": state}
        plans.append(_Plan(name, weight, HashedParametrization(weight.shape, size, hash, **place, **options[name])))
        first += weight.numel()
    return plans


def _put_tables(model: nn.Module, groups: Sequence[Sequence[_Plan]], init: Init) -> None:
    """Replace the weights of each group by tables, which are one parameter."""
    locations = locate_parameters(model)
    tables = [_first_table(group, init) for group in groups]  # before anything is changed
    for group, table in zip(groups, tables, strict=True):
        names = []
        for name, weight, virtual in group:
            attribute = locations[name].attribute
            parameter = nn.Parameter(table.clone(), weight.requires_grad)
            key = hash_attribute(locations[name].owner, attribute, virtual.to(table.device), parameter)
            names.append(name.removesuffix(attribute) + key)
        if len(names) > 1:
            tie(model, [Tie(names[0], other) for other in names[1:]])


def _scales(weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Return the standard deviation of each weight over the root mean square of those of all.

    The table then has the scale of the weights, and an optimizer step moves these about as far as dense ones.
    """
    deviations = {name: _deviation(weight) for name, weight in weights.items()}
    count = sum(weight.numel() for weight in weights.values())
    rms = math.sqrt(sum(weights[name].numel() * value**2 for name, value in deviations.items()) / count)
    return {name: value / rms for name, value in deviations.items()}


def _deviation(weight: Tensor) -> float:
    """Return the standard deviation of a weight, or if it is constant that of torch's linear layers."""
    deviation = 0.0 if weight.is_meta or weight.numel() < 2 else float(weight.double().std())
    fan_in = max(1, weight.shape[1:].numel())
    return deviation if deviation > 0 else (3 * fan_in) ** -0.5


def _first_table(group: Sequence[_Plan], init: Init) -> Tensor:
    """Return the initial table of weights that share it."""
    _, first, virtual = group[0]
    if first.is_meta:
        return first.new_empty(virtual.table_size)
    if init == "mean":
        return virtual.joint_inverse(
            [(plan.virtual, plan.weight) for plan in group], first.new_zeros(virtual.table_size)
        )
    return virtual.drawn_from(torch.cat([plan.weight.flatten() / plan.virtual.scale for plan in group]))
