"""Load images from class folders, or from a tar or zip file of them, and cache the decoded images."""

import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tying.errors import ConfigurationError, listed
from tying.extras import extra
from tying.files import atomically, read

PACKED = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")
UNPACK: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}
SPLITS = ("train", "test")
LARGEST_IMAGE = 2**20  # bytes of an image file; files of 32 × 32 pixels are far smaller
LARGEST_READ = 2 * LARGEST_IMAGE  # bytes of one read
LARGEST_TOTAL = 2**32  # bytes of an unpacked archive, which is never written to disk

Split = tuple[Tensor, Tensor]  # uint8 images (count, height, width, channels), int64 labels (count,)
Packed = tuple[str, int, Callable[[], Any]]  # name, unpacked size, and a function that opens the file


class Bounded(io.BufferedReader):
    """A stream that raises an error on reads larger than a small image needs; a broken header may cause these."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return ``size`` bytes, or all remaining bytes."""
        if size is not None and size > LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def find_splits(path: Path) -> Path | None:
    """Return the folder that contains ``train`` and ``test``: the given one or a child of it, or ``None``."""
    candidates = [path, *sorted(child for child in path.iterdir() if child.is_dir())] if path.is_dir() else []
    return next((top for top in candidates if all((top / split).is_dir() for split in SPLITS)), None)


def load_folder(path: Path, classes: Sequence[str], size: tuple[int, int]) -> dict[str, Split]:
    """Return the images of ``.../{train,test}/<class>/<file>`` below a folder, or in a tar or zip file.

    They are decoded once, with a progress bar, and then read from a cache whose key is a hash of their content.

    Args:
        path: a folder, or a ``.tar``, ``.tar.xz``, ``.tar.gz`` or ``.zip`` file of one.
        classes: names of the class folders, in the order of their labels.
        size: width and height of every image, in pixels.

    Raises:
        ConfigurationError: the path does not exist, the file is truncated or corrupted, a class is missing or empty,
            or an image is broken or of another size.
    """
    if not path.exists():
        raise ConfigurationError(
            f"there is nothing at {path}: expected a folder of class folders, or a tar or zip file"
        )
    try:
        return cached(_key(path), lambda: decode(path, classes, size))
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ConfigurationError(f"{path} is truncated or corrupted: {error}. Copy it again") from None
    except (OSError, RuntimeError, NotImplementedError) as error:  # permissions, dead links, encryption
        raise ConfigurationError(f"{path} cannot be read: {error}") from None


def _key(path: Path) -> str:
    if path.is_dir():
        digest = hashlib.sha256()
        for split, kind, name, content in files(path):
            digest.update(f"{split}/{kind}/{name}:{len(content)}:".encode() + content)
    else:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
    return f"images-{digest.hexdigest()[:32]}"


def decode(path: Path, classes: Sequence[str], size: tuple[int, int], show_progress: bool = True) -> dict[str, Split]:
    """Decode the images of each split, sorted by class and name; the label of a class is its position in ``classes``.

    Raises:
        ConfigurationError: a class is missing or empty, or an image is broken or of another size; or pillow is not
            installed.
    """
    with extra("data"):
        from PIL import Image, UnidentifiedImageError
    decoded: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
    for split, kind, name, content in tqdm(
        files(path), f"decoding {path.name}", leave=False, unit="image", disable=not show_progress
    ):
        where = f"{split}/{kind}/{name} in {path}"
        try:
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            if image.size == size:  # only the header has been read
                decoded.setdefault((split, kind), []).append((name, np.asarray(image.convert("RGB"))))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise ConfigurationError(f"{where} is not a readable image: {error}") from None
        if image.size != size:
            raise ConfigurationError(f"{where} has {image.size[0]}×{image.size[1]} pixels, not {size[0]}×{size[1]}")
    splits: dict[str, Split] = {}
    for split in SPLITS:
        kinds = {kind for part, kind in decoded if part == split}
        if kinds != {*classes}:
            raise ConfigurationError(
                f"{path} must hold {split}/<class>/ with images for each of {', '.join(classes)}; missing or empty: "
                f"{listed(sorted({*classes} - kinds)) or 'none'}; not expected: "
                f"{listed(sorted(kinds - {*classes})) or 'none'}"
            )
        ordered = [sorted(decoded[split, kind], key=lambda named: named[0]) for kind in classes]
        images = torch.from_numpy(np.stack([pixels for named in ordered for _, pixels in named]))
        splits[split] = images, torch.tensor([label for label, named in enumerate(ordered) for _ in named])
    return splits


def files(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield the images of ``.../{train,test}/<class>/<file>`` below a folder, or in a tar or zip file.

    Yields:
        The split, class, file name and content of each.
    """
    if path.is_dir():
        for split in SPLITS:
            for file in sorted(((find_splits(path) or path) / split).glob("*/*")):
                if _is_image(file.name) and not file.is_dir():
                    yield split, file.parent.name, file.name, file.read_bytes()
        return
    total = 0
    for name, size, unpack in _zipped(path) if path.name.lower().endswith(".zip") else _tarred(path):
        total += size
        if total > LARGEST_TOTAL:
            raise ConfigurationError(
                f"{path} unpacks to more than {LARGEST_TOTAL:,} bytes: not an archive of small images"
            )
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and parts[-3] in SPLITS and _is_image(parts[-1]):
            if size > LARGEST_IMAGE:
                raise ConfigurationError(f"{name} in {path} unpacks to {size:,} bytes: not a small image")
            with unpack() as stream:
                yield parts[-3], parts[-2], parts[-1], stream.read(size)  # unpack no more than the stated size


def _is_image(name: str) -> bool:
    # macOS adds files that begin with "._"
    return name.lower().endswith((".png", ".jpg", ".jpeg")) and not name.startswith("._")


def _tarred(path: Path) -> Iterator[Packed]:
    with Bounded(UNPACK.get(path.suffix.lower(), open)(path, "rb")) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():  # neither links nor devices
                    yield member.name, member.size, partial(tar.extractfile, member)
        while stream.read(LARGEST_IMAGE):  # the checksum at the end is tested there
            if stream.tell() > LARGEST_TOTAL:
                raise tarfile.ReadError(f"it unpacks to more than {LARGEST_TOTAL:,} bytes")


def _zipped(path: Path) -> Iterator[Packed]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, partial(archive.open, member)


def cache_root() -> Path:
    """Return the folder of all caches: ``$TYING_CACHE``, by default ``tying`` in the user's cache folder."""
    root = os.environ.get("TYING_CACHE")
    return Path(root) if root is not None else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "tying")


def cached(key: str, decode: Callable[[], dict[str, Split]]) -> dict[str, Split]:
    """Return the splits from the cache file of a key; call ``decode`` and write the file if it is missing.

    The file is written atomically. Processes that start at once may each write it, with the same content.

    Args:
        key: identifies the content to decode.
        decode: returns uint8 images (count, height, width, channels) and int64 labels of each split.

    Raises:
        ConfigurationError: the file cannot be written, or is truncated or corrupted; a damaged file is not removed.
    """
    path = cache_root() / f"{key}.pt"
    if not path.exists():
        splits = decode()
        try:
            with atomically(path) as partial_path:
                torch.save(splits, partial_path)
        except (OSError, RuntimeError) as error:  # the latter from torch, for a full disk
            raise ConfigurationError(
                f"decoded images could not be written to {path.parent}: {error}. Set the environment variable "
                "TYING_CACHE to a folder with free space"
            ) from None
    try:
        # mapped into memory: pages are read when they are used, and writing to a tensor does not change the file
        return dict(read(path, "cached images", mmap=True))
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}. Remove {path}, and it will be written again") from None
