"""A causal transformer for language models."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, check_counts

INITIAL_STD = 0.02  # GPT-2's, of weights and positions


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each step to itself and to the steps before it.

    Args:
        size: features of a step.
        heads: number of heads, each of ``size / heads`` features.

    Shape: (batch, steps, size) to the same.

    Example:
        >>> CausalSelfAttention(8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    @override
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # untyped in torch


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and with a layer norm before it.

    Args:
        size: features of a step.
        heads: number of attention heads.

    Shape: (batch, steps, size) to the same.

    Example:
        >>> TransformerBlock(8, heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size)
        self.attention = CausalSelfAttention(size, heads)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]  # untyped in torch


class Transformer(nn.Module):
    """A causal transformer with learned positions, as the network of a :class:`tying.models.SequenceModel`.

    Weights are initialised as GPT-2's: normal with standard deviation 0.02, divided by ``sqrt(2 layers)`` where a block
    adds to its input; biases are zero. The blocks are ``blocks.0``, ``blocks.1``, …

    Args:
        size: features of a step, a multiple of ``heads``.
        layers: number of blocks.
        heads: number of attention heads in each block.
        context: the largest number of steps.

    Shape: inputs (steps, batch, size) to outputs of the same shape, and no state: each window is read by itself.

    Raises:
        ConfigurationError: an argument is below 1, or ``heads`` does not divide ``size``; in use, a sequence is longer
            than ``context``.

    Example:
        >>> outputs, state = Transformer(size=8, layers=2, heads=2, context=16)(torch.zeros(5, 3, 8))
        >>> outputs.shape, state
        (torch.Size([5, 3, 8]), None)

    Source: A. Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    def __init__(self, size: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        check_counts(size=size, layers=layers, heads=heads, context=context)
        if size % heads:
            raise ConfigurationError(f"size={size} must be a multiple of heads={heads}: each head takes size / heads")
        self.positions = nn.Parameter(torch.empty(context, size))
        self.blocks = nn.ModuleList(TransformerBlock(size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.positions, std=INITIAL_STD)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                adds = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(2 * len(self.blocks) if adds else 1))

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if len(x) > len(self.positions):
            raise ConfigurationError(
                f"a sequence has {len(x)} steps, and the context of the Transformer has {len(self.positions)}: shorten "
                "the data's window, or enlarge the context"
            )
        x = x.transpose(0, 1) + self.positions[: len(x)]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).transpose(0, 1), None
