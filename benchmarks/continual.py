"""Permuted MNIST: one network learns several tasks, one after the other, and is tested on all of them.

Each task is MNIST with another permutation of the pixels, and one fit; see :class:`tying.callbacks.AnchorTying`.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import seed_everything
from torch import Tensor
from typing_extensions import override

from benchmarks.program import Outcome, Progress
from tying.callbacks import AnchorTying
from tying.data import MNIST
from tying.models import Classifier

TASK_SEEDS = 1000  # seeds of a run's tasks


class PermutedMNIST(MNIST):
    """MNIST whose pixels are permuted, as vectors.

    Args:
        root: the folder that contains ``MNIST/raw/``.
        batch_size: samples in a batch.
        validation: fraction of the training images to hold out.
        seed: of the permutation and the order of images.

    Shape: batches of images (batch, 784) and labels (batch,).
    """

    description = "idx files, permuted"

    def __init__(self, root: str, batch_size: int = 128, validation: float = 0.0, seed: int = 0) -> None:
        super().__init__(root, batch_size, validation, seed=seed)
        self.order = torch.arange(784)

    def of_task(self, task: int) -> PermutedMNIST:
        """Return the data of a task, with an own permutation; the images in memory are the same ones."""
        self.setup("fit")
        other = copy.copy(self)
        other.seed = TASK_SEEDS * self.seed + task
        other.order = torch.randperm(784, generator=torch.Generator().manual_seed(other.seed))
        return other

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return images.flatten(1).index_select(1, self.order.to(images.device)), labels


def run(
    progress: Progress,
    model: Classifier,
    data: PermutedMNIST,
    anchor: AnchorTying | None = None,
    tasks: int = 3,
    epochs: int = 5,
    seed: int = 0,
) -> Outcome:
    """Train a network on one task after the other; test it on all tasks so far after each.

    Args:
        progress: of the run; one that was interrupted goes on with the task it was at.
        model: the network.
        data: the images.
        anchor: pulls weights to their values after earlier tasks; by default nothing does.
        tasks: number of tasks.
        epochs: of each task.
        seed: of the network and of what training draws.
    """
    if (state := progress.restore()) is not None:
        model.load_state_dict(state["model"])
        if anchor is not None:
            anchor.load_state_dict(state["anchor"])
    stages = {"test": pl.Trainer.test, **({"val": pl.Trainer.validate} if data.validation else {})}
    for task in range(len(progress.rows), tasks):
        seed_everything(TASK_SEEDS * seed + task, verbose=False)
        # without importance an anchor would hold the first task at random weights
        callbacks = [anchor] if anchor is not None and (task or anchor.importance) else []
        trainer = _trainer(epochs, callbacks, progress.folder.path)
        start = time.perf_counter()
        trainer.fit(model, data.of_task(task))
        seconds = time.perf_counter() - start
        metrics: dict[str, float] = {}
        for stage, evaluate in stages.items():
            accuracies = {}
            for number in range(task + 1):
                [results] = evaluate(trainer, model, data.of_task(number), verbose=False)
                accuracies[f"{stage}/task {number + 1}"] = results[f"{stage}/accuracy"]
            metrics |= {**accuracies, f"{stage}/accuracy": fmean(accuracies.values())}
        progress.log(sum(int(row["step"]) for row in progress.rows[-1:]) + trainer.global_step, seconds, **metrics)
        saved = {"model": model.state_dict(), "anchor": anchor and anchor.state_dict()}
        progress.save((task + 1) / tasks, saved)
    forgotten = {f"{stage}/forgetting": forgetting(progress.rows, stage) for stage in stages}
    return Outcome(progress.rows, forgotten, model, {"description": data.description, "key": data.key})


def forgetting(rows: list[dict[str, float]], stage: str) -> float:
    """Return the mean accuracy that earlier tasks have lost since they were learnt.

    Args:
        rows: the accuracies after each task, in order.
        stage: ``"test"`` or ``"val"``.

    Example:
        >>> forgetting([{"test/task 1": 0.9}, {"test/task 1": 0.5, "test/task 2": 0.8}], "test")
        0.4
    """
    names = [f"{stage}/task {number + 1}" for number in range(len(rows) - 1)]
    return fmean(row[name] - rows[-1][name] for row, name in zip(rows, names, strict=False)) if names else 0.0


def _trainer(epochs: int, callbacks: list[AnchorTying], folder: Path) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[*callbacks],
        check_val_every_n_epoch=epochs + 1,  # not in the fit
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
