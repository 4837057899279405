"""Compare running times on a machine that may be busy.

The sides take turns within a race, so that a drift of the machine's speed meets all of them; each keeps its best
time of the race; ratios are taken within races, and their median over races is reported with the extremes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Race:
    """Best seconds of each side, one per race."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Return the median over races of a side's best time, in seconds."""
        return statistics.median(self.seconds[side])

    def ratios(self, side: str, peer: str) -> list[float]:
        """Return time of ``side`` over time of ``peer``, race by race."""
        return [a / b for a, b in zip(self.seconds[side], self.seconds[peer], strict=True)]

    def told(self, side: str, peer: str) -> str:
        """Return the median ratio and, in brackets, the smallest and the largest."""
        ratios = self.ratios(side, peer)
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def race(sides: Mapping[str, Callable[[], object]], races: int = 7, rounds: int = 10) -> Race:
    """Time each side ``races × rounds`` times, in turns.

    Example:
        >>> result = race({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, races=3)
        >>> result.median("short") < result.median("long")
        True
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(races):
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(rounds):
            for side, run in sides.items():
                best[side] = min(best[side], time_of(run))
        for side in sides:
            seconds[side].append(best[side])
    return Race(seconds)


def time_of(run: Callable[[], object]) -> float:
    """Return the seconds that one run takes."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pairs(one: Callable[[], object], other: Callable[[], object], count: int = 200) -> list[float]:
    """Return time of ``one`` over time of ``other``, measured side by side, in alternating order, ``count`` times."""
    one(), other()
    ratios = []
    for number in range(count):
        if number % 2:
            first = time_of(one)
            ratios.append(first / time_of(other))
        else:
            second = time_of(other)
            ratios.append(time_of(one) / second)
    return ratios


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its 95 % interval, by order statistics.

    Example:
        >>> median_interval([float(number) for number in range(1, 101)])
        (50.5, 40.0, 61.0)
    """
    ordered, count = sorted(values), len(values)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - reach), math.ceil(1 + count / 2 + reach)  # ranks, from 1
    return statistics.median(ordered), ordered[max(low, 1) - 1], ordered[min(high, count) - 1]
