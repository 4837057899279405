"""Do the runs of a suite, several at a time, together with whoever else works in the same folder."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import yaml

from benchmarks.folder import Folder
from benchmarks.json_files import read_json, write_json
from benchmarks.perform import arguments, in_a_line, work
from benchmarks.program import parse_program
from benchmarks.suite import Run, Suite
from tying.cli import parse
from tying.errors import ConfigurationError

POLL = 0.5  # seconds between looks at what other processes do
TELL = 30.0  # seconds between lines on the progress, where nothing else happens
tell = partial(print, flush=True)


@dataclass
class Working:
    """A run in a process of its own."""

    run: Run
    process: BaseProcess
    connection: Connection
    begun: float


@dataclass
class Sweep:
    """All runs of a suite, in one folder.

    Args:
        suite: where they come from.
        runs: what to do.
        out: where; a folder for each run.
        overrides: what all runs have on top of the suite.
        data: arguments that say where the data is on this machine; no part of what makes a run the run it is.
        label: of the data.
    """

    suite: Suite
    runs: Sequence[Run]
    out: Path
    overrides: Sequence[str] = ()
    data: Sequence[str] = ()
    label: str = "configured"
    # what stands for the data's content, by setting; and the seconds of runs done here
    _data_keys: dict[str, str] = field(default_factory=dict, init=False)
    _seconds: list[float] = field(default_factory=list, init=False)

    @property
    def name(self) -> str:
        """The suite's name, and the data's where it is not what the suite says."""
        return self._with_data(self.suite.name)

    @property
    def home(self) -> str:
        """The name of the suite whose runs these are, and the data's where it is not what the suite says."""
        return self._with_data(self.suite.home or self.suite.name)

    def _with_data(self, name: str) -> str:
        return name + (f"@{self.label}" if self.data else "")

    def folder(self, run: Run) -> Folder:
        """Return the folder of a run."""
        return Folder(self.out / run.name)

    def definition(self, run: Run) -> dict[str, Any]:
        """Return what makes a run the run it is: a folder that holds another one's results is left alone."""
        key = self._data_keys.get(run.setting)
        content = {"layers": run.definition, "data": self.label, "data key": key, "program": run.program}
        return {name: value for name, value in content.items() if value or name in ("layers", "data")}

    def check(self) -> None:
        """Refuse folders that hold results of another definition.

        Raises:
            ConfigurationError: there are some; the first is told, with what differs.
        """
        conflicts = []
        for run in self.runs:
            folder = self.folder(run)
            if not folder.damage() and (conflict := folder.conflict(self.definition(run))):
                conflicts.append(conflict)
        if conflicts:
            more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
            raise ConfigurationError(f"{conflicts[0]}{more}. Give another --out, or remove what is there")

    def check_configurations(self) -> None:
        """Refuse configurations that could not be run, and data that are not those of earlier results.

        Raises:
            ConfigurationError: one of them is wrong; it is named. Nothing has been started.
        """
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

    def perform(self, jobs: int = 1) -> dict[str, str]:
        """Do all runs that nobody has done, several at a time; return why those failed that failed, by name.

        Each is tried once. Runs that another process works on are waited for, and taken over if it dies.
        """
        waiting = sorted(self.runs, key=lambda run: self.folder(run).state() != "complete")  # to count what is left
        working: list[Working] = []
        failed: dict[str, str] = {}
        complete = 0
        told = time.monotonic()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.perform"])
        try:
            while waiting or working:
                elsewhere = []
                for run in [*waiting]:
                    if len(working) >= jobs:
                        break
                    state = self.folder(run).state()
                    if state == "complete" and not self.folder(run).conflict(self.definition(run)):
                        complete += 1
                    elif state == "complete":
                        failed[run.name] = self.folder(run).conflict(self.definition(run))
                        tell(f"conflict: {failed[run.name]}")
                    elif state == "damaged":
                        failed[run.name] = f"{self.folder(run).damage()}. Remove the run's folder to do it again"
                        tell(f"damaged: {run.name}: {failed[run.name]}")
                    elif state == "running":
                        elsewhere.append(run)
                        continue
                    else:
                        working.append(self._start(run, context, jobs))
                    waiting.remove(run)
                for done in self._done(working, POLL if working or elsewhere else 0.0):
                    working.remove(done)
                    error = self._outcome(done)
                    if error == "taken":
                        waiting.append(done.run)
                        continue
                    if error:
                        failed[done.run.name] = error
                    else:
                        complete += 1
                    left = self._left(waiting, working, jobs)
                    told = time.monotonic()
                    self._tell_of(done.run, error, f"[{complete}/{len(self.runs)}]", left)
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    others = f", {len(elsewhere)} by other processes" if elsewhere else ""
                    left = self._left(waiting, working, jobs)
                    tell(f"[{complete}/{len(self.runs)}] {len(working)} running{others}{left}")
        finally:
            for left_over in working:
                left_over.process.kill()
                left_over.process.join()
        return failed

    def _start(self, run: Run, context: Any, jobs: int) -> Working:
        receiver, sender = context.Pipe(duplex=False)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        given = (sender, self.folder(run), self.definition(run), run, self.data, threads)
        process = context.Process(target=work, args=given, name=run.name)
        process.start()
        sender.close()
        return Working(run, process, receiver, time.time())

    def _done(self, working: Sequence[Working], timeout: float) -> list[Working]:
        wait([job.process.sentinel for job in working], timeout)
        return [job for job in working if not job.process.is_alive()]

    def _outcome(self, job: Working) -> str:
        """Return ``""``, ``"taken"`` or what went wrong, of a process that has ended."""
        job.process.join()
        folder = self.folder(job.run)
        told = None
        with suppress(EOFError):
            told = job.connection.recv() if job.connection.poll() else None
        job.connection.close()
        if told == "taken":
            return "taken"
        if folder.state() == "complete":
            self._seconds.append(time.time() - job.begun)
            return ""
        if told is None:
            told = f"the process ended early, with exit code {job.process.exitcode}" + (
                ", killed by a signal (of a lack of memory?)" if (job.process.exitcode or 0) < 0 else ""
            )
            self._mark(folder, job.process.pid, told)
        log = folder.last_of("log.txt")
        return told + (f"; see {log}" if log else "")

    def _mark(self, folder: Folder, pid: int | None, error: str) -> None:
        """Mark the attempt of a process that could not do so itself."""
        last = folder.last_attempt()
        if last and read_json(last / "claim.json")["process"]["pid"] == pid:
            with suppress(OSError):
                write_json(last / "failure.json", {"error": error})

    def _tell_of(self, run: Run, error: str, count: str, left: str) -> None:
        if error:
            tell(f"{count} failed: {run.name}: {error}{left}")
            return
        result = self.folder(run).result()
        metrics = result["metrics"]
        shown = next((name for name in metrics if name.startswith("test/acc")), next(reversed(metrics)))
        tell(f"{count} {run.name}: {shown} {metrics[shown]:.4g}, {result['seconds']['training']:.0f} s{left}")

    def _left(self, waiting: Sequence[Run], working: Sequence[Working], jobs: int) -> str:
        """Return an estimate of the time left, as words."""
        progress = [self._progress(job) for job in working]
        now = time.time()
        guesses = [(now - job.begun) / here for job, (_, here) in zip(working, progress, strict=True) if here]
        if not (self._seconds or guesses) or not (waiting or working):
            return ""
        each = fmean(self._seconds or guesses)
        runs = len(waiting) + sum(1 - share for share, _ in progress)
        return f"; about {duration(each * runs / min(jobs, len(waiting) + len(working)))} left"

    def _progress(self, job: Working) -> tuple[float, float]:
        """Return how much of its training a run has done, and how much of it in this attempt."""
        path = self.folder(job.run).last_of("progress.json")
        if path is None:
            return 0.0, 0.0
        progress = read_json(path, "share", "begun at")
        return progress["share"], progress["share"] - progress["begun at"]


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
