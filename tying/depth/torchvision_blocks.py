"""torchvision's residual blocks with merges."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from typing_extensions import override

from tying.depth.merge import Branch


def _merged(block: Any, x: Tensor, layers: list[tuple[nn.Module, nn.Module]]) -> Tensor:
    """Return the output of a block whose branch has these convolutions and norms, with ReLUs between the layers."""

    def compute(x: Tensor) -> Tensor:
        for number, (conv, norm) in enumerate(layers):
            x = norm(conv(block.relu(x) if number else x))
        return x

    branch = Branch(compute, [(x, 0)], [module for layer in layers for module in layer])
    shortcut = x if block.downsample is None else block.downsample(x)
    return cast(Tensor, block.relu(block.merge(shortcut, branch)))


class MergedBasicBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's BasicBlock with a merge."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        return _merged(self, x, [(self.conv1, self.bn1), (self.conv2, self.bn2)])


class MergedBottleneck(Bottleneck):  # type: ignore[misc]  # likewise
    """torchvision's Bottleneck with a merge."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        return _merged(self, x, [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)])


CLASSES: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: MergedBasicBlock, Bottleneck: MergedBottleneck}
