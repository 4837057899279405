"""Detect non-finite weights before ties spread them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from tying.errors import NonFiniteError, listed
from tying.selection.index import clean_name
from tying.selection.tie import TiedGroup
from tying.torch_workarounds import foreach_norm


class FiniteCheck:
    """Tells which weights hold NaN or infinity, and whose gradients did so before.

    Looking is one reduction; telling reads what it found. On a GPU the result is on its way to pinned memory meanwhile:
    who tells a step later waits for nothing.

    Args:
        context: who ties the weights.

    Example:
        >>> watch, weight = FiniteWatch("SoftTying"), nn.Parameter(torch.ones(3))
        >>> watch.look({"a": weight})
        >>> watch.tell()
        >>> with torch.no_grad():
        ...     _ = weight[0].fill_(float("nan"))
        >>> watch.look({"a": weight})
        >>> watch.tell()
        Traceback (most recent call last):
        tying.errors.NonFiniteError: SoftTying: 'a' holds NaN. ...
    """

    def __init__(self, context: str) -> None:
        self._asker = context
        self._weights: Look | None = None
        self._gradients: Look | None = None
        self._looked_at: Mapping[str, nn.Parameter] = {}
        self._warns = True

    def look_at_gradients(self, weights: Mapping[str, nn.Parameter], scaled: bool = False) -> None:
        """Look at the gradients of weights, by name, before clipping spreads or hides what is in one of them.

        Args:
            weights: that are about to be stepped.
            scaled: of a loss that is scaled: where they are not finite, there is no step, as should be.
        """
        self._gradients = Look.at(_gradients(weights))
        self._warns &= not scaled

    def check(self, weights: Mapping[str, nn.Parameter], groups: Sequence[TiedGroup] = ()) -> None:
        """Look at weights and constants, before anything is pulled to them.

        Raises:
            NonFiniteError: some are not finite.
        """
        looked = Look.at({name: weight.detach() for name, weight in weights.items()})
        if looked is not None and (wrong := looked.found()):
            raise NonFiniteError(f"{self._told(wrong, groups)}. So they begin: look at what they were loaded from")

    def look(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Look at weights, by name; those that are not trained are left out."""
        self._looked_at = weights
        self._weights = Look.at({name: weight.detach() for name, weight in weights.items() if weight.requires_grad})

    def tell(self, groups: Sequence[TiedGroup] = (), wait: bool = True) -> None:
        """Tell what the last look at the weights has found, if it was not told.

        Args:
            groups: who is tied to whom, for the error.
            wait: for a GPU, if it must be; otherwise what is not known yet stays to be told.

        Raises:
            NonFiniteError: some are not finite.
        """
        if self._weights is None or not (wait or self._weights.is_known()):
            return
        looked, self._weights = self._weights, None
        if wrong := looked.found():
            gradients = self._gradients or Look.at(_gradients(self._looked_at))  # as they are, where nothing clips them
            before = gradients.found() if gradients is not None else {}
            raise NonFiniteError(
                f"{self._told(wrong, groups, before)}. Lower the learning rate, clip gradients, or look at the batch; "
                "checkpoints are from before"
            )
        self._warn_of_gradients(wait)

    def _told(
        self, wrong: Mapping[str, str], groups: Sequence[TiedGroup], gradients: Mapping[str, str] | None = None
    ) -> str:
        told = [
            listed((f"{name!r} holds {what}" for name, what in wrong.items()), limit=3),
            listed((f"the gradient of {name!r} held {what}" for name, what in (gradients or {}).items()), limit=3),
            listed(filter(None, (_partners(group, wrong) for group in groups)), limit=3),
        ]
        return f"{self._asker}: {'; '.join(filter(None, told))}"

    def _warn_of_gradients(self, wait: bool) -> None:
        """Warn, once, where weights are finite because clipping, or the optimizer, hid that gradients were not."""
        if self._gradients is None or not self._warns or not (wait or self._gradients.is_known()):
            return
        if found := self._gradients.found():
            self._warns = False
            told = listed((f"the gradient of {name!r} held {what}" for name, what in found.items()), limit=3)
            warnings.warn(f"{self._asker}: {told} before it was clipped: look at the batch", stacklevel=2)
        self._gradients = None


def _gradients(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return {name: gradient for name, gradient in found.items() if not gradient.is_sparse}


@dataclass(frozen=True)
class Look:
    """The largest magnitude in each of some tensors, NaN where there is one.

    Attributes:
        names: of the tensors.
        largest: in memory that is read without the device.
        event: when that is filled.
    """

    names: tuple[str, ...]
    largest: Tensor
    event: torch.cuda.Event | None = None

    @classmethod
    def at(cls, tensors: Mapping[str, Tensor]) -> Look | None:
        """Look at tensors; ``None`` where there is nothing to see."""
        seen = {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor) and tensor.numel()}
        if not seen:
            return None
        if all(tensor.device.type == "cpu" for tensor in seen.values()):
            sums = (tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in seen.values())
            if all(math.isfinite(abs(total.item())) for total in sums):  # the fastest look, and almost always the last
                return cls((*seen,), torch.zeros(len(seen)))
        norms = foreach_norm([*seen.values()], float("inf"))
        widest = functools.reduce(torch.promote_types, (norm.dtype for norm in norms), torch.float32)
        largest = torch.stack([norm.to(norms[0].device, widest) for norm in norms])
        if largest.device.type != "cuda":
            return cls((*seen,), largest.cpu())
        host = torch.empty(largest.shape, dtype=widest, pin_memory=True).copy_(largest, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        return cls((*seen,), host, event)

    def is_known(self) -> bool:
        """Tell whether reading it waits for nothing."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]  # torch's own

    def found(self) -> dict[str, str]:
        """Return what is in tensors that are not finite, by name."""
        if self.event is not None:
            self.event.synchronize()
        found = zip(self.names, self.largest.tolist(), strict=True)
        return {name: "NaN" if value != value else "infinity" for name, value in found if not value < float("inf")}


class Watching(pl.Callback):
    """A callback that ends training where a weight that several places use is not finite.

    Raises:
        NonFiniteError: a weight of :meth:`watched` has become NaN or infinite.
    """

    _watch = FiniteCheck("")
    _held: Mapping[str, nn.Parameter] | None = None
    _steps_seen = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        name = getattr(self, "name", None)
        self._watch = FiniteCheck(type(self).__name__ + (f" {name}" if name else ""))
        self._steps_seen = 0
        self.rewatch()

    def watched(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """Return the weights to watch, by name; called at the first step after :meth:`rewatch`."""
        return {}

    def rewatch(self) -> None:
        """Let it be asked again what to watch: the weights are others now."""
        self._held = None

    def _held_in(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        if self._held is None:
            self._held = self.watched(model)
        return self._held

    @property
    def groups(self) -> list[TiedGroup]:
        """Who of the watched is tied to whom."""
        return []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch.check(self._held_in(pl_module), self.groups)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._watch.tell(self.groups)
        if trainer.gradient_clip_val:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            held = self._held_in(pl_module).items()
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            self._watch.look_at_gradients({name: weight for name, weight in held if id(weight) in own}, scaled)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self._watch.look(self._held_in(pl_module))
            self._watch.tell(self.groups, wait=False)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training:
            self._watch.look(self._held_in(pl_module))
        self._watch.tell(self.groups)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch.tell(self.groups)


def kept_for(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of the modules that hold weights of these names, which may be computed from them."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in weights]
    held = {id(parameter) for owner in owners for parameter in owner.parameters()}
    return {clean_name(name): parameter for name, parameter in model.named_parameters() if id(parameter) in held}


def _partners(group: TiedGroup, wrong: Iterable[str]) -> str:
    """Return to whom a group ties what is wrong, in words; nothing where it holds nothing of that."""
    found = {*wrong} & {*group.names}
    others = [name for name in group.names if name not in found]
    return f"{listed(sorted(found))} is tied to {listed(others)}" if found and others else ""
