"""Train the toy under several settings and save the weights of each rank: run by torchrun, or alone for one process."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from toys import TIES, Toy, batches, train

from tying.callbacks import (
    AnchorTying,
    Coupling,
    Fisher,
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    MixtureTying,
    RandomState,
    RelaxedTying,
    ResidualMerging,
    SoftTying,
    Synaptic,
    TemplateWeights,
    TyingMonitor,
    TyingSummary,
    UntiedBiases,
    WeightHashing,
    ZoneoutStates,
)
from tying.data import CIFAR10, Text
from tying.depth import FractalBlock, Residual, StochasticDepth, Sum
from tying.depth.fractal import draw_column
from tying.hard import LowRankResidual, bake
from tying.mixins import TyingMixin
from tying.models import SequenceModel
from tying.soft import Schedule

KINDS = ["gradient", "decoupled", "proximal", "hard", "hashed", "coupled", "anchored", "mixture", "skipped", "fractal"]
KINDS += ["skipped function", "skipped module", "looped", "relaxed", "low rank", "templates", "generated", "biases"]
KINDS += ["mixins"]
CASES = list(itertools.product(KINDS, [1, 4], [None, 0.02]))


def optimizer(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def callback(kind):
    if kind == "hard":
        return HardTying(TIES)
    if kind == "hashed":
        return WeightHashing(["encoder.*.weight", "decoder.*.weight"], 0.3, sign=True, scope="network")
    if kind == "coupled":
        return Coupling("encoder.0.bias", "decoder.0.bias", alpha=0.3)
    if kind == "anchored":
        return AnchorTying(["encoder.**"], strength=0.3, head_strength=0.1)
    if kind == "mixture":
        return MixtureTying(["**.weight"], strength=0.3, components=5, start_epoch=1)
    if kind.startswith("skipped"):
        return ResidualMerging("blocks.*", StochasticDepth(keep=0.5), "uniform")
    if kind == "looped":
        return Looping("blocks.[01]", passes=3, start=0.25, grow=0.5, per_pass="scale")
    if kind == "relaxed":
        return RelaxedTying(TIES[:1], LowRankResidual(rank=2))
    if kind == "low rank":
        return LowRankWeights(["encoder.0.weight"], rank=2)
    if kind == "templates":
        return TemplateWeights(["kernels.*.weight"], templates=2)
    if kind == "generated":
        return GeneratedWeights(["kernels.*.weight"], embedding=2, in_channels=3, out_channels=3)
    if kind == "biases":
        return UntiedBiases(["kernels.*.bias"], input_size=[6, 2, 2])
    if kind in ("fractal", "mixins"):
        return pl.Callback()
    return SoftTying(TIES, strength=0.3, update=kind, schedule=Schedule(0.0, 1.0, 5))


class Skipping(Toy):
    """Has residual blocks, and every process but the first consumes randomness of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.blocks = torch.nn.Sequential(*(Residual(torch.nn.Linear(6, 6)) for _ in range(3)))

    def loss(self, batch):
        torch.rand(int(os.environ.get("RANK", 0)))
        return super().loss([self.blocks(batch[0].double())])


class Gated(torch.nn.Linear):
    """A branch with a further argument."""

    def forward(self, x, gate):
        return (super().forward(x) * gate).tanh()


class OwnBlock(torch.nn.Module):
    """Calls a merge with a module and its further argument, or with a function."""

    def __init__(self, form):
        super().__init__()
        self.form, self.merge = form, Sum()
        self.branch, self.gate = Gated(6, 6), torch.nn.Parameter(torch.ones(6))

    def forward(self, x):
        gate = self.gate.sigmoid().expand_as(x)
        return (
            self.merge(x, self.branch, gate) if self.form == "module" else self.merge(x, lambda: self.branch(x, gate))
        )


class SkippingModules(Skipping):
    """Has residual blocks of users; the further argument of the branch needs a gradient, too."""

    form = "module"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(len(self.form))
        self.blocks = torch.nn.Sequential(*(OwnBlock(self.form) for _ in range(3)))


class SkippingFunctions(SkippingModules):
    form = "function"


class Fractal(Skipping):
    """Drops paths, and as a whole columns."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = FractalBlock(3, torch.nn.Linear, 6, 6, drop_path=0.4)

    def loss(self, batch):
        torch.rand(int(os.environ.get("RANK", 0)))
        return Toy.loss(self, [self.blocks(batch[0].double(), draw_column(3, 0.5))])


class Convolving(Toy):
    """Has convolutions of one size."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.kernels = torch.nn.Sequential(*(torch.nn.Conv2d(6, 6, 1) for _ in range(3)))

    def forward(self, images):
        return self.kernels(images)

    def loss(self, batch):
        images = batch[0].double()[:, :, None, None].expand(-1, -1, 2, 2)
        return super().loss([self(images).mean((2, 3)).tanh()])


class Listed(TyingMixin, Skipping):
    """Has callbacks of its own."""

    tying: ClassVar = [
        HardTying(["encoder.0.bias ~ decoder.0.bias"]),
        SoftTying(["encoder.0.weight ~ decoder.2.weight | o i -> i o"], strength=0.3, name="weights"),
        SoftTying(["blocks.*.branch.bias"], strength=0.3, update="proximal", name="biases"),
        WeightHashing(["encoder.2.weight"], 0.5),
        ResidualMerging("blocks.*", StochasticDepth(keep=0.5), "uniform"),
    ]


MODELS = {
    "skipped": Skipping,
    "skipped module": SkippingModules,
    "skipped function": SkippingFunctions,
    "looped": Skipping,
}
MODELS |= {"fractal": Fractal, "mixins": Listed, **dict.fromkeys(["templates", "generated", "biases"], Convolving)}


def main(out: Path, world: int) -> None:
    for number, (update, accumulate, clip) in enumerate(CASES):
        model = MODELS.get(update, Toy)(optimizer).double()
        torch.manual_seed(0)  # a hashed table begins with entries drawn from the weights
        tying = callback(update)
        # rank r takes every second sample, so that jointly the processes see the batches of one
        trainer = train(
            model,
            [tying, TyingMonitor(), TyingSummary()],
            default_root_dir=out / "logs",
            data=batches(count=10 * world, size=8 // world, world=world),
            use_distributed_sampler=False,
            strategy="ddp" if world > 1 else "auto",
            devices=world,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            max_epochs=2,
        )
        rank = trainer.global_rank
        torch.save(bake(model), out / f"{world}-{rank}-{number}.pt")


class Normed(Toy):
    """Measures what its first layer returns, on a path that no weight learns from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.encoder[0](x.double()))

    def loss(self, batch):
        return super().loss(batch) + 0.0 * self(batch[0]).sum()


class Failing(Normed):
    """Cannot be called in the last of two processes, but for training."""

    def forward(self, x):
        if os.environ.get("RANK") == "1" and not torch.is_grad_enabled():
            raise ValueError("not here")
        return super().forward(x)


def normed(out: Path, world: int, kind: type[Normed]) -> None:
    """Train a mixture, at whose end batch norms are estimated anew; save the statistics of each rank."""
    model = kind(optimizer).double()
    trainer = train(
        model,
        [callback("mixture")],
        default_root_dir=out / "logs",
        data=batches(count=10 * world, size=8 // world, world=world),
        use_distributed_sampler=False,
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        max_epochs=2,
    )
    hidden = [model.encoder[0](x.double()) for [x] in trainer.train_dataloader]
    own = {
        "mean": torch.stack([x.mean(0) for x in hidden]).mean(0),
        "variance": torch.stack([x.var(0) for x in hidden]).mean(0),
        **dict(model.norm.named_buffers()),
    }
    torch.save(own, out / f"{kind.__name__}-{world}-{trainer.global_rank}.pt")


class Labelled(Toy):
    """Classifies its inputs by the place of their largest feature."""

    def forward(self, x):
        return self.decoder(self.encoder(x.double()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)


IMPORTANCES = {"given": Fisher(5, "given"), "sampled": Fisher(5), "path": Synaptic()}


def important(out: Path, world: int) -> None:
    """Learn two tasks, the second held by the first; save the weights and their importance of each rank."""
    for name, importance in IMPORTANCES.items():
        model, anchor = Labelled(optimizer).double(), AnchorTying(["**"], 0.3, importance=importance)
        for sign in (1, -1):
            [x] = batches(count=10 * world, size=8 // world, world=world).dataset.tensors
            dataset = TensorDataset(sign * x, x.argmax(dim=1))
            rank = int(os.environ.get("RANK", 0))
            sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False)
            trainer = train(
                model,
                [anchor],
                default_root_dir=out / "logs",
                data=DataLoader(dataset, batch_size=8 // world, sampler=sampler),
                use_distributed_sampler=False,
                strategy="ddp" if world > 1 else "auto",
                devices=world,
                max_epochs=1,
            )
        ends = model.state_dict() | {f"F {key}": value for key, value in anchor.state_dict()["importances"].items()}
        torch.save(ends, out / f"{name}-{world}-{trainer.global_rank}.pt")


class Noisy(Toy):
    """Classifies CIFAR-10 through dropout, so that every step draws from the process's own generator."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3072, 10)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def training_step(self, batch, batch_idx):
        x, y = batch
        unused = sum(p.sum() for p in [*self.encoder.parameters(), *self.decoder.parameters()])
        logits = self.head(torch.dropout(x.flatten(1), 0.5, True))
        return torch.nn.functional.cross_entropy(logits, y) + 0.0 * unused


class SaveAt(pl.Callback):
    """Saves a checkpoint in the middle of an epoch, and goes on."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def language():
    return SequenceModel(torch.nn.LSTM(12, 12), size=12, task="language", num_classes=24, optimizer="adamw", lr=0.01)


def carried(model):
    """Of a sequence model, the state that goes on, which is of each process's own text."""
    return model._carried["train"][0] if isinstance(model, SequenceModel) else torch.zeros(())


def resume(out: Path, world: int) -> None:
    """Train once from beginning to end, and once from a checkpoint of that run; save the weights of each rank."""
    text = out / "text.txt"
    text.write_text("".join(chr(97 + place * place % 23) for place in range(1400)))
    for name, step in [("boundary", 10), ("middle", 13), ("language", 13)]:
        for part, ckpt_path in [("whole", None), ("resumed", out / f"{name}.ckpt")]:
            torch.manual_seed(0)
            model = Noisy() if name != "language" else language()
            data = CIFAR10(batch_size=225, validation=0.1) if name != "language" else Text(str(text), 7, 4, 24)
            zoneout = [ZoneoutStates("network", 0.3, 0.3)] if name == "language" else []  # masks of each process's own
            torch.manual_seed(17 * int(os.environ.get("RANK", 0)))
            trainer = train(
                model,
                [RandomState(), *zoneout, *([SaveAt(step, out / f"{name}.ckpt")] if part == "whole" else [])],
                data=data,
                ckpt_path=ckpt_path,
                strategy="ddp" if world > 1 else "auto",
                devices=world,
                max_epochs=2,
                limit_val_batches=0,
                default_root_dir=out / "logs",
            )
            torch.save(
                model.head.state_dict() | {"carried": carried(model)}, out / f"{name}-{part}-{trainer.global_rank}.pt"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    normed(Path(sys.argv[1]), int(sys.argv[2]), Normed)
    normed(Path(sys.argv[1]), int(sys.argv[2]), Failing)
    resume(Path(sys.argv[1]), int(sys.argv[2]))
    torch.distributed.barrier()
    important(Path(sys.argv[1]), int(sys.argv[2]))
