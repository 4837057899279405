"""Raise the slope of boundary detectors in training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from tying.depth import HMLSTM
from tying.errors import ConfigurationError, check_range


class SlopeAnnealing(pl.Callback):
    """Raise the slope of the boundary detectors of :class:`tying.depth.HMLSTM`: ``min(maximum, 1 + rate · epoch)``.

    It replaces the slope with which the layer was constructed.

    Args:
        rate: increase per epoch, ≥ 0.
        maximum: of the slope, ≥ 1.

    Raises:
        ConfigurationError: an argument is out of range; when training starts, the model has no HMLSTM.

    Example:
        >>> SlopeAnnealing().maximum
        5.0

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(self, rate: float = 0.04, maximum: float = 5.0) -> None:
        super().__init__()
        check_range("rate", rate, "[0, inf)")
        check_range("maximum", maximum, "[1, inf)")
        self.rate, self.maximum = rate, maximum

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._anneal(trainer, pl_module)  # a run that resumes within an epoch has no first batch

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # a run that resumes from the last step of an epoch does not start the next one
            self._anneal(trainer, pl_module)

    def _anneal(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = [module for module in pl_module.modules() if isinstance(module, HMLSTM)]
        if not layers:
            raise ConfigurationError("SlopeAnnealing: the model has no tying.depth.HMLSTM")
        for layer in layers:
            layer.slope = min(self.maximum, 1 + self.rate * trainer.current_epoch)
