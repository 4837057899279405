"""CIFAR-10 as a LightningDataModule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import torch
from typing_extensions import override

from tying.data.archive import Official, load_archive, prepare_archive
from tying.data.cache import Split
from tying.data.folders import holds_classes, is_packed, load_folder
from tying.data.images import Images
from tying.data.sample import CLASSES, load_sample
from tying.errors import ConfigurationError, nearest

Source = Literal["auto", "archive", "folder", "sample"]


class CIFAR10(Images):
    """CIFAR-10 in memory, cropped, flipped and normalised as whole tensors, on the training device.

    Args:
        root: where the data is: the folder of the official archive or of its extracted files, a folder of class
            folders ``{train,test}/<class>/``, or a tar or zip file of such a folder.
        source: ``"archive"``, the official data; ``"folder"``, class folders, packed or not; ``"sample"``, the
            embedded 5,000 + 1,000 images, class-balanced, from a JPEG copy. ``"auto"`` is what ``root`` holds, in
            this order; the sample where ``root`` is not given.
        batch_size: samples of a batch, per process.
        validation: share of the training images held out; see :class:`tying.data.images.Images`, also for the rest.
        labelled: keep this many labels.
        augment: random crops (4 pixels) and flips in training.
        seed: of order and augmentation.
        download: fetch the official archive if it is missing.
        classes: keep images of these classes alone.

    Raises:
        ConfigurationError: an argument out of range; when data is prepared, missing or broken data.

    Example:
        >>> data = CIFAR10(batch_size=100)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), len(data.val_dataloader()), len(data.test_dataloader())
        (45, 5, 10)

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    mean = torch.tensor([0.4914, 0.4822, 0.4465])
    std = torch.tensor([0.2470, 0.2435, 0.2616])
    pad = 4
    flip = True

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        source: Source = "auto",
        batch_size: int = 128,
        validation: float = 0.1,
        labelled: int | None = None,
        augment: bool = True,
        seed: int = 0,
        download: bool = False,
        classes: list[int] | None = None,
    ) -> None:
        super().__init__(batch_size, validation, labelled, augment, seed, classes)
        sources = get_args(Source)
        if source not in sources:
            close = nearest(source, sources)
            raise ConfigurationError(f"unknown source {source!r}: use {', '.join(map(repr, sources))}.{close}")
        if source in ("archive", "folder") and root is None:
            raise ConfigurationError(f"source={source!r} needs root: where CIFAR-10 is, or shall be")
        if download and root is None:
            raise ConfigurationError("download needs root: the folder to put CIFAR-10 in")
        self.root = None if root is None else Path(root)
        self.source = source
        self.download = download

    @override
    def prepare_data(self) -> None:
        if self._found() != "sample":
            self.load()  # downloads, extracts and decodes, in one process before all others

    @override
    def load(self) -> dict[str, Split]:
        source = self._found()
        if source == "sample":
            return load_sample()
        assert self.root is not None
        if source == "folder":
            return load_folder(self.root, CLASSES, (32, 32))
        prepare_archive(self.root, self.download)
        return load_archive(self.root)

    @property
    @override
    def description(self) -> str:
        source = self._found()
        if source == "sample":
            return "embedded sample of a JPEG copy"
        return "official archive" if source == "archive" else f"class folders in {Path(self.root or '').name}"

    def _found(self) -> str:
        """Return the source, where ``auto`` is what ``root`` holds."""
        if self.source != "auto":
            return self.source
        if self.root is None:
            return "sample"
        official = any((self.root / name).exists() for name in (Official.filename, Official.base_folder))
        if not official and (is_packed(self.root) or holds_classes(self.root)):
            return "folder"
        return "archive"
