"""DropPath modules, by which other libraries drop branches at random, and which merges replace."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from tying.depth.blocks import generate_class, original_class
from tying.depth.merge import Merge
from tying.weights.derived import swap_class


class Silenced(nn.Module):
    """First base of the generated class of a DropPath module that returns its input."""

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def drop_paths(block: nn.Module) -> dict[nn.Module, float]:
    """Return the modules of a block that drop its branches at random, and their drop probabilities above 0.

    These are DropPath of timm, those of transformers' models, and StochasticDepth of torchvision. They are recognised
    by name, since each model of transformers defines its own class.

    Example:
        >>> from torchvision.ops import StochasticDepth
        >>> [*drop_paths(nn.Sequential(StochasticDepth(0.25, "row"), StochasticDepth(0.0, "row"))).values()]
        [0.25]
    """
    rates = {
        module: getattr(module, "drop_prob", None) or getattr(module, "p", None)
        for module in block.modules()
        if type(module).__name__.endswith(("DropPath", "StochasticDepth")) and not isinstance(module, (Merge, Silenced))
    }
    return {module: float(rate) for module, rate in rates.items() if rate}


def silence(modules: Iterable[nn.Module]) -> None:
    """Let DropPath modules return their input."""
    for module in modules:
        swap_class(module, generate_class(Silenced, type(module)))


def restore_drop_paths(model: nn.Module) -> None:
    """Let the silenced DropPath modules of a model drop again."""
    for module in model.modules():
        if isinstance(module, Silenced):
            swap_class(module, original_class(type(module)))
