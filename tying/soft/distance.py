"""How far the tensors of a group are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tying.soft.penalties import mean_of


def gap(tensors: Sequence[Tensor]) -> float:
    """Return ``sqrt(Σ‖w_i − w̄‖² / Σ‖w_i‖²)``: 0 for equal tensors, 1 for opposite ones.

    Example:
        >>> gap([torch.tensor([1.0]), torch.tensor([-1.0])])
        1.0
    """
    with torch.no_grad():
        tensors = [w.detach().double() for w in tensors]
        mean = mean_of(tensors)
        apart = sum(float((w - mean).square().sum()) for w in tensors)
        size = sum(float(w.square().sum()) for w in tensors)
    return math.sqrt(apart / size) if apart else 0.0
