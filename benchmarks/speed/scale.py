"""What ties cost on several devices: measured on two processes, and reckoned for more from constants measured here."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from benchmarks.report import ROOT, table
from benchmarks.speed.timing import Race, Step, race
from tying import resolve
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError
from tying.hard import shard_groups
from tying.lightning_workarounds import callbacks_of
from tying.models import Classifier
from tying.soft import TyingPenalty, anchored
from tying.weights.derived import count_parameters

FAMILIES = {  # configurations on top of base.yaml
    "untied": [],
    "soft": ["soft.yaml"],
    "stage-shared": ["hard.yaml"],
    "hashed": ["hashing.yaml"],
    "low-rank": ["low_rank.yaml"],
    "stochastic depth": ["stochastic_depth.yaml"],
    "swapout": ["swapout.yaml"],
}
BATCH, STEPS, SKIPPED, ROUNDS = 64, 24, 4, 3  # per process; first steps do not count
WEIGHTS, SIDE = 16_777_216, 2048
MODEL, DEVICES = 7e9, (8, 64)
BANDWIDTH = 1e12  # bytes a second of the devices reckoned for


class StepTimes(pl.Callback):
    """Write how long steps took, and how many bytes of gradients the processes exchange in one.

    Args:
        path: of a file; written by the first process.
        skipped: how many of the first steps do not count.
    """

    def __init__(self, path: str, skipped: int) -> None:
        self.path, self.skipped = path, skipped
        self.times: list[float] = []

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = count_parameters(pl_module)[0]  # in all processes: it gathers what computes weights
        if trainer.is_global_zero:
            steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)][self.skipped :]
            Path(self.path).write_text(json.dumps({"seconds": statistics.median(steps), "bytes": 4 * trained}))


class Sharded(Classifier):
    """A Classifier of a ResNet whose blocks FSDP2 shards one by one, after the callbacks have changed them."""

    is_sharded = False

    @override
    def configure_model(self) -> None:
        if self.is_sharded:
            return
        self.is_sharded = True
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, ModelTransform):
                callback.apply(self)
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for modules in shard_groups(self.network, ["stem", "layer*.*", "head"]):
            fully_shard(modules, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def train(configs: list[str], processes: int, sharded: bool = False) -> dict[str, float]:
    """Return median seconds of a step and the bytes of its gradients, from a training run of the command line.

    Raises:
        ConfigurationError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        options = {
            "trainer.max_steps": STEPS,
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "cpu",
            "trainer.devices": processes,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.callbacks+": "benchmarks.speed.scale.StepTimes",
            "trainer.callbacks.path": told,
            "trainer.callbacks.skipped": SKIPPED,
            "model.channels_last": "false",  # FSDP2 does not take such weights
            "data.batch_size": BATCH,
            "data.validation": 0.0,
        }
        if sharded:
            options |= {
                "model": "benchmarks.speed.scale.Sharded",
                "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
                "trainer.strategy.data_parallel_size": processes,
                "trainer.strategy.tensor_parallel_size": 1,
            }
        command = [sys.executable, "-W", "ignore", "-m", "tying", "fit"]
        command += [f"--config={ROOT / 'configs' / name}" for name in ["base.yaml", *configs]]
        command += [f"--{key}={value}" for key, value in options.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if not told.exists():
            raise ConfigurationError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        found: dict[str, float] = json.loads(told.read_text())
        return found


def efficiency() -> list[list[str]]:
    """Return a row for each family: a step of one process, and of two by DDP and by FSDP2, beside twice the work."""
    rows = []
    for family, configs in FAMILIES.items():
        runs = [
            {"one": train(configs, 1), "DDP": train(configs, 2), "FSDP2": train(configs, 2, sharded=True)}
            for _ in range(ROUNDS)
        ]
        times = Race({way: [run[way]["seconds"] for run in runs] for way in runs[0]})
        steps = [cell for way in times.seconds for cell in times.row(way)]
        shares = [times.told("one", way) for way in ("DDP", "FSDP2")]
        rows.append([family, *steps, *shares, f"{runs[0]['one']['bytes'] / 1024:.0f}"])
    return rows


def constants() -> Race:
    """Return how long a copy of many weights takes, and each pull on all of them."""
    weights = [nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(WEIGHTS // SIDE**2)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    target = [torch.empty_like(weight) for weight in weights]
    model = nn.ParameterList(weights)
    half = len(weights) // 2
    tied = TyingPenalty(resolve(model, [f"{i} ~ {i + half}" for i in range(half)]))
    anchors = {str(i): torch.randn_like(weight) for i, weight in enumerate(weights)}
    pull = anchored({str(i): weight for i, weight in enumerate(weights)}, anchors)

    def copy() -> None:
        for weight, to in zip(weights, target, strict=True):
            to.copy_(weight.detach())

    sides: dict[str, Step] = {
        "copy": copy,
        "soft": lambda: tied.add_gradients_(1e-3),
        "anchor": lambda: pull.add_gradients_(1e-3),
    }
    return race(sides, races=5, rounds=3)


def reckoned(found: Race) -> list[list[str]]:
    """Return a row for each tie: what each of so many devices holds and exchanges, and what its pull takes."""
    # weights that are sharded, copies that are not, shards that a pull sends and receives, the pull
    kinds: dict[str, tuple[float, float, float, str | None]] = {
        "untied": (1.0, 0.0, 0.0, None),
        "soft ties of all weights": (1.0, 0.0, 0.0, "soft"),
        "soft ties of all weights to transposes": (1.0, 0.0, 1.0, "soft"),  # half of the weights, there and back
        "an anchor of all weights": (2.0, 0.0, 0.0, "anchor"),
        "hard ties of pairs": (0.5, 0.0, 0.0, None),
        "hashed at 1/16, index computed": (1 / 16, 0.0, 0.0, None),
        "hashed at 1/16, index of 4 bytes stored": (1 / 16, 1.0, 0.0, None),
    }
    rows = []
    for kind, (sharded, whole, sent, pull) in kinds.items():
        cells = [kind, "–" if pull is None else found.told(pull, "copy")]
        trained = min(sharded, 1.0)  # an anchor is never exchanged
        for devices in DEVICES:
            own = 4 * MODEL / devices
            copies = 0.0 if pull is None else statistics.median(found.ratios(pull, "copy"))
            cells += [
                f"{(sharded * own + whole * 4 * MODEL) / 2**30:.2f}",
                f"{(3 * trained + sent / devices) * 4 * MODEL * (devices - 1) / devices / 2**30:.1f}",
                f"{1e3 * copies * 2 * own / BANDWIDTH:.1f}",
            ]
        rows.append(cells)
    return rows


def measure() -> str:
    """Run all measurements, and return their tables as Markdown."""
    found = constants()
    by_devices = [f"{what}, {number} devices" for number in DEVICES for what in ("GiB held", "GiB exchanged", "ms")]
    return "\n\n".join(
        [
            f"Steps of ResNet-20 through `tying fit`, of one process and of two by DDP and by FSDP2, which shards each "
            f"block, each with a thread and {BATCH} images of its own; median of {ROUNDS} runs of {STEPS} steps "
            "(extremes). DDP sends the bytes of the gradients once a step, FSDP2 three times:",
            table(
                ["family", "ms, one", "ms, DDP", "ms, FSDP2", "efficiency", "efficiency, FSDP2", "KiB exchanged"],
                efficiency(),
            ),
            f"A model of {MODEL / 1e9:g} B fp32 weights, fully sharded (FSDP2) over so many devices, reckoned: weights "
            "held on each, without gradients and optimizer states; sent and received by each in a step, two "
            "all-gathers and a reduce-scatter; and what a pull takes, as a multiple of a copy of the weights, which is "
            f"measured here, on {WEIGHTS / 2**20:.0f} Mi of them, times that of a copy at {BANDWIDTH / 1e12:g} TB/s:",
            table(["tie", "/ copy", *by_devices], reckoned(found)),
            "A pull of plain ties adds no collective, since its weights are sharded alike; one through a transpose "
            "adds two, in each of which a device sends its shard of one side.",
        ]
    )
