"""A weight that becomes NaN ends training before what it is tied to follows."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, batches, train

from tying.callbacks import (
    AnchorTying,
    Coupling,
    HardTying,
    LowRankWeights,
    MixtureTying,
    SoftTying,
    WeightClustering,
    WeightHashing,
)
from tying.callbacks.finite_check import FiniteCheck, Magnitudes
from tying.errors import NonFiniteError

BIASES = ["encoder.0.bias ~ decoder.0.bias"]


class Breaks(Toy):
    """The gradient of one bias is NaN, or infinite, in the fourth step."""

    wrong = math.nan

    def loss(self, batch):
        loss = super().loss(batch)
        return loss + self.wrong * self.encoder[0].bias.sum() if self.global_step == 3 else loss


class Overflows(Breaks):
    wrong = math.inf


class Slow:
    """An event of a device that has always more to do."""

    def query(self):
        return False

    def synchronize(self):
        pass


@pytest.fixture
def _on_a_device(monkeypatch):
    of = Magnitudes.of.__func__

    def later(cls, tensors, sharded=False):
        measured = of(cls, tensors, sharded)
        return Magnitudes(measured.names, measured.largest, Slow())

    monkeypatch.setattr(Magnitudes, "of", classmethod(later))


def fails(model, callback, told, **options):
    with pytest.raises(NonFiniteError, match=told):
        train(model, [callback] if not isinstance(callback, list) else callback, **options)


def finite(model):
    return {name for name, p in model.named_parameters() if torch.isfinite(p).all()}


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize(("model", "what"), [(Breaks, "NaN"), (Overflows, "infinity")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_soft_tie_does_not_spread_it(model, what, update, accumulate):
    toy = model()
    told = rf"SoftTying: 'encoder.0.bias' holds {what}; the gradient of 'encoder.0.bias' held {what}; "
    told += "encoder.0.bias is tied to decoder.0.bias. Lower"
    fails(toy, SoftTying(BIASES, 0.1, update=update), told, accumulate_grad_batches=accumulate)
    assert toy.global_step == 3  # the fourth is not done
    assert finite(toy) == {name for name, _ in toy.named_parameters()} - {"encoder.0.bias"}


def test_whose_gradient_it_was_is_told_although_clipping_spreads_it():
    toy = Breaks()
    told = r"'encoder.0.bias' holds NaN, .*; the gradient of 'encoder.0.bias' held NaN\. Lower"
    fails(toy, SoftTying(BIASES, 0.1), told, gradient_clip_val=1.0)
    assert finite(toy) == set()  # by clipping


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_on_a_device_it_does_not_spread_either(update, tmp_path):
    toy = Breaks()
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    told = "'encoder.0.bias' holds NaN; .* encoder.0.bias is tied to decoder.0.bias"
    fails(toy, [SoftTying(BIASES, 0.1, update=update), saves], told, enable_checkpointing=True)
    assert finite(toy) == {name for name, _ in toy.named_parameters()} - {"encoder.0.bias"}
    assert {path.name for path in tmp_path.iterdir()} == {f"step={step}.ckpt" for step in (1, 2, 3)}


@pytest.mark.usefixtures("_on_a_device")
def test_on_a_device_the_last_step_is_told_too():
    fails(Breaks(), SoftTying(BIASES, 0.1), "'encoder.0.bias' holds NaN", max_steps=4)


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (AnchorTying(["encoder.0.*"], strength=0.1), "AnchorTying: 'encoder.0.bias' holds NaN"),
        (MixtureTying(["**.bias"], components=3), "MixtureTying: 'encoder.0.bias' holds NaN"),
        (Coupling("encoder.0.bias", "decoder.0.bias", alpha=0.5), "Coupling: 'encoder.0.bias' holds NaN"),
        (HardTying(BIASES), "HardTying: 'encoder.0.bias' holds NaN"),
        (LowRankWeights(["encoder.0.weight"], rank=2), "LowRankWeights: 'encoder.0.bias' holds NaN"),
        (WeightHashing(["encoder.0.weight"], 0.5), "WeightHashing: 'encoder.0.bias' holds NaN"),
        (WeightClustering(["encoder.0.weight"], clusters=4), "WeightClustering: 'encoder.0.bias' holds NaN"),
        (SoftTying(BIASES, 0.1, harden_below=1.0), "SoftTying: 'encoder.0.bias' holds NaN"),
        (SoftTying(BIASES, 0.1, name="mine"), "SoftTying mine: 'encoder.0.bias' holds NaN"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_every_family_tells_it(callback, told):
    fails(Breaks(), callback, told, data=batches(2))  # in the second epoch


def test_what_is_pulled_by_nothing_ends_as_without():
    train(Breaks(), [SoftTying(BIASES, 0.0)])


def test_a_callback_goes_on_after_it(tmp_path):
    callback = SoftTying(BIASES, 0.1)
    fails(Breaks(), callback, "holds NaN")
    train(Toy(), [callback])


def test_a_scaler_that_skips_a_step_is_no_fault():
    check, weight = FiniteCheck("SoftTying"), nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), math.inf)
    check.weights = {"a": weight}
    check.measure_gradients(torch.optim.SGD([weight], 0.1), scaled=True)
    check.measure()
    check.report()


class Skips(Toy):
    """The gradient of one bias is infinite in each step."""

    def loss(self, batch):
        return super().loss(batch) + math.inf * self.encoder[0].bias.sum()


@pytest.mark.parametrize("callback", [SoftTying(BIASES, 0.1), HardTying(BIASES)], ids=["soft", "hard"])
def test_an_infinite_gradient_that_clipping_hides_is_told_once(callback):
    options = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "max_steps": 4}
    with pytest.warns(UserWarning, match=r"the gradient of '\w+\.0\.bias' held infinity before it was clipped") as told:
        train(Skips(), [callback], **options)
    assert sum("before it was clipped" in str(one.message) for one in told) == 1


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_what_is_not_trained_is_looked_at_before_anything_is_pulled_to_it(update):
    toy = Toy()
    toy.decoder[0].bias.requires_grad_(False).fill_(math.nan)
    fails(
        toy, SoftTying(BIASES, 0.1, update=update), "SoftTying: 'decoder.0.bias' holds NaN; .*is tied to encoder.0.bias"
    )
    assert toy.global_step == 0
    assert finite(toy) == {name for name, _ in toy.named_parameters()} - {"decoder.0.bias"}


def test_an_anchor_is_looked_at_too(tmp_path):
    torch.save({**Toy().state_dict(), "encoder.0.bias": torch.full((5,), math.inf)}, tmp_path / "anchor.pt")
    callback = AnchorTying(["encoder.0.*"], 0.1, anchor=str(tmp_path / "anchor.pt"), update="proximal")
    fails(Toy(), callback, "AnchorTying: 'anchor of encoder.0.bias' holds infinity")


def test_a_callback_of_an_earlier_run_sees_the_first_step():
    callback = HardTying(BIASES)
    train(Toy(), [callback], max_steps=1)

    class AtOnce(Breaks):
        def loss(self, batch):
            return Toy.loss(self, batch) * math.nan

    fails(AtOnce(), callback, "HardTying: 'encoder.0.bias' holds NaN")


def test_no_checkpoint_holds_it_whoever_saves(tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fails(Breaks(), [Saves(), HardTying(BIASES)], "HardTying: 'encoder.0.bias' holds NaN")
    assert {path.name for path in tmp_path.iterdir()} == {"1.ckpt", "2.ckpt", "3.ckpt"}


def test_float64_is_no_overflow():
    check = FiniteCheck("SoftTying")
    check.weights = {"a": nn.Parameter(torch.tensor([1e300, 1e308, 1e308], dtype=torch.float64))}
    check.check()


def test_a_large_half_is_no_overflow():
    check = FiniteCheck("SoftTying")
    half, empty = torch.full((4096,), 6e4, dtype=torch.float16), torch.empty(0)
    check.weights = {name: nn.Parameter(value) for name, value in {"a": half, "b": torch.ones(2), "c": empty}.items()}
    check.measure()
    check.report()


def test_what_is_not_trained_is_left_alone():
    check = FiniteCheck("AnchorTying")
    check.weights = {"a": nn.Parameter(torch.tensor(math.nan), requires_grad=False)}
    check.measure()
    check.report()
