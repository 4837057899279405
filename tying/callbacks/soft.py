"""Soft tying of weights during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from tying.callbacks.base import TyingCallback, callbacks_of, held_by, reject_copies
from tying.callbacks.penalty import Pull, Pulling, Update
from tying.errors import ConfigurationError, listed
from tying.hard import untie
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft import Penalty, Schedule, TyingPenalty, gap
from tying.soft.group_penalty import as_penalty
from tying.weights.optimizers import merge_optimizer_state
from tying.weights.tie import Init, plan, tie_groups


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
        update: Update = "gradient",
        schedule: Schedule | None = None,
        harden_below: float | None = None,
        name: str | None = None,
    ) -> None:
        self.ties = parse_ties(ties)
        super().__init__(strength, update, schedule, name)
        self.penalty = as_penalty(penalty)
        if update == "proximal" and type(self.penalty).prox is Penalty.prox:
            raise ConfigurationError(f"{type(self.penalty).__name__} has no prox method, which update='proximal' needs")
        if harden_below is not None and not 0 < harden_below <= 1:
            raise ConfigurationError(f"harden_below is a gap, above 0 and at most 1, not {harden_below}")
        self.harden_below = harden_below
        self._hardened: list[TiedGroup] = []  # in the order in which they became one weight
        self._saved: list[set[str]] = []  # names of groups that are one weight in a checkpoint

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [*super().groups, *self._hardened]

    @override
    def check(self, groups: Sequence[TiedGroup]) -> None:
        TyingPenalty(groups, self.penalty)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"hardened": [list(group.names) for group in self._hardened]} if self._hardened else {}
        return {**super().state_dict(), **kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = [{*names} for names in state_dict.get("hardened", ())]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.harden_below is not None:
            remedy = "the weights apart: train on with HardTying from a checkpoint instead"
            reject_copies(trainer, "harden_below", remedy)
        own = {id(parameter) for parameter in pl_module.parameters()}
        if self._hardened and trainer.ckpt_path is not None:  # it may be of a time when they were apart
            untie(pl_module, {name for group in self._hardened for name in group.names})
            self._hardened = []
        elif any(id(group.parameters[0]) not in own for group in self._hardened):  # those of another model
            self._hardened = []

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        groups = self._pulls[0].penalty.groups if self._pulls and self._hardened else resolve(model, self.ties)
        if self.harden_below is not None:
            plan(model, groups)  # raises where they could not be one
        # optimizers' states, which are restored next, go by position: hence in the order in which groups hardened,
        # with the optimizers as they were made
        for names in self._saved:
            self._harden(trainer, model, [group for group in groups if not names.isdisjoint(group.names)], "source")
            groups = [group for group in groups if names.isdisjoint(group.names)]
        self._saved = []
        return self._pulling(groups)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.harden_below is None:
            return
        ours = {id(p): name for group in self.groups for name, p in zip(group.names, group.parameters, strict=True)}
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelPruning):
                pruned = (id(getattr(module, name, None)) for module, name in callback._parameters_to_prune)
                if found := [ours[weight] for weight in pruned if weight in ours]:
                    raise ConfigurationError(
                        f"harden_below could not make {found[0]!r} one with another once ModelPruning has pruned it: "
                        "prune other weights, or in a run after this, or leave harden_below out"
                    )
            both = [ours[id(parameter)] for parameter in held_by(callback) if id(parameter) in ours]
            if both and callback is not self:
                raise ConfigurationError(
                    f"harden_below would replace {both[0]!r}, which another {type(callback).__name__} ties too: put "
                    "all their ties into one callback, or leave harden_below out"
                )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.harden_below is None:
            return
        groups = self._pulls[0].penalty.groups
        near = [group for group in groups if gap(group.tensors()) < self.harden_below]
        if near:
            rank_zero_info(f"SoftTying: {listed(group.names[0] for group in near)}: hard tied from now on")
        self._harden(trainer, pl_module, near, "mean")
        self._pulls = self._pulling([group for group in groups if group not in near])
        self.rewatch()
        pl_module.log(f"{self._prefix}/hardened", float(len(self._hardened)))

    def _harden(self, trainer: pl.Trainer, model: pl.LightningModule, groups: list[TiedGroup], init: Init) -> None:
        """Let each group be one weight, also for the optimizers."""
        for group in groups:
            self._hardened += tie_groups(model, [group], init)
            merge_optimizer_state(trainer.optimizers, group)

    def _pulling(self, groups: Sequence[TiedGroup]) -> list[Pull]:
        return [Pull(TyingPenalty(groups, self.penalty), self.strength)]
