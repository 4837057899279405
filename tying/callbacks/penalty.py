"""The base of callbacks that lower penalties during training."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import SHARDING, callbacks_of
from tying.callbacks.finite_check import Watching
from tying.errors import ConfigurationError, listed, nearest
from tying.selection.tie import TiedGroup
from tying.soft import Schedule, TyingPenalty
from tying.soft.group_penalty import Rates

Update = Literal["gradient", "decoupled", "proximal"]
UPDATES = get_args(Update)


class Pull(NamedTuple):
    """A penalty, and the factor on it before the schedule's."""

    penalty: TyingPenalty
    strength: float


class Pulling(Watching):
    """Lowers penalties on weights while they train; a subclass says which, in :meth:`find_pulls`.

    With ``update="gradient"`` the gradient of ``strength · Ω`` is added before clipping and the optimizer's step, as
    if the penalty stood in the loss; with several optimizers, at the weights as each finds them when it steps.
    ``"decoupled"`` moves the weights after the step by ``lr · strength · ∂Ω``, outside momentum and adaptive scaling.
    ``"proximal"`` takes the proximal step instead, stable at any strength.
    Each member moves with its own parameter group's learning rate; members that no optimizer trains stay.

    Logs ``tying/strength``, as the last step used it, and ``tying/penalty`` (that strength · Ω, where it is finite).
    In a shortened last accumulation window the added gradient shrinks like the loss, which Lightning divides by the
    full window; the other two updates follow the learning rate alone. Where callbacks of several classes share a name,
    or have none, each logs under its class: ``tying/SoftTying/penalty``.

    Args:
        strength: factor on Ω, ≥ 0; ``inf`` (``.inf`` in YAML) with ``update="proximal"``.
        update: add the pull to the gradients, or move the weights after the step, explicitly or by a proximal step.
        schedule: a factor on ``strength`` over steps or epochs.
        name: tells several of a class apart, in checkpoints and in the log (``tying/<name>/penalty``).

    Raises:
        ConfigurationError: at construction, for arguments out of range; when training starts, for optimizers and
            strategies with which the update would be wrong.
        NonFiniteError: in training, a weight that is pulled has become NaN or infinite.
    """

    def __init__(self, strength: float, update: Update, schedule: Schedule | None, name: str | None) -> None:
        super().__init__()
        self.strength = float(strength)
        if update not in UPDATES:
            close = nearest(update, UPDATES)
            raise ConfigurationError(f"unknown update {update!r}: use {', '.join(map(repr, UPDATES))}.{close}")
        self._check_strength("strength", self.strength, update)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ConfigurationError(f"schedule must be a tying.soft.Schedule, not {schedule!r}")
        self.update = update
        self.schedule = schedule or Schedule()
        self.name = name
        self._share = 1.0  # of all strengths: one over the number of examples, where these stand against a sum
        self._pulls: list[Pull] = []
        self._steps: Counter[int] = Counter()  # by index of the optimizer
        self._micro_batches = 0  # since the last step
        self._window = 1.0  # share of a full accumulation window that the current step holds
        self._used = 0.0  # the factor on all strengths at the last step
        self._kind = ""  # its class, where others would log under the same name
        self._hooks: list[RemovableHandle] = []
        self._announced = False  # by Lightning: the step that comes
        self._warned = self._passed = False  # of an unstable step; of one that was not announced

    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        """Return what to lower; called when training starts."""
        raise NotImplementedError

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [group for pull in self._pulls for group in pull.penalty.groups]

    @override
    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if not self.strength:
            return {}
        return {name: p for group in self.groups for name, p in zip(group.names, group.parameters, strict=True)}

    @property
    def pulled(self) -> list[torch.nn.Parameter]:
        """The parameters that are pulled, once training has started."""
        return [parameter for group in self.groups for parameter in group.parameters]

    @staticmethod
    def _check_strength(name: str, strength: float, update: str) -> None:
        if math.isnan(strength) or strength < 0:
            raise ConfigurationError(f"{name} must be 0 or more, not {strength}")
        if math.isinf(strength) and update != "proximal":
            raise ConfigurationError(f"{name}=inf needs update='proximal'; update={update!r} would diverge")

    @property
    def _prefix(self) -> str:
        return "/".join(filter(None, ("tying", self._kind, self.name)))

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = Counter({int(index): int(count) for index, count in state_dict["steps"].items()})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy, SHARDING):
            raise ConfigurationError(
                f"{type(self).__name__} does not support {type(trainer.strategy).__name__}, which splits the weights "
                "it compares over processes: use one device or strategy 'ddp'"
            )
        if stage == "fit" and trainer.global_step == 0:  # a fresh run; a checkpoint's count is restored after this
            self._steps.clear()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        alike = [one for one in callbacks_of(trainer) if isinstance(one, Pulling) and one.name == self.name]
        self._kind = type(self).__name__ if len(alike) > 1 else ""
        self._pulls = self.find_pulls(trainer, pl_module)
        self.rewatch()
        self._micro_batches, self._announced, self._warned, self._passed = 0, False, False, False
        trained = {p for optimizer in trainer.optimizers for p in _learning_rates(optimizer) if p.requires_grad}
        groups = [group for pull in self._pulls for group in pull.penalty.groups]
        idle = [group.names[0] for group in groups if trained.isdisjoint(group.parameters)]
        unfreezes = any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(trainer))  # adds them later
        if idle and not unfreezes:
            warnings.warn(f"no optimizer trains any weight tied to {listed(idle)}: nothing is pulled", stacklevel=2)
        self._hook_into(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _hook_into(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        for index, optimizer in enumerate(trainer.optimizers):
            searches = isinstance(optimizer, LBFGS) and optimizer.param_groups[0]["line_search_fn"]
            if searches and self.update == "gradient":
                raise ConfigurationError(
                    "update='gradient' is wrong with the line search of LBFGS, whose loss would lack the penalty: use "
                    "update='proximal', line_search_fn=None, or add tying.soft.TyingPenalty to your training_step"
                )
            if self.update == "proximal":
                for pull in self._pulls:
                    pull.penalty.check_rates(_learning_rates(optimizer))
            hook = partial(self._after_step, trainer, pl_module, index)
            self._hooks.append(optimizer.register_step_post_hook(hook))

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:  # what was summed since the last step is gone, if it was not stepped
            self._micro_batches = 0

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        refs = [hook.hooks_dict_ref() for hook in self._hooks]
        if refs and not any(ref is optimizer._optimizer_step_post_hooks for ref in refs):
            self._hook_into(trainer, pl_module)  # it was made while training
        self._announced, self._window = True, 1.0
        if pl_module.automatic_optimization:
            self._window = self._micro_batches / trainer.accumulate_grad_batches
        self._micro_batches = 0
        if self.update == "gradient" and self._window:
            index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
            factor, rates = self._factor_now(trainer, index), _learning_rates(optimizer)
            if isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups):
                self._warn_if_unstable(factor * self._share, rates)
            self.add_gradients(factor * self._share * self._window, _loss_scale(trainer, optimizer), rates)

    def add_gradients(self, factor: float, scale: float, rates: Rates) -> None:
        """Add the pulls' gradients.

        Args:
            factor: on all strengths.
            scale: what gradients of the loss are scaled by.
            rates: learning rates, by parameter; of those that the optimizer holds.
        """
        for penalty, strength in self._pulls:
            penalty.add_gradients_(factor * scale * strength, dict.fromkeys(rates, 1.0))

    def _after_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, optimizer: Optimizer, *_: Any
    ) -> None:
        announced, self._announced = self._announced, False
        if self.update == "gradient" and not announced:
            if not self._passed:
                self._passed = True
                warnings.warn(
                    f"{type(self).__name__}: an optimizer was stepped past Lightning, which leaves no time to add to "
                    "gradients: nothing is pulled. Take it from self.optimizers() as it comes, or use "
                    "update='decoupled' or 'proximal'",
                    stacklevel=2,
                )
            return
        found_inf = getattr(optimizer, "found_inf", None)  # set by a scaler while a fused optimizer steps
        if not self._window or (found_inf is not None and float(found_inf) > 0):
            return
        self._watch.look(self._held_in(pl_module))  # before one weight's NaN is pulled into another
        self._watch.tell(self.groups, wait=self.update != "gradient")
        factor, rates = self._factor_now(trainer, index) * self._share, _learning_rates(optimizer)
        self._used = factor
        if self.update == "decoupled":
            self._warn_if_unstable(factor, rates)
        for penalty, strength in self._pulls:
            if self.update == "decoupled":
                penalty.pull_(_product(factor, strength), rates)
            elif self.update == "proximal":
                penalty.prox_(_product(factor, strength), rates)
        self._steps[index] += 1
        self.stepped(rates)

    def stepped(self, rates: Rates) -> None:
        """Do what a step of an optimizer brings, which holds the parameters of these learning rates."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._micro_batches or not trainer._logger_connector.should_update_logs:
            return
        pl_module.log(f"{self._prefix}/strength", _product(self._used, self.strength))
        if (value := self.value()) is not None:
            pl_module.log(f"{self._prefix}/penalty", value)

    @torch.no_grad()
    def value(self) -> torch.Tensor | None:
        """Return the sum of all ``strength · Ω`` as the last step used them, if it is finite."""
        strengths = [_product(self._used, strength) for _, strength in self._pulls]
        if not strengths or not all(map(math.isfinite, strengths)):
            return None
        return torch.stack([s * penalty() for (penalty, _), s in zip(self._pulls, strengths, strict=True)]).sum()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()  # Lightning skips the teardown then

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _factor_now(self, trainer: pl.Trainer, index: int) -> float:
        return self.schedule(self._steps[index] if self.schedule.unit == "step" else trainer.current_epoch)

    def _warn_if_unstable(self, factor: float, rates: Rates) -> None:
        for penalty, strength in self._pulls:
            if not self._warned and (told := penalty.stability_warning(factor * strength, rates)):
                self._warned = True
                warnings.warn(told, stacklevel=2)


def _product(factor: float, strength: float) -> float:
    return factor * strength if factor else 0.0  # a factor of 0 silences also an infinite strength


def _learning_rates(optimizer: Optimizer) -> dict[torch.nn.Parameter, float]:
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the factor that gradients still carry when a scaler leaves unscaling to a fused optimizer."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
