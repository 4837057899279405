"""Refuse weights with values that are not finite or not real."""

import torch
from torch import Tensor

from tying.errors import ConfigurationError, NonFiniteError
from tying.torch_workarounds import has_values


def check_finite(name: str, weight: Tensor) -> None:
    """Raise an error if a weight is not finite; a meta or fake tensor has no values to check.

    Raises:
        NonFiniteError: the weight contains NaN or infinity.

    Example:
        >>> check_finite("encoder.weight", torch.tensor([1.0, float("inf")]))
        Traceback (most recent call last):
        tying.errors.NonFiniteError: 'encoder.weight' holds infinity. The initial weights are not finite: ...
    """
    if has_values(weight) and not torch.isfinite(weight).all():
        kind = "NaN" if torch.isnan(weight).any() else "infinity"
        raise NonFiniteError(
            f"{name!r} holds {kind}. The initial weights are not finite: check what they were loaded from"
        )


def check_real(name: str, weight: Tensor) -> None:
    """Raise an error unless a weight consists of real floating-point numbers.

    Raises:
        ConfigurationError: the weight is of complex numbers or integers.

    Example:
        >>> check_real("0.weight", torch.ones(2, dtype=torch.int8))
        Traceback (most recent call last):
        tying.errors.ConfigurationError: '0.weight' is torch.int8, and only real floating-point weights can be ...
    """
    if not weight.is_floating_point():
        raise ConfigurationError(
            f"{name!r} is {weight.dtype}, and only real floating-point weights can be computed from fewer numbers: "
            f"exclude it by '!{name}'"
        )
