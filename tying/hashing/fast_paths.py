"""Layers computed from the table, without an index and without the whole weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tying.hashing.gather import CHUNK, IndexSource, lookup

Size = int | Sequence[int]


class FastPath(Protocol):
    """What a layer computes with a weight ``table[slot]``, and the weight itself.

    Attributes:
        zeros: whether some weights are zero.
    """

    zeros: ClassVar[bool]

    def weight(self, table: Tensor) -> Tensor:
        """Return the weight."""

    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + b``."""


@dataclass(frozen=True)
class RepeatedRows:
    """A weight that runs through the table again and again: its rows repeat, and its columns fold.

    Row r begins at the entry ``(first + r · width) mod n``, hence there are ``n / gcd(width, n)`` distinct rows at
    most; where rows are longer than the table, inputs that meet the same entry are added up.

    Attributes:
        shape: of the weight, whose first dimension counts rows.
        size: n, the number of entries.
        first: entry of the first weight.
    """

    zeros: ClassVar[bool] = False
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

    def weight(self, table: Tensor) -> Tensor:
        """Return the weight, of ``shape``."""
        return repeat_to(self.rows(table), self.shape[0], 0).view(self.shape)

    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + b``, for x (..., width)."""
        if self.width <= self.size:
            return repeat_to(F.linear(x, self.rows(table)), self.shape[0], -1, bias)
        turns = -(-self.width // self.size)
        padded = F.pad(x, (0, turns * self.size - self.width))
        folded = padded.view(*x.shape[:-1], turns, self.size).sum(dim=-2)
        turned = lookup(table, IndexSource(self.distinct * self.size, self._turned)).view(self.distinct, self.size)
        return repeat_to(F.linear(folded, turned), self.shape[0], -1, bias)

    def _turned(self, numbers: Tensor) -> Tensor:
        """Return the entries of the table as it begins with each distinct row's first weight."""
        return (self.first + self.width * (numbers // self.size) + numbers) % self.size

    def convolve(self, table: Tensor, bias: Tensor | None, convolution: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a convolution's output, (..., channels, *size), from that of its distinct kernels."""
        kernels = self.rows(table).view(-1, *self.shape[1:])
        return repeat_to(convolution(kernels), self.shape[0], 1 - len(self.shape), bias)

    def rows(self, table: Tensor) -> Tensor:
        """Return the distinct rows, (distinct, width)."""
        count = self.distinct * self.width
        turns = -(-(self.first + count) // self.size)
        whole = table if turns == 1 else table.repeat(turns)
        used = whole if len(whole) == count else whole[self.first : self.first + count]
        return used.view(self.distinct, self.width)


@dataclass(frozen=True)
class Blocks:
    """A weight that is read in contiguous blocks: where each begins is computed, not where each weight is.

    Attributes:
        shape: of the weight.
        block: number of weights that are read together.
        first: identifier of the first weight.
        starts: returns where blocks of given numbers begin in the table.
    """

    zeros: ClassVar[bool] = False
    shape: tuple[int, ...]
    block: int
    first: int
    starts: Callable[[Tensor], Tensor]

    def weight(self, table: Tensor) -> Tensor:
        """Return the weight, of ``shape``."""
        count = math.prod(self.shape)
        aligned = all(length % self.block == 0 for length in (self.first, count // 2, CHUNK))
        slots = IndexSource(count, self._entries, quickly=self._runs if aligned else None)
        return lookup(table, slots).view(self.shape)

    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + b``, for x (..., width)."""
        return F.linear(x, self.weight(table), bias)

    def _entries(self, numbers: Tensor) -> Tensor:
        ids = numbers + self.first
        return self.starts(ids // self.block) + ids % self.block

    def _runs(self, begin: Tensor) -> Tensor:
        """Return the entries of runs of ``CHUNK`` weights, each a whole number of blocks."""
        blocks = (begin + self.first) // self.block + torch.arange(CHUNK // self.block, device=begin.device)
        return (self.starts(blocks)[..., None] + torch.arange(self.block, device=begin.device)).flatten(1)


def repeat_to(x: Tensor, count: int, dim: int, bias: Tensor | None = None) -> Tensor:
    """Repeat a tensor along a dimension to a length; add a bias, one number for each place along it."""
    held, dim = x.shape[dim], dim % x.ndim
    if held == count and bias is None:
        return x
    turns = -(-count // held)
    repeated = x.unsqueeze(dim).expand(*x.shape[:dim], turns, *x.shape[dim:])
    if bias is not None:  # while it is repeated: a pass over the output less
        bias, rest = bias.to(x.dtype), turns * held - count
        padded = F.pad(bias, (0, rest)) if rest else bias
        repeated = repeated + padded.view(turns, held, *[1] * (x.ndim - dim - 1))
    flat = repeated.flatten(dim, dim + 1)
    return flat if turns * held == count else flat.narrow(dim, 0, count)


def both(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
