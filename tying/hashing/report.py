"""Report how hashed weights use their tables."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tying.errors import ConfigurationError
from tying.files import save_figure
from tying.hashing.parametrization import HashedParametrization
from tying.weights.derived import derived_weights


def loads(index: Tensor, table_size: int) -> Tensor:
    """Return how many weights use each entry; zero weights (−1) use none.

    Args:
        index: integers in [−1, table_size), of any shape.
        table_size: number of entries.

    Returns:
        int64, (table_size,).

    Example:
        >>> loads(torch.tensor([0, 2, 2, -1]), table_size=3).tolist()
        [1, 0, 2]
    """
    used = index[index >= 0]
    return torch.bincount(used.flatten(), minlength=table_size)


def entropy(loads: Tensor) -> float:
    """Return ``H = −Σ p ln p`` of loads or probabilities, in nats: ln n where all are alike, 0 where one has all.

    Args:
        loads: (table_size,), not negative; need not sum to one. Of none, 0.

    Example:
        >>> round(entropy(torch.ones(1000)), 2)
        6.91
    """
    if not loads.any():
        return 0.0
    shares = loads.double() / loads.sum()
    return float(-torch.special.xlogy(shares, shares).sum()) + 0.0


@dataclass(frozen=True)
class HashedWeight:
    """What hashing has made of one weight.

    Attributes:
        name: of the weight.
        shape: of the weight.
        table_size: entries of its table, which may be the network's.
        holder: the first weight of its table: another name where they share it.
        index: how the hash is evaluated.
        units: distinct rows of the weight: a hash that repeats them leaves fewer units than there seem to be.
        realised: entropy of the loads of the table's entries, in nats.
        generating: entropy of the hash's probabilities, in nats, where they are known.
    """

    name: str
    shape: tuple[int, ...]
    table_size: int
    holder: str
    index: str
    units: int
    realised: float
    generating: float | None


@dataclass(frozen=True)
class HashReport:
    """What :func:`hash_weights` has done.

    Attributes:
        weights: what has been hashed, those of one table next to each other.
        stored: entries of all tables.
        virtual: number of hashed weights.
        skipped: names of parameters of fewer than two dimensions, which are left as they were.
    """

    weights: tuple[HashedWeight, ...]
    stored: int
    virtual: int
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.virtual:,} weights of {len(self.weights)} tensors in {self.stored:,} entries"]
        for one in self.weights:
            if one.name == one.holder:
                generating = "" if one.generating is None else f", of probabilities {one.generating:.4f}"
                entropies = f"of loads {one.realised:.4f}{generating}, at most {math.log(one.table_size):.4f} nats"
                lines.append(f"table of {one.table_size:,}: entropy {entropies}")
            line = f"  {one.name} {one.shape}, {one.index}"
            if one.units < one.shape[0]:
                line += f"; only {one.units} of {one.shape[0]} units are distinct"
            lines.append(line)
        if self.skipped:
            lines.append(f"left as they are, having fewer than two dimensions: {', '.join(self.skipped)}")
        return "\n".join(lines)


def hashed_in(model: nn.Module) -> Iterator[tuple[str, HashedParametrization, nn.Parameter]]:
    """Yield the hashed weights of a model: the name, the map from the table to the weight, and the table."""
    for name, one in derived_weights(model).items():
        *_, last = one.steps
        if isinstance(last, HashedParametrization):
            held, *_ = one.prefixes  # a table may be parametrized in its turn
            table = one.owner.get_parameter(f"{held}original") if held.endswith(".") else getattr(one.owner, held)
            yield name, last, table


def tables_in(model: nn.Module, names: Container[str] | None = None) -> list[dict[str, HashedParametrization]]:
    """Return for each table of a model the maps from it to its weights, by name; of these names, or all."""
    tables: dict[int, dict[str, HashedParametrization]] = {}
    for name, virtual, table in [*hashed_in(model)]:  # all at once: one that is computed must live to be told apart
        if names is None or name in names:
            tables.setdefault(id(table), {})[name] = virtual
    return [*tables.values()]


def loads_of(group: Mapping[str, HashedParametrization]) -> Tensor:
    """Return how many weights, of all that share a table, use each entry."""
    return torch.stack([loads(virtual.slots(), virtual.table_size) for virtual in group.values()]).sum(dim=0)


def report(model: nn.Module, names: Container[str] | None = None, skipped: tuple[str, ...] = ()) -> HashReport:
    """Return what hashing has made of a model's weights.

    Args:
        model: whose weights.
        names: which of them; all by default.
        skipped: names of parameters that were to be hashed, and were not.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> print(report(nn.Sequential(HashedLinear(4, 4, table_ratio=0.25, hash=ModulusHash()))))
        16 weights of 1 tensors in 4 entries
        table of 4: entropy of loads 1.3863, of probabilities 1.3863, at most 1.3863 nats
          0.weight (4, 4), structured; only 1 of 4 units are distinct
    """
    weights = []
    for group in tables_in(model, names):
        holder, first = next(iter(group.items()))
        count, size = sum(virtual.shape.numel() for virtual in group.values()), first.table_size
        realised = entropy(loads_of(group))
        shares = first.hash.probabilities(count, size)
        generating = None if shares is None else entropy(shares)
        for name, virtual in group.items():
            shape, units = tuple(virtual.shape), virtual.distinct_rows()
            weights.append(HashedWeight(name, shape, size, holder, virtual.index, units, realised, generating))
    stored = sum(one.table_size for one in weights if one.name == one.holder)
    return HashReport(tuple(weights), stored, sum(math.prod(one.shape) for one in weights), skipped)


def table_loads(model: nn.Module) -> dict[str, Tensor]:
    """Return how many weights use each entry of each table of a model, by the name of the first weight that does.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> table_loads(nn.Sequential(HashedLinear(5, 2, table_ratio=0.3, hash=ModulusHash())))
        {'0.weight': tensor([4, 3, 3])}
    """
    return {next(iter(group)): loads_of(group) for group in tables_in(model)}


def plot_loads(model: nn.Module, path: Path | str) -> None:
    """Write a PNG with the loads of each table of a model: as a heat map of its entries, and as a histogram.

    Raises:
        ConfigurationError: no weight is hashed.
    """
    draw_loads(table_loads(model), Path(path))


def draw_loads(counts: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG with two panels for each title: loads, (table_size,), as a heat map and as a histogram."""
    from matplotlib.figure import Figure

    if not counts:
        raise ConfigurationError("no weight of the model is hashed")
    across = min(len(counts), 3)
    down = math.ceil(len(counts) / across)
    figure = Figure(figsize=(6.8 * across, 2.9 * down), layout="constrained")
    panels = figure.subplots(down, 2 * across, squeeze=False).flatten()
    for unused in panels[2 * len(counts) :]:
        unused.remove()
    for (title, own), heat, bars in zip(counts.items(), panels[::2], panels[1::2], strict=False):
        side = math.ceil(math.sqrt(len(own)))
        square = F.pad(own.float(), (0, side * side - len(own)), value=math.nan).view(side, side)
        figure.colorbar(heat.imshow(square.numpy(), cmap="viridis"), ax=heat, label="weights that use it")
        heat.set(xticks=[], yticks=[])
        heat.set_title(title, fontsize="small", loc="left")
        bars.hist(own.numpy(), bins=min(50, int(own.max()) + 1))
        bars.set(xlabel="weights that use an entry", ylabel="entries")
        told = f"entropy {entropy(own):.3f}, at most {math.log(len(own)):.3f} nats"
        bars.set_title(told, fontsize="small", loc="right")
    save_figure(figure, path)
