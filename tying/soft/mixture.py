"""A mixture of Gaussians as the prior of weights: they gather around a few values, which are learned with them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.soft.gaussians import chunk_of, divergences, evaluate, log_joint, mixture_nll

Gamma = tuple[float, float]


class GaussianMixturePrior(nn.Module):
    """The mixture prior of Ullrich et al.: a component fixed at zero, others that are learned, and hyper-priors.

    Its value is :func:`mixture_nll` plus ``Σ_j (1 − a) log λ_j + b λ_j``, the negative logarithms (up to constants) of
    Gamma priors of the precisions ``λ_j = 1/σ_j²``, without which a component on a repeated value would collapse.

    Args:
        components: J, counting the one at zero.
        zero_weight: its proportion π_0, which is not learned; the others begin alike.
        low: where the learned means begin: evenly from low to high.
        high: see low.
        std: σ of each component at the start; by default, of the learned ones the distance of their means, and of that
            at zero the mode of its hyper-prior.
        zero_gamma: a and b of the precision at zero.
        gamma: a and b of the other precisions.

    Shape: weights of any shape, to a scalar.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> prior = GaussianMixturePrior(components=3, low=-1.0, high=1.0)
        >>> prior.all_means().tolist(), prior.quantize(torch.tensor([0.01, 0.9, -1.2])).tolist()
        ([0.0, -1.0, 1.0], [0.0, 1.0, -1.0])

    Source: K. Ullrich, E. Meeds and M. Welling, Soft weight-sharing for neural network compression, 2017.
    """

    def __init__(
        self,
        components: int = 17,
        zero_weight: float = 0.999,
        low: float = -0.6,
        high: float = 0.6,
        std: float | None = None,
        zero_gamma: Gamma = (5e3, 2.0),
        gamma: Gamma = (250.0, 0.1),
    ) -> None:
        super().__init__()
        if components < 2:
            raise ConfigurationError(f"components must be 2 or more, one of them at zero, not {components}")
        if not 0 < zero_weight < 1:
            raise ConfigurationError(f"zero_weight is a proportion, above 0 and below 1, not {zero_weight}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigurationError(f"low must be below high, not {low} and {high}")
        if std is not None and not 0 < std < math.inf:
            raise ConfigurationError(f"std must be above 0, not {std}")
        for name, (a, b) in {"zero_gamma": zero_gamma, "gamma": gamma}.items():
            if not (1 < a < math.inf and 0 < b < math.inf):
                raise ConfigurationError(f"{name} is (a, b) with a above 1 and b above 0, not {(a, b)}")
        free = components - 1
        self.zero_weight, self.zero_gamma, self.gamma = zero_weight, tuple(zero_gamma), tuple(gamma)
        apart = (high - low) / max(1, free - 1)
        stds = [std or math.sqrt(zero_gamma[1] / (zero_gamma[0] - 1)), *[std or apart] * free]
        self.means = nn.Parameter(torch.linspace(low, high, free))  # μ_1, …
        self.log_stds = nn.Parameter(torch.tensor(stds).log())  # ξ_0, ξ_1, …
        self.logits = nn.Parameter(torch.zeros(free))  # η_1, …

    @override
    def forward(self, weights: Tensor) -> Tensor:
        return mixture_nll(weights, *self.mixture()) + self.hyper_penalty()

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means, log standard deviations and log proportions of all components, that at zero first."""
        zero = self.logits.new_tensor([math.log(self.zero_weight)])
        others = math.log1p(-self.zero_weight) + F.log_softmax(self.logits, dim=0)
        return self.all_means(), self.log_stds, torch.cat([zero, others])

    def all_means(self) -> Tensor:
        """Return μ, 0 first; (J,)."""
        return torch.cat([self.means.new_zeros(1), self.means])

    def hyper_penalty(self) -> Tensor:
        """Return ``Σ_j (1 − a) log λ_j + b λ_j``."""
        log_precisions = -2 * self.log_stds
        a, b = (
            torch.tensor([zero, *[other] * len(self.means)]).to(log_precisions)
            for zero, other in zip(self.zero_gamma, self.gamma, strict=True)
        )
        return ((1 - a) * log_precisions + b * log_precisions.exp()).sum()

    def add_gradients_(self, weights: list[nn.Parameter], strength: float, scale: float = 1.0) -> Tensor:
        """Add the gradients of ``strength`` times the prior to those of weights and of the mixture; return the prior.

        Args:
            weights: those that share the mixture; their gradients are created where there are none. Frozen ones count
                for the mixture alone.
            strength: of the prior.
            scale: a further factor on the gradients of the weights alone.
        """
        mixture = [part.detach() for part in self.mixture()]
        total, into_mixture = torch.zeros(()), [torch.zeros_like(part, dtype=torch.float64) for part in mixture]
        for weight in weights:
            if weight.grad is None and weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
            into = weight.grad if weight.requires_grad and weight.grad is not None else torch.zeros_like(weight)
            value, gradients = evaluate(weight.detach(), mixture, into=into, scale=strength * scale)
            total = total + value
            for kept, gradient in zip(into_mixture, gradients, strict=True):
                kept += gradient
        with torch.enable_grad():
            own, hyper = self.mixture(), self.hyper_penalty()
            learned = [
                (part, strength * g.to(part)) for part, g in zip(own, into_mixture, strict=True) if part.requires_grad
            ]
            torch.autograd.backward([part for part, _ in learned], [g for _, g in learned])
            (strength * hyper).backward()  # type: ignore[no-untyped-call]  # torch's
        return total + hyper.detach()

    @torch.no_grad()
    def merge(self, threshold: float = 1e-10, average: Literal["variance", "precision"] = "variance") -> int:
        """Merge components that hardly differ; return how many are left.

        Components i and j become one where ``KL(i‖j) < threshold``, one way or the other, and so do those that a chain
        of such pairs connects. Proportions add up; means and variances are averaged by them. What merges with the
        component at zero is at zero.

        Args:
            threshold: in nats.
            average: what of the spreads is averaged: the paper's variances, or its authors' code's precisions.
        """
        means, log_stds, log_proportions = (part.double() for part in self.mixture())
        near = divergences(means, log_stds) < threshold
        near |= near.T.clone()
        for _ in range(len(near)):  # chains
            near |= (near.double() @ near.double()) > 0
        groups = [row.nonzero().flatten() for row in torch.unique(near, dim=0)]
        groups.sort(key=lambda group: int(group[0]))
        shares = log_proportions.exp()
        merged = []
        for group in groups:
            share = shares[group] / shares[group].sum()
            spread = (share * (2 * log_stds[group]).exp()).sum()
            if average == "precision":
                spread = 1 / (share * (-2 * log_stds[group]).exp()).sum()
            mean = (share * means[group]).sum() if group[0] else means.new_zeros(())
            merged.append((mean, spread.log() / 2, shares[group].sum()))
        columns = [torch.stack(column).to(self.means) for column in zip(*merged, strict=True)]
        self.zero_weight = min(float(columns[2][0]), 1 - 1e-12)
        self.means = nn.Parameter(columns[0][1:])
        self.log_stds = nn.Parameter(columns[1])
        self.logits = nn.Parameter(columns[2][1:].log())
        return len(groups)

    @torch.no_grad()
    def assign(self, weights: Tensor) -> Tensor:
        """Return the component of each weight: the most responsible one, followed until one owns its own mean.

        Args:
            weights: of any shape.

        Returns:
            int64, of that shape; 0 is the component at zero.
        """
        owner = self._most_responsible(self.all_means())
        for _ in owner:  # each step leads to a higher peak, hence to an end
            owner = owner[owner]
        assigned = owner[self._most_responsible(weights)]
        if weights.dtype in (torch.float16, torch.bfloat16):  # where a mean, rounded, may seem to be another's
            for component in torch.unique(owner):
                mean = self.all_means()[component].to(weights.dtype)
                assigned = torch.where(weights == mean, component, assigned)
        return assigned

    @torch.no_grad()
    def quantize(self, weights: Tensor) -> Tensor:
        """Return each weight as the mean of its component; idempotent, and exactly 0 at zero; see :meth:`assign`."""
        return self.all_means().to(weights)[self.assign(weights)]

    def _most_responsible(self, weights: Tensor) -> Tensor:
        mixture = self.mixture()
        flat = weights.flatten()
        parts = [log_joint(part, *mixture).argmax(dim=0) for part in torch.split(flat, chunk_of(flat))]
        return torch.cat(parts).view(weights.shape) if parts else flat.long().view(weights.shape)

    @override
    def extra_repr(self) -> str:
        return f"components={len(self.log_stds)}, zero_weight={self.zero_weight:.6g}"

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("means", "log_stds", "logits"):
            held, loaded = getattr(self, name), state_dict.get(f"{prefix}{name}")
            if loaded is not None and loaded.shape != held.shape:  # merging leaves fewer components
                setattr(self, name, nn.Parameter(held.new_empty(loaded.shape)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.zero_weight, dtype=torch.float64)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.zero_weight = float(state)
