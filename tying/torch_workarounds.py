"""Names of torch that are private, each with the reason; written against torch 2.11 to 2.15.

Everything else in this package uses torch's public names, `lightning_workarounds` holds those of Lightning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# fused operations over lists of tensors, as torch's own optimizers use them: there is no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

# makes a parametrized weight a property of its module's class, with the cache of `parametrize.cached()`: publicly this
# comes only with torch's own class, which copies share
inject_property = parametrize._inject_property


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution layer's output with another weight and bias: publicly, a layer takes only its own."""
    output: Tensor = layer._conv_forward(input, weight, bias)  # type: ignore[operator]  # a convolution's
    return output
