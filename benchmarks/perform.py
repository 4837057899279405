"""One run of a suite: train, test, and leave what came out in its folder."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import Timeout
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.folder import Folder
from benchmarks.json_files import write_json
from benchmarks.machine import machine, peak_memory
from benchmarks.program import Outcome, Progress, parse_program
from benchmarks.report import write, write_csv
from benchmarks.suite import Run
from tying.callbacks import RandomState
from tying.cli import parse
from tying.cli.errors import explain
from tying.errors import ConfigurationError
from tying.files import newest_intact
from tying.lightning_workarounds import callbacks_of
from tying.weights.derived import count_parameters

LONGEST = 2000  # characters of an error
TAKEN = "another process works on it"


@dataclass(frozen=True)
class Task:
    """What the process of a run needs to know."""

    folder: Folder
    run: Run
    definition: dict[str, Any]  # what makes the run the run it is
    data: Sequence[str]  # arguments that say where the data is
    threads: int  # of computation


@dataclass
class Record(Checkpoint):  # Lightning calls checkpoints last, after the module's own hooks have logged
    """What was logged in each epoch, and what the epoch took; kept in checkpoints."""

    progress: Progress
    peak: int = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.progress.rows], "peak": self.peak}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.progress.rows, self.peak = list(state_dict["rows"]), state_dict["peak"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.begin(share(trainer))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._start_of_processor = time.perf_counter(), time.process_time()
        self._stale = dict(trainer.callback_metrics)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = trainer.callback_metrics.items()  # also those of earlier epochs: the very same tensors
        metrics = {name: float(value) for name, value in logged if value is not self._stale.get(name)}
        passed = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        seconds, processor = time.perf_counter() - self._start, time.process_time() - self._start_of_processor
        self.progress.rows.append({**passed, "seconds": seconds, "processor seconds": processor, **metrics})
        self.peak = max(self.peak, peak_memory())
        self.progress.tell(share(trainer))


def work(task: Task) -> str:
    """Do a run in a process of its own, which logs to the folder; return what went wrong, if anything did."""
    try:
        task.folder.path.mkdir(parents=True, exist_ok=True)
        log = os.open(task.folder.path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        return "" if perform(task) else TAKEN
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()
        return in_a_line(error)


def perform(task: Task) -> bool:
    """Do a run, from its newest checkpoint if it has one; return False if another process works on it.

    The configuration's own checkpoints and logger are left out: a run keeps one checkpoint, of the last epoch's end,
    so that also the metrics averaged over an epoch come out the same after an interruption. The state of random
    generators is kept in it, whether the configuration says so or not.

    Raises:
        Exception: whatever goes wrong; the run is then marked as failed.
    """
    folder = task.folder
    try:
        lock = folder.lock().acquire()
    except Timeout:
        return False
    with lock:
        try:
            if not folder.is_complete():
                begun = folder.begin(task.definition, task.threads)
                _finish(task, begun["threads"], begun["attempts"])
        except Exception as error:
            with suppress(OSError):  # the disk may be what is wrong
                write_json(folder.path / "failure.json", {"error": in_a_line(error)})
            raise
    return True


def in_a_line(error: Exception) -> str:
    """Return what went wrong, without line breaks."""
    return shorten(explain(error) or f"{type(error).__name__}: {error}", LONGEST)


def arguments(run: Run, folder: Path, data: Sequence[str] = ()) -> list[str]:
    """Return a run on the command line, in one process and without a progress bar; its files go to ``folder``."""
    if run.program:
        return [*run.arguments(folder), *data]
    alone = ["--trainer.devices=1", "--trainer.num_nodes=1"]  # where the configuration does not say
    return [*alone, *run.arguments(folder), *data, "--trainer.enable_progress_bar=false"]


def _finish(task: Task, threads: int, attempts: int) -> None:
    folder, program = task.folder, task.run.program
    begun = time.perf_counter()
    torch.set_num_threads(threads)
    given = arguments(task.run, folder.path / "configs", task.data)
    if program:
        function, settings, config = parse_program(program, given)
        outcome = replace(function(Progress(folder), **settings), config=config)
    else:
        outcome = _train_and_test(folder, given)
    if not outcome.rows:
        raise ConfigurationError(f"program {program!r} has logged nothing" if program else "it trains for no epoch")
    unique, virtual = count_parameters(outcome.model)
    result = {
        "name": folder.name,
        "definition": task.definition,
        "exit": "complete",
        "metrics": {name: value for row in outcome.rows for name, value in row.items()} | {**outcome.metrics},
        "data": outcome.data,
        "machine": machine(),
        "parameters": {"unique": unique, "virtual": virtual, "bytes": stored_bytes(outcome.model.state_dict())},
        "seconds": {
            "training": sum(row["seconds"] for row in outcome.rows),
            **({} if program else _of_epochs(outcome.rows)),
            "last attempt": time.perf_counter() - begun,
            "testing": outcome.testing,
        },
        "peak_memory": max(outcome.peak, peak_memory()),
        "attempts": attempts,
        "finished": time.time(),
    }
    write(folder.path / "config.yaml", outcome.config)
    write_csv(folder.path / "metrics.csv", outcome.rows)
    write_json(folder.path / "result.json", result)
    newest = newest_intact(folder.checkpoints())
    for checkpoint in folder.checkpoints():
        if checkpoint != newest:
            checkpoint.unlink()


def parse_alone(folder: Path, given: Sequence[str], *callbacks: pl.Callback) -> LightningCLI:
    """Return what a configuration makes, with other callbacks in place of its checkpoints and a log in ``folder``."""
    cli = parse(given)
    kept = [callback for callback in callbacks_of(cli.trainer) if not isinstance(callback, Checkpoint)]
    kept += [] if any(isinstance(callback, RandomState) for callback in kept) else [RandomState()]
    callbacks_of(cli.trainer)[:] = [*kept, *callbacks]
    cli.trainer.logger = CSVLogger(folder, name="logs", version="")
    return cli


def _train_and_test(folder: Folder, given: Sequence[str]) -> Outcome:
    record = Record(Progress(folder))
    epochs = ModelCheckpoint(folder.path / "checkpoints", "{epoch}", save_top_k=1, save_on_train_epoch_end=True)
    cli = parse_alone(folder.path, given, record, epochs)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    trainer.fit(model, data, ckpt_path=newest_intact(folder.checkpoints()))
    fitted = time.perf_counter()
    metrics: dict[str, float] = {}
    if is_overridden("test_step", model):
        seed_everything(int(cli.config.get("seed_everything") or 0), verbose=False)  # whatever was drawn before
        for tested in trainer.test(model, data, verbose=False):
            metrics |= tested
    return Outcome(
        record.progress.rows,
        metrics,
        model,
        {"description": getattr(data, "description", type(data).__name__), "key": getattr(data, "key", None)},
        cli.parser.dump(cli.config, skip_none=False),
        testing=time.perf_counter() - fitted,
        peak=record.peak,
    )


def _of_epochs(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    seconds = sorted(row["seconds"] for row in rows)
    return {"epoch": seconds[len(seconds) // 2], "processor": sum(row["processor seconds"] for row in rows)}


def stored_bytes(state: object) -> int:
    """Return the bytes of the tensors in a state, each storage once: a tied weight costs nothing, an index does.

    Example:
        >>> weight = torch.zeros(10)
        >>> stored_bytes({"weight": weight, "tied": weight, "extra": {"index": torch.zeros(3, dtype=torch.uint8)}})
        43
    """
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def share(trainer: pl.Trainer) -> float:
    """Return which share of its training a run has done."""
    return float(min(1.0, trainer.global_step / trainer.estimated_stepping_batches))
