"""The nearest matrices of low rank, with and without a diagonal, and least squares."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tying.torch_workarounds import has_values

FLOOR = 1e-6  # of the scale of an input, relative to the largest: one that is always zero has no say
ALTERNATIONS = 5  # of the steps
STEPS = 40  # at most, from each start; most weights take fewer than 20
STARTS = 16  # more of them, at most, where a start is only a guess


def factorize(weight: Tensor, rank: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the factors (n, d) and (d, m) of the nearest matrix of the given rank, by singular value decomposition.

    Each factor is scaled by the square roots of the singular values. For a singular value of zero, the column of the
    left factor is zero and the row of the right factor is random: if both were zero, neither would have a gradient.

    Args:
        weight: (n, m).
        rank: d.
        scale: factors of the entries whose squared errors are summed, (1, m) or (n, 1); default, and if all are 0: 1.

    Example:
        >>> left, right = factorize(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> (left @ right).abs()
        tensor([[4., 0.],
                [0., 0.]])
    """
    if scale is not None and scale.any():
        by = scale.double()
        by = by.clamp(min=FLOOR * float(by.amax()))
        left, right = factorize(weight.double() * by, rank)
        left, right = (left, right / by) if len(by) == 1 else (left / by, right)
        return left.to(weight.dtype), right.to(weight.dtype)
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
        (k, m), in single precision or better; not a view of torch's work space, which has n rows.
    """
    precise = torch.promote_types(targets.dtype, torch.float32)
    if targets.is_meta:  # torch has no least squares there
        return targets.new_empty(columns.shape[1], targets.shape[1], dtype=precise)
    solution: Tensor = torch.linalg.lstsq(columns.to(precise), targets.to(precise)).solution
    return solution.clone(memory_format=torch.contiguous_format)


def numerical_rank(singular_values: Tensor, shape: Sequence[int]) -> int:
    """Return the number of singular values of a matrix of this shape that exceed rounding errors."""
    if not singular_values.numel():
        return 0
    tolerance = singular_values.amax() * torch.finfo(singular_values.dtype).eps * max(shape)
    return int((singular_values > tolerance).sum())


def nearest_diagonal(matrix: Tensor, rank: int) -> Tensor:
    """Return a diagonal d for which ``matrix − diag(d)`` is near a matrix of the given rank.

    If such a d exists and ``2 rank < n``, the off-diagonal entries determine it, and the result is exact. (They do not
    if too many of them are zero, so that no large off-diagonal block has the rank.)
    Otherwise several d can be equally good, and this is the best that is found from a few starts. A weight of 512 × 512
    and rank 32 takes 0.15 s if d is exact, and 0.8 s if no d is, on one core.

    Args:
        matrix: (n, n).
        rank: from 0 to n.

    Returns:
        (n,), in double precision.

    Example:
        >>> u, v = torch.arange(1.0, 6), torch.tensor([1.0, -1, 1, -1, 1])
        >>> nearest_diagonal(torch.outer(u, v) + torch.diag(10 * u), rank=1).round(decimals=9)
        tensor([10., 20., 30., 40., 50.], dtype=torch.float64)
    """
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    if rank == 0 or not has_values(matrix):
        return torch.diag(precise)
    eps = max(torch.finfo(matrix.dtype).eps, len(matrix) * torch.finfo(precise.dtype).eps)
    exact = eps * float(precise.norm())
    generator = torch.Generator().manual_seed(0)  # loading a weight must not advance the global one
    best, diagonal = math.inf, torch.zeros_like(precise[0])
    for start in range(2 if 2 * rank < len(matrix) else 2 + min(STARTS, 2048 // len(matrix))):
        order = torch.randperm(len(matrix), generator=generator, device="cpu").to(matrix.device)
        # from zero, too: of a matrix that no diagonal makes one of the rank, a completed one is no better a start
        begin = torch.zeros_like(precise[0]) if start == 1 else _completed(precise, rank, order)
        error, candidate = _descend(precise, rank, begin, exact)
        if error < best:
            best, diagonal = error, candidate
        if best <= exact or rank == len(matrix):
            break
    return diagonal


def _completed(matrix: Tensor, rank: int, order: Tensor) -> Tensor:
    """Return the d for which ``matrix − diag(d)`` has a rank, computed from the off-diagonal entries.

    The indices fall into two halves, which share one if their number is odd. The block of rows in one half and columns
    outside it has no entry of the diagonal. Its singular vectors span the columns of the diagonal block B of that half;
    P projects on them. Q projects on the rows of B, from the block of columns in that half. The i-th entry of the
    diagonal of B minimises ``‖(1 − P) b‖² + ‖c (1 − Q)‖²`` for column b and row c of that entry.
    """
    diagonal = torch.diag(matrix).clone()
    half = (len(order) + 1) // 2
    for inside, outside in ((order[:half], order[half:]), (order[-half:], order[:-half])):
        block = matrix[inside][:, inside]
        beside = block - torch.diag(torch.diag(block))
        columns, rows = _span(matrix[inside][:, outside], rank), _span(matrix[outside][:, inside].mH, rank)
        predicted = torch.diag(columns @ beside + beside @ rows)
        free = 2 - torch.diag(columns).real - torch.diag(rows).real
        diagonal[inside] = torch.diag(block) - predicted / free.clamp(min=torch.finfo(free.dtype).eps)
    return diagonal


def _span(matrix: Tensor, rank: int) -> Tensor:
    """Return the projection on the first singular vectors of the columns of a matrix, fewer than its rows."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = u[:, : min(rank, numerical_rank(s, matrix.shape), max(0, len(matrix) - 1))]
    projection: Tensor = u @ u.mH
    return projection


def _descend(matrix: Tensor, rank: int, diagonal: Tensor, exact: float) -> tuple[float, Tensor]:
    """Lower ``f(d) = Σ_{k > rank} σ_k²`` of ``matrix − diag(d)`` by the Levenberg–Marquardt method; return √f and d.

    With U and V the singular vectors beyond the rank, a step δ changes what is left, R = U S Vᴴ, to first order by
    ``−UUᴴ diag(δ) VVᴴ``. Least squares give ``(UUᴴ ∘ (VVᴴ)ᵀ + λ) δ = diag(R)``: steps that converge quadratically where
    f reaches 0. The first steps are ``δ = diag(R)``, which alternates between the best factors and the best diagonal:
    it is slow, but ends in better minima.
    """
    damping, (error, u, s, v) = 1.0, _beyond(matrix - torch.diag(diagonal), rank)
    for step in range(STEPS):
        if error <= exact or damping > 1e4:
            break
        change = torch.diag((u * s) @ v)
        if step >= ALTERNATIONS:
            normal = (u @ u.mH) * (v.mH @ v).mT
            normal.diagonal().add_(damping)
            change = torch.linalg.solve(normal, change)
        candidate = diagonal + change
        after = _beyond(matrix - torch.diag(candidate), rank)
        if after[0] >= error:
            damping *= 4
            continue
        gain, diagonal, (error, u, s, v) = 1 - after[0] / error, candidate, after
        damping = max(damping / 3, 1e-12)
        if gain < 1e-6:
            break
    return error, diagonal


def _beyond(matrix: Tensor, rank: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return the error of the best approximation of a rank, and the remaining singular vectors and values."""
    u, s, v = torch.linalg.svd(matrix)
    return float(s[rank:].norm()), u[:, rank:], s[rank:], v[rank:]
