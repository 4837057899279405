"""Write files atomically, and read checkpoints safely."""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tying.errors import ConfigurationError
from tying.selection.index import clean_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package

NEED = "needs "  # begins the keys of a checkpoint's state dict that name a callback without which it does not load


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` at the end, or remove it after an error.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "made" / "figure.csv"
        >>> with atomically(path) as partial:
        ...     _ = partial.write_text("1,2")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('1,2', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids are not unique across machines
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically, with its label as the file's title."""
    with atomically(path) as partial:
        figure.savefig(partial, format="png", metadata={"Title": str(figure.get_label())})


def read(path: str | Path, context: str, mmap: bool = False) -> Any:
    """Load tensors and plain types from a file that ``torch.save`` wrote, onto the CPU.

    Args:
        path: path of the file.
        context: first words of the error message.
        mmap: see :func:`torch.load`.

    Raises:
        ConfigurationError: the file is missing, truncated or corrupted, or contains other objects.
    """
    check_whole(path, context)
    try:
        return torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ConfigurationError(
            f"{context}: {path} is not a checkpoint of tensors and plain types, or is truncated (if it contains other "
            f"objects, save only its state dict): {error}"
        ) from None


def check_whole(path: str | Path, context: str) -> None:
    """Raise an error unless a file exists and its checksums are correct; ``torch.load`` does not check them.

    Args:
        path: path of the file.
        context: first words of the error message.

    Raises:
        ConfigurationError: the file is missing or corrupted.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"{context}: there is no file {path}")
    if zipfile.is_zipfile(path) and not _is_whole(Path(path)):
        raise ConfigurationError(f"{context}: {path} is corrupted: its checksums are wrong")


def saved_weights(path: str | Path, context: str) -> dict[str, Tensor]:
    """Load the tensors of a Lightning checkpoint or of a state dict, by clean name, onto the CPU.

    Args:
        path: path of the file.
        context: first words of the error message.

    Raises:
        ConfigurationError: the file is missing or corrupted, or contains objects other than tensors and plain types.
    """
    content = read(path, context)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {
        clean_name(name): value
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.startswith(NEED)
    }


def newest_intact(checkpoints: Iterable[Path]) -> Path | None:
    """Return the newest checkpoint with correct checksums, or ``None``. A killed process may leave a truncated file."""
    newest_first = sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(_is_whole, newest_first), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False
