"""Results as Markdown, and their place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tying.atomic import atomically
from tying.errors import ConfigurationError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomically(path) as aside:
        aside.write_text(text)


def paste(readme: str) -> str:
    """Return ``readme`` with each block between ``<!-- results NAME -->`` and ``<!-- end -->`` brought up to date.

    Raises:
        ConfigurationError: there is no result of that name.
    """

    def block(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.md"
        if not path.exists():
            raise ConfigurationError(f"the README asks for results {match[1]!r}, but there is no {path.name}")
        return f"<!-- results {match[1]} -->\n{path.read_text().strip()}\n<!-- end -->"

    return re.sub(r"<!-- results (\S+) -->\n.*?<!-- end -->", block, readme, flags=re.DOTALL)
