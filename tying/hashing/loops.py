"""Loops over hashed weights on the CPU, compiled by numba; see :mod:`tying.compiled`.

The two halves of the weights are read or summed in the order in which :mod:`tying.hashing.gather` does it without
numba.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an optional package without types
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tying.compiled import in_halves

BUFFER = 1024  # number of slots that are computed at a time
FEW_SLOTS = 256  # additions to so few slots would wait for one another
COPIES = 8  # of a table of few slots, among which additions alternate

compiled: Any = numba.njit(nogil=True)
inlined: Any = numba.njit(inline="always")
u32, u64 = np.uint32, np.uint64


class Loops(Protocol):
    """Reads all weights from a table, and sums values over the weights that share an entry.

    Attributes:
        count: number of weights.
        negates: whether tables are t where the index says ``[t, −t]``; see :class:`tying.hashing.gather.IndexSource`.
    """

    count: int
    negates: bool = False

    def read(self, table: Tensor) -> Tensor:
        """Return the weights, (count,)."""
        source, weights = _array(table), table.new_empty(self.count)
        target = weights.detach().numpy()
        in_halves(lambda _, begin, end: self.read_part(source, begin, target[begin:end]), self.count)
        return weights

    def sum(self, values: Tensor, size: int) -> Tensor:
        """Return for each entry the sum of its weights' values, which are contiguous; (size,)."""
        if size >= self.count:  # two tables of zeros would cost more than one thread
            sums = values.new_zeros(size)
            self.sum_part(_array(values), 0, sums.numpy())
            return sums
        source, sums = _array(values), values.new_zeros(2, size)
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
        signed: the number of slots, if entries from there on are negatives.
    """

    index: Tensor
    signed: int | None = None

    @property
    @override
    def count(self) -> int:  # type: ignore[override]
        return len(self.index)

    @property
    @override
    def negates(self) -> bool:  # type: ignore[override]
        return self.signed is not None

    @property
    def _entries(self) -> Any:
        """The index as unsigned integers, which addresses need no extension for."""
        index = self.index.numpy()
        return index.view(f"u{index.itemsize}")

    @override
    def read_part(self, table: Any, begin: int, out: Any) -> None:
        if self.signed is None:
            _read(table, self._entries[begin:], out)
        else:
            _read_signed(table, self.signed, self._entries[begin:], out)

    @override
    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        if self.signed is not None:
            _add_signed(values, self.signed, self._entries[begin:], sums)
        else:
            add = _add_few if len(sums) <= FEW_SLOTS else _add
            add(values, self._entries[begin:], sums)


@dataclass(frozen=True)
class UniformLoops(Loops):
    """Loops that compute the slots of a uniform hash.

    Attributes:
        count: number of weights.
        first: identifier of the first weight; all are below 2³².
        size: number of slots.
        keys: keys of the hash of slots, and of the hash of signs, from :func:`tying.hashing.hashes.splitmix64`.
        negates: whether some weights are negatives.
    """

    count: int
    first: int
    size: int
    keys: tuple[int, int, int, int]
    negates: bool

    @override
    def read_part(self, table: Any, begin: int, out: Any) -> None:
        _read_uniform(table, self.first + begin, self.size, self.keys, self.negates, out)

    @override
    def sum_part(self, values: Any, begin: int, sums: Any) -> None:
        _add_uniform(values, self.first + begin, self.size, self.keys, self.negates, sums)


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
    table, index = torch.arange(3.0, device="cpu"), torch.tensor([2, 0], dtype=torch.int32, device="cpu")
    if StoredLoops(index).read(table).tolist() != [2.0, 0.0]:
        raise RuntimeError("a compiled loop returns wrong values")


def _array(tensor: Tensor) -> Any:
    return tensor.detach().resolve_neg().numpy()


@compiled
def _read(table, index, out):  # type: ignore[no-untyped-def]  # compiled by the types of arguments
    for i in range(len(out)):
        out[i] = table[index[i]]


@compiled
def _read_signed(table, turn, index, out):  # type: ignore[no-untyped-def]
    """Entries from ``turn`` on are negatives."""
    for i in range(len(out)):
        entry = np.int64(index[i])
        negative = entry >= turn
        value = table[entry - turn if negative else entry]
        out[i] = -value if negative else value


@compiled
def _add(values, index, sums):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        sums[index[i]] += values[i]


@compiled
def _add_signed(values, turn, index, sums):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        entry = np.int64(index[i])
        negative = entry >= turn
        sums[entry - turn if negative else entry] += -values[i] if negative else values[i]


@compiled
def _add_few(values, index, sums):  # type: ignore[no-untyped-def]
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
def _slot(x, low, high, size):  # type: ignore[no-untyped-def]
    return u32((u64(_hash32(x, low, high)) * u64(size)) >> u64(32))


@inlined
def _fill(entries, first, size, keys, negates):  # type: ignore[no-untyped-def]
    """Write the entries of consecutive weights into a buffer."""
    low, high, sign_low, sign_high = u32(keys[0]), u32(keys[1]), u32(keys[2]), u32(keys[3])
    for i in range(len(entries)):
        entries[i] = _slot(u32(first + i), low, high, size)
    if negates:
        for i in range(len(entries)):
            entries[i] += u32(size) * (_hash32(u32(first + i), sign_low, sign_high) & u32(1))


@compiled
def _read_uniform(table, first, size, keys, negates, out):  # type: ignore[no-untyped-def]
    buffer = np.empty(BUFFER, np.uint32)
    for begin in range(0, len(out), BUFFER):
        weights = out[begin : begin + BUFFER]
        entries = buffer[: len(weights)]
        _fill(entries, first + begin, size, keys, negates)
        if negates:
            _read_signed(table, size, entries, weights)
        else:
            _read(table, entries, weights)


@compiled
def _add_uniform(values, first, size, keys, negates, sums):  # type: ignore[no-untyped-def]
    buffer = np.empty(BUFFER, np.uint32)
    for begin in range(0, len(values), BUFFER):
        added = values[begin : begin + BUFFER]
        entries = buffer[: len(added)]
        _fill(entries, first + begin, size, keys, negates)
        if negates:
            _add_signed(added, size, entries, sums)
        else:
            _add(added, entries, sums)


@compiled
def block_starts(first, count, size, low, high):  # type: ignore[no-untyped-def]
    """Return the first slots of consecutive blocks; ``first`` is the number of the first block."""
    starts = np.empty(count, np.int64)
    for i in range(count):
        starts[i] = _slot(u32(first + i), u32(low), u32(high), size)
    return starts


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
        source, target = table[first + shift : after + shift], out[first - begin : after - begin]
        for i in range(after - first):
            target[i] = source[i]


@compiled
def _add_blocks(values, starts, block, begin, sums):  # type: ignore[no-untyped-def]
    """``begin`` is the position of the first weight in the blocks."""
    end = begin + len(values)
    for number in range(begin // block, -(-end // block)):
        first, after = _part(number, block, begin, end)
        shift = starts[number] - number * block
        source, target = values[first - begin : after - begin], sums[first + shift : after + shift]
        for i in range(after - first):
            target[i] += source[i]
