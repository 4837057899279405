"""One run of a suite: train, test, and leave what came out in its folder."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.folder import HEARTBEAT, Folder, touch
from benchmarks.json_files import read_json, write_json
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

LONGEST = 2000  # characters of an error: a pipe holds it


@dataclass
class Record(Checkpoint):  # Lightning calls checkpoints last, after the module's own hooks have logged
    """What was logged in each epoch, and what the epoch took; kept in checkpoints.

    Args:
        folder: of the run.
        attempt: the attempt's own folder, where a file says which share of the training is done.
    """

    folder: Folder
    attempt: Path
    rows: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "peak": self.peak}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.peak = list(state_dict["rows"]), state_dict["peak"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun_at = _share(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._start_of_processor = time.perf_counter(), time.process_time()
        self._stale = dict(trainer.callback_metrics)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.keep_claim(self.attempt)
        logged = trainer.callback_metrics.items()  # also those of earlier epochs: the very same tensors
        metrics = {name: float(value) for name, value in logged if value is not self._stale.get(name)}
        passed = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        seconds = {
            "seconds": time.perf_counter() - self._start,
            "processor seconds": time.process_time() - self._start_of_processor,
        }
        self.rows.append({**passed, **seconds, **metrics})
        self.peak = max(self.peak, peak_memory())
        write_json(self.attempt / "progress.json", {"share": _share(trainer), "begun at": self._begun_at})


def begin(folder: Folder, definition: dict[str, Any], threads: int) -> Path | None:
    """Claim the run of a folder; return the attempt's own folder, or ``None`` if another process was faster.

    Args:
        folder: of the run.
        definition: what makes the run the run it is.
        threads: of computation; a run that goes on keeps the number it began with, since sums depend on it.
    """
    if attempts := folder.claimed_attempts():
        threads = read_json(attempts[0] / "claim.json").get("threads", threads)
    return folder.claim({"definition": definition, "threads": threads})


def finish(folder: Folder, attempt: Path, run: Run, data: Sequence[str] = ()) -> None:
    """Do the run of a folder, from its newest checkpoint if it has one.

    The configuration's own checkpoints and logger are left out: a run keeps one checkpoint, of the last epoch's end,
    so that also the metrics averaged over an epoch come out the same after an interruption. The state of random
    generators is kept in it, whether the configuration says so or not.

    Args:
        folder: of the run.
        attempt: what :func:`begin` returned.
        run: what to do.
        data: arguments that say where the data is.

    Raises:
        Exception: whatever goes wrong; the attempt is then marked as failed.
    """
    stopped = threading.Event()
    threading.Thread(target=_beat, args=(attempt, stopped), daemon=True).start()
    try:
        _finish(folder, attempt, run, data)
    except Exception as error:
        with suppress(OSError):  # the disk may be what is wrong
            write_json(attempt / "failure.json", {"error": in_a_line(error)})
        raise
    finally:
        stopped.set()


def work(
    connection: Connection, folder: Folder, definition: dict[str, Any], run: Run, data: Sequence[str], threads: int
) -> None:
    """Begin and finish a run in a process of its own; send what came of it: ``"taken"``, ``""`` or an error."""
    signal(SIGINT, SIG_IGN)  # the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        attempt = begin(folder, definition, threads)
        if attempt is not None:
            log = os.open(attempt / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, sys.stdout.fileno())
            os.dup2(log, sys.stderr.fileno())
            finish(folder, attempt, run, data)
        connection.send("taken" if attempt is None else "")
    except Exception as error:
        connection.send(in_a_line(error))
        with suppress(OSError):
            traceback.print_exc()


def in_a_line(error: Exception) -> str:
    """Return what went wrong, without line breaks."""
    told = explain(error) or f"{type(error).__name__}: {error}"
    return shorten(told, LONGEST)


def arguments(run: Run, folder: Path, data: Sequence[str] = ()) -> list[str]:
    """Return a run on the command line, in one process and without a progress bar; its files go to ``folder``."""
    if run.program:
        return [*run.arguments(folder), *data]
    alone = ["--trainer.devices=1", "--trainer.num_nodes=1"]  # where the configuration does not say
    return [*alone, *run.arguments(folder), *data, "--trainer.enable_progress_bar=false"]


def _finish(folder: Folder, attempt: Path, run: Run, data: Sequence[str]) -> None:
    begun = time.perf_counter()
    claim = read_json(attempt / "claim.json")
    torch.set_num_threads(claim["threads"])
    given = arguments(run, attempt / "configs", data)
    outcome = _call(folder, attempt, run.program, given) if run.program else _train_and_test(folder, attempt, given)
    unique, virtual = count_parameters(outcome.model)
    result = {
        "name": folder.name,
        "definition": claim["definition"],
        "exit": "complete",
        "metrics": {name: value for row in outcome.rows for name, value in row.items()} | {**outcome.metrics},
        "data": outcome.data,
        "machine": machine(),
        "parameters": {"unique": unique, "virtual": virtual, "bytes": stored_bytes(outcome.model.state_dict())},
        "seconds": {
            "training": sum(row["seconds"] for row in outcome.rows),
            **({} if run.program else _of_epochs(outcome.rows)),
            "last attempt": time.perf_counter() - begun,
            "testing": outcome.testing,
        },
        "peak_memory": max(outcome.peak, peak_memory()),
        "attempts": len(folder.attempts()),
        "finished": time.time(),
    }
    folder.keep_claim(attempt)
    write(folder.path / "config.yaml", outcome.config)
    write_csv(folder.path / "metrics.csv", outcome.rows)
    write_json(folder.path / "result.json", result)
    for earlier in folder.attempts():
        if int(earlier.name) < int(attempt.name):
            shutil.rmtree(earlier / "checkpoints", ignore_errors=True)


def _call(folder: Folder, attempt: Path, path: str, given: Sequence[str]) -> Outcome:
    program, settings, config = parse_program(path, given)
    outcome = program(Progress(folder, attempt), **settings)
    if not outcome.rows:
        raise ConfigurationError(f"program {path!r} has logged nothing")
    return replace(outcome, config=config)


def _train_and_test(folder: Folder, attempt: Path, given: Sequence[str]) -> Outcome:
    cli = parse(given)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    record = Record(folder, attempt)
    epochs = ModelCheckpoint(attempt / "checkpoints", "{epoch}", save_top_k=1, save_on_train_epoch_end=True)
    kept = [callback for callback in callbacks_of(trainer) if not isinstance(callback, Checkpoint)]
    kept += [] if any(isinstance(callback, RandomState) for callback in kept) else [RandomState()]
    callbacks_of(trainer)[:] = [*kept, record, epochs]
    trainer.logger = CSVLogger(attempt, name="logs", version="")
    trainer.fit(model, data, ckpt_path=newest_intact(folder.checkpoints()))
    fitted = time.perf_counter()
    if not record.rows:
        raise ConfigurationError("the configuration trains for no epoch")
    metrics: dict[str, float] = {}
    if is_overridden("test_step", model):
        seed_everything(int(cli.config.get("seed_everything") or 0), verbose=False)  # whatever was drawn before
        for tested in trainer.test(model, data, verbose=False):
            metrics |= tested
    return Outcome(
        record.rows,
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


def _share(trainer: pl.Trainer) -> float:
    return float(min(1.0, trainer.global_step / trainer.estimated_stepping_batches))


def _beat(attempt: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT):
        with suppress(OSError):
            touch(attempt)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
