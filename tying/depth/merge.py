"""Merges, which combine a branch with its shortcut, and residual blocks made of them."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.deprecated import class_aliases
from tying.depth.tracing import record_module, tracer_of
from tying.errors import ConfigurationError, check_range
from tying.torch_workarounds import is_jit_tracing, is_proxy, is_recorded


@dataclass(eq=False)
class Branch:
    """The branch F of a residual block and its inputs: a callable, so that a merge can skip its computation.

    Args:
        compute: F, a function of one or more tensors.
        inputs: the arguments of F, each with the dimension along which its samples lie, or ``None`` if all samples
            share the argument.
        modules: the modules that F uses. If a merge skips the branch, their parameters get a gradient of zero.

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
        """The dimension of samples of the first input and of the output."""
        return self.inputs[0][1] or 0

    def __call__(self, rows: Tensor | None = None) -> Tensor:
        """Return F of all samples, or of the samples with the given indices, int64."""
        return self.compute(
            *(x if rows is None or x is None or dim is None else take_rows(x, rows, dim) for x, dim in self.inputs)
        )

    def unused(self) -> Iterable[Tensor]:
        """Return the tensors that get a gradient of zero if a merge skips the branch."""
        return (parameter for module in self.modules for parameter in module.parameters())


class ComputedBranch(Branch):
    """A branch whose output is already computed, as in a graph of ``torch.fx``.

    Args:
        output: the output of the branch for all samples.
        dim: the dimension of samples.
    """

    def __init__(self, output: Tensor, dim: int = 0) -> None:
        super().__init__(lambda output: output, [(output, dim)])
        self.output = output

    @override
    def unused(self) -> Iterable[Tensor]:
        return [self.output]


def branch_dim(branch: Callable[[], Tensor]) -> int:
    """Return the dimension of samples of a branch; it is 0 for a function that is not a :class:`Branch`."""
    return branch.dim if isinstance(branch, Branch) else 0


def same_shape(x: Tensor, f: Tensor, rows: int | None = None, dim: int = 0) -> Tensor:
    """Return the output f of a branch, after checking that it has the shape of the shortcut x: a sum would broadcast.

    Args:
        x: the shortcut.
        f: the output of the branch.
        rows: number of samples along ``dim`` that the branch was computed for; ``None`` for all.
        dim: the dimension of samples.

    Raises:
        ConfigurationError: the shapes differ.

    Example:
        >>> same_shape(torch.ones(2), torch.zeros(2))
        tensor([0., 0.])
    """
    if is_proxy(x) or is_jit_tracing():
        return f  # the shapes are not known yet
    shape = x.shape if rows is None else torch.Size((*x.shape[:dim], rows, *x.shape[dim + 1 :]))
    if f.shape != shape:
        raise ConfigurationError(
            f"a merge needs a branch and a shortcut of the same shape, not {tuple(f.shape)} and {tuple(shape)}: let "
            "the branch keep the shape of its input, or give Residual a shortcut that changes it as the branch does"
        )
    return f


def zero_gradients(x: Tensor, unused: Iterable[Tensor]) -> Tensor:
    """Return a copy of x whose backward pass gives each unused tensor a gradient of zero.

    Without it, parameters of a skipped layer would have no gradient: optimizers would not apply weight decay and
    momentum to them, and distributed training would wait for the missing gradients. The next layer may overwrite
    the copy in place.

    Args:
        x: the tensor to copy.
        unused: parameters or other tensors; those that need no gradient are ignored.

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> zero_gradients(x, layer.parameters()).sum().backward()
        >>> layer.weight.grad
        tensor([[0., 0.],
                [0., 0.]])
    """
    if (tracer := tracer_of(x)) is not None:
        return cast(Tensor, tracer.create_proxy("call_function", zero_gradients, (x, [*unused]), {}))
    # torch.jit.trace traces again without gradients, and compares the graphs
    wanted = torch.is_grad_enabled() and not is_jit_tracing()
    trainable = [tensor for tensor in unused if tensor.requires_grad] if wanted else []
    if not is_recorded():
        return cast(Tensor, _ZeroGradients.apply(x, *trainable)) if trainable else x.clone()
    out = x.clone()
    for tensor in trainable:  # export traces through autograd functions: only an operation has a gradient there
        out = out + tensor.flatten()[:0].sum().to(x)  # the sum of no entries is 0
    return out


def skip_branch(x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
    """Return a copy of the shortcut x; the parameters of a :class:`Branch` get a gradient of zero."""
    return zero_gradients(x, branch.unused() if isinstance(branch, Branch) else ())


class _ZeroGradients(torch.autograd.Function):
    """Copy the first input; the gradients of all others are zero."""

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


@class_aliases("tying.depth.Merge")
class Merge(nn.Module):
    """Base class of merges, which combine the shortcut x of a residual block with its branch.

    A subclass defines ``forward(x, branch)``: ``branch()`` computes the branch, a tensor of x's shape.

    ``torch.fx`` records a merge as one node that takes the output of the branch: the graph always computes the branch,
    and the merge draws anew in each run. ``torch.export`` and ``torch.func.vmap`` replace decisions by masks.

    Args:
        probabilities: keep probabilities by name; each becomes an attribute.

    Attributes:
        draws: whether the merge is random; ``torch.fx`` traces the forward of one that is not.
        prob_names: names of the keep probabilities.
        drop_scale: factor on every drop probability ``1 − keep``; a schedule may change it during training.

    Raises:
        ConfigurationError: a probability is not in [0, 1].
    """

    draws: ClassVar[bool] = True

    def __init__(self, **probabilities: float) -> None:
        super().__init__()
        self.prob_names = tuple(probabilities)
        self.drop_scale = 1.0
        for name, keep in probabilities.items():
            check_range(name, keep, "[0, 1]")
            setattr(self, name, float(keep))

    def __call__(self, x: Tensor, branch: Any, dim: int = 0) -> Any:
        """Combine x with a branch or, in graphs of ``torch.fx``, with its output, whose samples lie along ``dim``."""
        computed = isinstance(branch, Tensor) or is_proxy(branch)
        if (tracer := tracer_of(x)) is not None and self.draws:
            arguments = (x, branch, dim) if computed else (x, branch(), branch_dim(branch))
            return record_module(tracer, self, arguments, {})
        return super().__call__(x, ComputedBranch(branch, dim) if computed else branch)

    def keep_prob(self, name: str) -> float:
        """Return the current value of a keep probability, ``1 − (1 − keep) · drop_scale``."""
        keep: float = getattr(self, name)
        return 1 - (1 - keep) * self.drop_scale if self.drop_scale != 1 else keep

    def with_keep(self, keep: float) -> Self:
        """Return a copy in which every keep probability has this value.

        Raises:
            ConfigurationError: the merge has no keep probability, or ``keep`` is not in [0, 1].
        """
        if not self.prob_names:
            raise ConfigurationError(f"{type(self).__name__} keeps everything: it takes no keep")
        check_range("keep", keep, "[0, 1]")
        return self.with_probabilities(dict.fromkeys(self.prob_names, float(keep)))

    def scaled(self, factor: float) -> Self:
        """Return a copy in which each keep probability p is ``1 − (1 − p) · factor``."""
        return self.with_probabilities({name: 1 - (1 - getattr(self, name)) * factor for name in self.prob_names})

    def with_probabilities(self, probabilities: Mapping[str, float]) -> Self:
        """Return a copy with these keep probabilities, by name."""
        merge = copy.deepcopy(self)
        for name, keep in probabilities.items():
            setattr(merge, name, keep)
        return merge

    def extra_repr(self) -> str:
        """Return the keep probabilities, for the module's repr."""
        return ", ".join(f"{name}={getattr(self, name):g}" for name in self.prob_names)


class Sum(Merge):
    """The residual merge ``x + F``.

    Shape: x and the output of the branch have the same shape.

    Example:
        >>> import torch
        >>> Sum()(torch.ones(2), lambda: torch.ones(2))
        tensor([2., 2.])

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep residual learning for image recognition, 2016.
    """

    draws = False

    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """Return the shortcut plus the branch."""
        return x + same_shape(x, branch())


class FeedForward(Merge):
    """The branch alone: a block without its shortcut.

    Example:
        >>> import torch
        >>> FeedForward()(torch.ones(2), lambda: torch.zeros(2))
        tensor([0., 0.])
    """

    draws = False

    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """Return the branch; the shortcut gets a gradient of zero."""
        return zero_gradients(same_shape(x, branch()), [x])


class Residual(nn.Module):
    """A residual block: ``activation(merge(shortcut(x), branch(x)))``.

    Args:
        branch: computes F(x).
        shortcut: computes the shortcut from x; ``None`` for x itself.
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
        """Return the output of the block."""
        merged = self.merge(self.shortcut(x), Branch(self.branch, [(x, 0)], [self.branch]))
        return cast(Tensor, self.activation(merged))
