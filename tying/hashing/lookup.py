"""Weights read from a table by an index, and the table's gradient, summed over the uses of each entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

CHUNK = 1 << 18  # entries whose index is computed at a time: it stays in the cache
PARTS = 2  # partial tables that are summed apart; a constant, since sums depend on it


@dataclass(frozen=True)
class Slots:
    """Where each of ``count`` weights is in a table: kept, or computed anew each time.

    Attributes:
        count: number of weights.
        compute: returns the entries (int64) of weights from one number to another, on a device.
        kept: all entries, int32; where they are kept.
    """

    count: int
    compute: Callable[[int, int, torch.device], Tensor]
    kept: Tensor | None = None

    def whole(self, device: torch.device) -> Tensor:
        """Return all entries."""
        return self.compute(0, self.count, device) if self.kept is None else self.kept

    def chunks(self, device: torch.device, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first number, last number and entries (int64) of successive chunks of weights."""
        for first in range(begin, end, CHUNK):
            last = min(first + CHUNK, end)
            yield first, last, self.compute(first, last, device) if self.kept is None else self.kept[first:last].long()


def lookup(table: Tensor, slots: Slots) -> Tensor:
    """Return ``table[slot]`` for all weights: ``w_i = t[h(i)]``.

    Args:
        table: (n,).
        slots: of N weights.

    Returns:
        (N,); its gradient adds up in the table, in float32 at least.
    """
    result: Tensor = _Lookup.apply(table, slots)
    return result


def gather(table: Tensor, slots: Slots) -> Tensor:
    """Return ``table[slot]``."""
    if slots.kept is not None:
        return table.index_select(0, slots.kept)
    if torch.compiler.is_compiling():
        return table[slots.whole(table.device)]
    result = table.new_empty(slots.count)
    for first, last, index in slots.chunks(table.device, 0, slots.count):
        torch.index_select(table, 0, index, out=result[first:last])
    return result


def scatter(values: Tensor, slots: Slots, size: int) -> Tensor:
    """Return the sum of the values of each entry's weights; (size,)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        index = slots.whole(values.device).long()
        return values.new_zeros(size).index_put_((index,), values, accumulate=True)
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.new_zeros(size).index_add_(0, slots.whole(values.device), values)
    half = slots.count // PARTS
    sums = values.new_zeros(PARTS, size)
    pairs = zip(slots.chunks(values.device, 0, half), slots.chunks(values.device, half, PARTS * half), strict=True)
    for (first, last, one), (_, _, other) in pairs:
        both = torch.stack([values[first:last], values[half + first : half + last]])
        sums.scatter_add_(1, torch.stack([one, other]), both)
    for first, last, index in slots.chunks(values.device, PARTS * half, slots.count):
        sums[0].scatter_add_(0, index, values[first:last])
    return sums.sum(dim=0)


class _Lookup(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, table: Tensor, slots: Slots) -> Tensor:
        ctx.slots, ctx.size, ctx.dtype = slots, len(table), table.dtype
        return gather(table, slots)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.slots, ctx.size).to(ctx.dtype), None


class _Scatter(torch.autograd.Function):
    """The adjoint of the lookup, which makes second derivatives work."""

    @staticmethod
    @override
    def forward(ctx: Any, values: Tensor, slots: Slots, size: int) -> Tensor:
        ctx.slots, ctx.dtype = slots, values.dtype
        return scatter(values, slots, size)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return lookup(grad, ctx.slots).to(ctx.dtype), None, None
