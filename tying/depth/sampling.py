"""Average the predictions of several random passes through a network with stochastic merges."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tying.deprecated import class_aliases
from tying.depth.draws import per_rank_rng
from tying.depth.merge import Merge
from tying.errors import ConfigurationError, check_count


@class_aliases("tying.depth.Sampled")
class Sampled(NamedTuple):
    """Class probabilities of sampled passes.

    Attributes:
        mean: mean over passes, (batch, classes).
        std: standard deviation over passes, (batch, classes): how much the passes disagree.
    """

    mean: Tensor
    std: Tensor


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Set the merges of a model to training mode and all other modules to evaluation mode.

    Merges then draw, and batch norms keep their statistics. Each process draws independently, since processes may have
    different numbers of batches.

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
    """Return mean and standard deviation of the class probabilities over sampled passes.

    The passes run one after another: memory does not grow with their number.

    Args:
        model: maps a batch of inputs to logits.
        x: the batch.
        samples: number of passes.

    Raises:
        ConfigurationError: ``samples`` is below 1, or the model has no merge that draws.

    Example:
        >>> from tying.depth import Residual, Swapout
        >>> sampled(Residual(nn.Linear(3, 3), merge=Swapout(0.5, 0.5)), torch.zeros(2, 3), samples=30).mean.shape
        torch.Size([2, 3])
    """
    check_count("samples", samples, "[1, inf)")
    if not any(isinstance(module, Merge) and module.prob_names for module in model.modules()):
        raise ConfigurationError(
            "sampled passes need a stochastic merge, and the model has no merge that draws: apply one, such as Swapout"
        )
    mean = squares = torch.zeros(())
    with sampling(model):
        for count in range(1, samples + 1):
            logits = model(x)
            probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
            deviation = probabilities - mean
            mean = mean + deviation / count
            squares = squares + deviation * (probabilities - mean)
    return Sampled(mean, (squares / max(1, samples - 1)).sqrt())
