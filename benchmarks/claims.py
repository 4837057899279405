"""What becomes of a paper's claims.

A suite's file may say::

    trends:                    # a claim on how y goes with an axis, for each value of `lines`
      - {claim: accuracy rises with alpha, x: alpha, y: test/accuracy, lines: ratio, sign: 1, confounded: "..."}
    peaks:                     # a claim that y is best inside an axis, for each value of `lines`
      - {claim: the best alpha is inside, x: alpha, y: test/accuracy, lines: labels}
    orders:                    # a claim that y of some runs is above that of others
      - {claim: tied is better, y: test/accuracy, higher: tied, lower: untied}

Each may say where it is made, as a condition on a metric (``regime: {run: plain, y: train/accuracy, above: 0.99}``)
or in words (``missing: 10 epochs instead of 500``). What is not reproduced elsewhere is *not tested here*.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from statistics import fmean
from typing import ClassVar

import numpy as np
import pandas as pd
from pandas import DataFrame
from typing_extensions import override

from benchmarks.inference import interval, probability_by_chance
from benchmarks.report import table
from benchmarks.rows import final, lines_of, numbers
from tying.mappings import from_mapping

LEVEL = 0.025  # of a trend that is there by chance, on either side


@dataclass(frozen=True)
class Regime:
    """Where a claim is made: a metric of a setting, as a mean over seeds, is between two bounds.

    Attributes:
        run: a setting, as the table names it.
        y: a metric.
        above: the lower bound.
        below: the upper bound.
    """

    run: str
    y: str
    above: float = -math.inf
    below: float = math.inf

    def unmet(self, rows: DataFrame) -> str:
        """Return what is not as it should be, in words; empty if all is."""
        last = final(rows)
        mean = numbers(last[last["run"] == self.run], self.y)[self.y].mean()
        if self.above < mean < self.below:
            return ""
        bound = f"below {self.below:g}" if mean >= self.below else f"above {self.above:g}"
        return f"{self.y} of {self.run} is {mean:.4g}, not {bound}"


@dataclass(frozen=True)
class Claimed:
    """What a paper claims.

    Attributes:
        claim: in words.
        regime: where it is made.
        missing: what the runs lack of what it was made of, in words.
    """

    claim: str
    _: KW_ONLY
    regime: Regime | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "regime", from_mapping(self.regime, Regime, f"the regime of {self.claim!r}"))

    def sentence(self, verdict: str, rows: DataFrame) -> str:
        """Return the claim and its verdict: what is not reproduced outside its regime is not tested."""
        lacking = [self.missing, self.regime.unmet(rows) if self.regime else ""]
        if verdict.startswith("not reproduced") and any(lacking):
            verdict = f"not tested here: {' and '.join(filter(None, lacking))}"
        return f"{self.claim}: {verdict}."


@dataclass(frozen=True)
class AlongAxis(Claimed):
    """A claim on how a metric goes along an axis, on every line.

    Attributes:
        x: an axis of the suite.
        y: a metric.
        lines: an axis.
        confounded: why what is claimed, if it is there, may have another cause.
    """

    x: str
    y: str
    lines: str
    _: KW_ONLY
    confounded: str = ""
    head: ClassVar[tuple[str, ...]]
    agrees: ClassVar[str]  # what a line says that is as claimed
    least: ClassVar[int]  # number of x that it takes

    def judge(self, rows: DataFrame) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's rows: each line, its number of seeds, what is measured and what it says.

        With one seed, too few x, or a value that is not finite, nothing can be said.
        """
        table_rows = []
        for line, runs in lines_of(rows, self.lines):
            by_seed = numbers(runs, self.x, self.y).pivot(index="seed", columns=self.x, values=self.y).dropna()
            by_seed = by_seed if by_seed.shape[1] >= self.least else by_seed[:0]
            blank = unsaid(len(by_seed), by_seed.to_numpy().flat)
            cells = [*[blank] * (len(self.head) - 3), "undecided"] if blank else self.measure(by_seed)
            table_rows.append([f"{self.lines} {line}", str(len(by_seed)), *cells])
        verdict = of_all_lines(table_rows, self.agrees)
        if self.confounded and any(line[-1] == self.agrees for line in table_rows):
            verdict += f", and confounded: {self.confounded}"
        return self.sentence(verdict, rows), table_rows

    def measure(self, by_seed: DataFrame) -> list[str]:
        """Return what the values of y say, by seed and x: the cells of a row from the third on."""
        raise NotImplementedError


@dataclass(frozen=True)
class Trend(AlongAxis):
    """A claim: along an axis a metric rises (sign 1) or falls (−1), on every line.

    What decides is the rank correlation of both over all values of the axis, as a mean over seeds, and how probable
    one as large, in its direction, would be without a trend, exactly: below 2.5 %. Unlike the change from the first to
    the last value, it is not ruled by the spread at one end.
    """

    sign: int
    head: ClassVar = ("line", "n", "change from first to last", "rank correlation", "probability", "says")
    agrees: ClassVar = "as claimed"
    least: ClassVar = 2

    @override
    def measure(self, by_seed: DataFrame) -> list[str]:
        change = (by_seed.iloc[:, -1] - by_seed.iloc[:, 0]).mean()
        ranks = pd.Series(range(by_seed.shape[1]), by_seed.columns)
        correlation = by_seed.rank(axis=1).corrwith(ranks, axis=1).fillna(0.0).mean()  # 0 where y does not vary
        chance = probability_by_chance(correlation, by_seed.shape[1], len(by_seed))
        says = "undecided" if chance >= LEVEL else "as claimed" if correlation * self.sign > 0 else "the opposite"
        return [f"{change:+.4f}", f"{correlation:+.3f}", f"{chance:.2g}", says]


@dataclass(frozen=True)
class Peak(AlongAxis):
    """A claim: along an axis a metric is highest inside, at neither end, on every line.

    The inner value is chosen on all seeds but one, and compared with both ends on that one, for each seed in turn: the
    luck of the best of several is not counted as a gain. What decides are 95 % intervals of the mean gains.
    """

    head: ClassVar = (
        *("line", "n", "best inside", "over the first", "95 % interval", "over the last", "95 % interval", "says"),
    )
    agrees: ClassVar = "inside"
    least: ClassVar = 3

    @override
    def measure(self, by_seed: DataFrame) -> list[str]:
        values = by_seed.to_numpy()
        others = (np.delete(values, row, axis=0) for row in range(len(values)))
        best = [1 + int(rows[:, 1:-1].mean(axis=0).argmax()) for rows in others]
        gains = [(values[range(len(values)), best] - values[:, end]).tolist() for end in (0, -1)]
        bounds = [interval(over) for over in gains]
        inside = all(low > 0 for low, _ in bounds)
        says = "inside" if inside else "at an end" if any(high < 0 for _, high in bounds) else "undecided"
        cells = [f"{x:g}" for x in by_seed.columns[sorted({*best})]]
        table_rows = [
            (f"{fmean(over):+.4f}", f"{low:+.4f} to {high:+.4f}")
            for over, (low, high) in zip(gains, bounds, strict=True)
        ]
        return [", ".join(cells), *table_rows[0], *table_rows[1], says]


@dataclass(frozen=True)
class Order(Claimed):
    """A claim: a metric of one setting is above that of another, or above another metric.

    What decides is the 95 % interval of the mean difference, seed by seed.

    Attributes:
        y: a metric.
        higher: a setting, as the table names it.
        lower: a setting; ``higher`` itself where another metric is compared.
        over: the metric of ``lower``; ``y`` by default.
    """

    y: str
    higher: str
    lower: str
    over: str = ""
    head: ClassVar = ("settings", "n", "difference", "95 % interval", "says")

    def judge(self, rows: DataFrame) -> tuple[str, list[list[str]]]:
        """Return a verdict, and a table's row: the difference and what it says.

        With one seed, or a value that is not finite, nothing can be said.
        """
        last, over = final(rows), self.over or self.y
        sides = ((self.higher, self.y), (self.lower, over))
        above, below = (numbers(last[last["run"] == run], y).set_index("seed")[y] for run, y in sides)
        above, below = above.align(below, join="inner")
        gains = (above - below).tolist()
        low, high = interval(gains)
        says = "as claimed" if low > 0 else "the opposite" if high < 0 else "undecided"
        verdict = {"as claimed": "reproduced", "the opposite": "not reproduced"}.get(says, says)
        blank = unsaid(len(gains), gains)
        cells = 2 * [blank] if blank else [f"{fmean(gains):+.4f}", f"{low:+.4f} to {high:+.4f}"]
        what = f"{self.higher} − {self.lower}" if self.higher != self.lower else f"{self.y} − {over}"
        if ends := dict.fromkeys([*at_ends(last, self.higher), *at_ends(last, self.lower)]):
            verdict += f", with {' and '.join(ends)} at the end of its axis"
        return self.sentence(verdict, rows), [[what, str(len(gains)), *cells, says]]


Claim = Trend | Peak | Order


def of_all_lines(table_rows: Sequence[Sequence[str]], agrees: str) -> str:
    """Return the verdict of a table's rows, each of a line, its number of seeds, …, and what it says.

    Args:
        table_rows: the rows.
        agrees: what a line says that is as the claim.
    """
    if all(int(line[1]) < 2 for line in table_rows):
        return "undecided, for want of seeds"
    counts = Counter(line[-1] for line in table_rows)
    some = f"{counts[agrees]} of {len(table_rows)} lines" if counts[agrees] else ""
    if counts[agrees] + counts["undecided"] < len(table_rows):
        return "not reproduced" + (some and f" (as claimed on {some})")
    if counts["undecided"]:
        return f"reproduced on {some}, undecided on the others" if some else "undecided"
    return "reproduced"


def at_ends(last: DataFrame, run: str) -> list[str]:
    """Return the values of axes of three numbers or more that a setting has and that are the first or last of theirs.

    Args:
        last: the last row of each run.
        run: the setting, such as ``"tied,lr=0.1"``: the choice of the best of an axis may end where others are better.

    Example:
        >>> runs = [f"tied,lr={lr}" for lr in (0.01, 0.03, 0.1)]
        >>> last = DataFrame({"run": runs, "lr": ["0.01", "0.03", "0.1"]})
        >>> at_ends(last, "tied,lr=0.1"), at_ends(last, "tied,lr=0.03")
        (['lr=0.1'], [])
    """
    ends = []
    for part in run.split(","):
        axis, _, value = part.partition("=")
        if value and axis in last:
            alike = last[last["run"].str.replace(f"{axis}=[^,]*", "", regex=True) == run.replace(part, "")]
            values = pd.to_numeric(alike[axis], errors="coerce").dropna().unique()
            if len(values) >= 3 and float(value) in (values.min(), values.max()):
                ends.append(part)
    return ends


def unsaid(seeds: int, values: Iterable[float]) -> str:
    """Return what stands in a table where nothing can be said: "–" for want of seeds, "nan" if a value is not finite.

    Example:
        >>> unsaid(1, [0.5]), unsaid(2, [0.5, float("inf")]), unsaid(2, [0.5, 0.6])
        ('–', 'nan', '')
    """
    return "–" if seeds < 2 else "" if all(map(math.isfinite, values)) else "nan"


def verdicts(claims: Sequence[Claim], rows: DataFrame) -> str:
    """Return what becomes of claims, as Markdown."""
    parts = []
    for claim in claims:
        verdict, table_rows = claim.judge(rows)
        parts += [f"Claim: {verdict}", "", table(claim.head, table_rows), ""]
    return "\n".join(parts)
