"""A step with a callback calls few functions of the package."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from toys import Toy, batches, train

import tying
from tying.callbacks import HardTying, SoftTying

PACKAGE = str(Path(tying.__file__).parent)
TIE = "encoder.0.weight ~ decoder.2.weight | o i -> i o"


class Count(pl.Callback):
    """Counts the calls of functions of the package in a step."""

    calls = 0

    def count(self, frame, event, _):
        self.calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            sys.setprofile(self.count)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sys.setprofile(None)


@pytest.mark.parametrize(
    ("callback", "limit"),
    [
        (lambda: SoftTying([TIE]), 50),
        (lambda: SoftTying([TIE], strength=0.0), 12),
        (lambda: HardTying(["encoder.0.bias ~ decoder.0.bias"]), 12),
    ],
    ids=["a soft tie", "of strength 0", "a hard tie"],
)
def test_a_step_calls_few_functions(callback, limit):
    counting = Count()
    train(Toy(), [callback(), counting], data=batches(6), max_epochs=1, log_every_n_steps=50)
    assert 0 < counting.calls <= limit
