"""What several weights have in common, up to a residual of low rank each."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tying.selection.relation import Relation

STEPS = 20  # of the Gauss–Newton method from each start, at most
LEAST_GAIN = 0.1  # relative, of a step that is followed by another
EXACT = 1e-12  # relative error of a fit that needs no other start
SOLVER_STEPS = 50  # of the method of conjugate gradients, at most

Spaces = list[tuple[Tensor, Tensor]]  # for each weight, orthonormal columns (n, r) and rows (r, m)


def nearest_shared_part(weights: Sequence[Tensor], relations: Sequence[Relation], rank: int) -> Tensor:
    """Return the S that minimises ``Σ_l ‖W_l − S − R_l‖²`` over S and residuals R_l of a rank.

    For given S, the best R_l is the truncated singular value decomposition of W_l − S. With P_l and Q_l the projections
    beyond its singular vectors, a step δ of S changes what is left to first order by ``−P_l δ Q_l``. Least squares give
    ``Σ_l P_l δ Q_l = Σ_l P_l (W_l − S) Q_l``: steps that converge quadratically where an S leaves nothing.

    Weights of this form are found exactly if the rank is small. Of others, this is the best of two local minima.

    Args:
        weights: W_l, each in its layer's layout, in double precision; a kernel counts as a matrix.
        relations: the map from the layout of S to each layer's.
        rank: of the residuals.

    Returns:
        S, in the source's layout.

    Example:
        >>> pair = [torch.diag(torch.tensor([1.0, 1, 1, 5])), torch.diag(torch.tensor([3.0, 1, 1, 1]))]
        >>> nearest_shared_part(pair, [Relation(), Relation()], rank=1).diag().round(decimals=4)
        tensor([1., 1., 1., 1.])
    """
    fit = _Fit(weights, relations, rank)
    exact = (EXACT * max(float(weight.norm()) for weight in weights)) ** 2
    best, shared = math.inf, weights[0]
    for start in fit.starts():
        error, candidate = fit.descend(start)
        if error < best:
            best, shared = error, candidate
        if best <= exact:
            break
    return shared


@dataclass(frozen=True)
class _Fit:
    """The problem that :func:`nearest_shared_part` solves; its arguments."""

    weights: Sequence[Tensor]
    relations: Sequence[Relation]
    rank: int

    @cached_property
    def aligned(self) -> list[Tensor]:
        """The weights in the layout of S."""
        return [relation.inverse()(w) for w, relation in zip(self.weights, self.relations, strict=True)]

    def starts(self) -> Iterator[Tensor]:
        """Yield values of S to start from.

        Differences of two weights of the form have twice the rank. Of a pair, the first singular values of the
        difference belong to one weight, the next to the other. Of more, the residual of a weight lies in its
        differences from any two others.
        """
        u, s, v = torch.linalg.svd((self.aligned[0] - self.aligned[-1]).flatten(1), full_matrices=False)
        if len(self.weights) == 2:
            first = (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]
            yield self.aligned[0] - first.reshape(self.aligned[0].shape)
            return
        mean = torch.stack(self.aligned).mean(dim=0)
        yield mean
        if len(self.weights) > 2 and s[2 * self.rank :].norm() < s.norm() / 2:
            yield mean + self.step(mean, [self._common(layer) for layer in range(len(self.weights))])

    def _common(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the columns and rows that the differences of a weight from the next two have in common."""
        columns, rows = [], []
        for distance in (1, 2):
            other = self.relations[layer](self.aligned[(layer + distance) % len(self.weights)])
            u, _, v = torch.linalg.svd((self.weights[layer] - other).flatten(1), full_matrices=False)
            columns.append(u[:, : 2 * self.rank])
            rows.append(v[: 2 * self.rank].mT)
        both = [torch.linalg.svd(torch.cat(spans, dim=1), full_matrices=False)[0] for spans in (columns, rows)]
        return both[0][:, : self.rank], both[1][:, : self.rank].mT

    def descend(self, shared: Tensor) -> tuple[float, Tensor]:
        """Lower the error from a start; return the error, a sum of squares, and S."""
        error, spaces = self.leading(shared)
        for _ in range(STEPS):
            candidate = shared + self.step(shared, spaces)
            following, spaces = self.leading(candidate)
            if following >= error:
                break
            gain, error, shared = 1 - following / error, following, candidate
            if gain < LEAST_GAIN:
                break
        return error, shared

    def leading(self, shared: Tensor) -> tuple[float, Spaces]:
        """Return the error of the best residuals beside S, and the singular vectors of each."""
        error, spaces = 0.0, []
        for weight, relation in zip(self.weights, self.relations, strict=True):
            u, s, v = torch.linalg.svd((weight - relation(shared)).flatten(1), full_matrices=False)
            error += float(s[self.rank :].square().sum())
            spaces.append((u[:, : self.rank], v[: self.rank]))
        return error, spaces

    def step(self, shared: Tensor, spaces: Spaces) -> Tensor:
        """Return the change of S that leaves least, if the residuals' singular vectors stay."""

        def beyond(changes: Sequence[Tensor]) -> Tensor:
            """Return the sum of changes, one for each weight, without what its residual absorbs."""
            total = torch.zeros_like(shared)
            for change, (u, v), relation in zip(changes, spaces, self.relations, strict=True):
                image = relation(change)
                matrix = image.flatten(1)
                matrix = matrix - u @ (u.mT @ matrix)
                total += relation.inverse()((matrix - (matrix @ v.mT) @ v).reshape(image.shape))
            return total

        left = beyond([weight - shared for weight in self.aligned])
        return _solve(lambda change: beyond([change] * len(self.weights)), left)


def _solve(apply: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Return x with ``apply(x) = target``, for a symmetric apply, by the method of conjugate gradients."""
    x, remainder, direction = torch.zeros_like(target), target, target
    square = first = remainder.square().sum()
    for _ in range(SOLVER_STEPS):
        if square <= first * torch.finfo(target.dtype).eps ** 2:
            break
        image = apply(direction)
        length = square / (direction * image).sum()
        x, remainder = x + length * direction, remainder - length * image
        square, before = remainder.square().sum(), square
        direction = remainder + square / before * direction
    return x
