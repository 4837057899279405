"""All runs of a suite, and where they are."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from benchmarks.folder import Folder
from benchmarks.perform import Task, arguments, in_a_line
from benchmarks.program import parse_program
from benchmarks.suite import Run, Suite
from tying.cli import parse
from tying.errors import ConfigurationError


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
