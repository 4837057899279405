"""Do the runs of a suite, several at a time, together with whoever else works in the same folder."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.folder import Folder, read_json, write_json
from benchmarks.perform import in_a_line, work
from benchmarks.suite import Run, Suite
from tying.cli import parse
from tying.errors import ConfigurationError

POLL = 0.5  # seconds between looks at what other processes do
TELL = 30.0  # seconds between lines on the progress, where nothing else happens


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
        tell: what to do with a line on the progress.
    """

    suite: Suite
    runs: Sequence[Run]
    out: Path
    overrides: Sequence[str] = ()
    data: Sequence[str] = ()
    label: str = "configured"
    tell: Callable[[str], object] = print
    seconds: list[float] = field(default_factory=list)  # of the runs done here

    @property
    def name(self) -> str:
        """The suite's name, and the data's where it is not what the suite says."""
        return self.suite.name + (f"@{self.label}" if self.data else "")

    def folder(self, run: Run) -> Folder:
        """Return the folder of a run."""
        return Folder(self.out / run.name)

    def definition(self, run: Run) -> dict[str, Any]:
        """Return what makes a run the run it is: a folder that holds another one's results is left alone."""
        return {"layers": run.definition, "data": self.label}

    def check(self) -> None:
        """Refuse folders that hold results of another definition.

        Raises:
            ConfigurationError: there are some; the first is told, with what differs.
        """
        conflicts = []
        for run in self.runs:
            folder = self.folder(run)
            found = None if folder.damage() else folder.definition()
            if found is not None and found != self.definition(run):
                conflicts.append(f"{folder.path}: {difference(found, self.definition(run))}")
        if conflicts:
            more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
            raise ConfigurationError(
                f"there are results of another definition in {conflicts[0]}{more}. Give another --out, or remove them"
            )

    def check_configurations(self) -> None:
        """Refuse configurations that the command line would refuse, before anything is started.

        Raises:
            ConfigurationError: one of them is wrong; it is named.
        """
        seen: set[str] = set()
        for run in self.runs:
            if run.setting in seen:
                continue
            seen.add(run.setting)
            try:
                parse([*run.arguments, *self.data])
            except Exception as error:
                raise ConfigurationError(f"{run.setting}: {in_a_line(error)}") from error

    def perform(self, jobs: int = 1) -> dict[str, str]:
        """Do all runs that nobody has done, several at a time; return why those failed that failed, by name.

        Each is tried once. Runs that another process works on are waited for, and taken over if it dies.
        """
        waiting = list(self.runs)
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
                    if state == "complete":
                        complete += 1
                    elif state == "damaged":
                        failed[run.name] = f"{self.folder(run).damage()}. Remove the run's folder to do it again"
                        self.tell(f"damaged: {run.name}: {failed[run.name]}")
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
                    self.tell(f"[{complete}/{len(self.runs)}] {len(working)} running{others}{left}")
        finally:
            for left_over in working:
                left_over.process.kill()
                left_over.process.join()
        return failed

    def _start(self, run: Run, context: Any, jobs: int) -> Working:
        receiver, sender = context.Pipe(duplex=False)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        arguments = [*run.arguments, *self.data, "--trainer.enable_progress_bar=false"]
        given = (sender, self.folder(run), self.definition(run), arguments, threads)
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
            self.seconds.append(time.time() - job.begun)
            return ""
        if told is None:
            told = f"the process ended with exit code {job.process.exitcode}" + (
                ", killed by a signal (of a lack of memory?)" if (job.process.exitcode or 0) < 0 else ""
            )
            self._mark(folder, job.process.pid, told)
        last = folder.last_attempt()
        return told + (f"; see {last / 'log.txt'}" if last and (last / "log.txt").exists() else "")

    def _mark(self, folder: Folder, pid: int | None, error: str) -> None:
        """Mark the attempt of a process that could not do so itself."""
        last = folder.last_attempt()
        if last and read_json(last / "claim.json")["process"]["pid"] == pid:
            with suppress(OSError):
                write_json(last / "failure.json", {"error": error})

    def _tell_of(self, run: Run, error: str, count: str, left: str) -> None:
        if error:
            self.tell(f"{count} failed: {run.name}: {error}{left}")
            return
        result = self.folder(run).result()
        metrics = result["metrics"]
        shown = next((name for name in metrics if name.startswith("test/acc")), next(reversed(metrics)))
        self.tell(f"{count} {run.name}: {shown} {metrics[shown]:.4g}, {result['seconds']['training']:.0f} s{left}")

    def _left(self, waiting: Sequence[Run], working: Sequence[Working], jobs: int) -> str:
        """Return an estimate of the time left, as words."""
        shares = [self._share(job) for job in working]
        guesses = [(time.time() - job.begun) / share for job, share in zip(working, shares, strict=True) if share]
        if not (self.seconds or guesses) or not (waiting or working):
            return ""
        each = fmean(self.seconds or guesses)
        runs = len(waiting) + sum(1 - share for share in shares)
        return f"; about {duration(each * runs / min(jobs, len(waiting) + len(working)))} left"

    def _share(self, job: Working) -> float:
        """Return how much of its training a run has done."""
        last = self.folder(job.run).last_attempt()
        path = None if last is None else last / "progress.json"
        return float(read_json(path)["share"]) if path and path.exists() else 0.0


def difference(there: Any, here: Any, place: str = "") -> str:
    """Return the first difference of two nested structures, in words.

    Example:
        >>> difference({"data": {"seed": 0}}, {"data": {"seed": 1}})
        'data.seed is 0 there and 1 here'
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key) or (key in there) != (key in here):
                return difference(there.get(key), here.get(key), f"{place}.{key}".removeprefix("."))
    if isinstance(there, list) and isinstance(here, list):
        for number, (one, other) in enumerate(zip_longest(there, here)):
            if one != other:
                return difference(one, other, f"{place}[{number}]")
    return f"{place or 'it'} is {there!r} there and {here!r} here"


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
