"""A weight that becomes NaN ends training before what it is tied to follows."""

import math

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying.callbacks import AnchorTying, HardTying, LowRankWeights, MixtureTying, SoftTying, WeightHashing
from tying.callbacks.finite import FiniteWatch
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


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize(("model", "told"), [(Breaks, "5 NaN and 0 infinite"), (Overflows, "0 NaN and 5 infinite")])
def test_a_soft_tie_does_not_spread_it(model, told, update):
    toy = model()
    with pytest.raises(
        NonFiniteError,
        match=rf"SoftTying: 'encoder.0.bias' holds {told} entries of 5. encoder.0.bias is tied to decoder.0.bias. Lower",
    ):
        train(toy, [SoftTying(BIASES, strength=0.1, update=update)])
    assert toy.global_step == 3  # it is not done
    assert not torch.isfinite(toy.encoder[0].bias).any()
    assert all(torch.isfinite(p).all() for name, p in toy.named_parameters() if name != "encoder.0.bias")


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (AnchorTying(["encoder.0.*"], strength=0.1), "AnchorTying: 'encoder.0.bias' holds 5 NaN"),
        (MixtureTying(["**.bias"], components=3), "MixtureTying: 'encoder.0.bias' holds 5 NaN"),
        (HardTying(BIASES), "HardTying: 'encoder.0.bias' holds 5 NaN"),
        (LowRankWeights(["encoder.0.weight"], rank=2), "LowRankWeights: 'encoder.0.bias' holds 5 NaN"),
        (WeightHashing(["encoder.0.weight"], 0.5), "WeightHashing: 'encoder.0.bias' holds 5 NaN"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_every_family_tells_it(callback, told):
    with pytest.raises(NonFiniteError, match=told):
        train(Breaks(), [callback])


def test_a_large_half_is_no_overflow():
    watch = FiniteWatch("SoftTying")
    watch.look({"a": nn.Parameter(torch.full((4096,), 6e4, dtype=torch.float16)), "b": nn.Parameter(torch.ones(2))})


def test_what_is_not_trained_is_left_alone():
    FiniteWatch("AnchorTying").look({"a": nn.Parameter(torch.tensor(math.nan), requires_grad=False)})


def test_on_a_device_the_look_before_is_told(monkeypatch):
    """Not to wait for the device; told here as if it were one."""
    watch, weight = FiniteWatch("SoftTying"), nn.Parameter(torch.tensor([math.nan]))
    monkeypatch.setattr(FiniteWatch, "waits", staticmethod(lambda tensor: True))
    watch.look({"a": weight})
    with pytest.raises(NonFiniteError, match="'a' holds 1 NaN"):
        watch.look({"a": weight})
