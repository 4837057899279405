"""Notice blocks whose samples depend on each other: their samples may lie along another dimension than the first."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tying.depth.stochastic_depth import BATCH_NORMS, StochasticDepth


@dataclass
class SampleNotice:
    """Warns of blocks whose samples depend on each other, once for each class; all blocks of a model share it.

    Attributes:
        classes: the names of the classes that have been checked.
    """

    classes: set[str] = field(default_factory=set)

    def is_due(self, block: nn.Module, merge: nn.Module) -> bool:
        """Return whether a block with a merge that draws for each sample has not been checked."""
        return draws_samples(merge) and type(block).__name__ not in self.classes

    def check(self, block: nn.Module, name: str, x: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        """Check a block, given its name, its input, and a function that returns its output; warn if need be."""
        self.classes.add(type(block).__name__)
        if depends_on_others(compute, x, block):
            warnings.warn(
                f"{name}: its output for one sample depends on other samples. Each index of the first dimension has "
                "its own draw: if that dimension is not the samples but positions, for example, use mode='batch'",
                stacklevel=2,
            )


def draws_samples(merge: nn.Module) -> bool:
    """Return whether a merge draws for each sample.

    Example:
        >>> draws_samples(StochasticDepth(0.5, "row")), draws_samples(StochasticDepth(0.5))
        (True, False)
    """
    return isinstance(merge, StochasticDepth) and merge.mode != "batch" and 0 < merge.keep_prob("keep") < 1


def depends_on_others(compute: Callable[[Tensor], Tensor], x: Tensor, block: nn.Module) -> bool:
    """Return whether the output for some samples changes with another sample, the first entry of x along dimension 0.

    Return False if there is only one sample, or batch normalisation, which mixes samples on purpose.

    Args:
        compute: returns the output of the block for x.
        x: the input.
        block: the block; it is left as it is.

    Example:
        >>> depends_on_others(lambda x: x + x.sum(0), torch.ones(3, 2), nn.Identity())
        True
    """
    if len(x) < 2 or any(isinstance(module, BATCH_NORMS) and module.training for module in block.modules()):
        return False
    x = x.detach()
    changed = x.clone()
    changed[0].neg_()
    outputs = []
    for values in (x, changed):
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # the same draws of dropout
            outputs.append(compute(values)[1:])
    before, after = outputs
    return not torch.allclose(before, after, rtol=1e-2, atol=1e-3 * float(x.abs().max()))
