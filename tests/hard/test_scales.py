"""The order of a tie's sides: the source's values win, and a warning names the other order where they are too large."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toys import train

from tying.callbacks import HardTying
from tying.hard import tie
from tying.lightning_namespace import pl
from tying.mixins import HardTyingMixin
from tying.models import SequenceModel

BAD, GOOD = "embedding.weight ~ head.weight", "head.weight ~ embedding.weight"
WARNING = (
    r"'head.weight' takes the values of 'embedding.weight', whose scale is \d+ times as large: .*"
    "Name 'head.weight' first to begin with its values, as in 'head.weight ~ embedding.weight'"
)


class Language(pl.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(80, 256), nn.Linear(256, 80, bias=False)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.embedding(batch)), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    return DataLoader(torch.arange(8), batch_size=4)


def test_the_order_decides_the_first_loss():
    losses = {}
    for order in (BAD, GOOD):
        model = SequenceModel(nn.LSTM(256, 256), size=256, task="language", num_classes=128)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tie(model, [order])
        text = torch.randint(128, (8, 21))
        with torch.no_grad():
            losses[order] = float(F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))
    assert losses[GOOD] < 5.5 < losses[BAD]


def test_tie_warns_of_the_order_that_begins_too_large():
    with pytest.warns(UserWarning, match=WARNING):
        tie(Language(), [BAD])
    tie(Language(), [GOOD])
    tie(Language(), [BAD], init="mean")


@pytest.mark.parametrize(("ratio", "warns"), [(4.9, False), (5.1, True), (1.0, False), (0.01, False)])
@pytest.mark.parametrize("ties", [["0.weight ~ 1.weight"], ["0.weight ~ 1.weight | o i -> i o"], ["*.weight"]])
def test_five_times_are_too_large(ratio, warns, ties):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(ratio * model[1].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tie(model, ties)
        tie(model, ties)  # of one scale now
    assert len(caught) == warns
    assert not warns or "'1.weight' takes the values of '0.weight', whose scale is 5 times" in str(caught[0].message)


@pytest.mark.parametrize(
    "change", [lambda m: m.to("meta"), lambda m: nn.init.zeros_(m.head.weight)], ids=["meta", "zero"]
)
def test_weights_without_a_scale_are_not_compared(change):
    model = Language()
    change(model)
    tie(model, [BAD])


def test_the_callback_warns_when_a_run_begins(tmp_path):
    with pytest.warns(UserWarning, match=f"HardTying: {WARNING}"):
        trainer = train(Language(), [HardTying([BAD])], data=data(), max_epochs=1)
    trainer.save_checkpoint("last.ckpt")
    train(Language(), [HardTying([BAD])], data=data(), max_epochs=2, ckpt_path="last.ckpt")
    train(Language(), [HardTying([GOOD])], data=data(), max_epochs=1)


def test_the_mixin_warns_when_a_run_begins_alone(tmp_path):
    class Tied(HardTyingMixin, Language):
        hard_tying = {"ties": [BAD]}  # noqa: RUF012

    with pytest.warns(UserWarning, match=f"HardTying: {WARNING}"):
        trainer = train(Tied(), data=data(), max_epochs=1)
    trainer.save_checkpoint("last.ckpt")
    Tied.load_from_checkpoint("last.ckpt")
    train(Tied(), data=data(), max_epochs=2, ckpt_path="last.ckpt")
