"""torchvision's residual blocks with merges."""

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from typing_extensions import override

from tying.depth.merge import Branch


class _Merged(nn.Module):
    """Base class of both blocks. The branch is ``conv1``, ``bn1``, ReLU, ``conv2``, ``bn2``, …, with no final ReLU."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        layers = [(getattr(self, f"conv{n}"), getattr(self, f"bn{n}")) for n in (1, 2, 3) if hasattr(self, f"conv{n}")]

        def compute(x: Tensor) -> Tensor:
            for number, (conv, norm) in enumerate(layers):
                x = norm(conv(block.relu(x) if number else x))
            return x

        branch = Branch(compute, [(x, 0)], [module for layer in layers for module in layer])
        shortcut = x if block.downsample is None else block.downsample(x)
        return cast(Tensor, block.relu(self.merge(shortcut, branch)))


class MergedBasicBlock(_Merged, BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's BasicBlock with a merge."""


class MergedBottleneck(_Merged, Bottleneck):  # type: ignore[misc]  # torchvision has no types
    """torchvision's Bottleneck with a merge."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: MergedBasicBlock, Bottleneck: MergedBottleneck}
