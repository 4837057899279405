"""All runs of a suite, where they are, and whether they can be done."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from pandas import DataFrame

from benchmarks.folder import Folder, read_json
from benchmarks.machine import machine
from benchmarks.perform import Task, arguments, in_a_line
from benchmarks.program import parse_program
from benchmarks.suite import Run, Suite, load
from tying.cli import parse
from tying.cli.demo import without_notices
from tying.errors import ConfigurationError, listed

RUNS = Path("runs/suites")
BEGUN = "begun.json"  # which seeds and overrides the runs of a folder have


@dataclass
class Sweep:
    """Runs of a suite, each with a folder in one folder."""

    suite: Suite
    runs: Sequence[Run]
    out: Path
    overrides: Sequence[str] = ()  # what all runs have on top of the suite
    data: Sequence[str] = ()  # arguments that say where the data is here: no part of what makes a run the run it is
    label: str = "configured"  # of the data
    _data_keys: dict[str, str] = field(default_factory=dict, init=False)  # what stands for their content, by setting

    @property
    def name(self) -> str:
        """The suite's name, and the data's where it is not what the suite says."""
        return self._on_data(self.suite.name)

    @property
    def home(self) -> str:
        """The same of the suite whose runs these are."""
        return self._on_data(self.suite.home or self.suite.name)

    def _on_data(self, name: str) -> str:
        return name + (f"@{self.label}" if self.data else "")

    def folder(self, run: Run) -> Folder:
        """Return the folder of a run."""
        return Folder(self.out / run.name)

    def definition(self, run: Run) -> dict[str, Any]:
        """Return what makes a run the run it is: a folder that holds another one's results is left alone."""
        key = self._data_keys.get(run.setting)
        content = {"layers": run.definition, "data": self.label, "data key": key, "program": run.program}
        return {name: value for name, value in content.items() if value or name in ("layers", "data")}

    def task(self, run: Run, threads: int) -> Task:
        """Return what the process of a run needs to know."""
        return Task(self.folder(run), run, self.definition(run), self.data, threads)

    def check(self) -> None:
        """Refuse folders that hold results of another definition, with a ConfigurationError."""
        whole = [run for run in self.runs if not self.folder(run).damage()]
        conflicts = [*filter(None, (self.folder(run).conflict(self.definition(run)) for run in whole))]
        if conflicts:
            more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
            raise ConfigurationError(f"{conflicts[0]}{more}. Give another --out, or remove what is there")

    def check_configurations(self) -> None:
        """Refuse configurations that could not be run, and data that are not those of earlier results."""
        keys: dict[str, str] = {}
        for run in self.runs:
            if run.setting in self._data_keys:
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    datamodule, described = self._checked(run, Path(folder))
                if datamodule is not None and described not in keys:
                    datamodule.prepare_data()
                    datamodule.setup("fit")
                    keys[described] = str(getattr(datamodule, "key", ""))
                self._data_keys[run.setting] = keys.get(described, "")
            except Exception as error:
                raise ConfigurationError(f"{run.setting}: {in_a_line(error)}") from error
        self.check()

    def _checked(self, run: Run, folder: Path) -> tuple[pl.LightningDataModule | None, str]:
        """Make what a run's configuration says; return its data module, and the data's configuration."""
        given = arguments(run, folder, self.data)
        if run.program:
            _, settings, config = parse_program(run.program, given)
            return settings.get("data"), str(yaml.safe_load(config).get("data"))
        cli = parse(given)
        cli.trainer.inspect(cli.model)  # do the ties fit?
        if cli.trainer.world_size > 1:
            raise ConfigurationError("a run trains in one process: set devices and num_nodes to 1")
        return cli.datamodule, str(cli.config.get("data"))


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
    given, label = _data(data)
    home = suite.home or suite.name
    out = out or RUNS / (f"{home}@{label}" if data else home)
    if as_begun and (out / BEGUN).exists():
        kept = read_json(out / BEGUN, "seeds", "overrides")
        seeds, overrides = kept["seeds"] if seeds is None else seeds, [*overrides] or kept["overrides"]
    runs = suite.runs(1 if seeds is None else seeds, only, overrides)
    sweep = Sweep(suite, runs, out, list(overrides), given, label)
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


def refuse_mixture(versions_of: Mapping[str, Mapping[str, str]]) -> None:
    """Raise unless all runs, by name, were made with the same versions of all packages."""
    versions = DataFrame.from_dict(dict(versions_of), orient="index")
    mixed = [
        f"{package} {version}: {len(runs)} run{'s' * (len(runs) > 1)}, {listed(runs.index, limit=3)}"
        for package in versions
        if versions[package].nunique() > 1
        for version, runs in versions.groupby(str(package), sort=False)
    ]
    if mixed:
        raise ConfigurationError(
            f"runs of different versions are not compared: {'; '.join(mixed)}. Report some of them by --only, or do "
            "all again, in another folder (--out)"
        )


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
