"""Train two processes, of which the second fails at a step: run by torchrun.

The arguments are a folder, the step, the fault ("kill" or "NaN", which the second process writes into a weight), and a
sharding. Each epoch ends with a checkpoint, and training resumes from the last; without a step it ends, and saves the
weights.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sharded_faults import POISONED
from sharded_models import EPOCHS, SHARDINGS, TIES, Net, data
from sharded_run import whole

from tying.callbacks import AnchorTying, SoftTying
from tying.weights.sharding import local


class Fail(pl.Callback):
    def __init__(self, step: int, fault: str, out: Path) -> None:
        self.step, self.fault, self.out = step, fault, out

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step + 1 == self.step and trainer.global_rank == 1:
            (self.out / "faulty").touch()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                local(module.get_parameter(POISONED)).view(-1)[0] = torch.nan

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.out / f"{trainer.current_epoch}.ckpt")


def main(out: Path, step: int, fault: str, name: str) -> None:
    sharding = SHARDINGS[name]
    model = Net(sharding.shard)
    saved = sorted(out.glob("*.ckpt"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharding.strategy(),
        callbacks=[SoftTying(TIES, 0.3), AnchorTying(["network.blocks.**"], 0.3), Fail(step, fault, out)],
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
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
