"""Compare running times on a machine that may be busy.

The sides take turns within a race, so that a drift of the machine's speed meets all of them; each keeps its best
time of the race; ratios are taken within races, and their median over races is reported with the extremes.

Only the clock is that of ``torch.utils.benchmark``, whose timers measure one side after the other: beside a program
that comes and goes, ratios of equal programs spread more (``python -m benchmarks speed fairness``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.utils.benchmark import timer

from benchmarks.report import table
from tying import compiled

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

    def row(self, side: str, *peers: str) -> list[str]:
        """Return a side's milliseconds, and its ratio to each peer, in words."""
        return [f"{1e3 * self.median(side):.1f}", *(self.told(side, peer) for peer in peers)]

    def table(
        self, peers: Mapping[str, str], columns: Mapping[str, Mapping[str, str]] | None = None, prefix: str = ""
    ) -> str:
        """Return all sides in a Markdown table: milliseconds, ratios to peers by heading, and further columns."""
        more = columns or {}
        rows = [
            [prefix + side, *self.row(side, *peers.values()), *(cells.get(side, "–") for cells in more.values())]
            for side in self.seconds
        ]
        return table(["side", "ms", *peers, *more], rows)


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
    """Return the seconds that one run takes, on a GPU until it has done what it was asked for."""
    start = timer()
    run()
    return timer() - start


def pairs(one: Step, other: Step, count: int) -> list[float]:
    """Return time of ``one`` over time of ``other``, measured side by side, in alternating order, ``count`` times."""
    one(), other()
    ratios = []
    for number in range(count):
        order = (one, other) if number % 2 else (other, one)
        seconds = {side: time_of(side) for side in order}
        ratios.append(seconds[one] / seconds[other])
    return ratios


def paired(make: Mapping[str, Callable[[], tuple[Step, Step]]], rounds: int, count: int) -> list[list[str]]:
    """Return rows of a table: for each name the milliseconds of a peer, the median ratio to it, and its 95 % interval.

    Args:
        make: returns, by name, what is measured and its peer; called anew in each round, since where tensors lie in
            memory makes a difference of its own.
        rounds: in which all names are measured in turn, lest a busy minute meet one of them.
        count: pairs of steps, side by side, in a round.
    """
    ratios: dict[str, list[float]] = {name: [] for name in make}
    seconds: dict[str, list[float]] = {name: [] for name in make}
    for _ in range(rounds):
        for name, made in make.items():
            step, peer = made()
            for _ in range(5):  # until memory has been asked for
                step(), peer()
            ratios[name] += pairs(step, peer, count)
            seconds[name].append(time_of(peer))
    rows = []
    for name, measured in ratios.items():
        median, (low, high) = statistics.median(measured), quantile_test(measured).confidence_interval()
        rows.append([name, f"{1e3 * statistics.median(seconds[name]):.1f}", f"{median:.3f}", f"{low:.3f}–{high:.3f}"])
    return rows


@contextmanager
def torch_alone() -> Iterator[None]:
    """Use no compiled loops."""
    with patch.object(compiled, "is_working", return_value=False):
        yield
