"""Complete runs in one file, kept with the results: another day or machine goes on from them."""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from pathlib import Path

from benchmarks.folder import FILES, complete_below
from tying.errors import ConfigurationError
from tying.files import atomically

KEPT = ("result.json", *FILES)


def pack(out: Path, archive: Path) -> None:
    """Write what came out of all complete runs of a folder, beside what the archive holds of other runs."""
    content = {}
    if archive.exists():
        with tarfile.open(archive) as tar:
            content = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
    for folder in complete_below(out):
        content |= {f"{folder.name}/{name}": (folder.path / name).read_bytes() for name in KEPT}
    content |= {path.name: path.read_bytes() for path in out.glob("*.json")}  # what they were begun with
    with atomically(archive) as aside, tarfile.open(aside, "w:xz", preset=9) as tar:
        for name, data in sorted(content.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def unpack(archive: Path, out: Path) -> list[str]:
    """Put runs back, but for those of which there is a folder; return the names of the others.

    Raises:
        ConfigurationError: the archive is not there, or corrupted; nothing has been put back.
    """
    if not archive.exists():
        kept = ", ".join(sorted(path.name.partition(".")[0] for path in archive.parent.glob("*.tar.xz")))
        raise ConfigurationError(f"there is no {archive}; runs are kept in folders of these names: {kept or 'none'}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as aside:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(aside, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise ConfigurationError(f"{archive} is truncated or corrupted: {error}") from None
        new = [path for path in Path(aside).iterdir() if not (out / path.name).exists()]
        return sorted(path.name for path in [path.rename(out / path.name) for path in new] if path.is_dir())
