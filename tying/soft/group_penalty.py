"""A penalty applied to the groups of a model: as a value, a gradient, an explicit step or a proximal step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, listed, nearest
from tying.selection.relation import Relation
from tying.selection.tie import TiedGroup
from tying.soft.penalties import L1, L2, Penalty, group_mean

CPU_BATCH = 2**19  # entries: the differences of a batch stay in cache between being made and being used
DEVICE_BATCH = 2**26  # entries: few kernel launches, a bounded buffer
PENALTIES: dict[str, Penalty] = {"l2": L2(), "l1": L1()}
Rates = Mapping[nn.Parameter, float]


class TyingPenalty(nn.Module):
    """The penalty Ω of all groups of a model, without its strength, and the ways to lower it.

    The three in-place methods move members that require a gradient; ``rates`` narrows that to the parameters it
    holds, each moving at its own rate (a learning rate, say). All other members stay, as constants.

    Args:
        groups: tied groups, from :func:`tying.resolve`.
        penalty: ``"l2"``, ``"l1"``, ``Huber(delta)`` or a :class:`Penalty` of your own.
        strength: factor on Ω, which callbacks apply; an attribute, and no part of what this module computes.

    Raises:
        ConfigurationError: the penalty is unknown, or takes only pairs and a group is larger.

    Example:
        >>> from tying import resolve
        >>> model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        >>> _ = nn.init.constant_(model["a"].weight, 1.0), nn.init.constant_(model["b"].weight, 3.0)
        >>> penalty = TyingPenalty(resolve(model, ["a.weight ~ b.weight"]))
        >>> penalty().item()
        2.0
        >>> penalty.pull_(0.25)
        >>> model["a"].weight.item(), model["b"].weight.item()
        (1.5, 2.5)
        >>> penalty.prox_(float("inf"))
        >>> model["a"].weight.item(), model["b"].weight.item()
        (2.0, 2.0)
    """

    def __init__(self, groups: Sequence[TiedGroup], penalty: str | Penalty = "l2", strength: float = 1.0) -> None:
        super().__init__()
        self.groups = list(groups)  # not registered: the parameters belong to their model
        self.penalty = as_penalty(penalty)
        self.strength = strength
        for group in self.groups:
            if self.penalty.pairs_only and len(group) > 2:
                raise ConfigurationError(
                    f"{self.penalty} takes pairs, but {listed(group.names)} are one group of {len(group)}: "
                    "use 'l2' or 'l1', or ties that share no weight"
                )

    def forward(self) -> Tensor:
        """Return Ω summed over all groups: a scalar, differentiable, in float32 of weights in half precision."""
        values = [self.penalty.value([_widened(tensor) for tensor in group.tensors()]) for group in self.groups]
        return torch.stack(values).sum() if values else torch.zeros(())

    @torch.no_grad()
    def add_gradients_(self, strength: float, rates: Rates | None = None) -> None:
        """Add ``strength · ∂Ω`` (times the rate) to the gradients, which are created where there are none."""
        self._add_(strength, rates, _gradient_of)

    @torch.no_grad()
    def pull_(self, s: float, rates: Rates | None = None) -> None:
        """Take the explicit step ``w ← w − s ∂Ω`` (times the rate)."""
        self._add_(-s, rates, lambda parameter: parameter)

    @torch.no_grad()
    def prox_(self, s: float, rates: Rates | None = None) -> None:
        """Take the proximal step ``w ← argmin_v Σ_i ‖v_i − w_i‖² / (2 rate_i) + s Ω(v)``; s may be infinite."""
        if s == 0:
            return
        for group in self.groups:
            speeds = [_rate(parameter, rates) for parameter in group.parameters]
            if any(speeds):
                values = self.penalty.prox(group.tensors(), s, speeds)
                members = zip(group.parameters, group.relations, values, speeds, strict=True)
                for parameter, relation, value, speed in members:
                    if speed:
                        parameter.copy_(relation(value))

    def check_rates(self, rates: Rates) -> None:
        """Raise, before any weight moves, if the penalty has no proximal step for these rates.

        Raises:
            ConfigurationError: the rates within a group differ where the penalty needs one rate.
        """
        for speeds in {tuple(_rate(parameter, rates) for parameter in group.parameters) for group in self.groups}:
            self.penalty.prox([torch.zeros(1)] * len(speeds), 1.0, speeds)

    def stability_warning(self, s: float, rates: Rates) -> str:
        """Return, in words, what explicit steps by ``s ∂Ω`` would move ever further apart, if anything.

        That is a group of m members with rate · s · curvature > 2 / m; with a single member that moves, 2 / (m − 1).
        """
        largest = max(map(len, self.groups), default=1)
        if max(rates.values(), default=0.0) * s * self.penalty.curvature <= 2 / largest:
            return ""
        for group in self.groups:
            moving = [speed for parameter in group.parameters if (speed := _rate(parameter, rates))]
            among = len(group) - (len(moving) == 1)
            step = max(moving, default=0.0) * s
            if step * self.penalty.curvature > 2 / among:
                bound = f"2/{'m' if among == len(group) else '(m − 1)'} = {2 / among:.3g}"
                return (
                    f"lr · strength = {step:.3g} is past the stability bound {bound} of the group of "
                    f"{group.names[0]!r}: its weights will oscillate apart. Lower the strength, or use "
                    "update='proximal', which is stable at any strength"
                )
        return ""

    def _add_(self, scale: float, rates: Rates | None, receiver: Callable[[nn.Parameter], Tensor]) -> None:
        if scale == 0:
            return
        lanes: dict[tuple[float, ...], list[Lane]] = {}
        collected: list[tuple[Tensor, Relation, Tensor]] = []
        for group in self.groups:
            speeds = tuple(_rate(parameter, rates) for parameter in group.parameters)
            if not any(speeds):
                continue
            receivers: list[Tensor | None] = []
            members = zip(group.parameters, group.to_source, group.relations, speeds, strict=True)
            for parameter, to_source, relation, speed in members:
                into = None
                if speed:
                    received = receiver(parameter)
                    into = to_source(received)
                    if not _shares_storage(into, received):  # this relation copies: collect now, lay out afterwards
                        into = torch.zeros_like(into)
                        collected.append((received, relation, into))
                receivers.append(into)
            lanes.setdefault(speeds, []).append((group.tensors(), receivers))
        for speeds, alike in lanes.items():
            for batch in _batches(alike):
                weights = [[*column] for column in zip(*(weights for weights, _ in batch), strict=True)]
                into_of = [[*column] for column in zip(*(receivers for _, receivers in batch), strict=True)]
                self.penalty.add_gradient_(weights, into_of, [scale * speed for speed in speeds])
        for received, relation, into in collected:
            received.add_(relation(into))


Lane = tuple[Sequence[Tensor], Sequence[Tensor | None]]  # one group: its tensors, and where their gradients go


def as_penalty(penalty: str | Penalty) -> Penalty:
    """Return the penalty that a name stands for, or the penalty itself.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        known = ", ".join(map(repr, PENALTIES))
        raise ConfigurationError(
            f"unknown penalty {penalty!r}: use {known}, Huber(delta) or a subclass of tying.soft.Penalty."
            + nearest(str(penalty), PENALTIES)
        )
    return PENALTIES[penalty]


def _rate(parameter: nn.Parameter, rates: Rates | None) -> float:
    if not parameter.requires_grad:
        return 0.0
    return 1.0 if rates is None else rates.get(parameter, 0.0)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.is_sparse:
        raise ConfigurationError(
            f"a tied weight of shape {tuple(parameter.shape)} has sparse gradients, to which no dense pull can be "
            "added: use sparse=False, or update='decoupled' or 'proximal'"
        )
    return parameter.grad


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _batches(lanes: Iterable[Lane]) -> Iterable[list[Lane]]:
    """Cut and collect groups of equal size into batches whose differences stay in a processor's cache."""
    batch: list[Lane] = []
    filled, limit = 0, 0
    for weights, receivers in lanes:
        limit = CPU_BATCH if weights[0].device.type == "cpu" else DEVICE_BATCH
        for piece in _pieces(weights, receivers, limit):
            batch.append(piece)
            filled += piece[0][0].numel()
            if filled >= limit:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _pieces(weights: Sequence[Tensor], receivers: Sequence[Tensor | None], limit: int) -> Iterable[Lane]:
    """Cut one group along its first dimension, or flat where memory allows, into pieces of about ``limit`` entries."""
    size = weights[0].numel()
    if size <= limit or not weights[0].dim():
        yield weights, receivers
        return
    if all(tensor.is_contiguous() for tensor in [*weights, *receivers] if tensor is not None):
        weights = [weight.view(-1) for weight in weights]
        receivers = [None if into is None else into.view(-1) for into in receivers]
    rows = max(1, limit * weights[0].shape[0] // size)
    cut_receivers = [torch.split(into, rows) if into is not None else None for into in receivers]
    for index, pieces in enumerate(zip(*(torch.split(weight, rows) for weight in weights), strict=True)):
        yield pieces, [cut[index] if cut is not None else None for cut in cut_receivers]


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, if its own type could not hold a sum of squares."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gap(tensors: Sequence[Tensor]) -> float:
    """Return ``sqrt(Σ‖w_i − w̄‖² / Σ‖w_i‖²)``: 0 for equal tensors, 1 for opposite ones.

    Example:
        >>> gap([torch.tensor([1.0]), torch.tensor([-1.0])])
        1.0
    """
    with torch.no_grad():
        tensors = [w.detach().double() for w in tensors]
        mean = group_mean(tensors)
        apart = sum(float((w - mean).square().sum()) for w in tensors)
        size = sum(float(w.square().sum()) for w in tensors)
    return math.sqrt(apart / size) if apart else 0.0
