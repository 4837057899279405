"""What the tests of the benchmarks' runner train on, and what goes wrong in it."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.program import Outcome, Progress
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


def program(
    progress: Progress,
    seed: int = 0,
    rate: float = 0.1,
    data: Few | None = None,
    stages: int = 3,
    fault: str = "kill",
    armed: str = "armed",
) -> Outcome:
    """Train a layer in stages; in the second, while the file ``armed`` exists, do what ``fault`` says."""
    model = torch.nn.Linear(4, 1)
    if (state := progress.restore()) is not None:
        model.load_state_dict(state["model"])
    for stage in range(len(progress.rows), stages):
        drawn = torch.Generator().manual_seed(seed * stages + stage)
        loss = (model(torch.rand(8, 4, generator=drawn)) - 1).square().mean()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= rate * weight.grad
                weight.grad = None
        if stage == 1 and fault == "raise":
            raise RuntimeError("it went wrong")
        progress.log(stage + 1, 0.5, **{"val/loss": float(loss)})
        progress.save((stage + 1) / stages, {"model": model.state_dict()})
        if stage == 1:
            misbehave(fault, Path(armed))
    with Path(armed).with_name("finished").open("a") as file:
        print(progress.folder.name, file=file)
    return Outcome(progress.rows, {"test/sum": float(model.weight.sum())}, model, {"description": "noise", "key": None})


def misbehave(fault, armed):
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    elif armed.exists() and fault != "none":
        if fault != "kill":
            armed.unlink()  # the next attempt goes well
        if fault == "once":
            raise RuntimeError("it went wrong")
        if fault == "worker":
            os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        if fault in ("worker", "wait"):
            time.sleep(60)  # this process ends with its parent
        os.kill(os.getpid(), signal.SIGKILL)


def silent(progress: Progress, seed: int = 0) -> Outcome:
    """Log nothing."""
    return Outcome([], {}, torch.nn.Linear(1, 1), {"description": "nothing", "key": None})
