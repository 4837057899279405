"""What the tests of the benchmarks' runner train on, and what goes wrong in it."""

import os
import resource
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch

from tying.data.images import Images


class Fault(pl.Callback):
    """In the second step of the second epoch, while the file ``armed`` exists: raise, be killed, or find the disk full."""

    def __init__(self, armed: str, kind: str):
        self.armed, self.kind = Path(armed), kind

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1 and self.armed.exists():
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "raise":
                raise RuntimeError("it went\nwrong")
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
