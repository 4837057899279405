"""Read weights from a table by an index, and sum gradients over the weights that share a slot."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from tying.compiled import compiled_loops
from tying.torch_workarounds import compile_apart, error_on_graph_break, is_proxy, is_traced

if TYPE_CHECKING:
    from tying.hashing.loops import Loops  # they need an optional package

CHUNK = 1 << 18  # number of weights of each half whose slots are in memory at a time
LOOPED = (torch.float32, torch.float64)  # dtypes that compiled loops can read
FEW = 1 << 20  # up to this number of weights, torch's lookup on one thread is faster than chunks on two


@dataclass(frozen=True)
class IndexSource:
    """The table index of every weight, stored or recomputed on demand.

    Weight i reads ``extended[index[i]]``; the extended table is ``[t, −t, 0]``, without what no weight reads. Storing
    the index costs 4 bytes per weight; recomputing it costs a few integer operations per weight and read.

    Attributes:
        count: number of weights.
        compute: maps positions of weights (int64, any shape) to entries of the extended table (int64, same shape).
        stored: the whole index, (count,) int32, or None to recompute it.
        negatives: whether weights read negatives.
        zeros: whether weights read a zero.
        slots_of_chunks: maps the first positions of two chunks of ``CHUNK`` weights, (2, 1), to their slots; faster
            than ``compute``.
        read: maps an extended table to all weights; faster than chunks.
        loops: compiled loops, which read and sum faster than all others.
    """

    count: int
    compute: Callable[[Tensor], Tensor]
    stored: Tensor | None = None
    negatives: bool = False
    zeros: bool = False
    slots_of_chunks: Callable[[Tensor], Tensor] | None = None
    read: Callable[[Tensor], Tensor] | None = None
    loops: "Loops | None" = None

    def index(self, device: torch.device) -> Tensor:
        """Return the whole index."""
        return self.compute(torch.arange(self.count, device=device)) if self.stored is None else self.stored

    def extended(self, table: Tensor) -> Tensor:
        """Return ``[t, −t, 0]``, without what no weight reads; (..., n) to (..., extended)."""
        parts = [table]
        if self.negatives:
            parts.append(-table)
        if self.zeros:
            parts.append(torch.zeros_like(table[..., :1]))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else table

    def extended_size(self, size: int) -> int:
        """Return the number of entries of the extended table, of the number of slots."""
        return size * (1 + self.negatives) + self.zeros

    def reduced(self, sums: Tensor, size: int) -> Tensor:
        """Return the gradient of a table, (..., n), from that of the extended one."""
        return sums[..., :size] - sums[..., size : 2 * size] if self.negatives else sums[..., :size]

    def chunks(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield chunks of a tensor with one number per weight, (count,), and the slots of these weights.

        A chunk has two rows, one from each half of the weights, so that two threads read or sum one row each. If
        ``count`` is odd, the last chunk is the last weight, (1, 1). Slots are valid only until the next chunk.
        """
        half = self.count // 2
        halves, starts = flat[: 2 * half].view(2, half), torch.tensor([[0], [half]], device="cpu")
        if self.stored is not None:
            stored = self.stored[: 2 * half].view(2, half)
            buffer = torch.empty(2, min(CHUNK, half), dtype=torch.int64, device="cpu")
        for begin in range(0, half, CHUNK):
            end = min(begin + CHUNK, half)
            if self.stored is not None:
                slots = buffer[:, : end - begin].copy_(stored[:, begin:end])
            elif self.slots_of_chunks is not None and end - begin == CHUNK:
                slots = self.slots_of_chunks(starts + begin)
            else:
                slots = self.compute(starts + torch.arange(begin, end, device="cpu"))
            yield halves[:, begin:end], slots
        if self.count % 2:
            last = torch.tensor([[self.count - 1]], device="cpu")
            yield flat[-1:].view(1, 1), self.compute(last) if self.stored is None else self.stored[last].long()


def lookup(table: Tensor, source: IndexSource) -> Tensor:
    """Return ``table[index]``, differentiably: ``w_i = t[h(i)]``.

    Args:
        table: (n,).
        source: the index of N weights.

    Returns:
        (N,); its gradient is accumulated in float32 at least.
    """
    plain = is_proxy(table) or (source.count <= FEW and table.dtype in (torch.float32, torch.float64))
    if source.stored is not None and plain:
        return source.extended(table).index_select(0, source.stored)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # it cannot record writes into chunks
        return source.extended(table).index_select(0, source.index(table.device))
    weights: Tensor = _Indexing.apply(table, source, None)
    return weights


def gather(table: Tensor, source: IndexSource) -> Tensor:
    """Return the weights, (count,)."""
    if source.loops is not None and table.dtype in LOOPED and _in_chunks(table):
        return source.loops.read(table if source.loops.negates else source.extended(table))
    extended = source.extended(table)
    if not _in_chunks(table):
        return extended.index_select(0, source.index(table.device))
    if source.read is not None:
        return source.read(extended.detach())  # detached: compiled once for trained and frozen tables
    weights, tables = table.new_empty(source.count), extended.expand(2, -1)
    for chunk, slots in source.chunks(weights):
        torch.gather(tables, 1, slots, out=chunk)
    return weights


def scatter(values: Tensor, source: IndexSource, size: int) -> Tensor:
    """Return for each slot the sum of its weights' values, or of their negatives; (size,)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if source.loops is not None and values.dtype in LOOPED and _in_chunks(values):
        if source.loops.negates:
            return source.loops.sum(values.contiguous(), size)
        return source.reduced(source.loops.sum(values.contiguous(), source.extended_size(size)), size)
    extended = values.new_zeros(source.extended_size(size))
    if not _in_chunks(values):
        return source.reduced(extended.index_add_(0, source.index(values.device), values), size)
    sums = extended.repeat(2, 1)
    for chunk, slots in source.chunks(values):
        sums.scatter_add_(1, slots, chunk)
    return source.reduced(sums.sum(dim=0), size)


def _in_chunks(tensor: Tensor) -> bool:
    """Return whether to read in chunks: on a CPU, unless the compiler fuses the whole lookup."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_plain_cpu(table: Tensor) -> bool:
    """Return whether Python code may read the values of a table on the CPU."""
    return table.device.type == "cpu" and not is_traced()


class _Indexing(torch.autograd.Function):
    """Weights of a table or, if a size is given, the adjoint: sums over slots. Each is the backward of the other."""

    @staticmethod
    @override
    def forward(x: Tensor, source: IndexSource, size: int | None) -> Tensor:
        return gather(x, source) if size is None else scatter(x, source, size)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, IndexSource, int | None], output: Tensor) -> None:
        x, ctx.source, size = inputs
        ctx.size, ctx.dtype = len(x) if size is None else None, x.dtype

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Indexing.apply(grad, ctx.source, ctx.size).to(ctx.dtype), None, None

    @staticmethod
    @override
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, source: IndexSource, size: int | None
    ) -> tuple[Tensor, int]:
        x, index = x.movedim(in_dims[0], 0), source.index(x.device)
        if size is None:
            return source.extended(x).index_select(1, index), 0
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = x.new_zeros(len(x), source.extended_size(size)).index_add_(1, index, x)
        return source.reduced(sums, size), 0


def block_source(source: IndexSource, starts: Tensor, block: int, skipped: int = 0) -> IndexSource:
    """Return a source that reads blocks of weights as a whole, on the CPU.

    Args:
        source: the index of the weights.
        starts: the first slot of each block, (blocks,) int64.
        block: number of weights in a block.
        skipped: number of weights of the first block that come before the first weight.
    """

    def read(table: Tensor) -> Tensor:
        return table.unfold(0, block, 1).index_select(0, starts).flatten()[skipped : skipped + source.count]

    loops = compiled_loops("tying.hashing")
    compiled = None if loops is None else loops.BlockLoops(source.count, starts, block, skipped)
    return replace(source, read=read, loops=compiled)


def compile_source(source: IndexSource, size: int, name: str) -> IndexSource:
    """Return a source that computes slots by compiled code on the CPU, or the given source if torch cannot compile.

    Args:
        source: an index that is not stored.
        size: number of slots.
        name: name of the hash, for the warning.

    Warns:
        UserWarning: torch cannot compile: the machine has no compiler, or the hash uses Python that torch cannot trace.
    """

    def slots_of_chunks(starts: Tensor) -> Tensor:
        return source.compute(starts + torch.arange(CHUNK, device="cpu"))

    def read(table: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return table[source.index(table.device)]
        return gather(table, replace(source, negatives=False, zeros=False))  # in chunks, which need less memory

    fast_slots, fast_read = compile_apart(slots_of_chunks), compile_apart(read)
    try:
        with error_on_graph_break():
            fast_slots(torch.tensor([[0], [CHUNK]], device="cpu"))
            fast_read(torch.zeros(source.extended_size(size), device="cpu"))
    except Exception as error:
        warnings.warn(f"{name} is computed slowly, without compilation: {error}", stacklevel=2)
        return source
    return replace(source, slots_of_chunks=fast_slots, read=fast_read)
