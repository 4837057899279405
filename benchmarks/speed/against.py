"""Compare the speed tables of two checkouts, measured in turns."""

from __future__ import annotations

import io
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

from benchmarks.report import table
from tying.errors import ConfigurationError

# fewer repetitions than a kept table has: the checkouts take turns several times instead
SHORTER = {"hashing": {"ROUNDS": 1}, "depth": {"BLOCKS": 2}, "hard": {"PAIRS": 80, "ROUNDS": 8}, "soft": {}}
CODE = """
import torch
torch.manual_seed(0)
import benchmarks.speed.{family} as module
for name, value in {constants}.items():
    setattr(module, name, value)
result = module.measure()
print(result if isinstance(result, str) else result[0])
"""
TABLES = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)


def ratios(text: str) -> dict[str, float]:
    r"""Return the ratio to its peer in each row of a family's Markdown tables, by the row's label.

    Example:
        >>> ratios("| side | ms | / copy |\n|---|--:|--:|\n| proximal | 15.0 | 1.91 (1.83–3.65) |")
        {'proximal, / copy': 1.91}
    """
    by_row = {}
    for lines in TABLES.findall(text):
        cells = pd.read_csv(
            io.StringIO(lines), sep=r"\s*\|\s*", engine="python", skiprows=[1], dtype=str, na_filter=False
        ).iloc[:, 1:-1]
        labels = next((place for place, name in enumerate(map(str, cells)) if "ms" in name), 1)
        for name in [name for name in map(str, cells.columns[1:]) if "/" in name or "ratio" in name]:
            for label, cell in zip(cells.iloc[:, :labels].agg(", ".join, axis=1), cells[name], strict=True):
                if number := re.match(r"\d+(?:\.\d+)?", cell):
                    by_row[f"{label}, {name}"] = float(number[0])
    return by_row


def measure(checkout: Path, family: str) -> dict[str, float]:
    """Run a family's measurements in a checkout, and return its ratios.

    Raises:
        ConfigurationError: the checkout cannot run them.
    """
    code = CODE.format(family=family, constants=SHORTER[family])
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise ConfigurationError(f"{checkout} cannot measure {family!r}: {done.stderr.strip().splitlines()[-1]}")
    return ratios(done.stdout)


def compare(other: Path, families: list[str], runs: int = 5) -> str:
    """Return, as Markdown, each row's ratio in this checkout over that in another; medians of runs in turns.

    Args:
        other: folder of the other checkout.
        families: whose tables to measure: ``"hashing"``, ``"soft"``, ``"depth"`` or ``"hard"``.
        runs: of each checkout.
    """
    if unknown := [family for family in families if family not in SHORTER]:
        raise ConfigurationError(f"only {', '.join(SHORTER)} can be compared, not {', '.join(unknown)}")
    here, rows = Path(__file__).parents[2], []
    for family in families:
        measured: dict[Path, list[dict[str, float]]] = {here: [], other: []}
        for turn in range(runs):
            for checkout in (here, other) if turn % 2 else (other, here):
                measured[checkout].append(measure(checkout, family))
        for row in measured[here][0]:
            if any(row not in result for results in measured.values() for result in results):
                continue
            now, before = (statistics.median(result[row] for result in measured[tree]) for tree in (here, other))
            paired = [a[row] / b[row] for a, b in zip(measured[here], measured[other], strict=True)]
            extremes = f"{min(paired):.2f}–{max(paired):.2f}"
            rows.append([family, row, f"{before:.3f}", f"{now:.3f}", f"{now / before:.3f}", extremes])
    return table(["table", "row", "ratio before", "ratio now", "now / before", "turn by turn"], rows)
