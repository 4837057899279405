"""Train the toy under several settings and save the weights of each rank: run by torchrun, or alone for one process."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.optim import SGD
from toys import TIES, Toy, batches, train

from tying.callbacks import SoftTying, TyingMonitor, TyingSummary
from tying.soft import Schedule

CASES = list(itertools.product(["gradient", "decoupled", "proximal"], [1, 4], [None, 0.02]))


def optimizer(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def main(out: Path, world: int) -> None:
    rank = 0
    for number, (update, accumulate, clip) in enumerate(CASES):
        model = Toy(optimizer).double()
        tying = SoftTying(TIES, strength=0.3, update=update, schedule=Schedule(0.0, 1.0, 5))
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
        torch.save(model.state_dict(), out / f"{world}-{rank}-{number}.pt")
    if world > 1:
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
