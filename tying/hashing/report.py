"""Report how hashed weights use their tables."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tying.errors import ConfigurationError, check_counts
from tying.figures import WIDTH, new_figure
from tying.files import save_figure
from tying.hashing.parametrization import HashedParametrization, repeated_units
from tying.weights.derived import derived_weights
from tying.weights.report import WeightRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package


def loads(index: Tensor, table_size: int) -> Tensor:
    """Return how many weights read each slot of a table; zero weights (−1) read none.

    Args:
        index: integers in [−1, table_size), of any shape.
        table_size: number of slots.

    Returns:
        int64, (table_size,).

    Raises:
        ConfigurationError: a slot is outside the table.

    Example:
        >>> loads(torch.tensor([0, 2, 2, -1]), table_size=3).tolist()
        [1, 0, 2]
    """
    check_counts(table_size=table_size)
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < table_size:
        low, high = int(index.min()), int(index.max())
        raise ConfigurationError(f"slots must be in [-1, {table_size}), not from {low} to {high}")
    return torch.bincount(index[index >= 0], minlength=table_size)


def entropy(loads: Tensor) -> float:
    """Return ``H = −Σ p ln p`` of loads or probabilities, in nats: ln n for n equal values, 0 for one positive value.

    Args:
        loads: (table_size,), not negative; they need not sum to 1. If all are 0, so is the entropy.

    Example:
        >>> round(entropy(torch.ones(1000)), 2)
        6.91
    """
    shares = loads.double() / (loads.sum() or 1)
    return float(-torch.special.xlogy(shares, shares).sum()) + 0.0


@dataclass(frozen=True)
class HashedWeight:
    """A hashed weight, and how evenly its table is used.

    Attributes:
        name: name of the weight.
        shape: shape of the weight.
        table_size: number of slots of its table, which other weights may share.
        holder: name of the first weight that reads the table.
        index: ``"stored"``, ``"computed"`` or ``"structured"``; see :class:`HashedParametrization`.
        units: number of distinct rows of the weight; None if there are too many weights to compare.
        realised: entropy of the loads of the table's slots, in nats.
        generating: entropy of the hash's probabilities, in nats, or None if they are unknown.
    """

    name: str
    shape: tuple[int, ...]
    table_size: int
    holder: str
    index: str
    units: int | None
    realised: float
    generating: float | None

    def __str__(self) -> str:
        return str(
            WeightRow(
                names=(self.name,),
                how=self.index + repeated_units(self.units, self.shape),
                shape=self.shape,
                stored=self.table_size,
                used=math.prod(self.shape),
            )
        )


@dataclass(frozen=True)
class HashReport:
    """The hashed weights of a model; see :func:`hash_weights`.

    Attributes:
        weights: the hashed weights; weights that share a table are adjacent.
        stored: number of slots of all tables.
        virtual: number of values of the hashed weights.
        skipped: names of parameters of fewer than two dimensions, which are not hashed.
        tied: names of weights that only wildcards match and that are not hashed, since a relation ties them.
        unfit: names of weights that only wildcards match and that are not hashed, since a table does not fit them.
    """

    weights: tuple[HashedWeight, ...]
    stored: int
    virtual: int
    skipped: tuple[str, ...]
    tied: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def counts(self) -> str:
        """Return the numbers of weights, values, tables and slots as one line."""
        tables = len({weight.holder for weight in self.weights})
        return _counts(len(self.weights), self.virtual, tables, self.stored)

    def __str__(self) -> str:
        lines = [self.counts()]
        for weight in self.weights:
            if weight.name == weight.holder:
                generating = "" if weight.generating is None else f", of probabilities {weight.generating:.4f}"
                lines.append(
                    f"table of {weight.table_size:,}: entropy of loads {weight.realised:.4f}{generating}, at most "
                    f"{math.log(weight.table_size):.4f} nats"
                )
            lines.append(f"  {weight}")
        if self.skipped:
            lines.append(f"skipped because of fewer than two dimensions: {', '.join(self.skipped)}")
        if self.tied:
            lines.append(f"left out because they are tied: {', '.join(self.tied)}")
        if self.unfit:
            lines.append(f"left out because a table does not fit: {', '.join(self.unfit)}")
        return "\n".join(lines)


def hashed_in(model: nn.Module, aliases: bool = False) -> Iterator[tuple[str, HashedParametrization, nn.Parameter]]:
    """Yield the hashed weights of a model: the name, the map from the table to the weight, and the table.

    Args:
        model: any module.
        aliases: also yield the further names of tied weights.
    """
    for name, derived in derived_weights(model, aliases).items():
        if isinstance(virtual := derived.steps[-1], HashedParametrization):
            owner, prefix = derived.owner, derived.prefixes[0]
            is_list = prefix.endswith(".")  # of parametrizations; else the prefix is the table's name
            yield name, virtual, owner.get_parameter(f"{prefix}original") if is_list else getattr(owner, prefix)


def tables_in(model: nn.Module, names: Container[str] | None = None) -> dict[str, dict[str, HashedParametrization]]:
    """Return the weights of each table of a model, by the name of the first weight.

    Args:
        model: any module.
        names: names of the weights to include; by default, the first name of each weight.
    """
    tables: dict[int, dict[str, HashedParametrization]] = {}
    hashed = [*hashed_in(model, aliases=names is not None)]  # a list keeps computed tables alive: their ids differ
    for name, virtual, table in hashed:
        if names is None or name in names:
            tables.setdefault(id(table), {})[name] = virtual
    return {next(iter(group)): group for group in tables.values()}


def loads_of(group: Mapping[str, HashedParametrization]) -> Tensor:
    """Return how many of the weights that share a table read each slot."""
    return torch.stack([virtual.loads() for virtual in group.values()]).sum(dim=0)


def report(
    model: nn.Module,
    names: Container[str] | None = None,
    skipped: Iterable[str] = (),
    tied: Iterable[str] = (),
    unfit: Iterable[str] = (),
) -> HashReport:
    """Report how a model's hashed weights use their tables.

    Args:
        model: any module.
        names: names of the weights to include; by default, the first name of each weight.
        skipped: names of the parameters that :func:`hash_weights` skipped.
        tied: names of the weights that it left out, since a relation ties them.
        unfit: names of the weights that it left out, since a table does not fit them.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> print(report(nn.Sequential(HashedLinear(4, 4, table_ratio=0.25, hash=ModulusHash()))))
        1 weight (16 values) has a table of 4 slots (ratio 0.25)
        table of 4: entropy of loads 1.3863, of probabilities 1.3863, at most 1.3863 nats
          0.weight (4, 4): 16 values from 4, structured; only 1 of 4 units are distinct
    """
    weights: list[HashedWeight] = []
    for holder, group in tables_in(model, names).items():
        size, hash = group[holder].table_size, group[holder].hash
        shares = hash.probabilities(sum(virtual.shape.numel() for virtual in group.values()), size)
        entropies = entropy(loads_of(group)), None if shares is None else entropy(shares)
        weights += [
            HashedWeight(name, (*virtual.shape,), size, holder, virtual.index, virtual.distinct_rows(), *entropies)
            for name, virtual in group.items()
        ]
    return HashReport(
        weights=tuple(weights),
        stored=sum(weight.table_size for weight in weights if weight.name == weight.holder),
        virtual=sum(math.prod(weight.shape) for weight in weights),
        skipped=(*skipped,),
        tied=(*tied,),
        unfit=(*unfit,),
    )


def table_counts(model: nn.Module, names: Container[str] | None = None) -> str:
    """Return the numbers of hashed weights, values, tables and slots of a model as one line.

    Args:
        model: any module.
        names: names of the weights to include; by default, the first name of each weight.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> table_counts(nn.Sequential(HashedLinear(4, 4, table_ratio=0.25, hash=ModulusHash())))
        '1 weight (16 values) has a table of 4 slots (ratio 0.25)'
    """
    tables = tables_in(model, names)
    values = [virtual.shape.numel() for group in tables.values() for virtual in group.values()]
    return _counts(len(values), sum(values), len(tables), sum(group[name].table_size for name, group in tables.items()))


def _counts(weights: int, values: int, tables: int, slots: int) -> str:
    verb = "has" if weights == 1 else "share" if tables < weights else "have"
    shared = "a table" if tables == 1 else f"{tables} tables with a total"
    return (
        f"{weights} weight{'s' * (weights != 1)} ({values:,} values) {verb} {shared} of {slots:,} slots "
        f"(ratio {slots / max(1, values):.3g})"
    )


def table_loads(model: nn.Module) -> dict[str, Tensor]:
    """Return how many weights read each slot of each table of a model, by the name of the table's first weight.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> table_loads(nn.Sequential(HashedLinear(5, 2, table_ratio=0.3, hash=ModulusHash())))
        {'0.weight': tensor([4, 3, 3])}
    """
    return {holder: loads_of(group) for holder, group in tables_in(model).items()}


def plot_loads(model: nn.Module, path: Path | str) -> None:
    """Write a PNG with the loads of each table of a model, as a heat map of the slots and as a histogram.

    Raises:
        ConfigurationError: no weight is hashed.
    """
    save_figure(loads_figure(titled_loads(model)), Path(path))


def titled_loads(model: nn.Module) -> dict[str, Tensor]:
    """Return the loads of each table of a model, by the names of its weights, or by their number if they are many."""
    return {
        ", ".join(group) if len(group) < 4 else f"{len(group)} weights, {holder} first": loads_of(group)
        for holder, group in tables_in(model).items()
    }


def loads_figure(counts: Mapping[str, Tensor]) -> "Figure":
    """Return a figure with a row of two panels, heat map and histogram, for each table.

    Args:
        counts: loads, (table_size,), by title.

    Raises:
        ConfigurationError: there are no loads.
    """
    if not counts:
        raise ConfigurationError("no weight of the model is hashed")
    figure = new_figure(WIDTH, 3.0 * len(counts), "Number of weights that read each slot of a table: map and histogram")
    for (title, uses), (heat, bars) in zip(counts.items(), figure.subplots(len(counts), 2, squeeze=False), strict=True):
        side = math.ceil(math.sqrt(len(uses)))
        square = F.pad(uses.float(), (0, side * side - len(uses)), value=math.nan).view(side, side)
        figure.colorbar(heat.imshow(square.numpy(), cmap="viridis"), ax=heat, label="load (weights that read the slot)")
        heat.set(xticks=[], yticks=[], xlabel=f"slots of the table, {side} in a row", ylabel="rows")
        heat.set_title(title, fontsize="small", loc="left", wrap=True)
        bars.hist(uses.numpy(), bins=load_bins(uses))
        bars.set(xlabel="load (weights that read a slot)", ylabel="number of slots")
        bars.set_title(
            f"entropy {entropy(uses):.3f}, at most {math.log(len(uses)):.3f} nats", fontsize="small", loc="right"
        )
    return figure


def load_bins(loads: Tensor) -> list[float]:
    """Return the edges of at most 50 bins that contain equally many integers each, from the least load to the largest.

    Example:
        >>> load_bins(torch.tensor([3, 5, 4])), len(load_bins(torch.arange(1000)))
        ([2.5, 3.5, 4.5, 5.5], 51)
    """
    low, high = int(loads.min()), int(loads.max())
    width = -(-(high - low + 1) // 50)
    return [edge - 0.5 for edge in range(low, high + width + 1, width)]
