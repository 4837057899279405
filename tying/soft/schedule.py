"""Schedules of the strength of a penalty."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tying.errors import ConfigurationError, check_choice, check_count, check_range
from tying.mappings import from_mapping


@dataclass(frozen=True)
class Schedule:
    """A factor on a strength that changes from ``start`` to ``end`` over ``length`` steps or epochs, and then stays.

    ``Schedule(0.0, 1.0, 500)`` increases the factor from 0 to 1 over 500 steps; ``Schedule(1.0, 0.0, 20, "cosine",
    "epoch")`` decreases it to 0 over 20 epochs.

    Args:
        start: factor at the first step, ≥ 0.
        end: factor after ``length`` units, ≥ 0.
        length: number of units from ``start`` to ``end``; 0 for the constant factor ``end``.
        shape: ``"linear"``, or ``"cosine"`` for half a period of a cosine.
        unit: ``"step"`` counts the steps of each optimizer, ``"epoch"`` counts epochs.

    Raises:
        ConfigurationError: a factor is negative or infinite, the length is negative, or the length is 0 and the factors
            differ.

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
        if count >= self.length:
            return self.end
        progress = count / self.length
        share = (1 - math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else progress
        return self.start + (self.end - self.start) * share

    def count(self, step: int, epoch: int) -> int:
        """Return the number of units after which the factor is taken, given the numbers of steps and epochs so far."""
        return step if self.unit == "step" else epoch

    def __post_init__(self) -> None:
        check_range("a schedule's start", self.start, "[0, inf)")
        check_range("a schedule's end", self.end, "[0, inf)")
        check_choice("a schedule's shape", self.shape, ("linear", "cosine"))
        check_choice("a schedule's unit", self.unit, ("step", "epoch"))
        check_count("a schedule's length", self.length, "[0, inf)")
        if self.length == 0 and self.start != self.end:
            raise ConfigurationError(f"a schedule that changes needs a length of 1 or more {self.unit}s: {self}")


def parse_schedule(value: Any, alternatives: str = "", argument: str = "schedule") -> Schedule | None:
    """Return a schedule that may be given as a mapping of its arguments; None if there is none.

    Args:
        value: the schedule, a mapping, or None.
        alternatives: what the argument may be instead, for the error message.
        argument: name of the argument, for the error message.

    Raises:
        ConfigurationError: it is neither a schedule nor such a mapping.
    """
    schedule = from_mapping(value, Schedule, argument)
    if schedule is None or isinstance(schedule, Schedule):
        return schedule
    raise ConfigurationError(
        f"{argument} must be a tying.soft.Schedule, or a mapping of its arguments{alternatives}, not {value!r}"
    )
