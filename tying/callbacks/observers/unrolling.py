"""Test recurrent blocks with other numbers of steps than they were trained with."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from tying.callbacks.base import picture_folder
from tying.depth import Recurrent
from tying.errors import ConfigurationError
from tying.files import save_figure


class Unrolling(pl.Callback):
    """Test a classifier also with more, or fewer, steps of its recurrent blocks: does it help to go on?

    Logs ``test/steps+1/accuracy`` and so on, and plots accuracy against steps as ``unrolling.png`` in the logger's
    directory. Steps beyond those of training use the last one's normalisation layers.

    Args:
        extra: how many steps to add to those of each :class:`tying.depth.Recurrent`; negative for fewer, of which one
            is left at least.

    Raises:
        ConfigurationError: there is nothing to add, or no recurrent block.

    Example:
        >>> Unrolling(extra=[-1, 0, 1, 2]).extra
        [-1, 0, 1, 2]
    """

    def __init__(self, extra: list[int]) -> None:
        super().__init__()
        if not extra:
            raise ConfigurationError("extra is a list of numbers of steps, such as [-1, 0, 1, 2], not []")
        self.extra = [*extra]
        self._right: dict[int, list[Tensor]] = {}

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(module, Recurrent) for module in pl_module.modules()):
            raise ConfigurationError("Unrolling: the model has no tying.depth.Recurrent")
        self._right = {extra: [] for extra in self.extra}

    @override
    @torch.no_grad()
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        x, y = batch
        steps = {module: module.steps for module in pl_module.modules() if isinstance(module, Recurrent)}
        try:
            for extra, right in self._right.items():
                for block, own in steps.items():
                    block.steps = max(1, own + extra)
                with trainer.precision_plugin.forward_context():
                    right.append(pl_module(x).argmax(dim=-1) == y)
        finally:
            for block, own in steps.items():
                block.steps = own

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = torch.tensor([[int(torch.cat(right).sum()), len(torch.cat(right))] for right in self._right.values()])
        counts = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum")
        found = dict(zip(self._right, counts[:, 0] / counts[:, 1], strict=True))
        for extra, accuracy in found.items():
            pl_module.log(f"test/steps{extra:+d}/accuracy", accuracy)
        if not (folder := picture_folder(trainer)):
            return
        figure = Figure(figsize=(5, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.plot([*found], [float(accuracy) for accuracy in found.values()], marker=".")
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="steps beyond those of training", ylabel="test accuracy")
        save_figure(figure, folder / "unrolling.png")
