"""Stochastic depth: skip a block's branch in some steps, or for some samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.draws import draw, keep_mask
from tying.depth.merge import Branch, Merge, skip_branch
from tying.depth.rows import add_rows
from tying.errors import ConfigurationError, nearest

Mode = Literal["batch", "row", "subset", "auto"]
Scale = Literal["test", "train"]
BREAK_EVEN = 0.9  # above this keep, choosing rows costs more than the branch of the others: `speed depth`


def stochastic_depth(
    x: Tensor,
    branch: Callable[[], Tensor],
    keep: float,
    mode: Mode = "batch",
    scale: Scale = "test",
    training: bool = True,
) -> Tensor:
    """Return ``x + b · F`` with ``b`` drawn from a Bernoulli distribution, and in evaluation ``x + keep · F``.

    Args:
        x: the shortcut; samples along the first dimension, or along ``branch.dim``.
        branch: computes F, of x's shape. That of a block, a :class:`tying.depth.merge.Branch`, gives its parameters a
            gradient of zero where it is not computed, and can be computed for some of the samples.
        keep: probability of b = 1; with 0 the shortcut is returned in every scale, with 1 the sum.
        mode: ``"batch"``: one draw, for all samples, and all processes; F is not computed for b = 0. ``"row"``: one for
            each sample; F is computed for all. ``"subset"``: one for each sample; F is computed for those with b = 1,
            and its batch statistics are theirs. ``"auto"``: subset up to the keep at which it stops paying, then
            row, as also where subset could not be, or statistics are those of all processes (SyncBatchNorm).
        scale: ``"test"``: as above, and as published; ``"train"``: b / keep in training, and x + F in evaluation.
        training: draw, or take the mean.

    Raises:
        ConfigurationError: for ``"subset"``, if the branch cannot be computed for some samples, or one is kept alone
            and the branch has batch normalisation, or that of all processes.

    Source: G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Weinberger, Deep networks with stochastic depth, 2016.
    """
    if keep == 0:
        return skip_branch(x, branch)
    if keep == 1:
        return x + branch()
    if not training:
        return torch.add(x, branch(), alpha=keep if scale == "test" else 1)
    factor = 1 if scale == "test" else 1 / keep
    if mode == "batch":
        return torch.add(x, branch(), alpha=factor) if draw(keep) else skip_branch(x, branch)
    dim = branch.dim if isinstance(branch, Branch) else 0
    mask = keep_mask(keep, (x.shape[dim],), x.device)
    if mode == "row" or (mode == "auto" and (keep > BREAK_EVEN or not isinstance(branch, Branch))):
        return _rows(x, branch, mask, dim, factor)
    if not isinstance(branch, Branch):
        raise ConfigurationError("mode='subset' needs a branch that can be computed for some samples: use Residual")
    if _normalizes(branch, nn.SyncBatchNorm):  # a process that keeps no row would leave the others waiting
        if mode == "auto":
            return _rows(x, branch, mask, dim, factor)
        raise ConfigurationError("mode='subset' does not go with SyncBatchNorm, which waits for all: use mode='row'")
    rows = mask.nonzero().flatten()
    if len(rows) == 1 and _normalizes(branch, nn.modules.batchnorm._BatchNorm):
        if mode == "auto":
            return _rows(x, branch, mask, dim, factor)
        raise ConfigurationError(
            f"mode='subset' kept one of {x.shape[dim]} samples for a branch with batch normalisation, which needs the "
            "statistics of several: use mode='row', larger batches, or drop an incomplete last batch"
        )
    return add_rows(x, rows, branch(rows), dim, factor) if len(rows) else skip_branch(x, branch)


def _rows(x: Tensor, branch: Callable[[], Tensor], mask: Tensor, dim: int, factor: float) -> Tensor:
    found = branch()
    masked = found * mask.to(found.dtype).view([-1 if axis == dim else 1 for axis in range(x.ndim)])
    return torch.add(x, masked, alpha=factor)


def _normalizes(branch: Branch, kind: type[nn.Module]) -> bool:
    """Tell whether a branch uses batch statistics, by a layer of a kind."""
    return any(isinstance(part, kind) and part.training for module in branch.modules for part in module.modules())


class StochasticDepth(Merge):
    """The merge :func:`stochastic_depth`.

    Args:
        keep: probability of computing the branch.
        mode: see the function, as for all of these.
        scale: likewise.

    Raises:
        ConfigurationError: ``keep`` is no probability, or mode or scale are unknown.

    Example:
        >>> StochasticDepth(keep=0.5).eval()(torch.ones(2), lambda: torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, keep: float, mode: Mode = "batch", scale: Scale = "test") -> None:
        super().__init__(keep=keep)
        for name, value, kinds in (("mode", mode, Mode), ("scale", scale, Scale)):
            known = get_args(kinds)
            if value not in known:
                close = nearest(value, known)
                raise ConfigurationError(f"unknown {name} {value!r}: use {', '.join(map(repr, known))}.{close}")
        self.mode = mode
        self.scale = scale

    @override
    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        return stochastic_depth(x, branch, self.kept("keep"), self.mode, self.scale, self.training)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}, scale={self.scale!r}"
