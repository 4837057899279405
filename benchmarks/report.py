"""Results as Markdown and CSV, and their place in pages."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tying.errors import ConfigurationError, nearest
from tying.files import atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("docs/*.md")),
]  # they tell of results
MARK = re.compile(r"(<!-- (results|cell|claim|command) (.+?) -->)((?:(?!<!--).)*)<!-- end -->", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures.

    Example:
        >>> print(table(["run", "s"], [["a", "1.0"]]))
        | run |   s |
        |-----|----:|
        | a   | 1.0 |
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *figures])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomically(path) as aside:
        aside.write_text(text)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with a column for every key, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(key for row in rows for key in row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def paste(page: str) -> str:
    """Return a page with all that it takes from kept results brought up to date.

    That is, what stands between one of these marks and ``<!-- end -->``::

        <!-- results soft -->                          the whole of results/soft.md
        <!-- cell soft :: untied :: test accuracy -->  one figure of it, by row and column
        <!-- claim transfer :: the anchor is better --> a verdict
        <!-- command soft -->                          what does its runs

    Raises:
        ConfigurationError: there is no such result, row, column or claim.
    """
    return MARK.sub(lambda match: f"{match[1]}{_taken(match[2], match[3])}<!-- end -->", page)


def _taken(kind: str, asked: str) -> str:
    name, *place = asked.split(" :: ")
    path = RESULTS / f"{name}.md"
    if not path.exists():
        kept = [result.stem for result in RESULTS.glob("*.md")]
        raise ConfigurationError(f"a page asks for results {name!r}, but there is no {path.name}.{nearest(name, kept)}")
    text = path.read_text()
    if kind == "results":
        return f"\n{text.strip()}\n"
    found = {"claim": _claims, "cell": _cells, "command": _command}[kind](text)
    values = [value for key, value in found if key == (wanted := " :: ".join(place))]
    if not values:
        raise ConfigurationError(f"{path.name} has no {kind} {wanted!r}.{nearest(wanted, dict(found))}")
    if len({*values}) > 1:
        raise ConfigurationError(f"{path.name} has several of {kind} {wanted!r}: {', '.join(values)}")
    return values[0]


def _command(text: str) -> list[tuple[str, str]]:
    """Return the command of a result, which bears no name."""
    return [("", command) for command in re.findall(r"Command: (`.*?`)\.", text)]


def _claims(text: str) -> list[tuple[str, str]]:
    """Return the claims of a result with their verdicts."""
    return list(
        re.findall(r"^Claim: (.*?): ((?:not )?reproduced.*|undecided.*|not tested here.*)\.$", text, flags=re.MULTILINE)
    )


def _cells(text: str) -> list[tuple[str, str]]:
    """Return the figures of a result's tables with row and column."""
    cells = []
    for lines in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        for first, *others in rows:
            cells += [(f"{first} :: {column}", cell) for column, cell in zip(header[1:], others, strict=True)]
    return cells
