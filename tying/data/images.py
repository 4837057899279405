"""The base class of data modules with images in memory."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tying.data.batches import BatchLoader, Border, RawBatch, augment, normalize
from tying.data.folders import Split
from tying.data.resuming import ResumableData
from tying.errors import ConfigurationError, check_count, check_range, listed
from tying.lightning_namespace import pl


class Images(ResumableData):
    """Images held in memory as uint8; whole batches are augmented and normalised on the training device.

    A subclass defines ``load``, which returns the splits ``train`` and ``test``.

    Args:
        batch_size: samples in a batch, per process.
        validation: fraction of the training images to hold out, class-balanced; the choice does not depend on the
            seed. 0 holds out none.
        labelled: number of labels to keep, class-balanced; ``label_seed`` draws which, ``seed`` does not. Training
            batches are then dictionaries with ``labelled`` and ``unlabelled``, whose labels are −1. The loader of the
            smaller part restarts until the larger one ends.
        augment: apply random crops, and flips if ``flip`` is set, in training.
        seed: seed of the order and the augmentation.
        classes: use only images of these classes, and relabel them by their positions in this list.
        label_seed: seed of the draw of the labels to keep.

    Attributes:
        mean: mean of each channel, for pixels scaled to [0, 1]; (channels,).
        std: standard deviation of each channel, for pixels scaled to [0, 1]; (channels,).
        pad: the largest shift of a random crop, in pixels.
        border: the pixels beyond an image's sides, see :func:`tying.data.batches.augment`.
        flip: whether to mirror images at random.
        alternate: whether to mirror half of them in one epoch, and the other half in the next.
        description: the source of the images, for the log.
        parts: names of the splits that each training batch combines, if :meth:`divide` returns them.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    mean: Tensor
    std: Tensor
    pad: int
    flip: bool
    border: Border = "black"
    alternate: bool = False
    description: str
    parts = ("labelled", "unlabelled")

    def __init__(
        self,
        batch_size: int,
        validation: float,
        labelled: int | None,
        augment: bool,
        seed: int,
        classes: Sequence[int] | None = None,
        label_seed: int = 0,
    ) -> None:
        super().__init__()
        if classes is not None and (not classes or len({*classes}) < len(classes)):
            raise ConfigurationError(f"classes must be distinct labels, at least one, not {list(classes)}")
        check_range("validation", validation, "[0, 1)")
        check_count("batch_size", batch_size, "[1, inf)")
        check_count("seed", seed, "(-inf, inf)")
        check_count("label_seed", label_seed, "[0, inf)")
        self.batch_size = batch_size
        self.validation = validation
        self.labelled = labelled
        self.augment = augment
        self.seed = seed
        self.classes = classes
        self.label_seed = label_seed
        self._splits: dict[str, Split] = {}

    def load(self) -> dict[str, Split]:
        """Return the splits ``train`` and ``test``."""
        raise NotImplementedError(f"{type(self).__name__} must define load(), which returns the splits train and test")

    def divide(self, images: Tensor, labels: Tensor) -> dict[str, Split]:
        """Return the splits named in ``parts``, cut from the training images, and any further splits."""
        if self.labelled is None:
            return {}
        chosen = draw_balanced(labels, spread_evenly(self.labelled, labels, "labelled"), self.label_seed)
        return {
            "labelled": (images[chosen], labels[chosen]),
            "unlabelled": (images[~chosen], torch.full_like(labels[~chosen], -1)),
        }

    @override
    def setup(self, stage: str) -> None:
        if self._splits:
            return
        loaded = {split: self._select_classes(*part) for split, part in self.load().items()}
        checksum = 0
        for images, labels in loaded.values():
            checksum = zlib.crc32(labels.numpy().data, zlib.crc32(images.contiguous().numpy().data, checksum))
        self.key = f"{checksum:08x}"
        images, labels = loaded["train"]
        held_out = draw_balanced(labels, [round(self.validation * count) for count in labels.bincount().tolist()])
        self._splits = {
            "fit": (images[~held_out], labels[~held_out]),
            "val": (images[held_out], labels[held_out]),
            "test": loaded["test"],
        }
        self._splits |= self.divide(*self._splits["fit"])
        counts = ", ".join(f"{len(part)} {split}" for split, (_, part) in self._splits.items())
        place = f" at {root}" if (root := getattr(self, "root", None)) else ""
        pl.utilities.rank_zero_info(f"{type(self).__name__}: {self.description}{place} ({counts})")

    def _select_classes(self, images: Tensor, labels: Tensor) -> Split:
        if self.classes is None:
            return images, labels
        if missing := {*self.classes} - {*labels.tolist()}:
            raise ConfigurationError(f"classes: there is no image of {listed(map(str, sorted(missing)))}")
        match = labels[:, None] == torch.tensor(self.classes)
        chosen = match.any(dim=1)
        return images[chosen], match[chosen].long().argmax(dim=1)

    @override
    def train_dataloader(self) -> Any:
        if self.parts[0] not in self._splits:
            return super().train_dataloader()
        loaders = {part: self._loader(part, train=True) for part in self.parts}
        return pl.utilities.CombinedLoader(
            {part: loader for part, loader in loaders.items() if len(loader)}, "max_size_cycle"
        )

    @override
    def val_dataloader(self) -> Any:
        return self._loader("val") if self.validation else []

    @override
    def make_loader(self, split: str, train: bool, rank: int, world: int) -> BatchLoader:
        images, labels = self._splits[split]
        if split == "fit" and len(labels) < self.batch_size * world:
            raise ConfigurationError(f"batch_size={self.batch_size} is more than the {len(labels)} training images")
        return BatchLoader(
            images,
            labels,
            min(self.batch_size, max(1, len(labels) // world)) if train else self.batch_size,
            train=train,
            augment=self.augment,
            pad=self.pad,
            flip=self.flip,
            alternate=self.alternate,
            seed=self.seed,
            same=bool(getattr(self.trainer, "overfit_batches", 0)),
            rank=rank,
            world=world,
        )

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict):
            return {part: self.on_after_batch_transfer(raw, dataloader_idx) for part, raw in batch.items()}
        if not isinstance(batch, RawBatch):
            return batch
        images, labels, offsets, flips = batch
        if offsets is not None and flips is not None:
            images = augment(images, offsets, flips, self.pad, self.border)
        images = normalize(images, self.mean, self.std)
        if self.trainer:  # Lightning's conversion to its precision skipped the images, which were integers
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels


def draw_balanced(labels: Tensor, per_class: list[int], seed: int = 0) -> Tensor:
    """Return a mask of ``per_class[k]`` random samples of each class k.

    Example:
        >>> draw_balanced(torch.tensor([0, 0, 1, 1]), [1, 2]).sum().item()
        3
    """
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for kind, count in enumerate(per_class):
        members = (labels == kind).nonzero().flatten()
        drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return drawn


def spread_evenly(total: int, labels: Tensor, name: str) -> list[int]:
    """Return the number of samples to draw from each class; the numbers differ by at most one.

    Args:
        total: number of samples to draw, at least one for each class.
        labels: labels of all samples.
        name: name of the argument that gives the total, for errors.

    Raises:
        ConfigurationError: the total is too small, or a class has too few samples.

    Example:
        >>> spread_evenly(3, torch.tensor([0, 0, 1, 1]), "labelled")
        [2, 1]
    """
    counts = labels.bincount().tolist()
    if not hasattr(total, "__index__") or not len(counts) <= total <= len(labels):
        raise ConfigurationError(
            f"{name} must be an integer from {len(counts)} (one for each class) to {len(labels)} (all training "
            f"labels), not {total!r}"
        )
    per_class = [total // len(counts) + (kind < total % len(counts)) for kind in range(len(counts))]
    if short := [kind for kind, count in enumerate(counts) if per_class[kind] > count]:
        raise ConfigurationError(
            f"{name}={total} takes {per_class[short[0]]} of class {short[0]}, which has {counts[short[0]]}"
        )
    return per_class
