"""A branch of a block: computed when a merge asks for it, on all samples or on some, or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tying.depth.rows import take_rows


@dataclass(eq=False)
class Branch:
    """F at an input: a callable, so that a merge may decide not to compute it.

    Args:
        compute: F, of one or more tensors.
        inputs: these tensors, or ``None``, each with the dimension along which it holds samples; ``None`` for one that
            is the same for all samples.
        modules: what F consists of: a branch that is left out gives their parameters a gradient of zero.

    Example:
        >>> branch = Branch(nn.Identity(), [(torch.tensor([1.0, 2.0, 3.0]), 0)])
        >>> branch().tolist(), branch(rows=torch.tensor([2])).tolist()
        ([1.0, 2.0, 3.0], [3.0])
    """

    compute: Callable[..., Tensor]
    inputs: Sequence[tuple[Tensor | None, int | None]]
    modules: Sequence[nn.Module] = ()

    @property
    def dim(self) -> int:
        """The dimension of samples of the first input, and of the branch's output."""
        return self.inputs[0][1] or 0

    def __call__(self, rows: Tensor | None = None) -> Tensor:
        """Return F of all samples, or of those of these numbers."""
        return self.compute(*(_chosen(x, dim, rows) for x, dim in self.inputs))

    def parameters(self) -> Iterable[nn.Parameter]:
        """Yield the parameters of F."""
        for module in self.modules:
            yield from module.parameters()


def _chosen(x: Tensor | None, dim: int | None, rows: Tensor | None) -> Tensor | None:
    return x if x is None or dim is None or rows is None else take_rows(x, rows, dim)


def left_out(x: Tensor, branch: Callable[[], Tensor] | Tensor) -> Tensor:
    """Return a copy of x, which the next layer may overwrite; a branch's parameters get a gradient of zero.

    Without it they would have none, optimizers would treat a step that skips a block unlike any other, and
    distributed training would wait for gradients that never come. In place of a branch, a tensor may be left out: a
    shortcut, say.

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> left_out(x, Branch(layer, [(x, 0)], [layer])).sum().backward()
        >>> layer.weight.grad
        tensor([[0., 0.],
                [0., 0.]])
    """
    unused = branch.parameters() if isinstance(branch, Branch) else [branch] if isinstance(branch, Tensor) else []
    if torch.is_grad_enabled() and (leaving := [tensor for tensor in unused if tensor.requires_grad]):
        copy: Tensor = _ZeroGradients.apply(x, *leaving)
        return copy
    return x.clone()


class _ZeroGradients(torch.autograd.Function):
    """Copy the first input; the gradient of all others is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *unused: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return (*gradients, *zeros)
