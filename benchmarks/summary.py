"""What a suite's runs came to: a table and a CSV."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.folder import Folder
from benchmarks.inference import interval, moments
from benchmarks.machine import in_words
from benchmarks.report import table
from benchmarks.suite import Run, Suite
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
    baseline, first = next(iter(suite.deltas)), next(iter(figures.values()), "")
    header = ["run", "n", *figures, f"− {baseline}", "parameters", "virtual", "KiB", "s / epoch", "peak MiB"]
    rows = []
    for setting, replicas in _settings(runs, results).items():
        found = [results[run.name] for run in replicas]
        differences = [
            results[run.name]["metrics"][first] - results[peer.name]["metrics"][first]
            for run in replicas
            if (peer := _peer(run, baseline, runs, results))
            and all(first in results[one.name]["metrics"] for one in (run, peer))
        ]
        pairs = f" (n = {len(differences)})" if 0 < len(differences) < len(found) else ""
        rows.append(
            [
                re.sub(r",(?! )", ", ", setting),
                str(len(found)),
                *(spread([r["metrics"][key] for r in found if key in r["metrics"]]) for key in figures.values()),
                difference(differences) + pairs if replicas[0].delta != baseline else "–",
                f"{found[0]['parameters']['unique']:,}",
                f"{found[0]['parameters']['virtual']:,}",
                f"{found[0]['parameters']['bytes'] / 1024:,.0f}" if "bytes" in found[0]["parameters"] else "–",
                f"{median(r['seconds']['epoch'] for r in found):.1f}" if "epoch" in found[0]["seconds"] else "–",
                f"{max(r['peak_memory'] for r in found) / 2**20:.0f}",
            ]
        )
    failures = {run.name: Folder(out / run.name).failure() for run in runs if states[run.name] == "failed"}
    said = [at for at in range(len(header)) if any(row[at] != "–" for row in rows)]  # columns that say something
    whole = table([header[at] for at in said], [[row[at] for at in said] for row in rows])
    return "\n".join([whole, "", _told(suite, results, states, failures), *unknown])


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


def curves(runs: Sequence[Run], out: Path) -> list[dict[str, str]]:
    """Return a row for each epoch of each complete run; that of the last also holds what all came to."""
    rows = []
    for run in runs:
        folder = Folder(out / run.name)
        if folder.state() != "complete":
            continue
        with (folder.path / "metrics.csv").open() as file:
            own = [*csv.DictReader(file)]
        result = folder.result()
        sizes = {"parameters": result["parameters"]["unique"], "bytes": result["parameters"].get("bytes", "")}
        seconds = result["seconds"]
        times = {
            "seconds / epoch": seconds.get("epoch", ""),
            "seconds of training": seconds.get("training", ""),
            "processor seconds of training": seconds.get("processor", ""),
        }
        costs = {**sizes, **times, "peak memory": result["peak_memory"]}
        came_to = {**result["metrics"], **costs}  # also metrics that the last epoch has not logged, '' in the CSV
        own[-1] |= {name: str(value) for name, value in came_to.items() if not own[-1].get(name)}
        described = {"run": run.setting, **{axis: str(value) for axis, value in run.values.items()}}
        rows += [{**described, "seed": str(run.seed), **row} for row in own]
    return rows


def refuse_mixture(versions_of: Mapping[str, Mapping[str, str]]) -> None:
    """Raise unless all runs, by name, were made with the same versions of all packages."""
    made: dict[str, dict[str, list[str]]] = {}  # runs by package and version
    for name, own in versions_of.items():
        for package, version in own.items():
            made.setdefault(package, {}).setdefault(version, []).append(name)
    told = [
        f"{package} {version}: {len(names)} run{'s' * (len(names) > 1)}, {listed(names, limit=3)}"
        for package, versions in made.items()
        if len(versions) > 1
        for version, names in versions.items()
    ]
    if told:
        raise ConfigurationError(
            f"runs of different versions are not compared: {'; '.join(told)}. Report some of them by --only, or do all "
            "again, in another folder (--out)"
        )


def _settings(runs: Sequence[Run], results: dict[str, Any]) -> dict[str, list[Run]]:
    settings: dict[str, list[Run]] = {}
    for run in runs:
        if run.name in results:
            settings.setdefault(run.setting, []).append(run)
    return settings


def _peer(run: Run, baseline: str, runs: Sequence[Run], results: dict[str, Any]) -> Run | None:
    """Return the baseline's run of the same seed, and of the same values on the axes that both have, if it is one."""
    peers = [
        peer
        for peer in runs
        if peer.delta == baseline
        and peer.seed == run.seed
        and all(peer.values[axis] == run.values[axis] for axis in run.values.keys() & peer.values.keys())
    ]
    return peers[0] if len(peers) == 1 and peers[0].name in results else None


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
    missing: dict[str, list[str]] = {}
    for name, state in states.items():
        if state != "complete":
            missing.setdefault(state, []).append(name)
    if missing:
        counts = ", ".join(f"{len(names)} {state} ({listed(names)})" for state, names in missing.items())
        told.append(f"Missing are {sum(map(len, missing.values()))} of {len(states)} runs: {counts}.")
    if failures:
        told.append(f"Failed: {listed((f'{name}: {error}' for name, error in failures.items()), limit=12)}.")
    return " ".join(told)
