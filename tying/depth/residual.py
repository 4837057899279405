"""A branch, a shortcut, and the merge that combines them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Branch = Callable[[], Tensor]  # computes the branch when called, so that a merge may decide not to


class Sum(nn.Module):
    """The residual merge ``x + F``.

    Shape: x and the branch's output alike, any shape.

    Example:
        >>> import torch
        >>> Sum()(torch.ones(2), lambda: torch.ones(2))
        tensor([2., 2.])

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep residual learning for image recognition, 2016.
    """

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        """Return the shortcut plus the branch."""
        return x + branch()


class Residual(nn.Module):
    """A residual block: ``activation(merge(shortcut(x), branch(x)))``.

    Args:
        branch: computes F(x).
        shortcut: what F(x) is merged with; ``None`` for x itself.
        merge: a module called as ``merge(shortcut, branch)``, where ``branch()`` computes F(x); ``None`` for
            :class:`Sum`.
        activation: applied to the merged output; ``None`` for none.

    Example:
        >>> import torch
        >>> Residual(nn.Identity())(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        merge: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.merge = Sum() if merge is None else merge
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        merged: Tensor = self.merge(self.shortcut(x), lambda: self.branch(x))
        out: Tensor = self.activation(merged)
        return out
