"""What can be concluded from a few seeds: moments, intervals, probabilities."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import norm as normal
from scipy.stats import spearmanr
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


def rank_correlation(points: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's rank correlation of pairs; 0 where one of both does not vary.

    Example:
        >>> round(rank_correlation([(0.1, 1.0), (1.0, 5.0), (10.0, 4.0)]), 3)
        0.5
    """
    xs, ys = zip(*points, strict=True)
    if min(len({*xs}), len({*ys})) < 2:
        return 0.0
    return float(spearmanr(xs, ys).statistic)


def probability_by_chance(correlation: float, count: int, seeds: int) -> float:
    """Return the probability of a mean rank correlation at least as large, in its direction, if there is no trend.

    Of up to eight values, exactly: over all orders that each seed's values could have. Of more, by the normal
    distribution of variance 1 / (count − 1) for each seed.

    Example:
        >>> [round(probability_by_chance(r, count, seeds), 4) for r, count, seeds in ((1.0, 3, 1), (1.0, 3, 3))]
        [0.1667, 0.0046]
    """
    if count > 8:
        return float(normal.sf(abs(correlation) * math.sqrt(seeds * (count - 1))))
    single = Counter(sum((a - b) ** 2 for a, b in enumerate(order)) for order in itertools.permutations(range(count)))
    together = Counter({0: 1})  # sums of squared differences of ranks, over seeds
    for _ in range(seeds):
        added: Counter[int] = Counter()
        for (one, ways), (other, more) in itertools.product(together.items(), single.items()):
            added[one + other] += ways * more
        together = added
    scale = 6 / (count * (count**2 - 1))
    means = {total: 1 - scale * total / seeds for total in together}
    extreme = sum(ways for total, ways in together.items() if means[total] >= abs(correlation) - 1e-9)
    return extreme / together.total()


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
