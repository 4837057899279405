"""All kept results on one page, and all kept runs in one table."""

from __future__ import annotations

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from pandas import DataFrame
from PIL import Image

from benchmarks import report
from benchmarks.archive import unpack
from benchmarks.declared import load
from benchmarks.folder import Folder
from benchmarks.report import table
from benchmarks.speed import FAMILIES
from benchmarks.summary import curves
from tying.errors import ConfigurationError
from tying.files import atomically

SECTIONS = {
    "One network, every family": "cifar10 full@cifar10-jpeg",
    "Soft tying": "soft transfer coupling two-domains hybrid-toy mixture@mnist continual@mnist continual-search@mnist",
    "Hard tying": "hard autoencoder relaxed sentence",
    "What ties live through": "survival lightning_features strangers zoo fuzz",
    "Hashed layers": "arbnet-fig2@mnist arbnet-fig3@mnist arbnet-fig4@mnist arbnet-density@mnist arbnet-cifar10 "
    "hashednets@mnist clustering@mnist",
    "Depth": "depth",
    "Recurrent networks": "text permuted-mnist@mnist",
    "Speed": " ".join(f"speed_{family}" for family in FAMILIES),
}
INTRODUCTION = """Each table names the command that prints it. What they say: [which tie for which problem](../GUIDE.md)
and [what the papers said](../PAPERS.md)."""


def markdown() -> str:
    """Return the page over :data:`SECTIONS`: what is kept, its pictures, and what is not kept yet."""
    folder = report.RESULTS
    every = [name for names in SECTIONS.values() for name in names.split()]
    kept = {path.stem for path in folder.glob("*.md")} - {"README"}
    parts = ["# Results", INTRODUCTION]
    if missing := [name for name in every if name not in kept]:
        parts.append(f"Not kept yet: {', '.join(missing)}.")
    asked = {**SECTIONS, "Others": " ".join(sorted(kept - {*every}))}
    sections = {title: [name for name in names.split() if name in kept] for title, names in asked.items()}
    sections = {title: names for title, names in sections.items() if names}
    contents = [[f"[{title}](#{_anchor(title)})", str(len(names))] for title, names in sections.items()]
    parts.append(table(["section", "results"], contents))
    for title, names in sections.items():
        parts.append(f"## {title}")
        parts += [f"### {name}\n\n{with_pictures(name)}" for name in names]
    return "\n\n".join(parts) + "\n"


def with_pictures(name: str) -> str:
    """Return a kept result with its pictures."""
    folder = report.RESULTS
    pictures = [*sorted(folder.glob(f"{name}.png")), *sorted(folder.glob(f"{name}_*.png"))]
    return "\n\n".join(
        [(folder / f"{name}.md").read_text().strip(), *(f"![{description(path)}]({path.name})" for path in pictures)]
    )


def description(picture: Path) -> str:
    """Return what a picture shows: the title in its file, see :func:`tying.files.save_figure`, or else its name."""
    with Image.open(picture) as image:
        return str(image.info.get("Title") or f"The picture of {picture.stem}")


def _anchor(title: str) -> str:
    return re.sub(r"[^\w@ -]", "", title).strip().lower().replace(" ", "-")


def export(path: Path) -> int:
    """Write every epoch of all kept runs as one tidy table, and return the number of runs.

    A row has the suite, the setting, its value on each axis, the seed, what was logged after the epoch, and the machine
    and versions of the run; the row of a run's last epoch also has what the run came to. A CSV file holds all numbers
    as they were written, and tells what was not logged (empty) from what is not finite; in a parquet file, which needs
    pyarrow, both are null.

    Raises:
        ConfigurationError: the file is to be neither CSV nor parquet, or pyarrow is not installed.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigurationError(f"cannot write {path}: name a file that ends in .csv or .parquet")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigurationError(f"{path} needs pyarrow: pip install pyarrow, or write {path.with_suffix('.csv')}")
    rows = pd.concat([_runs_of(archive) for archive in sorted(report.RESULTS.glob("runs/*.tar.xz"))], ignore_index=True)
    with atomically(path) as aside:
        if path.suffix == ".csv":
            rows.to_csv(aside, index=False)
        else:
            words = {"suite", "setting", "hardware", *rows.filter(like="version of ")}
            rows.apply(lambda column: column if column.name in words else _as_numbers(column)).to_parquet(aside)
    return len(rows.drop_duplicates(["suite", "setting", "seed"]))


def _runs_of(archive: Path) -> DataFrame:
    """Return the rows of a suite's kept runs."""
    name = archive.name.removesuffix(".tar.xz")
    with tempfile.TemporaryDirectory() as out:
        kept = unpack(archive, Path(out))
        seeds = 1 + max(int(folder.rpartition("=")[2]) for folder in kept)
        runs = [run for run in load(name.partition("@")[0]).runs(seeds) if run.name in kept]
        rows, machines = curves(runs, Path(out)), []
        for run in runs:
            machine = Folder(Path(out) / run.name).result()["machine"]
            versions = {f"version of {package}": version for package, version in machine["versions"].items()}
            made = {"hardware": machine["hardware"], "threads": str(machine["threads"]), **versions}
            machines.append({"run": run.setting, "seed": str(run.seed), **made})
    rows.insert(0, "suite", name)
    return rows.merge(DataFrame(machines), on=["run", "seed"]).rename(columns={"run": "setting"})


def _as_numbers(column: pd.Series[str]) -> pd.Series[str] | pd.Series[float]:
    """Return a column as numbers, or as it is where an axis has words."""
    try:
        return column.astype(float)
    except ValueError:
        return column
