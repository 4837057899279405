"""A block that is applied repeatedly: a residual network whose blocks share their weights is a recurrent network."""

import copy

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.depth.merge import zero_gradients
from tying.depth.stochastic_depth import BATCH_NORMS
from tying.errors import ConfigurationError, listed
from tying.torch_workarounds import is_proxy
from tying.weights.tie import tie

NORMS = (
    *BATCH_NORMS,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class Recurrent(nn.Module):
    """Apply a block several times, ``h_{t+1} = block(h_t)``; all applications share its weights.

    Args:
        block: maps its input to an output of the same shape; it becomes the first entry of ``blocks``.
        steps: number of applications, T.
        per_step_norm: whether each step has separate normalisation layers and statistics; if False, all steps use the
            first step's.

    ``steps`` may be changed later, even to more than the initial number: additional steps use the normalisation layers
    of the last step.

    Shape: the output has the shape of the input.

    Raises:
        ConfigurationError: ``steps`` is below 1, the weights of the block are parametrized, or, in use, the block
            changes the shape.

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
        if parametrized := [name for name, part in block.named_modules() if isinstance(part, ParametrizationList)]:
            raise ConfigurationError(
                f"Recurrent takes a block whose weights are parameters, not {listed(parametrized)}: parametrize the "
                "Recurrent instead of the block"
            )
        self.blocks = nn.ModuleList([block])
        if per_step_norm:
            self.blocks += [copy.deepcopy(block) for _ in range(steps - 1)]
            shared = [
                name
                for name, _ in block.named_parameters()
                if not isinstance(block.get_submodule(name.rpartition(".")[0]), NORMS)
            ]
            if steps > 1 and shared:
                tie(self, [f"blocks.*.{name}" for name in shared])

    @property
    def steps(self) -> int:
        """Number of applications of the block."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"steps must be an integer, 1 or more, not {steps!r}")
        self._steps = steps

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last step."""
        for step in range(self.steps):
            out: Tensor = self.blocks[min(step, len(self.blocks) - 1)](x)
            if not is_proxy(out) and out.shape != x.shape:  # torch.fx knows no shapes
                raise ConfigurationError(
                    "a recurrent block must keep the shape of its input: "
                    f"it returns {tuple(out.shape)} for {tuple(x.shape)}"
                )
            x = out
        unused = self.blocks[self.steps :]
        return zero_gradients(x, unused.parameters()) if unused and self.training else x

    @override
    def extra_repr(self) -> str:
        return f"steps={self.steps}"
