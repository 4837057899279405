"""The same classes from two sources: CIFAR-10 in colour, and in degraded grey."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.data.batches import BatchLoader
from tying.data.cache import Split
from tying.data.cifar10 import CIFAR10, Source
from tying.data.images import draw_balanced, spread_evenly
from tying.errors import ConfigurationError

DOMAINS = ("colour", "grey")


class TwoDomains(CIFAR10):
    """CIFAR-10 as two domains of the same classes: most images in colour, a few others grey and of low resolution.

    No image is in both domains in training. For validation and test, each image is in both.

    Args:
        grey: number of training images of the second domain, class-balanced and the same whatever else is set.
        shrink: grey images are averaged over squares of as many pixels in height and width; it divides 32.
        root: as of :class:`tying.data.CIFAR10`, as all that follow.
        source: likewise.
        batch_size: samples of a batch of each domain, per process; of all of a smaller domain.
        validation: share of the training images held out.
        augment: random crops and flips in training.
        seed: of order and augmentation.
        download: fetch the official archive if it is missing.

    Shape: batches are dictionaries with ``colour`` and ``grey``, each (images, labels), images of shape
    (batch, 3, 32, 32); in training, the smaller domain is started over as often as the larger one needs. Predictions
    are made of one domain after the other.

    Raises:
        ConfigurationError: as CIFAR10; ``grey`` is less than one a class or leaves no image in colour; ``shrink`` does
            not divide 32.

    Example:
        >>> data = TwoDomains(grey=250)
        >>> data.setup("fit")
        >>> {domain: len(loader.dataset) for domain, loader in data.train_dataloader().iterables.items()}
        {'colour': 4250, 'grey': 250}
    """

    def __init__(
        self,
        grey: int = 250,
        shrink: int = 2,
        root: str | os.PathLike[str] | None = None,
        source: Source = "auto",
        batch_size: int = 128,
        validation: float = 0.1,
        augment: bool = True,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(root, source, batch_size, validation, None, augment, seed, download)
        if shrink < 1 or 32 % shrink:
            raise ConfigurationError(f"shrink must divide the images' 32 pixels, not {shrink}")
        self.grey = grey
        self.shrink = shrink

    @override
    def divide(self, images: Tensor, labels: Tensor) -> dict[str, Split]:
        chosen = draw_balanced(labels, spread_evenly(self.grey, labels, "grey"))
        if chosen.all():
            raise ConfigurationError(f"grey={self.grey} leaves no image in colour, of {len(labels)} for training")
        parts = {"colour": (images[~chosen], labels[~chosen]), "grey": (images[chosen], labels[chosen])}
        parts |= {f"{split} in grey": self._splits[split] for split in ("val", "test")}
        return {
            part: (images if part == "colour" else degrade(images, self.shrink), labels)
            for part, (images, labels) in parts.items()
        }

    @override
    def train_dataloader(self) -> CombinedLoader:
        return CombinedLoader({domain: self._loader(domain, train=True) for domain in DOMAINS}, "max_size_cycle")

    @override
    def val_dataloader(self) -> Any:
        return self._of_both("val") if self.validation else []

    @override
    def test_dataloader(self) -> Any:
        return self._of_both("test")

    @override
    def predict_dataloader(self) -> Any:
        return CombinedLoader(self._of_both("test").iterables, "sequential")

    def _of_both(self, split: str) -> CombinedLoader:
        loaders: list[BatchLoader] = [self._loader(split), self._loader(f"{split} in grey")]
        return CombinedLoader(dict(zip(DOMAINS, loaders, strict=True)), "min_size")


def degrade(images: Tensor, shrink: int) -> Tensor:
    """Return images in grey, each square of ``shrink`` by ``shrink`` pixels being its mean.

    Args:
        images: uint8 (count, height, width, 3), red, green and blue; height and width are multiples of ``shrink``.
        shrink: pixels.

    Returns:
        uint8, of the same shape: the luma of ITU-R BT.601 in each channel.

    Example:
        >>> degrade(torch.tensor([255, 0, 0, 0, 255, 0], dtype=torch.uint8).view(1, 1, 2, 3), 1).flatten()
        tensor([ 76,  76,  76, 150, 150, 150], dtype=torch.uint8)
    """
    luma = images.float() @ torch.tensor([0.299, 0.587, 0.114])
    coarse = F.avg_pool2d(luma.unsqueeze(1), shrink)
    whole = F.interpolate(coarse, scale_factor=shrink, mode="nearest").round().to(torch.uint8)
    return whole.permute(0, 2, 3, 1).expand_as(images).contiguous()
