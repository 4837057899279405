"""Penalties on the differences between tensors of a group, with their gradients and proximal steps.

The penalty of a group of m tensors in one layout is ``Ω = Σ_{i<j} ρ(w_i − w_j)``, summed over entries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tying.errors import ConfigurationError, check_range
from tying.torch_workarounds import foreach_add, foreach_add_, foreach_mul_, foreach_sub


def l2(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``Σ_{i<j} ½‖w_i − w_j‖² = (m/2) Σ_i ‖w_i − w̄‖²``, exactly 0 for equal tensors.

    Args:
        tensors: m ≥ 2 tensors of one shape, real or complex.

    Example:
        >>> l2([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])])
        tensor(2.)

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, 2016, section 7.9.
    """
    mean = group_mean(tensors)
    return 0.5 * len(tensors) * torch.stack([squared_norm(w - mean) for w in tensors]).sum()


def l1(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``Σ_{i<j} |w_i − w_j| = Σ_k (2k − m − 1) w_(k)``, where ``w_(k)`` is the k-th smallest of the m values.

    Args:
        tensors: m ≥ 2 real tensors of one shape.

    Raises:
        ConfigurationError: the tensors are complex.

    Example:
        >>> l1([torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([6.0])])
        tensor(10.)
    """
    check_not_complex(tensors, "l1")
    ordered = torch.stack([*tensors], dim=-1).sort(dim=-1).values
    # k (m − k) pairs differ by the k-th gap between neighbours; with gaps, equal tensors give exactly 0
    k = torch.arange(1, len(tensors), dtype=ordered.dtype, device=ordered.device)
    return (ordered.diff(dim=-1) * (k * (len(tensors) - k))).sum()


def huber(a: Tensor, b: Tensor, delta: float) -> Tensor:
    """Return ``Σ ρ(a − b)`` with ``ρ(d) = d²/2`` up to ``|d| = δ`` and ``δ (|d| − δ/2)`` beyond.

    Args:
        a: the first tensor.
        b: the second tensor, of the same shape.
        delta: δ > 0, in the unit of the weights.

    Raises:
        ConfigurationError: the tensors are complex.

    Example:
        >>> huber(torch.tensor([0.5, 3.0]), torch.zeros(2), delta=1.0)
        tensor(2.6250)

    Source: P. J. Huber, Robust estimation of a location parameter, 1964.
    """
    check_not_complex([a, b], "huber")
    return torch.nn.functional.huber_loss(a, b, reduction="sum", delta=delta)


class Penalty:
    """A penalty on a group of tensors in one layout. A subclass must define ``value``.

    By default, autograd computes the gradient. Only proximal updates need ``prox``.

    Attributes:
        curvature: the largest second derivative of ρ, which limits the size of explicit steps; 0 if unknown.
        pairs_only: whether the penalty accepts only groups of two.
        real_only: whether the penalty accepts only real weights.
        elementwise: whether Ω is a sum over entries, and ``prox`` acts on each entry alone, so that each process can
            compute them from its shards of weights; else each process that shards them receives the whole weights.

    Example:
        >>> class LogCosh(Penalty):
        ...     pairs_only = elementwise = True
        ...     def value(self, tensors):
        ...         a, b = tensors
        ...         return (a - b).cosh().log().sum()
        >>> LogCosh().gradient([torch.tensor([20.0]), torch.tensor([0.0])])
        [tensor([1.]), tensor([-1.])]
    """

    curvature: float = 0.0
    pairs_only: bool = False
    real_only: bool = False
    elementwise: bool = False

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Ω as a scalar, differentiable by autograd."""
        raise NotImplementedError(f"{type(self).__name__} must define value(tensors), which returns a scalar tensor")

    def gradient(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ∂Ω/∂w_i for each tensor."""
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in tensors]
            return [*torch.autograd.grad(self.value(leaves), leaves)]

    def add_gradient_(
        self, tensors: Sequence[list[Tensor]], into: Sequence[list[Tensor | None]], scales: Sequence[float]
    ) -> None:
        """Add ``scale_i · ∂Ω/∂w_i`` in place, for several groups of m tensors at once.

        Args:
            tensors: m lists; the i-th list contains the i-th tensor of every group.
            into: the tensors to add the gradients to, in the same lists; a list of ``None`` if its scale is 0.
            scales: one factor for each of the m lists.
        """
        for group, receivers in zip(zip(*tensors, strict=True), zip(*into, strict=True), strict=True):
            for receiver, gradient, scale in zip(receivers, self.gradient(group), scales, strict=True):
                if receiver is not None:
                    receiver.add_(gradient, alpha=scale)

    def prox(self, tensors: Sequence[Tensor], strength: float, rates: Sequence[float]) -> list[Tensor]:
        """Return ``argmin_v Σ_i ‖v_i − w_i‖² / (2 r_i) + s Ω(v)``.

        Args:
            tensors: the w_i.
            strength: s ≥ 0, possibly infinite.
            rates: the r_i ≥ 0; tensors of rate 0 are constants.
        """
        raise NotImplementedError(f"{type(self).__name__} has no proximal step: define prox, or use another update")


class L2(Penalty):
    """The penalty :func:`l2`."""

    curvature = 1.0
    elementwise = True

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Ω; see :func:`l2`."""
        return l2(tensors)

    def gradient(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``m (w_i − w̄)`` for each tensor."""
        mean = group_mean(tensors)
        return [len(tensors) * (w - mean) for w in tensors]

    def add_gradient_(
        self, tensors: Sequence[list[Tensor]], into: Sequence[list[Tensor | None]], scales: Sequence[float]
    ) -> None:
        """Add ``scale_i m (w_i − w̄)`` in place, with operations that are fused over all groups."""
        m, (first, *others) = len(tensors), tensors
        differences = foreach_sub(others[0], first)
        if m == 2:  # both gradients are this difference, up to the sign
            pulls = zip(into, [differences, differences], [-scales[0], scales[1]], strict=True)
        else:
            for other in others[1:]:
                foreach_add_(differences, foreach_sub(other, first))
            mean = foreach_add(first, differences, alpha=1 / m)
            pulls = zip(into, (foreach_sub(w, mean) for w in tensors), [m * s for s in scales], strict=True)
        for receivers, deviations, scale in pulls:
            if scale:
                foreach_add_(cast(list[Tensor], receivers), deviations, alpha=scale)

    def prox(self, tensors: Sequence[Tensor], strength: float, rates: Sequence[float]) -> list[Tensor]:
        """Return ``c + b_i (w_i − c)``, where ``b_i = 1/(1 + m s r_i)`` and c is the mean of all w weighted by b."""
        b = [1 / (1 + len(tensors) * strength * rate) if rate else 1.0 for rate in rates]
        weights = b if any(b) else [1 / rate for rate in rates]  # the limit of b, up to a factor, as s → ∞
        first = weights.index(max(weights))  # c is exactly this tensor if all other weights are 0
        c = tensors[first] + sum(
            p / sum(weights) * (w - tensors[first])
            for i, (p, w) in enumerate(zip(weights, tensors, strict=True))
            if i != first
        )
        return [c + b_i * (w - c) if b_i != 1 else w for b_i, w in zip(b, tensors, strict=True)]


class WeightedL2(Penalty):
    """The penalty ``½ Σ F (w − w⁰)²`` on triples of a weight w, a constant w⁰ and the importance F ≥ 0 of each entry.

    With F = 1 every method computes what :class:`L2` computes for the pair, bit by bit.
    """

    curvature = 1.0
    pairs_only = True
    real_only = True
    elementwise = True

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Ω; an entry at its anchor adds 0, also if its importance is infinite."""
        *pair, importance = tensors
        mean = group_mean(pair)
        squares = [(w - mean).square() for w in pair]
        return torch.stack([torch.where(square == 0, 0, importance * square).sum() for square in squares]).sum()

    def add_gradient_(
        self, tensors: Sequence[list[Tensor]], into: Sequence[list[Tensor | None]], scales: Sequence[float]
    ) -> None:
        """Add ``scale · F (w − w⁰)`` in place, with operations that are fused over all weights."""
        weights, anchors, importances = tensors
        pulls = foreach_sub(anchors, weights)
        foreach_mul_(pulls, importances)
        foreach_add_(cast(list[Tensor], into[0]), pulls, alpha=-scales[0])

    def prox(self, tensors: Sequence[Tensor], strength: float, rates: Sequence[float]) -> list[Tensor]:
        """Return ``(w + t w⁰) / (1 + t)`` with ``t = s r F``, and w⁰; entries with F = 0 stay as they are."""
        w, anchor, importance = tensors
        # the operations of L2, whose scalars are Python's
        exact = importance.to(torch.float32 if w.device.type == "mps" else torch.float64)
        b = 1 / (1 + torch.where(exact == 0, 0.0, 2 * strength * rates[0] * exact))
        share, factor = (b / (b + 1)).to(importance.dtype), b.to(importance.dtype)
        c = anchor + (share * (w - anchor)).to(w.dtype)
        return [torch.where(b == 1, w, c + (factor * (w - c)).to(w.dtype)), anchor]


class L1(Penalty):
    """The penalty :func:`l1`."""

    real_only = True
    elementwise = True

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Ω; see :func:`l1`."""
        return l1(tensors)

    def gradient(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``Σ_j sign(w_i − w_j)`` for each tensor: the number of smaller minus the number of larger values."""
        stacked = torch.stack([*tensors], dim=-1)
        ordered = stacked.sort(dim=-1).values
        smaller = torch.searchsorted(ordered, stacked)
        not_larger = torch.searchsorted(ordered, stacked, right=True)
        return [*(smaller + not_larger - len(tensors)).to(stacked.dtype).unbind(-1)]

    def prox(self, tensors: Sequence[Tensor], strength: float, rates: Sequence[float]) -> list[Tensor]:
        """Return the proximal step; in groups of more than two, all rates above 0 must be equal.

        The step pulls the tensors towards each other first, and then towards the constants.
        """
        if len(tensors) == 2:
            d = tensors[0] - tensors[1]
            return _prox_pair(tensors, d.sign() * (d.abs() - strength * sum(rates)).clamp(min=0), rates)
        moving = [i for i, rate in enumerate(rates) if rate]
        if len({rates[i] for i in moving}) > 1:
            raise ConfigurationError(
                "the proximal step of 'l1' on a group of more than two needs one learning rate for all of its "
                f"members, not {sorted(set(rates))}: use update='decoupled', or one parameter group for them"
            )
        if not moving:
            return [*tensors]
        step = strength * rates[moving[0]]
        constants = [w for w, rate in zip(tensors, rates, strict=True) if not rate]
        ordered, order = torch.stack([tensors[i] for i in moving], dim=-1).sort(dim=-1)
        pulled = _prox_to_constants(_prox_sorted(ordered, step), constants, step)
        moved = iter(torch.empty_like(ordered).scatter_(-1, order, pulled).unbind(-1))
        return [next(moved) if rate else w for w, rate in zip(tensors, rates, strict=True)]


@dataclass(frozen=True)
class Huber(Penalty):
    """The penalty :func:`huber`, for pairs.

    Args:
        delta: δ > 0, in the unit of the weights: ρ is quadratic up to δ, and linear beyond.

    Raises:
        ConfigurationError: δ is not in (0, inf).
    """

    delta: float = 1.0
    curvature = 1.0
    pairs_only = True
    real_only = True
    elementwise = True

    def __post_init__(self) -> None:
        check_range("Huber's delta", self.delta, "(0, inf)")

    def value(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return Ω; see :func:`huber`."""
        return huber(tensors[0], tensors[1], self.delta)

    def gradient(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``±clamp(a − b, −δ, δ)``."""
        pull = (tensors[0] - tensors[1]).clamp(-self.delta, self.delta)
        return [pull, -pull]

    def prox(self, tensors: Sequence[Tensor], strength: float, rates: Sequence[float]) -> list[Tensor]:
        """Return the proximal step: with t = s Σ r_i, divide small differences by 1 + t, and lower others by tδ."""
        d, t = tensors[0] - tensors[1], strength * sum(rates) if any(rates) else 0.0
        far = d - d.sign() * t * self.delta if math.isfinite(t) else d
        return _prox_pair(tensors, torch.where(d.abs() <= self.delta * (1 + t), d / (1 + t), far), rates)


def group_mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean; it is computed relative to the first tensor, so that the mean of equal tensors is exact."""
    first, *others = tensors
    return first + torch.stack([w - first for w in others]).sum(dim=0) / len(tensors)


def squared_norm(tensor: Tensor) -> Tensor:
    """Return ``‖w‖²``, the sum of the squared magnitudes of real or complex entries."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).square().sum()


def check_not_complex(tensors: Sequence[Tensor], penalty: str) -> None:
    """Raise a ConfigurationError if a tensor is complex."""
    if any(tensor.is_complex() for tensor in tensors):
        raise ConfigurationError(f"{penalty} takes real weights, and some are complex: use l2 for these")


def _prox_pair(tensors: Sequence[Tensor], difference: Tensor, rates: Sequence[float]) -> list[Tensor]:
    """Move two tensors towards each other, in proportion to their rates, until they differ by ``difference``."""
    (a, b), (rate_a, rate_b) = tensors, rates
    if not (rate_a and rate_b):  # a constant is among them
        return [b + difference if rate_a else a, a - difference if rate_b else b]
    moved = a - rate_a / (rate_a + rate_b) * (a - b - difference)
    return [moved, moved - difference]


def _prox_sorted(w: Tensor, step: float) -> Tensor:
    """Return ``argmin_v ½‖v − w‖² + t Σ_{i<j} |v_i − v_j|`` along the last dimension, for sorted w.

    The solution is sorted too, and the penalty of p sorted values is linear: it shifts w_k by ``−t (2k − p − 1)``.
    Isotonic regression then restores the order: ``v_k = max_{a≤k} min_{b≥k} mean(shifted w_a..w_b)``.

    Source: R. E. Barlow, D. J. Bartholomew, J. M. Bremner and H. D. Brunk, Statistical inference under order
    restrictions, 1972.
    """
    p = w.shape[-1]
    base = w[..., :1]  # means are relative to the smallest value, so that equal values stay exactly equal
    if math.isinf(step):
        return base + (w - base).mean(dim=-1, keepdim=True).expand_as(w)
    v = torch.full_like(w, -math.inf)
    for a in range(1, p + 1):
        b = torch.arange(a, p + 1, dtype=w.dtype, device=w.device)
        means = (w[..., a - 1 :] - base).cumsum(dim=-1) / (b - a + 1) - step * (a + b - p - 1)
        # the reversed cumulative minimum is over b ≥ k
        v[..., a - 1 :] = torch.maximum(v[..., a - 1 :], means.flip(-1).cummin(dim=-1).values.flip(-1))
    return base + v


def _prox_to_constants(z: Tensor, constants: list[Tensor], step: float) -> Tensor:
    """Return ``argmin_v ½ (v − z)² + t Σ_l |v − f_l|``: the median of the f_l and of ``z + t (k − 2j)``, j = 0..k."""
    k = len(constants)
    if not k:
        return z
    candidates = [f.unsqueeze(-1).expand_as(z) for f in constants]
    candidates += [z + (step * (k - 2 * j) if k != 2 * j else 0.0) for j in range(k + 1)]  # the step may be infinite
    return torch.stack(candidates).median(dim=0).values
