"""Least squares for weights that are linear in their parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(columns: Tensor, targets: Tensor) -> Tensor:
    """Return the linear combinations of columns that are nearest to targets, by least squares.

    Args:
        columns: (n, k).
        targets: (n, m).

    Returns:
        (k, m), in single precision or better.
    """
    precise = torch.promote_types(targets.dtype, torch.float32)
    if targets.is_meta:  # torch has no least squares there
        return targets.new_empty(columns.shape[1], targets.shape[1], dtype=precise)
    solution: Tensor = torch.linalg.lstsq(columns.to(precise), targets.to(precise)).solution
    return solution
