"""torchvision's residual blocks with merges; see :mod:`tying.depth.blocks`."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from typing_extensions import override

from tying.depth.branch import Branch


class MergedBasicBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's BasicBlock with a merge."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            return self.bn2(self.conv2(out))  # type: ignore[no-any-return]  # torchvision's modules

        branch = Branch(compute, [(x, 0)], [self.conv1, self.bn1, self.conv2, self.bn2])
        out: Tensor = self.relu(self.merge(x if self.downsample is None else self.downsample(x), branch))
        return out


class MergedBottleneck(Bottleneck):  # type: ignore[misc]  # likewise
    """torchvision's Bottleneck with a merge."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.relu(self.bn2(self.conv2(out)))
            return self.bn3(self.conv3(out))  # type: ignore[no-any-return]  # torchvision's modules

        parts = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        branch = Branch(compute, [(x, 0)], parts)
        out: Tensor = self.relu(self.merge(x if self.downsample is None else self.downsample(x), branch))
        return out


KINDS: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: MergedBasicBlock, Bottleneck: MergedBottleneck}
