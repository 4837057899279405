"""A block that is used again: a residual network whose blocks are one is a recurrent network."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hard import tie

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Recurrent(nn.Module):
    """Apply a block several times: ``h_{t+1} = block(h_t)``, with weights that are one, by a hard tie of its copies.

    Args:
        block: maps its input to an output of the same shape; it becomes the first of ``blocks``.
        steps: how many times, T.
        per_step_norm: each step has normalisation layers of its own, whose statistics are that step's; or all have the
            first one's.

    Attributes:
        steps: how many times the block is applied; may be set to another number, also to more than it was built for:
            then the last step's normalisation layers are used further on.

    Shape: that of the block, which must not change it.

    Raises:
        ConfigurationError: ``steps`` is below 1; in use, the block changes the shape.

    Example:
        >>> import torch
        >>> recurrent = Recurrent(nn.Linear(4, 4), steps=3)
        >>> sum(p.numel() for p in recurrent.parameters()), recurrent(torch.zeros(2, 4)).shape
        (20, torch.Size([2, 4]))

    Source: Q. Liao and T. Poggio, Bridging the gaps between residual learning, recurrent neural networks and visual
    cortex, 2016.
    """

    def __init__(self, block: nn.Module, steps: int, per_step_norm: bool = True) -> None:
        super().__init__()
        if steps < 1:
            raise ConfigurationError(f"steps must be 1 or more, not {steps}")
        self.steps = steps
        self.blocks = nn.ModuleList([block])
        if per_step_norm:
            self.blocks += [copy.deepcopy(block) for _ in range(steps - 1)]
            shared = [name for name, _ in block.named_parameters() if not isinstance(_owner(block, name), NORMS)]
            if steps > 1 and shared:
                tie(self, [f"blocks.*.{name}" for name in shared])

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return what the steps make of x."""
        for step in range(self.steps):
            out: Tensor = self.blocks[min(step, len(self.blocks) - 1)](x)
            if out.shape != x.shape:
                raise ConfigurationError(
                    f"a recurrent block must keep the shape of its input: it makes {tuple(out.shape)} of "
                    f"{tuple(x.shape)}"
                )
            x = out
        return x

    @override
    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def _owner(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.rpartition(".")[0])
