"""The embedded sample: a class-balanced part of a JPEG copy of CIFAR-10.

``python -m tying.data.sample ARCHIVE OUT`` cuts it from a tar file that holds
``cifar10/{train,test}/<class>/NNNN.jpg``.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections import defaultdict
from importlib import resources
from pathlib import Path

from tying.data.cache import Split
from tying.data.folders import decode, files
from tying.files import atomically

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = {"train": 500, "test": 100}
FILE = "cifar10_sample.tar.xz"


def load_sample() -> dict[str, Split]:
    """Return the embedded images and labels of the splits ``train`` (5,000) and ``test`` (1,000).

    Returns:
        For each split, uint8 images of shape (count, 32, 32, 3) and int64 labels, sorted by class and name.

    Example:
        >>> images, labels = load_sample()["test"]
        >>> images.shape, images.dtype, labels.bincount().unique()
        (torch.Size([1000, 32, 32, 3]), torch.uint8, tensor([100]))
    """
    with resources.as_file(resources.files("tying.data") / FILE) as path:
        return decode(path, CLASSES, (32, 32), show_progress=False)


def cut_sample(archive: Path, out: Path) -> int:
    """Write evenly spaced images of each class and split of ``archive`` to ``out``; return the number of bytes.

    The result depends on the images alone: times and owners are fixed, and ``out`` appears whole or not at all.
    """
    found: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for split, kind, name, content in files(archive):
        found[split, kind].append((name, content))
    with atomically(out) as aside, tarfile.open(aside, "w:xz", preset=9) as tar:
        for split, count in PER_CLASS.items():
            for kind in CLASSES:
                named = sorted(found[split, kind])
                for name, content in named[:: max(1, len(named) // count)][:count]:
                    info = tarfile.TarInfo(f"cifar10/{split}/{kind}/{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return out.stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.out}: {cut_sample(arguments.archive, arguments.out):,} bytes")
