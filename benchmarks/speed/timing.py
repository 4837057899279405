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
from torch import Tensor, nn

Step = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """Seconds of each side, one per race."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Return the median over races of a side's time, in seconds."""
        return statistics.median(self.seconds[side])

    def ratios(self, side: str, peer: str) -> list[float]:
        """Return time of ``side`` over time of ``peer``, race by race."""
        return [a / b for a, b in zip(self.seconds[side], self.seconds[peer], strict=True)]

    def told(self, side: str, peer: str) -> str:
        """Return the median ratio and, in brackets, the smallest and the largest."""
        return with_extremes(self.ratios(side, peer))


def race(
    sides: Mapping[str, Step],
    races: int = 7,
    rounds: int = 10,
    keep: Callable[[Sequence[float]], float] = min,
) -> Race:
    """Time each side ``races × rounds`` times, in turns, and keep one of its times of each race: by default, the best.

    Example:
        >>> result = race({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, races=3)
        >>> result.median("short") < result.median("long")
        True
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(races):
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, run in sides.items():
                times[side].append(time_of(run))
        for side in sides:
            seconds[side].append(keep(times[side]))
    return Race(seconds)


def with_extremes(values: Sequence[float]) -> str:
    """Return the median and, in brackets, the smallest and the largest.

    Example:
        >>> with_extremes([3.0, 1.0, 2.0])
        '2.00 (1.00–3.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def passes(model: nn.Module, x: Tensor) -> Step:
    """Return a forward and backward pass of a network: to its weights and, where they want gradients, its inputs."""

    def run() -> None:
        x.grad = None
        model.zero_grad()
        outputs = model(x)
        if isinstance(outputs, tuple):  # of a recurrent network: its outputs and its last state
            outputs, _ = outputs
        outputs.sum().backward()

    return run


def time_of(run: Step) -> float:
    """Return the seconds that one run takes."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pairs(one: Step, other: Step, count: int) -> list[float]:
    """Return time of ``one`` over time of ``other``, measured side by side, in alternating order, ``count`` times."""
    one(), other()
    ratios = []
    for number in range(count):
        order = (one, other) if number % 2 else (other, one)
        seconds = {side: time_of(side) for side in order}
        ratios.append(seconds[one] / seconds[other])
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
