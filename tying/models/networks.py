"""Small networks for use in configurations."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, check_choice, check_count

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}


class MLP(nn.Sequential):
    """Linear layers with an activation after each but the last; the input is flattened.

    Args:
        sizes: units of each layer, from input to output.
        activation: ``"relu"`` or ``"elu"``.
        norm: add an activation and batch normalisation after each layer, including the last, as in ArbNets.

    Shape: (batch, ...) with ``sizes[0]`` entries per sample, to (batch, ``sizes[-1]``).

    Example:
        >>> import torch
        >>> MLP([12, 8, 2])(torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, sizes: Sequence[int], activation: Literal["relu", "elu"] = "relu", norm: bool = False) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        super().__init__(nn.Flatten(), *stack(sizes, ACTIVATIONS[activation], norm))


def sequential(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Return ``torch.nn.Sequential`` of a list of layers; configurations cannot give it the layers one by one.

    Example:
        >>> sequential([nn.Flatten(), nn.Linear(4, 3), nn.ReLU()])[1].weight.shape
        torch.Size([3, 4])
    """
    return nn.Sequential(*layers)


class GRU(LeafModule, nn.GRU):
    """``torch.nn.GRU`` without ``proj_size``, which configurations would pass and ``torch.nn.GRU`` rejects.

    Example:
        >>> import torch
        >>> GRU(3, 4)(torch.zeros(5, 2, 3))[0].shape
        torch.Size([5, 2, 4])
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__(input_size, hidden_size, num_layers, dropout=dropout)


def stack(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> list[nn.Module]:
    """Return linear layers from ``sizes[0]`` to ``sizes[-1]`` units, with activations between them.

    With ``norm``, an activation and batch normalisation follow each layer, including the last.

    Raises:
        ConfigurationError: fewer than two sizes.
    """
    if not isinstance(sizes, Sequence) or len(sizes) < 2:
        raise ConfigurationError(f"sizes must hold the units of the input and of at least one layer, not {sizes}")
    for size in sizes:
        check_count("every size", size)
    layers = [
        layer
        for inputs, outputs in pairwise(sizes)
        for layer in (nn.Linear(inputs, outputs), activation(), *([nn.BatchNorm1d(outputs)] if norm else []))
    ]
    return layers if norm else layers[:-1]
