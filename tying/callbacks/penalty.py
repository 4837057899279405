"""The base of callbacks that lower penalties during training."""

import math
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import TyingCallback, counted, is_fresh_run, members
from tying.callbacks.conflicts import acting_on
from tying.errors import ConfigurationError, check_choice, check_range, listed
from tying.lightning_namespace import pl
from tying.lightning_workarounds import averages, callbacks_of, is_logging_step, loss_scale
from tying.selection.resolve import resolve
from tying.selection.tie import TiedGroup
from tying.soft import Schedule, TyingPenalty
from tying.soft.group_penalty import Rates, gaps
from tying.soft.schedule import parse_schedule
from tying.weights.sharding import reshard

Update = Literal["gradient", "decoupled", "proximal"]


class PenaltyCallback(TyingCallback):
    """Lowers penalties on weights while they train; a subclass creates them in :meth:`build_penalties`.

    With ``update="gradient"`` the gradient of ``strength · Ω`` is added before clipping and the optimizer's step, as
    if the penalty were part of the loss; with several optimizers, it is computed anew before each of their steps.
    ``"decoupled"`` moves the weights after the step by ``lr · strength · ∂Ω``, outside momentum and adaptive scaling.
    ``"proximal"`` takes the proximal step instead, which is stable at any strength. With an infinite strength it is
    also taken once before the first step, so that averaged weights are equal too.
    Each member moves with the learning rate of its parameter group; members that no optimizer trains do not move.

    Logs ``tying/strength``, the strength in the last step, and ``tying/penalty``, this strength · Ω if it is finite.
    In a shortened last accumulation window the added gradient shrinks like the loss, which Lightning divides by the
    full window; the other two updates depend on the learning rate alone. If several callbacks share a name, or have
    none, each logs under its class: ``tying/SoftTying/penalty``.

    Args:
        strength: factor on Ω, ≥ 0; ``inf`` (``.inf`` in YAML) with ``update="proximal"``.
        update: add to the gradients, or move the weights after the step, explicitly or by a proximal step.
        schedule: a factor on ``strength`` over steps or epochs: a Schedule, or a mapping of its arguments.
        name: distinguishes several callbacks of a class, in checkpoints and in the log (``tying/<name>/penalty``).

    Attributes:
        penalties: the penalties of the model in training, each with its strength.
        examples_scale: factor on all strengths: one over the number of training examples, if the penalty belongs to
            the sum of the losses over them.

    Raises:
        ConfigurationError: at construction, for arguments out of range; when training starts, for optimizers and
            strategies with which the update would be wrong.
        NonFiniteError: in training, a penalised weight has become NaN or infinite.
    """

    def __init__(
        self,
        strength: float,
        update: Update = "gradient",
        schedule: Schedule | None = None,
        name: str | None = None,
    ) -> None:
        check_choice("update", update, get_args(Update))
        check_strength("strength", strength, update)
        schedule = parse_schedule(schedule) or Schedule()
        self.strength, self.update, self.schedule, self.name = float(strength), update, schedule, name
        self.penalties: list[TyingPenalty] = []
        self.examples_scale = 1.0
        self._steps: Counter[int] = Counter()  # by index of the optimizer
        self._window = 1.0  # fraction of a full accumulation window that the current step covers
        self._last_factor = 0.0  # on all strengths, at the last step
        self._hooks: dict[Optimizer, RemovableHandle] = {}
        self._has_begun = False  # whether the penalties of this fit have been created

    distinguished_by = "name"
    _log_class = ""  # the class, if another callback logs under the same name

    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        """Create the penalties to lower, each with its strength. Called once, when training starts."""
        raise NotImplementedError

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [group for penalty in self.penalties for group in penalty.groups]

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.affected(model) | members(self.groups) if self.strength else {}  # including constants

    @override
    def describe(self, model: nn.Module) -> str:
        if not self.ties:
            return f"{super().describe(model)}; {self._describe_strength()}"
        parameters = {id(parameter) for parameter in model.parameters()}
        groups = [group for group in self.groups if id(group.parameters[0]) in parameters] or resolve(model, self.ties)
        weights = sum(len(group.names) for group in groups)
        largest = max(gaps(groups), default=0.0)
        return (
            f"{counted(len(groups), 'group')}, {counted(weights, 'weight')}, {self._describe_strength()}; "
            f"gap {largest:.2g}"
        )

    def _describe_strength(self) -> str:
        examples = f" over {counted(round(1 / self.examples_scale), 'example')}" if self.examples_scale != 1 else ""
        schedule = self.schedule
        change = f", times {schedule.start:g} to {schedule.end:g} in {counted(schedule.length, schedule.unit)}"
        return f"strength {self.strength:g}{examples}{change * (schedule.length > 0)}"

    @property
    def log_prefix(self) -> str:
        """The prefix of the names of logged values."""
        return "/".join(filter(None, ("tying", self._log_class, self.name)))

    @property
    def steps_taken(self) -> int:
        """The number of steps so far, summed over the optimizers."""
        return self._steps.total()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = Counter({int(index): int(count) for index, count in state_dict["steps"].items()})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if is_fresh_run(trainer, stage):
            self._steps.clear()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_begun = False
        if not trainer.strategy.restore_checkpoint_after_setup:
            self.begin(trainer, pl_module)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the penalties, unless that is done: as early as the checkpoint, if any, has been restored."""
        if self._has_begun:
            return
        self._has_begun = True
        reshard(pl_module)
        for other in callbacks_of(trainer):
            if isinstance(other, TyingCallback):
                other.restore_structure(trainer, pl_module)
        namesakes = [c for c in callbacks_of(trainer) if isinstance(c, PenaltyCallback) and c.name == self.name]
        self._log_class = type(self).__name__ if len(namesakes) > 1 else ""
        with acting_on(pl_module, self, callbacks_of(trainer)):
            self.penalties = self.build_penalties(trainer, pl_module)
        self._micro_batches = 0  # since the last step
        self._announced = False  # whether Lightning has announced the coming step
        self._warned_unstable = self._warned_unannounced = False
        trained = {p for optimizer in trainer.optimizers for p in _learning_rates(optimizer) if p.requires_grad}
        idle = [group.names[0] for group in self.groups if trained.isdisjoint(group.parameters)]
        # BaseFinetuning adds them later
        if idle and not any(isinstance(c, pl.callbacks.BaseFinetuning) for c in callbacks_of(trainer)):
            warnings.warn(f"no optimizer trains any weight tied to {listed(idle)}: nothing is pulled", stacklevel=2)
        with acting_on(pl_module, self, callbacks_of(trainer)):
            self._register_hooks(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        self._project(trainer, pl_module)

    @torch.no_grad()
    def _project(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Take the steps of infinite strength once before training, so that averages start from equal weights."""
        rates = {p: rate for optimizer in trainer.optimizers for p, rate in _learning_rates(optimizer).items()}
        if not any(rates.values()):  # a warm-up begins at 0
            rates = dict.fromkeys(rates, 1.0)
        factors = [self._factor(trainer, optimizer) for optimizer in self._hooks]
        infinite = [p for p in self.penalties if any(math.isinf(_product(factor, p.strength)) for factor in factors)]
        for penalty in infinite:
            penalty.prox_(math.inf, rates)
        moved = {parameter for penalty in infinite for parameter in members(penalty.groups).values()}
        names = {name for name, parameter in model.named_parameters() if parameter in moved}
        for copied in averages(callbacks_of(trainer)) if trainer.global_step == 0 else ():  # made in setup
            for name, parameter in copied.named_parameters():
                if name in names:
                    parameter.copy_(model.get_parameter(name))

    def _register_hooks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        self._optimizers = [*trainer.optimizers]  # whose steps are counted, by their place here
        for optimizer in self._optimizers:
            if self.update == "gradient" and optimizer.param_groups[0].get("line_search_fn"):  # of LBFGS
                raise ConfigurationError(
                    "update='gradient' cannot be combined with the line search of LBFGS, whose loss lacks the penalty: "
                    "use update='proximal', line_search_fn=None, or add tying.soft.TyingPenalty to your training_step"
                )
            if self.update == "proximal":
                for penalty in self.penalties:
                    penalty.check_rates(_learning_rates(optimizer))
            self._hooks[optimizer] = optimizer.register_step_post_hook(partial(self._after_step, trainer, pl_module))

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:  # drop gradients that were accumulated without a step
            self._micro_batches = 0

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._hooks and optimizer not in self._hooks:  # it was made during training
            self._register_hooks(trainer, pl_module)
        self._window = (
            self._micro_batches / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        )
        self._announced, self._micro_batches = True, 0
        if self.update == "gradient" and self._window:
            factor, rates = self._factor(trainer, optimizer), _learning_rates(optimizer)
            if isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups):
                self._warn_if_unstable(factor, rates)
            self.add_gradients(factor * self._window, loss_scale(trainer, optimizer), rates)

    def add_gradients(self, factor: float, scale: float, rates: Rates) -> None:
        """Add the gradients of the penalties to the gradients of the loss.

        Args:
            factor: factor on all strengths.
            scale: factor by which the loss, and hence its gradients, is scaled.
            rates: learning rate of each parameter of the optimizer.
        """
        for penalty in self.penalties:
            penalty.add_gradients_(factor * scale * penalty.strength, dict.fromkeys(rates, 1.0))

    def _after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, *_: Any) -> None:
        announced, self._announced = self._announced, False
        if self.update == "gradient" and not announced:
            if not self._warned_unannounced:
                self._warned_unannounced = True
                warnings.warn(
                    f"{type(self).__name__}: an optimizer made a step without Lightning, so that nothing could be "
                    "added to the gradients: nothing is pulled. Use the optimizer that self.optimizers() returns, or "
                    "update='decoupled' or 'proximal'",
                    stacklevel=2,
                )
            return
        if not self._window or getattr(optimizer, "found_inf", None):  # set by a scaler while a fused optimizer steps
            return
        self.check_finite(wait=self.update != "gradient")  # before NaN spreads from one weight to another
        self._last_factor, rates = self._factor(trainer, optimizer), _learning_rates(optimizer)
        if self.update == "decoupled":
            self._warn_if_unstable(self._last_factor, rates)
        for penalty in self.penalties:
            if self.update == "decoupled":
                penalty.pull_(_product(self._last_factor, penalty.strength), rates)
            elif self.update == "proximal":
                penalty.prox_(_product(self._last_factor, penalty.strength), rates)
        self._steps[self._optimizers.index(optimizer)] += 1
        self.on_step(rates)

    def on_step(self, rates: Rates) -> None:
        """Hook for subclasses, called after a step of an optimizer with these learning rates."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._micro_batches and is_logging_step(trainer):
            pl_module.log(f"{self.log_prefix}/strength", _product(self._last_factor, self.strength))
            if (value := self.value()) is not None:
                pl_module.log(f"{self.log_prefix}/penalty", value)

    @torch.no_grad()
    def value(self) -> torch.Tensor | None:
        """Return the sum of ``strength · Ω`` with the last step's strengths; None without penalties, or if infinite."""
        strengths = [_product(self._last_factor, penalty.strength) for penalty in self.penalties]
        if not strengths or not all(map(math.isfinite, strengths)):
            return None
        return torch.stack([s * penalty() for penalty, s in zip(self.penalties, strengths, strict=True)]).sum()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()  # Lightning skips teardown after an exception

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.popitem()[1].remove()

    def _factor(self, trainer: pl.Trainer, optimizer: Optimizer) -> float:
        """Return the factor on all strengths in an optimizer's next step."""
        steps = self._steps[self._optimizers.index(optimizer)]
        return self.examples_scale * self.schedule(self.schedule.count(steps, trainer.current_epoch))

    def _warn_if_unstable(self, factor: float, rates: Rates) -> None:
        for penalty in self.penalties:
            if not self._warned_unstable and (message := penalty.stability_warning(factor * penalty.strength, rates)):
                self._warned_unstable = True
                warnings.warn(message, stacklevel=2)


def check_strength(name: str, strength: float | str, update: str) -> None:
    """Raise a ConfigurationError if a strength is negative, or infinite with an update other than the proximal."""
    if isinstance(strength, str):  # YAML reads 1e-3 as text
        with suppress(ValueError):
            strength = float(strength)
    check_range(name, strength, "[0, inf]")
    if math.isinf(float(strength)) and update != "proximal":
        raise ConfigurationError(f"{name}=inf needs update='proximal'; update={update!r} would diverge")


def _product(factor: float, strength: float) -> float:
    return factor * strength if factor else 0.0  # also for an infinite strength


def _learning_rates(optimizer: Optimizer) -> dict[nn.Parameter, float]:
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
