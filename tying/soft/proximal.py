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
    if not rate_a:
        return [a, a - difference]
    moved = a - rate_a / (rate_a + rate_b) * (a - b - difference) if rate_b else b + difference
    return [moved, moved - difference if rate_b else b]


def prox_sorted(w: Tensor, step: float) -> Tensor:
    """Return ``argmin_v ½‖v − w‖² + t Σ_{i<j} |v_i − v_j|`` along the last dimension, where w is sorted.

    Sorted values keep their order, so the penalty is linear in them: its step shifts w_k by ``−t (2k − p − 1)``, and
    isotonic regression makes the result monotone again: ``v_k = max_{a≤k} min_{b≥k} mean(shifted w_a..w_b)``.

    Source: R. E. Barlow, D. J. Bartholomew, J. M. Bremner and H. D. Brunk, Statistical inference under order
    restrictions, 1972.
    """
    p = w.shape[-1]
    base = w[..., :1]  # means are taken relative to the smallest, so that equal values stay exactly as they are
    if math.isinf(step):
        return base + (w - base).mean(dim=-1, keepdim=True).expand_as(w)
    v = torch.full_like(w, -math.inf)
    for a in range(1, p + 1):
        b = torch.arange(a, p + 1, dtype=w.dtype, device=w.device)
        means = (w[..., a - 1 :] - base).cumsum(dim=-1) / (b - a + 1) - step * (a + b - p - 1)
        smallest_beyond = means.flip(-1).cummin(dim=-1).values.flip(-1)
        v[..., a - 1 :] = torch.maximum(v[..., a - 1 :], smallest_beyond)
    return base + v


def prox_to_constants(z: Tensor, constants: list[Tensor], step: float) -> Tensor:
    """Return ``argmin_v ½ (v − z)² + t Σ_l |v − f_l|``: the median of the f_l and of ``z + t (k − 2j)``, j = 0..k."""
    k = len(constants)
    if not k:
        return z
    shifts = [step * (k - 2 * j) if k != 2 * j else 0.0 for j in range(k + 1)]
    candidates = [f.unsqueeze(-1).expand_as(z) for f in constants] + [z + shift for shift in shifts]
    return torch.stack(candidates).median(dim=0).values
