"""Stochastic depth: skip the branch of a residual block in some steps, or for some samples."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.draws import draw, keep_mask
from tying.depth.merge import (
    FUNCTION_OBSTACLE,
    Branch,
    ComputedBranch,
    Merge,
    add_branch,
    branch_dim,
    is_whole,
    same_shape,
    skip_branch,
)
from tying.depth.rows import add_rows, put_rows
from tying.depth.tracing import leaf_function
from tying.errors import ConfigurationError, check_choice
from tying.torch_workarounds import is_proxy, is_recorded

Mode = Literal["batch", "row", "subset", "auto"]
Scale = Literal["test", "train"]
BREAK_EVEN = 0.9  # above this keep, selecting samples is slower than computing all: `benchmarks speed depth`
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def stochastic_depth(
    x: Tensor,
    branch: Callable[[], Tensor],
    keep: float,
    mode: Mode = "batch",
    scale: Scale = "test",
    training: bool = True,
) -> Tensor:
    """Return ``x + b · F`` with ``b`` drawn from a Bernoulli distribution, and ``x + keep · F`` in evaluation.

    Args:
        x: the shortcut; samples along the first dimension, or along ``branch.dim``.
        branch: computes F, of x's shape. A :class:`tying.depth.merge.Branch` can be computed for some samples, and
            gives its parameters a gradient of zero if it is skipped.
        keep: probability of b = 1. With 0 the result is x, and with 1 it is x + F, for either scale.
        mode: ``"batch"``: one draw for all samples and processes; F is not computed for b = 0. ``"row"``: one draw for
            each sample; F is computed for all. ``"subset"``: one draw for each sample; F is computed for those with
            b = 1, and takes its batch statistics from them. ``"auto"``: like ``"subset"`` if that is faster and
            possible, else like ``"row"``.
        scale: ``"test"``: the equations above, as published; ``"train"``: x + b / keep · F in training, and x + F in
            evaluation.
        training: whether to draw.

    In graphs and transforms the branch is computed for all samples: ``torch.fx`` records the merge of the branch's
    output as one node; ``torch.export`` and ``torch.func.vmap`` draw a mask, one for all samples in mode ``"batch"``
    (each process then draws its own) and one for each sample in the others.

    Raises:
        ConfigurationError: x and the output of the branch differ in shape; mode is ``"subset"``, and the branch is
            neither a module nor a Branch, or has arguments without rows, or has SyncBatchNorm, or has batch
            normalisation while only one sample is kept.

    Source: G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Weinberger, Deep networks with stochastic depth, 2016.
    """
    if is_proxy(x):
        return _merge_computed(x, branch(), branch_dim(branch), keep, mode, scale, training)
    if keep == 0:
        return skip_branch(x, branch)
    if keep == 1 or not training:
        return add_branch(x, branch, keep if scale == "test" else 1)
    factor = 1 if scale == "test" else 1 / keep
    if mode == "batch" and not is_recorded():
        return add_branch(x, branch, factor) if draw(keep) else skip_branch(x, branch)
    return _masked_depth(x, branch, keep, mode, factor)


def _masked_depth(x: Tensor, branch: Callable[[], Tensor], keep: float, mode: Mode, factor: float) -> Tensor:
    """Return ``x + factor · b · F`` with a mask b: of one draw in mode ``"batch"``, else of one for each sample."""
    dim, recorded = branch_dim(branch), is_recorded()
    mask = keep_mask(keep, (1 if mode == "batch" else x.shape[dim],), x.device)
    obstacle: str | None = FUNCTION_OBSTACLE
    if isinstance(branch, Branch) and not recorded and (mode == "subset" or (mode == "auto" and keep <= BREAK_EVEN)):
        rows = mask.nonzero().flatten()
        if (obstacle := _subset_obstacle(branch, len(rows), len(mask))) is None:
            if not len(rows):
                return skip_branch(x, branch)
            if branch.whole and factor == 1:
                return put_rows(x, rows, branch.output(rows))
            return add_rows(x, rows, same_shape(x, branch(rows), len(rows), dim), dim, factor)
    if mode == "subset" and not recorded:
        raise ConfigurationError(f"mode='subset' {obstacle}")
    mask = mask.view([-1 if axis == dim else 1 for axis in range(x.ndim)])
    if is_whole(branch) and factor == 1:
        return torch.where(mask, branch.output(), x)
    f = same_shape(x, branch())
    return torch.add(x, f * mask.to(f.dtype), alpha=factor)


@leaf_function
def _merge_computed(x: Tensor, f: Tensor, dim: int, keep: float, mode: Mode, scale: Scale, training: bool) -> Tensor:
    """Merge the output of a branch when a graph of ``torch.fx`` runs."""
    return stochastic_depth(x, ComputedBranch(f, dim), keep, mode, scale, training)


def _subset_obstacle(branch: Branch, selected: int, count: int) -> str | None:
    """Return why a branch cannot be computed for only ``selected`` of ``count`` samples, or None if it can."""
    if (obstacle := branch.obstacle()) is not None:
        return obstacle
    norms = [
        part
        for module in branch.modules
        for part in module.modules()
        if isinstance(part, BATCH_NORMS) and part.training
    ]
    if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):  # others would wait for a process that keeps none
        return "cannot be combined with SyncBatchNorm, which waits for all processes: use mode='row'"
    return (
        f"kept one of {count} samples for a branch with batch normalisation, which needs the statistics of several: "
        "use mode='row', larger batches, or drop an incomplete last batch"
        if norms and selected == 1
        else None
    )


class StochasticDepth(Merge):
    """The merge :func:`stochastic_depth`, which documents the arguments.

    Args:
        keep: probability of computing the branch.
        mode: unit of the draws: ``"batch"``, ``"row"``, ``"subset"`` or ``"auto"``.
        scale: when outputs are scaled: ``"test"`` or ``"train"``.

    Raises:
        ConfigurationError: ``keep`` is not in [0, 1], or mode or scale is unknown.

    Example:
        >>> StochasticDepth(keep=0.5).eval()(torch.ones(2), lambda: torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, keep: float, mode: Mode = "batch", scale: Scale = "test") -> None:
        super().__init__(keep=keep)
        check_choice("mode", mode, get_args(Mode))
        check_choice("scale", scale, get_args(Scale))
        self.mode, self.scale = mode, scale

    @override
    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        return stochastic_depth(x, branch, self.keep_prob("keep"), self.mode, self.scale, self.training)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}, scale={self.scale!r}"
