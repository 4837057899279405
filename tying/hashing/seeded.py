"""Hashes that draw: uniformly, unevenly, near the modulus, or as xxHash does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hashing.dirichlet import cumulative
from tying.hashing.hashes import SIGN, Hash, ModulusHash
from tying.hashing.mixing import below, mix, xxh32


class SeededHash(Hash):
    """A hash that draws; a frozen dataclass, one of whose fields is the seed.

    Attributes:
        seed: any integer; equal seeds draw alike.
    """

    seed: int

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if not isinstance(self.seed, int):
            raise ConfigurationError(f"seed must be an integer, not {self.seed!r}")

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
        return torch.full((table_size,), 1 / table_size, dtype=torch.float64, device="cpu")


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
class XXHash(UniformHash):
    """Takes xxh32 of the identifier, modulo n: HashedNets, with ``sign=True`` of the layer.

    Args:
        seed: in [0, 2³²).

    Source: W. Chen, J. T. Wilson, S. Tyree, K. Q. Weinberger and Y. Chen, Compressing neural networks with the hashing
    trick, 2015.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ConfigurationError(f"the seed of xxh32 is in [0, 2^32), not {self.seed}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return xxh32(ids, self.seed) % table_size

    probabilities = UniformHash.probabilities

    @override
    def sign(self, ids: Tensor) -> Tensor:
        return 1 - 2 * (xxh32(ids, self.seed ^ SIGN) & 1)

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if count > 1 << 32:
            raise ConfigurationError(f"xxh32 takes identifiers below 2^32, and there are {count} weights")
