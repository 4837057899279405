"""Do the runs of a sweep, several at a time, together with whoever else works in the same folder."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from signal import SIG_IGN, SIGINT, SIGKILL, signal
from statistics import fmean
from typing import Any, Self, TypeVar

from benchmarks.perform import TAKEN, Task, in_a_line, work
from benchmarks.suite import Run
from benchmarks.sweep import Sweep
from tying.errors import ConfigurationError

POLL = 0.5  # seconds between looks at what other processes do
REPORT = 30.0  # seconds between lines on the progress, where nothing else happens
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.perform"])
Result = TypeVar("Result")


class Local:
    """Where runs are done: here, ``jobs`` at a time, each in a process with its part of the processor's cores."""

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise ConfigurationError(f"jobs must be 1 or more, not {jobs}")
        self.slots = self.ahead = jobs  # runs at a time, and those that may be submitted
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self._pool: Executor = ThreadPoolExecutor(jobs)
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, task: Task) -> Future[Any]:
        """Submit a run; its future is for :meth:`outcome`."""
        return self._pool.submit(work_apart, task, self._goes_on)

    def outcome(self, task: Task, future: Future[Any]) -> str:
        """Return what went wrong in a run that is done, if anything did, or ``TAKEN``."""
        return str(future.result())

    def call(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        """Call a function where a run would be done."""
        return self._pool.submit(apart, function, task, self._goes_on)

    def _goes_on(self) -> bool:
        return not self._stopped.is_set()


def work_apart(task: Task, goes_on: Callable[[], bool]) -> str:
    """Do a run in a process of its own; return what went wrong, if anything did."""
    try:
        return apart(work, task, goes_on)
    except ConfigurationError as error:
        return str(error)


def apart(function: Callable[[Task], Result], task: Task, goes_on: Callable[[], bool]) -> Result:
    """Call a function in a process that lives no longer than this one, and only while ``goes_on`` returns True.

    Raises:
        ConfigurationError: the process was killed.
    """
    with ProcessPoolExecutor(1, CONTEXT, initializer=_end_with_parent) as pool:
        pid = pool.submit(os.getpid)
        future = pool.submit(function, task)
        while True:
            try:
                return future.result(POLL)
            except TimeoutError:
                if not goes_on():
                    with suppress(ProcessLookupError):
                        os.kill(pid.result(), SIGKILL)
            except BrokenProcessPool:
                raise ConfigurationError("its process was killed by a signal (of a lack of memory?)") from None


def _end_with_parent() -> None:
    signal(SIGINT, SIG_IGN)  # the parent ends its children
    if parent := parent_process():
        threading.Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


@dataclass
class Performance:
    """The runs of a sweep on their way."""

    sweep: Sweep
    workers: Local
    retry: int = 0  # how many more times a run is tried that failed
    _failed: dict[str, str] = field(default_factory=dict)  # why, by name
    _waiting: deque[Run] = field(default_factory=deque)
    _working: dict[Future[Any], Task] = field(default_factory=dict)
    _complete: int = 0
    _seconds: list[float] = field(default_factory=list)

    def perform(self) -> dict[str, str]:
        """Do all runs that nobody has done, wait for those that others do; return why those failed that failed."""
        folder = self.sweep.folder
        self._waiting.extend(sorted(self.sweep.runs, key=lambda run: folder(run).state() != "complete"))
        failures: Counter[str] = Counter()
        reported = time.monotonic()
        while self._waiting or self._working:
            for _ in range(len(self._waiting)):
                if len(self._working) < self.workers.ahead:
                    self._start(self._waiting.popleft())
            if not self._working:
                time.sleep(POLL)
            for future in wait(self._working, POLL, FIRST_COMPLETED).done:
                task = self._working.pop(future)
                error = self.workers.outcome(task, future)
                failures[task.run.name] += bool(error and error != TAKEN)
                if error == TAKEN or (error and failures[task.run.name] <= self.retry):
                    self._waiting.append(task.run)
                self._finish(task, error)
            if time.monotonic() - reported > REPORT:
                reported = time.monotonic()
                self._report()
        return self._failed

    def _start(self, run: Run) -> None:
        """Submit a run, unless it is done, or another process does it."""
        folder = self.sweep.folder(run)
        state = folder.state()
        if state == "damaged":
            self._fail(run, f"{folder.damage()}. Remove the run's folder to do it again")
        elif conflict := folder.conflict(self.sweep.definition(run)):
            self._fail(run, conflict)
        elif state == "complete":
            self._complete += 1
        elif state == "running":
            self._waiting.append(run)
        else:
            task = self.sweep.task(run, self.workers.threads)
            try:
                self._working[self.workers.submit(task)] = task
            except OSError as error:
                self._fail(run, in_a_line(error))

    def _finish(self, task: Task, error: str) -> None:
        if error and error != TAKEN:
            log = task.folder.path / "log.txt"
            self._fail(task.run, error + (f"; see {log}" if log.exists() else ""))
        elif not error:
            self._failed.pop(task.run.name, None)  # in an earlier attempt
            self._complete += 1
            result = task.folder.result()
            metrics, seconds = result["metrics"], result["seconds"]
            self._seconds.append(seconds["last attempt"])
            shown = next((name for name in metrics if name.startswith("test/acc")), next(reversed(metrics)))
            self._tell(f"{task.run.name}: {shown} {metrics[shown]:.4g}, {seconds['training']:.0f} s")

    def _fail(self, run: Run, error: str) -> None:
        self._failed[run.name] = error
        self._tell(f"failed: {run.name}: {error}")

    def _report(self) -> None:
        """Print how far each run is that is on its way."""
        self._tell(f"{len(self._working)} running")
        for task in self._working.values():
            if progress := task.folder.progress():
                print(f"  {task.run.name}: {in_words(progress)}", flush=True)

    def _tell(self, news: str) -> None:
        """Print news, how many runs are complete, and about how long the others take."""
        known = [progress for task in self._working.values() if (progress := task.folder.progress()).get("left")]
        lefts = [progress["left"] for progress in known]
        guesses = self._seconds or [progress["left"] / (1 - progress["share"]) for progress in known]
        unknown = len(self._waiting) + len(self._working) - len(lefts)
        seconds = sum(lefts) + unknown * fmean(guesses or [0.0])
        left = f"; about {duration(seconds / min(self.workers.slots, unknown + len(lefts)))} left" if seconds else ""
        print(f"[{self._complete}/{len(self.sweep.runs)}] {news}{left}", flush=True)


def in_words(progress: dict[str, Any]) -> str:
    """Return how far a run is, in a line.

    Example:
        >>> in_words({"share": 0.25, "epoch": 3, "loss": 0.52, "left": 600.0})
        'epoch 3, loss 0.52, 25 %, about 10 min left'
    """
    parts = [f"{key} {progress[key]:.4g}" for key in ("epoch", "step", "loss") if progress.get(key) is not None]
    left = [f"about {duration(progress['left'])} left"] if progress["left"] is not None else []
    return ", ".join([*parts, f"{progress['share']:.0%}".replace("%", " %"), *left])


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
