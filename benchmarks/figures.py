"""Figures of a suite in a paper's layout.

A suite's file may say::

    plots:                     # a line for each value of `lines`, over an axis or a metric
      - {name: alpha, x: alpha, y: test/accuracy, lines: ratio, log: true}
      - {name: parameters, x: parameters, y: test/accuracy}  # a point for each setting
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.inference import moments
from tying.figures import LEGEND, line_style
from tying.files import save_figure

Row = Mapping[str, str]


@dataclass(frozen=True)
class Plot:
    """A picture of final results.

    Attributes:
        name: of the picture.
        x: an axis of the suite, a metric, or one of parameters, bytes, seconds / epoch, seconds of training, peak
            memory.
        y: a metric, or several.
        lines: an axis: a line for each of its values and each metric; ``"run"``: a point for each setting.
        log: whether x is logarithmic.
    """

    name: str
    x: str
    y: str | Sequence[str]
    lines: str = "run"
    log: bool = False


def lines_of(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Return the final rows of runs, by their value on an axis; those without it are left out."""
    found: dict[str, list[Row]] = {}
    for row in final(rows):
        if row.get(axis):
            found.setdefault(row[axis], []).append(row)
    return found


def final(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each run."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        last[row["run"], row["seed"]] = row
    return [*last.values()]


def draw(plot: Plot, rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: a point for each setting, of mean x and mean y over its seeds, with both standard deviations.

    Lines go through points in order of x, and no two of 40 look the same. With ``lines="run"`` each point bears its
    setting's name instead. Where a value is not finite, there is no point.
    """
    figure = Figure(figsize=(7, 5) if plot.lines == "run" else (5, 3.8), layout="constrained")
    axes = figure.subplots()
    metrics = [plot.y] if isinstance(plot.y, str) else plot.y
    names: list[tuple[str, float, float]] = []
    number = 0
    for (line, found), y in itertools.product(lines_of(rows, plot.lines).items(), metrics):
        points: dict[str, list[tuple[float, float]]] = {}  # by setting
        for row in found:
            if row.get(plot.x) and row.get(y):
                points.setdefault(row["run"], []).append((float(row[plot.x]), float(row[y])))
        settings = [[moments(values) for values in zip(*pairs, strict=True)] for pairs in points.values()]
        settings = sorted(setting for setting in settings if all(math.isfinite(mean) for mean, _ in setting))
        if not settings:
            continue
        (xs, x_spreads), (ys, y_spreads) = (zip(*side, strict=True) for side in zip(*settings, strict=True))
        label = (line if plot.lines == "run" else f"{plot.lines} {line}") + (f", {y}" if len(metrics) > 1 else "")
        across = x_spreads if any(x_spreads) else None
        axes.errorbar(xs, ys, xerr=across, yerr=y_spreads, label=label, capsize=2, **line_style(number))
        number += 1
        if plot.lines == "run":
            names.append((label, xs[0], ys[0]))
    if plot.log:
        every = {x for row in final(rows) if row.get(plot.x) and math.isfinite(x := float(row[plot.x]))}
        if 0 in every and len(every) > 1:
            axes.set_xscale("symlog", linthresh=min(every - {0}))
        else:
            axes.set_xscale("log")
    axes.set(xlabel=plot.x, ylabel=" and ".join(metrics))
    if plot.lines != "run" and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", **LEGEND)
    if names:
        _write_names(figure, axes, names)
    save_figure(figure, path)


def _write_names(figure: Figure, axes: Axes, names: Sequence[tuple[str, float, float]]) -> None:
    """Write a name beside each point, those of near points below or above each other."""
    axes.margins(x=0.2)
    figure.draw_without_rendering()  # only now it is known where points are
    line, letter = 9.0, 4.6  # height and width of letters, in pixels
    taken: list[tuple[float, float, float]] = []
    for name, x, y in sorted(names, key=lambda one: -one[2]):
        left, middle = axes.transData.transform((x, y))
        width = letter * len(name)
        shifts = (line * side * away for away in range(len(names)) for side in (1, -1))
        shift = next(
            by
            for by in shifts
            if not any(
                abs(middle + by - height) < line and left < end and begin < left + width for begin, end, height in taken
            )
        )
        taken.append((left, left + width, middle + shift))
        arrow = {"arrowstyle": "-", "lw": 0.3, "color": "gray"} if abs(shift) > line else None
        axes.annotate(
            name, (x, y), (5, shift), textcoords="offset pixels", fontsize="xx-small", va="center", arrowprops=arrow
        )
