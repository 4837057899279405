"""Weights that are one in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.base import TyingCallback, callbacks_of
from tying.errors import ConfigurationError
from tying.hard import audit, tie, tied
from tying.selection import resolve
from tying.soft import gap
from tying.ties import Tie, TiedGroup


class HardTying(TyingCallback):
    """Make tied weights one parameter, before the optimizers are made; see :func:`tying.hard.tie`.

    Args:
        ties: :class:`tying.Tie`, or strings ``"source ~ target | relation"``.
        init: what the one weight is: that of the source, or the mean.
        name: tells several of a class apart.

    Raises:
        ConfigurationError: the ties do not fit the model, a callback that averages weights stands before this one, the
            strategy splits weights, or an optimizer does not hold the tied weights.

    Example:
        >>> HardTying(ties=["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"]).init
        'source'
    """

    def __init__(
        self, ties: Sequence[Tie | str], init: Literal["source", "mean"] = "source", name: str | None = None
    ) -> None:
        super().__init__(ties, name)
        if init not in ("source", "mean"):
            raise ConfigurationError(f"init is 'source' or 'mean', not {init!r}")
        self.init = init
        self._groups: list[TiedGroup] = []

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return self._groups

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ConfigurationError(
                f"HardTying does not support {type(trainer.strategy).__name__}: call tying.hard.tie in "
                "configure_model, before the model is sharded, and shard tied modules together, as audit says"
            )
        for callback in callbacks_of(trainer):
            if callback is self:
                break
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ConfigurationError(
                    f"{type(callback).__name__} stands before HardTying and would average the weights of an untied "
                    "copy: list HardTying first"
                )
        # layers that configure_model makes must be there; Lightning calls it again, which it must stand
        _call_configure_model(trainer)
        self._groups = self.apply(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if problems := audit(pl_module, trainer.optimizers).problems:
            raise ConfigurationError("; ".join(problems))

    def apply(self, model: nn.Module) -> list[TiedGroup]:
        """Tie the model, unless it is tied already; return the groups."""
        gaps = [gap(group.tensors()) for group in resolve(model, self.ties)] if not tied(model) else []
        if differing := sum(apart > 0 for apart in gaps):
            kept = "those of the source are" if self.init == "source" else "their mean is"
            rank_zero_info(
                f"HardTying: the weights of {differing} of {len(gaps)} groups differed before they became one "
                f"(largest gap {max(gaps):.4f}); {kept} kept"
            )
        return tie(model, self.ties, self.init)
