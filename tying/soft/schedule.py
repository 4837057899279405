"""Schedules of a strength over training."""

import math
from dataclasses import dataclass
from typing import Literal

from tying.errors import ConfigurationError, check_choice, check_range


@dataclass(frozen=True)
class Schedule:
    """A factor on a strength that changes from ``start`` to ``end`` over ``length`` steps or epochs, and stays there.

    ``Schedule(0.0, 1.0, 500)`` warms up over 500 steps; ``Schedule(1.0, 0.0, 20, "cosine", "epoch")`` fades out.

    Args:
        start: factor at the first step, ≥ 0.
        end: factor after ``length`` units, ≥ 0.
        length: the number of units that the change takes; 0 for a constant ``end``.
        shape: straight, or half a period of a cosine.
        unit: ``"step"`` counts the steps of each optimizer, ``"epoch"`` whole epochs.

    Raises:
        ConfigurationError: a factor is negative or not finite, the length is negative, or 0 where it is needed.

    Example:
        >>> [Schedule(0.0, 1.0, 4)(count) for count in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    start: float = 1.0
    end: float = 1.0
    length: int = 0
    shape: Literal["linear", "cosine"] = "linear"
    unit: Literal["step", "epoch"] = "step"

    def __call__(self, count: int) -> float:
        """Return the factor after ``count`` units."""
        progress = min(count / self.length, 1.0) if self.length else 1.0
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def __post_init__(self) -> None:
        check_range("a schedule's start", self.start, "[0, inf)")
        check_range("a schedule's end", self.end, "[0, inf)")
        check_choice("a schedule's shape", self.shape, ("linear", "cosine"))
        check_choice("a schedule's unit", self.unit, ("step", "epoch"))
        if self.length < 0 or (self.length == 0 and self.start != self.end):
            raise ConfigurationError(f"a schedule that changes needs a length of 1 or more {self.unit}s: {self}")
