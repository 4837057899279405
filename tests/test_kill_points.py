"""A run that was killed after any step goes on to the weights of the uninterrupted one, bitwise, in every family."""

import lightning.pytorch as pl
import pytest
import torch
from families import FAMILIES, SITES, Trained, inputs
from lightning.pytorch.callbacks import ModelCheckpoint

from tying.callbacks import MixtureTying, RandomState, RelaxedTying, SoftTying, WeightClustering
from tying.data.resuming import ResumableLoader
from tying.hard import LowRankResidual
from tying.soft import Schedule

EPOCHS, STEPS = 3, 5


class Shuffled(ResumableLoader):
    """Batches of four in an order of each epoch's own."""

    def __len__(self):
        return STEPS

    def __iter__(self):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self._place["epoch"])).view(STEPS, 4)
        for number in self._numbers(STEPS):
            yield [inputs()[order[number]]]


class Noisy(Trained):
    """Draws random numbers in training."""

    def loss(self, batch):
        return super().loss([torch.dropout(batch[0], 0.2, self.training)])

    def train_dataloader(self):
        return Shuffled()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


UPDATES = {"SoftTying, decoupled": "decoupled", "SoftTying, proximal": "proximal"}
ACCUMULATED = [
    "SoftTying, accumulated",
    "WeightHashing, accumulated",
    "MixtureTying, accumulated",
    "RelaxedTying, accumulated",
]  # over two batches


def callback_of(family):
    if family in UPDATES:
        return SoftTying([f"{SITES.pair[0]} ~ {SITES.pair[1]}"], strength=1.0, update=UPDATES[family])
    if family == "WeightClustering":
        return WeightClustering([SITES.pair[0]], clusters=4, start_epoch=1)
    if family == "MixtureTying":
        return MixtureTying([SITES.pair[0]], 0.01, components=4, start_epoch=1, examples=20)
    if family == "RelaxedTying":  # killed before, amid and after its annealing
        pair = f"{SITES.pair[0]} ~ {SITES.pair[1]}"
        return RelaxedTying([pair], LowRankResidual(rank=2), anneal=Schedule(1.0, 0.0, 2 * STEPS - 1))
    return FAMILIES[family].callback(SITES)


def train(family, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    family, accumulated, _ = family.partition(", accumulated")
    model = Noisy(recurrent=family == "ZoneoutStates")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        limit_val_batches=0,
        accumulate_grad_batches=2 if accumulated else 1,
        callbacks=[RandomState(), callback_of(family), *callbacks],
    )
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks",
    "ignore:training stopped before the end of its last epoch",  # from the last step, nothing of the epoch is left to run
)
@pytest.mark.parametrize("family", [*FAMILIES, *UPDATES, *ACCUMULATED])
def test_killed_after_any_step(family, tmp_path):
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = train(family, every)
    points = sorted(tmp_path.glob("*.ckpt"))
    assert len(points) == EPOCHS * (STEPS if "accumulated" not in family else (STEPS + 1) // 2)
    for point in points:
        again = train(family, ckpt_path=point)
        assert again.keys() == whole.keys()
        different = [name for name, value in again.items() if not torch.equal(value, whole[name])]
        assert not different, f"killed after {point.stem}: {different}"
