"""Figures of a suite in a paper's layout, and what becomes of the paper's trends.

A suite's file may say both::

    plots:                     # a line for each value of `lines`, over an axis or a metric
      - {name: alpha, x: alpha, y: test/accuracy, lines: ratio, log: true}
    trends:                    # a claim on how y goes with an axis, for each value of `lines`
      - {claim: accuracy rises with alpha, x: alpha, y: test/accuracy, lines: ratio, sign: 1, confounded: "..."}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from benchmarks.report import table
from tying.atomic import atomically

Row = Mapping[str, str]


@dataclass(frozen=True)
class Plot:
    """A picture of final results.

    Attributes:
        name: of the picture.
        x: an axis of the suite, or a metric.
        y: a metric.
        lines: an axis: a line for each of its values.
        log: whether x is logarithmic.
    """

    name: str
    x: str
    y: str
    lines: str
    log: bool = False


@dataclass(frozen=True)
class Trend:
    """A claim: along an axis a metric rises (sign 1) or falls (−1), on every line.

    What decides is the rank correlation of both over all values of the axis, seed by seed, and the 95 % interval of
    its mean over seeds: unlike the change from the first to the last value, it is not ruled by the spread at one end.

    Attributes:
        claim: in words.
        x: an axis of the suite.
        y: a metric.
        lines: an axis.
        sign: 1 or −1.
        confounded: why the trend, if it is there, may have another cause.
    """

    claim: str
    x: str
    y: str
    lines: str
    sign: int
    confounded: str = ""

    def judge(self, rows: Sequence[Row]) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's rows: for each line the change, the rank correlation and what it says.

        With one seed, nothing can be said.
        """
        told = []
        agreeing = []
        for line, points in lines_of(rows, self.lines).items():
            seeds: dict[str, list[tuple[float, float]]] = {}
            for row in points:
                if row.get(self.y):
                    seeds.setdefault(row["seed"], []).append((float(row[self.x]), float(row[self.y])))
            whole = [sorted(own) for own in seeds.values() if len(own) == max(map(len, seeds.values())) > 1]
            changes = [own[-1][1] - own[0][1] for own in whole]
            correlations = [rank_correlation(own) for own in whole]
            low, high = interval(correlations)
            agrees = low > 0 if self.sign > 0 else high < 0
            agreeing.append(agrees)
            against = high < 0 if self.sign > 0 else low > 0
            says = "as claimed" if agrees else "the opposite" if against else "undecided"
            change = f"{fmean(changes):+.4f}" if changes else "–"
            correlation = f"{fmean(correlations):+.3f}" if correlations else "–"
            within = f"{max(low, -1):+.3f} to {min(high, 1):+.3f}" if len(correlations) > 1 else "–"
            told.append([f"{self.lines} {line}", str(len(changes)), change, correlation, within, says])
        if not any(int(line[1]) > 1 for line in told):
            return f"{self.claim}: undecided, for want of seeds.", told
        verdict = "reproduced" if all(agreeing) else "not reproduced"
        if 0 < sum(agreeing) < len(agreeing):
            verdict += f" (on {sum(agreeing)} of {len(agreeing)} lines)"
        if self.confounded and any(agreeing):
            verdict += f", and confounded: {self.confounded}"
        return f"{self.claim}: {verdict}.", told


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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t.

    Example:
        >>> [round(bound, 3) for bound in interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


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


def verdicts(trends: Sequence[Trend], rows: Sequence[Row]) -> str:
    """Return what becomes of claims, as Markdown."""
    parts = []
    for trend in trends:
        verdict, told = trend.judge(rows)
        head = ["line", "n", "change from first to last", "rank correlation", "95 % interval", "says"]
        parts += [f"Claim: {verdict}", "", table(head, told), ""]
    return "\n".join(parts)


def draw(plot: Plot, rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: over an axis, means with standard deviations; over a metric, a point for each run."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for line, found in lines_of(rows, plot.lines).items():
        points: dict[float, list[float]] = {}
        for row in found:
            if row.get(plot.x) and row.get(plot.y):
                points.setdefault(float(row[plot.x]), []).append(float(row[plot.y]))
        xs = sorted(points)
        means = [fmean(points[x]) for x in xs]
        spreads = [stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
        axes.errorbar(xs, means, yerr=spreads, label=f"{plot.lines} {line}", marker=".", capsize=2)
    if plot.log:
        axes.set_xscale("symlog" if any(float(r[plot.x]) == 0 for r in final(rows) if r.get(plot.x)) else "log")
    axes.set(xlabel=plot.x, ylabel=plot.y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
    with atomically(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
