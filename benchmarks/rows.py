"""Results as a table of pandas: a row for each epoch of each run, and in the last one also what all came to.

Cells are text, as files have them: one that is missing was not logged, ``nan`` and ``inf`` were.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame


def read_rows(path: Path) -> DataFrame:
    """Return the rows of a CSV file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])


def final(rows: DataFrame) -> DataFrame:
    """Return the last row of each run."""
    return rows.drop_duplicates(["run", "seed"], keep="last")


def numbers(rows: DataFrame, *columns: str) -> DataFrame:
    """Return the rows that have all of these columns, and in them numbers; of what is not finite, infinity.

    Example:
        >>> numbers(DataFrame({"run": ["a", "b", "c"], "loss": ["0.5", "nan", None]}), "loss")["loss"].tolist()
        [0.5, inf]
    """
    present = rows.reindex(columns=[*dict.fromkeys([*rows.columns, *columns])]).dropna(subset=[*columns])
    return present.astype(dict.fromkeys(columns, float)).replace([np.nan, -np.inf], np.inf)


def lines_of(rows: DataFrame, axis: str) -> Iterator[tuple[str, DataFrame]]:
    """Yield the values of an axis, and the final rows of the runs that have them; those without it are left out."""
    last = final(rows)
    if axis in last:
        for value, runs in last.groupby(axis, sort=False):
            yield str(value), runs


def means_by_run(rows: DataFrame, *columns: str) -> DataFrame:
    """Return means and standard deviations by run: of one seed, 0; where one is not finite, the mean is NaN.

    Returns:
        a table with the index ``run`` and the columns ``(column, "mean")`` and ``(column, "std")``, of the runs that
        have all of the columns.
    """
    by_run = numbers(rows, *columns).groupby("run", sort=False)[[*columns]]
    return by_run.agg(["mean", "std"]).replace(np.inf, np.nan).fillna({(column, "std"): 0.0 for column in columns})
