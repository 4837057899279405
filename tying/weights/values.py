"""Refuse weights with values that are not finite or not real."""

import torch
from torch import Tensor

from tying.errors import ConfigurationError, NonFiniteError
from tying.torch_workarounds import has_values
from tying.weights.sharding import is_sharded


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


def check_whole(name: str, weight: Tensor) -> None:
    """Raise an error if a weight is sharded over processes: it cannot be computed from other parameters any more.

    Raises:
        ConfigurationError: it is sharded.

    Example:
        >>> check_whole("0.weight", torch.ones(2))
    """
    if is_sharded(weight):
        raise ConfigurationError(
            f"{name!r} is sharded over processes, and can no longer be computed from other parameters: change the "
            "model in configure_model before fully_shard, and shard the modules that share parameters together, as "
            "tying.hard.shard_groups(model, units) lists them. Tensor parallelism does not support computed weights: "
            "exclude those that parallelize_module shards, or use HardTying"
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
