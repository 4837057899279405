"""Images in class folders, unpacked or in one tar or zip file, decoded once.

Decoded images are cached in files that are mapped into memory.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from tying.errors import ConfigurationError, listed

PACKED = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")
UNPACK: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}
SPLITS = ("train", "test")
CACHE_VERSION = 1
LARGEST_IMAGE = 2**20  # bytes, packed: no image of 32 × 32 pixels comes near it
LARGEST_READ = 2 * LARGEST_IMAGE  # at once
LARGEST_TOTAL = 2**32  # bytes, unpacked: nothing of an archive is ever written to disk

Split = tuple[Tensor, Tensor]  # uint8 images (count, height, width, channels), int64 labels (count,)
Packed = tuple[str, int, Callable[[], Any]]  # name, size unpacked, a function that opens it


class Bounded(io.BufferedReader):
    """A stream that refuses to read more at once than a small image needs, whatever length a header states."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return that many bytes."""
        if size is not None and size > LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def find_splits(path: Path) -> Path | None:
    """Return the folder that holds ``train`` and ``test``: this one, or one just below it; ``None`` without one."""
    candidates = [path, *sorted(child for child in path.iterdir() if child.is_dir())] if path.is_dir() else []
    return next((top for top in candidates if all((top / split).is_dir() for split in SPLITS)), None)


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
    """Return the images of each split, sorted by class and name, labelled by the positions of their classes.

    Raises:
        ConfigurationError: a class is missing or empty, or an image is broken or of another size.
    """
    decoded: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
    bar = tqdm(files(path), desc=f"decoding {path.name}", unit="image", leave=False, disable=not show_progress)
    for split, kind, name, content in bar:
        where = f"{split}/{kind}/{name} in {path}"
        try:
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            if image.size == size:  # only the header is read so far
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
        images = np.stack([pixels for named in ordered for _, pixels in named])
        labels = torch.tensor([label for label, named in enumerate(ordered) for _ in named])
        splits[split] = torch.from_numpy(images), labels
    return splits


def files(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield the images of ``.../{train,test}/<class>/<file>`` below a folder, or in a tar or zip file.

    Yields:
        split, class, file name and content.
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
                yield parts[-3], parts[-2], parts[-1], stream.read(size)  # no more than the stated size is unpacked


def _is_image(name: str) -> bool:
    return name.lower().endswith((".png", ".jpg", ".jpeg")) and not name.startswith(
        "._"
    )  # macOS puts these beside files


def _tarred(path: Path) -> Iterator[Packed]:
    with Bounded(UNPACK.get(path.suffix.lower(), open)(path, "rb")) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():  # neither links nor devices
                    yield member.name, member.size, partial(tar.extractfile, member)
        while stream.read(LARGEST_IMAGE):  # the checksum is at the end
            if stream.tell() > LARGEST_TOTAL:
                raise tarfile.ReadError(f"it unpacks to more than {LARGEST_TOTAL:,} bytes")


def _zipped(path: Path) -> Iterator[Packed]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, partial(archive.open, member)


def cache_root() -> Path:
    """Return the folder of all caches: ``$TYING_CACHE``, or ``tying`` in the user's cache folder."""
    root = os.environ.get("TYING_CACHE")
    return Path(root) if root is not None else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "tying")


def cached(key: str, decode: Callable[[], dict[str, Split]]) -> dict[str, Split]:
    """Return the splits of ``decode``, from the cache of that key if there is one.

    A cache is written to a temporary folder and renamed, so that it is never incomplete. Of several processes that
    start at once, the first writes the cache, and all read it.

    Args:
        key: identifies the content that is decoded.
        decode: returns uint8 images (count, height, width, channels) and int64 labels of each split.

    Raises:
        ConfigurationError: the cache is of another version, truncated or corrupted; it is named, and left alone.
    """
    folder = cache_root() / key
    if not folder.exists():
        splits = decode()
        try:
            _write(folder, splits)
        except OSError as error:
            raise ConfigurationError(
                f"decoded images could not be kept under {folder.parent}: {error}. Set the environment variable "
                "TYING_CACHE to a folder with room"
            ) from None
    return _read(folder)


def _write(folder: Path, splits: dict[str, Split]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = {
        f"{split}.{part}": tensor.contiguous().numpy().data.cast("B")
        for split, tensors in splits.items()
        for part, tensor in zip(("images", "labels"), tensors, strict=True)
    }
    meta = {
        "version": CACHE_VERSION,
        "splits": {split: [*images.shape] for split, (images, _) in splits.items()},
        "checksums": {name: zlib.crc32(content) for name, content in files.items()},
    }
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as made:
        for name, content in files.items():
            Path(made, name).write_bytes(content)
        Path(made, "meta.json").write_text(json.dumps(meta))
        try:
            Path(made).rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def _read(folder: Path) -> dict[str, Split]:
    remedy = f"Remove {folder}, and it will be made again"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        version, shapes, checksums = meta["version"], dict(meta["splits"]), dict(meta["checksums"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigurationError(f"the cache {folder} is incomplete: it has no readable meta.json. {remedy}") from None
    if version != CACHE_VERSION:
        raise ConfigurationError(f"the cache {folder} is of version {version}, not {CACHE_VERSION}. {remedy}")
    if len(checksums) != 2 * len(shapes) or not shapes:
        raise ConfigurationError(f"the cache {folder} is corrupted in meta.json. {remedy}")

    def mapped(name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        path, count = folder / name, torch.Size(shape).numel()
        if path.exists() and path.stat().st_size == count * dtype.itemsize:
            # a private mapping: pages are read when touched, and writing to the tensor leaves the file alone
            tensor = torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)
            if zlib.crc32(tensor.numpy().data.cast("B")) == checksums.get(name):
                return tensor
        raise ConfigurationError(f"the cache {folder} is truncated or corrupted in {name}. {remedy}")

    return {
        split: (mapped(f"{split}.images", torch.uint8, shape), mapped(f"{split}.labels", torch.int64, shape[:1]))
        for split, shape in shapes.items()
    }
