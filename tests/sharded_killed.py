"""Train two sharded processes, of which the second is killed at a step: run by torchrun with a folder and the step.

Each epoch ends with a checkpoint, and training resumes from the last; without a step it ends, and saves the weights.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sharded_models import EPOCHS, SHARDINGS, TIES, Net, data
from sharded_run import whole

from tying.callbacks import AnchorTying, SoftTying


class Kill(pl.Callback):
    def __init__(self, step: int, out: Path) -> None:
        self.step, self.out = step, out

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step + 1 == self.step and trainer.global_rank == 1:
            (self.out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.out / f"{trainer.current_epoch}.ckpt")


def main(out: Path, step: int) -> None:
    sharding = SHARDINGS["FSDP2 by layer"]
    model = Net(sharding.shard)
    saved = sorted(out.glob("*.ckpt"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharding.strategy(),
        callbacks=[SoftTying(TIES, 0.3), AnchorTying(["network.blocks.**"], 0.3), Kill(step, out)],
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data(2, int(os.environ["RANK"])), ckpt_path=saved[-1] if saved else None)
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    torch.save(weights, out / f"weights, {trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
