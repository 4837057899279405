"""Slopes that grow in training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from tying.depth import HMLSTM
from tying.errors import ConfigurationError


class SlopeAnnealing(pl.Callback):
    """Raise the slope of the boundary detectors of :class:`tying.depth.HMLSTM`: ``min(maximum, 1 + rate · epoch)``.

    It takes the place of the slope that the layer was made with.

    Args:
        rate: by how much an epoch raises it, ≥ 0.
        maximum: of the slope, ≥ 1.

    Raises:
        ConfigurationError: an argument out of range; when training starts, no HMLSTM.

    Example:
        >>> SlopeAnnealing().maximum
        5.0

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(self, rate: float = 0.04, maximum: float = 5.0) -> None:
        super().__init__()
        if not (0 <= rate < float("inf") and 1 <= maximum < float("inf")):
            raise ConfigurationError(f"rate is 0 or more, and maximum 1 or more, not {rate} and {maximum}")
        self.rate, self.maximum = rate, maximum

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._anneal(trainer, pl_module)  # a run that goes on within an epoch has no first batch

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # a run that goes on from the last step of an epoch does not start the next one
            self._anneal(trainer, pl_module)

    def _anneal(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = [module for module in pl_module.modules() if isinstance(module, HMLSTM)]
        if not found:
            raise ConfigurationError("SlopeAnnealing: the model has no tying.depth.HMLSTM")
        for module in found:
            module.slope = min(self.maximum, 1 + self.rate * trainer.current_epoch)
