"""A small convolutional encoder, and the decoder that mirrors it."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class ConvEncoder(nn.Sequential):
    """Convolutions of stride 2, each followed by a ReLU: every layer halves height and width.

    Args:
        widths: channels of the input and of each layer's output.

    Shape: (batch, widths[0], height, width) to (batch, widths[-1], height / 2^L, width / 2^L) for L layers.

    Example:
        >>> import torch
        >>> ConvEncoder([3, 8, 16])(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, widths: Sequence[int] = (3, 32, 64, 128)) -> None:
        super().__init__(
            *(part for a, b in pairwise(widths) for part in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()))
        )


class ConvDecoder(nn.Sequential):
    """Upsampling and a convolution for each layer of :class:`ConvEncoder`, in reverse; no ReLU at the end.

    Args:
        widths: the encoder's widths.

    Shape: (batch, widths[-1], height / 2^L, width / 2^L) to (batch, widths[0], height, width) for L layers.

    Example:
        >>> import torch
        >>> ConvDecoder([3, 8, 16])(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, widths: Sequence[int] = (3, 32, 64, 128)) -> None:
        layers = [[nn.Upsample(scale_factor=2), nn.Conv2d(b, a, 3, padding=1), nn.ReLU()] for a, b in pairwise(widths)]
        super().__init__(*[part for layer in reversed(layers) for part in layer][:-1])
