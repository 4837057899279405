"""Recognise a model that has not been trained."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

DEVIATIONS = 5.0  # standard errors of a mean square


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    """Return whether the weights of a model look as they were initialised.

    They do if all vectors of the model, such as biases and the scales of norms, hold one value each, as of zeros and
    ones: training moves them apart. They do also if all norms are as they begin, and all linear layers and convolutions
    have weights and biases within ``±1/√fan_in`` that are spread uniformly, as torch draws them.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        >>> looks_untrained(model)
        True
        >>> _ = model[1].weight.data.mul_(torch.linspace(0.9, 1.1, 64))
        >>> looks_untrained(model)
        False
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1 and parameter.numel() > 1]
    if vectors and all(_is_constant(vector) for vector in vectors):
        return True
    judged = [verdict for module in model.modules() for verdict in _as_drawn(module)]
    return bool(judged) and all(judged)


def _is_constant(vector: Tensor) -> bool:
    return bool((vector == vector[0]).all())


def _as_drawn(module: nn.Module) -> Iterator[bool]:
    """Yield, for each parameter of a module with known initial values, whether it has such values."""
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and weight is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        yield from (_is_uniform(parameter, bound) for parameter in (weight, bias) if parameter is not None)
    elif weight is not None and weight.ndim == 1:  # a norm
        yield bool((weight == 1).all()) and (bias is None or not bias.any())
        if (count := getattr(module, "num_batches_tracked", None)) is not None:
            yield not int(count)


def _is_uniform(weight: Tensor, bound: float) -> bool:
    """Return whether values lie within a bound, and are spread as uniform ones are."""
    spread = float(weight.double().square().mean()) / (bound**2 / 3)
    standard_error = math.sqrt(0.8 / weight.numel())  # of that ratio: Var(u²) = 4/45 for u in [-1, 1]
    return float(weight.abs().max()) <= bound * (1 + 1e-6) and abs(spread - 1) <= DEVIATIONS * standard_error
