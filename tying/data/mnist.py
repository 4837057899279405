"""MNIST as a LightningDataModule."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import MNIST as Official
from typing_extensions import override

from tying.data.cache import Split
from tying.data.images import Images
from tying.errors import ConfigurationError

FILES = {"train": "train", "test": "t10k"}
LARGEST = 2**28  # bytes: five times those of all images


class MNIST(Images):
    """MNIST in memory, from its idx files in torchvision's layout, compressed or not.

    Args:
        root: the folder that holds ``MNIST/raw/``.
        batch_size: samples of a batch, per process.
        validation: share of the training images held out; see :class:`tying.data.images.Images`, also for the rest.
        labelled: keep this many labels.
        augment: random crops (2 pixels) in training; never flips.
        seed: of order and augmentation.
        download: fetch the files if they are missing.
        classes: keep images of these classes alone.

    Raises:
        ConfigurationError: an argument out of range; when data is prepared, missing or broken files.

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition,
    1998.
    """

    mean = torch.tensor([0.1307])
    std = torch.tensor([0.3081])
    pad = 2
    flip = False

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
    ) -> None:
        super().__init__(batch_size, validation, labelled, augment, seed, classes)
        self.root = Path(root)
        self.download = download

    @override
    def prepare_data(self) -> None:
        raw = self.root / "MNIST" / "raw"
        if self.download and not all(_found(raw / name) for prefix in FILES.values() for name in _names(prefix)):
            try:
                Official(str(self.root), download=True)
            except (OSError, RuntimeError) as error:
                raise ConfigurationError(f"MNIST could not be downloaded to {self.root}: {error}") from None

    @override
    def load(self) -> dict[str, Split]:
        raw = self.root / "MNIST" / "raw"
        splits: dict[str, Split] = {}
        for split, prefix in FILES.items():
            images, labels = (read_idx(raw / name) for name in _names(prefix))
            if len(images) != len(labels):
                raise ConfigurationError(f"MNIST in {raw}: {split} has {len(images)} images but {len(labels)} labels")
            if images.shape[1:] != (28, 28):
                raise ConfigurationError(f"MNIST in {raw}: {split} has images of {tuple(images.shape[1:])}")
            splits[split] = images.unsqueeze(-1), labels.long()
        return splits

    @property
    @override
    def description(self) -> str:
        return "idx files"


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor of an idx file, ``path`` itself or ``path`` + ``.gz``.

    The format is two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as four bytes, the
    largest first, and then the entries.

    Raises:
        ConfigurationError: the file is missing, truncated, corrupted or of another kind.
    """
    found = _found(path)
    if found is None:
        raise ConfigurationError(
            f"no {path.name} or {path.name}.gz in {path.parent}. Set root to the folder that holds MNIST/raw, or "
            "download: true to fetch it"
        )
    try:
        with found.open("rb") if found == path else gzip.open(found) as stream:
            head = stream.read(4)
            if len(head) < 4:
                raise EOFError("it ends within its head")
            if head[:3] != b"\0\0\x08":
                raise ConfigurationError(f"{found} is not an idx file of unsigned bytes")
            shape = [int.from_bytes(stream.read(4), "big") for _ in range(head[3])]
            count, told = math.prod(shape), "×".join(map(str, shape))
            if not 0 < count <= LARGEST:
                raise ConfigurationError(f"{found} has {told} entries: from 1 to {LARGEST:,} are read")
            content = stream.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{found} is truncated or corrupted: {error}") from None
    if len(content) != count:
        there = f"{len(content):,}" if len(content) < count else f"more than {count:,}"
        raise ConfigurationError(f"{found} is truncated or corrupted: {there} bytes, not {count:,} entries for {told}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def _names(prefix: str) -> tuple[str, str]:
    """Return the names of the files of a split's images and labels."""
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _found(path: Path) -> Path | None:
    """Return the file itself, or packed, where there is one."""
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.exists()), None)
