"""What can be concluded from a few seeds: moments, intervals, probabilities."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from scipy.stats import norm as normal
from scipy.stats import t as student_t


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation: of one value, 0; where one is not finite, nan both.

    Example:
        >>> moments([1.0, 2.0, 3.0]), moments([1.0, float("inf")])
        ((2.0, 1.0), (nan, nan))
    """
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def probability_by_chance(correlation: float, count: int, seeds: int) -> float:
    """Return the probability of a mean rank correlation at least as large, in its direction, if there is no trend.

    Of up to eight values, over all orders that each seed's values could have. Of more, by the normal distribution of
    variance 1 / (count − 1) for each seed.

    Example:
        >>> [round(probability_by_chance(r, count, seeds), 4) for r, count, seeds in ((1.0, 3, 1), (1.0, 3, 3))]
        [0.1667, 0.0046]
    """
    if count > 8:
        return float(normal.sf(abs(correlation) * math.sqrt(seeds * (count - 1))))
    orders = np.array([*itertools.permutations(range(count))])
    single = np.bincount(((orders - np.arange(count)) ** 2).sum(axis=1)) / len(orders)
    together = functools.reduce(np.convolve, [single] * seeds)  # of sums of squared differences of ranks, over seeds
    means = 1 - 6 / (count * (count**2 - 1)) * np.arange(len(together)) / seeds
    return float(together[means >= abs(correlation) - 1e-9].sum())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t; of values that do not vary, nothing is known.

    Where one is not finite, both bounds are nan.

    Example:
        >>> [round(bound, 3) for bound in interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
        >>> interval([1.0, 1.0])
        (-inf, inf)
    """
    if len({*values}) < 2:
        return -math.inf, math.inf
    mean, deviation = moments(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean - half, mean + half
