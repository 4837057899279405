"""Loops over hashed weights on the CPU, compiled by numba, which the extra ``fast`` installs.

One thread reads or sums the first half of the weights, and another the second half, in the order in which
:mod:`tying.hashing.gather` does it without numba: results do not depend on the number of threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an optional package without types
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

NEVER = 1 << 31  # above every entry of an index
TWO_THREADS = 1 << 17  # number of weights from which a second thread pays
BUFFER = 1024  # number of slots that are computed at a time
FEW_SLOTS = 256  # additions to so few slots would wait for one another
COPIES = 8  # of a table of few slots, among which additions alternate

Task = Callable[[int, int, int], None]
compiled: Any = numba.njit(nogil=True)
inlined: Any = numba.njit(inline="always")
u32, u64 = np.uint32, np.uint64


class Loops(Protocol):
    """Reads all weights from a table, and sums values over the weights that share a slot.

    A table is ``[t, −t, 0]``, without what no weight reads; see :class:`tying.hashing.gather.IndexSource`.
    """

    count: int

    def read(self, table: Tensor) -> Tensor:
        """Return the weights, (count,)."""
        source, weights = table.detach().numpy(), table.new_empty(self.count)
        target = weights.detach().numpy()
        in_halves(lambda _, begin, end: self.read_part(source, begin, target[begin:end]), self.count)
        return weights

    def sum(self, values: Tensor, size: int) -> Tensor:
        """Return for each slot the sum of its weights' values, which are contiguous; (size,)."""
        source, sums = values.detach().numpy(), values.new_zeros(2, size)
        target = sums.numpy()
        in_halves(lambda half, begin, end: self.sum_part(source[begin:end], begin, target[half]), self.count)
        return sums.sum(dim=0)

    def read_part(self, table: Any, begin: int, out: Any) -> None:
        """Write the weights from the position ``begin`` on into an array."""
        raise NotImplementedError

    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        """Add the values of the weights from the position ``begin`` on to their slots."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredLoops(Loops):
    """Loops over a stored index.

    Attributes:
        index: the entry of each weight, (count,) integers.
        signed: the number of slots, if the table contains negatives; entries from there on are summed with sign −1.
    """

    index: Tensor
    signed: int | None = None

    @property
    @override
    def count(self) -> int:  # type: ignore[override]
        return len(self.index)

    @override
    def read_part(self, table: Any, begin: int, out: Any) -> None:
        _read(table, self.signed or NEVER, self.index.numpy()[begin:], out)

    @override
    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        add = _add_few if len(sums) <= FEW_SLOTS else _add
        add(values, self.signed or NEVER, self.index.numpy()[begin:], sums)


@dataclass(frozen=True)
class UniformLoops(Loops):
    """Loops that compute the slots of a uniform hash.

    Attributes:
        count: number of weights.
        first: identifier of the first weight; all are below 2³².
        size: number of slots.
        keys: keys of the hash of slots, and of the hash of signs, from :func:`tying.hashing.hashes.splitmix64`.
        signed: whether the table contains negatives.
    """

    count: int
    first: int
    size: int
    keys: tuple[int, int, int, int]
    signed: bool

    @override
    def read_part(self, table: Any, begin: int, out: Any) -> None:
        _read_uniform(table, self.first + begin, self.size, self.keys, self.signed, out)

    @override
    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        _add_uniform(values, self.first + begin, self.size, self.keys, self.signed, sums)


@dataclass(frozen=True)
class BlockLoops(Loops):
    """Loops over blocks of weights that read contiguous slots.

    Attributes:
        count: number of weights.
        starts: the first slot of each block, (blocks,) int64.
        block: number of weights in a block.
        skipped: number of weights of the first block before the first weight.
    """

    count: int
    starts: Tensor
    block: int
    skipped: int = 0

    @override
    def read_part(self, table: Any, begin: int, out: Any) -> None:
        _read_blocks(table, self.starts.numpy(), self.block, self.skipped + begin, out)

    @override
    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        _add_blocks(values, self.starts.numpy(), self.block, self.skipped + begin, sums)


def check() -> None:
    """Raise an error if numba cannot compile, or computes something else than torch."""
    config: Any = numba.config
    if config.DISABLE_JIT:
        raise RuntimeError("the environment variable NUMBA_DISABLE_JIT is set")
    table, index = torch.arange(3.0), torch.tensor([2, 0], dtype=torch.int32)
    if StoredLoops(index).read(table).tolist() != [2.0, 0.0]:
        raise RuntimeError("a compiled loop returns wrong values")


def in_halves(task: Task, count: int) -> None:
    """Call ``task(half, begin, end)`` for both halves of ``count`` weights, on two threads if that pays."""
    middle = count // 2
    if count < TWO_THREADS or torch.get_num_threads() == 1:
        task(0, 0, middle)
        task(1, middle, count)
        return
    other = _second_thread(os.getpid()).submit(task, 0, 0, middle)
    task(1, middle, count)
    other.result()


@lru_cache(maxsize=1)
def _second_thread(process: int) -> ThreadPoolExecutor:
    """Return a thread of this process; a forked process has none of its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix="tying")


@compiled
def _read(table, turn, index, out):  # type: ignore[no-untyped-def]  # compiled by the types of arguments
    for i in range(len(out)):
        entry = np.int64(index[i])
        negative = entry >= turn
        value = table[entry - turn if negative else entry]
        out[i] = -value if negative else value


@compiled
def _add(values, turn, index, sums):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        entry = np.int64(index[i])
        negative = entry >= turn
        sums[entry - turn if negative else entry] += -values[i] if negative else values[i]


@compiled
def _add_few(values, turn, index, sums):  # type: ignore[no-untyped-def]
    copies = np.zeros((COPIES, len(sums)), sums.dtype)
    for i in range(len(values)):
        copies[i % COPIES, index[i]] += values[i]
    for copied in copies:
        sums += copied


@inlined
def _hash32(x, low, high):  # type: ignore[no-untyped-def]
    """See :func:`tying.hashing.hashes.hash32`."""
    x = u32(x + low)
    x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x7FEB352D)) ^ high
    x = u32(u32(x ^ u32(u32(x) >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ u32(x >> u32(16)))


@inlined
def _fill(slots, first, size, keys, signed):  # type: ignore[no-untyped-def]
    """Write entries of the table of consecutive weights into a buffer."""
    low, high, sign_low, sign_high = u32(keys[0]), u32(keys[1]), u32(keys[2]), u32(keys[3])
    for i in range(len(slots)):
        x = u32(first + i)
        slots[i] = u32((u64(_hash32(x, low, high)) * u64(size)) >> u64(32))
    if signed:
        for i in range(len(slots)):
            slots[i] = slots[i] + u32(size) * (_hash32(u32(first + i), sign_low, sign_high) & u32(1))


@compiled
def _read_uniform(table, first, size, keys, signed, out):  # type: ignore[no-untyped-def]
    buffer = np.empty(BUFFER, np.uint32)
    for begin in range(0, len(out), BUFFER):
        slots = buffer[: min(BUFFER, len(out) - begin)]
        _fill(slots, first + begin, size, keys, signed)
        for i in range(len(slots)):
            out[begin + i] = table[slots[i]]


@compiled
def _add_uniform(values, first, size, keys, signed, sums):  # type: ignore[no-untyped-def]
    buffer = np.empty(BUFFER, np.uint32)
    for begin in range(0, len(values), BUFFER):
        slots = buffer[: min(BUFFER, len(values) - begin)]
        _fill(slots, first + begin, size, keys, signed)
        for i in range(len(slots)):
            sums[slots[i]] += values[begin + i]


@inlined
def _part(number, block, begin, end):  # type: ignore[no-untyped-def]
    """Return the first position of a block between two positions, and the one after its last."""
    return max(begin, number * block), min(end, (number + 1) * block)


@compiled
def _read_blocks(table, starts, block, begin, out):  # type: ignore[no-untyped-def]
    """``begin`` is the position of the first weight in the blocks."""
    end = begin + len(out)
    for number in range(begin // block, -(-end // block)):
        first, after = _part(number, block, begin, end)
        shift = starts[number] - number * block
        for position in range(first, after):
            out[position - begin] = table[position + shift]


@compiled
def _add_blocks(values, starts, block, begin, sums):  # type: ignore[no-untyped-def]
    """``begin`` is the position of the first weight in the blocks."""
    end = begin + len(values)
    for number in range(begin // block, -(-end // block)):
        first, after = _part(number, block, begin, end)
        shift = starts[number] - number * block
        for position in range(first, after):
            sums[position + shift] += values[position - begin]
