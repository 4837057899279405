"""Check the inputs and states of recurrent layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tying.errors import ConfigurationError


def steps_first(x: Any, features: int, batch_first: bool = False) -> Tensor:
    """Return sequences as (steps, batch, features).

    Raises:
        ConfigurationError: x is no such tensor, or has no steps.

    Example:
        >>> import torch
        >>> steps_first(torch.zeros(2, 5, 3), 3, batch_first=True).shape
        torch.Size([5, 2, 3])
    """
    if isinstance(x, PackedSequence):
        raise ConfigurationError("packed sequences are taken by ZoneoutLSTM alone: pad these, and mask the loss")
    if x.ndim != 3 or x.shape[2] != features:
        axes = "batch, steps" if batch_first else "steps, batch"
        raise ConfigurationError(f"inputs are ({axes}, {features}), not {tuple(x.shape)}")
    if not x.shape[1 if batch_first else 0]:
        raise ConfigurationError("an empty sequence has no steps: give one of length 1 or more")
    steps: Tensor = x.transpose(0, 1) if batch_first else x
    return steps


def check_state(found: Any, expected: tuple[tuple[int, ...], ...]) -> None:
    """Check the shapes of a state's parts.

    Raises:
        ConfigurationError: they are others.
    """
    shapes = tuple(tuple(part.shape) for part in found)
    if shapes != expected:
        raise ConfigurationError(f"states are {_listed(expected)}, not {_listed(shapes)}")


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(map(str, shapes))
