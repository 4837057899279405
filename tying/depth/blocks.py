"""Residual blocks of other people, so that a merge may combine their branches and shortcuts.

Each class computes what its parent does where its merge is a sum. A block becomes one, and itself again, by its class
alone: parameters, buffers, hooks and names stay.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.branch import Branch


class MergedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch's TransformerEncoderLayer with a merge, which combines each of its branches with its shortcut."""

    merge: nn.Module

    @override
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        samples = 0 if self.self_attn.batch_first else 1
        if src.ndim == 2:  # one sample alone
            src, alone = src.unsqueeze(samples), src
            padding = None if src_key_padding_mask is None else src_key_padding_mask.unsqueeze(0)
            return self(src, src_mask, padding, is_causal).view_as(alone)  # type: ignore[no-any-return]  # a module
        padding, mask = (_additive(one, src.dtype) for one in (src_key_padding_mask, src_mask))
        own = mask is not None and mask.ndim == 3  # a mask for each sample and head
        if mask is not None and own:
            mask = mask.view(-1, self.self_attn.num_heads, *mask.shape[1:])

        def attend(x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
            mask = mask.flatten(0, 1) if mask is not None and own else mask
            return self._sa_block(self.norm1(x) if self.norm_first else x, mask, padding, is_causal=is_causal)

        def feed(x: Tensor) -> Tensor:
            return self._ff_block(self.norm2(x) if self.norm_first else x)

        first = [self.norm1] if self.norm_first else []
        second = [self.norm2] if self.norm_first else []
        inputs = [(src, samples), (padding, 0), (mask, 0 if own else None)]
        x: Tensor = self.merge(src, Branch(attend, inputs, [*first, self.self_attn]))
        x = x if self.norm_first else self.norm1(x)
        x = self.merge(x, Branch(feed, [(x, samples)], [*second, self.linear1, self.linear2]))
        return x if self.norm_first else self.norm2(x)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def merged_kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """Return, for each kind of block, the one that has a merge."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.TransformerEncoderLayer: MergedTransformerEncoderLayer}
    if "torchvision.models.resnet" in sys.modules:  # or else there is none of its blocks; it takes a second to import
        from tying.depth.torchvision_blocks import KINDS

        kinds |= KINDS
    return kinds
