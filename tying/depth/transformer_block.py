"""torch's transformer encoder layer with merges."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.merge import Branch
from tying.depth.tracing import LeafModule
from tying.torch_workarounds import attention_branch, feed_forward_branch


class MergedTransformerEncoderLayer(LeafModule, nn.TransformerEncoderLayer):
    """torch's TransformerEncoderLayer with a merge, which combines each of its two branches with its shortcut.

    ``torch.fx`` records it as one node, like torch's.
    """

    merge: nn.Module

    @override
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        dim = 0 if self.self_attn.batch_first else 1  # the dimension of samples
        if src.ndim == 2:  # a single sample
            padding = None if src_key_padding_mask is None else src_key_padding_mask.unsqueeze(0)
            out: Tensor = self(src.unsqueeze(dim), src_mask, padding, is_causal)
            return out.squeeze(dim)
        padding, mask = _additive(src_key_padding_mask, src.dtype), _additive(src_mask, src.dtype)
        mask_dim = None  # one mask for all samples
        if mask is not None and mask.ndim == 3:  # (samples · heads, length, length)
            mask, mask_dim = mask.view(-1, self.self_attn.num_heads, *mask.shape[1:]), 0

        def attend(x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
            mask = mask if mask is None or mask_dim is None else mask.flatten(0, 1)
            return attention_branch(self, self.norm1(x) if self.norm_first else x, mask, padding, is_causal=is_causal)

        def feed_forward(x: Tensor) -> Tensor:
            return feed_forward_branch(self, self.norm2(x) if self.norm_first else x)

        first, second = ([self.norm1], [self.norm2]) if self.norm_first else ([], [])
        inputs = [(src, dim), (padding, 0), (mask, mask_dim)]
        x: Tensor = self.merge(src, Branch(attend, inputs, [*first, self.self_attn]))
        x = x if self.norm_first else self.norm1(x)
        x = self.merge(x, Branch(feed_forward, [(x, dim)], [*second, self.linear1, self.linear2]))
        return x if self.norm_first else self.norm2(x)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask to add to attention scores; a bool mask is true where attention ignores a position."""
    return (
        mask
        if mask is None or mask.dtype != torch.bool
        else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    )
