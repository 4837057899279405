"""Weights of low rank, optionally plus a diagonal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, check_count
from tying.hard.factorization import factorize, nearest_diagonal
from tying.torch_workarounds import convolve, is_proxy
from tying.weights.derived import plain_class, single_step, swap_plain_class
from tying.weights.replace import parametrize_all


def low_rank(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``.

    Args:
        left: (n, d).
        right: (d, m).
    """
    return left @ right


def low_rank_plus_diagonal(left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """Return ``left @ right + diag(diagonal)``.

    Args:
        left: (n, d).
        right: (d, n).
        diagonal: (n,).
    """
    return left @ right + torch.diag(diagonal)


class _OfRank(nn.Module):
    least = 0

    def __init__(self, rank: int) -> None:
        super().__init__()
        check_count("rank", rank, f"[{self.least}, inf)")
        self.rank = rank

    @override
    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def describe(self) -> str:
        """Describe the weight for a report."""
        return f"of rank {self.rank}"


class LowRank(_OfRank):
    """The parametrization ``W = P Q`` with P (n, d) and Q (d, m); see :func:`low_rank`.

    A weight of more than two dimensions is flattened to a matrix from its second dimension on. Assigning a weight
    stores the nearest weight of this rank.

    In-place writes to the weight are lost; see :func:`lower_rank`.

    Args:
        rank: d.

    Raises:
        ConfigurationError: the rank is more than the weight's smaller side.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = register_parametrization(nn.Linear(6, 4), "weight", LowRank(2))
        >>> sum(p.numel() for p in layer.parameters()), int(torch.linalg.matrix_rank(layer.weight))
        (24, 2)
    """

    least = 1
    shape: tuple[int, ...] | None = None  # of the assigned weight

    @override
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        weight = low_rank(left, right)
        return weight if self.shape is None else weight.view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of the nearest weight of this rank."""
        matrix = _as_matrix(weight, self.rank)
        if self.shape not in (None, tuple(weight.shape)):
            raise ConfigurationError(f"a weight of shape {self.shape} cannot become one of {tuple(weight.shape)}")
        self.shape = tuple(weight.shape)
        return factorize(matrix, self.rank)


class LowRankPlusDiagonal(_OfRank):
    """The parametrization ``W = P Q + diag(s)`` of a square weight; see :func:`low_rank_plus_diagonal`.

    Assigning a weight of this form stores it exactly, to its precision, if the rank is below half the side; assigning
    another weight stores one near it; see :func:`tying.hard.factorization.nearest_diagonal`. Only the weight is
    restored, not its parts, which are not unique: ``P A`` and ``A⁻¹ Q`` have the same product for each A, and where the
    off-diagonal entries do not determine ``P Q``, a part of it that is diagonal can be in ``diag(s)`` as well.

    In-place writes to the weight are lost; see :func:`lower_rank`.

    Args:
        rank: d; 0 for the diagonal alone.

    Raises:
        ConfigurationError: the weight is not square, or the rank is more than its side.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = register_parametrization(nn.Linear(5, 5, bias=False), "weight", LowRankPlusDiagonal(1))
        >>> sum(p.numel() for p in layer.parameters())
        15

    Source: A. V. Miceli Barone, Low-rank passthrough neural networks, 2016.
    """

    @override
    def forward(self, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        return low_rank_plus_diagonal(left, right, diagonal)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors and diagonal whose weight is near the given one."""
        check_rank(weight, self.rank, diagonal=True)
        left, right = factorize(weight - torch.diag(nearest_diagonal(weight, self.rank)).to(weight), self.rank)
        return left, right, torch.diag(weight - left @ right).clone()


def lower_rank(model: nn.Module, parameters: Sequence[str], rank: int, diagonal: bool = False) -> list[str]:
    """Parametrize weights of a model by low rank, starting at the nearest weight of that rank; return their names.

    In-place writes (``.data``, ``nn.init``, an adapter's merge) to a computed weight are lost: assign the weight, or
    load ``bake(model)`` into the untied model first.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        rank: rank of each weight.
        diagonal: add a diagonal; for square weights.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight cannot have that rank. The model is not changed.

    Example:
        >>> lower_rank(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["1.weight"], rank=2)
        ['1.weight']
    """
    made = list[_OfRank]()

    def make(name: str, weight: nn.Parameter) -> _OfRank:
        check_rank(weight, rank, diagonal)
        made.append(LowRankPlusDiagonal(rank) if diagonal else LowRank(rank))
        return made[-1]

    names = parametrize_all(model, parameters, make, "lower_rank")
    for layer in model.modules():
        factored, factors = FACTORED.get(plain_class(layer)), factors_of(layer)
        if factored and factors and factors[0] in made and _are_cheaper(factors[1]):
            swap_plain_class(layer, factored)
    return names


class LowRankLinear(nn.Linear):
    """A linear layer with a weight of low rank: ``y = P (Q x) + s ∘ x + b``, without the weight."""

    computes_with = "weight"

    @override
    def forward(self, input: Tensor) -> Tensor:
        if is_proxy(input) or (factors := factors_of(self)) is None:
            return F.linear(input, self.weight, self.bias)
        left, right, *diagonal = factors[1]
        output = F.linear(F.linear(input, right), left, self.bias)
        return output + input * diagonal[0] if diagonal else output


class _LowRankConvolution(nn.Module):
    computes_with = "weight"
    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]

    @override
    def forward(self, input: Tensor) -> Tensor:
        if is_proxy(input) or (factors := factors_of(self)) is None:
            return convolve(self, input, self.weight, self.bias)
        left, right = factors[1]
        hidden = convolve(self, input, right.view(len(right), -1, *self.kernel_size), None)
        pointwise = left.view(*left.shape, *[1] * len(self.kernel_size))
        return POINTWISE[len(self.kernel_size)](hidden, pointwise, self.bias)


class LowRankConv1d(_LowRankConvolution, nn.Conv1d):
    """A convolution with a weight of low rank: one to as many channels as the rank, and one of 1 × 1."""


class LowRankConv2d(_LowRankConvolution, nn.Conv2d):
    """See :class:`LowRankConv1d`."""


class LowRankConv3d(_LowRankConvolution, nn.Conv3d):
    """See :class:`LowRankConv1d`."""


# classes of layers with weights of low rank, by the layers' own; others compute the weight
FACTORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def factors_of(layer: nn.Module) -> tuple[_OfRank, list[nn.Parameter]] | None:
    """Return the one step that computes a layer's weight, if it is of low rank, and the factors; else None."""
    step, factors = single_step(layer)
    return (step, factors) if isinstance(step, _OfRank) and getattr(layer, "groups", 1) == 1 else None


def _are_cheaper(factors: Sequence[Tensor]) -> bool:
    """Return whether products with the factors take fewer operations than one with the weight, for every input."""
    left, right = factors[:2]
    return left.numel() + right.numel() < len(left) * right.shape[1]


def check_rank(weight: Tensor, rank: int, diagonal: bool = False) -> None:
    """Raise a ConfigurationError if a weight cannot have a rank, plus a diagonal if it shall have one."""
    if diagonal and (weight.ndim != 2 or weight.shape[0] != weight.shape[1]):
        raise ConfigurationError(f"low rank plus a diagonal needs a square weight, not {tuple(weight.shape)}")
    _as_matrix(weight, rank)


def _as_matrix(weight: Tensor, rank: int) -> Tensor:
    if weight.ndim < 2:
        raise ConfigurationError(f"a weight of shape {tuple(weight.shape)} has no rank to lower: leave it out")
    matrix = weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))
    if rank > min(matrix.shape):
        raise ConfigurationError(
            f"rank={rank} is more than {min(matrix.shape)}, the smaller side of a weight of shape {tuple(weight.shape)}"
        )
    return matrix
