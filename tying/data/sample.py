"""The embedded sample: a class-balanced part of a JPEG copy of CIFAR-10; ``SAMPLE.md`` has its origin and terms.

``python -m tying.data.sample ARCHIVE OUT`` writes it from a tar file with ``cifar10/{train,test}/<class>/NNNN.jpg``.
"""

import io
import sys
import tarfile
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
        For each split, uint8 images (count, 32, 32, 3) and int64 labels (count,), sorted by class and file name.

    Example:
        >>> images, labels = load_sample()["test"]
        >>> images.shape, images.dtype, labels.bincount().unique()
        (torch.Size([1000, 32, 32, 3]), torch.uint8, tensor([100]))
    """
    return decode(Path(__file__).with_name(FILE), CLASSES, (32, 32), show_progress=False)


def cut_sample(archive: Path, out: Path) -> int:
    """Write evenly spaced images of each class and split of ``archive`` to ``out``; return the number of bytes.

    Times and owners in the file are fixed, so that equal images give equal bytes. ``out`` is written atomically.
    """
    everything = sorted(files(archive))  # by split, class and name
    with atomically(out) as partial, tarfile.open(partial, "w:xz", preset=9) as tar:
        for (split, count), kind in product(PER_CLASS.items(), CLASSES):
            images = [image for image in everything if image[:2] == (split, kind)]
            for *_, name, content in images[:: max(1, len(images) // count)][:count]:
                info = tarfile.TarInfo(f"cifar10/{split}/{kind}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.stat().st_size


if __name__ == "__main__":
    print(f"{cut_sample(Path(sys.argv[1]), Path(sys.argv[2])):,} bytes")
