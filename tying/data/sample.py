"""The embedded sample: a class-balanced part of a JPEG copy of CIFAR-10.

``python -m tying.data.sample ARCHIVE OUT`` cuts it from a tar file that holds
``cifar10/{train,test}/<class>/NNNN.jpg``.
"""

import io
import sys
import tarfile
from collections import defaultdict
from itertools import product
from pathlib import Path

from tying.data.folders import Split, decode, files
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
    return decode(Path(__file__).with_name(FILE), CLASSES, (32, 32), show_progress=False)


def cut_sample(archive: Path, out: Path) -> int:
    """Write evenly spaced images of each class and split of ``archive`` to ``out``; return the number of bytes.

    The result depends on the images alone: times and owners are fixed. ``out`` is written atomically.
    """
    grouped: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for split, kind, name, content in files(archive):
        grouped[split, kind].append((name, content))
    with atomically(out) as partial, tarfile.open(partial, "w:xz", preset=9) as tar:
        for (split, count), kind in product(PER_CLASS.items(), CLASSES):
            images = sorted(grouped[split, kind])
            for name, content in images[:: max(1, len(images) // count)][:count]:
                info = tarfile.TarInfo(f"cifar10/{split}/{kind}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.stat().st_size


if __name__ == "__main__":
    print(f"{cut_sample(Path(sys.argv[1]), Path(sys.argv[2])):,} bytes")
