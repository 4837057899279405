"""Checkpoints: which is the newest, and what they hold."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from tying.errors import ConfigurationError
from tying.names import clean_name


def read(path: str | Path, asker: str) -> Any:
    """Return what a file of torch holds, on the CPU, if that is whole and nothing but tensors and plain types.

    Args:
        path: of the file.
        asker: what needs it, for errors.

    Raises:
        ConfigurationError: there is no such file, it is truncated or corrupted, or it holds other objects.
    """
    check_whole(path, asker)
    try:
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(
            f"{asker}: {path} is no checkpoint of tensors and plain types, or is truncated (of one that holds other "
            f"objects, save the state dict alone): {error}"
        ) from None


def check_whole(path: str | Path, asker: str) -> None:
    """Raise where a file of torch is not there, or not what was written: torch itself reads past flipped bits.

    Raises:
        ConfigurationError: that is so.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{asker}: there is no file {path}")
    if zipfile.is_zipfile(path) and not _is_whole(Path(path)):
        raise ConfigurationError(f"{asker}: {path} is corrupted: its checksums are wrong")


def saved_weights(path: str | Path, asker: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of Lightning's, or of a state dict in a file, by clean name, on the CPU.

    Args:
        path: of the file.
        asker: what needs it, for errors.

    Raises:
        ConfigurationError: there is no such file, it is corrupted, or holds other objects than tensors and plain types.
    """
    content = read(path, asker)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {clean_name(name): value for name, value in state.items() if isinstance(value, Tensor)}


def of_all_processes(own: Any) -> list[Any]:
    """Return what each process gives, by its rank; all of them take part in making a checkpoint.

    Example:
        >>> of_all_processes("here")
        ['here']
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    processes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(processes, own)
    return processes


def newest_intact(checkpoints: Iterable[Path]) -> Path | None:
    """Return the newest checkpoint that is whole: a kill truncates one where temporary files lie on another disk."""
    newest_first = sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(_is_whole, newest_first), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False
