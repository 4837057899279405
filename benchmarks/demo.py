"""Untied and softly tied, side by side, on real images."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
from matplotlib.figure import Figure
from typing_extensions import override

from benchmarks.machine import describe, supports_bf16
from benchmarks.report import ROOT, table, write
from tying import TiedGroup, resolve
from tying.atomic import atomically
from tying.callbacks import SoftTying
from tying.callbacks.base import callbacks_of
from tying.cli import parse
from tying.names import count_parameters
from tying.soft import gap

RUNS = {"untied": [], "soft": ["soft.yaml"]}


@dataclass
class Record(pl.Callback):
    """Seconds, validation accuracy and gap of each epoch."""

    ties: SoftTying
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
        self.gaps.append(largest_gap(resolve(pl_module, self.ties.ties)))


def largest_gap(groups: list[TiedGroup]) -> float:
    """Return the gap of the group whose members are furthest apart."""
    return max(gap(group.tensors()) for group in groups)


def run(out: Path, overrides: list[str]) -> str:
    """Train each run, write its curves as CSV and PNG to ``out``, and return the table as Markdown."""
    base = ["base.yaml", *(["bf16.yaml"] if supports_bf16() else [])]
    arguments = {
        name: [f"--config={ROOT / 'configs' / file}" for file in [*base, *deltas]] for name, deltas in RUNS.items()
    }
    soft = parse([*arguments["soft"], *overrides]).trainer
    [ties] = [callback for callback in callbacks_of(soft) if isinstance(callback, SoftTying)]
    rows, records = [], {}
    for name in RUNS:
        cli = parse([*arguments[name], f"--trainer.logger.save_dir={out}", *overrides])
        record = records[name] = Record(ties)
        callbacks_of(cli.trainer).append(record)
        print(f"\n{name}: {cli.trainer.max_epochs} epochs, {cli.trainer.precision}", flush=True)
        cli.trainer.fit(cli.model, cli.datamodule)
        [tested] = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        unique, virtual = count_parameters(cli.model)
        figures = [f"{tested['test/accuracy']:.4f}", f"{record.gaps[-1]:.4f}", f"{unique:,}", f"{virtual:,}"]
        rows.append([name, *figures, f"{sorted(record.seconds)[len(record.seconds) // 2]:.1f}"])
    _write_curves(records, out)
    network, depth = type(cli.model.network).__name__, cli.config.model.init_args.network.init_args.depth
    trained = f"{cli.trainer.max_epochs} epochs, {cli.trainer.precision}"
    once = f"one run each, seed {cli.config.seed_everything}"
    settings = f"{network}-{depth}, {cli.datamodule.description}, {trained}; {once}. {describe()}."
    header = ["run", "test accuracy", "tie gap", "unique parameters", "virtual parameters", "s / epoch"]
    return "\n".join([table(header, rows), "", settings])


def _write_curves(records: dict[str, Record], out: Path) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", "epoch", "seconds", "val/accuracy", "tying/gap"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, gaps = figure.subplots(1, 2)
    for name, record in records.items():
        epochs = range(1, len(record.gaps) + 1)
        rows.writerows([name, *row] for row in zip(epochs, record.seconds, record.accuracy, record.gaps, strict=True))
        accuracy.plot(epochs, record.accuracy, label=name, marker=".")
        gaps.plot(epochs, record.gaps, label=name, marker=".")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy")
    gaps.set(xlabel="epoch", ylabel="largest gap of a group", ylim=(0, None))
    accuracy.legend()
    write(out / "demo.csv", text.getvalue())
    with atomically(out / "demo.png") as aside:
        figure.savefig(aside, format="png", dpi=120)
