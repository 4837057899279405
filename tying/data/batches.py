"""Batches of images held in memory, cropped and flipped as whole tensors.

Order and augmentation are functions of (seed, epoch, batch index) alone, whatever the device or number of processes.
"""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tying.data.resuming import ResumableLoader


class RawBatch(NamedTuple):
    """A batch before augmentation, small to move to a device.

    Attributes:
        images: uint8 (batch, height, width, channels).
        labels: int64 (batch,).
        offsets: int64 (batch, 2): top and left of each crop in the padded image; ``None`` leaves images as they are.
        flips: bool (batch,): which images to mirror; ``None`` together with the offsets.
    """

    images: Tensor
    labels: Tensor
    offsets: Tensor | None = None
    flips: Tensor | None = None


def augment(images: Tensor, offsets: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Return each image shifted and perhaps mirrored: a crop of the image padded with ``pad`` black pixels.

    Args:
        images: (batch, height, width, channels), any dtype.
        offsets: (batch, 2) integers from 0 to 2·pad: top and left of the crop; ``pad`` leaves the image in place.
        flips: (batch,) bool: mirror left to right.
        pad: pixels added on every side.

    Example:
        >>> image = torch.tensor([1, 2, 3, 4]).view(1, 2, 2, 1)
        >>> augment(image, torch.tensor([[1, 0]]), torch.tensor([True]), pad=1).flatten()
        tensor([1, 0, 3, 0])
    """
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    tall, wide = height + 2 * pad, width + 2 * pad
    across = torch.arange(width, device=images.device)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    samples = torch.arange(count, device=images.device)[:, None, None] * tall
    pixels = (samples + rows[:, :, None]) * wide + columns[:, None, :]  # indices into the flattened padded batch
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return float images with zero mean and unit deviation in each channel.

    Args:
        images: uint8 (batch, height, width, channels).
        mean: (channels,), of pixels scaled to [0, 1].
        std: (channels,), likewise.

    Returns:
        float32 (batch, channels, height, width), contiguous.
    """
    pixels = images.permute(0, 3, 1, 2).contiguous().float()
    mean, std = (values.to(pixels).view(1, -1, 1, 1) for values in (mean, std))
    return pixels.mul_(1 / (255 * std)).sub_(mean / std)


@dataclass(eq=False, repr=False)
class BatchLoader(ResumableLoader):
    """Iterate over images in memory, a raw batch at a time.

    Several processes share each batch of ``world × batch_size`` samples, so that they see jointly what one process
    sees with the larger batch. A loader that is restarted within an epoch takes another order. A training run resumes
    with the very batch at which it was interrupted.

    Args:
        images: uint8 (count, height, width, channels).
        labels: int64 (count,).
        batch_size: samples of a batch, per process.
        train: shuffle, augment and drop an incomplete last batch; or yield all images in order, unchanged.
        augment: crop and flip when training.
        pad: the largest shift of a crop, in pixels.
        flip: mirror every second image, on average, when augmenting.
        seed: of order and augmentation.
        same: give every epoch the order and augmentation of the first.
        rank: this process, of ``world``.
        world: number of processes.

    Attributes:
        dataset: the labels, whose length is that of the data.

    Example:
        >>> loader = BatchLoader(torch.zeros(10, 2, 2, 1, dtype=torch.uint8), torch.arange(10), 4, train=False)
        >>> [batch.labels.tolist() for batch in loader]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    _: KW_ONLY
    train: bool
    augment: bool = True
    pad: int = 4
    flip: bool = True
    seed: int = 0
    same: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.dataset = self.labels
        self._joint = self.world * self.batch_size

    def __len__(self) -> int:
        return len(self.labels) // self._joint if self.train else math.ceil(len(self.labels) / self._joint)

    def __iter__(self) -> Iterator[RawBatch]:
        key = (self.seed, 0, 0) if self.same else (self.seed, self._place["epoch"], self._place["cycle"])
        order = torch.arange(len(self.labels))
        if self.train:
            order = torch.randperm(len(self.labels), generator=_generator(*key))
        for index in self._numbers(len(self)):
            chosen = order[index * self._joint : (index + 1) * self._joint]
            part = slice(self.rank * len(chosen) // self.world, (self.rank + 1) * len(chosen) // self.world)
            if part.start == part.stop:  # fewer samples are left than there are processes
                continue
            batch = RawBatch(self.images.index_select(0, chosen[part]), self.labels[chosen[part]])
            if self.augment and self.train:
                generator = _generator(*key, index)
                offsets = torch.randint(2 * self.pad + 1, (len(chosen), 2), generator=generator)
                chances = torch.rand(len(chosen), generator=generator) if self.flip else torch.ones(len(chosen))
                batch = batch._replace(offsets=offsets[part], flips=chances[part] < 0.5)
            yield batch


def _generator(*key: int) -> torch.Generator:
    """Return a generator that depends on all numbers of ``key``, and shares no stream with another key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)
