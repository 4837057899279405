import json
from typing import ClassVar

import pytest
import torch
from families import SITES, Trained
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from toys import STRENGTH, TIES, Toy, batches, same, train

from tying import ConfigurationError
from tying.callbacks import Coupling, HardTying, ResidualMerging, SoftTying, WeightHashing
from tying.cli import main
from tying.cli.inspect import inspect
from tying.depth import StochasticDepth
from tying.hard import tied
from tying.mixins import (
    CouplingMixin,
    HardTyingMixin,
    Mixin,
    ResidualMergingMixin,
    SoftTyingMixin,
    WeightHashingMixin,
)


class Inherits(SoftTyingMixin, Toy):
    soft_tying: ClassVar = {"ties": TIES, "strength": STRENGTH}


def test_the_mixin_equals_the_callback_bitwise():
    inherited, configured = Inherits(), Toy()
    train(inherited)
    train(configured, [SoftTying(TIES, strength=STRENGTH)])
    assert same(inherited, configured)
    assert not same(configured, Toy())


def test_the_mixin_keeps_counting_over_several_fits():
    model = Inherits()
    [callback] = model.configure_callbacks()
    trainer = train(model, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches())
    assert model.configure_callbacks() == [callback]
    assert callback.state_dict() == {"steps": {0: 20}}


def test_callbacks_of_other_bases_are_kept():
    class Stops(Toy):
        def configure_callbacks(self):
            return EarlyStopping("loss")

    class Both(SoftTyingMixin, Stops):
        soft_tying: ClassVar = {"ties": TIES}

    assert [type(callback) for callback in Both().configure_callbacks()] == [EarlyStopping, SoftTying]


def test_without_arguments():
    class Forgets(SoftTyingMixin, Toy):
        pass

    with pytest.raises(ConfigurationError, match="Forgets inherits SoftTyingMixin and must set soft_tying"):
        Forgets().configure_callbacks()


def test_with_wrong_arguments():
    class Errs(SoftTyingMixin, Toy):
        soft_tying: ClassVar = {"ties": TIES, "strengh": 1.0}

    with pytest.raises(ConfigurationError, match=r"Errs\.soft_tying: .*strengh"):
        Errs().configure_callbacks()


def test_the_hard_mixin_ties_also_without_a_trainer(tmp_path):
    class Hard(HardTyingMixin, Toy):
        hard_tying: ClassVar = {"ties": TIES}

    model = Hard()
    train(model).save_checkpoint(tmp_path / "a.ckpt")
    again = Hard.load_from_checkpoint(tmp_path / "a.ckpt")
    assert same(again, model)
    assert len(tied(again)) == 3
    plain, held = Toy.load_from_checkpoint(tmp_path / "a.ckpt").state_dict(), model.state_dict()
    assert all(torch.equal(plain[name], held[name]) for name in held)
    assert [type(callback) for callback in model.configure_callbacks()] == [HardTying]


def test_both_mixins():
    class Both(SoftTyingMixin, HardTyingMixin, Toy):
        hard_tying: ClassVar = {"ties": TIES[1:]}
        soft_tying: ClassVar = {"ties": TIES[:1]}

    model = Both()
    train(model, max_epochs=1)
    assert [type(callback) for callback in model.configure_callbacks()] == [HardTying, SoftTying]
    assert len(tied(model)) == 1


def test_hard_mixin_without_arguments():
    class Forgets(HardTyingMixin, Toy):
        pass

    with pytest.raises(ConfigurationError, match="Forgets inherits HardTyingMixin and must set hard_tying"):
        Forgets().configure_model()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_the_hard_mixin_goes_with_weight_averaging():
    """Lightning appends a module's callbacks; the model is tied by then."""

    class Hard(HardTyingMixin, Toy):
        hard_tying: ClassVar = {"ties": TIES}

    model = Hard()
    train(model, [EMAWeightAveraging(decay=0.5)])
    assert len(tied(model)) == 3


def test_the_hard_mixin_and_stochastic_weight_averaging():
    """It copies the model before Lightning calls configure_model; hence what the error advises."""

    class Late(HardTyingMixin, Toy):
        hard_tying: ClassVar = {"ties": TIES}

    class Early(Late):
        def __init__(self):
            super().__init__()
            self.configure_model()

    def averaging():
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)

    with pytest.raises(ConfigurationError, match=r"call self\.configure_model\(\) at the end of the module's __init__"):
        train(Late(), [averaging()], max_epochs=2)
    model = Early()
    train(model, [averaging()], max_epochs=3)
    assert len(tied(model)) == 3


def test_inspecting_a_model_that_ties_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_tied.py").write_text(
        "from tying.mixins import HardTyingMixin\nfrom tying.models import Autoencoder\n"
        "class Mine(HardTyingMixin, Autoencoder):\n"
        "    hard_tying = {'ties': ['encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o']}\n"
    )
    main(
        [
            "inspect",
            "--seed_everything=0",
            "--model=mine_tied.Mine",
            "--model.sizes=[8, 4, 2]",
            "--trainer.logger=false",
        ]
    )
    told = capsys.readouterr().out
    assert "With HardTying: 58 unique parameters, 98 counting each use; 160 bytes saved by sharing." in told
    assert "ONNX and safetensors store copies" in told


class Pair(SoftTyingMixin):
    """Creates its layers in ``configure_model``, and overrides ``configure_callbacks`` without ``super()``."""

    soft_tying: ClassVar = {"ties": ["a.weight ~ b.weight"]}

    def configure_model(self):
        super().configure_model()
        if not hasattr(self, "a"):
            self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def configure_callbacks(self):
        return []


def test_a_mixin_wraps_the_overrides_of_the_classes_below_it():
    class Tied(HardTyingMixin, Pair):
        hard_tying: ClassVar = {"ties": ["a.weight ~ b.weight"]}

    model = Tied()
    model.configure_model()
    assert model.a.weight is model.b.weight
    assert [type(callback).__name__ for callback in model.configure_callbacks()] == ["SoftTying", "HardTying"]


def test_a_mixin_without_arguments_is_refused_where_its_callback_is_needed():
    class Untied(SoftTyingMixin):
        pass

    Untied().configure_model()  # as in load_from_checkpoint
    with pytest.raises(ConfigurationError, match="must set soft_tying"):
        Untied().configure_callbacks()


TIE = " ~ ".join(SITES.pair)
# for each mixin: the class of its callback, the attribute with its arguments, and arguments without a name
MIXINS = {
    SoftTyingMixin: (SoftTying, "soft_tying", {"ties": [TIE], "strength": 1.0}),
    CouplingMixin: (Coupling, "coupling", {"first": SITES.twins[0], "second": SITES.twins[1], "alpha": 0.1}),
    HardTyingMixin: (HardTying, "hard_tying", {"ties": [TIE]}),
    WeightHashingMixin: (WeightHashing, "weight_hashing", {"parameters": [SITES.pair[0]], "table_ratio": 0.25}),
    ResidualMergingMixin: (
        ResidualMerging,
        "residual_merging",
        {"blocks": SITES.blocks, "merge": StochasticDepth(0.5)},
    ),
}
NAMED = [mixin for mixin, (kind, *_) in MIXINS.items() if kind in (SoftTying, Coupling, HardTying)]


def test_every_mixin_is_tested():
    assert {*Mixin.__subclasses__()} >= {*MIXINS}
    public = {mixin for mixin in Mixin.__subclasses__() if mixin.__module__ == "tying.mixins"}
    assert public == {*MIXINS}


def fits(model, callbacks=()):
    return train(model, callbacks, data=model.train_dataloader(), max_epochs=1, limit_val_batches=0).callbacks


@pytest.mark.parametrize("mixin", MIXINS)
def test_a_mixin_replaces_the_trainers_callback_of_its_name(mixin):
    kind, attribute, arguments = MIXINS[mixin]
    model = type("Model", (mixin, Trained), {attribute: arguments})()
    [mixed], given = model.configure_callbacks(), kind(**arguments)
    with pytest.warns(UserWarning, match=f"the {kind.__name__} of Model replaces the {kind.__name__} of the Trainer"):
        callbacks = fits(model, [given])
    assert mixed in callbacks
    assert given not in callbacks


@pytest.mark.parametrize("mixin", NAMED)
@pytest.mark.parametrize("runs", [1, 2])
def test_a_mixin_stays_beside_the_trainers_callback_of_another_name(mixin, runs):
    kind, attribute, arguments = MIXINS[mixin]
    model = type("Model", (mixin, Trained), {attribute: arguments | {"name": "mixed"}})()
    given = kind(**arguments, name="given")
    callbacks = [given]
    for _ in range(runs):
        callbacks = fits(model, callbacks)
    assert [callback.name for callback in callbacks if type(callback) is kind] == ["given", "mixed"]
    assert given in callbacks


@pytest.mark.parametrize("mixin", MIXINS)
def test_hooks_may_be_overridden_without_super(mixin):
    kind, attribute, arguments = MIXINS[mixin]

    class Model(mixin, Trained):
        def configure_callbacks(self):
            return EarlyStopping("loss")

        def configure_model(self):
            pass

    setattr(Model, attribute, arguments)
    assert [type(callback) for callback in Model().configure_callbacks()] == [EarlyStopping, kind]
    model = Model()
    before = [type(module) for module in model.modules()], [*model.state_dict()], len([*model.parameters()])
    model.configure_model()
    after = [type(module) for module in model.modules()], [*model.state_dict()], len([*model.parameters()])
    assert (before != after) == (mixin in (HardTyingMixin, WeightHashingMixin, ResidualMergingMixin))


def test_an_overridden_hook_that_calls_super_adds_the_callback_once():
    class Model(SoftTyingMixin, Trained):
        soft_tying: ClassVar = {"ties": [TIE]}

        def configure_callbacks(self):
            return [*super().configure_callbacks(), EarlyStopping("loss")]

    class Below(Model):
        def configure_callbacks(self):
            return super().configure_callbacks()

    assert [type(callback) for callback in Below().configure_callbacks()] == [SoftTying, EarlyStopping]


@pytest.mark.parametrize("mixin", NAMED)
def test_inspect_keeps_the_callbacks_that_training_keeps(mixin, capsys):
    kind, attribute, arguments = MIXINS[mixin]
    model = type("Model", (mixin, Trained), {attribute: arguments | {"name": "mixed"}})()
    others = (
        {"first": "net.kernels.0", "second": "net.kernels.1"} if kind is Coupling else {"ties": ["net.kernels.*.bias"]}
    )
    inspect(model, [kind(**arguments | others, name="given")], json=True)
    document = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in document["callbacks"]] == ["given", "mixed"]
    assert document["replaced"] == []
