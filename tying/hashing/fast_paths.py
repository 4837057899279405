"""Fast paths, which compute layers from the table without an index and, in most cases, without the whole weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.compiled import compiled_loops
from tying.hashing.gather import CHUNK, IndexSource, block_source, is_plain_cpu, lookup

Size = int | Sequence[int]


class FastPath(Protocol):
    """Computes a weight, and a linear layer with this weight, efficiently for one kind of hash.

    Attributes:
        zeros: whether the hash makes some weights zero.
    """

    zeros: ClassVar[bool] = False

    def weight(self, table: Tensor) -> Tensor:
        """Return the weight."""
        raise NotImplementedError

    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + b``, for x (..., width)."""
        return F.linear(x, self.weight(table), bias)


@dataclass(frozen=True)
class RepeatedRows(FastPath):
    """A weight that cycles through the table, so that its rows repeat.

    Row r begins at slot ``(first + r · width) mod n``, so at most ``n / gcd(width, n)`` rows are distinct. If rows are
    longer than the table, all inputs that are multiplied by the same slot are summed before the matrix product.

    Attributes:
        shape: shape of the weight; its first dimension counts rows.
        size: n, the number of slots.
        first: slot of the first weight.
    """

    shape: tuple[int, ...]
    size: int
    first: int

    @property
    def width(self) -> int:
        """Number of weights in a row."""
        return math.prod(self.shape[1:])

    @property
    def distinct(self) -> int:
        """Number of distinct rows."""
        return min(self.shape[0], self.size // math.gcd(self.width, self.size))

    @override
    def weight(self, table: Tensor) -> Tensor:
        return repeat_to(self.rows(table), self.shape[0], 0).view(self.shape)

    @override
    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.width <= self.size:
            return repeat_to(F.linear(x, self.rows(table)), self.shape[0], -1, bias)
        cycles = -(-self.width // self.size)
        padded = F.pad(x, (0, cycles * self.size - self.width)).view(*x.shape[:-1], cycles, self.size)
        rotated = lookup(table, IndexSource(self.distinct * self.size, self._rotated)).view(self.distinct, self.size)
        return repeat_to(F.linear(padded.sum(dim=-2), rotated), self.shape[0], -1, bias)

    def _rotated(self, positions: Tensor) -> Tensor:
        """Return the slots of a copy of the table for each distinct row, rotated to begin at the row's first weight."""
        return (self.first + self.width * (positions // self.size) + positions) % self.size

    def rows(self, table: Tensor) -> Tensor:
        """Return the distinct rows, (distinct, width)."""
        count = self.distinct * self.width
        cycles = -(-(self.first + count) // self.size)
        repeated = table if cycles == 1 else table.repeat(cycles)
        used = repeated if len(repeated) == count else repeated[self.first : self.first + count]
        return used.view(self.distinct, self.width)


@dataclass(frozen=True)
class Blocks(FastPath):
    """A weight whose blocks are read contiguously: only the first slot of each block is computed.

    Attributes:
        shape: shape of the weight.
        block: number of weights in a block.
        first: identifier of the first weight.
        slot: maps identifiers to slots.
        keys: those of the hash of blocks, from :func:`tying.hashing.hashes.splitmix64`; None if ``slot`` is another.
        spread: number of slots at which a block can begin; of use with keys.
    """

    shape: tuple[int, ...]
    block: int
    first: int
    slot: Callable[[Tensor], Tensor]
    keys: tuple[int, int] | None = None
    spread: int = 0

    @override
    def weight(self, table: Tensor) -> Tensor:
        count, skipped = math.prod(self.shape), self.first % self.block
        aligned = all(length % self.block == 0 for length in (self.first, count // 2, CHUNK))
        source = IndexSource(
            count,
            compute=lambda positions: self.slot(positions + self.first),
            slots_of_chunks=self._chunk_slots if aligned else None,
        )
        if is_plain_cpu(table):
            blocks = range(self.first // self.block, -(-(self.first + count) // self.block))
            source = block_source(source, self._starts(blocks), self.block, skipped)
        return lookup(table, source).view(self.shape)

    def _starts(self, blocks: range) -> Tensor:
        """Return the first slots of blocks, on the CPU."""
        loops = compiled_loops("tying.hashing")
        if loops is not None and self.keys is not None and blocks.stop < 1 << 32:
            return torch.from_numpy(loops.block_starts(blocks.start, len(blocks), self.spread, *self.keys))
        return self.slot(torch.arange(blocks.start, blocks.stop, device="cpu") * self.block)

    def _chunk_slots(self, begin: Tensor) -> Tensor:
        """Return the slots of chunks of ``CHUNK`` weights that begin at the given positions; blocks are not split."""
        starts = self.slot(begin + self.first + torch.arange(0, CHUNK, self.block, device=begin.device))
        return (starts[..., None] + torch.arange(self.block, device=begin.device)).flatten(1)


@dataclass(frozen=True)
class Convolution(FastPath):
    """The weight of a linear layer that convolves flattened images, with the table as kernel.

    Attributes:
        images: channels, height and width of the input.
        kernels: shape of the kernel: output channels, input channels, height and width.
        stride: stride of the convolution.
        padding: zero padding on both sides.
        dilation: dilation of the convolution.
    """

    zeros: ClassVar[bool] = True
    images: tuple[int, int, int]
    kernels: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @override
    def weight(self, table: Tensor) -> Tensor:
        # the columns are the outputs for unit vectors
        return self.linear(torch.eye(math.prod(self.images), dtype=table.dtype, device=table.device), table).T

    @override
    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        images = x.reshape(math.prod(x.shape[:-1]), *self.images)
        output = F.conv2d(images, table.view(self.kernels), None, self.stride, self.padding, self.dilation)
        output = output.reshape(*x.shape[:-1], math.prod(output.shape[1:]))
        return output if bias is None else output + bias.to(output.dtype)


def repeat_to(x: Tensor, count: int, dim: int, bias: Tensor | None = None) -> Tensor:
    """Repeat a tensor along a dimension up to length ``count``; add a bias, (count,), along that dimension."""
    length, dim = x.shape[dim], dim % x.ndim
    if length == count and bias is None:
        return x
    cycles = -(-count // length)
    extra = cycles * length - count
    repeated = x.unsqueeze(dim).expand(*x.shape[:dim], cycles, *x.shape[dim:])
    if bias is not None:  # adding it here saves a pass over the output
        bias = F.pad(bias, (0, extra)) if extra else bias
        repeated = repeated + bias.to(x.dtype).view(cycles, length, *[1] * (x.ndim - dim - 1))
    flat = repeated.flatten(dim, dim + 1)
    return flat.narrow(dim, 0, count) if extra else flat


def pair(size: Size) -> tuple[int, int]:
    """Return height and width; a single number stands for both."""
    return (size[0], size[1]) if isinstance(size, Sequence) else (size, size)
