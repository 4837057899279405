"""FractalNet for small images."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from typing_extensions import override

from tying.depth import FractalBlock
from tying.depth.fractal import column_index, draw_column
from tying.depth.tracing import in_graph
from tying.errors import ConfigurationError, check_range


class FractalNet(nn.Module):
    """Fractal blocks with pooling after each; a layer is a convolution, dropout, normalisation and ReLU.

    In training, a fraction of mini-batches passes through a single column, drawn for the whole network; for all others,
    every join drops inputs (:class:`tying.depth.FractalBlock`). In evaluation nothing is dropped.

    Args:
        columns: the number C of columns of every block; the deepest has 2^(C−1) layers.
        widths: channels of each block.
        drop_path: probability of dropping an input of a join. For training without drop-path, set it and
            ``global_share`` to 0.
        global_share: fraction of mini-batches that pass through a single column.
        dropout: dropout rate of the layers of each block; empty for no dropout.
        num_classes: number of outputs.
        in_channels: channels of the images.
        column: evaluate only this column: 0, the shallowest, to C − 1.

    Shape: (batch, in_channels, height, width) to (batch, num_classes); each block halves height and width.

    Raises:
        ConfigurationError: see FractalBlock; or the number of dropout rates is not the number of blocks, or a number is
            out of range.

    Example:
        >>> import torch
        >>> FractalNet(columns=2, widths=(8, 16))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: G. Larsson, M. Maire and G. Shakhnarovich, FractalNet: ultra-deep neural networks without residuals, 2017.
    """

    def __init__(
        self,
        columns: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        drop_path: float = 0.15,
        global_share: float = 0.5,
        dropout: Sequence[float] = (),
        num_classes: int = 10,
        in_channels: int = 3,
        column: int | None = None,
    ) -> None:
        super().__init__()
        rates = [*dropout] or [0.0] * len(widths)
        if not widths or len(rates) != len(widths):
            raise ConfigurationError(f"{len(rates)} dropout rates for {len(widths)} blocks: one each, or none")
        check_range("global_share", global_share, "[0, 1]")
        if column is not None and not 0 <= column < columns:
            raise ConfigurationError(f"column must be an integer in [0, {columns - 1}], not {column}")
        self.blocks = nn.ModuleList(
            FractalBlock(columns, partial(_layer, rate), before, width, drop_path)
            for before, width, rate in zip([in_channels, *widths[:-1]], widths, rates, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(widths[-1], num_classes)
        self.columns, self.global_share, self.column = columns, global_share, column

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        column: int | Tensor | None = self.column
        if self.training:
            draw = partial(column_index, x) if in_graph(x) else draw_column
            column = draw(self.columns, self.global_share)
        for block in self.blocks:
            x = self.pool(block(x, column))
        return cast(Tensor, self.head(x.mean(dim=(2, 3))))


def _layer(dropout: float, inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            dropout=nn.Dropout(dropout) if dropout else nn.Identity(),
            norm=nn.BatchNorm2d(outputs),
            activation=nn.ReLU(),
        )
    )
