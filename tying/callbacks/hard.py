"""Make tied weights one parameter, in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.base import members
from tying.callbacks.transform import ModelTransform
from tying.errors import ConfigurationError, check_choice, listed
from tying.hard import tie, tied
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft import gap
from tying.weights.optimizers import are_alike
from tying.weights.record import record_in, tie_records
from tying.weights.tie import Init


class HardTying(ModelTransform):
    """Make tied weights one parameter, before the optimizers are made; see :func:`tying.hard.tie`.

    Args:
        ties: :class:`tying.Tie`, or strings ``"source ~ target | relation"``.
        init: the value of the one weight: the source's, or the mean.
        name: distinguishes several callbacks of this class.

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
        check_choice("init", init, get_args(Init))
        self.ties, self.init, self.name = parse_ties(ties), init, name
        self._groups: list[TiedGroup] = []

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return self._groups

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return members(self._groups or resolve(model, self.ties))

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return members(self._groups)

    @override
    def check_groups(self, groups: Sequence[TiedGroup]) -> None:
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

    @override
    def check_optimizers(self, trainer: pl.Trainer) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        parameters = [id(parameter) for group in groups for parameter in group["params"]]
        for name, weight in members(self._groups).items():
            if (count := parameters.count(id(weight))) > 1:
                raise ConfigurationError(
                    f"{name!r} stands {count} times in the optimizers, and would be stepped and decayed as "
                    "often: build them from self.parameters(), which yields each weight once"
                )

    @override
    def changed(self, model: nn.Module) -> list[str]:
        return [name for group in self._groups if group.parameters[0].requires_grad for name in group.names]

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return record_in(model).ties.keys() >= {*self.ties}

    @override
    def apply(self, model: nn.Module) -> list[TiedGroup]:
        whole = not any(parameter.is_meta for parameter in model.parameters())
        gaps = [] if tie_records(model) or not whole else [gap(group.tensors()) for group in resolve(model, self.ties)]
        self._groups = tie(model, self.ties, self.init)
        if any(gaps):
            rank_zero_info(f"HardTying: {self.describe(model)}; before, they differed (largest gap {max(gaps):.4f})")
        return self._groups

    @override
    def describe(self, model: nn.Module) -> str:
        renamed = (f"{name} is now {group.names[0]}" for group in self._groups for name in group.names[1:])
        value = "their mean" if self.init == "mean" else "the latter's values"
        return f"{listed(renamed)} (with {value})"
