"""Soft tying of weights during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from typing_extensions import override

from tying.callbacks.base import TyingCallback
from tying.callbacks.hardening import Hardening
from tying.callbacks.pulling import Pull, Pulling
from tying.errors import ConfigurationError
from tying.selection import resolve
from tying.soft import Penalty, Schedule, TyingPenalty
from tying.soft.pull import penalty_of
from tying.ties import Tie, TiedGroup, parse_ties


class SoftTying(Pulling, TyingCallback):
    """Pull tied weights together while they train; :class:`Pulling` says what each update does, and what is logged.

    Args:
        ties: which weights belong together: :class:`tying.Tie`, or strings ``"source ~ target | relation"``.
        strength: factor on Ω, ≥ 0; ``inf`` (``.inf`` in YAML) with ``update="proximal"``: equal after every step.
        penalty: ``"l2"``, ``"l1"``, ``Huber(delta)`` for pairs, or a :class:`tying.soft.Penalty` of your own.
        update: add the pull to the gradients, or move the weights after the step, explicitly or by a proximal step.
        schedule: a factor on ``strength`` over steps or epochs.
        harden_below: a gap; at the end of each epoch, groups whose gap is below it become one weight, their mean, as by
            :class:`HardTying`; so do their optimizer's states.
        name: tells several of these callbacks apart, in checkpoints and in the log (``tying/<name>/penalty``).

    Raises:
        ConfigurationError: at construction, for arguments out of range; when training starts, for ties that do not
            fit the model, and for optimizers and strategies with which the update would be wrong.

    Example:
        >>> SoftTying(["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"], strength=1e-2).ties
        [Tie(source='encoder.{i}.weight', target='decoder.{-i}.weight', relation='o i -> i o', exclude=())]

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, 2016, section 7.9; for decoupled updates
    I. Loshchilov and F. Hutter, Decoupled weight decay regularization, 2019.
    """

    def __init__(
        self,
        ties: Sequence[Tie | str],
        strength: float = 1e-3,
        penalty: Literal["l2", "l1"] | Penalty = "l2",
        update: Literal["gradient", "decoupled", "proximal"] = "gradient",
        schedule: Schedule | None = None,
        harden_below: float | None = None,
        name: str | None = None,
    ) -> None:
        self.ties = parse_ties(ties)
        super().__init__(strength, update, schedule, name)
        self.penalty = penalty_of(penalty)
        if update == "proximal" and type(self.penalty).prox is Penalty.prox:
            raise ConfigurationError(f"{type(self.penalty).__name__} has no prox method, which update='proximal' needs")
        self.harden_below = harden_below
        self._hardening = Hardening(harden_below)

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [*(group for pull in self._pulls for group in pull.penalty.groups), *self._hardening.groups]

    @property
    @override
    def watched_groups(self) -> list[TiedGroup]:
        return self.groups  # those that have hardened, too

    @override
    def check(self, groups: Sequence[TiedGroup]) -> None:
        TyingPenalty(groups, self.penalty)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._hardening.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._hardening.load_state_dict(state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._hardening.check(trainer)
        self._hardening.prepare(trainer, pl_module)

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        found = self._pulls[0].penalty.groups if self._pulls and self._hardening.groups else resolve(model, self.ties)
        return self._pulling(self._hardening.repeat(trainer, model, found))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hardening.check_others(trainer, self)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.harden_below is None:
            return
        [pull] = self._pulls
        self._pulls = self._pulling(self._hardening.harden_near(trainer, pl_module, pull.penalty.groups))
        self.rewatch()
        pl_module.log(f"{self._prefix}/hardened", float(len(self._hardening.groups)))

    def _pulling(self, groups: Sequence[TiedGroup]) -> list[Pull]:
        return [Pull(TyingPenalty(groups, self.penalty), self.strength)]
