"""Weights that are one, in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.base import TyingCallback
from tying.callbacks.transform import ChangesModel, check_optimizer_current
from tying.errors import ConfigurationError, listed
from tying.hard import tie, tied
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft import gap
from tying.weights.optimizers import are_alike
from tying.weights.record import record_in, tie_records


class HardTying(TyingCallback, ChangesModel):
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
        super().__init__()
        self.ties, self.name = parse_ties(ties), name
        if init not in ("source", "mean"):
            raise ConfigurationError(f"init is 'source' or 'mean', not {init!r}")
        self.init = init
        self._groups: list[TiedGroup] = []

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return self._groups

    @override
    def check(self, groups: Sequence[TiedGroup]) -> None:
        for group in groups:
            if not are_alike(group.parameters):
                raise ConfigurationError(
                    f"{listed(group.names)} cannot be one weight: they differ in requires_grad, dtype or device"
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {name for group in self._groups for name in group.names}
        self._groups = [group for group in tied(pl_module) if not names.isdisjoint(group.names)]
        self.check_optimizers(trainer)
        super().on_fit_start(trainer, pl_module)
        for group in self._groups:
            weight = group.parameters[0]
            if weight.requires_grad:
                members = zip(group.names, group.relations, strict=True)
                check_optimizer_current(
                    trainer, pl_module, {name: relation(weight).shape for name, relation in members}
                )

    @override
    def check_optimizers(self, trainer: pl.Trainer) -> None:
        trained = [id(p) for optimizer in trainer.optimizers for held in optimizer.param_groups for p in held["params"]]
        for group in self._groups:
            if (times := trained.count(id(group.parameters[0]))) > 1:
                raise ConfigurationError(
                    f"{group.names[0]!r} stands {times} times in the optimizers, and would be stepped and decayed as "
                    "often: build them from self.parameters(), which yields each weight once"
                )

    @override
    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {group.names[0]: group.parameters[0] for group in self._groups}

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return record_in(model).ties.keys() >= {*self.ties}

    @override
    def apply(self, model: nn.Module) -> list[TiedGroup]:
        whole = not any(parameter.is_meta for parameter in model.parameters())
        gaps = [] if tie_records(model) or not whole else [gap(group.tensors()) for group in resolve(model, self.ties)]
        if differing := sum(apart > 0 for apart in gaps):
            kept = "that of its source" if self.init == "source" else "their mean"
            rank_zero_info(
                f"HardTying: {len(gaps)} groups are one weight each, {kept}; as initialised, the members of "
                f"{differing} differed (largest gap {max(gaps):.4f})"
            )
        self._groups = tie(model, self.ties, self.init)
        return self._groups
