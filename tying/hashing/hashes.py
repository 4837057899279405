"""Hashes: which table entry each virtual weight uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hashing.dirichlet import cumulative
from tying.hashing.mixing import below, mix, xxh32
from tying.hashing.structure import RepeatedRows, Structure

_SIGN = 0x5349474E  # sets the draws of signs apart from those of slots


class Hash:
    """The base of all hashes; a hash of your own writes :meth:`slot`.

    Identifiers count the virtual weights of a layer, or of a network where its layers share a table, row by row. What
    a hash returns is a function of them and of its arguments alone, in integer arithmetic, hence the same on every
    machine.

    Example:
        >>> class Halves(Hash):
        ...     def slot(self, ids, table_size):
        ...         return ids // 2 % table_size
        >>> Halves().index(count=6, table_size=2).tolist()
        [0, 0, 1, 1, 0, 0]
    """

    takes_vectors: ClassVar[bool] = False  # biases and norms too, and each weight as it is, without a scale

    def __repr__(self) -> str:  # by which checkpoints know the hash
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        """Return the table entry of each identifier; −1 is a weight that is zero.

        Args:
            ids: int64, of any shape.
            table_size: number of entries.
            drawn: what :meth:`draw` returned; a hash that draws nothing need not take it.

        Returns:
            int64, of that shape, in [−1, table_size).
        """
        raise NotImplementedError

    def draw(self, table_size: int) -> Tensor | None:
        """Return what floating point may draw differently elsewhere, hence is saved with a model's weights."""
        return None

    def sign(self, ids: Tensor) -> Tensor:
        """Return +1 or −1 for each identifier, independently of its slot."""
        return 1 - 2 * (mix(ids, getattr(self, "seed", 0) + _SIGN) & 1)

    def index(self, count: int, table_size: int) -> Tensor:
        """Return the table entries of identifiers 0 to count − 1."""
        self.check(count, table_size)
        drawn = self.draw(table_size)
        return self.slot(torch.arange(count), table_size, *([] if drawn is None else [drawn]))

    def seeded(self, salt: int) -> Self:
        """Return this hash with other draws; the same one where it draws nothing."""
        return self

    def table_size(self, count: int) -> int | None:
        """Return the size of the table, where the hash leaves no choice."""
        return None

    def check(self, count: int, table_size: int) -> None:
        """Raise a ConfigurationError where the hash does not fit so many weights, or such a table."""
        if table_size < 1:
            raise ConfigurationError(f"a table has at least one entry, not {table_size}")
        fixed = self.table_size(count)
        if fixed not in (None, table_size):
            raise ConfigurationError(f"{self} needs a table of {fixed} entries, not {table_size}")

    def check_layers(self, shapes: Sequence[Sequence[int]], scope: str) -> None:
        """Raise a ConfigurationError where the hash does not fit weights of these shapes, in this order."""

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise a ConfigurationError where the hash is for weights of another shape."""

    def probabilities(self, count: int, table_size: int) -> Tensor | None:
        """Return how probable each entry is in the mean over identifiers, where that is known; float64."""
        return None

    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        """Return a form of a layer's algebra that needs neither index nor weight, where there is one.

        Args:
            shape: of the layer's weight.
            table_size: number of entries.
            first: identifier of the layer's first weight.
        """
        return None


@dataclass(frozen=True)
class IdentityHash(Hash):
    """Gives each weight an entry of its own: no sharing."""

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        return RepeatedRows(tuple(shape), table_size, first)

    @override
    def table_size(self, count: int) -> int:
        return count


@dataclass(frozen=True)
class ModulusHash(Hash):
    """Goes through the table again and again: ``i mod n``; the loads differ by one at most.

    A layer whose width and table have a common divisor repeats units: it has only ``n / gcd(in, n)`` of them.

    Example:
        >>> ModulusHash().index(count=5, table_size=3).tolist()
        [0, 1, 2, 0, 1]
    """

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids % table_size

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        return RepeatedRows(tuple(shape), table_size, first % table_size)

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        whole, rest = divmod(count, table_size)
        loads = torch.full((table_size,), float(whole), dtype=torch.float64)
        loads[:rest] += 1
        return loads / count


class SeededHash(Hash):
    """A hash that draws; a frozen dataclass, one of whose fields is the seed.

    Attributes:
        seed: any integer; equal seeds draw alike.
    """

    seed: int

    @override
    def seeded(self, salt: int) -> Self:
        salted: Self = replace(self, seed=self.seed ^ salt)  # type: ignore[type-var]  # subclasses are dataclasses
        return salted


@dataclass(frozen=True)
class UniformHash(SeededHash):
    """Draws each entry independently and uniformly.

    Args:
        seed: any integer; equal seeds draw alike.

    Example:
        >>> UniformHash(seed=0).index(count=6, table_size=4).tolist()
        [2, 1, 0, 1, 0, 0]
    """

    seed: int = 0

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return below(mix(ids, self.seed), table_size)

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return torch.full((table_size,), 1 / table_size, dtype=torch.float64)


@dataclass(frozen=True)
class DirichletHash(SeededHash):
    """Draws entries independently with probabilities p that are drawn once: ``p ~ Dir(α, …, α)``.

    Args:
        alpha: α > 0; small: few entries have most weights, large: all have alike.
        seed: any integer; equal seeds draw alike.

    Raises:
        ConfigurationError: α is not above 0, or not finite.

    Example:
        >>> DirichletHash(alpha=0.1, seed=1).index(count=8, table_size=4).unique().tolist()
        [1]
    """

    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConfigurationError(f"alpha must be above 0 and finite, not {self.alpha}")
        object.__setattr__(self, "alpha", float(self.alpha))  # 1 and 1.0 are one description

    @override
    def draw(self, table_size: int) -> Tensor:
        return cumulative(self.alpha, table_size, self.seed)

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        first = (self.draw(table_size) if drawn is None else drawn).to(ids.device)
        bits = (mix(ids, self.seed) - (1 << 31)).to(torch.int32)
        return torch.searchsorted(first, bits, right=True) - 1

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        first = self.draw(table_size).double()
        return torch.diff(first, append=first.new_tensor([2.0**31])) / 2.0**32


@dataclass(frozen=True)
class NeighborhoodHash(SeededHash):
    """Draws an entry near that of the modulus: ``(i + U{−r, …, r}) mod n``.

    Radius 0 is the modulus; from n / 2 on it is the uniform hash.

    Args:
        radius: r ≥ 0.
        seed: any integer; equal seeds draw alike.

    Raises:
        ConfigurationError: the radius is negative.
    """

    radius: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ConfigurationError(f"radius must be 0 or more, not {self.radius}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        if 2 * self.radius >= table_size:
            return below(mix(ids, self.seed), table_size)
        return (ids + below(mix(ids, self.seed), 2 * self.radius + 1) - self.radius) % table_size

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        if 2 * self.radius >= table_size:
            return UniformHash().probabilities(count, table_size)
        width = 2 * self.radius + 1
        loads = ModulusHash().probabilities(count, table_size)
        around = torch.cat([loads[table_size - self.radius :], loads, loads[: self.radius]])
        return around.unfold(0, width, 1).mean(dim=1)


@dataclass(frozen=True)
class XXHash(SeededHash):
    """Takes xxh32 of the identifier, modulo n: HashedNets, with ``sign=True`` of the layer.

    Args:
        seed: in [0, 2³²).

    Source: W. Chen, J. T. Wilson, S. Tyree, K. Q. Weinberger and Y. Chen, Compressing neural networks with the hashing
    trick, 2015.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ConfigurationError(f"the seed of xxh32 is in [0, 2^32), not {self.seed}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return xxh32(ids, self.seed) % table_size

    @override
    def sign(self, ids: Tensor) -> Tensor:
        return 1 - 2 * (xxh32(ids, self.seed ^ _SIGN) & 1)

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if count > 1 << 32:
            raise ConfigurationError(f"xxh32 takes identifiers below 2^32, and there are {count} weights")

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return UniformHash().probabilities(count, table_size)
