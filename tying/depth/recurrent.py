"""A block that is used again: a residual network whose blocks are one is a recurrent network."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.depth.merge import Branch, skip_branch
from tying.errors import ConfigurationError, listed
from tying.hard import tie

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


class Recurrent(nn.Module):
    """Apply a block several times: ``h_{t+1} = block(h_t)``, with weights that are one, by a hard tie of its copies.

    Args:
        block: maps its input to an output of the same shape; it becomes the first of ``blocks``.
        steps: how many times, T.
        per_step_norm: each step has normalisation layers of its own, whose statistics are that step's; or all have the
            first one's.

    ``steps`` may be set to another number afterwards, also to more than it was built for: then the last step's
    normalisation layers are used further on.

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
        self.steps = steps
        if computed := [name for name, part in block.named_modules() if isinstance(part, ParametrizationList)]:
            raise ConfigurationError(
                f"Recurrent takes a block whose weights are parameters, not {listed(computed)}: parametrize it when "
                "it is recurrent"
            )
        self.blocks = nn.ModuleList([block])
        if per_step_norm:
            self.blocks += [copy.deepcopy(block) for _ in range(steps - 1)]
            owners = {name: block.get_submodule(name.rpartition(".")[0]) for name, _ in block.named_parameters()}
            shared = [name for name, owner in owners.items() if not isinstance(owner, NORMS)]
            if steps > 1 and shared:
                tie(self, [f"blocks.*.{name}" for name in shared])

    @property
    def steps(self) -> int:
        """How many times the block is applied."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"steps must be an integer, 1 or more, not {steps!r}")
        self._steps = steps

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
        unused = self.blocks[self.steps :]
        return skip_branch(x, Branch(nn.Identity(), [(x, 0)], [*unused])) if unused and self.training else x

    @override
    def extra_repr(self) -> str:
        return f"steps={self.steps}"
