"""Detect non-finite weights before ties spread them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tying.errors import NonFiniteError, listed
from tying.selection.tie import TiedGroup
from tying.torch_workarounds import foreach_norm
from tying.weights.sharding import is_sharded, local
from tying.weights.sharding import largest as largest_anywhere


@dataclass(frozen=True)
class Magnitudes:
    """The largest magnitude in each tensor; NaN if the tensor contains NaN.

    Attributes:
        names: the names of the tensors.
        largest: one value per tensor, in the CPU's memory.
        event: CUDA event after which ``largest`` is filled; None if it is filled already.
    """

    names: tuple[str, ...] = ()
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], sharded: bool = False) -> Magnitudes:
        """Measure tensors, except lazy and empty ones.

        Args:
            tensors: the tensors, by name.
            sharded: whether some are sharded; every process must then call this, and all get the same result.
        """
        tensors = {name: tensor.detach() for name, tensor in tensors.items() if not is_lazy(tensor) and tensor.numel()}
        names, values = (*tensors,), [*tensors.values()]
        if sharded:
            shards = [local(value) for value in values]
            values = [shard if shard.numel() else shard.new_zeros(1) for shard in shards]
        sums = (tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in values)
        on_cpu = all(tensor.device.type == "cpu" for tensor in values)
        if on_cpu and all(math.isfinite(abs(total.item())) for total in sums):  # fastest, and usually enough
            largest = torch.zeros(len(names))
        else:
            norms = foreach_norm(values, float("inf"))
            dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms), torch.float32)
            largest = torch.stack([norm.to(norms[0].device, dtype) for norm in norms])
        if sharded and names:  # else a process that raises an error leaves the others waiting for it
            kinds = largest_anywhere(largest.isnan() * 2.0 + largest.isinf())  # a maximum may lose NaN
            largest = largest.new_tensor([0.0, math.inf, math.nan])[kinds.long()]
        if largest.device.type != "cuda":
            return cls(names, largest.cpu())
        pinned = torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True).copy_(largest, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        return cls(names, pinned, event)

    def is_known(self, sharded: bool = False) -> bool:
        """Return whether the values can be read without waiting; if sharded, the same in all processes."""
        return self.event is None or (not sharded and bool(self.event.query()))  # type: ignore[no-untyped-call]  # torch's own

    def nonfinite(self) -> dict[str, str]:
        """Return "NaN" or "infinity" for each tensor that is not finite, by name."""
        if self.event is not None:
            self.event.synchronize()
        return {
            name: "NaN" if math.isnan(value) else "infinity"
            for name, value in zip(self.names, self.largest.tolist(), strict=True)
            if not math.isfinite(value)
        }


class FiniteCheck:
    """Detects weights that contain NaN or infinity, and reports which gradients were non-finite before.

    A measurement is one reduction. On a GPU its result is copied to pinned memory in the background, so that a report
    one step later does not wait.

    Args:
        context: name of the callback that ties the weights, for messages.

    Attributes:
        weights: the weights to measure, by name.
        groups: the tied groups; errors name the weights to which a non-finite weight is tied.
        sharded: whether some weights are sharded; see :meth:`follow`.
        steps_seen: the number of steps at the last measurement.

    Example:
        >>> check, weight = FiniteCheck("SoftTying"), nn.Parameter(torch.ones(3))
        >>> check.follow({"a": weight}, groups=[])
        >>> check.measure()
        >>> check.report()
        >>> with torch.no_grad():
        ...     _ = weight[0].fill_(float("nan"))
        >>> check.measure()
        >>> check.report()
        Traceback (most recent call last):
        tying.errors.NonFiniteError: SoftTying: 'a' holds NaN. ...
    """

    def __init__(self, context: str) -> None:
        self._context = context
        self.weights: Mapping[str, nn.Parameter] = {}
        self.groups: Sequence[TiedGroup] = ()
        self.sharded = False
        self.steps_seen = 0
        self._measured: Magnitudes | None = None  # None if reported
        self._gradients = Magnitudes()
        self._warns = True

    def follow(self, weights: Mapping[str, nn.Parameter], groups: Sequence[TiedGroup]) -> None:
        """Check these weights, and name these groups, from now on; in every process, if weights are sharded."""
        self.weights, self.groups = weights, groups
        self.sharded = any(map(is_sharded, weights.values()))

    def check(self) -> None:
        """Measure and report all weights at once, frozen ones too, before training starts.

        Raises:
            NonFiniteError: some are not finite.
        """
        if nonfinite := Magnitudes.of(self.weights, self.sharded).nonfinite():
            raise NonFiniteError(
                f"{self._describe(nonfinite)}. The initial weights are not finite: check what they were loaded from"
            )

    def measure_gradients(self, optimizer: Optimizer, scaled: bool = False) -> None:
        """Measure the gradients of weights, before clipping spreads or hides a non-finite one.

        Args:
            optimizer: the optimizer that is about to step; only gradients of its parameters are measured.
            scaled: whether the loss is scaled. A scaler skips steps with non-finite gradients: there is no warning.
        """
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = _gradients({n: w for n, w in self.weights.items() if id(w) in stepped})
        self._gradients = Magnitudes.of(gradients, self.sharded)
        self._warns &= not scaled

    def measure(self) -> None:
        """Measure the weights that are trained."""
        trained = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        self._measured = Magnitudes.of(trained, self.sharded)

    def report(self, wait: bool = True) -> None:
        """Report the last measurement unless it has already been reported.

        Args:
            wait: whether to wait for a GPU; if not, a measurement that is not ready is reported later. One of sharded
                weights on a GPU always is, so that all processes report it in the same step.

        Raises:
            NonFiniteError: some weights are not finite.

        Warns:
            UserWarning: once, if weights are finite although gradients are not, because clipping or the optimizer hid
                them.
        """
        if self._measured is None or not (wait or self._measured.is_known(self.sharded)):
            return
        nonfinite = self._measured.nonfinite()
        self._measured = None
        if nonfinite:
            gradients = (
                self._gradients if self._gradients.names else Magnitudes.of(_gradients(self.weights), self.sharded)
            )
            raise NonFiniteError(
                f"{self._describe(nonfinite, gradients.nonfinite())}. Lower the learning rate, clip gradients, or "
                "inspect the batch; checkpoints are from before"
            )
        if self._warns and (wait or self._gradients.is_known(self.sharded)):
            if hidden := self._gradients.nonfinite():
                self._warns = False
                warnings.warn(
                    f"{self._context}: {_describe_gradients(hidden)} before it was clipped: inspect the batch",
                    stacklevel=2,
                )
            self._gradients = Magnitudes()

    def _describe(self, nonfinite: Mapping[str, str], gradients: Mapping[str, str] | None = None) -> str:
        partners = (
            f"{listed(sorted(broken))} is tied to {listed(others)}"
            for group in self.groups
            if (broken := nonfinite.keys() & {*group.names})
            and (others := [name for name in group.names if name not in broken])
        )
        parts = [
            listed((f"{name!r} holds {kind}" for name, kind in nonfinite.items()), limit=3),
            _describe_gradients(gradients or {}),
            listed(partners, limit=3),
        ]
        return f"{self._context}: {'; '.join(filter(None, parts))}"


def _gradients(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: w.grad for name, w in weights.items() if w.grad is not None and not w.grad.is_sparse}


def _describe_gradients(nonfinite: Mapping[str, str]) -> str:
    return listed((f"the gradient of {name!r} held {kind}" for name, kind in nonfinite.items()), limit=3)
