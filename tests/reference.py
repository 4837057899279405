"""Slow, obvious loops that the library is compared with."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor


def pairwise(tensors: list[Tensor], rho) -> Tensor:
    """Ω = Σ_{i<j} ρ(w_i − w_j), entry by entry."""
    total = torch.zeros((), dtype=tensors[0].dtype)
    for a, b in combinations(tensors, 2):
        for x, y in zip(a.flatten(), b.flatten(), strict=True):
            total = total + rho(x - y)
    return total


def rho_l2(d):
    return d * d / 2


def rho_l1(d):
    return abs(d)


def rho_huber(delta: float):
    return lambda d: d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)


def prox_by_search(w: list[float], rates: list[float], strength: float, rho, sweeps: int = 60) -> list[float]:
    """argmin_v Σ (v_i − w_i)² / (2 r_i) + s Ω(v) for scalars, by subgradient-free nested ternary search.

    The objective is strictly convex. Coordinates can lock together under L1, so whole-block moves are tried as well.
    """
    moving = [i for i, rate in enumerate(rates) if rate > 0]
    v = list(w)

    def objective(values: list[float]) -> float:
        fit = sum((values[i] - w[i]) ** 2 / (2 * rates[i]) for i in moving)
        return fit + strength * sum(rho(values[i] - values[j]) for i, j in combinations(range(len(w)), 2))

    blocks = [list(block) for size in range(1, len(moving) + 1) for block in combinations(moving, size)]
    span = max(w) - min(w) + 1.0
    for _ in range(sweeps):
        for block in blocks:
            low, high = -span, span
            for _ in range(100):
                left, right = low + (high - low) / 3, high - (high - low) / 3

                def moved(shift: float, block: list[int] = block, v: list[float] = v) -> list[float]:
                    return [value + shift if i in block else value for i, value in enumerate(v)]

                if objective(moved(left)) < objective(moved(right)):
                    high = right
                else:
                    low = left
            shift = (low + high) / 2
            if objective(moved(shift)) < objective(v):
                v = moved(shift)
    assert all(math.isfinite(value) for value in v)
    return v
