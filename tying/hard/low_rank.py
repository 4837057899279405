"""Weights of low rank, optionally plus a diagonal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.errors import ConfigurationError, check_range
from tying.weights.derived import parametrize_all

SWEEPS = 50  # alternations between factors and diagonal when a weight is assigned


def low_rank(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``.

    Args:
        left: (n, d).
        right: (d, m).
    """
    return left @ right


def low_rank_plus_diagonal(left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """Return ``left @ right + diag(diagonal)``.

    Args:
        left: (n, d).
        right: (d, n).
        diagonal: (n,).
    """
    return left @ right + torch.diag(diagonal)


def factorize(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (n, d) and (d, m) of the nearest matrix of the given rank, by singular value decomposition.

    Each factor is scaled by the square roots of the singular values. For a singular value of zero, the column of the
    left factor is zero and the row of the right factor is random: if both were zero, neither would have a gradient.

    Example:
        >>> left, right = factorize(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> (left @ right).abs()
        tensor([[4., 0.],
                [0., 0.]])
    """
    u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    dead = (s <= s.amax() * torch.finfo(s.dtype).eps * max(weight.shape))[:rank]
    root = s[:rank].sqrt()
    # a separate generator: loading a weight must not advance the global one
    new = torch.randn(v[:rank].shape, generator=torch.Generator().manual_seed(0), dtype=s.dtype, device="cpu").to(s)
    right = torch.where(dead[:, None], new * weight.shape[1] ** -0.5, root[:, None] * v[:rank])
    factors = u[:, :rank] * root.masked_fill(dead, 0), right
    return factors[0].to(weight.dtype).contiguous(), factors[1].to(weight.dtype).contiguous()


def least_squares(columns: Tensor, targets: Tensor) -> Tensor:
    """Return the linear combinations of columns that are nearest to targets, by least squares.

    Args:
        columns: (n, k).
        targets: (n, m).

    Returns:
        (k, m), in single precision or better.
    """
    precise = torch.promote_types(targets.dtype, torch.float32)
    if targets.is_meta:  # torch has no least squares there
        return targets.new_empty(columns.shape[1], targets.shape[1], dtype=precise)
    solution: Tensor = torch.linalg.lstsq(columns.to(precise), targets.to(precise)).solution
    return solution


class _OfRank(nn.Module):
    least = 0

    def __init__(self, rank: int) -> None:
        super().__init__()
        check_range("rank", rank, f"[{self.least}, inf)")
        self.rank = rank

    @override
    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def describe(self) -> str:
        """Describe the weight for a report."""
        return f"of rank {self.rank}"


class LowRank(_OfRank):
    """The parametrization ``W = P Q`` with P (n, d) and Q (d, m); see :func:`low_rank`.

    A weight of more than two dimensions is flattened to a matrix from its second dimension on. Assigning a weight
    stores the nearest weight of this rank.

    Args:
        rank: d.

    Raises:
        ConfigurationError: the rank is more than the weight's smaller side.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = register_parametrization(nn.Linear(6, 4), "weight", LowRank(2))
        >>> sum(p.numel() for p in layer.parameters()), int(torch.linalg.matrix_rank(layer.weight))
        (24, 2)
    """

    least = 1
    shape: tuple[int, ...] | None = None  # of the assigned weight

    @override
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        weight = low_rank(left, right)
        return weight if self.shape is None else weight.view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of the nearest weight of this rank."""
        matrix = _as_matrix(weight, self.rank)
        if self.shape not in (None, tuple(weight.shape)):
            raise ConfigurationError(f"a weight of shape {self.shape} cannot become one of {tuple(weight.shape)}")
        self.shape = tuple(weight.shape)
        return factorize(matrix, self.rank)


class LowRankPlusDiagonal(_OfRank):
    """The parametrization ``W = P Q + diag(s)`` of a square weight; see :func:`low_rank_plus_diagonal`.

    Assigning a weight alternates between the best factors and the best diagonal.

    Args:
        rank: d; 0 for the diagonal alone.

    Raises:
        ConfigurationError: the weight is not square, or the rank is more than its side.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = register_parametrization(nn.Linear(5, 5, bias=False), "weight", LowRankPlusDiagonal(1))
        >>> sum(p.numel() for p in layer.parameters())
        15

    Source: A. V. Miceli Barone, Low-rank passthrough neural networks, 2016.
    """

    @override
    def forward(self, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank_plus_diagonal(left, right, diagonal)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors and diagonal whose weight is near the given one."""
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
            raise ConfigurationError(f"low rank plus a diagonal needs a square weight, not {tuple(weight.shape)}")
        _as_matrix(weight, self.rank)  # raises if the rank is too high
        diagonal = weight.new_zeros(len(weight))
        for _ in range(1 + SWEEPS if self.rank else 1):
            left, right = factorize(weight - torch.diag(diagonal), self.rank)
            diagonal = torch.diag(weight - left @ right)
        return left, right, diagonal.clone()


def lower_rank(model: nn.Module, parameters: Sequence[str], rank: int, diagonal: bool = False) -> list[str]:
    """Parametrize weights of a model by low rank, starting at the nearest weight of that rank; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        rank: rank of each weight.
        diagonal: add a diagonal; for square weights.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight cannot have that rank. The model is not changed.

    Example:
        >>> lower_rank(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["1.weight"], rank=2)
        ['1.weight']
    """
    kind = LowRankPlusDiagonal if diagonal else LowRank
    return parametrize_all(model, parameters, lambda name, weight: kind(rank), "lower_rank")


def _as_matrix(weight: Tensor, rank: int) -> Tensor:
    if weight.ndim < 2:
        raise ConfigurationError(f"a weight of shape {tuple(weight.shape)} has no rank to lower")
    matrix = weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))
    if rank > min(matrix.shape):
        raise ConfigurationError(
            f"rank={rank} is more than {min(matrix.shape)}, the smaller side of a weight of shape {tuple(weight.shape)}"
        )
    return matrix
