"""What the data modules of small images have in common."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch import Tensor
from typing_extensions import override

from tying.data.batches import BatchLoader, RawBatch, normalize
from tying.data.cache import Split
from tying.errors import ConfigurationError, listed

UNLABELLED = -1


class Images(pl.LightningDataModule):
    """Images held in memory as uint8; augmented and normalised as whole tensors, on the training device.

    Subclasses say where images come from: ``load`` returns the splits ``train`` and ``test``.

    Args:
        batch_size: samples of a batch, per process.
        validation: share of the training images held out, class-balanced and always the same ones; 0 for none.
        labelled: keep this many labels, class-balanced and the same whatever else is set. Training batches are then
            dictionaries: ``labelled``, and ``unlabelled`` with −1 for every label, one as often started over as the
            other needs.
        augment: random crops, and flips where a mirrored image is as good, in training.
        seed: of order and augmentation.
        classes: keep images of these classes alone, whose labels are then their places in this list.

    Attributes:
        key: stands for the content, once it is set up: the same wherever it lies, and in whatever form.

    Raises:
        ConfigurationError: an argument out of range.
    """

    mean: Tensor
    std: Tensor
    pad: int
    flip: bool

    def __init__(
        self,
        batch_size: int,
        validation: float,
        labelled: int | None,
        augment: bool,
        seed: int,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if classes is not None and (not classes or len({*classes}) < len(classes)):
            raise ConfigurationError(f"classes are distinct labels, one at least, not {list(classes)}")
        if not 0 <= validation < 1:
            raise ConfigurationError(
                f"validation is a share of all training images, at least 0 and below 1, not {validation}"
            )
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be 1 or more, not {batch_size}")
        self.batch_size = batch_size
        self.validation = validation
        self.labelled = labelled
        self.augment = augment
        self.seed = seed
        self.classes = None if classes is None else list(classes)
        self.key = ""
        self._splits: dict[str, Split] = {}
        self._training: dict[str, BatchLoader] = {}  # by split
        self._places: dict[str, dict[str, int]] = {}  # where they shall go on

    def load(self) -> dict[str, Split]:
        """Return the splits ``train`` and ``test``."""
        raise NotImplementedError

    def divide(self, images: Tensor, labels: Tensor) -> dict[str, Split]:
        """Return the parts of the training images that batches keep apart, and whatever else is made of the splits."""
        if self.labelled is None:
            return {}
        kept = draw_balanced(labels, spread_evenly(self.labelled, labels, "labelled"))
        return {
            "labelled": (images[kept], labels[kept]),
            "unlabelled": (images[~kept], torch.full_like(labels[~kept], UNLABELLED)),
        }

    @property
    def description(self) -> str:
        """Which data this is, in words."""
        raise NotImplementedError

    @override
    def setup(self, stage: str) -> None:
        if self._splits:
            return
        loaded = {split: self._of_classes(*part) for split, part in self.load().items()}
        self.key = _key(loaded)
        images, labels = loaded["train"]
        per_class = [round(self.validation * count) for count in labels.bincount().tolist()]
        held_out = draw_balanced(labels, per_class)
        fit = images[~held_out], labels[~held_out]
        self._splits = {"fit": fit, "val": (images[held_out], labels[held_out]), "test": loaded["test"]}
        self._splits |= self.divide(*fit)
        counts = ", ".join(f"{len(part)} {split}" for split, (_, part) in self._splits.items())
        root = getattr(self, "root", None)
        place = "" if root is None else f" at {root}"
        rank_zero_info(f"{type(self).__name__}: {self.description}{place} ({counts})")

    def _of_classes(self, images: Tensor, labels: Tensor) -> Split:
        if self.classes is None:
            return images, labels
        if missing := {*self.classes} - {*torch.unique(labels).tolist()}:
            raise ConfigurationError(f"classes: there is no image of {listed(map(str, sorted(missing)))}")
        match = labels[:, None] == torch.tensor(self.classes)
        kept = match.any(dim=1)
        return images[kept], match[kept].long().argmax(dim=1)

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning keeps the state of stateful loaders too, but forgets to restore it where the number of steps was
        # asked for (`estimated_stepping_batches`) before training started
        return {split: loader.state_dict() for split, loader in self._training.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._places = dict(state_dict)

    @override
    def train_dataloader(self) -> BatchLoader | CombinedLoader:
        if self.labelled is None:
            return self._loader("fit", train=True)
        parts = {split: self._loader(split, train=True) for split in ("labelled", "unlabelled")}
        return CombinedLoader({split: loader for split, loader in parts.items() if len(loader)}, "max_size_cycle")

    @override
    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        return self._loader("val") if self.validation else []

    @override
    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> BatchLoader:
        return self._loader("test")

    def _loader(self, split: str, train: bool = False) -> BatchLoader:
        images, labels = self._splits[split]
        world = self.trainer.world_size if self.trainer else 1
        if split == "fit" and len(labels) < self.batch_size * world:
            raise ConfigurationError(f"batch_size={self.batch_size} is more than the {len(labels)} training images")
        loader = BatchLoader(
            images,
            labels,
            min(self.batch_size, max(1, len(labels) // world)) if train else self.batch_size,
            train=train,
            augment=self.augment,
            pad=self.pad,
            flip=self.flip,
            seed=self.seed,
            same=bool(getattr(self.trainer, "overfit_batches", 0)),
            rank=self.trainer.global_rank if self.trainer else 0,
            world=world,
        )
        if train:
            self._training[split] = loader
            if split in self._places:
                loader.load_state_dict(self._places.pop(split))
        return loader

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict):
            return {part: self.on_after_batch_transfer(content, dataloader_idx) for part, content in batch.items()}
        if not isinstance(batch, RawBatch):
            return batch
        images = normalize(batch.augmented(self.pad), self.mean, self.std)
        if self.trainer:  # Lightning has converted what it saw: integers
            images = self.trainer.precision_plugin.convert_input(images)
        return images, batch.labels


def _key(splits: dict[str, Split]) -> str:
    checksum = 0
    for images, labels in splits.values():
        checksum = zlib.crc32(labels.numpy().data, zlib.crc32(images.contiguous().numpy().data, checksum))
    return f"{checksum:08x}"


def draw_balanced(labels: Tensor, per_class: list[int]) -> Tensor:
    """Return a mask of ``per_class[k]`` samples of each class k, drawn once and for all.

    Example:
        >>> draw_balanced(torch.tensor([0, 0, 1, 1]), [1, 2]).sum().item()
        3
    """
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for kind, count in enumerate(per_class):
        members = (labels == kind).nonzero().flatten()
        drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return drawn


def spread_evenly(total: int, labels: Tensor, name: str) -> list[int]:
    """Return how many samples of each class make up a total, as equal as can be.

    Args:
        total: number of samples.
        labels: of all samples there are.
        name: of the total, for errors.

    Raises:
        ConfigurationError: there are too few samples, or too few are asked for.

    Example:
        >>> spread_evenly(3, torch.tensor([0, 0, 1, 1]), "labelled")
        [2, 1]
    """
    counts = labels.bincount().tolist()
    if not len(counts) <= total <= len(labels):
        raise ConfigurationError(
            f"{name} must be from {len(counts)} (one a class) to {len(labels)} (all training labels), not {total}"
        )
    per_class = [total // len(counts) + (kind < total % len(counts)) for kind in range(len(counts))]
    if short := [kind for kind, count in enumerate(counts) if per_class[kind] > count]:
        raise ConfigurationError(
            f"{name}={total} takes {per_class[short[0]]} of class {short[0]}, which has {counts[short[0]]}"
        )
    return per_class
