"""Tables and a picture of what may be tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tying.advice.plans import Plan
from tying.figures import WIDTH, legend_below, new_figure
from tying.files import atomically, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package

MARKERS = "s^DvP*"  # of plans; groups have others
ROWS = 20  # of the groups, in print
LOST = 1.0  # the error of outputs of zero


@dataclass(frozen=True)
class GroupRow:
    """What a tie of some weights does to the outputs.

    Attributes:
        ties: the ties.
        names: names of the weights.
        saved_bytes: bytes that the tie saves.
        error: relative squared error of the outputs with the weights tied to their mean.
        ranks: ranks of the weights at which they together have as many values as the tie, or a few less; none if one
            of them would have rank 0.
        low_rank_error: error of the outputs with the weights at these ranks, if there are such.
    """

    ties: tuple[str, ...]
    names: tuple[str, ...]
    saved_bytes: int
    error: float
    ranks: tuple[int, ...]
    low_rank_error: float | None

    @property
    def may_tie(self) -> bool:
        """Whether the error of the tie is small, and at most that of low rank of equal size."""
        return self.error < LOST and (self.low_rank_error is None or self.error <= self.low_rank_error)

    @property
    def verdict(self) -> str:
        """The advice, in words."""
        if self.may_tie:
            return "tie"
        if self.low_rank_error is not None and self.low_rank_error < self.error:
            return "do not tie: low rank of this size errs less"
        return "do not tie: the outputs are lost"


@dataclass(frozen=True)
class PlanRow:
    """What a plan does to the outputs.

    Attributes:
        plan: the plan.
        remaining: number of parameters that remain.
        saved_bytes: bytes that it saves.
        error: relative squared error of the outputs, after distillation if there was any.
        error_before: the error before distillation.
    """

    plan: Plan
    remaining: int
    saved_bytes: int
    error: float
    error_before: float


@dataclass(frozen=True)
class Advice:
    """Advice on which weights of a model may be tied; see :func:`tying.advice.advise`. ``print`` shows its tables.

    Attributes:
        groups: what each tie does, the smallest error per saved byte first.
        plans: what plans that meet the budget do, the smallest error first.
        parameters: number of parameters among which to save.
        budget: share of them that may remain.
        steps: number of steps of distillation.
    """

    groups: tuple[GroupRow, ...]
    plans: tuple[PlanRow, ...]
    parameters: int
    budget: float
    steps: int = 0

    @property
    def best(self) -> Plan:
        """The plan with the smallest error."""
        return self.plans[0].plan

    @property
    def ties(self) -> list[str]:
        """The hard ties of the best plan, for ``tie(model, advice.ties, init="mean")``; empty if it has none."""
        return [*self.best.ties]

    def yaml(self) -> str:
        """Return the configuration of callbacks that apply the best plan, for ``tying fit``."""
        return self.best.yaml()

    def __str__(self) -> str:
        shown = self.groups[:ROWS]
        groups = _table(
            ("weights", "KiB saved", "error", "low rank", "verdict"),
            (
                (
                    "; ".join(row.ties),
                    f"{row.saved_bytes / 1024:,.1f}",
                    _number(row.error),
                    "" if row.low_rank_error is None else f"{_number(row.low_rank_error)} ({row.ranks[-1]})",
                    row.verdict,
                )
                for row in shown
            ),
        )
        more = f"… and {len(self.groups) - len(shown)} more groups\n" * (len(self.groups) > len(shown))
        head = ("plan", "parameters", "share", "KiB saved", "error", *["before"] * bool(self.steps), "by")
        plans = _table(head, map(self._cells, self.plans))
        healed = f" after {self.steps} steps of distillation" * bool(self.steps)
        return (
            "Error: relative squared error of the outputs. Low rank: the error if the same weights have low rank (the\n"
            "smallest rank) and as many values as the tie, or a few less.\n\n"
            f"Groups, by error per byte\n{groups}{more}\n"
            f"Plans that leave at most {self.budget:g} of {self.parameters:,} parameters, by error{healed}\n{plans}"
        )

    def _cells(self, row: PlanRow) -> tuple[str, ...]:
        return (
            row.plan.kind,
            f"{row.remaining:,}",
            f"{row.remaining / self.parameters:.3f}",
            f"{row.saved_bytes / 1024:,.1f}",
            _number(row.error),
            *[_number(row.error_before)] * bool(self.steps),
            row.plan.describe(),
        )

    def figure(self) -> Figure:
        """Plot the bytes that each group and plan saves against the error of the outputs."""
        figure = new_figure(WIDTH, 4.2, "Error of the outputs against the memory that ties and low rank save")
        axes = figure.subplots()
        lowered = [(row.saved_bytes, row.low_rank_error) for row in self.groups if row.low_rank_error is not None]
        tied = [(row.saved_bytes, row.error) for row in self.groups]
        for points, label, marker in ((tied, "groups, tied", "o"), (lowered, "groups, at low rank of equal size", "x")):
            sizes, errors = [size for size, _ in points], [error for _, error in points]
            axes.scatter(sizes, errors, s=14, marker=marker, alpha=0.7, label=label)
        for number, row in enumerate(self.plans):
            marker, color = MARKERS[number % len(MARKERS)], f"C{number + 2}"
            axes.scatter(row.saved_bytes, row.error, s=60, marker=marker, color=color, label=f"plan: {row.plan.kind}")
        axes.set(xlabel="memory saved (bytes)", ylabel="squared error of the outputs (relative)", xscale="log")
        axes.set_yscale("symlog", linthresh=1e-6)  # zero, too
        axes.set_ylim(bottom=0)
        legend_below(figure, *axes.get_legend_handles_labels())
        return figure

    def save(self, folder: str | Path) -> None:
        """Write ``advice.txt``, ``advice.png`` and ``ties.yaml`` into a folder."""
        for name, text in (("advice.txt", str(self)), ("ties.yaml", self.yaml())):
            with atomically(Path(folder) / name) as partial:
                partial.write_text(text)
        save_figure(self.figure(), Path(folder) / "advice.png")


def _number(value: float) -> str:
    return f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text; columns of numbers are flush right."""
    lines = [(*head,), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(_padded(line, widths)).rstrip() + "\n" for line in lines)


def _padded(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if number in (0, len(widths) - 1) else cell.rjust(width)
