"""Weights that are no longer finite, told before what they are tied to follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from tying.errors import NonFiniteError, listed
from tying.ties import TiedGroup


class FiniteWatch:
    """Raises where weights hold NaN or infinity.

    A look is one reduction over the weights. On a processor it tells at once; on a device, where that would wait for
    all work in its queue, it tells what the look before has found.

    Args:
        asker: who ties them.

    Example:
        >>> watch, weight = FiniteWatch("SoftTying"), nn.Parameter(torch.ones(3))
        >>> watch.look({"a": weight})
        >>> with torch.no_grad():
        ...     _ = weight[0].fill_(float("nan"))
        >>> watch.look({"a": weight})
        Traceback (most recent call last):
        tying.errors.NonFiniteError: SoftTying: 'a' holds 1 NaN and 0 infinite entries of 3. ...
    """

    def __init__(self, asker: str) -> None:
        self._asker = asker
        self._last: Tensor | None = None

    def look(self, weights: Mapping[str, nn.Parameter], groups: Sequence[TiedGroup] = ()) -> None:
        """Look at weights, by name.

        Args:
            weights: those that no optimizer trains are left out.
            groups: who is tied to whom, for the error.

        Raises:
            NonFiniteError: some are not finite.
        """
        trained = {name: weight.detach() for name, weight in weights.items() if weight.requires_grad}
        if not trained:
            return
        largest = get_total_norm(trained.values(), float("inf"))
        seen, self._last = (self._last if self.waits(largest) else largest), largest
        if seen is None or torch.isfinite(seen):
            return
        wrong = {name: weight for name, weight in trained.items() if not torch.isfinite(weight).all()}
        told = [f"{name!r} holds {_count(weight)}" for name, weight in wrong.items()]
        ties = [_partners(group, wrong) for group in groups]
        raise NonFiniteError(
            f"{self._asker}: {listed(told)}. {listed(filter(None, ties))}{'. ' * any(ties)}Lower the learning rate, "
            "clip gradients, or look at the batch; the newest checkpoint is from before"
        )

    @staticmethod
    def waits(tensor: Tensor) -> bool:
        """Tell whether reading a value waits for other work."""
        return tensor.device.type != "cpu"


def _count(weight: Tensor) -> str:
    nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
    return f"{nan} NaN and {infinite} infinite entries of {weight.numel():,}"


def _partners(group: TiedGroup, wrong: Iterable[str]) -> str:
    """Return to whom a group ties what is wrong, in words; nothing where it holds nothing of that."""
    found = {*wrong} & {*group.names}
    others = [name for name in group.names if name not in found]
    return f"{listed(sorted(found))} is tied to {listed(others)}" if found and others else ""
