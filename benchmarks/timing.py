"""Compare running times on a machine that may be busy.

The sides take turns within a race, so that a drift of the machine's speed meets all of them; each keeps its best
time of the race; ratios are taken within races, and their median over races is reported with the extremes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
                best[side] = min(best[side], _time(run))
        for side in sides:
            seconds[side].append(best[side])
    return Race(seconds)


def _time(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
