"""What becomes of a paper's claims.

A suite's file may say::

    trends:                    # a claim on how y goes with an axis, for each value of `lines`
      - {claim: accuracy rises with alpha, x: alpha, y: test/accuracy, lines: ratio, sign: 1, confounded: "..."}
    peaks:                     # a claim that y is best inside an axis, for each value of `lines`
      - {claim: the best alpha is inside, x: alpha, y: test/accuracy, lines: labels}
    orders:                    # a claim that y of some runs is above that of others
      - {claim: tied is better, y: test/accuracy, higher: tied, lower: untied}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from benchmarks.figures import Row, final, lines_of
from benchmarks.inference import interval, probability_by_chance, rank_correlation
from benchmarks.report import table

LEVEL = 0.025  # of a trend that is there by chance, on either side


@dataclass(frozen=True)
class Trend:
    """A claim: along an axis a metric rises (sign 1) or falls (−1), on every line.

    What decides is the rank correlation of both over all values of the axis, summed over seeds, and how probable one
    as large would be without a trend, exactly: below 2.5 %. Unlike the change from the first to the last value, it is
    not ruled by the spread at one end.

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
    head: ClassVar = ("line", "n", "change from first to last", "rank correlation", "probability", "says")

    def judge(self, rows: Sequence[Row]) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's rows: for each line the change, the rank correlation and what it says.

        The probability is that of a correlation as large, in the direction of the one that is found, by chance. With
        one seed, or a value that is not finite, nothing can be said.
        """
        told = []
        for line, points in lines_of(rows, self.lines).items():
            whole = by_seed(points, self.x, self.y)
            if blank := unsaid(len(whole), (y for own in whole for _, y in own)):
                told.append([f"{self.lines} {line}", str(len(whole)), *3 * [blank], "undecided"])
                continue
            change = fmean(own[-1][1] - own[0][1] for own in whole)
            correlation = fmean(rank_correlation(own) for own in whole)
            chance = probability_by_chance(correlation, len(whole[0]), len(whole))
            says = "undecided" if chance >= LEVEL else "as claimed" if correlation * self.sign > 0 else "the opposite"
            cells = [f"{change:+.4f}", f"{correlation:+.3f}", f"{chance:.2g}", says]
            told.append([f"{self.lines} {line}", str(len(whole)), *cells])
        verdict = of_all_lines(told, "as claimed")
        if self.confounded and any(line[-1] == "as claimed" for line in told):
            verdict += f", and confounded: {self.confounded}"
        return f"{self.claim}: {verdict}.", told


@dataclass(frozen=True)
class Peak:
    """A claim: along an axis a metric is highest inside, at neither end, on every line.

    The inner value is chosen on all seeds but one, and compared with both ends on that one, for each seed in turn: the
    luck of the best of several is not counted as a gain. What decides are 95 % intervals of the mean gains.

    Attributes:
        claim: in words.
        x: an axis of the suite.
        y: a metric.
        lines: an axis.
    """

    claim: str
    x: str
    y: str
    lines: str
    head: ClassVar = (
        "line",
        "n",
        "best inside",
        "over the first",
        "95 % interval",
        "over the last",
        "95 % interval",
        "says",
    )

    def judge(self, rows: Sequence[Row]) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's rows: for each line the inner value, its gains over both ends, what they say.

        With one seed, without inner values, or with a value that is not finite, nothing can be said.
        """
        told = []
        for line, points in lines_of(rows, self.lines).items():
            whole = [own for own in by_seed(points, self.x, self.y) if len(own) > 2]
            if blank := unsaid(len(whole), (y for own in whole for _, y in own)):
                told.append([f"{self.lines} {line}", str(len(whole)), *5 * [blank], "undecided"])
                continue
            chosen = [inner_best([other for other in whole if other is not own]) for own in whole]
            over_first = [own[best][1] - own[0][1] for best, own in zip(chosen, whole, strict=True)]
            over_last = [own[best][1] - own[-1][1] for best, own in zip(chosen, whole, strict=True)]
            bounds = interval(over_first), interval(over_last)
            inside = all(low > 0 for low, _ in bounds)
            says = "inside" if inside else "at an end" if any(high < 0 for _, high in bounds) else "undecided"
            values = ", ".join(f"{whole[0][best][0]:g}" for best in sorted({*chosen}))
            first, last = (f"{low:+.4f} to {high:+.4f}" for low, high in bounds)
            gains = [f"{fmean(over_first):+.4f}", first, f"{fmean(over_last):+.4f}", last]
            told.append([f"{self.lines} {line}", str(len(whole)), values, *gains, says])
        return f"{self.claim}: {of_all_lines(told, 'inside')}.", told


@dataclass(frozen=True)
class Order:
    """A claim: a metric of one setting is above that of another, or above another metric.

    What decides is the 95 % interval of the mean difference, seed by seed.

    Attributes:
        claim: in words.
        y: a metric.
        higher: a setting, as the table names it.
        lower: a setting; ``higher`` itself where another metric is compared.
        over: the metric of ``lower``; ``y`` by default.
    """

    claim: str
    y: str
    higher: str
    lower: str
    over: str = ""
    head: ClassVar = ("settings", "n", "difference", "95 % interval", "says")

    def judge(self, rows: Sequence[Row]) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's row: the difference and what it says.

        With one seed, or a value that is not finite, nothing can be said.
        """
        over = self.over or self.y
        found = final(rows)
        above = {row["seed"]: float(row[self.y]) for row in found if row["run"] == self.higher and row.get(self.y)}
        below = {row["seed"]: float(row[over]) for row in found if row["run"] == self.lower and row.get(over)}
        gains = [above[seed] - below[seed] for seed in above if seed in below]
        low, high = interval(gains)
        says = "as claimed" if low > 0 else "the opposite" if high < 0 else "undecided"
        verdict = {"as claimed": "reproduced", "the opposite": "not reproduced"}.get(says, says)
        blank = unsaid(len(gains), gains)
        cells = 2 * [blank] if blank else [f"{fmean(gains):+.4f}", f"{low:+.4f} to {high:+.4f}"]
        what = f"{self.higher} − {self.lower}" if self.higher != self.lower else f"{self.y} − {over}"
        return f"{self.claim}: {verdict}.", [[what, str(len(gains)), *cells, says]]


Claim = Trend | Peak | Order


def of_all_lines(told: Sequence[Sequence[str]], agrees: str) -> str:
    """Return the verdict of a table's rows, each of a line, its number of seeds, …, and what it says.

    Args:
        told: the rows.
        agrees: what a line says that is as the claim.
    """
    if all(int(line[1]) < 2 for line in told):
        return "undecided, for want of seeds"
    found = Counter(line[-1] for line in told)
    some = f"{found[agrees]} of {len(told)} lines" if found[agrees] else ""
    if found[agrees] + found["undecided"] < len(told):
        return "not reproduced" + (some and f" (as claimed on {some})")
    if found["undecided"]:
        return f"reproduced on {some}, undecided on the others" if some else "undecided"
    return "reproduced"


def unsaid(seeds: int, values: Iterable[float]) -> str:
    """Return what stands in a table where nothing can be said: "–" for want of seeds, "nan" if a value is not finite.

    Example:
        >>> unsaid(1, [0.5]), unsaid(2, [0.5, float("inf")]), unsaid(2, [0.5, 0.6])
        ('–', 'nan', '')
    """
    return "–" if seeds < 2 else "" if all(map(math.isfinite, values)) else "nan"


def inner_best(seeds: Sequence[Sequence[tuple[float, float]]]) -> int:
    """Return which of several x, the first and the last apart, has the highest mean y.

    Example:
        >>> inner_best([[(0, 9), (1, 2), (2, 3), (3, 0)], [(0, 9), (1, 6), (2, 4), (3, 0)]])
        1
    """
    return max(range(1, len(seeds[0]) - 1), key=lambda at: fmean(own[at][1] for own in seeds))


def by_seed(points: Sequence[Row], x: str, y: str) -> list[list[tuple[float, float]]]:
    """Return pairs (x, y) of each seed, in order of x; of seeds that have the same x as that of most, two at least."""
    seeds: dict[str, list[tuple[float, float]]] = {}
    for row in points:
        if row.get(y) and row.get(x):  # not of a delta without that axis
            seeds.setdefault(row["seed"], []).append((float(row[x]), float(row[y])))
    most = max(([x for x, _ in sorted(own)] for own in seeds.values()), key=len, default=[])
    return [sorted(own) for own in seeds.values() if len(most) > 1 and [x for x, _ in sorted(own)] == most]


def verdicts(claims: Sequence[Claim], rows: Sequence[Row]) -> str:
    """Return what becomes of claims, as Markdown."""
    parts = []
    for claim in claims:
        verdict, told = claim.judge(rows)
        parts += [f"Claim: {verdict}", "", table(claim.head, told), ""]
    return "\n".join(parts)
