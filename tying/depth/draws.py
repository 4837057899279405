"""Random decisions, from torch's global generator: activation checkpointing draws them again, and compilation anew."""

from __future__ import annotations

import math
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

LEVELS = 2**16  # a probability is a multiple of 1 / LEVELS


def keep_mask(keep: float, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return independent draws, each true with probability ``keep``, rounded to a multiple of 2⁻¹⁶.

    Args:
        keep: from 0 to 1.
        shape: of the mask.
        device: where to draw it.

    Returns:
        bool. Each random 64-bit integer makes four entries, which takes a quarter of the time of ``torch.bernoulli``.

    Example:
        >>> keep_mask(1.0, (2, 2)).tolist()
        [[True, True], [True, True]]
    """
    below = round(keep * LEVELS)
    if below in (0, LEVELS):
        return torch.full(shape, below > 0, dtype=torch.bool, device=device)
    count = math.prod(shape)
    if torch.compiler.is_compiling():  # which takes no in-place draws
        words = torch.randint(-(2**31), 2**31 - 1, ((count + 1) // 2,), dtype=torch.int32, device=device)
    else:
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] < below - LEVELS // 2).view(shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; a decision in Python is no part of a graph
def draw(keep: float) -> bool:
    """Return true with probability ``keep``: one draw, and in all processes that of the first.

    Processes may have consumed different amounts of randomness; what they compute stays alike nevertheless.
    """
    drawn = torch.rand((), dtype=torch.float64)
    broadcast_rank0(drawn)
    return bool(drawn < keep)


per_rank_rng: ContextVar[bool] = ContextVar(
    "apart", default=False
)  # processes draw on their own, as they need not agree


def broadcast_rank0(drawn: Tensor) -> None:
    """Overwrite a tensor on the CPU with that of the first process, if there are several that are to agree."""
    if per_rank_rng.get():
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(drawn, src=0, group=_group_for_draws())


_made: list[tuple[object, dist.ProcessGroup]] = []  # for which world: it may be destroyed, and made again


def _group_for_draws() -> dist.ProcessGroup:
    """Return a group of all processes for tensors on the CPU, apart from the one whose gradients are on their way."""
    world = dist.group.WORLD
    if not _made or _made[0][0] is not world:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _made[:] = [(world, group)]
    return _made[0][1]
