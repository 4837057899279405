"""What the tests of the benchmarks' runner train on, and what goes wrong in it."""

import os
import resource
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch

from tying.data.images import Images
from tying.models import Classifier


class Fault(pl.Callback):
    """In the second step of the second epoch, while the file ``armed`` exists: raise, be killed, or find the disk full."""

    def __init__(self, armed: str, kind: str, path: str = ""):
        self.armed, self.kind, self.path = Path(armed), kind, Path(path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1 and self.armed.exists():
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "raise":
                raise RuntimeError("it went\nwrong")
            if self.kind == "long":
                raise RuntimeError("long " * 50_000)
            if self.kind == "edit":
                self.path.write_text(self.path.read_text().replace("max_epochs: 3", "max_epochs: 1"))
                return
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # from now on, every write fails


class Few(Images):
    """A hundred random images."""

    mean = torch.tensor([0.5])
    std = torch.tensor([0.3])
    pad = 1
    flip = True
    description = "a hundred random images"

    def __init__(self, seed: int = 0, root: str | None = None):
        super().__init__(batch_size=16, validation=0.2, labelled=None, augment=True, seed=seed)

    def load(self):
        drawn = torch.Generator().manual_seed(0)
        images = torch.randint(256, (100, 8, 8, 1), generator=drawn, dtype=torch.uint8)
        return dict.fromkeys(("train", "test"), (images, torch.arange(100) % 10))


class Other(Few):
    """Other images, where a file says so."""

    def __init__(self, seed: int = 0, root: str | None = None):
        super().__init__(seed)
        self.root = root

    def load(self):
        loaded = super().load()
        return (
            {split: (255 - images, labels) for split, (images, labels) in loaded.items()}
            if (Path(self.root) / "other").exists()
            else loaded
        )


class Logs(Classifier):
    """Logs in its own hook at the epoch's end, which Lightning calls after those of callbacks."""

    def on_train_epoch_end(self):
        self.log("own/epoch", float(self.current_epoch + 1))


class Noisy(Classifier):
    """Draws random numbers in training and in testing."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.rand(())

    def test_step(self, batch, batch_idx):
        self.log("test/drawn", torch.rand(()))
        super().test_step(batch, batch_idx)
