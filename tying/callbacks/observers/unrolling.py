"""Test recurrent blocks with more or fewer steps than in training."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from tying.callbacks.base import Callback, picture_folder
from tying.depth import Recurrent
from tying.errors import ConfigurationError
from tying.files import save_figure
from tying.lightning_namespace import pl


class Unrolling(Callback):
    """Test a classifier also with more, or fewer, steps of its recurrent blocks.

    Logs ``test/steps+1/accuracy`` and so on, and plots accuracy against steps as ``unrolling.png`` in the logger's
    directory. Additional steps use the normalisation layers of the last trained step.

    Args:
        extra: numbers of steps to add to each :class:`tying.depth.Recurrent`; negative numbers remove steps, and at
            least one step remains.

    Raises:
        ConfigurationError: ``extra`` is empty, or the model has no recurrent block.

    Example:
        >>> Unrolling(extra=[-1, 0, 1, 2]).extra
        [-1, 0, 1, 2]
    """

    def __init__(self, extra: list[int]) -> None:
        if not extra:
            raise ConfigurationError("extra must be a list of numbers of steps, such as [-1, 0, 1, 2], not []")
        self.extra = [*extra]

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(module, Recurrent) for module in pl_module.modules()):
            raise ConfigurationError("Unrolling: the model has no tying.depth.Recurrent")
        self._correct: dict[int, list[Tensor]] = {extra: [] for extra in self.extra}

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
            for extra, correct in self._correct.items():
                for block, trained in steps.items():
                    block.steps = max(1, trained + extra)
                with trainer.precision_plugin.forward_context():
                    correct.append(pl_module(x).argmax(dim=-1) == y)
        finally:
            for block, trained in steps.items():
                block.steps = trained

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        answers = [torch.cat(correct) for correct in self._correct.values()]
        counts = torch.tensor([[int(correct.sum()), len(correct)] for correct in answers], device=pl_module.device)
        correct, total = trainer.strategy.reduce(counts, reduce_op="sum").unbind(dim=1)
        accuracies = dict(zip(self._correct, correct / total, strict=True))
        for extra, accuracy in accuracies.items():
            pl_module.log(f"test/steps{extra:+d}/accuracy", accuracy)
        if folder := picture_folder(trainer):
            figure = Figure(figsize=(5, 3.8), layout="constrained")
            axes = figure.subplots()
            axes.plot([*accuracies], [float(accuracy) for accuracy in accuracies.values()], marker=".")
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.set(xlabel="steps beyond those of training", ylabel="test accuracy")
            save_figure(figure, folder / "unrolling.png")
