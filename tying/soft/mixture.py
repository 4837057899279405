"""A mixture of Gaussians as the prior of weights, which pulls them towards a few learned values."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.compiled import compiled_loops
from tying.errors import ConfigurationError, check_count, check_range
from tying.soft.group_penalty import gradient_of
from tying.soft.penalties import check_not_complex
from tying.torch_workarounds import foreach_add_, is_traced
from tying.weights.sharding import is_sharded, local, reduce_gradient, total

CPU_CHUNK = 1 << 13  # weights: their densities under all components fit in the cache
DEVICE_CHUNK = 1 << 20
NEGLIGIBLE = -60.0  # a density of e⁻⁶⁰ does not change a sum; much smaller ones are subnormal numbers, which are slow


class GaussianMixturePrior(nn.Module):
    """The mixture prior of Ullrich et al.: one component fixed at zero, learned components, and hyper-priors.

    Its value is :func:`mixture_nll` plus ``Σ_j (1 − a) log λ_j + b λ_j``, the negative logarithm (up to constants) of
    Gamma priors on the precisions ``λ_j = 1/σ_j²``. These priors keep the variances of the components above 0.

    Args:
        components: J, including the component at zero.
        zero_weight: proportion π_0 of the component at zero, which is not learned; the others start equal.
        low: smallest initial mean; the initial means are evenly spaced from low to high.
        high: largest initial mean.
        std: initial σ of each component; default: the spacing of the means and, for the component at zero, the mode of
            its hyper-prior.
        zero_gamma: a and b of the Gamma prior for the component at zero.
        gamma: a and b of the Gamma priors for the other components.

    Shape: weights of any shape, to a scalar.

    Raises:
        ConfigurationError: an argument is out of range; in use, the weights are complex.

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
        zero_gamma: tuple[float, float] = (5e3, 2.0),
        gamma: tuple[float, float] = (250.0, 0.1),
    ) -> None:
        super().__init__()
        check_count("components", components, "[2, inf)")
        check_range("zero_weight", zero_weight, "(0, 1)")
        check_range("std", 1.0 if std is None else std, "(0, inf)")
        if not -math.inf < low < high < math.inf:
            raise ConfigurationError(f"low must be below high, not {low} and {high}")
        for name, (a, b) in {"zero_gamma": zero_gamma, "gamma": gamma}.items():
            check_range(f"a of {name}", a, "(1, inf)")
            check_range(f"b of {name}", b, "(0, inf)")
        free = components - 1
        self.zero_weight, self.zero_gamma, self.gamma = zero_weight, tuple(zero_gamma), tuple(gamma)
        spacing = (high - low) / max(1, free - 1)
        self.range, self.stds = (low, high), (std or math.sqrt(zero_gamma[1] / (zero_gamma[0] - 1)), std or spacing)
        self.means = nn.Parameter(torch.empty(free))  # μ_1, …
        self.log_stds = nn.Parameter(torch.empty(components))  # ξ_0, ξ_1, …
        self.logits = nn.Parameter(torch.empty(free))  # η_1, …
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_fit_components)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread the means evenly, and set proportions and standard deviations to their initial values."""
        self.means.copy_(torch.linspace(*self.range, len(self.means)))
        self.log_stds.copy_(torch.tensor([self.stds[0], *[self.stds[1]] * len(self.means)]).log())
        self.logits.zero_()

    @override
    def forward(self, weights: Tensor) -> Tensor:
        return mixture_nll(weights, *self.mixture()) + self.hyper_penalty()

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means, log standard deviations and log proportions of all components, the one at zero first."""
        zero = self.logits.new_tensor([math.log(self.zero_weight)])
        others = math.log1p(-self.zero_weight) + F.log_softmax(self.logits, dim=0)
        return self.all_means(), self.log_stds, torch.cat([zero, others])

    def all_means(self) -> Tensor:
        """Return the means of all components, (J,); the first is 0."""
        return torch.cat([self.means.new_zeros(1), self.means])

    def hyper_penalty(self) -> Tensor:
        """Return ``Σ_j (1 − a) log λ_j + b λ_j``."""
        log_precisions = -2 * self.log_stds
        a, b = torch.tensor([self.zero_gamma, *[self.gamma] * len(self.means)]).to(log_precisions).unbind(1)
        return ((1 - a) * log_precisions + b * log_precisions.exp()).sum()

    def add_gradients_(self, weights: list[nn.Parameter], strength: float, scale: float = 1.0) -> Tensor:
        """Add gradients of ``strength`` times the prior to the weights and the mixture; return the prior's value.

        If weights are sharded, every process must call this. Sums over shards are added in one reduction for each kind
        of sharding.

        Args:
            weights: the weights that share the mixture. Missing gradients are created. Frozen weights affect only the
                gradients of the mixture.
            strength: factor on the prior.
            scale: an additional factor on the gradients of the weights.
        """
        mixture = [part.detach() for part in self.mixture()]
        check_not_complex(weights, "the mixture")
        if {*map(type, weights)} != {nn.Parameter} and any(map(is_sharded, weights)):
            value, into_mixture = _add_to_shards_(weights, mixture, strength * scale)
        else:
            value, into_mixture = torch.zeros(()), [torch.zeros_like(part, dtype=torch.float64) for part in mixture]
            for weight in weights:
                into = gradient_of(weight) if weight.requires_grad else torch.zeros_like(weight)
                part, gradients = _evaluate(weight.detach(), mixture, into, scale=strength * scale)
                value = value + part
                foreach_add_(into_mixture, [*gradients])
        with torch.enable_grad():
            hyper = self.hyper_penalty()
            pairs = [(part, g) for part, g in zip(self.mixture(), into_mixture, strict=True) if part.requires_grad]
            torch.autograd.backward([part for part, _ in pairs], [strength * g.to(part) for part, g in pairs])
            (strength * hyper).backward()  # type: ignore[no-untyped-call]  # torch's
        return value + hyper.detach()

    @torch.no_grad()
    def merge(self, threshold: float = 1e-10, average: Literal["variance", "precision"] = "variance") -> int:
        """Merge similar components; return the number of components that remain.

        Components i and j are merged if ``KL(i‖j)`` or ``KL(j‖i)`` is below the threshold, or if a chain of these pairs
        connects them. Their proportions are added. Their means and variances are averaged with the proportions as
        weights; the mean is 0 if the component at zero is among them.

        Args:
            threshold: largest divergence, in nats.
            average: average the variances, as in the paper, or the precisions, as in the authors' code.
        """
        means, log_stds, log_proportions = (part.double() for part in self.mixture())
        variances = (2 * log_stds).exp()
        # KL(i‖j) = log(σ_j/σ_i) + (σ_i² + (μ_i − μ_j)²)/(2σ_j²) − ½
        scatter = variances[:, None] + (means[:, None] - means).square()
        near = log_stds - log_stds[:, None] + scatter / (2 * variances) - 0.5 < threshold
        near |= near.T.clone()
        for _ in range(len(near)):  # follow chains of pairs
            near |= (near.double() @ near.double()) > 0
        shares = log_proportions.exp()
        power = -1 if average == "precision" else 1
        merged = []
        for group in torch.unique(near, dim=0).flip(0):  # masks, in the order of their first components
            share = shares[group] / shares[group].sum()
            variance = (share * (2 * power * log_stds[group]).exp()).sum() ** power
            mean = means.new_zeros(()) if group[0] else (share * means[group]).sum()
            merged.append((mean, variance.log() / 2, shares[group].sum()))
        means, log_stds, shares = (torch.stack(column).to(self.means) for column in zip(*merged, strict=True))
        self.zero_weight = min(float(shares[0]), 1 - 1e-12)
        self.means = nn.Parameter(means[1:].clone())
        self.log_stds = nn.Parameter(log_stds)
        self.logits = nn.Parameter(shares[1:].log())
        return len(merged)

    @torch.no_grad()
    def assign(self, weights: Tensor) -> Tensor:
        """Return the component of each weight.

        This is the component with the largest responsibility for the weight. If another component has a larger
        responsibility for its mean, it is replaced by that component, and so on.

        Args:
            weights: weights of any shape.

        Returns:
            int64, the same shape; 0 is the component at zero.
        """
        owner = self._most_responsible(self.all_means())
        for _ in owner:  # terminates: each replacement has a higher peak
            owner = owner[owner]
        assigned = owner[self._most_responsible(weights)]
        if weights.dtype in (torch.float16, torch.bfloat16):  # a rounded mean may be nearer to another component
            for component in torch.unique(owner):
                is_mean = weights == self.all_means()[component].to(weights.dtype)
                assigned = torch.where(is_mean, component, assigned)
        return assigned

    @torch.no_grad()
    def quantize(self, weights: Tensor) -> Tensor:
        """Replace each weight by the mean of its component, see :meth:`assign`; idempotent."""
        return self.all_means().to(weights)[self.assign(weights)]

    def _most_responsible(self, weights: Tensor) -> Tensor:
        mixture = self.mixture()
        chunks = torch.split(weights.flatten(), _chunk_size(weights))
        return torch.cat([_log_joint(chunk, *mixture).argmax(dim=0) for chunk in chunks]).view(weights.shape)

    @override
    def extra_repr(self) -> str:
        return f"components={len(self.log_stds)}, zero_weight={self.zero_weight:.6g}"

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.zero_weight, dtype=torch.float64)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.zero_weight = float(state)


def mixture_nll(weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor) -> Tensor:
    """Return ``−Σ_i log Σ_j π_j N(w_i; μ_j, σ_j²)``, differentiable once with respect to all arguments.

    Args:
        weights: w, of any shape.
        means: μ, (J,).
        log_stds: ξ = log σ, (J,).
        log_proportions: log π, (J,).

    Returns:
        A scalar in the dtype of the weights, but float32 for half precision.

    Example:
        >>> round(mixture_nll(torch.zeros(2), *torch.zeros(3, 1)).item(), 4)  # −2 log N(0; 0, 1)
        1.8379

    Source: S. J. Nowlan and G. E. Hinton, Simplifying neural networks by soft weight-sharing, 1992.
    """
    check_not_complex([weights], "the mixture")
    return cast(Tensor, _MixtureNLL.apply(weights, means, log_stds, log_proportions))


def responsibilities(weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor) -> Tensor:
    """Return the posterior probability of each component for each weight, (J, N); see :func:`mixture_nll`."""
    return _log_joint(weights.flatten(), means, log_stds, log_proportions).softmax(dim=0)


class _MixtureNLL(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, weights: Tensor, *mixture: Tensor) -> Tensor:
        gradient = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        value, others = _evaluate(weights, mixture, into=gradient, scale=1.0)
        ctx.save_for_backward(gradient, *(g.to(like) for g, like in zip(others, mixture, strict=True)))
        return value.to(torch.promote_types(weights.dtype, torch.float32))

    @staticmethod
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("mixture_nll has no second derivative: write it with torch.logsumexp where you need one")
        return tuple((upstream * gradient).to(gradient) for gradient in ctx.saved_tensors)


def _fit_components(prior: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resize a prior's parameters to the number of components in a state dict, which merging may have reduced."""
    for name, parameter in prior.named_parameters():
        if (loaded := state_dict.get(f"{prefix}{name}", parameter)).shape != parameter.shape:
            setattr(prior, name, nn.Parameter(parameter.new_empty(loaded.shape)))


def _evaluate(
    weights: Tensor, mixture: Sequence[Tensor], into: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return Ω and its gradients for means, log standard deviations and log proportions; see :func:`mixture_nll`.

    Add ``scale · ∂Ω/∂w`` to ``into``, chunk by chunk.

    With the responsibilities r: ``∂Ω/∂w_i = Σ_j r_ij (w_i − μ_j)/σ_j²``, ``∂Ω/∂μ_j = Σ_i r_ij (μ_j − w_i)/σ_j²``,
    ``∂Ω/∂ξ_j = Σ_i r_ij (1 − (w_i − μ_j)²/σ_j²)``, ``∂Ω/∂log π_j = −Σ_i r_ij``. Sums over i follow from the
    sums of r, r w and r w².
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    parts = [part.to(weights.device, dtype) for part in mixture]
    in_place = weights.is_contiguous() and into.is_contiguous()
    gradient = into if in_place else torch.zeros_like(weights, memory_format=torch.contiguous_format)
    is_plain = weights.device.type == "cpu" and weights.dtype == gradient.dtype == torch.float32 and not is_traced()
    loops = compiled_loops("tying.soft") if is_plain else None
    evaluate = _evaluate_in_chunks if loops is None else loops.evaluate
    value, sums = evaluate(weights.reshape(-1), parts, gradient.view(-1), scale)
    if not in_place:
        into.add_(gradient)
    responsible, first, second = sums.unbind(1)
    means, log_stds, _ = (part.double() for part in parts)
    precisions = (-2 * log_stds).exp()
    scatter = second - 2 * means * first + means.square() * responsible
    return value, (precisions * (means * responsible - first), responsible - precisions * scatter, -responsible)


def _evaluate_in_chunks(
    weights: Tensor, mixture: Sequence[Tensor], into: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return Ω and, for each component, the sums of r, r w and r w², (J, 3); add ``scale · ∂Ω/∂w`` to ``into``."""
    means, log_stds, log_proportions = mixture
    precisions = (-2 * log_stds).exp()
    pulls = torch.stack([torch.ones_like(means), precisions, precisions * means])
    chunk = min(_chunk_size(weights), max(1, weights.numel()))
    sums = torch.zeros(len(means), 3, dtype=torch.float64, device=weights.device)
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    buffer, moments = means.new_empty(len(means), chunk), means.new_empty(3, chunk)
    for part, received in zip(torch.split(weights, chunk), torch.split(into, chunk), strict=True):
        w = part.to(means.dtype)
        density = _log_joint(w, means, log_stds, log_proportions, out=buffer[:, : len(w)])
        largest = density.amax(dim=0, keepdim=True)
        density.sub_(largest).clamp_(min=NEGLIGIBLE).exp_()
        shares, steepness, target = pulls @ density
        inverse, first, second = moments[:, : len(w)]
        torch.reciprocal(shares, out=inverse)
        torch.mul(inverse, w, out=first)
        torch.mul(first, w, out=second)
        sums += density @ moments[:, : len(w)].T
        received.add_(steepness.mul_(w).sub_(target).mul_(inverse), alpha=scale)
        total -= shares.log_().add_(largest[0]).sum()
    return total, sums


def _add_to_shards_(weights: list[nn.Parameter], mixture: list[Tensor], scale: float) -> tuple[Tensor, list[Tensor]]:
    """Add gradients to the shards of sharded weights; return Ω and the gradients of the mixture, over all shards."""
    parts = []
    for weight in weights:
        reduce_gradient(weight)
        shard = local(weight.detach())
        into = local(gradient_of(weight)) if weight.requires_grad else torch.zeros_like(shard)
        value, gradients = _evaluate(shard, mixture, into, scale)
        parts.append(torch.cat([value[None], *gradients]))
    value, *into_mixture = torch.split(torch.stack(total(parts, weights)).sum(dim=0), [1, *map(len, mixture)])
    return value[0], into_mixture


def _log_joint(
    weights: Tensor, means: Tensor, log_stds: Tensor, log_proportions: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return ``log π_j N(w_i; μ_j, σ_j²)``, (J, N)."""
    narrow = (-log_stds).exp() / math.sqrt(2)
    constants = log_proportions - log_stds - 0.5 * math.log(2 * math.pi)
    scaled = torch.addcmul(-(narrow * means)[:, None], narrow[:, None], weights, out=out)
    return torch.addcmul(constants[:, None], scaled, scaled, value=-1, out=out)


def _chunk_size(weights: Tensor) -> int:
    """Return the number of weights to process at a time."""
    return CPU_CHUNK if weights.device.type == "cpu" else DEVICE_CHUNK
