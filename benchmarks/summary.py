"""What a suite's runs came to: a table, verdicts, a CSV and pictures."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from benchmarks.archive import unpack
from benchmarks.claims import verdicts
from benchmarks.figures import draw as draw_plot
from benchmarks.figures import draw_overview, spaced
from benchmarks.folder import Folder, complete_below, read_json
from benchmarks.inference import interval, moments
from benchmarks.machine import in_words
from benchmarks.report import RESULTS, table, write
from benchmarks.rows import final, read_rows
from benchmarks.suite import Run, Suite, load, suites
from benchmarks.sweep import BEGUN, RUNS, Sweep, refuse_mixture
from tying.errors import ConfigurationError, listed, nearest


def summarize(suite: Suite, runs: Sequence[Run], out: Path) -> str:
    """Return a suite's table as Markdown, with what it was made of and what is missing.

    Figures are mean ± standard deviation over seeds. The difference is that of the first figure to the first delta,
    taken seed by seed, and where both have an axis, at the same value; with the 95 % interval of its mean.

    Raises:
        ConfigurationError: no run is complete, or those that are were made with different versions.
    """
    states = {run.name: Folder(out / run.name).state() for run in runs}
    results = {run.name: Folder(out / run.name).result() for run in runs if states[run.name] == "complete"}
    if not results:
        raise ConfigurationError(f"no run of suite {suite.name} is complete in {out}")
    refuse_mixture({name: result["machine"]["versions"] for name, result in results.items()})
    logged = {name for result in results.values() for name in result["metrics"]}
    tested = sorted(name for name in logged if name.startswith("test/"))
    costs = {"epoch", "step", "seconds", "processor seconds"}
    figures = suite.figures or {name: name for name in tested or sorted(logged - costs)}
    unknown = [f"no run has logged {key!r}.{nearest(key, logged)}" for key in figures.values() if key not in logged]
    failures = {run.name: Folder(out / run.name).failure() for run in runs if states[run.name] == "failed"}
    whole = _table(suite, figures, _outcomes(runs, results, [*figures.values()]))
    return "\n".join([whole, "", _told(suite, results, states, failures), *unknown])


def _outcomes(runs: Sequence[Run], results: Mapping[str, Any], metrics: Sequence[str]) -> DataFrame:
    """Return a row for each run: what it is and, of a complete one, metrics (infinite if not finite) and costs."""
    rows = []
    for run in runs:
        rows.append({"run": run.setting, "delta": run.delta, "seed": run.seed})
        rows[-1] |= {f"axis {name}": str(value) for name, value in run.values.items()}
        if result := results.get(run.name):
            measured = {name: value for name, value in result["metrics"].items() if name in metrics}
            rows[-1] |= {name: value if math.isfinite(value) else math.inf for name, value in measured.items()}
            rows[-1] |= {"complete": True, **result["parameters"]}
            rows[-1] |= {"s / epoch": result["seconds"].get("epoch", math.nan), "peak": result["peak_memory"]}
    columns = dict.fromkeys([*metrics, "complete", "unique", "virtual", "bytes"])
    return DataFrame(rows, columns=[*dict.fromkeys([*(key for row in rows for key in row), *columns])])


def _table(suite: Suite, figures: Mapping[str, str], outcomes: DataFrame) -> str:
    """Return a row for each setting, and the columns in which any of them says something."""
    baseline, first = next(iter(suite.deltas)), next(iter(figures.values()), "")
    gains = differences(suite, outcomes, first) if first else {}
    header = ["run", "n", *figures, f"− {baseline}", "parameters", "virtual", "KiB", "s / epoch", "peak MiB"]
    rows = []
    for setting, runs in outcomes[outcomes["complete"].notna()].groupby("run", sort=False):
        paired = gains.get(str(setting), [])
        some = f" (n = {len(paired)})" if 0 < len(paired) < len(runs) else ""
        size = runs.iloc[0]
        costs = {
            ",.0f": [size["unique"], size["virtual"], size["bytes"] / 1024],
            ".1f": [runs["s / epoch"].median()],
            ".0f": [runs["peak"].max() / 2**20],
        }
        cells = [spread(runs[key].dropna().tolist()) for key in figures.values()]
        cells.append(difference(paired) + some if runs["delta"].iloc[0] != baseline else "–")
        cells += ["–" if pd.isna(cost) else f"{cost:{form}}" for form, values in costs.items() for cost in values]
        rows.append([spaced(str(setting)), str(len(runs)), *cells])
    said = [at for at in range(len(header)) if any(row[at] != "–" for row in rows)]
    return table([header[at] for at in said], [[row[at] for at in said] for row in rows])


def differences(suite: Suite, outcomes: DataFrame, metric: str) -> dict[str, list[float]]:
    """Return by setting how much a metric is above the baseline's, seed by seed, at the same values of common axes."""
    baseline = next(iter(suite.deltas))
    peers, gains = outcomes[outcomes["delta"] == baseline], {}
    for delta, runs in outcomes.groupby("delta"):
        common = [f"axis {name}" for name, axis in suite.axes.items() if {delta, baseline} <= {*axis.deltas}]
        alone = peers.drop_duplicates(["seed", *common], keep=False)  # one run to compare with, not several
        pairs = runs.merge(alone, on=["seed", *common], suffixes=("", " there"))
        pairs = pairs.dropna(subset=[metric, f"{metric} there"])
        for setting, pair in pairs.groupby("run"):
            gains[str(setting)] = (pair[metric] - pair[f"{metric} there"]).tolist()
    return gains


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation; nan both where a value is not finite.

    Example:
        >>> spread([0.5, 0.7]), spread([0.25]), spread([]), spread([0.5, float("inf")])
        ('0.6000 ± 0.1414', '0.2500', '–', 'nan ± nan')
    """
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else "–"
    mean, deviation = moments(values)
    return f"{mean:.4f} ± {deviation:.4f}"


def difference(values: Sequence[float]) -> str:
    """Return the mean of differences and its 95 % interval, by Student's t; nan where one is not finite.

    Example:
        >>> difference([0.1, 0.2, 0.3]), difference([0.25]), difference([]), difference([0.1, float("nan")])
        ('+0.2000 (-0.0484 to +0.4484)', '+0.2500', '–', 'nan')
    """
    if not values:
        return "–"
    mean, _ = moments(values)
    if math.isnan(mean):
        return "nan"
    low, high = interval(values)
    bounds = f" ({low:+.4f} to {high:+.4f})" if len(values) > 1 else ""
    return f"{mean:+.4f}{bounds}"


def curves(runs: Sequence[Run], out: Path) -> DataFrame:
    """Return a row for each epoch of each complete run; that of the last also holds what all came to."""
    rows = []
    for run in runs:
        folder = Folder(out / run.name)
        if folder.state() != "complete":
            continue
        with (folder.path / "metrics.csv").open() as file:
            epochs = [*csv.DictReader(file)]
        result = folder.result()
        seconds, metrics = result["seconds"], result["metrics"]
        came_to = {
            **metrics,  # also those that the last epoch has not logged, empty in the CSV
            **_loss_gap(metrics),
            "parameters": result["parameters"]["unique"],
            "bytes": result["parameters"].get("bytes", ""),
            "seconds / epoch": seconds.get("epoch", ""),
            "seconds of training": seconds.get("training", ""),
            "processor seconds of training": seconds.get("processor", ""),
            "peak memory": result["peak_memory"],
        }
        epochs[-1] |= {name: str(value) for name, value in came_to.items() if not epochs[-1].get(name)}
        described = {"run": run.setting, **{axis: str(value) for axis, value in run.values.items()}}
        rows += [{**described, "seed": str(run.seed), **row} for row in epochs]
    columns = dict.fromkeys(key for row in rows for key in row) or ("run", "seed")
    return DataFrame(rows, columns=[*columns], dtype="str").replace("", np.nan)


def _loss_gap(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return test loss − training loss, if both were logged."""
    if not {"test/loss", "train/loss"} <= {*metrics}:
        return {}
    return {"loss gap": metrics["test/loss"] - metrics["train/loss"]}


def _told(suite: Suite, results: dict[str, Any], states: Mapping[str, str], failures: Mapping[str, str]) -> str:
    """Return what the table is made of, and what it lacks, in sentences."""
    data = {f"{result['data']['description']} (key {result['data']['key']})" for result in results.values()}
    machines = sorted({in_words(result["machine"]) for result in results.values()})
    threads = sorted({result["machine"]["threads"] for result in results.values()})
    told = [*([suite.description] if suite.description else []), f"Data: {' and '.join(sorted(data))}."]
    if len(data) > 1:
        told.append("The runs used different data: their figures cannot be compared.")
    told.append(
        "Mean ± standard deviation over n seeds. Differences are paired by seed, with 95 % confidence intervals."
    )
    told.append(f"{'; '.join(machines)}; {' or '.join(map(str, threads))} threads a run.")
    missing = pd.Series({name: state for name, state in states.items() if state != "complete"}, dtype=str)
    if len(missing):
        by_state = missing.groupby(missing, sort=False)
        counts = ", ".join(f"{len(runs)} {state} ({listed(runs.index)})" for state, runs in by_state)
        told.append(f"Missing are {len(missing)} of {len(states)} runs: {counts}.")
    if failures:
        told.append(f"Failed: {listed((f'{name}: {error}' for name, error in failures.items()), limit=12)}.")
    return " ".join(told)


def report(sweep: Sweep, command: str) -> str:
    """Return the table of what is done, as Markdown.

    Raises:
        ConfigurationError: nothing is done.
    """
    common = f" All runs with {' '.join(sweep.overrides)}." if sweep.overrides else ""
    told = f"{summarize(sweep.suite, sweep.runs, sweep.out)}{common} Command: `{command}`."
    judged = verdicts(sweep.suite.claims, curves(sweep.runs, sweep.out))
    return f"{told}\n\n{judged}".rstrip()


def draw(sweep: Sweep, kept: Path | None = None) -> list[Path]:
    """Write the epochs of all complete runs as CSV, and their pictures; return the files.

    Args:
        sweep: whose runs.
        kept: a folder where the last epochs and all pictures are written too.
    """
    rows = curves(sweep.runs, sweep.out)
    csv_file = sweep.out / f"{sweep.name}.csv"
    write(csv_file, rows.to_csv(index=False))
    written = [csv_file, *draw_pictures(sweep.suite, sweep.name, rows, sweep.out)]
    if kept:
        written += draw_pictures(sweep.suite, sweep.name, rows, kept)
        write(kept / csv_file.name, final(rows).to_csv(index=False))
    return written


def draw_pictures(suite: Suite, name: str, rows: DataFrame, folder: Path) -> list[Path]:
    """Write a picture of all settings, and those that the suite's file asks for; return the files.

    Args:
        suite: the suite.
        name: first part of the files' names.
        rows: those of :func:`curves`.
        folder: where to write.
    """
    overview = folder / f"{name}.png"
    draw_overview(rows, suite.curves, [*suite.figures.values()] or suite.curves, overview, suite.time)
    pictures = {folder / f"{name}_{plot.name}.png": plot for plot in suite.plots}
    for path, plot in pictures.items():
        draw_plot(plot, rows, path)
    return [overview, *pictures]


def redraw(name: str, folder: Path = RESULTS) -> list[Path]:
    """Draw the pictures of kept results again: of all epochs, where an archive has them, else of the last ones.

    Args:
        name: name of the results, such as ``"arbnet-fig2@mnist"``.
        folder: folder of all kept results.

    Raises:
        ConfigurationError: there are no such results, or the archive's are others than the table's.
    """
    csv_file, (suite_name, _, label) = folder / f"{name}.csv", name.partition("@")
    suite = load(suite_name)
    if not csv_file.exists():
        raise ConfigurationError(f"there is no {csv_file}")
    rows = read_rows(csv_file)
    archive = folder / "runs" / f"{'@'.join(filter(None, [suite.home or suite_name, label]))}.tar.xz"
    if archive.exists():
        kept = rows
        with tempfile.TemporaryDirectory() as out:
            unpack(archive, Path(out))
            begun = read_json(Path(out) / BEGUN, "seeds")
            rows = curves(suite.runs(begun["seeds"]), Path(out))
        if not final(rows).reindex(columns=kept.columns).reset_index(drop=True).equals(kept):
            raise ConfigurationError(f"{archive} has other results than {csv_file}")
    return draw_pictures(suite, name, rows, folder)


def overview() -> str:
    """Return what each suite compares, and how many of its runs are done where they are by default."""
    lines = []
    for name in suites():
        suite = load(name)
        folders = [out for out in sorted(RUNS.glob(f"{name}*")) if out.name.partition("@")[0] == name]
        done = "; ".join(f"{len(complete_below(out))} done in {out}" for out in folders) or "none done"
        lines.append(f"{name}: {suite.description} {len(suite.runs())} runs a seed; {done}.")
    return "\n".join(lines)
