"""How the cost of ties grows with width, depth, the number of ties, and the ratio: slopes on logarithmic axes."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import nn

from benchmarks.report import table
from benchmarks.speed.soft import pairs_of_weights
from benchmarks.speed.timing import Step, passes, race, time_of, with_extremes
from tying import resolve
from tying.callbacks import ResidualMerging
from tying.depth import Swapout
from tying.figures import SMALL, WIDTH, new_figure
from tying.hard import tie, untie
from tying.hashing import HashedLinear, ModulusHash
from tying.models import ResNet
from tying.soft import TyingPenalty

RACES, ROUNDS = 5, 5
BATCH = 32
WIDTHS = (256, 512, 1024, 2048)
NUMBERS = (8, 16, 32, 64, 128)
DEPTHS = (8, 14, 26, 50)
RATIOS = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
PAIRS = (500, 1000, 2000, 4000, 8000, 10000)


@dataclass(frozen=True)
class Growth:
    """A cost, over what it is taken, and the exponent that one expects.

    Attributes:
        cost: in words.
        over: what grows.
        expected: slope on logarithmic axes.
        sizes: of what grows.
        build: returns what is timed, for a size.
    """

    cost: str
    over: str
    expected: float
    sizes: tuple[float, ...]
    build: Callable[[float], Step]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent of the power law that fits best, by least squares of logarithms.

    Example:
        >>> round(slope((1.0, 2.0, 4.0), [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def hashed(width: float, ratio: float, **how: Any) -> Step:
    """Return a pass through a hashed layer."""
    return passes(HashedLinear(int(width), int(width), table_ratio=ratio, **how), torch.randn(BATCH, int(width)))


def pull(pairs: float, width: float) -> Step:
    """Return the fused gradient of a soft tie of that many pairs of square weights."""
    penalty = TyingPenalty(resolve(pairs_of_weights(int(pairs), int(width)), ["a.{i} ~ b.{i}"]))
    return lambda: penalty.add_gradients_(1e-3)


def matching(ties: float) -> Step:
    """Return what finds that many ties in a model of as many pairs of parameters."""
    return partial(resolve, pairs_of_weights(int(ties), 1), ["a.{i} ~ b.{i}"])


def tied_layers(depth: float) -> Step:
    """Return a pass through linear layers of 256 units with one weight."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(int(depth))))
    tie(model, ["*.weight"])
    return passes(model, torch.randn(BATCH, 256))


def swapped(depth: float) -> Step:
    """Return a pass through a ResNet with swapout in each block."""
    model = ResNet(int(depth))
    ResidualMerging("layer*.*", Swapout(0.5, 0.5)).apply(model)
    return passes(model, torch.randn(BATCH, 3, 32, 32))


def growths() -> list[Growth]:
    """Return what is measured."""
    stored, modulus = {"index": "stored"}, {"hash": ModulusHash()}
    return [
        Growth("soft tie, gradient, 4 pairs", "width", 2, WIDTHS, lambda width: pull(4, width)),
        Growth("soft tie, gradient, 256 × 256", "number of ties", 1, NUMBERS, lambda count: pull(count, 256)),
        Growth("ties found by a pattern", "number of ties", 1, NUMBERS, matching),
        Growth("layers of one weight, pass", "number of layers", 1, NUMBERS, tied_layers),
        Growth("hashed layer at 1/16, pass", "width", 2, WIDTHS, lambda width: hashed(width, 1 / 16, **stored)),
        Growth("hashed layer of 1024, pass", "ratio", 0, RATIOS, lambda ratio: hashed(1024, ratio, **stored)),
        Growth("modulus layer of 1024, pass", "ratio", 1, RATIOS, lambda ratio: hashed(1024, ratio, **modulus)),
        Growth("ResNet with swapout, pass", "depth", 1, DEPTHS, swapped),
    ]


def tying_table() -> str:
    """Return a table of ``resolve`` and ``tie`` of pairs, their ratio, and the exponents with which they grow.

    Times are the best, taken in turns. The collector of garbage is off meanwhile, as in ``timeit``: when it runs
    depends on all that is in memory.
    """
    best = []
    for number in PAIRS:
        model, ties, times = pairs_of_weights(number, 1), ["a.{i} ~ b.{i}"], []
        for _ in range(ROUNDS):
            gc.collect()
            gc.disable()
            times.append([time_of(partial(does, model, ties)) for does in (resolve, tie)])
            gc.enable()
            untie(model)
        best.append([min(seconds) for seconds in zip(*times, strict=True)])
    rows = [
        [f"{n:,}", f"{1e3 * a:.3g}", f"{1e3 * b:.3g}", f"{b / a:.2f}"] for n, (a, b) in zip(PAIRS, best, strict=True)
    ]
    exponents = [f"{slope(PAIRS, seconds):.2f}" for seconds in zip(*best, strict=True)]
    return table(["pairs", "resolve, ms", "tie, ms", "ratio"], [*rows, ["exponent", *exponents, ""]])


def draw(growth: Growth, milliseconds: Sequence[float], measured: float, axes: Axes) -> None:
    """Draw a cost over what grows, and the power law that one expects, through the last point."""
    expected = milliseconds[-1] * (np.array(growth.sizes) / growth.sizes[-1]) ** growth.expected
    axes.loglog(growth.sizes, milliseconds, marker="o", label=f"measured, slope {measured:.2f}")
    axes.loglog(growth.sizes, expected, linestyle="--", color="gray", label=f"expected, slope {growth.expected:g}")
    axes.set_title(growth.cost, fontsize="small")
    axes.set_xlabel(growth.over, fontsize="small")
    axes.set_ylabel("milliseconds", fontsize="small")
    axes.tick_params(labelsize=SMALL)
    axes.set_xticks(growth.sizes, [f"{size:.3g}" for size in growth.sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="best", fontsize=SMALL)


def measure() -> tuple[str, Figure]:
    """Run all measurements; return their tables as Markdown, and a plot."""
    chosen = growths()
    rows, height = [], math.ceil(len(chosen) / 2)
    figure = new_figure(WIDTH, 2.3 * height, "Time against what makes it grow: measured, and the expected power law")
    panels = [*figure.subplots(height, 2).flat]
    for unused in panels[len(chosen) :]:
        unused.set_axis_off()
    for growth, axes in zip(chosen, panels, strict=False):
        result = race({str(size): growth.build(size) for size in growth.sizes}, races=RACES, rounds=ROUNDS)
        milliseconds = [1e3 * result.median(str(size)) for size in growth.sizes]
        slopes = [slope(growth.sizes, seconds) for seconds in zip(*result.seconds.values(), strict=True)]
        span = f"{growth.sizes[0]:.3g} to {growth.sizes[-1]:.3g}"
        times = f"{milliseconds[0]:.3g} to {milliseconds[-1]:.3g}"
        rows.append([growth.cost, growth.over, span, times, with_extremes(slopes), f"{growth.expected:g}"])
        draw(growth, milliseconds, statistics.median(slopes), axes)
    head = ["cost", "over", "from, to", "ms", "slope", "expected"]
    how = (
        f"Median of {RACES} races (extremes), batch {BATCH}; slopes of the best power law, and those that the work has."
    )
    ties = (
        f"Separate pairs, tied by one pattern; the best of {ROUNDS}, with the collector of garbage off, as in timeit:"
    )
    return f"{table(head, rows)}\n\n{how}\n\n{ties}\n\n{tying_table()}", figure
