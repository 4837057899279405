"""How fast augmented batches come: whole tensors in memory against image files and per-image transforms."""

from __future__ import annotations

import tarfile
import tempfile
from importlib import resources
from pathlib import Path

from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.report import table
from benchmarks.speed.timing import Step, race
from tying.data import CIFAR10
from tying.data.sample import FILE

BATCH = 128
WORKERS = 2


def per_image(folder: Path) -> Step:
    """Return an epoch over the embedded sample's files as torchvision's examples read them."""
    with tarfile.open(str(resources.files("tying.data").joinpath(FILE))) as tar:
        tar.extractall(folder, filter="data")
    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(CIFAR10.mean.tolist(), CIFAR10.std.tolist()),
    ]
    files = ImageFolder(str(folder / "cifar10" / "train"), transforms.Compose(steps))
    loader = DataLoader(files, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(1 for _ in loader)


def whole_tensors() -> Step:
    """Return an epoch of the same images as :class:`tying.data.CIFAR10` yields them."""
    data = CIFAR10(batch_size=BATCH, validation=0.0)
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: sum(len(data.on_after_batch_transfer(batch, 0)) for batch in loader)


def measure() -> str:
    """Run the measurement, and return its table as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = f"ImageFolder, per-image transforms, {WORKERS} workers", "tying.data.CIFAR10, in memory"
        sides = {peer: per_image(Path(folder)), ours: whole_tensors()}
        result = race(sides, races=5, rounds=2)
    rows = [[side, *result.row(side), result.told(peer, side)] for side in sides]
    told = f"An epoch of the 5,000 images of the embedded sample in augmented, normalised batches of {BATCH}:"
    return f"{told}\n\n{table(['side', 'ms', 'times faster'], rows)}"
