"""The official CIFAR-10 archive, as torchvision reads it."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import torch
import torchvision
from torchvision.datasets.utils import check_integrity, download_url

from tying.data.cache import Split
from tying.errors import ConfigurationError

Official = torchvision.datasets.CIFAR10


def prepare_archive(root: Path, download: bool = False) -> None:
    """Make sure that ``root`` holds the official batch files, whole: found, extracted, or downloaded on request.

    Every file is checked by its md5. Files are extracted and downloaded aside and then renamed, so that an
    interruption leaves nothing half-written under the final name.

    Raises:
        ConfigurationError: nothing is there and ``download`` is false, or what is there is broken.
    """
    try:
        _prepare(root, download)
    except OSError as error:
        raise ConfigurationError(f"CIFAR-10 could not be put under {root}: {error}") from None


def _prepare(root: Path, download: bool) -> None:
    folder, packed = root / Official.base_folder, root / Official.filename
    broken = [name for name, md5 in _checksums() if not check_integrity(str(folder / name), md5)]
    if not broken:
        return
    if not packed.exists() and folder.exists():
        raise ConfigurationError(
            f"CIFAR-10 under {folder} is incomplete or corrupted ({', '.join(broken)}). Put {Official.filename} beside "
            "it, or remove the folder and set download: true, or set source: sample"
        )
    if not packed.exists():
        if not download:
            raise ConfigurationError(
                f"no CIFAR-10 under {root}: expected {Official.filename} or {Official.base_folder}/ there. Set "
                "download: true to fetch it, root to where it is, or source: sample for the embedded images"
            )
        _download(packed)
    if not check_integrity(str(packed), Official.tgz_md5):
        raise ConfigurationError(
            f"{packed} is truncated or corrupted: its md5 is not {Official.tgz_md5}. Remove it and set download: true, "
            "or copy it again"
        )
    with tempfile.TemporaryDirectory(dir=root) as aside:
        with tarfile.open(packed) as tar:
            tar.extractall(aside, filter="data")
        folder.mkdir(exist_ok=True)
        for name, _ in _checksums():
            (Path(aside) / Official.base_folder / name).replace(folder / name)


def load_archive(root: Path) -> dict[str, Split]:
    """Return uint8 images (count, 32, 32, 3) and int64 labels of the splits ``train`` and ``test``."""
    splits = {split: Official(str(root), train=split == "train") for split in ("train", "test")}
    return {split: (torch.from_numpy(data.data), torch.tensor(data.targets)) for split, data in splits.items()}


def _checksums() -> list[tuple[str, str]]:
    return [*Official.train_list, *Official.test_list, (Official.meta["filename"], Official.meta["md5"])]


def _download(packed: Path) -> None:
    packed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packed.parent) as aside:
        try:
            download_url(Official.url, aside, packed.name, Official.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(
                f"CIFAR-10 could not be downloaded from {Official.url}: {error}. Copy {packed.name} to {packed.parent} "
                "by hand, or set source: sample"
            ) from None
        (Path(aside) / packed.name).rename(packed)
