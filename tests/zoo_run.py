"""Train architectures of other libraries with merges, and save the weights of each rank: run by torchrun.

torchrun --standalone --nproc_per_node=2 tests/zoo_run.py FOLDER NAME [NAME ...]
"""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import train
from zoo import ZOO, build, loss_of, output_of

from tying.callbacks import RandomState, ResidualMerging
from tying.depth import StochasticDepth

DECODERS = {"T5": "decoder.block.[12]", "Whisper": "model.decoder.layers.*"}


class Trained(pl.LightningModule):
    """Trains an architecture; each number of a batch is the seed of an input."""

    def __init__(self, name):
        super().__init__()
        self.name, self.net = name, build(name)

    def inputs(self, number):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            return ZOO[self.name].inputs()

    def training_step(self, batch, batch_idx):
        number = 2 * int(batch[0]) + int(os.environ.get("RANK", 0))
        return loss_of(output_of(self.net, self.inputs(number)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def numbers(count=3):
    return DataLoader(TensorDataset(torch.arange(count)))


def merging(name, keep=0.5, mode="batch"):
    blocks = ZOO[name].blocks
    patterns = [f"net.{pattern}" for pattern in ([blocks] if isinstance(blocks, str) else blocks)]
    return ResidualMerging(patterns, StochasticDepth(keep, mode), keep_schedule="uniform")


def cases(name):
    """Return the callbacks of each run of an architecture, by the run's name."""
    runs = {mode: [merging(name, mode=mode)] for mode in ("batch", "row", "auto")}
    if name in DECODERS:
        runs["no decoder"] = [ResidualMerging(f"net.{DECODERS[name]}", StochasticDepth(0.0), "uniform")]
    return runs


def main(out: Path, names: list[str]) -> None:
    for name in names:
        for run, callbacks in cases(name).items():
            module = Trained(name)
            data = numbers()
            trainer = train(
                module,
                [*callbacks, RandomState()],
                data=data,
                strategy="ddp",
                devices=2,
                max_epochs=1,
                use_distributed_sampler=False,
            )
            torch.save(dict(module.net.named_parameters()), out / f"{name}-{run}-{trainer.global_rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
