"""Measure the bytes of finished runs' models anew, from their configurations: nothing is trained again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from benchmarks.experiment import quietly
from benchmarks.json_files import write_json
from benchmarks.perform import arguments, stored_bytes
from benchmarks.report import table
from benchmarks.suite import Run
from benchmarks.sweep import Sweep
from tying.callbacks.transform import ModelTransform
from tying.cli import parse
from tying.errors import ConfigurationError
from tying.lightning_workarounds import callbacks_of
from tying.weights.derived import count_parameters


def remeasure(sweep: Sweep) -> str:
    """Write into the results of complete runs how many bytes their models' states have; return a table of changes.

    A model that training itself changes, such as one whose weights are clustered late, is not what its configuration
    builds. Its numbers of parameters differ, and its result stays as it is.

    Raises:
        ConfigurationError: no run is complete, or the suite's models are made by a program.
    """
    if sweep.suite.program:
        raise ConfigurationError(
            f"suite {sweep.name}: {sweep.suite.program} makes its models, and reports their bytes when it runs"
        )
    complete = [run for run in sweep.runs if sweep.folder(run).state() == "complete"]
    if not complete:
        raise ConfigurationError(f"no run of suite {sweep.name} is complete in {sweep.out}")
    rows = []
    for run in complete:
        folder = sweep.folder(run)
        result = folder.result()
        kept = result["parameters"]
        with quietly():
            unique, virtual, stored = size(run, sweep.data)
        same = (unique, virtual) == (kept["unique"], kept["virtual"])
        if same and kept.get("bytes") != stored:
            write_json(folder.path / "result.json", {**result, "parameters": {**kept, "bytes": stored}})
        if not same or kept.get("bytes") != stored:
            said = f"{stored:,}" if same else "kept: training changed the model"
            rows.append([run.name, f"{kept['bytes']:,}" if "bytes" in kept else "–", said])
    return table(["run", "bytes before", "bytes"], rows) if rows else f"all {len(complete)} runs have the same bytes"


def size(run: Run, data: Sequence[str] = ()) -> tuple[int, int, int]:
    """Return the parameters that a run's model has of its own, those that it computes with, and the bytes it saves."""
    with tempfile.TemporaryDirectory() as folder:
        cli = parse(arguments(run, Path(folder), data))
    model: pl.LightningModule = cli.model
    model.configure_model()
    for callback in callbacks_of(cli.trainer):
        if isinstance(callback, ModelTransform):
            callback.apply(model)
    return *count_parameters(model), stored_bytes(model.state_dict())
