"""What a sweep will take: a few steps of each setting are timed, in a process of its own as its runs will be."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LambdaCallback
from typing_extensions import override

from benchmarks.engine import Local, duration
from benchmarks.folder import Folder
from benchmarks.machine import peak_memory
from benchmarks.perform import Task, arguments, in_a_line, parse_alone, share
from benchmarks.program import Progress, parse_program
from benchmarks.report import table
from benchmarks.sweep import Sweep, quietly
from tying.errors import ConfigurationError

STEPS = 8
LEAST = 5.0  # seconds after which fewer steps are enough


class EnoughError(Exception):
    """Enough has been timed."""


class Rehearsal(Progress):
    """The progress of a run that ends as soon as it is clear how long it takes."""

    seconds = 0.0  # of a whole run
    _steps = 0

    @override
    def tell(self, share: float) -> None:
        whole = self.expected(share)
        passed = (whole or 0.0) * (share - self.begun_at)
        if not self._steps and passed < LEAST:
            self.begin(share)  # what the first step prepares, it prepares once
        elif whole is not None:
            self.seconds = whole
        self._steps += 1
        if self.seconds and (self._steps > STEPS or passed > LEAST):
            raise EnoughError


def measure(task: Task) -> tuple[float, int]:
    """Return the seconds that a run trains, but for validation, and the most bytes it holds.

    Raises:
        ConfigurationError: something went wrong.
    """
    torch.set_num_threads(task.threads)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as out, quietly(), suppress(EnoughError):
            folder = Path(out)
            rehearsal, given = Rehearsal(Folder(folder)), arguments(task.run, folder, task.data)
            if task.run.program:
                program, settings, _ = parse_program(task.run.program, given)
                program(rehearsal, **settings)
            else:
                after_step = LambdaCallback(on_train_batch_end=lambda trainer, *_: rehearsal.tell(share(trainer)))
                cli = parse_alone(folder, given, after_step)
                cli.trainer.fit(cli.model, cli.datamodule)
    except Exception as error:
        raise ConfigurationError(f"{task.run.setting}: {in_a_line(error)}") from None
    return rehearsal.seconds or time.perf_counter() - start, peak_memory()


def plan(sweep: Sweep, workers: Local) -> str:
    """Return a table of how long the runs that are not complete will take, and of the memory they need.

    Raises:
        ConfigurationError: a setting cannot be trained.
    """
    todo = [run for run in sweep.runs if sweep.folder(run).state() != "complete"]
    if not todo:
        return f"all {len(sweep.runs)} runs are complete"
    count = Counter(run.setting for run in todo)
    first = {run.setting: run for run in reversed(todo)}
    futures = {setting: workers.call(measure, sweep.task(first[setting], workers.threads)) for setting in count}
    measured = {setting: future.result() for setting, future in futures.items()}
    hours = {setting: count[setting] * seconds / 3600 for setting, (seconds, _) in measured.items()}
    rows = [
        [setting, str(count[setting]), duration(seconds), f"{hours[setting]:.2f}", f"{peak / 2**20:.0f}"]
        for setting, (seconds, peak) in measured.items()
    ]
    slots = min(workers.slots, len(todo))
    memory = slots * max(peak for _, peak in measured.values()) / 2**30
    return (
        f"{table(['setting', 'runs', 'a run', 'hours', 'peak MiB'], rows)}\n\n"
        f"{len(todo)} run{'s' * (len(todo) > 1)}, {slots} at a time: {sum(hours.values()) / slots:.2f} h "
        f"and {memory:.1f} GiB, without validation and test."
    )
