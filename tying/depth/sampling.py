"""What a network with random merges says, sampled many times: the ensemble it was trained as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tying.depth.draws import per_rank_rng
from tying.depth.merge import Merge
from tying.errors import ConfigurationError


class Sampled(NamedTuple):
    """Probabilities of sampled passes.

    Attributes:
        mean: over passes, (batch, classes).
        spread: their standard deviation, (batch, classes): how much the passes disagree.
    """

    mean: Tensor
    spread: Tensor


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Let the merges of a model draw, and everything else evaluate: batch norms hold still.

    Each of several processes draws on its own: they may have different numbers of batches.

    Example:
        >>> from tying.depth import Residual, Swapout
        >>> model = Residual(nn.BatchNorm1d(2), merge=Swapout(0.5, 0.5))
        >>> with sampling(model):
        ...     model.merge.training, model.branch.training
        (True, False)
    """
    modes = {module: module.training for module in model.modules()}
    token = per_rank_rng.set(True)
    try:
        model.eval()
        for module in modes:
            if isinstance(module, Merge):
                module.train()
        yield
    finally:
        per_rank_rng.reset(token)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def sampled(model: nn.Module, x: Tensor, samples: int) -> Sampled:
    """Return the mean of the probabilities that a model gives in sampled passes, and their spread.

    Passes follow one another: memory does not grow with their number.

    Args:
        model: maps a batch of inputs to logits.
        x: the batch.
        samples: number of passes.

    Raises:
        ConfigurationError: there is no pass, or no merge that draws.

    Example:
        >>> from tying.depth import Residual, Swapout
        >>> sampled(Residual(nn.Linear(3, 3), merge=Swapout(0.5, 0.5)), torch.zeros(2, 3), samples=30).mean.shape
        torch.Size([2, 3])
    """
    if samples < 1:
        raise ConfigurationError(f"samples must be 1 or more, not {samples}")
    if not any(isinstance(module, Merge) and module.keeps for module in model.modules()):
        raise ConfigurationError("samples of what? the model has no merge that draws")
    mean = squares = torch.zeros(())
    with sampling(model):
        for number in range(1, samples + 1):
            logits = model(x)
            drawn = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
            before = mean
            mean = mean + (drawn - mean) / number
            squares = squares + (drawn - before) * (drawn - mean)
    return Sampled(mean, (squares / max(1, samples - 1)).sqrt())
