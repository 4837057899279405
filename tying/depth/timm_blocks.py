"""timm's residual blocks with merges.

Each class computes what timm's does, with ``self.merge(shortcut, branch)`` in place of each addition.
"""

from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.merge import Branch, chain
from tying.torch_workarounds import is_proxy, windowed_attention


class MergedVisionTransformerBlock(Block):
    """The vision transformer's block: attention and MLP are merged one after the other."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        def attend(x: Tensor, mask: Tensor | None) -> Tensor:
            return self.drop_path1(self.ls1(self.attn(self.norm1(x), **_options(mask, is_causal))))

        x = self.merge(x, Branch(attend, _inputs(x, attn_mask), [self.norm1, self.attn, self.ls1]))
        return self.merge(x, chain(x, self.norm2, self.mlp, self.ls2, self.drop_path2))


class MergedResPostBlock(ResPostBlock):
    """Like :class:`MergedVisionTransformerBlock`, with the norms last."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        def attend(x: Tensor, mask: Tensor | None) -> Tensor:
            return self.drop_path1(self.norm1(self.attn(x, **_options(mask, is_causal))))

        x = self.merge(x, Branch(attend, _inputs(x, attn_mask), [self.attn, self.norm1]))
        return self.merge(x, chain(x, self.mlp, self.norm2, self.drop_path2))


def _options(mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return what a layer of attention gets; those of older versions do not know all of its options."""
    return ({} if mask is None else {"attn_mask": mask}) | ({"is_causal": is_causal} if is_causal else {})


def _inputs(x: Tensor, mask: Tensor | None) -> list[tuple[Tensor | None, int | None]]:
    """Return the inputs of attention; a mask broadcasts to (samples, heads, queries, keys)."""
    has_rows = mask is not None and not is_proxy(mask) and mask.ndim == 4 and mask.shape[0] > 1
    return [(x, 0), (mask, 0 if has_rows else None)]


class MergedConvNeXtBlock(ConvNeXtBlock):
    """ConvNeXt's block."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            x = self.conv_dw(x)
            if self.use_conv_mlp:
                x = self.mlp(self.norm(x))
            else:
                x = self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            return self.drop_path(x if self.gamma is None else x.mul(self.gamma.reshape(1, -1, 1, 1)))

        shortcut = self.shortcut(x).contiguous(memory_format=torch.channels_last)  # as the branch, and so timm's sum
        return self.merge(shortcut, Branch(compute, [(x, 0)], [self]))


class MergedSwinTransformerBlock(SwinTransformerBlock):
    """Swin's block: attention and MLP are merged one after the other."""

    merge: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.drop_path1(windowed_attention(self, self.norm1(x)))

        samples, height, width, channels = x.shape
        x = self.merge(x, Branch(attend, [(x, 0)], [self.norm1, self.attn]))
        x = x.reshape(samples, -1, channels)
        x = self.merge(x, chain(x, self.norm2, self.mlp, self.drop_path2))
        return x.reshape(samples, height, width, channels)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Block: MergedVisionTransformerBlock,
    ResPostBlock: MergedResPostBlock,
    ConvNeXtBlock: MergedConvNeXtBlock,
    SwinTransformerBlock: MergedSwinTransformerBlock,
}
