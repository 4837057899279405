"""Prepare, perform and report the runs of a suite."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pandas import DataFrame

from benchmarks.archive import unpack
from benchmarks.claims import verdicts
from benchmarks.declared import load, suites
from benchmarks.engine import Local, Performance
from benchmarks.figures import draw as draw_plot
from benchmarks.figures import draw_overview
from benchmarks.folder import complete_below
from benchmarks.json_files import read_json, write_json
from benchmarks.machine import machine
from benchmarks.report import RESULTS, write
from benchmarks.rows import final, read_rows
from benchmarks.suite import Suite
from benchmarks.summary import curves, refuse_mixture, summarize
from benchmarks.sweep import Sweep
from tying.cli.demo import without_notices
from tying.errors import ConfigurationError

RUNS = Path("runs/suites")
BEGUN = "begun.json"  # which seeds and overrides the runs of a folder have


def prepare(
    name: str,
    out: Path | None = None,
    data: str | None = None,
    seeds: int | None = None,
    only: str | None = None,
    overrides: Sequence[str] = (),
    as_begun: bool = False,
) -> Sweep:
    """Return the runs of a suite, or of its file, and where they are: by default, by the names of suite and data.

    Args:
        name: of the suite, or its file.
        out: the folder of all runs.
        data: the data module's root, or ``"sample"``; by default, what the suite says.
        seeds: number of replicas of each setting; 1 by default.
        only: a shell pattern for the names of runs.
        overrides: ``--key=value`` for all runs.
        as_begun: take seeds and overrides that are not given from what the folder was begun with.
    """
    suite = load(name)
    arguments, label = _data(data)
    home = suite.home or suite.name
    out = out or RUNS / (f"{home}@{label}" if data else home)
    if as_begun and (out / BEGUN).exists():
        kept = read_json(out / BEGUN, "seeds", "overrides")
        seeds, overrides = kept["seeds"] if seeds is None else seeds, [*overrides] or kept["overrides"]
    runs = suite.runs(1 if seeds is None else seeds, only, overrides)
    sweep = Sweep(suite, runs, out, list(overrides), arguments, label)
    sweep.check()
    return sweep


def check(sweep: Sweep) -> None:
    """Refuse configurations that could not be run, and to mix with complete runs that other versions made."""
    folders = [sweep.folder(run) for run in sweep.runs]
    complete = [folder for folder in folders if folder.state() == "complete"]
    if len(complete) < len(folders):
        made = {folder.name: folder.result()["machine"]["versions"] for folder in complete}
        refuse_mixture({**made, "those to come": machine()["versions"]})
    with quietly():
        sweep.check_configurations()


def perform(sweep: Sweep, workers: Local, retry: int = 0) -> dict[str, str]:
    """Do the runs that are not done; return why those failed that failed, by name."""
    path = sweep.out / BEGUN
    kept = read_json(path, "seeds") if path.exists() else {"seeds": 0}
    begun = {"seeds": max(kept["seeds"], *(run.seed + 1 for run in sweep.runs)), "overrides": [*sweep.overrides]}
    if begun != kept:
        write_json(path, begun)
    return Performance(sweep, workers, retry).perform()


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
    table = sweep.out / f"{sweep.name}.csv"
    write(table, rows.to_csv(index=False))
    written = [table, *draw_pictures(sweep.suite, sweep.name, rows, sweep.out)]
    if kept:
        written += draw_pictures(sweep.suite, sweep.name, rows, kept)
        write(kept / table.name, final(rows).to_csv(index=False))
    return written


def draw_pictures(suite: Suite, name: str, rows: DataFrame, folder: Path) -> list[Path]:
    """Write a picture of all settings, and those that the suite's file asks for; return the files.

    Args:
        suite: the suite.
        name: first part of the files' names.
        rows: those of :func:`benchmarks.summary.curves`.
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
    table, (suite_name, _, label) = folder / f"{name}.csv", name.partition("@")
    suite = load(suite_name)
    if not table.exists():
        raise ConfigurationError(f"there is no {table}")
    rows = read_rows(table)
    archive = folder / "runs" / f"{'@'.join(filter(None, [suite.home or suite_name, label]))}.tar.xz"
    if archive.exists():
        kept = rows
        with tempfile.TemporaryDirectory() as out:
            unpack(archive, Path(out))
            begun = read_json(Path(out) / BEGUN, "seeds")
            rows = curves(suite.runs(begun["seeds"]), Path(out))
        if not final(rows).reindex(columns=kept.columns).reset_index(drop=True).equals(kept):
            raise ConfigurationError(f"{archive} has other results than {table}")
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


def _data(given: str | None) -> tuple[list[str], str]:
    """Return the arguments that say where the data is, and a name for it that is the same on every machine."""
    if given is None:
        return [], "configured"
    if given == "sample":  # a folder of that name is ./sample
        return ["--data.root=null", "--data.source=sample"], given
    root = Path(given).resolve()
    if not root.exists():
        raise ConfigurationError(f"--data: there is no {given}; give the data module's root, or 'sample'")
    label = re.sub(r"[^\w.=+-]", "_", root.name.removesuffix(".zip").partition(".tar")[0])
    return [f"--data.root={root}"], "folder" if label in ("", "sample") else label


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the notices and warnings of Lightning, and all that is printed."""
    nowhere = io.StringIO()
    with without_notices(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield
