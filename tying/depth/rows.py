"""Select samples of a batch, and add to selected samples."""

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """Return ``x.index_select(dim, rows)``, in x's memory format.

    Args:
        x: a tensor of any shape, with samples along ``dim``.
        rows: indices of the samples to keep, int64, (kept,).
        dim: the dimension of samples.

    Example:
        >>> take_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
        [[3.0], [1.0]]
    """
    order = _memory_order(x)
    if x.ndim < 2 or order[0] != dim:
        return x.index_select(dim, rows)
    stored = x.permute(order)  # contiguous: a sample is one row of a matrix, which is several times faster
    taken = stored.flatten(1).index_select(0, rows)
    return taken.view(len(rows), *stored.shape[1:]).permute(_inverse(order))


def add_rows(x: Tensor, rows: Tensor, added: Tensor, dim: int = 0, factor: float = 1.0) -> Tensor:
    """Return ``x.index_add(dim, rows, added, alpha=factor)``, in x's memory format and in the promoted dtype of both.

    Example:
        >>> add_rows(torch.zeros(3, 1), torch.tensor([2, 0]), torch.tensor([[1.0], [2.0]]), factor=2.0).tolist()
        [[4.0], [0.0], [2.0]]
    """
    dtype = torch.promote_types(x.dtype, added.dtype)
    x, added = x.to(dtype), added.to(dtype)
    order = _memory_order(x)
    if x.ndim < 2 or order[0] != dim:
        return x.index_add(dim, rows, added, alpha=factor)
    stored = x.permute(order)
    total: Tensor = _AddRows.apply(stored.flatten(1), rows, added.permute(order).flatten(1), factor)
    return total.view(stored.shape).permute(_inverse(order))


class _AddRows(torch.autograd.Function):
    """``x.index_add(0, rows, added, alpha=factor)``, without keeping ``added`` for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: Tensor, added: Tensor, factor: float) -> Tensor:
        return x.index_add(0, rows, added, alpha=factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.factor = inputs[3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        taken = gradients[0].index_select(0, *ctx.saved_tensors)
        return gradients[0], None, taken if ctx.factor == 1 else ctx.factor * taken, None


def _memory_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor, outermost in memory first."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda dim: -strides[dim])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
