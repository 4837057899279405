"""Residual networks for small images, with a choice of merges and optional weight sharing between blocks."""

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import Literal, cast, get_args

from torch import Tensor, nn
from typing_extensions import override

from tying.depth import Recurrent, Residual
from tying.errors import ConfigurationError, check_choice, check_count, check_counts

Shortcut = Literal["pad", "pool", "project"]


class ResNet(nn.Module):
    """The residual network of 6n + 2 layers for small images: three stages of n blocks.

    Its parts are ``stem``, ``layer1`` to ``layer3`` (each a sequence of :class:`tying.depth.Residual` whose branch
    holds conv1, norm1, conv2, norm2) and ``head``; with ``preactivation``, also ``norm`` before the head.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        width: factor on the channels 16, 32 and 64 of the stages; a multiple of 1/16.
        num_classes: number of outputs.
        in_channels: channels of the images.
        merge: the merge of every block; ``None`` for a sum. To vary it with depth, use
            :class:`tying.callbacks.ResidualMerging`.
        shared: use one block for all blocks of a stage that keep the shape (:class:`tying.depth.Recurrent`).
        per_step_norm: with ``shared``: each use of a block has separate normalisation layers.
        preactivation: normalise and activate before each convolution instead of after it, and not after the merge.
        shortcut: used if the shape changes: ``"pad"``: take every second pixel, and pad with channels of zeros;
            ``"pool"``: take means of 2 by 2 pixels, and pad; ``"project"``: a convolution.

    Shape: (batch, in_channels, height, width) to (batch, num_classes).

    Raises:
        ConfigurationError: depth is not 6n + 2, width is not a multiple of 1/16, the shortcut is unknown, or the stages
            are too short to share blocks.

    Example:
        >>> sum(p.numel() for p in ResNet(depth=20).parameters())
        269722
        >>> sum(p.numel() for p in ResNet(depth=20, shared=True).parameters())
        168346

    Source: K. He, X. Zhang, S. Ren and J. Sun, Deep residual learning for image recognition, 2016, section 4.2, and
    Identity mappings in deep residual networks, 2016.
    """

    def __init__(
        self,
        depth: int = 20,
        width: float = 1,
        num_classes: int = 10,
        in_channels: int = 3,
        merge: nn.Module | None = None,
        shared: bool = False,
        per_step_norm: bool = True,
        preactivation: bool = False,
        shortcut: Shortcut = "pad",
    ) -> None:
        super().__init__()
        check_count("depth", depth, "(-inf, inf)")
        check_counts(num_classes=num_classes, in_channels=in_channels)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigurationError(f"a ResNet's depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), not {depth}")
        if not (width > 0 and float(16 * width).is_integer()):
            raise ConfigurationError(f"a ResNet's width is a multiple of 1/16, such as 0.5, 1 or 2, not {width}")
        check_choice("shortcut", shortcut, get_args(Shortcut))
        if shared and blocks < 2:
            raise ConfigurationError(f"shared=True needs two blocks a stage: a depth of 14 or more, not {depth}")
        channels = [int(16 * width) * factor for factor in (1, 2, 4)]
        after = {} if preactivation else {"norm": nn.BatchNorm2d(channels[0]), "activation": nn.ReLU()}
        self.stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False), **after)
        )
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                _block(inputs, outputs, 1 if inputs == outputs else 2, preactivation, shortcut),
                *(_block(outputs, outputs, 1, preactivation, shortcut) for _ in range(blocks - 1)),
            )
            for inputs, outputs in pairwise([channels[0], *channels])
        )
        self.norm = (
            nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(channels[2]), activation=nn.ReLU()))
            if preactivation
            else nn.Identity()
        )
        self.head = nn.Linear(channels[2], num_classes)
        for module in [*self.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Residual) and merge is not None:
                module.merge = copy.deepcopy(merge)
        if shared:
            for stage in (self.layer1, self.layer2, self.layer3):
                start = 0 if stage is self.layer1 else 1  # the first block that keeps the shape of its input
                stage[start] = Recurrent(stage[start], blocks - start, per_step_norm)
                del stage[start + 1 :]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return cast(Tensor, self.head(self.norm(x).mean(dim=(2, 3))))


class PadShortcut(nn.Sequential):
    """A shortcut without parameters that subsamples an image and pads it with channels of zeros.

    Args:
        extra_channels: number of channels of zeros to add.
        stride: take every stride-th pixel.
        pool: take the mean of stride by stride pixels instead.

    Shape: (batch, channels, height, width) to (batch, channels + extra, ⌈height/stride⌉, ⌈width/stride⌉).
    """

    def __init__(self, extra_channels: int, stride: int, pool: bool = False) -> None:
        subsample = nn.AvgPool2d(stride if pool else 1, stride, ceil_mode=True)
        super().__init__(subsample, nn.ConstantPad3d((0, 0, 0, 0, 0, extra_channels), 0.0))


def _block(inputs: int, outputs: int, stride: int, preactivation: bool, shortcut: Shortcut) -> Residual:
    conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
    norm1, norm2 = nn.BatchNorm2d(inputs if preactivation else outputs), nn.BatchNorm2d(outputs)
    branch = (
        OrderedDict(norm1=norm1, activation1=nn.ReLU(), conv1=conv1, norm2=norm2, activation2=nn.ReLU(), conv2=conv2)
        if preactivation
        else OrderedDict(conv1=conv1, norm1=norm1, activation=nn.ReLU(), conv2=conv2, norm2=norm2)
    )
    change: nn.Module | None = None
    if stride > 1:
        change = (
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            if shortcut == "project"
            else PadShortcut(outputs - inputs, stride, pool=shortcut == "pool")
        )
    return Residual(nn.Sequential(branch), change, activation=None if preactivation else nn.ReLU())
