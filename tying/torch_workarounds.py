"""Names of torch that are private, each with the reason; written against torch 2.11 to 2.15.

Everything else in this package uses torch's public names, `lightning_workarounds` holds those of Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# fused operations over lists of tensors, as torch's own optimizers use them: there is no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub


def compute_or_cached(module: nn.Module, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return a parametrized weight, computed once within ``parametrize.cached()``, whose state torch does not publish.

    Args:
        module: the parametrized module.
        name: the weight's name.
        compute: computes the weight.
    """
    if not parametrize._cache_enabled:
        return compute()
    key = (id(module), name)
    if key not in parametrize._cache:
        parametrize._cache[key] = compute()
    weight = parametrize._cache[key]
    assert weight is not None
    return weight


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution layer's output with another weight and bias: publicly, a layer takes only its own."""
    output: Tensor = layer._conv_forward(input, weight, bias)  # type: ignore[operator]  # a convolution's
    return output
