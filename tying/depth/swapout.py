"""Swapout and skip-forward: each unit takes its shortcut, its branch, both or neither."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from tying.depth.draws import keep_mask
from tying.depth.merge import Merge, add_branch, same_shape, skip_branch, zero_gradients
from tying.depth.tracing import leaf_function
from tying.torch_workarounds import is_recorded


@leaf_function
def swapout(x: Tensor, f: Tensor, skips: Tensor | None, branches: Tensor | None) -> Tensor:
    """Return ``Θ₁ ⊙ x + Θ₂ ⊙ f``.

    Args:
        x: the shortcut.
        f: the branch, of x's shape.
        skips: Θ₁, a bool mask that broadcasts to x's shape; ``None`` for ones.
        branches: Θ₂, a bool mask that broadcasts to x's shape; ``None`` for ones.

    Raises:
        ConfigurationError: the branch has another shape than x.

    Example:
        >>> on = torch.tensor([True, False])
        >>> swapout(torch.ones(2), torch.full((2,), 5.0), on, None), swapout(torch.ones(2), torch.ones(2), on, ~on)
        (tensor([6., 5.]), tensor([1., 1.]))

    Source: S. Singh, D. Hoiem and D. Forsyth, Swapout: learning an ensemble of deep architectures, 2016.
    """
    return _masked(x, skips) + _masked(same_shape(x, f), branches)


@leaf_function
def skip_forward(x: Tensor, f: Tensor, branches: Tensor) -> Tensor:
    """Return ``torch.where(branches, f, x)``: swapout with Θ₁ = 1 − Θ₂.

    Raises:
        ConfigurationError: the branch has another shape than x.

    Example:
        >>> skip_forward(torch.ones(2), torch.zeros(2), torch.tensor([True, False]))
        tensor([0., 1.])
    """
    return torch.where(branches, same_shape(x, f), x)


class Swapout(Merge):
    """The merge :func:`swapout`, with one draw per unit and mask: shortcut and branch are kept independently.

    In evaluation each mask is replaced by its mean: ``keep_skip · x + keep_branch · F``. The network's output then
    differs from its mean output in training, which :func:`tying.depth.sampled` estimates.

    Args:
        keep_skip: probability that Θ₁ is 1.
        keep_branch: probability that Θ₂ is 1.

    Raises:
        ConfigurationError: a probability is not in [0, 1].

    Example:
        >>> Swapout(0.5, 1.0).eval()(torch.ones(2), lambda: torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, keep_skip: float, keep_branch: float) -> None:
        super().__init__(keep_skip=keep_skip, keep_branch=keep_branch)

    @override
    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        keep_skip, keep_branch = self.keep_prob("keep_skip"), self.keep_prob("keep_branch")
        if keep_branch == 0:
            return skip_branch(x, branch) * (_mask(x, keep_skip) if self.training and keep_skip < 1 else keep_skip)
        if keep_skip == keep_branch == 1:
            return add_branch(x, branch)
        f = branch()
        if self.training:
            return swapout(x, f, *(None if keep == 1 else _mask(x, keep) for keep in (keep_skip, keep_branch)))
        return torch.add(keep_skip * x if keep_skip < 1 else x, same_shape(x, f), alpha=keep_branch)


class SkipForward(Merge):
    """The merge :func:`skip_forward`, with one draw per unit; zoneout applies it to steps of a recurrent network.

    In evaluation the mask is replaced by its mean: ``keep · F + (1 − keep) · x``.

    Args:
        keep: probability that a unit takes F(x). The zoneout probability is 1 − keep.

    Raises:
        ConfigurationError: the probability is not in [0, 1].

    Example:
        >>> SkipForward(0.25).eval()(torch.zeros(2), lambda: torch.ones(2))
        tensor([0.2500, 0.2500])
    """

    def __init__(self, keep: float) -> None:
        super().__init__(keep=keep)

    @override
    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        keep = self.keep_prob("keep")
        if keep == 0:
            return skip_branch(x, branch)
        f = same_shape(x, branch())
        if keep == 1:
            return zero_gradients(f, [x])
        return skip_forward(x, f, _mask(x, keep)) if self.training else torch.add(keep * f, x, alpha=1 - keep)


def _mask(x: Tensor, keep: float) -> Tensor:
    """Return a random mask in x's memory format; another format takes twice the time to apply."""
    if is_recorded():
        return keep_mask(keep, x.shape, x.device)
    return keep_mask(keep, (x.numel(),), x.device).as_strided(x.shape, torch.empty_like(x, dtype=torch.bool).stride())


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    return cast(Tensor, _Masked.apply(x, mask)) if mask.shape == x.shape and not is_recorded() else x * mask


class _Masked(torch.autograd.Function):
    """``x * mask`` for a bool mask, several times as fast as torch's product of floats and booleans."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return mask.view(torch.uint8).to(x.dtype).mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _masked(gradients[0], ctx.saved_tensors[0]), None
