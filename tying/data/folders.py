"""Images in class folders, as they lie or packed into one file."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from tying.data.cache import Split, cached
from tying.errors import ConfigurationError, listed

SUFFIXES = (".png", ".jpg", ".jpeg")
PACKED = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")
UNPACK: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}
SPLITS = ("train", "test")
LARGEST_IMAGE = 2**20  # bytes, packed: no image of 32 × 32 pixels comes near it
LARGEST_READ = 2 * LARGEST_IMAGE  # at once
LARGEST_TOTAL = 2**32  # bytes, unpacked: nothing of an archive is ever written to disk

Named = tuple[str, str, str, bytes]  # split, class, file, content
Packed = tuple[str, int, Callable[[], bytes]]  # name, size unpacked, how to read it


class Bounded:
    """A stream that is never asked for more at once than a small image has: not by a header of any length either."""

    def __init__(self, stream: Any) -> None:
        self.tell, self.seek, self._read = stream.tell, stream.seek, stream.read

    def read(self, size: int) -> bytes:
        """Return that many bytes."""
        if size > LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content: bytes = self._read(size)
        return content


def is_packed(path: Path) -> bool:
    """Tell whether the name is that of an archive that can be read."""
    return path.name.lower().endswith(PACKED)


def holds_classes(path: Path) -> bool:
    """Tell whether a folder holds ``train`` and ``test``, itself or one level below."""
    return _top(path) is not None


def load_folder(path: Path, classes: Sequence[str], size: tuple[int, int]) -> dict[str, Split]:
    """Return the images of ``.../{train,test}/<class>/<file>`` below a folder, or in a tar or zip file.

    They are decoded once, with a progress bar, and then mapped from a cache that is keyed by their content.

    Args:
        path: a folder, or a ``.tar``, ``.tar.xz``, ``.tar.gz`` or ``.zip`` of one.
        classes: the class folders that must be there, in the order of their labels.
        size: width and height that each image must have, in pixels.

    Raises:
        ConfigurationError: nothing is there, the file is truncated or corrupted, a class is missing or empty, or an
            image is broken or of another size.
    """
    if not path.exists():
        raise ConfigurationError(
            f"there is nothing at {path}: expected a folder of class folders, or a tar or zip file"
        )
    try:
        return cached(_key(path), lambda: decode(path, classes, size))
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ConfigurationError(f"{path} is truncated or corrupted: {error}. Copy it again") from None
    except (OSError, RuntimeError, NotImplementedError) as error:  # rights, links to nowhere, encryption
        raise ConfigurationError(f"{path} cannot be read: {error}") from None


def _key(path: Path) -> str:
    if path.is_dir():
        digest = hashlib.sha256()
        for split, kind, name, content in files(path):
            digest.update(f"{split}/{kind}/{name}:{len(content)}:".encode())
            digest.update(content)
    else:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
    return f"images-{digest.hexdigest()[:32]}"


def decode(path: Path, classes: Sequence[str], size: tuple[int, int], show_progress: bool = True) -> dict[str, Split]:
    """Return the images of each split, sorted by class and name, with the places of their classes as labels.

    Raises:
        ConfigurationError: a class is missing or empty, or an image is broken or of another size.
    """
    found: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
    bar = tqdm(files(path), desc=f"decoding {path.name}", unit="image", leave=False, disable=not show_progress)
    for split, kind, name, content in bar:
        where = f"{split}/{kind}/{name} in {path}"
        try:
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            pixels = np.asarray(image.convert("RGB")) if image.size == size else None  # its header is read so far
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise ConfigurationError(f"{where} is not a readable image: {error}") from None
        if pixels is None:
            raise ConfigurationError(f"{where} has {image.size[0]}×{image.size[1]} pixels, not {size[0]}×{size[1]}")
        found.setdefault((split, kind), []).append((name, pixels))
    splits: dict[str, Split] = {}
    for split in SPLITS:
        there = {kind for part, kind in found if part == split}
        missing, more = {*classes} - there, there - {*classes}
        if missing or more:
            raise ConfigurationError(
                f"{path} must hold {split}/<class>/ with images for each of {', '.join(classes)}; missing or empty: "
                f"{listed(sorted(missing)) or 'none'}; not expected: {listed(sorted(more)) or 'none'}"
            )
        ordered = [sorted(found[split, kind], key=lambda named: named[0]) for kind in classes]
        images = np.stack([pixels for named in ordered for _, pixels in named])
        labels = torch.tensor([label for label, named in enumerate(ordered) for _ in named])
        splits[split] = torch.from_numpy(images), labels
    return splits


def files(path: Path) -> Iterator[Named]:
    """Yield the images of ``.../{train,test}/<class>/<file>`` below a folder, or in a tar or zip file."""
    if path.is_dir():
        top = _top(path) or path
        for split in SPLITS:
            for file in sorted((top / split).glob("*/*")):
                if _is_image(file.name) and not file.is_dir():
                    yield split, file.parent.name, file.name, file.read_bytes()
        return
    total = 0
    for name, size, read in _zipped(path) if path.name.lower().endswith(".zip") else _tarred(path):
        total += size
        parts = PurePosixPath(name).parts
        wanted = len(parts) >= 3 and parts[-3] in SPLITS and _is_image(parts[-1])
        if total > LARGEST_TOTAL:
            raise ConfigurationError(
                f"{path} unpacks to more than {LARGEST_TOTAL:,} bytes: not an archive of small images"
            )
        if wanted and size > LARGEST_IMAGE:
            raise ConfigurationError(f"{name} in {path} unpacks to {size:,} bytes: not a small image")
        if wanted:
            yield parts[-3], parts[-2], parts[-1], read()


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith("._")  # what macOS puts beside files


def _tarred(path: Path) -> Iterator[Packed]:
    unpack = next((unpack for end, unpack in UNPACK.items() if path.name.lower().endswith(end)), open)
    with unpack(path, "rb") as stream:
        bounded: Any = Bounded(stream)
        with tarfile.open(fileobj=bounded, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None  # links and devices are passed over
                if content is not None:
                    yield member.name, member.size, content.read
        while stream.read(LARGEST_IMAGE):  # the checksum stands at the end
            if stream.tell() > LARGEST_TOTAL:
                raise tarfile.ReadError(f"it unpacks to more than {LARGEST_TOTAL:,} bytes")


def _zipped(path: Path) -> Iterator[Packed]:
    with zipfile.ZipFile(path) as packed:
        for member in packed.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, partial(_unzipped, packed, member)


def _unzipped(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return a file of the size that it is said to have; one that is larger is not unpacked further."""
    with packed.open(member) as stream:
        return stream.read(member.file_size)


def _top(path: Path) -> Path | None:
    for top in [path, *sorted(child for child in path.iterdir() if child.is_dir())] if path.is_dir() else []:
        if all((top / split).is_dir() for split in SPLITS):
            return top
    return None
