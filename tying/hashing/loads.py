"""How evenly a hash uses its table."""

from __future__ import annotations

import torch
from torch import Tensor


def loads(index: Tensor, table_size: int) -> Tensor:
    """Return how many weights use each entry; zero weights (−1) use none.

    Args:
        index: integers in [−1, table_size), of any shape.
        table_size: number of entries.

    Returns:
        int64, (table_size,).

    Example:
        >>> loads(torch.tensor([0, 2, 2, -1]), table_size=3).tolist()
        [1, 0, 2]
    """
    used = index[index >= 0]
    return torch.bincount(used.flatten(), minlength=table_size)


def entropy(loads: Tensor) -> float:
    """Return ``H = −Σ p ln p`` of loads or probabilities, in nats: ln n where all are alike, 0 where one has all.

    Args:
        loads: (table_size,), not negative; need not sum to one. Of none, 0.

    Example:
        >>> round(entropy(torch.ones(1000)), 2)
        6.91
    """
    if not loads.any():
        return 0.0
    shares = loads.double() / loads.sum()
    return float(-torch.special.xlogy(shares, shares).sum()) + 0.0
