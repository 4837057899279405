"""A block of a branch and a shortcut, and the merges that combine them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from tying.depth.branch import Branch, left_out
from tying.errors import ConfigurationError

Own = TypeVar("Own", bound="Merge")


class Merge(nn.Module):
    """What combines a shortcut and a branch: a module without parameters, called as ``merge(x, branch)``.

    Args:
        keeps: its probabilities by name, which become attributes.

    Attributes:
        share: factor on what is dropped: 1 − keep; schedules over training set it.

    Raises:
        ConfigurationError: a probability is below 0 or above 1.
    """

    def __init__(self, **keeps: float) -> None:
        super().__init__()
        self.keeps = tuple(keeps)
        self.share = 1.0
        for name, keep in keeps.items():
            if not 0 <= keep <= 1:
                raise ConfigurationError(f"{name} is a probability, from 0 to 1, not {keep!r}")
            setattr(self, name, float(keep))

    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """Return what becomes of the shortcut's output and the branch."""
        raise NotImplementedError

    def kept(self, name: str) -> float:
        """Return a probability as it is now."""
        keep: float = getattr(self, name)
        return 1 - (1 - keep) * self.share if self.share != 1 else keep

    def with_keep(self: Own, keep: float) -> Own:
        """Return a copy with another probability, in place of all it has.

        Raises:
            ConfigurationError: it has none, or ``keep`` is none.
        """
        if not self.keeps:
            raise ConfigurationError(f"{type(self).__name__} keeps everything: it takes no keep")
        if not 0 <= keep <= 1:
            raise ConfigurationError(f"keep is a probability, from 0 to 1, not {keep}")
        other = copy.deepcopy(self)
        for name in self.keeps:
            setattr(other, name, float(keep))
        return other

    def with_share(self: Own, share: float) -> Own:
        """Return a copy that drops this share of what it drops."""
        other = copy.deepcopy(self)
        for name in self.keeps:
            setattr(other, name, 1 - (1 - getattr(self, name)) * share)
        return other

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return ", ".join(f"{name}={getattr(self, name):g}" for name in self.keeps)


class Sum(Merge):
    """The residual merge ``x + F``.

    Shape: x and the branch's output alike, any shape.

    Example:
        >>> import torch
        >>> Sum()(torch.ones(2), lambda: torch.ones(2))
        tensor([2., 2.])

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep residual learning for image recognition, 2016.
    """

    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """Return the shortcut plus the branch."""
        return x + branch()


class FeedForward(Merge):
    """The branch alone: a block without its shortcut.

    Example:
        >>> import torch
        >>> FeedForward()(torch.ones(2), lambda: torch.zeros(2))
        tensor([0., 0.])
    """

    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """Return the branch."""
        return left_out(branch(), x)


class Residual(nn.Module):
    """A residual block: ``activation(merge(shortcut(x), branch(x)))``.

    Args:
        branch: computes F(x).
        shortcut: what F(x) is merged with; ``None`` for x itself.
        merge: a module called as ``merge(shortcut, branch)``, where ``branch()`` computes F(x); ``None`` for
            :class:`Sum`.
        activation: applied to the merged output; ``None`` for none.

    Shape: samples along the first dimension.

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
        merged: Tensor = self.merge(self.shortcut(x), Branch(self.branch, [(x, 0)], [self.branch]))
        out: Tensor = self.activation(merged)
        return out
