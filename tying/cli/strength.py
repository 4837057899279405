"""Say what a strength does at the learning rates of a model's optimizers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from tying.callbacks.penalty import PenaltyCallback
from tying.callbacks.soft import Coupling, SoftTying
from tying.lightning_namespace import pl
from tying.selection.tie import TiedGroup
from tying.soft import L1, L2, Huber
from tying.soft.strength import describe_factor, gap_factor

Trained = dict[nn.Parameter, tuple[Optimizer, dict[str, Any]]]  # the optimizer and the parameter group of each weight


class FixedLengthTrainer:
    """A Trainer of a given number of steps, for schedules of learning rates: to count them would load the data."""

    estimated_stepping_batches = 1000

    def __init__(self, trainer: pl.Trainer) -> None:
        self.wrapped = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def optimizers_of(model: pl.LightningModule, trainer: pl.Trainer | None = None) -> list[Optimizer]:
    """Return the optimizers that a model makes; none if it cannot make them without training.

    Args:
        model: the model, or a copy of it.
        trainer: the trainer; its length of training is not used.
    """
    stand_in = None if trainer is None else FixedLengthTrainer(trainer)
    try:
        if stand_in is not None:
            model.trainer = stand_in  # type: ignore[assignment]  # it has all attributes
        return [*_optimizers_in(model.configure_optimizers())]
    except Exception:  # the model's own code, which may need anything of training
        return []
    finally:
        model.trainer = None


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in what ``configure_optimizers`` returns, whose forms Lightning documents."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, Sequence):
        for part in configured:
            yield from _optimizers_in(part)


def describe_strength(
    callback: PenaltyCallback, groups: Sequence[TiedGroup], optimizers: Sequence[Optimizer]
) -> list[str]:
    """Describe what the penalty of a callback does to the gap of its groups in a step, without a loss.

    Args:
        callback: the callback; those other than SoftTying and Coupling are not described.
        groups: its groups.
        optimizers: the optimizers that train the model.

    Returns:
        A sentence for each learning rate and size of groups, from the slowest to the fastest; three at most.
    """
    strength = callback.strength * max(callback.schedule.start, callback.schedule.end)
    if isinstance(callback, Coupling):
        if callback.examples is None and 0 < strength < math.inf:
            return []  # training divides by the number of examples, which it counts
        strength /= callback.examples or 1
    elif not isinstance(callback, SoftTying):
        return []
    if not 0 < strength < math.inf:
        return ["strength 0 pulls nothing"] if not strength else ["an infinite strength closes the gap in each step"]
    trained: Trained = {
        weight: (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.requires_grad
    }
    sentences: dict[tuple[float, str], None] = {}
    for tied in groups:
        moving = [weight for weight in tied.parameters if weight in trained]
        if moving:
            members = len(tied) - len(moving) or len(tied)  # those that do not move hold the others by their number
            optimizer, settings = max((trained[weight] for weight in moving), key=lambda pair: _rate(pair[1]))
            sentence = _describe(callback, strength, members, optimizer, settings)
            sentences[_rate(settings) * members, sentence] = None
    ordered = [sentence for _, sentence in sorted(sentences) if sentence]
    return ordered if len(ordered) <= 3 else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group, before a scheduler's factor."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _describe(
    callback: PenaltyCallback, strength: float, members: int, optimizer: Optimizer, settings: dict[str, Any]
) -> str:
    """Describe one learning rate and size of groups; return "" for a penalty of another kind."""
    rate, penalty = _rate(settings), getattr(callback, "penalty", L2())
    is_gradient, momentum = callback.update == "gradient", 0.0
    if is_gradient and isinstance(optimizer, SGD):
        momentum = settings["momentum"]
    setting = f"lr {rate:g} · strength {strength:g} · m {members}{f' · momentum {momentum:g}' if momentum else ''}"
    if is_gradient and not isinstance(optimizer, SGD):
        kind = type(optimizer).__name__
        return (
            f"{setting}: {kind} rescales the pull together with the loss's gradients, so its speed is not known before "
            f"training: watch tying/gap, or use update='decoupled' or 'proximal', which {kind} does not rescale"
        )
    if isinstance(penalty, L1):
        step = rate * strength * max(1, members - 1) / (1 - momentum)
        return f"{setting}: moves each entry by up to {step:.2g} a step"
    if not isinstance(penalty, L2 | Huber):
        return ""
    factor = gap_factor(rate * strength * members, callback.update, momentum, settings.get("nesterov", False))
    limit = f", where it is below {penalty.delta:g}" if isinstance(penalty, Huber) else ""
    remedy = ". Lower the strength, or use update='proximal'" if factor > 1 else ""
    return f"{setting}: {describe_factor(factor)}{limit}{remedy}"
