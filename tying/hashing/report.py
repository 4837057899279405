"""What hashing has made of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tying.hashing.loads import entropy, loads
from tying.hashing.mixing import mix
from tying.hashing.virtual import VirtualWeight

Scope = Literal["layer", "network"]


@dataclass(frozen=True)
class HashedWeight:
    """What hashing has made of one weight.

    Attributes:
        name: of the weight.
        shape: of the weight.
        table_size: entries of its table, which may be the network's.
        index: how the hash is evaluated.
        units: distinct rows of the weight: a hash that repeats them leaves fewer units than there seem to be.
        realised: entropy of the loads of the table's entries, in nats.
        generating: entropy of the hash's probabilities, in nats, where they are known.
    """

    name: str
    shape: tuple[int, ...]
    table_size: int
    index: str
    units: int
    realised: float
    generating: float | None


@dataclass(frozen=True)
class HashReport:
    """What :func:`hash_weights` has done.

    Attributes:
        weights: what has been hashed.
        scope: ``"layer"`` or ``"network"``.
        stored: entries of all tables.
        virtual: number of hashed weights.
        skipped: names of parameters of fewer than two dimensions, which are left as they were.
    """

    weights: tuple[HashedWeight, ...]
    scope: Scope
    stored: int
    virtual: int
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.virtual:,} weights of {len(self.weights)} tensors in {self.stored:,} entries"]
        for number, one in enumerate(self.weights):
            generating = "" if one.generating is None else f" of {one.generating:.4f}"
            table = f"table of {one.table_size:,}, entropy {one.realised:.4f}{generating} nats"
            if self.scope == "network":
                if number == 0:
                    lines.append(f"one {table}")
                table = "in it"
            line = f"{one.name} {one.shape}: {table}, {one.index}"
            if one.units < one.shape[0]:
                line += f"; only {one.units} of {one.shape[0]} units are distinct"
            lines.append(line)
        if self.skipped:
            lines.append(f"left as they are, having fewer than two dimensions: {', '.join(self.skipped)}")
        return "\n".join(lines)


def report_on(groups: Sequence[Mapping[str, VirtualWeight]], scope: Scope, skipped: tuple[str, ...]) -> HashReport:
    """Return the report on weights, by name, of which those of a group share a table."""
    weights = []
    for group in groups:
        first, *_ = virtuals = [*group.values()]
        count, size = sum(virtual.shape.numel() for virtual in virtuals), first.table_size
        realised = entropy(torch.stack([loads(virtual.entries(), size) for virtual in virtuals]).sum(dim=0))
        shares = first.hash.probabilities(count, size)
        generating = None if shares is None else entropy(shares)
        for name, virtual in group.items():
            shape, units = tuple(virtual.shape), distinct_rows(virtual)
            weights.append(HashedWeight(name, shape, size, virtual.index, units, realised, generating))
    stored = sum(next(iter(group.values())).table_size for group in groups)
    return HashReport(tuple(weights), scope, stored, sum(math.prod(one.shape) for one in weights), skipped)


def distinct_rows(virtual: VirtualWeight) -> int:
    """Return how many rows of a weight differ, as the hash makes them.

    Example:
        >>> from tying.hashing import ModulusHash
        >>> distinct_rows(VirtualWeight((200, 784), 1000, ModulusHash()))
        125
    """
    rows = virtual.extended_entries().view(virtual.shape[0], -1)
    keys = mix(torch.arange(rows.shape[1]), 0) * 2 + 1  # odd; rows of equal sums, modulo 2⁶⁴, are taken as equal
    return len(torch.unique((mix(rows, 0) * keys).sum(dim=1)))
