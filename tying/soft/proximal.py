"""Proximal steps of one entry at a time, vectorised over all entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def prox_pair(tensors: Sequence[Tensor], difference: Tensor, rates: Sequence[float]) -> list[Tensor]:
    """Move two tensors, in proportion to their rates, until they differ by ``difference``."""
    (a, b), (rate_a, rate_b) = tensors, rates
    if not rate_a + rate_b:
        return [a, b]
    excess = (a - b - difference) / (rate_a + rate_b)
    return [a - rate_a * excess if rate_a else a, b + rate_b * excess if rate_b else b]


def isotonic(z: Tensor) -> Tensor:
    """Return the nearest non-decreasing values along the last dimension: ``v_k = max_{a≤k} min_{b≥k} mean(z_a..z_b)``.

    Source: R. E. Barlow, D. J. Bartholomew, J. M. Bremner and H. D. Brunk, Statistical inference under order
    restrictions, 1972.
    """
    p = z.shape[-1]
    v = torch.full_like(z, -math.inf)
    for a in range(p):
        count = torch.arange(1, p - a + 1, dtype=z.dtype, device=z.device)
        means = z[..., a:].cumsum(dim=-1) / count
        smallest_beyond = means.flip(-1).cummin(dim=-1).values.flip(-1)
        v[..., a:] = torch.maximum(v[..., a:], smallest_beyond)
    return v


def prox_to_constants(z: Tensor, constants: list[Tensor], step: float) -> Tensor:
    """Return ``argmin_v ½ (v − z)² + t Σ_l |v − f_l|``: the median of the f_l and of ``z + t (k − 2j)``, j = 0..k."""
    k = len(constants)
    if not k:
        return z
    shifts = [step * (k - 2 * j) if k != 2 * j else 0.0 for j in range(k + 1)]
    candidates = [f.unsqueeze(-1).expand_as(z) for f in constants] + [z + shift for shift in shifts]
    return torch.stack(candidates).median(dim=0).values
