"""Merges, which combine a branch with its shortcut, and residual blocks made of them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.deprecated import class_aliases
from tying.depth.rows import named_tensors, promoted, rows_obstacle, take_arguments, take_rows
from tying.depth.tracing import leaf_function, record_module, tracer_of
from tying.errors import ConfigurationError, check_range
from tying.torch_workarounds import is_jit_tracing, is_proxy, is_recorded

FUNCTION_OBSTACLE = (
    "needs a branch that can be computed for some samples, which a function cannot: pass the module and its further "
    "arguments, as in self.merge(x, self.branch, mask), or use Residual or mode='row'"
)


@dataclass(eq=False)
class Branch:
    """The branch F of a residual block and its inputs: a callable, so that a merge can skip its computation.

    Args:
        compute: F, a function of one or more tensors.
        inputs: the arguments of F, each with the dimension along which its samples lie, or ``None`` if all samples
            share the argument.
        modules: the modules that F uses. If a merge skips the branch, their parameters get a gradient of zero.
        whole: whether ``compute`` returns the output of the block, x + F, instead of F.

    Example:
        >>> branch = Branch(nn.Identity(), [(torch.tensor([1.0, 2.0, 3.0]), 0)])
        >>> branch().tolist(), branch(rows=torch.tensor([2])).tolist()
        ([1.0, 2.0, 3.0], [3.0])
    """

    compute: Callable[..., Tensor]
    inputs: Sequence[tuple[Tensor | None, int | None]]
    modules: Sequence[nn.Module] = ()
    whole: bool = False

    @property
    def dim(self) -> int:
        """The dimension of samples of the first input and of the output."""
        return self.inputs[0][1] or 0

    def __call__(self, rows: Tensor | None = None) -> Tensor:
        """Return F of all samples, or of the samples with the given indices, int64."""
        if not self.whole:
            return self.output(rows)
        x = cast(Tensor, self.inputs[0][0])
        return self.output(rows) - (x if rows is None else take_rows(x, rows, self.dim))

    def output(self, rows: Tensor | None = None) -> Tensor:
        """Return what ``compute`` returns: F, or x + F of a whole block."""
        return self.compute(
            *(x if rows is None or x is None or dim is None else take_rows(x, rows, dim) for x, dim in self.inputs)
        )

    def obstacle(self) -> str | None:
        """Return why F cannot be computed for some samples alone, or None if it can."""
        return None

    def unused(self) -> Iterable[Tensor]:
        """Return the tensors that get a gradient of zero if a merge skips the branch; the shortcut uses the input."""
        yield from (parameter for module in self.modules for parameter in module.parameters())
        yield from (x for x, _ in self.inputs[1:] if x is not None)


class ModuleBranch(Branch):
    """The branch ``module(x, *arguments, **keywords)``.

    Args:
        module: computes F.
        x: its first argument.
        arguments: its further arguments; :func:`take_arguments` takes the rows of some samples from them.
        keywords: its keyword arguments, in the same way.
        dim: the dimension of samples of x; in further arguments it is the first.

    Example:
        >>> branch = ModuleBranch(nn.Bilinear(2, 2, 2), torch.zeros(3, 2), [torch.zeros(3, 2)])
        >>> branch().shape, branch(rows=torch.tensor([2])).shape
        (torch.Size([3, 2]), torch.Size([1, 2]))
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
        dim: int = 0,
    ) -> None:
        super().__init__(module, [(x, dim)], [module])
        self.x, self.arguments, self.keywords = x, arguments, keywords or {}

    @override
    def output(self, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            return self.compute(self.x, *self.arguments, **self.keywords)
        count = self.x.shape[self.dim]
        taken = [take_arguments(value, rows, count, name) for name, value in self._named_arguments()]
        further, keywords = taken[: len(self.arguments)], taken[len(self.arguments) :]
        return self.compute(
            take_rows(self.x, rows, self.dim), *further, **dict(zip(self.keywords, keywords, strict=True))
        )

    @override
    def obstacle(self) -> str | None:
        return next((message for name, tensor in self._tensors() if (message := self._obstacle(tensor, name))), None)

    @override
    def unused(self) -> Iterable[Tensor]:
        yield from super().unused()
        yield from (tensor for _, tensor in self._tensors())

    def _obstacle(self, tensor: Tensor, name: str) -> str | None:
        return rows_obstacle(tensor, self.x.shape[self.dim], name)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._named_arguments():
            yield from named_tensors(value, name)

    def _named_arguments(self) -> Iterator[tuple[str, Any]]:
        owner = type(self.modules[0]).__name__
        yield from ((f"argument {number} of {owner}", value) for number, value in enumerate(self.arguments, 2))
        yield from ((f"argument {name!r} of {owner}", value) for name, value in self.keywords.items())


def chain(x: Tensor, *modules: nn.Module) -> Branch:
    """Return the branch that applies modules to x, one after the other.

    Example:
        >>> chain(torch.tensor([-1.0, 2.0]), nn.ReLU(), nn.Identity())()
        tensor([0., 2.])
    """

    def compute(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    return Branch(compute, [(x, 0)], modules)


class Closure(Branch):
    """The branch that a function without arguments computes, for all samples, since its inputs are unknown.

    Args:
        function: computes F.
        x: the shortcut.
        dim: the dimension of samples.
        block: the block of the branch, all whose parameters get a gradient of zero if a merge skips it; or None.
    """

    def __init__(self, function: Callable[[], Tensor], x: Tensor, dim: int, block: nn.Module | None) -> None:
        super().__init__(lambda _: function(), [(x, dim)], [] if block is None else [block])

    @override
    def obstacle(self) -> str | None:
        return FUNCTION_OBSTACLE


class ComputedBranch(Branch):
    """A branch whose output is already computed, as in a graph of ``torch.fx``.

    Args:
        output: the output of the branch for all samples.
        dim: the dimension of samples.
    """

    def __init__(self, output: Tensor, dim: int = 0) -> None:
        super().__init__(lambda output: output, [(output, dim)])

    @override
    def unused(self) -> Iterable[Tensor]:
        return [x for x, _ in self.inputs if x is not None]


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
        ConfigurationError: the shapes differ, or f is no tensor.

    Example:
        >>> same_shape(torch.ones(2), torch.zeros(2))
        tensor([0., 0.])
    """
    if is_proxy(x) or is_jit_tracing():
        return f  # the shapes are not known yet
    if not isinstance(f, Tensor):
        raise ConfigurationError(
            f"a merge needs a branch that returns a tensor, not a {type(f).__name__}: pass merge(x, lambda: ...), "
            "which takes the tensor from it"
        )
    shape = x.shape if rows is None else torch.Size((*x.shape[:dim], rows, *x.shape[dim + 1 :]))
    if f.shape != shape:
        raise ConfigurationError(
            f"a merge needs a branch and a shortcut of the same shape, not {tuple(f.shape)} and {tuple(shape)}: let "
            "the branch keep the shape of its input, or give Residual a shortcut that changes it as the branch does"
        )
    return f


def add_branch(x: Tensor, branch: Callable[[], Tensor], factor: float = 1.0) -> Tensor:
    """Return ``x + factor · F``; with the factor 1, of a whole block what the block returns, without rounding again.

    Example:
        >>> add_branch(torch.ones(2), lambda: torch.ones(2), 0.5)
        tensor([1.5000, 1.5000])
    """
    if not is_whole(branch):
        f = same_shape(x, branch())
        return x + f if factor == 1 else torch.add(x, f, alpha=factor)
    output = same_shape(x, branch.output())
    return output if factor == 1 else torch.lerp(*promoted(x, output), factor)


def is_whole(branch: Callable[[], Tensor]) -> TypeGuard[Branch]:
    """Return whether a branch is a whole block."""
    return isinstance(branch, Branch) and branch.whole


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


@class_aliases("tying.depth.Merge")
class Merge(nn.Module):
    """Base class of merges, which combine the shortcut x of a residual block with its branch.

    A subclass defines ``forward(x, branch)``: ``branch()`` computes the branch, a tensor of x's shape. A block that has
    a merge calls it as ``merge(x, lambda: ...)``, or as ``merge(x, module, *arguments)``.

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
    _block: nn.Module | None = None

    def __init__(self, **probabilities: float) -> None:
        super().__init__()
        self.prob_names = tuple(probabilities)
        self.drop_scale = 1.0
        for name, keep in probabilities.items():
            check_range(name, keep, "[0, 1]")
            setattr(self, name, float(keep))

    def __call__(self, x: Tensor, branch: Any = None, *arguments: Any, dim: int = 0) -> Any:
        """Combine x with a branch.

        Args:
            x: the shortcut, with samples along ``dim``.
            branch: a module, called as ``branch(x, *arguments)``; a function without arguments; a :class:`Branch`; or
                the computed output, a tensor. Only a module and a Branch can be computed for some samples alone.
            arguments: further arguments of a module.
            dim: the dimension of samples.

        Raises:
            ConfigurationError: there is no branch, or there are further arguments for one that is not a module.
        """
        if branch is None:
            raise ConfigurationError(
                f"{type(self).__name__} is called without a branch. If a block calls all its children, it calls its "
                "merge, too: let it call its layers by name, or those of an nn.ModuleList"
            )
        computed = isinstance(branch, Tensor) or is_proxy(branch)
        if isinstance(branch, nn.Module):
            branch = ModuleBranch(branch, x, arguments, dim=dim)
        elif arguments:
            raise ConfigurationError(
                f"{type(self).__name__} passes further arguments to a module, not to a {type(branch).__name__}: write "
                "merge(x, module, mask) or merge(x, lambda: function(x, mask))"
            )
        elif not computed and not isinstance(branch, Branch):
            branch = Closure(branch, x, dim, self._block)
        if (tracer := tracer_of(x)) is not None and self.draws:
            output, dim = (branch, dim) if computed else (branch(), branch.dim)
            return record_module(tracer, self, (x, output), {"dim": dim})
        return super().__call__(x, ComputedBranch(branch, dim) if computed else branch)

    def attach(self, block: nn.Module) -> None:
        """Tell the merge the block that it is part of.

        When the merge skips a branch that is a function, all parameters of the block get a gradient of zero.

        Example:
            >>> from tying.depth import StochasticDepth
            >>> block = nn.Linear(2, 2)
            >>> block.merge = StochasticDepth(keep=0.0)
            >>> block.merge.attach(block)
            >>> block.merge(torch.ones(1, 2), lambda: block(torch.ones(1, 2))).sum().backward()
            >>> block.bias.grad
            tensor([0., 0.])
        """
        self.__dict__["_block"] = block  # bypasses nn.Module: the block is not a submodule of its own part

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
        merge = copy.deepcopy(self, {id(self._block): self._block})  # the copy belongs to the same block
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
        return add_branch(x, branch)


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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the block; further arguments go to the branch."""
        if is_proxy(args):  # torch.fx traces this block itself: it unpacks no arguments of unknown number
            x, args, kwargs = _without_arguments(x, args, kwargs), (), {}
        merged = self.merge(self.shortcut(x), ModuleBranch(self.branch, x, args, kwargs))
        return cast(Tensor, self.activation(merged))


@leaf_function
def _without_arguments(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return x, after checking that a graph of ``torch.fx`` got no further arguments."""
    if args or kwargs:
        raise ConfigurationError(
            "this graph of a Residual takes only x: trace the model that contains the Residual, whose graph passes "
            "further arguments to the branch"
        )
    return x
