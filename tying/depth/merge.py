"""Merges, which combine a branch with its shortcut, and blocks made of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tying.depth.rows import take_rows
from tying.errors import ConfigurationError


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


def skip_branch(x: Tensor, branch: Callable[[], Tensor] | Tensor) -> Tensor:
    """Return a copy of x, which the next layer may overwrite; a branch's parameters get a gradient of zero.

    Without it they would have none, optimizers would treat a step that skips a block unlike any other, and
    distributed training would wait for gradients that never come. In place of a branch, a tensor may be left out: a
    shortcut, say.

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> skip_branch(x, Branch(layer, [(x, 0)], [layer])).sum().backward()
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
        return skip_branch(branch(), x)


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
