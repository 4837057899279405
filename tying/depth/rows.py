"""Rows of tensors: the samples of a batch that a merge keeps."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tying.errors import ConfigurationError


def is_rows(tensor: Tensor, count: int) -> bool | None:
    """Return whether a tensor has one row for each of ``count`` samples; None if that, or the samples' use, is unclear.

    A tensor of one row, or of no dimension, belongs to all samples. A square matrix of floating-point or bool entries
    may be a mask of positions for all of them.

    Example:
        >>> is_rows(torch.zeros(4, 3), 4), is_rows(torch.zeros(1, 3), 4), is_rows(torch.zeros(2, 3), 4)
        (True, False, None)
    """
    if tensor.ndim == 0 or (tensor.shape[0] == 1 and count != 1):
        return False
    is_mask = tensor.shape == (count, count) and (tensor.is_floating_point() or tensor.dtype == torch.bool)
    return True if tensor.shape[0] == count and (not is_mask or count == 1) else None


def rows_obstacle(tensor: Tensor, count: int, name: str) -> str | None:
    """Return why the rows of some samples cannot be taken from a tensor, or None if they can."""
    if is_rows(tensor, count) is not None:
        return None
    shape = tuple(tensor.shape)
    reason = "could be a mask for all samples" if shape == (count, count) else f"has no row for each of {count} samples"
    return (
        f"cannot select samples of {name}, which {reason}, of shape {shape}: give it a first dimension of {count}, or "
        "of 1 if all samples share it, or use mode='row'"
    )


def take_arguments(arguments: Any, rows: Tensor, count: int, name: str) -> Any:
    """Return arguments with the rows of some samples in place of all, in nested tuples, lists and dicts.

    Tensors that all samples share, and values that are no tensors, stay as they are.

    Args:
        arguments: a tensor, a tuple, list or dict of arguments, or another value.
        rows: indices of the samples, int64, (kept,).
        count: the number of all samples.
        name: the name of the arguments, for the error.

    Raises:
        ConfigurationError: it is unclear whether a tensor has rows, see :func:`is_rows`.

    Example:
        >>> take_arguments({"mask": torch.arange(3), "scale": 2.0}, torch.tensor([2]), 3, "arguments")
        {'mask': tensor([2]), 'scale': 2.0}
    """
    if isinstance(arguments, Tensor):
        if (obstacle := rows_obstacle(arguments, count, name)) is not None:
            raise ConfigurationError(f"mode='subset' {obstacle}")
        return take_rows(arguments, rows) if is_rows(arguments, count) else arguments
    if isinstance(arguments, dict):
        return {key: take_arguments(value, rows, count, f"{name}[{key!r}]") for key, value in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        taken = [take_arguments(value, rows, count, f"{name}[{number}]") for number, value in enumerate(arguments)]
        return type(arguments)(*taken) if hasattr(arguments, "_fields") else type(arguments)(taken)
    return arguments


def named_tensors(arguments: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested tuples, lists and dicts, and their names, as :func:`take_arguments` visits them.

    Example:
        >>> [name for name, _ in named_tensors([torch.zeros(1), {"bias": torch.zeros(1)}], "arguments")]
        ['arguments[0]', "arguments[1]['bias']"]
    """
    if isinstance(arguments, Tensor):
        yield name, arguments
    elif isinstance(arguments, (dict, tuple, list)):
        for key, value in arguments.items() if isinstance(arguments, dict) else enumerate(arguments):
            yield from named_tensors(value, f"{name}[{key!r}]")


def promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors in the promoted dtype of both."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


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
    stored = x.permute(order)  # several times faster if each sample is one contiguous row
    taken = stored.flatten(1).index_select(0, rows)
    return taken.view(len(rows), *stored.shape[1:]).permute(_inverse(order))


def add_rows(x: Tensor, rows: Tensor, added: Tensor, dim: int = 0, factor: float = 1.0) -> Tensor:
    """Return ``x.index_add(dim, rows, added, alpha=factor)``, in x's memory format and in the promoted dtype of both.

    Example:
        >>> add_rows(torch.zeros(3, 1), torch.tensor([2, 0]), torch.tensor([[1.0], [2.0]]), factor=2.0).tolist()
        [[4.0], [0.0], [2.0]]
    """
    x, added = promoted(x, added)
    order = _memory_order(x)
    if x.ndim < 2 or order[0] != dim:
        return x.index_add(dim, rows, added, alpha=factor)
    stored = x.permute(order)
    total: Tensor = _AddRows.apply(stored.flatten(1), rows, added.permute(order).flatten(1), factor)
    return total.view(stored.shape).permute(_inverse(order))


def put_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return ``x.index_copy(0, rows, values)``, in x's memory format and in the promoted dtype of both.

    Example:
        >>> put_rows(torch.zeros(3, 1), torch.tensor([2, 0]), torch.tensor([[1.0], [2.0]])).tolist()
        [[2.0], [0.0], [1.0]]
    """
    x, values = promoted(x, values)
    order = _memory_order(x)
    if x.ndim < 2 or order[0] != 0:
        return x.index_copy(0, rows, values)
    stored = x.permute(order)
    total = stored.flatten(1).index_copy(0, rows, values.permute(order).flatten(1))
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
