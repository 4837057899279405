"""Draws from a Dirichlet distribution, by hashes of counters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tying.hashing.mixing import mix

_TAG = 0x4449524943484C45  # sets these draws apart from those of slots


def cumulative(alpha: float, count: int, seed: int) -> Tensor:
    """Return where each entry's share of the 32-bit integers begins, for shares p ~ Dir(α, …, α).

    Args:
        alpha: α > 0.
        count: number of entries.
        seed: any integer.

    Returns:
        int32, (count,), not decreasing, from −2³¹.

    Example:
        >>> cumulative(1e9, 4, seed=0).float().div(2**30).round().tolist()
        [-2.0, -1.0, 0.0, 1.0]
    """
    shares = log_gammas(alpha, count, seed).softmax(dim=0)
    ends = (shares.cumsum(dim=0) * 2.0**32).round().long().clamp(max=(1 << 32) - 1)
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (first - (1 << 31)).to(torch.int32)


def log_gammas(alpha: float, count: int, seed: int) -> Tensor:
    """Return logarithms of independent Gamma(α) draws; float64, (count,).

    They are drawn as Gamma(α + 1) by rejection, and brought down by ``log(U) / α``: in logarithms, since for small α
    most draws are below the smallest number.

    Source: G. Marsaglia and W. W. Tsang, A simple method for generating gamma variables, 2000.
    """
    shift = alpha + 1 - 1 / 3  # d
    slope = 1 / math.sqrt(9 * shift)  # c
    drawn = torch.full((count,), math.nan, dtype=torch.float64, device="cpu")
    for attempt in range(64):
        todo = drawn.isnan().nonzero().flatten()
        if not len(todo):
            break
        first, second, third = (_uniform(todo, seed, 4 * attempt + part) for part in range(3))
        normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
        root = 1 + slope * normal
        cube = root.clamp(min=1e-12) ** 3
        accepted = (root > 0) & (third.log() < normal**2 / 2 + shift * (1 - cube + cube.log()))
        drawn[todo] = torch.where(accepted, (shift * cube).log(), math.nan)
    assert not drawn.isnan().any()
    return drawn + _uniform(torch.arange(count, device="cpu"), seed, 3).log() / alpha


def _uniform(ids: Tensor, seed: int, stream: int) -> Tensor:
    """Return numbers in (0, 1), 32 bits each."""
    return (mix(ids, (seed ^ _TAG) + (stream << 32)).double() + 0.5) / 2.0**32
