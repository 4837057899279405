"""Residuals: how the weight of a layer may differ from the weight that it shares with others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from tying.errors import ConfigurationError, check_count
from tying.hard.factorization import factorize
from tying.hard.shared_part import nearest_shared_part
from tying.selection.relation import Relation


class WeightResidual:
    """How the weight of a layer may differ from the weight S that it shares; the base of all kinds.

    Weights are matrices here, (out, in); a kernel is (out, in · height · width). A subclass defines :meth:`combine`,
    :meth:`zero` and :meth:`nearest`, and is a frozen dataclass, so that YAML can name it.

    Example:
        >>> @dataclass(frozen=True)
        ... class InputScales(WeightResidual):
        ...     def combine(self, shared, factor, *parameters):
        ...         return shared * (1 + factor * parameters[0])
        ...
        ...     def zero(self, shared):
        ...         return (shared.new_zeros(shared.shape[1]),)
        ...
        ...     def nearest(self, shared, weight, input_scale=None):
        ...         return ((weight * shared).sum(dim=0) / shared.square().sum(dim=0) - 1,)
        >>> InputScales().nearest(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 5.0]]))
        (tensor([0., 1., 3.]),)
    """

    def combine(self, shared: Tensor, factor: Tensor, *parameters: Tensor) -> Tensor:
        """Return a layer's weight.

        Args:
            shared: S, in the layer's layout.
            factor: ρ, without dimensions: with 0, the weight must be S.
            parameters: the residual's, of one layer.
        """
        raise NotImplementedError

    def zero(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Return parameters whose weight is S, and which can be trained from there."""
        raise NotImplementedError

    def nearest(self, shared: Tensor, weight: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the parameters whose weight, at ρ = 1, is nearest to a given one.

        Args:
            shared: S, in the layer's layout.
            weight: the given weight.
            input_scale: factors of the entries whose squared errors are summed: (1, in), or (out, 1) for a layer that
                stores its weight transposed; default: 1.
        """
        raise NotImplementedError

    def nearest_shared(self, weights: Sequence[Tensor], relations: Sequence[Relation]) -> Tensor:
        """Return S, in the source's layout, for which the residuals come nearest to weights; by default the mean.

        Args:
            weights: of the layers, in their own layouts and shapes.
            relations: the map from the source's layout to each layer's.
        """
        return torch.stack([relation.inverse()(w) for w, relation in zip(weights, relations, strict=True)]).mean(dim=0)

    def check(self, shape: Sequence[int]) -> None:
        """Raise a ConfigurationError unless a weight of this shape, a matrix's, can have the residual."""

    def describe(self) -> str:
        """Describe the residual for a report."""
        return str(self)


@dataclass(frozen=True)
class LowRankResidual(WeightResidual):
    """The residual of low rank ``W = S + ρ B A`` with B (out, r) and A (r, in); with a scale, ``W = s ⊙ (S + ρ B A)``.

    Args:
        rank: r.
        scale: multiply each output by ``1 + ρ (s − 1)`` too. The parameter is s − 1, so that weight decay leads to S.

    Raises:
        ConfigurationError: the rank is below 1, or above the weight's smaller side.

    Example:
        >>> [tuple(parameter.shape) for parameter in LowRankResidual(2, scale=True).zero(torch.ones(4, 6))]
        [(4, 2), (2, 6), (4,)]

    Source: S. Bae, A. Fisch, H. Harutyunyan, Z. Ji, S. Kim and T. Schuster, Relaxed recursive transformers: effective
    parameter sharing with layer-wise LoRA, 2024.
    """

    rank: int
    scale: bool = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    @override
    def combine(self, shared: Tensor, factor: Tensor, *parameters: Tensor) -> Tensor:
        left, right, *scale = parameters
        weight = torch.addmm(shared, left * factor, right)
        return weight * (1 + factor * scale[0])[:, None] if scale else weight

    @override
    def zero(self, shared: Tensor) -> tuple[Tensor, ...]:
        out, into = shared.shape
        right = shared.new_empty(self.rank, into).normal_(std=into**-0.5)
        return shared.new_zeros(out, self.rank), right, *self._scale(shared)

    @override
    def nearest(self, shared: Tensor, weight: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, ...]:
        return *factorize(weight - shared, self.rank, input_scale), *self._scale(shared)

    @override
    def nearest_shared(self, weights: Sequence[Tensor], relations: Sequence[Relation]) -> Tensor:
        return nearest_shared_part(weights, relations, self.rank)

    def _scale(self, shared: Tensor) -> list[Tensor]:
        return [shared.new_zeros(len(shared))] if self.scale else []

    @override
    def check(self, shape: Sequence[int]) -> None:
        if self.rank > min(shape):
            size = self.rank * sum(shape)
            raise ConfigurationError(
                f"rank={self.rank} is more than {min(shape)}, the smaller side of a matrix of shape {(*shape,)}: the "
                f"residual would have {size:,} parameters, where the untied weight has {math.prod(shape):,}. Lower the "
                "rank, or exclude the weight"
            )

    @override
    def describe(self) -> str:
        return f"rank {self.rank}" + " and a scale" * self.scale


@dataclass(frozen=True)
class DiagonalResidual(WeightResidual):
    """The residual ``W = S + ρ diag(d)`` of a square weight.

    Raises:
        ConfigurationError: the weight is not square.

    Example:
        >>> DiagonalResidual().combine(torch.ones(2, 2), torch.tensor(0.5), torch.tensor([2.0, 4.0]))
        tensor([[2., 1.],
                [1., 3.]])
    """

    @override
    def combine(self, shared: Tensor, factor: Tensor, *parameters: Tensor) -> Tensor:
        [diagonal] = parameters
        return shared + torch.diag(factor * diagonal)

    @override
    def zero(self, shared: Tensor) -> tuple[Tensor, ...]:
        return (shared.new_zeros(len(shared)),)

    @override
    def nearest(self, shared: Tensor, weight: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, ...]:
        return (torch.diag(weight - shared).clone(),)

    @override
    def check(self, shape: Sequence[int]) -> None:
        if len({*shape}) > 1:
            raise ConfigurationError(f"a diagonal residual needs a square weight, not {(*shape,)}")

    @override
    def describe(self) -> str:
        return "a diagonal"


@dataclass(frozen=True)
class ScaleResidual(WeightResidual):
    """The residual ``W = (1 + ρ (s − 1)) ⊙ S`` with a scale s for each output, the first dimension of the weight.

    The parameter is s − 1, so that weight decay leads to S.

    Example:
        >>> ScaleResidual().combine(torch.ones(2, 3), torch.tensor(1.0), torch.tensor([0.0, 1.0]))
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    @override
    def combine(self, shared: Tensor, factor: Tensor, *parameters: Tensor) -> Tensor:
        [scale] = parameters
        return shared * (1 + factor * scale)[:, None]

    @override
    def zero(self, shared: Tensor) -> tuple[Tensor, ...]:
        return (shared.new_zeros(len(shared)),)

    @override
    def nearest(self, shared: Tensor, weight: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, ...]:
        by = shared.new_ones(1, 1) if input_scale is None else input_scale.to(shared).square()
        length = (shared.square() * by).sum(dim=1)
        return (((weight - shared) * shared * by).sum(dim=1) / length.where(length > 0, torch.ones_like(length)),)

    @override
    def describe(self) -> str:
        return "a scale"
