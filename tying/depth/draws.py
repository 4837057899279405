"""Random decisions, drawn from torch's global generator.

Activation checkpointing therefore repeats the draws of the forward pass, and compiled code draws anew in each step.
"""

import math
from contextvars import ContextVar
from functools import lru_cache
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from tying.depth.tracing import leaf_function
from tying.torch_workarounds import is_recorded

LEVELS = 2**16  # probabilities are rounded to multiples of 1 / LEVELS
per_rank_rng: ContextVar[bool] = ContextVar("per_rank_rng", default=False)  # whether processes may draw differently


@leaf_function
def keep_mask(keep: float, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return a mask of independent draws, each true with probability ``keep``, rounded to a multiple of 2⁻¹⁶.

    Args:
        keep: the probability, in [0, 1].
        shape: shape of the mask.
        device: device of the mask.

    Returns:
        A bool tensor. Each random 64-bit integer yields four entries, which takes a quarter of the time of
        ``torch.bernoulli``.

    Example:
        >>> keep_mask(1.0, (2, 2)).tolist()
        [[True, True], [True, True]]
    """
    threshold = round(keep * LEVELS)
    if threshold in (0, LEVELS):
        return (torch.ones if threshold else torch.zeros)(shape, dtype=torch.bool, device=device)
    if torch.compiler.is_compiling() or is_recorded():  # in-place draws and odd counts of unknown sizes do not go there
        return torch.rand(shape, dtype=torch.float32, device=device) < threshold / LEVELS
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] < threshold - LEVELS // 2).view(shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; a decision in Python cannot be part of a graph
def draw(keep: float) -> bool:
    """Return true with probability ``keep``, the same in all processes."""
    return bool(agreed_rand() < keep)


def agreed_rand(*shape: int) -> Tensor:
    """Return uniform random numbers (float64) that the first process draws; all processes return the same numbers.

    Processes may have generators in different states, but must take the same decisions. While
    ``per_rank_rng`` is true, or if the draw is recorded, each process returns the numbers that it draws itself.
    """
    numbers = torch.rand(shape, dtype=torch.float64)
    if is_recorded() or per_rank_rng.get():
        return numbers
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(numbers, src=0, group=_cpu_group(dist.group.WORLD))
    return numbers


@lru_cache(maxsize=1)
def _cpu_group(world: object) -> dist.ProcessGroup:
    """Return a process group for tensors on the CPU, separate from the group that reduces gradients.

    The cache is keyed by the default group, since a program may destroy it and create another.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
