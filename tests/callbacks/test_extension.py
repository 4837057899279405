"""Callbacks of a user: at most 15 lines in one file, named in YAML, inspected and trained like those of the package."""

import sys

import pytest
import torch
from toys import Toy, train

from tying.callbacks import HardTying, SoftTying, WeightClustering
from tying.cli import parse
from tying.cli.inspect import inspect
from tying.errors import ConfigurationError

DECAY = """
import torch
from tying.callbacks.penalty import PenaltyCallback
from tying.selection.resolve import select
from tying.soft import anchored

class Decay(PenaltyCallback):
    def __init__(self, parameters: list[str], strength: float = 1.0):
        super().__init__(strength, "proximal")
        self.parameters = parameters
    def affected(self, model):
        return select(model, self.parameters)
    def build_penalties(self, trainer, module):
        weights = self.affected(module)
        return [anchored(weights, {name: torch.zeros_like(weight) for name, weight in weights.items()})]
"""
ORTHOGONAL = """
from torch.nn.utils.parametrizations import orthogonal
from tying.callbacks.transform import ModelTransform
from tying.selection.resolve import select

class Orthogonal(ModelTransform):
    def __init__(self, parameters: list[str]):
        self.parameters = parameters
    def change(self, model):
        names = [*select(model, self.parameters)]
        for module in (model.get_submodule(name.rpartition(".")[0]) for name in names):
            orthogonal(module)
        return names
"""
YAML = """
seed_everything: 0
trainer:
  logger: false
  callbacks: {class_path: extension_here.NAME, init_args: {parameters: [encoder.*.weight]}}
model: {class_path: toys.Toy}
"""


@pytest.fixture(params=["Decay", "Orthogonal"])
def callback(request, tmp_path, monkeypatch):
    source = {"Decay": DECAY, "Orthogonal": ORTHOGONAL}[request.param]
    assert len(source.strip().splitlines()) <= 15
    (tmp_path / "extension_here.py").write_text(source)
    (tmp_path / "here.yaml").write_text(YAML.replace("NAME", request.param))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "extension_here", raising=False)
    [callback] = [one for one in parse(["--config=here.yaml"]).trainer.callbacks if type(one).__name__ == request.param]
    return callback


def test_a_callback_of_ones_own_trains(callback):
    model, plain = Toy(), Toy()
    train(model, [callback])
    train(plain)
    for layer, other in zip(model.encoder[::2], plain.encoder[::2], strict=True):
        weight = layer.weight.detach()
        if type(callback).__name__ == "Decay":
            assert weight.norm() < 0.9 * other.weight.norm()
        else:
            torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)


def test_a_callback_of_ones_own_is_inspected(callback, capsys):
    model = Toy()
    inspect(model, [callback])
    assert f"{type(callback).__name__}: 2 weights: encoder.0.weight, encoder.2.weight" in capsys.readouterr().out


def test_asking_changes_nothing(callback):
    tie = "encoder.0.weight ~ decoder.2.weight | o i -> i o"
    for one in (callback, SoftTying([tie]), HardTying([tie]), WeightClustering(["encoder.*.weight"], clusters=2)):
        model = Toy()
        attributes, names = dict(vars(one)), [name for name, _ in model.named_parameters()]
        assert {"encoder.0.weight"} <= one.affected(model).keys()
        assert dict(vars(one)) == attributes
        assert [name for name, _ in model.named_parameters()] == names
        assert vars(model).keys() == vars(Toy()).keys()


@pytest.mark.parametrize("first", [0, 1])
def test_callbacks_are_left_as_they_were_by_inspect(first):
    callbacks = [HardTying(["encoder.0.bias ~ decoder.0.bias"]), WeightClustering(["encoder.0.weight"], clusters=2)]
    callbacks = callbacks[first:] + callbacks[:first]
    before = [dict(vars(callback)) for callback in callbacks]
    inspect(Toy(), callbacks)
    assert [dict(vars(callback)) for callback in callbacks] == before


def test_a_pull_and_a_cluster_of_one_weight_exclude_each_other_in_any_order():
    callbacks = [SoftTying(["encoder.0.weight ~ decoder.2.weight | o i -> i o"], harden_below=0.1)]
    callbacks.append(WeightClustering(["encoder.0.weight"], clusters=2))
    for attached in (callbacks, callbacks[::-1]):
        for call in (train, inspect):
            with pytest.raises(ConfigurationError, match=r"ties too|(SoftTying|WeightClustering) and \w+ both act on"):
                call(Toy(), attached)


def test_a_checkpoint_of_codebooks_is_inspected(tmp_path, capsys):
    def clustering():
        return WeightClustering(["encoder.0.weight"], clusters=2)

    train(Toy(), [clustering()], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    inspect(Toy(), [clustering()], tmp_path / "a.ckpt")
    assert "WeightClustering: 1 weights: encoder.0.table" in capsys.readouterr().out


def test_the_former_name_of_a_check_still_works():
    with pytest.warns(DeprecationWarning, match="check is now called check_groups"):

        class Strict(SoftTying):
            def check(self, groups):
                raise ConfigurationError("strictly none")

    callback = Strict(["encoder.0.bias ~ decoder.0.bias"])
    with pytest.raises(ConfigurationError, match="strictly none"):
        callback.check_groups([])
    with pytest.warns(DeprecationWarning, match="check is now called check_groups"):
        SoftTying(callback.ties).check([])
