"""What each feature costs in a training step of one network, over the step of the plain network."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.callbacks import LambdaCallback

from benchmarks.perform import parse_alone
from benchmarks.report import ROOT
from benchmarks.speed.timing import Race
from benchmarks.sweep import quietly

BATCH = 128
STEPS, SKIPPED, ROUNDS = 16, 4, 5  # first steps do not count
CONVOLUTIONS = '["network.layer*.*.branch.conv*.weight"]'
PLAIN = "plain"
FEATURES = {  # configurations on top of base.yaml, and further arguments
    PLAIN: [],
    "SoftTying, L2": ["soft.yaml"],
    "SoftTying, L1": ["soft_l1.yaml"],
    "SoftTying, Huber": ["soft_huber.yaml"],
    "AnchorTying": ["AnchorTying", "parameters=['network.**']", "strength=0.01"],
    "MixtureTying": ["MixtureTying", f"parameters={CONVOLUTIONS}", "strength=0.03", "start_epoch=0"],
    "HardTying": ["hard.yaml"],
    "RelaxedTying, rank 4": ["relaxed.yaml"],
    "LowRankWeights, rank 16": ["low_rank.yaml"],
    "TemplateWeights": ["templates.yaml"],
    "GeneratedWeights": ["generated.yaml"],
    "WeightHashing, uniform": ["hashing.yaml"],
    "WeightHashing, blocks": ["hash_block.yaml"],
    "WeightClustering": ["WeightClustering", f"parameters={CONVOLUTIONS}", "clusters=16", "start_epoch=0"],
    "StochasticDepth, batch": ["stochastic_depth.yaml"],
    "Swapout": ["swapout.yaml"],
    "SkipForward": ["skip_forward.yaml"],
    "blocks used again": ["recurrent.yaml"],
}


def arguments(feature: list[str]) -> list[str]:
    """Return a feature's training on the command line: a file, or a callback and its arguments."""
    given = [f"--config={ROOT / 'configs' / name}" for name in ["base.yaml", *feature] if name.endswith(".yaml")]
    if feature and not feature[0].endswith(".yaml"):
        given += [f"--trainer.callbacks+={feature[0]}", *(f"--trainer.callbacks.{key}" for key in feature[1:])]
    short = [f"--trainer.max_steps={STEPS}", "--trainer.enable_progress_bar=false"]
    short += ["--data.validation=0.0", f"--data.batch_size={BATCH}"]
    return [*given, *short]


def seconds_of_step(feature: list[str]) -> float:
    """Return the median time between the ends of two steps of a Trainer."""
    ends: list[float] = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder, quietly():
        cli = parse_alone(Path(folder), arguments(feature), watch)
        cli.trainer.fit(cli.model, cli.datamodule)
    return statistics.median(after - before for before, after in zip(ends[SKIPPED:], ends[SKIPPED + 1 :], strict=False))


def measure() -> Iterator[str]:
    """Run the measurements; yield their results as paragraphs of Markdown."""
    times: dict[str, list[float]] = {name: [] for name in FEATURES}
    for _ in range(ROUNDS):
        for name, feature in FEATURES.items():
            times[name].append(seconds_of_step(feature))
    yield (
        f"A training step of ResNet-20 at batch {BATCH} by a Trainer, with all hooks; median of "
        f"{STEPS - SKIPPED - 1} steps, and of {ROUNDS} rounds over all features (extremes):"
    )
    yield Race(times).table({"/ plain": PLAIN})
