"""Read weights from a table by an index, and sum gradients over the uses of each entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

CHUNK = 1 << 17  # entries whose index is computed at a time: it stays in the cache
FEW = 1 << 20  # weights up to which torch's own lookup, by one thread, is faster than chunks by two


@dataclass(frozen=True)
class IndexSource:
    """Where each of ``count`` weights is in a table: kept, or computed anew each time.

    Attributes:
        count: number of weights.
        compute: returns the entries (int64) of weights of given numbers (int64, of any shape).
        kept: all entries, int32; where they are kept.
        quickly: the same as compute, for two runs of ``CHUNK`` weights that begin at given numbers, (2, 1); compiled.
        read: returns a table's entries for all weights; compiled.
    """

    count: int
    compute: Callable[[Tensor], Tensor]
    kept: Tensor | None = None
    quickly: Callable[[Tensor], Tensor] | None = None
    read: Callable[[Tensor], Tensor] | None = None

    def whole(self, device: torch.device) -> Tensor:
        """Return all entries."""
        return self.compute(torch.arange(self.count, device=device)) if self.kept is None else self.kept

    def halves(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of both halves of the weights, side by side: which of half, and their entries, int64 (2, …).

        Halves are looked up, and summed, by two threads; a last weight of an odd number is left over. A chunk may be
        overwritten by the next.
        """
        half = self.count // 2
        wide = None if self.kept is None else torch.empty(2, min(CHUNK, half), dtype=torch.int64, device="cpu")
        for first in range(0, half, CHUNK):
            within = slice(first, min(first + CHUNK, half))
            if self.kept is not None and wide is not None:
                index = self.kept[: 2 * half].view(2, half)[:, within]
                yield within, wide[:, : index.shape[1]].copy_(index)
            elif self.quickly is not None and within.stop - first == CHUNK:
                yield within, self.quickly(_on_cpu([[first], [half + first]]))
            else:
                yield within, self.compute(_on_cpu([[0], [half]]) + torch.arange(first, within.stop, device="cpu"))

    def last(self) -> Tensor:
        """Return the entry of the last weight, (1,)."""
        return self.compute(_on_cpu([self.count - 1])) if self.kept is None else self.kept[-1:].long()


def lookup(table: Tensor, slots: IndexSource) -> Tensor:
    """Return ``table[slot]`` for all weights: ``w_i = t[h(i)]``.

    Args:
        table: (n,).
        slots: of N weights.

    Returns:
        (N,); its gradient adds up in the table, in float32 at least.
    """
    exact = table.dtype in (torch.float32, torch.float64)
    if slots.kept is not None and slots.count <= FEW and exact and not _in_order(table):
        return table.index_select(0, slots.kept)
    result: Tensor = _Lookup.apply(table, slots)
    return result


def gather(table: Tensor, slots: IndexSource) -> Tensor:
    """Return ``table[slot]``."""
    if not _in_halves(table):
        return table.index_select(0, slots.whole(table.device))
    if slots.read is not None:
        return slots.read(table.detach())  # whether it is trained is nothing to compile anew for
    weight, half = table.new_empty(slots.count), slots.count // 2
    both, tables = weight[: 2 * half].view(2, half), table.expand(2, -1)
    for within, index in slots.halves():
        torch.gather(tables, 1, index, out=both[:, within])
    if slots.count % 2:
        weight[-1:] = table[slots.last()]
    return weight


def scatter(values: Tensor, slots: IndexSource, size: int) -> Tensor:
    """Return the sum of the values of each entry's weights; (size,)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if _in_order(values):
        index = slots.whole(values.device).long()
        return values.new_zeros(size).index_put_((index,), values, accumulate=True)
    if not _in_halves(values):
        return values.new_zeros(size).index_add_(0, slots.whole(values.device), values)
    sums, half = values.new_zeros(2, size), slots.count // 2
    both = values[: 2 * half].view(2, half)
    for within, index in slots.halves():
        sums.scatter_add_(1, index, both[:, within])
    if slots.count % 2:
        sums[0].scatter_add_(0, slots.last(), values[-1:])
    return sums.sum(dim=0)


def _on_cpu(numbers: list[Any]) -> Tensor:
    """Return numbers on the CPU, whatever the default device."""
    return torch.tensor(numbers, device="cpu")


def _in_order(tensor: Tensor) -> bool:
    """Tell whether sums are to be taken in the same order each time, where torch's own are not."""
    return tensor.is_cuda and torch.are_deterministic_algorithms_enabled()


def _in_halves(tensor: Tensor) -> bool:
    """Tell whether chunks are looked up one after another: a compiler fuses the whole, and a GPU is wide enough."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class _Lookup(torch.autograd.Function):
    @staticmethod
    @override
    def forward(table: Tensor, slots: IndexSource) -> Tensor:
        return gather(table, slots)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, IndexSource], output: Tensor) -> None:
        table, ctx.slots = inputs
        ctx.size, ctx.dtype = len(table), table.dtype

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.slots, ctx.size).to(ctx.dtype), None

    @staticmethod
    @override
    def vmap(info: Any, in_dims: tuple[int, None], table: Tensor, slots: IndexSource) -> tuple[Tensor, int]:
        return table.movedim(in_dims[0], 0).index_select(1, slots.whole(table.device)), 0


class _Scatter(torch.autograd.Function):
    """The adjoint of the lookup, which makes second derivatives work."""

    @staticmethod
    @override
    def forward(values: Tensor, slots: IndexSource, size: int) -> Tensor:
        return scatter(values, slots, size)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, IndexSource, int], output: Tensor) -> None:
        values, ctx.slots, _ = inputs
        ctx.dtype = values.dtype

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return lookup(grad, ctx.slots).to(ctx.dtype), None, None

    @staticmethod
    @override
    def vmap(
        info: Any, in_dims: tuple[int, None, None], values: Tensor, slots: IndexSource, size: int
    ) -> tuple[Tensor, int]:
        values = values.movedim(in_dims[0], 0)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(len(values), size).index_add_(1, slots.whole(values.device), values), 0
