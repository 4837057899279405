"""Recognise a model that has not been trained."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
DEVIATIONS = 5.0  # standard errors of a mean square


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    """Return whether the weights of a model look as they were initialised.

    They do if each vector, such as a bias or the scale of a norm, holds one value throughout, as of zeros or ones, or
    is the bias of a linear layer or a convolution as torch draws it: it and the weight are spread uniformly within
    ``±1/√fan_in``. Where there are no vectors, the weights of such layers are judged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        >>> looks_untrained(model)
        True
        >>> _ = model[1].weight.data.mul_(torch.linspace(0.9, 1.1, 64))
        >>> looks_untrained(model)
        False
    """
    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    vectors = [verdict for module in modules for verdict in _vectors_as_drawn(module)]
    layers = [module for module in modules if isinstance(module, Layer)]
    return all(vectors) if vectors else bool(layers) and all(map(_is_as_drawn, layers))


def _vectors_as_drawn(module: nn.Module) -> Iterator[bool]:
    """Yield, for each vector of a module, whether it looks as it was initialised."""
    for vector in module.parameters(recurse=False):
        if vector.ndim == 1 and vector.numel() > 1 and vector.is_floating_point():
            yield bool((vector == vector[0]).all()) or (isinstance(module, Layer) and _is_as_drawn(module))


def _is_as_drawn(layer: Layer) -> bool:
    """Return whether the weight and the bias of a layer are spread as torch draws them."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    return all(_is_uniform(parameter, bound) for parameter in layer.parameters(recurse=False))


def _is_uniform(weight: Tensor, bound: float) -> bool:
    """Return whether values lie within a bound, and are spread as uniform ones are."""
    spread = float(weight.double().square().mean()) / (bound**2 / 3)
    standard_error = math.sqrt(0.8 / weight.numel())  # of that ratio: Var(u²) = 4/45 for u in [-1, 1]
    return float(weight.abs().max()) <= bound * (1 + 1e-6) and abs(spread - 1) <= DEVIATIONS * standard_error
