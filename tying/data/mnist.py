"""MNIST, as images or as sequences of pixels, as LightningDataModules."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.data.folders import Split
from tying.data.images import Images
from tying.errors import ConfigurationError, check_counts
from tying.extras import extra

FILES = {
    split: (f"MNIST/raw/{prefix}-images-idx3-ubyte", f"MNIST/raw/{prefix}-labels-idx1-ubyte")
    for split, prefix in {"train": "train", "test": "t10k"}.items()
}
LARGEST = 2**28  # bytes: more than five times the size of all images


class MNIST(Images):
    """MNIST in memory, from the idx files in torchvision's folder layout, compressed or not.

    Args:
        root: the folder that contains ``MNIST/raw/``.
        batch_size: samples in a batch, per process.
        validation: fraction of the training images to hold out; see :class:`tying.data.images.Images` for details.
        labelled: number of labels to keep.
        augment: apply random crops (by up to 2 pixels) in training; images are never flipped.
        seed: seed of the order and the augmentation.
        download: download the files if they are missing.
        classes: use only images of these classes.
        label_seed: seed of the draw of the labels to keep.

    Raises:
        ConfigurationError: an argument is out of range; in ``prepare_data`` and ``setup``, a file is missing or broken.

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition,
    1998.
    """

    mean = torch.tensor([0.1307])
    std = torch.tensor([0.3081])
    pad = 2
    flip = False
    description = "idx files"

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int = 128,
        validation: float = 0.1,
        labelled: int | None = None,
        augment: bool = False,
        seed: int = 0,
        download: bool = False,
        classes: list[int] | None = None,
        label_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, validation, labelled, augment, seed, classes, label_seed)
        self.root = Path(root)
        self.download = download

    @override
    def prepare_data(self) -> None:
        if self.download and not all(_existing(self.root / name) for names in FILES.values() for name in names):
            with extra("vision"):
                from torchvision.datasets import MNIST as Official
            try:
                Official(str(self.root), download=True)
            except (OSError, RuntimeError) as error:
                raise ConfigurationError(f"MNIST could not be downloaded to {self.root}: {error}") from None

    @override
    def load(self) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        for split, names in FILES.items():
            images, labels = (read_idx(self.root / name) for name in names)
            if len(images) != len(labels):
                raise ConfigurationError(f"{self.root}: {split} has {len(images)} images but {len(labels)} labels")
            if images.shape[1:] != (28, 28):
                raise ConfigurationError(
                    f"{self.root}: {split} has images of {tuple(images.shape[1:])} pixels, not (28, 28)"
                )
            splits[split] = images.unsqueeze(-1), labels.long()
        return splits


class SequentialMNIST(MNIST):
    """MNIST as sequences of pixels, row by row or in a random order, which is the same for all images.

    Args:
        root: the folder that contains ``MNIST/raw/``.
        permuted: read the pixels in a random order.
        shrink: side of the squares of pixels that are averaged to shorten the sequences; it divides 28.
        permutation_seed: seed of the random order.
        batch_size: see :class:`tying.data.MNIST`.
        validation: fraction of the training images to hold out.
        seed: seed of the order of the images.
        download: download the files if they are missing.

    Shape: batches of sequences (batch, (28 / shrink)², 1) and labels (batch,).

    Raises:
        ConfigurationError: see MNIST; ``shrink`` does not divide 28.

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
        check_counts(shrink=shrink)
        if 28 % shrink:
            raise ConfigurationError(f"shrink must divide the images' 28 pixels, not {shrink}")
        self.shrink = shrink
        steps = (28 // shrink) ** 2
        generator = torch.Generator().manual_seed(permutation_seed)
        self.order = torch.randperm(steps, generator=generator) if permuted else torch.arange(steps)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return pixels_in_order(images, self.order, self.shrink), labels


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor in an idx file, ``path`` or ``path`` + ``.gz``.

    The file begins with two zero bytes, the byte 8 for uint8 entries, one byte for the number of dimensions, and four
    bytes for each dimension, in big-endian order. The entries follow. Only these are unpacked.

    Raises:
        ConfigurationError: the file is missing, truncated or corrupted, or is not an idx file of uint8 entries.
    """
    existing = _existing(path)
    if existing is None:
        raise ConfigurationError(
            f"no {path.name} or {path.name}.gz in {path.parent}. Set root to the folder that contains MNIST/raw, or "
            "download: true"
        )
    try:
        with existing.open("rb") if existing == path else gzip.open(existing) as stream:
            head = stream.read(4)
            if head[:3] != b"\0\0\x08" or len(head) < 4:
                raise ConfigurationError(f"{existing} is not an idx file of unsigned bytes")
            shape = [int.from_bytes(stream.read(4), "big") for _ in range(head[3])]
            count, sizes = math.prod(shape), "×".join(map(str, shape))
            if not 0 < count <= LARGEST:
                raise ConfigurationError(f"{existing} has {sizes} entries, and must have 1 to {LARGEST:,}")
            content = stream.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{existing} is truncated or corrupted: {error}") from None
    if len(content) != count:
        size = f"{len(content):,}" if len(content) < count else f"more than {count:,}"
        raise ConfigurationError(
            f"{existing} is truncated or corrupted: {size} bytes, not {count:,} entries for {sizes}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def _existing(path: Path) -> Path | None:
    """Return the path of the file or, if it does not exist, of the compressed file; ``None`` if both are missing."""
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.exists()), None)


def pixels_in_order(images: Tensor, order: Tensor, shrink: int = 1) -> Tensor:
    """Return images as sequences of their pixels.

    Args:
        images: (batch, 1, height, width).
        order: index of the pixel at each step, in row-major order; (height · width / shrink²,).
        shrink: side of the squares of pixels to average first.

    Returns:
        (batch, steps, 1).

    Example:
        >>> pixels_in_order(torch.arange(4.0).view(1, 1, 2, 2), torch.tensor([3, 0, 1, 2])).flatten().tolist()
        [3.0, 0.0, 1.0, 2.0]
    """
    pooled = nn.functional.avg_pool2d(images, shrink) if shrink > 1 else images
    return pooled.flatten(1).index_select(1, order.to(images.device)).unsqueeze(2)
