"""Decoded images, kept in files that are mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tying.errors import ConfigurationError

VERSION = 1
Split = tuple[Tensor, Tensor]  # uint8 images (count, height, width, channels), int64 labels (count,)


def cache_root() -> Path:
    """Return where caches are kept: ``$TYING_CACHE``, or ``tying`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tying"
    return Path(os.environ.get("TYING_CACHE", default))


def cached(key: str, decode: Callable[[], dict[str, Split]]) -> dict[str, Split]:
    """Return what ``decode`` returns, from the cache of that key if there is one.

    A cache is written aside and renamed, so that it is there whole or not at all; of several processes that start
    at once, one wins and the others take its files.

    Args:
        key: stands for the content that is decoded.
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
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shapes = {split: [*images.shape] for split, (images, _) in splits.items()}
        checksums = {}
        for split, (images, labels) in splits.items():
            for name, tensor in ((f"{split}.images", images), (f"{split}.labels", labels)):
                content = _bytes(tensor)
                (aside / name).write_bytes(content)
                checksums[name] = zlib.crc32(content)
        meta = {"version": VERSION, "splits": shapes, "checksums": checksums}
        (aside / "meta.json").write_text(json.dumps(meta))
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(folder: Path) -> dict[str, Split]:
    remedy = f"Remove {folder}, and it will be made again"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        version, shapes, checksums = meta["version"], dict(meta["splits"]), dict(meta["checksums"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigurationError(f"the cache {folder} is incomplete: it has no readable meta.json. {remedy}") from None
    if version != VERSION:
        raise ConfigurationError(f"the cache {folder} is of version {version}, not {VERSION}. {remedy}")
    if len(checksums) != 2 * len(shapes) or not shapes:
        raise ConfigurationError(f"the cache {folder} is corrupted in meta.json. {remedy}")

    def mapped(name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        path, count = folder / name, torch.Size(shape).numel()
        if path.exists() and path.stat().st_size == count * dtype.itemsize:
            # a private mapping: pages are read when touched, and writing to the tensor leaves the file alone
            tensor = torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)
            if zlib.crc32(_bytes(tensor)) == checksums.get(name):
                return tensor
        raise ConfigurationError(f"the cache {folder} is truncated or corrupted in {name}. {remedy}")

    splits: dict[str, Split] = {}
    for split, shape in shapes.items():
        images = mapped(f"{split}.images", torch.uint8, shape)
        splits[split] = images, mapped(f"{split}.labels", torch.int64, shape[:1])
    return splits


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")
