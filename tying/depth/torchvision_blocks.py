"""torchvision's residual blocks with merges.

Each class computes what torchvision's does, with ``self.merge(shortcut, branch)`` in place of each addition.
"""

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.mobilenetv2 import InvertedResidual as InvertedResidualV2
from torchvision.models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.models.vision_transformer import EncoderBlock
from typing_extensions import override

from tying.depth.merge import Branch, chain


class MergedBasicBlock(BasicBlock):
    """The branch is ``conv1``, ``bn1``, ReLU, ``conv2``, ``bn2``, …, with no final ReLU."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        layers = [(getattr(self, f"conv{n}"), getattr(self, f"bn{n}")) for n in (1, 2, 3) if hasattr(self, f"conv{n}")]

        def compute(x: Tensor) -> Tensor:
            for number, (conv, norm) in enumerate(layers):
                x = norm(conv(self.relu(x) if number else x))
            return x

        branch = Branch(compute, [(x, 0)], [module for layer in layers for module in layer])
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.merge(shortcut, branch))


class MergedBottleneck(Bottleneck):
    """Like :class:`MergedBasicBlock`, with three layers."""

    merge: nn.Module
    forward = MergedBasicBlock.forward


class MergedInvertedResidualV2(InvertedResidualV2):
    """MobileNetV2's block, where it has a shortcut."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.conv)


class MergedInvertedResidualV3(InvertedResidualV3):
    """MobileNetV3's block, where it has a shortcut."""

    merge: nn.Module

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self.merge(input, self.block)


class MergedMBConv(MBConv):
    """EfficientNet's block, where it has a shortcut."""

    merge: nn.Module

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self.merge(input, chain(input, self.block, self.stochastic_depth))


class MergedFusedMBConv(FusedMBConv):
    """Like :class:`MergedMBConv`."""

    merge: nn.Module
    forward = MergedMBConv.forward


class MergedCNBlock(CNBlock):
    """ConvNeXt's block."""

    merge: nn.Module

    @override
    def forward(self, input: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            return self.stochastic_depth(self.layer_scale * self.block(x))

        shortcut = input.contiguous(memory_format=torch.channels_last)  # as the branch, and so torchvision's sum
        return self.merge(shortcut, Branch(compute, [(input, 0)], [self]))


class MergedEncoderBlock(EncoderBlock):
    """The vision transformer's block: attention and MLP are merged one after the other."""

    merge: nn.Module

    @override
    def forward(self, input: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            x = self.ln_1(x)
            return self.dropout(self.self_attention(x, x, x, need_weights=False)[0])

        x = self.merge(input, Branch(attend, [(input, 0)], [self.ln_1, self.self_attention]))
        return self.merge(x, chain(x, self.ln_2, self.mlp))


class MergedSwinTransformerBlock(SwinTransformerBlock):
    """Swin's block: attention and MLP are merged one after the other."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x, chain(x, self.norm1, self.attn, self.stochastic_depth))
        return self.merge(x, chain(x, self.norm2, self.mlp, self.stochastic_depth))


class MergedSwinTransformerBlockV2(SwinTransformerBlockV2):
    """Like :class:`MergedSwinTransformerBlock`, with the norms last."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.merge(x, chain(x, self.attn, self.norm1, self.stochastic_depth))
        return self.merge(x, chain(x, self.mlp, self.norm2, self.stochastic_depth))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: MergedBasicBlock,
    Bottleneck: MergedBottleneck,
    InvertedResidualV2: MergedInvertedResidualV2,
    InvertedResidualV3: MergedInvertedResidualV3,
    MBConv: MergedMBConv,
    FusedMBConv: MergedFusedMBConv,
    CNBlock: MergedCNBlock,
    EncoderBlock: MergedEncoderBlock,
    SwinTransformerBlock: MergedSwinTransformerBlock,
    SwinTransformerBlockV2: MergedSwinTransformerBlockV2,
}
