"""Files that are there whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # which takes long to import


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Give a name aside to write to, which replaces ``path`` at the end and is removed after an error.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "made" / "figure.csv"
        >>> with atomically(path) as aside:
        ...     _ = aside.write_text("1,2")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('1,2', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process numbers repeat on other machines
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with atomically(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
