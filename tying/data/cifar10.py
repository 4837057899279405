"""CIFAR-10, in one domain or two, as LightningDataModules."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.data.batches import Border
from tying.data.folders import PACKED, Split, find_splits, load_folder
from tying.data.images import Images, draw_balanced, spread_evenly
from tying.data.sample import CLASSES, load_sample
from tying.errors import ConfigurationError, check_choice, check_count, check_counts
from tying.extras import extra
from tying.lightning_namespace import pl

Source = Literal["auto", "archive", "folder", "sample"]
OFFICIAL = ("cifar-10-python.tar.gz", "cifar-10-batches-py")  # the archive, and the folder in it


class CIFAR10(Images):
    """CIFAR-10 in memory; whole batches are cropped, flipped and normalised on the training device.

    Args:
        root: the folder that contains the official archive or its extracted files, a folder of class folders
            ``{train,test}/<class>/``, or a tar or zip file of class folders.
        source: ``"archive"``, the official data; ``"folder"``, class folders or a file of them; ``"sample"``, the
            embedded class-balanced sample of a JPEG copy: 5,000 training and 1,000 test images. ``"auto"`` is the
            official data or the class folders, whichever ``root`` contains, and the sample without ``root``.
        batch_size: samples in a batch, per process.
        validation: fraction of the training images to hold out; see :class:`tying.data.images.Images` for details.
        labelled: number of labels to keep.
        augment: apply random crops (by up to ``pad`` pixels) and flips in training.
        seed: seed of the order and the augmentation.
        download: download the official archive if it is missing.
        classes: use only images of these classes.
        label_seed: seed of the draw of the labels to keep.
        pad: the largest shift of a random crop, in pixels.
        border: the pixels beyond an image's sides: ``"black"``; ``"reflect"``, the image mirrored.
        alternate: mirror half of the images in one epoch, and the other half in the next, instead of each with
            probability 0.5 (K. Jordan, 94 % on CIFAR-10 in 3.29 seconds on a single GPU, 2024).

    Raises:
        ConfigurationError: an argument is out of range; in ``prepare_data``, the data is missing or broken.

    Example:
        >>> data = CIFAR10(batch_size=100)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), len(data.val_dataloader()), len(data.test_dataloader())
        (45, 5, 10)

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    mean = torch.tensor([0.4914, 0.4822, 0.4465])
    std = torch.tensor([0.2470, 0.2435, 0.2616])
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
        label_seed: int = 0,
        pad: int = 4,
        border: Border = "black",
        alternate: bool = False,
    ) -> None:
        super().__init__(batch_size, validation, labelled, augment, seed, classes, label_seed)
        check_choice("border", border, get_args(Border))
        check_count("pad", pad, "[0, 31]")
        self.pad, self.border, self.alternate = pad, border, alternate
        check_choice("source", source, get_args(Source))
        if root is None and (download or source in ("archive", "folder")):
            reason = "download" if download else f"source={source!r}"
            raise ConfigurationError(f"{reason} needs root: the folder that contains CIFAR-10, or will contain it")
        self.root = None if root is None else Path(root)
        self.source = source
        self.download = download

    @override
    def prepare_data(self) -> None:
        if self._chosen_source() != "sample":
            self.load()  # Lightning calls this in one process before other processes load

    @override
    def load(self) -> dict[str, Split]:
        source = self._chosen_source()
        if source == "sample" or self.root is None:
            return load_sample()
        return (
            load_folder(self.root, CLASSES, (32, 32)) if source == "folder" else load_archive(self.root, self.download)
        )

    @property
    def description(self) -> str:  # type: ignore[override]  # an attribute of other data modules
        """The source of the images, for the log."""
        return {
            "sample": "embedded sample of a JPEG copy",
            "archive": "official archive",
            "folder": f"class folders in {Path(self.root or '').name}",
        }[self._chosen_source()]

    def _chosen_source(self) -> str:
        if self.source != "auto" or self.root is None:
            return "sample" if self.source == "auto" else self.source
        official = any((self.root / name).exists() for name in OFFICIAL)
        folder = self.root.name.lower().endswith(PACKED) or find_splits(self.root)
        return "folder" if folder and not official else "archive"


class TwoDomains(CIFAR10):
    """CIFAR-10 as two domains with the same classes: many colour images, and few grey images of a lower resolution.

    In training, an image is in one domain. In validation and testing, every image is in both domains.

    Args:
        grey: number of training images in grey, class-balanced; the choice does not depend on the seed.
        shrink: side of the squares of pixels over which grey images are averaged; it divides 32.
        root: see :class:`tying.data.CIFAR10`.
        source: see :class:`tying.data.CIFAR10`.
        batch_size: samples of each domain in a batch, per process; at most the number of images of the domain.
        validation: fraction of the training images to hold out.
        augment: apply random crops and flips in training.
        seed: seed of the order and the augmentation.
        download: download the official archive if it is missing.

    Shape: a batch is a dictionary with ``colour`` and ``grey``, each (images, labels), with images of shape
    (batch, 3, 32, 32). In training, the loader of the smaller domain restarts until the larger one ends. Prediction
    goes through the colour images first, and then through the grey ones.

    Raises:
        ConfigurationError: see CIFAR10; ``grey`` is below the number of classes, or leaves no image in colour;
            ``shrink`` does not divide 32.

    Example:
        >>> data = TwoDomains(grey=250)
        >>> data.setup("fit")
        >>> {domain: len(loader.dataset) for domain, loader in data.train_dataloader().iterables.items()}
        {'colour': 4250, 'grey': 250}
    """

    parts = ("colour", "grey")

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
        check_counts(grey=grey, shrink=shrink)
        if 32 % shrink:
            raise ConfigurationError(f"shrink must divide the images' 32 pixels, not {shrink}")
        self.grey = grey
        self.shrink = shrink

    @override
    def divide(self, images: Tensor, labels: Tensor) -> dict[str, Split]:
        chosen = draw_balanced(labels, spread_evenly(self.grey, labels, "grey"))
        if chosen.all():
            raise ConfigurationError(f"grey={self.grey} leaves no image in colour, of {len(labels)} for training")
        splits = {
            "grey": (images[chosen], labels[chosen]),
            "val in grey": self._splits["val"],
            "test in grey": self._splits["test"],
        }
        in_grey = {split: (degrade(images, self.shrink), labels) for split, (images, labels) in splits.items()}
        return {"colour": (images[~chosen], labels[~chosen])} | in_grey

    @override
    def predict_dataloader(self) -> pl.utilities.CombinedLoader:
        return pl.utilities.CombinedLoader(self._loader("test").iterables, "sequential")

    @override
    def _loader(self, split: str, train: bool = False) -> Any:
        if split not in ("val", "test"):
            return super()._loader(split, train)
        loaders = {"colour": super()._loader(split), "grey": super()._loader(f"{split} in grey")}
        return pl.utilities.CombinedLoader(loaders, "min_size")


def load_archive(root: Path, download: bool = False) -> dict[str, Split]:
    """Return uint8 images (count, 32, 32, 3) and int64 labels of the splits ``train`` and ``test``.

    Args:
        root: the folder that contains the official archive or its batch files. The archive is extracted there.
        download: download the archive if it is missing or broken.

    Raises:
        ConfigurationError: files are missing or have the wrong md5, and cannot be extracted or downloaded; or
            torchvision is not installed.
    """
    with extra("vision"):
        from torchvision.datasets import CIFAR10 as Official
        from torchvision.datasets.utils import check_integrity
    packed, folder = (root / name for name in OFFICIAL)
    broken = [
        name
        for name, md5 in (*Official.train_list, *Official.test_list, (Official.meta["filename"], Official.meta["md5"]))
        if not check_integrity(str(folder / name), md5)
    ]
    if broken and not packed.exists():
        if folder.exists():
            raise ConfigurationError(
                f"CIFAR-10 under {folder} is incomplete or corrupted ({', '.join(broken)}). Put {packed.name} beside "
                "it, or remove the folder and set download: true, or set source: sample"
            )
        if not download:
            raise ConfigurationError(
                f"no CIFAR-10 under {root}: expected {packed.name} or {folder.name}/ there. Set "
                "download: true to fetch it, root to where it is, or source: sample for the embedded images"
            )
    elif broken and not (download or check_integrity(str(packed), Official.tgz_md5)):
        raise ConfigurationError(
            f"{packed} is truncated or corrupted: its md5 is not {Official.tgz_md5}. Set download: true, "
            "or copy it again"
        )
    try:
        splits = {part: Official(str(root), part == "train", download=bool(broken)) for part in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"CIFAR-10 could not be downloaded from {Official.url} to {root}, or extracted there: {error}. Copy "
            f"{packed.name} to {root} by hand, or set source: sample"
        ) from None
    return {split: (torch.from_numpy(data.data), torch.tensor(data.targets)) for split, data in splits.items()}


def degrade(images: Tensor, shrink: int) -> Tensor:
    """Convert images to grey, and average over squares of ``shrink × shrink`` pixels.

    Args:
        images: uint8 (count, height, width, 3) in RGB; height and width are multiples of ``shrink``.
        shrink: side of a square, in pixels.

    Returns:
        uint8, of the same shape: the luma of ITU-R BT.601, repeated in each channel.

    Example:
        >>> degrade(torch.tensor([255, 0, 0, 0, 255, 0], dtype=torch.uint8).view(1, 1, 2, 3), 1).flatten()
        tensor([ 76,  76,  76, 150, 150, 150], dtype=torch.uint8)
    """
    luma = (images.float() @ torch.tensor([0.299, 0.587, 0.114])).unsqueeze(1)
    grey = F.interpolate(F.avg_pool2d(luma, shrink), scale_factor=shrink, mode="nearest")
    return grey.round().to(torch.uint8).permute(0, 2, 3, 1).expand_as(images).contiguous()
