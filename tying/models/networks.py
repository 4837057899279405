"""Reference networks, written with the pieces of this package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from tying.depth import Residual
from tying.errors import ConfigurationError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}


class MLP(nn.Sequential):
    """Linear layers with an activation after each but the last; the input is flattened.

    Args:
        sizes: units of each layer, from input to output.
        activation: ``"relu"`` or ``"elu"``.
        norm: an activation and batch normalisation after each layer, the last one too, as in ArbNets.

    Shape: (batch, ...) with ``sizes[0]`` entries a sample, to (batch, ``sizes[-1]``).

    Example:
        >>> import torch
        >>> MLP([12, 8, 2])(torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, sizes: Sequence[int], activation: Literal["relu", "elu"] = "relu", norm: bool = False) -> None:
        if activation not in ACTIVATIONS:
            raise ConfigurationError(f"activation is {' or '.join(map(repr, ACTIVATIONS))}, not {activation!r}")
        super().__init__(nn.Flatten(), *stack(sizes, ACTIVATIONS[activation], norm))


class ResNet(nn.Module):
    """The residual network of 6n + 2 layers for small images: three stages of n blocks.

    Its parts are ``stem``, ``layer1`` to ``layer3`` (each a sequence of :class:`tying.depth.Residual` whose branch
    holds conv1, norm1, conv2, norm2) and ``head``. Shortcuts have no parameters: where the shape changes, every
    second pixel is taken and channels are filled up with zeros.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        width: factor on the channels 16, 32 and 64 of the stages.
        num_classes: number of outputs.
        in_channels: channels of the images.

    Shape: (batch, in_channels, height, width) to (batch, num_classes).

    Raises:
        ConfigurationError: depth is not 6n + 2, or width below 1.

    Example:
        >>> sum(p.numel() for p in ResNet(depth=20).parameters())
        269722

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep residual learning for image recognition, 2016, section 4.2.
    """

    def __init__(self, depth: int = 20, width: int = 1, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigurationError(f"a ResNet's depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), not {depth}")
        if width < 1:
            raise ConfigurationError(f"a ResNet's width is a factor of 1 or more, not {width}")
        channels = [16 * width, 32 * width, 64 * width]
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(channels[0]),
                activation=nn.ReLU(),
            )
        )
        self.layer1 = _stage(channels[0], channels[0], blocks, stride=1)
        self.layer2 = _stage(channels[0], channels[1], blocks, stride=2)
        self.layer3 = _stage(channels[1], channels[2], blocks, stride=2)
        self.head = nn.Linear(channels[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class PadShortcut(nn.Module):
    """A shortcut without parameters to a smaller image of more channels: subsampled, and filled up with zeros.

    Args:
        extra_channels: how many channels of zeros to add.
        stride: take every stride-th pixel.

    Shape: (batch, channels, height, width) to (batch, channels + extra, ⌈height/stride⌉, ⌈width/stride⌉).
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"extra_channels={self.extra_channels}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded, subsampled input."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


def stack(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> list[nn.Module]:
    """Return linear layers from ``sizes[0]`` to ``sizes[-1]`` units, with activations between them.

    With ``norm`` each layer, the last one too, is followed by an activation and by batch normalisation.

    Raises:
        ConfigurationError: fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ConfigurationError(f"sizes must hold the units of the input and of at least one layer, not {[*sizes]}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation(), *([nn.BatchNorm1d(outputs)] if norm else [])]
    return layers if norm else layers[:-1]


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = _block(inputs, outputs, stride)
    return nn.Sequential(first, *(_block(outputs, outputs, stride=1) for _ in range(blocks - 1)))


def _block(inputs: int, outputs: int, stride: int) -> Residual:
    branch = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm1=nn.BatchNorm2d(outputs),
            activation=nn.ReLU(),
            conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(outputs),
        )
    )
    shortcut = PadShortcut(outputs - inputs, stride) if stride > 1 or inputs != outputs else None
    return Residual(branch, shortcut, activation=nn.ReLU())
