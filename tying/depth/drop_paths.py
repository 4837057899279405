"""DropPath modules, by which other libraries drop branches at random, and which merges replace."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from tying.depth.generated_classes import generate_class, original_class
from tying.depth.merge import Merge
from tying.errors import ConfigurationError, listed
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


def common_rate(name: str, rates: Mapping[nn.Module, float]) -> float:
    """Return the drop probability of all DropPath modules of a block; 0 if it has none.

    Raises:
        ConfigurationError: they have several.
    """
    if len(distinct := sorted({*rates.values()})) > 1:
        raise ConfigurationError(
            f"keep='model': {name!r} contains DropPath or StochasticDepth modules with the drop probabilities "
            f"{listed(f'{rate:g}' for rate in distinct)}: name the blocks within it, or give keep as numbers"
        )
    return distinct[0] if distinct else 0.0


def silence(blocks: Iterable[Mapping[nn.Module, float]], notice: bool) -> None:
    """Let DropPath modules return their input.

    Args:
        blocks: the modules of each block, with their drop probabilities.
        notice: whether to warn that they are silenced; if False, warn if there are none, whose rates would be taken.
    """
    rates = {module: rate for modules in blocks for module, rate in modules.items()}
    for module in rates:
        swap_class(module, generate_class(Silenced, type(module)))
    if rates and notice:
        warnings.warn(
            f"{len(rates)} DropPath or StochasticDepth modules in the blocks, with drop probabilities from "
            f"{min(rates.values()):g} to {max(rates.values()):g}, return their input until remove_merge, since the "
            "merges drop instead; keep='model' drops with these probabilities",
            stacklevel=3,
        )
    if not rates and not notice:
        warnings.warn(
            "keep='model' found no DropPath or StochasticDepth module with a drop probability above 0, so that the "
            "merges drop nothing: set the model's own rate, such as drop_path_rate of timm, or give keep as numbers",
            stacklevel=3,
        )


def restore_drop_paths(model: nn.Module) -> None:
    """Let the silenced DropPath modules of a model drop again."""
    for module in model.modules():
        if isinstance(module, Silenced):
            swap_class(module, original_class(type(module)))
