"""Soft tying of weights during training."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import TyingCallback
from tying.callbacks.hardening import Hardening
from tying.errors import ConfigurationError, listed, nearest
from tying.selection import resolve
from tying.soft import Penalty, Schedule, TyingPenalty
from tying.soft.pull import penalty_of
from tying.ties import Tie, TiedGroup

UPDATES = ("gradient", "decoupled", "proximal")


class SoftTying(TyingCallback):
    """Pull tied weights together while they train.

    With ``update="gradient"`` the gradient of ``strength · Ω`` is added before clipping and the optimizer's step, as
    if the penalty stood in the loss; with several optimizers, at the weights as each finds them when it steps.
    ``"decoupled"`` moves the weights after the step by ``lr · strength · ∂Ω``, outside momentum and adaptive scaling.
    ``"proximal"`` takes the proximal step instead, stable at any strength.
    Each member moves with its own parameter group's learning rate; members that no optimizer trains stay.

    Logs ``tying/strength``, as the last step used it, and ``tying/penalty`` (that strength · Ω, where it is finite).
    In a shortened last accumulation window the added gradient shrinks like the loss, which Lightning divides by the
    full window; the other two updates follow the learning rate alone.

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
        super().__init__(ties, name)
        self.strength = float(strength)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ConfigurationError(f"schedule must be a tying.soft.Schedule, not {schedule!r}")
        self.penalty = penalty_of(penalty)
        self.update = update
        self.schedule = schedule or Schedule()
        self.harden_below = harden_below
        self._check_arguments()
        self._hardening = Hardening(harden_below)
        self._pull: TyingPenalty | None = None
        self._steps: Counter[int] = Counter()  # by index of the optimizer
        self._micro_batches = 0  # since the last step
        self._window = 1.0  # share of a full accumulation window that the current step holds
        self._used = 0.0  # strength of the last step
        self._hooks: list[RemovableHandle] = []
        self._warned = False

    def _check_arguments(self) -> None:
        if self.update not in UPDATES:
            close = nearest(self.update, UPDATES)
            raise ConfigurationError(f"unknown update {self.update!r}: use {', '.join(map(repr, UPDATES))}.{close}")
        if math.isnan(self.strength) or self.strength < 0:
            raise ConfigurationError(f"strength must be 0 or more, not {self.strength}")
        if math.isinf(self.strength) and self.update != "proximal":
            raise ConfigurationError(f"strength=inf needs update='proximal'; update={self.update!r} would diverge")
        if self.update == "proximal" and type(self.penalty).prox is Penalty.prox:
            raise ConfigurationError(f"{type(self.penalty).__name__} has no prox method, which update='proximal' needs")

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [*(self._pull.groups if self._pull else []), *self._hardening.groups]

    @override
    def check(self, groups: Sequence[TiedGroup]) -> None:
        TyingPenalty(groups, self.penalty)

    @property
    def _prefix(self) -> str:
        return f"tying/{self.name}" if self.name else "tying"

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self._steps), **self._hardening.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = Counter({int(index): int(count) for index, count in state_dict["steps"].items()})
        self._hardening.load_state_dict(state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ConfigurationError(
                f"SoftTying does not support {type(trainer.strategy).__name__}, which splits the weights it "
                "compares over processes: use one device or strategy 'ddp'"
            )
        self._hardening.check(trainer)
        if stage == "fit" and trainer.global_step == 0:  # a fresh run; a checkpoint's count is restored after this
            self._steps.clear()
        self._hardening.prepare(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        soft = self._pull.groups if self._pull and self._hardening.groups else resolve(pl_module, self.ties)
        self._pull = TyingPenalty(self._hardening.repeat(trainer, pl_module, soft), self.penalty)
        self._micro_batches, self._warned = 0, False
        trained = {p for optimizer in trainer.optimizers for p in _learning_rates(optimizer) if p.requires_grad}
        idle = [group.names[0] for group in self._pull.groups if trained.isdisjoint(group.parameters)]
        if idle:
            warnings.warn(f"no optimizer trains any weight tied to {listed(idle)}: nothing is pulled", stacklevel=2)
        self._remove_hooks()
        for index, optimizer in enumerate(trainer.optimizers):
            searches = isinstance(optimizer, LBFGS) and optimizer.param_groups[0]["line_search_fn"]
            if searches and self.update == "gradient":
                raise ConfigurationError(
                    "update='gradient' is wrong with the line search of LBFGS, whose loss would lack the penalty: use "
                    "update='proximal', line_search_fn=None, or add tying.soft.TyingPenalty to your training_step"
                )
            if self.update == "proximal":
                self._pull.check_rates(_learning_rates(optimizer))
            hook = partial(self._after_step, trainer, pl_module, index)
            self._hooks.append(optimizer.register_step_post_hook(hook))

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._window = 1.0
        if pl_module.automatic_optimization:
            self._window = self._micro_batches / trainer.accumulate_grad_batches
        self._micro_batches = 0
        if self.update == "gradient" and self._window:
            assert self._pull is not None
            index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
            strength, rates = self._strength_now(trainer, index), _learning_rates(optimizer)
            if isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups):
                self._warn_if_unstable(strength, rates)
            scale = strength * self._window * _loss_scale(trainer, optimizer)
            self._pull.add_gradients_(scale, dict.fromkeys(rates, 1.0))

    def _after_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        index: int,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by a scaler while a fused optimizer steps
        if not self._window or (found_inf is not None and float(found_inf) > 0):
            return
        assert self._pull is not None
        strength, rates = self._strength_now(trainer, index), _learning_rates(optimizer)
        self._used = strength
        if self.update == "decoupled":
            self._warn_if_unstable(strength, rates)
            self._pull.pull_(strength, rates)
        elif self.update == "proximal":
            self._pull.prox_(strength, rates)
        self._steps[index] += 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._micro_batches or not trainer._logger_connector.should_update_logs:
            return
        assert self._pull is not None
        pl_module.log(f"{self._prefix}/strength", self._used)
        if math.isfinite(self._used):
            with torch.no_grad():
                pl_module.log(f"{self._prefix}/penalty", self._used * self._pull())

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.harden_below is None:
            return
        assert self._pull is not None
        soft = self._hardening.harden_near(trainer, pl_module, self._pull.groups)
        self._pull = TyingPenalty(soft, self.penalty)
        pl_module.log(f"{self._prefix}/hardened", float(len(self._hardening.groups)))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hardening.check_others(trainer, self)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _strength_now(self, trainer: pl.Trainer, index: int) -> float:
        count = self._steps[index] if self.schedule.unit == "step" else trainer.current_epoch
        factor = self.schedule(count)
        return self.strength * factor if factor else 0.0

    def _warn_if_unstable(self, strength: float, rates: dict[torch.nn.Parameter, float]) -> None:
        """Warn, once, where an explicit step would overshoot ever further: lr · strength · curvature > 2 / m."""
        assert self._pull is not None
        largest = max(map(len, self._pull.groups), default=1)
        if self._warned or max(rates.values()) * strength * self.penalty.curvature <= 2 / largest:
            return
        for group in self._pull.groups:
            rate = max(rates.get(parameter, 0.0) for parameter in group.parameters)
            if rate * strength * self.penalty.curvature > 2 / len(group):
                self._warned = True
                warnings.warn(
                    f"lr · strength = {rate * strength:.3g} is past the stability bound 2/m = {2 / len(group):.3g} of "
                    f"the group of {group.names[0]!r}: its weights will oscillate apart. Lower the strength, or use "
                    "update='proximal', which is stable at any strength",
                    stacklevel=2,
                )
                return


def _learning_rates(optimizer: Optimizer) -> dict[torch.nn.Parameter, float]:
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the factor that gradients still carry when a scaler leaves unscaling to a fused optimizer."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
