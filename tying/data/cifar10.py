"""CIFAR-10 as a LightningDataModule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tying.data.archive import load_archive, prepare_archive
from tying.data.batches import BatchLoader, RawBatch, augment, normalize
from tying.data.sample import load_sample
from tying.errors import ConfigurationError, nearest

SOURCES = ("auto", "archive", "sample")
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
STD = torch.tensor([0.2470, 0.2435, 0.2616])


class CIFAR10(pl.LightningDataModule):
    """CIFAR-10 in memory, cropped, flipped and normalised as whole tensors, on the training device.

    Args:
        root: folder of the official archive or of its extracted files.
        source: ``"archive"`` is the official data under ``root``; ``"sample"`` the embedded 5,000 + 1,000 images,
            class-balanced, from a JPEG copy; ``"auto"`` the archive where ``root`` is given, else the sample.
        batch_size: samples of a batch, per process.
        validation: share of the training images held out, class-balanced and always the same ones; 0 for none.
        augment: random crops (4 pixels) and flips in training.
        seed: of order and augmentation.
        download: fetch the official archive if it is missing.

    Raises:
        ConfigurationError: an argument out of range; when data is prepared, a missing or broken archive.

    Example:
        >>> data = CIFAR10(batch_size=100)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), len(data.val_dataloader()), len(data.test_dataloader())
        (45, 5, 10)

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    pad = 4

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        source: Literal["auto", "archive", "sample"] = "auto",
        batch_size: int = 128,
        validation: float = 0.1,
        augment: bool = True,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            close = nearest(source, SOURCES)
            raise ConfigurationError(f"unknown source {source!r}: use {', '.join(map(repr, SOURCES))}.{close}")
        if source == "archive" and root is None:
            raise ConfigurationError("source='archive' needs root: the folder that holds, or shall hold, CIFAR-10")
        if not 0 <= validation < 1:
            raise ConfigurationError(
                f"validation is a share of the training images, from 0 to below 1, not {validation}"
            )
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be 1 or more, not {batch_size}")
        self.root = None if root is None else Path(root)
        self.source = source if source != "auto" else "sample" if root is None else "archive"
        self.batch_size = batch_size
        self.validation = validation
        self.augment = augment
        self.seed = seed
        self.download = download
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}

    @override
    def prepare_data(self) -> None:
        if self.source == "archive":
            assert self.root is not None
            prepare_archive(self.root, self.download)

    @override
    def setup(self, stage: str) -> None:
        if self._splits:
            return
        if self.source == "archive":
            assert self.root is not None
            prepare_archive(self.root)
            loaded = load_archive(self.root)
        else:
            loaded = load_sample()
        images, labels = loaded["train"]
        held_out = _held_out(labels, self.validation)
        self._splits = {
            "fit": (images[~held_out], labels[~held_out]),
            "val": (images[held_out], labels[held_out]),
            "test": loaded["test"],
        }
        counts = ", ".join(f"{len(part)} {split}" for split, (_, part) in self._splits.items())
        rank_zero_info(f"CIFAR10: {self.description} ({counts})")

    @property
    def description(self) -> str:
        """Which data this is, in words."""
        return "embedded sample of a JPEG copy" if self.source == "sample" else f"official archive under {self.root}"

    @override
    def train_dataloader(self) -> BatchLoader:
        return self._loader("fit")

    @override
    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        return self._loader("val") if self.validation else []

    @override
    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> BatchLoader:
        return self._loader("test")

    def _loader(self, split: str) -> BatchLoader:
        images, labels = self._splits[split]
        return BatchLoader(
            images,
            labels,
            self.batch_size,
            train=split == "fit",
            augment=self.augment,
            pad=self.pad,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
        )

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, RawBatch):
            return batch
        images = augment(batch.images, batch.offsets, batch.flips, self.pad)
        return normalize(images, MEAN, STD), batch.labels


def _held_out(labels: Tensor, share: float) -> Tensor:
    """Return a mask of ``share`` of the samples of each class, drawn once and for all."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for kind in torch.unique(labels):
        members = (labels == kind).nonzero().flatten()
        drawn = torch.randperm(len(members), generator=generator)[: round(share * len(members))]
        held_out[members[drawn]] = True
    return held_out
