"""MNIST pixel by pixel."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.data.mnist import MNIST
from tying.errors import ConfigurationError


class SequentialMNIST(MNIST):
    """MNIST as sequences of pixels, row by row, or in one random order for all images.

    Args:
        root: the folder that holds ``MNIST/raw/``.
        permuted: take the pixels in a random order, drawn by ``permutation_seed``.
        shrink: average squares of as many pixels in height and width, for shorter sequences; it divides 28.
        permutation_seed: of the order.
        batch_size: as of :class:`tying.data.MNIST`, as all that follow.
        validation: share of the training images held out.
        seed: of order and augmentation.
        download: fetch the files if they are missing.

    Shape: batches of sequences (batch, (28 / shrink)², 1) and labels (batch,).

    Raises:
        ConfigurationError: as MNIST; ``shrink`` does not divide 28.

    Source: Q. Le, N. Jaitly and G. Hinton, A simple way to initialize recurrent networks of rectified linear units,
    2015.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        permuted: bool = True,
        shrink: int = 1,
        permutation_seed: int = 0,
        batch_size: int = 100,
        validation: float = 0.1,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(root, batch_size, validation, None, False, seed, download)
        if shrink < 1 or 28 % shrink:
            raise ConfigurationError(f"shrink must divide the images' 28 pixels, not {shrink}")
        self.shrink = shrink
        steps = (28 // shrink) ** 2
        drawn = torch.randperm(steps, generator=torch.Generator().manual_seed(permutation_seed))
        self.order = drawn if permuted else torch.arange(steps)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return pixels_in_order(images, self.order, self.shrink), labels


def pixels_in_order(images: Tensor, order: Tensor, shrink: int = 1) -> Tensor:
    """Return images as sequences of their pixels.

    Args:
        images: (batch, 1, height, width).
        order: (height · width / shrink²,): which pixel, counted row by row, comes at which step.
        shrink: average squares of as many pixels first.

    Returns:
        (batch, steps, 1).

    Example:
        >>> pixels_in_order(torch.arange(4.0).view(1, 1, 2, 2), torch.tensor([3, 0, 1, 2])).flatten().tolist()
        [3.0, 0.0, 1.0, 2.0]
    """
    small = F.avg_pool2d(images, shrink) if shrink > 1 else images
    return small.flatten(1).index_select(1, order.to(images.device)).unsqueeze(2)
