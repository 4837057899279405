"""Figures of a suite's results: metrics over epochs, final results, and what the suite's file asks for.

A suite's file may say::

    plots:                     # a line for each value of `lines`, over an axis or a metric
      - {name: alpha, x: alpha, y: test/accuracy, lines: ratio, log: true, label: "α of the hash"}
      - {name: parameters, x: parameters, y: test/accuracy}  # a point for each setting
      - name: bytes            # the settings of families, the first of which is drawn as a line
        x: bytes
        y: test/accuracy
        families: {plain networks: [untied, narrow], hard tying: [shared]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from pandas import DataFrame

from benchmarks.labels import name_points
from benchmarks.quantities import QUANTITIES, in_common, quantity
from benchmarks.rows import final, lines_of, means_by_run, numbers
from tying.figures import SMALL, WIDTH, legend_below, line_style, new_figure
from tying.files import save_figure

FEW = 6  # settings whose curves a reader can follow
PANELS = 2  # that fit beside each other
TICKS = 8  # values of an axis that are written out


@dataclass(frozen=True)
class Plot:
    """A picture of final results.

    Attributes:
        name: of the picture.
        x: an axis of the suite, a metric, or one of parameters, bytes, seconds / epoch, seconds of training,
            processor seconds of training (of all threads; other programs on the machine hardly change them), peak
            memory, loss gap (test loss − training loss of the last epoch).
        y: a metric, or several.
        lines: an axis: a line for each of its values and each metric; ``"run"``: a point for each setting.
        log: whether x is logarithmic.
        label: x in words; by default, those of :func:`benchmarks.quantities.quantity`.
        families: with ``lines: run``, the settings to show by the name of their family: the first family as a line,
            the others as points with one marker each. By default all settings, each with its own.
    """

    name: str
    x: str
    y: str | Sequence[str]
    lines: str = "run"
    log: bool = False
    label: str = ""
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """All y."""
        return [self.y] if isinstance(self.y, str) else [*self.y]

    @property
    def title(self) -> str:
        """What is to be seen, in words."""
        x = self.label.partition(":")[0] or quantity(self.x).name
        if self.lines != "run":
            shown = f"a line for each value of {self.lines}"
        elif self.families:
            first, *others = self.families
            shown = f"{first} as a line, {', '.join(others)} as points"
        else:
            shown = "a point for each setting"
        return f"{_upper(in_common(self.metrics).name)} against {x}: {shown}"


def draw(plot: Plot, rows: DataFrame, path: Path) -> None:
    """Write a PNG: a point for each setting, of mean x and mean y over its seeds, with both standard deviations.

    Lines go through points in order of x, and no two of 40 look the same without color. With ``lines="run"`` each point
    bears its setting's name. Where a value is not finite, there is no point.
    """
    by_run = plot.lines == "run"
    figure = new_figure(WIDTH, 4.6 if by_run else 3.6, plot.title)
    axes = figure.subplots()
    bars = {}
    shown = []
    for number, (name, points) in enumerate(_series(plot, rows)):
        if points.empty:
            continue
        shown.append(points)
        style = line_style(number)
        if by_run and (number or not plot.families):
            style["linestyle"] = "none"
        across = points["x_std"] if points["x_std"].any() else None
        bars[name] = axes.errorbar(points["x"], points["y"], points["y_std"], across, label=name, capsize=2, **style)
    every = pd.concat(shown) if shown else DataFrame(columns=["x", "y"])
    _scale(axes, plot, sorted({*every["x"]}))
    axes.set(xlabel=plot.label or quantity(plot.x).label, ylabel=in_common(plot.metrics).label)
    if bars and (plot.families or not by_run):
        legend_below(figure, [*bars.values()], [*bars])
    if by_run:
        axes.margins(x=0.12, y=0.08)
        name_points(figure, axes, [*zip(every.index, every["x"], every["y"], strict=True)])
    save_figure(figure, path)


def _series(plot: Plot, rows: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """Yield the name and the points of each line, family or setting."""
    for metric in plot.metrics:
        suffix = f", {quantity(metric).name}" if len(plot.metrics) > 1 else ""
        lines = dict(lines_of(rows, plot.lines))
        if plot.lines != "run":
            for value, runs in lines.items():
                yield f"{plot.lines} {value}{suffix}", _points(plot.x, metric, runs)
            continue
        for family, settings in (plot.families or {setting: [setting] for setting in lines}).items():
            runs = pd.concat([rows[:0], *(lines[setting] for setting in settings if setting in lines)])
            yield f"{family}{suffix}", _points(plot.x, metric, runs)


def _points(x: str, y: str, rows: DataFrame) -> DataFrame:
    """Return mean and spread of x and y for each setting that has both, in order of x."""
    points = means_by_run(rows, x, y).dropna()
    points.columns = pd.Index(["x", "x_std", "y", "y_std"])
    return points.sort_values(["x", "y"])


def _scale(axes: Axes, plot: Plot, values: Sequence[float]) -> None:
    """Set the scale of x and what its ticks say: the values of an axis, multiples of 1024 bytes, or thousands."""
    if plot.log and len(values) > 1 and 0 in values:
        axes.set_xscale("symlog", linthresh=values[1])
    elif plot.log:
        axes.set_xscale("log", base=2 if plot.x == "bytes" else 10)
    if plot.x == "bytes":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1024:,.4g}"))
    elif plot.x == "parameters":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    elif plot.log and plot.x not in QUANTITIES and len(values) <= TICKS:
        axes.set_xticks(values, [f"{value:,.10g}" for value in values])
    if plot.log:
        axes.xaxis.set_minor_locator(NullLocator())


def draw_overview(rows: DataFrame, curves: Sequence[str], figures: Sequence[str], path: Path, x: str = "epoch") -> None:
    """Write a PNG of all settings: curves over epochs or, where these would be too many lines, final figures."""
    if rows["run"].nunique() <= FEW and len(rows) > len(final(rows)):
        draw_curves(rows, curves, path, x)
    else:
        draw_outcomes(rows, figures, path)


def draw_curves(rows: DataFrame, metrics: Sequence[str], path: Path, x: str = "epoch") -> None:
    """Write a PNG with a panel for each metric: over epochs, a line for each setting, the mean over its seeds."""
    settings = [*map(str, rows["run"].unique())]
    figure = new_figure(WIDTH, 3.2, f"{_upper(in_common(metrics).name)} of each setting by {x}")
    lines = {}
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for setting, runs in numbers(rows, metric, x).groupby("run", sort=False):
            means = runs.groupby(x)[metric].mean().replace(np.inf, np.nan)
            [lines[str(setting)]] = axes.plot(means, **line_style(settings.index(str(setting))))
        _label(axes, metric, "y", titled=len(metrics) > 1)
        axes.set_xlabel(quantity(x).label, fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend_below(figure, [*lines.values()], [*map(spaced, lines)])
    save_figure(figure, path)


def draw_outcomes(rows: DataFrame, metrics: Sequence[str], path: Path) -> None:
    """Write a PNG with a panel for each of the first metrics: for each setting the mean over its seeds.

    Bars are standard deviations. A dashed line goes through the first setting, the baseline, unless it is one value of
    an axis.
    """
    last = final(rows)
    settings = [*map(str, last["run"].unique())]
    shown = [metric for metric in metrics if 2 * numbers(last, metric)["run"].nunique() >= len(settings)][:PANELS]
    figure = new_figure(
        WIDTH, 0.9 + 0.19 * len(settings), f"{_upper(in_common(shown).name)} of each setting after training"
    )
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False, sharey=True)[0]
    panels[0].set_yticks(range(len(settings)), [*map(spaced, settings)], fontsize=SMALL)
    panels[0].set_ylim(len(settings) - 0.5, -0.5)
    for axes, metric in zip(panels, shown, strict=False):
        for setting, mean, deviation in means_by_run(last, metric).dropna().itertuples(name=None):
            height = settings.index(setting)
            axes.errorbar(mean, height, xerr=deviation, color="C0", marker="o", markersize=4, capsize=2)
            if height == 0 and "=" not in setting:
                axes.axvline(mean, color="0.5", linestyle="--", linewidth=0.8, zorder=0)
        _label(axes, metric, "x", titled=len(shown) > 1)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    save_figure(figure, path)


def _label(axes: Axes, metric: str, side: str, titled: bool) -> None:
    """Name an axis, and the panel where there are several."""
    words = quantity(metric)
    if titled:
        axes.set_title(_upper(words.name), fontsize="small")
    text = words.unit or words.name if titled else words.label
    if side == "x":
        axes.set_xlabel(text, fontsize="small")
    else:
        axes.set_ylabel(text, fontsize="small")
    axes.tick_params(labelsize="small")


def spaced(setting: str) -> str:
    """Return a setting with spaces between its parts."""
    return re.sub(r",(?! )", ", ", setting)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
