"""Refuse to compute weights from others that are not finite."""

import torch
from torch import Tensor

from tying.errors import NonFiniteError


def check_finite(name: str, weight: Tensor) -> None:
    """Raise an error if a weight is not finite; a weight on the meta device has no values to check.

    Raises:
        NonFiniteError: the weight contains NaN or infinity.

    Example:
        >>> check_finite("encoder.weight", torch.tensor([1.0, float("inf")]))
        Traceback (most recent call last):
        tying.errors.NonFiniteError: 'encoder.weight' holds infinity. The initial weights are not finite: ...
    """
    if not weight.is_meta and not torch.isfinite(weight).all():
        kind = "NaN" if torch.isnan(weight).any() else "infinity"
        raise NonFiniteError(
            f"{name!r} holds {kind}. The initial weights are not finite: check what they were loaded from"
        )
