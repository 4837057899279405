"""Groups of weights that become one while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from tying.callbacks.base import TyingCallback, callbacks_of, held_by, refuse_copies
from tying.errors import ConfigurationError, listed
from tying.hard import untie
from tying.hard.sharing import merge, plan
from tying.hard.states import merge_states
from tying.soft import gap
from tying.ties import TiedGroup


class Hardening:
    """Makes one weight of each group whose gap falls below a bound, as :class:`SoftTying` asks at each epoch's end.

    Args:
        below: the bound, or None to harden nothing.

    Raises:
        ConfigurationError: the bound is no gap.
    """

    def __init__(self, below: float | None) -> None:
        if below is not None and not 0 < below <= 1:
            raise ConfigurationError(f"harden_below is a gap, above 0 and at most 1, not {below}")
        self.below = below
        self.groups: list[TiedGroup] = []
        self._saved: list[set[str]] = []  # names of groups that are one weight in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the groups that are one, in the order in which they became so."""
        return {"hardened": [list(group.names) for group in self.groups]} if self.groups else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the names that :meth:`repeat` will harden."""
        self._saved = [{*names} for names in state_dict.get("hardened", ())]

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse company in which groups could not become one."""
        if self.below is not None:
            remedy = "the weights apart: train on with HardTying from a checkpoint instead"
            refuse_copies(trainer, "harden_below", remedy)

    def check_others(self, trainer: pl.Trainer, own: TyingCallback) -> None:
        """Refuse other callbacks' ties of the same weights."""
        ours = {id(p): name for group in own.groups for name, p in zip(group.names, group.parameters, strict=True)}
        for callback in callbacks_of(trainer) if self.below is not None else ():
            if callback is not own and (
                both := [ours[id(parameter)] for parameter in held_by(callback) if id(parameter) in ours]
            ):
                raise ConfigurationError(
                    f"harden_below would replace {both[0]!r}, which another {type(callback).__name__} ties too: put "
                    "all their ties into one callback, or leave harden_below out"
                )

    def prepare(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Part the groups of a model that is about to be restored; forget those of another model."""
        own = {id(parameter) for parameter in model.parameters()}
        if self.groups and trainer.ckpt_path is not None:  # it may be of a time when they were apart
            untie(model, {name for group in self.groups for name in group.names})
            self.groups = []
        elif any(id(group.parameters[0]) not in own for group in self.groups):
            self.groups = []

    def repeat(
        self, trainer: pl.Trainer, model: pl.LightningModule, groups: Sequence[TiedGroup]
    ) -> Sequence[TiedGroup]:
        """Harden what was one weight in a checkpoint; return the groups that stay soft.

        Their optimizers' states, which are restored next, go by position: hence in the order in which they hardened,
        with the optimizers as they were made.
        """
        if self.below is not None:
            plan(model, groups)  # raises where they could not be one
        for names in self._saved:
            groups = self._harden(
                trainer, model, groups, [g for g in groups if not names.isdisjoint(g.names)], "source"
            )
        self._saved = []
        return groups

    def harden_near(
        self, trainer: pl.Trainer, model: pl.LightningModule, groups: Sequence[TiedGroup]
    ) -> Sequence[TiedGroup]:
        """Harden the groups whose gap is below the bound, as their mean; return those that stay soft."""
        assert self.below is not None
        near = [group for group in groups if gap(group.tensors()) < self.below]
        if near:
            rank_zero_info(f"SoftTying: {listed(group.names[0] for group in near)}: hard tied from now on")
        return self._harden(trainer, model, groups, near, "mean")

    def _harden(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        groups: Sequence[TiedGroup],
        near: Sequence[TiedGroup],
        init: Literal["source", "mean"],
    ) -> Sequence[TiedGroup]:
        for group in near:
            self.groups += merge(model, [group], init)
            merge_states(trainer.optimizers, group)
        return [group for group in groups if group not in near]
