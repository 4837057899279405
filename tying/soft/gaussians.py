"""Mixtures of Gaussians: their negative log likelihood, with all gradients in one pass over the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

CPU_CHUNK = 1 << 13  # weights at a time: their densities under all components stay in a processor's cache
DEVICE_CHUNK = 1 << 20
NEGLIGIBLE = -60.0  # a share of e⁻⁶⁰ changes nothing, and anything below would soon be subnormal, which is slow


def mixture_nll(weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor) -> Tensor:
    """Return ``−Σ_i log Σ_j π_j N(w_i; μ_j, σ_j²)``, differentiable once in everything.

    Args:
        weights: of any shape.
        means: μ, (J,).
        log_stds: ξ = log σ, (J,).
        log_proportions: log π, (J,).

    Returns:
        A scalar, in the weights' precision, of float32 at least.

    Example:
        >>> round(mixture_nll(torch.zeros(2), *torch.zeros(3, 1)).item(), 4)  # −2 log N(0; 0, 1)
        1.8379

    Source: S. J. Nowlan and G. E. Hinton, Simplifying neural networks by soft weight-sharing, 1992.
    """
    result: Tensor = _MixtureNLL.apply(weights, means, log_stds, log_proportions)
    return result


def responsibilities(weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor) -> Tensor:
    """Return how probably each component has drawn each weight, (J, N); see :func:`mixture_nll`."""
    return log_joint(weights.flatten(), means, log_stds, log_proportions).softmax(dim=0)


class _MixtureNLL(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weights: Tensor, *mixture: Tensor) -> Tensor:
        gradient = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        value, others = evaluate(weights, mixture, into=gradient, scale=1.0)
        ctx.save_for_backward(gradient, *(g.to(like) for g, like in zip(others, mixture, strict=True)))
        return value.to(torch.promote_types(weights.dtype, torch.float32))

    @staticmethod
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("mixture_nll has no second derivative: write it with torch.logsumexp where you need one")
        return tuple((upstream * gradient).to(gradient) for gradient in ctx.saved_tensors)


def evaluate(
    weights: Tensor, mixture: Sequence[Tensor], into: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return Ω, and its gradients in the mixture's three parts; add ``scale · ∂Ω/∂w`` to ``into``, chunk by chunk.

    The parts are those of :func:`mixture_nll`: means, log standard deviations and log proportions.

    With the responsibilities r: ``∂Ω/∂w_i = Σ_j r_ij (w_i − μ_j)/σ_j²``, ``∂Ω/∂μ_j = Σ_i r_ij (μ_j − w_i)/σ_j²``,
    ``∂Ω/∂ξ_j = Σ_i r_ij (1 − (w_i − μ_j)²/σ_j²)``, ``∂Ω/∂log π_j = −Σ_i r_ij``. Sums over i follow from those of
    r, r w and r w².
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    means, log_stds, log_proportions = (part.to(weights.device, dtype) for part in mixture)
    precisions = (-2 * log_stds).exp()
    pulls = torch.stack([torch.ones_like(means), precisions, precisions * means])
    chunk = chunk_of(weights)
    count, longest = len(means), min(chunk, max(1, weights.numel()))
    sums = torch.zeros(count, 3, dtype=torch.float64, device=weights.device)
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    buffer, moments = means.new_empty(count, longest), means.new_empty(3, longest)
    in_place = weights.is_contiguous() and into.is_contiguous()
    gradient = into if in_place else torch.zeros_like(weights, memory_format=torch.contiguous_format)
    parts = torch.split(weights.reshape(-1), chunk), torch.split(gradient.view(-1), chunk)
    for part, received in zip(*parts, strict=True):
        w = part.to(dtype)
        density = log_joint(w, means, log_stds, log_proportions, out=buffer[:, : len(w)])
        largest = density.amax(dim=0, keepdim=True)
        density.sub_(largest).clamp_(min=NEGLIGIBLE).exp_()
        shares, steepness, target = pulls @ density
        one, first, second = moments[:, : len(w)]
        torch.reciprocal(shares, out=one)
        torch.mul(one, w, out=first)
        torch.mul(first, w, out=second)
        sums += density @ moments[:, : len(w)].T
        received.add_(steepness.mul_(w).sub_(target).mul_(one), alpha=scale)
        total -= shares.log_().add_(largest[0]).sum()
    if not in_place:
        into.add_(gradient)
    responsible, first, second = sums.unbind(1)
    means, precisions = means.double(), precisions.double()
    scatter = second - 2 * means * first + means.square() * responsible
    return total, (precisions * (means * responsible - first), responsible - precisions * scatter, -responsible)


def log_joint(
    weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return ``log π_j N(w_i; μ_j, σ_j²)``, (J, N)."""
    narrow = (-log_stds).exp() / math.sqrt(2)
    constants = log_proportions - log_stds - 0.5 * math.log(2 * math.pi)
    scaled = torch.addcmul(-(narrow * means)[:, None], narrow[:, None], weights, out=out)
    return torch.addcmul(constants[:, None], scaled, scaled, value=-1, out=out)


def chunk_of(weights: Tensor) -> int:
    """Return how many weights to look at together."""
    return CPU_CHUNK if weights.device.type == "cpu" else DEVICE_CHUNK


def divergences(means: Tensor, log_stds: Tensor) -> Tensor:
    """Return ``KL(i‖j) = log(σ_j/σ_i) + (σ_i² + (μ_i − μ_j)²)/(2σ_j²) − ½`` of all pairs, (J, J)."""
    variances = (2 * log_stds).exp()
    away = (means[:, None] - means).square()
    return log_stds - log_stds[:, None] + (variances[:, None] + away) / (2 * variances) - 0.5
