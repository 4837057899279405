"""LSTMs that are trained with zoneout."""

import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toys import Toy, same, train

from tying import ConfigurationError
from tying.callbacks import (
    HardTying,
    LowRankWeights,
    RandomState,
    ResidualMerging,
    SoftTying,
    WeightHashing,
    ZoneoutStates,
)
from tying.cli.bake import export
from tying.cli.inspect import inspect
from tying.depth import StochasticDepth, ZoneoutLSTM, loop, remove_zoneout, zone_out
from tying.hard import audit
from tying.mixins import ZoneoutStatesMixin


class Recurrent(Toy):
    def __init__(self, lazily=False):
        super().__init__()
        self.lstm = None if lazily else self.make_lstm()

    def make_lstm(self):
        torch.manual_seed(1)
        return nn.LSTM(6, 6, num_layers=2)

    def configure_model(self):
        if self.lstm is None:
            self.lstm = self.make_lstm()

    def loss(self, batch):
        return super().loss([self.lstm(batch[0].unsqueeze(1))[0].squeeze(1)])


class Inherits(ZoneoutStatesMixin, Recurrent):
    zoneout_states = {"modules": "lstm", "cell": 0.5, "hidden": 0.25}  # noqa: RUF012


def callback(cell=0.5, hidden=0.25):
    return ZoneoutStates("lstm", cell, hidden)


def fit(model, *callbacks, **options):
    """Train with the same masks, whatever has been drawn before."""
    return train(model, [*callbacks, Seed()], **{"max_epochs": 2} | options)


class Seed(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        if not trainer.global_step:
            torch.manual_seed(0)


@pytest.mark.parametrize("lazily", [False, True])
def test_callback_mixin_and_function_train_alike(lazily):
    by_callback, by_mixin, by_function, plain = Recurrent(lazily), Inherits(lazily), Recurrent(), Recurrent()
    zone_out(by_function, "lstm", cell=0.5, hidden=0.25)
    fit(by_callback, callback())
    fit(by_mixin)
    for model in (by_function, plain):
        fit(model)
    assert same(by_callback, by_function)
    assert same(by_mixin, by_function)
    assert not same(plain, by_function)
    assert [*by_callback.state_dict()] == [*plain.state_dict()]


def test_it_is_applied_once():
    model, transform = Recurrent(), callback()
    assert transform.is_applied(model) is False
    assert transform.apply(model) == transform.apply(model) == callback().apply(model) == 1
    assert transform.describe(model) == "1 LSTM with zoneout, cell=0.5, hidden=0.25: lstm"
    assert transform.affected(model) == {}
    assert callback(cell=0.4).is_applied(model) is False
    remove_zoneout(model)
    assert transform.is_applied(model) is False


def test_a_run_resumes_bitwise(tmp_path):
    once, resumed = Recurrent(), Recurrent()
    fit(once, callback(), RandomState())
    fit(Recurrent(), callback(), RandomState(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    fit(resumed, callback(), RandomState(), ckpt_path=tmp_path / "a.ckpt")
    assert same(resumed, once)


def test_checkpoints_of_the_mixin_load(tmp_path):
    model, x = Inherits(), torch.randn(4, 2, 6)
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    loaded = Inherits.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.eval().lstm(x)[0], model.eval().lstm(x)[0])
    with pytest.raises(RuntimeError, match=r"needs ZoneoutStates of tying\.mixins\.ZoneoutStatesMixin"):
        Recurrent.load_from_checkpoint(tmp_path / "a.ckpt")


def test_other_rates_and_a_missing_callback_are_told(tmp_path):
    fit(Recurrent(), callback(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    warning = "ZoneoutStates: the checkpoint was trained with cell=0.5 and hidden=0.25; now they are 0.4 and 0.25"
    with pytest.warns(UserWarning, match=re.escape(warning)):
        fit(Recurrent(), callback(cell=0.4), ckpt_path=tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"callbacks .*ZoneoutStates\{'modules': 'lstm'\}"):
        fit(Recurrent(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_bake_says_that_a_plain_lstm_has_no_averages(rate, tmp_path, capsys):
    model = Recurrent()
    fit(model, callback(cell=rate, hidden=0.0), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "a.pt", [], lambda configs: None)
    printed = capsys.readouterr().out
    assert ("trained with zoneout, cell=0.5 and hidden=0\n(ZoneoutStates{" in printed) == bool(rate)
    Recurrent().load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))


def test_inspect_says_which_layers_have_zoneout(capsys):
    model = Recurrent()
    inspect(model, [callback()])
    printed = capsys.readouterr().out
    assert "ZoneoutStates: 1 LSTM with zoneout, cell=0.5, hidden=0.25: lstm" in printed
    assert type(model.lstm) is nn.LSTM


FURTHER = {
    "HardTying": lambda: HardTying(["lstm.weight_ih_l0 ~ lstm.weight_hh_l0"]),
    "WeightHashing": lambda: WeightHashing(["lstm.weight_*"], 0.5, index="stored"),
    "LowRankWeights": lambda: LowRankWeights(["lstm.weight_*"], 2),
    "SoftTying": lambda: SoftTying(["lstm.weight_ih_l0 ~ lstm.weight_hh_l0"], strength=0.1),
}


@pytest.mark.parametrize("name", FURTHER)
def test_other_callbacks_act_on_its_weights_in_any_order(name):
    models = [Recurrent(), Recurrent()]
    for model, order in zip(models, (1, -1), strict=True):
        torch.manual_seed(2)
        fit(model, *[callback(), FURTHER[name]()][::order])
        assert isinstance(model.lstm, ZoneoutLSTM)
        assert audit(model).problems == ()
    assert same(*models)
    alone = Recurrent()
    fit(alone, callback())
    assert not torch.equal(models[0].lstm.weight_hh_l0, alone.lstm.weight_hh_l0)


def test_mistakes():
    with pytest.raises(ConfigurationError, match=r"^cell must be in \[0, 1\], not 1\.5"):
        callback(cell=1.5)
    with pytest.raises(ConfigurationError, match=r"^hidden must be in \[0, 1\], not -1"):
        callback(hidden=-1)
    with pytest.raises(ConfigurationError, match=r"^ZoneoutStates: modules: pattern 'net' matches no module"):
        fit(Recurrent(), ZoneoutStates("net", 0.5, 0.5))
    with pytest.raises(
        ConfigurationError, match=r"^ZoneoutStates: modules: the Sequential 'encoder' is not an nn\.LSTM"
    ):
        fit(Recurrent(), ZoneoutStates(["lstm", "encoder"], 0.5, 0.5))
    zoned = Recurrent()
    zone_out(zoned, "lstm", cell=0.5, hidden=0.125)  # not as the callback would
    with pytest.raises(ConfigurationError, match=r"^ZoneoutStates: modules: the ZoneoutLSTM 'lstm' has zoneout alre"):
        fit(zoned, callback())
    looped = Recurrent()
    loop(looped, "lstm", passes=2)
    with pytest.raises(ConfigurationError, match=r"^ZoneoutStates: modules: the LoopedLSTM 'lstm' is in a loop"):
        fit(looped, callback())
    merging = ResidualMerging("lstm", StochasticDepth(0.5), "uniform")
    with pytest.raises(ConfigurationError, match=r"^ZoneoutStates: modules: the MergedLSTM 'lstm' is in a loop or has"):
        fit(Recurrent(), merging, callback())
