import copy
import json
import pickle
from itertools import chain
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from families import SITES, Trained
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from namespaces_run import CALLBACKS, MIXINS
from toys import STRENGTH, TIES, Toy, batches, same, train

from tying import ConfigurationError, mixins
from tying.callbacks import (
    HardTying,
    LowRankWeights,
    RandomState,
    ResidualMerging,
    SoftTying,
    TyingMonitor,
    WeightHashing,
)
from tying.callbacks.transform import ModelTransform
from tying.cli import main, parse
from tying.cli.bake import export
from tying.cli.inspect import inspect
from tying.depth import HMLSTM, Residual, StochasticDepth, extract
from tying.hard import bake, tied
from tying.mixins import HardTyingMixin, SoftTyingMixin, TyingMixin

pytestmark = pytest.mark.filterwarnings("ignore:MixtureTying begins with")


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


# The same questions to every mixin


class Plain(Trained):
    """A model in which every callback finds what to act on."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn = HMLSTM(6, 2, layers=2)
        self.initial = copy.deepcopy(self.state_dict())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


# at the top level of this module, to be pickled
MODELS = {
    name: type(f"Model{name}", (getattr(mixins, name), Plain), {attribute: value, "__module__": __name__})
    for name, (attribute, value) in MIXINS.items()
}
globals().update({model.__name__: model for model in MODELS.values()})
SINGLE = [name for name in MODELS if name != "TyingMixin"]
DISTINGUISHED = [name for name in SINGLE if CALLBACKS[name.removesuffix("Mixin")]().distinguished_by]
TRANSFORMS = [
    name for name in MODELS if any(isinstance(c, ModelTransform) for c in MODELS[name]().configure_callbacks())
]

# the callbacks without which a state dict does not load, or means other weights
NEEDED = {name: name.removesuffix("Mixin") for name in SINGLE if name in TRANSFORMS and name != "HardTyingMixin"}
NEEDED |= {"WeightClusteringMixin": "WeightClustering", "TyingMixin": "ResidualMerging"}


def callbacks_like(name):
    """Return new callbacks, equal to those that a mixin adds."""
    return copy.deepcopy(MIXINS[name][1]) if name == "TyingMixin" else [CALLBACKS[name.removesuffix("Mixin")]()]


def fit(model, callbacks=(), **options):
    torch.manual_seed(0)
    options = {"data": model.train_dataloader(), "max_epochs": 2, "limit_val_batches": 0} | options
    return train(model, callbacks, **options)


def equal(a, b):
    """Return whether the states of two models have the same keys and bitwise equal values."""
    states = a.state_dict(), b.state_dict()
    return [*states[0]] == [*states[1]] and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def predicted(model):
    torch.manual_seed(0)
    return model.eval()(torch.linspace(-1, 1, 12).view(2, 6))


def states(callbacks):
    """Return the states of callbacks, tensors too, as a string."""
    return str([callback.state_dict() for callback in callbacks if not isinstance(callback, RandomState)])


def test_there_is_a_mixin_for_every_callback():
    public = {name for name in vars(mixins) if name.endswith("Mixin")} - {"Mixin"}
    assert public == MODELS.keys()  # tests/test_lightning_namespace.py compares them with the callbacks


@pytest.mark.parametrize("name", SINGLE)
def test_the_docstring_shows_the_attribute(name):
    mixin, (attribute, _) = getattr(mixins, name), MIXINS[name]
    lines = mixin.__doc__.splitlines()
    assert f"        >>> class Model({name}):" in lines
    assert any(line.startswith(f"        ...     {attribute} = {{") for line in lines)
    assert f"``{attribute}``" in lines[0]
    assert (mixin.__module__, mixin.__qualname__) == ("tying.mixins", name)


class SaveAt(pl.Callback):
    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", MODELS)
def test_a_mixin_trains_as_its_callbacks_and_resumes_bitwise(name, tmp_path):
    mixed, resumed, configured = MODELS[name](), MODELS[name](), Plain()
    generators = [] if name == "RandomStateMixin" else [RandomState()]
    given = callbacks_like(name)
    fit(mixed, [*generators, SaveAt(0, tmp_path / "a.ckpt")])
    fit(configured, [*generators, *given])
    fit(resumed, generators, ckpt_path=tmp_path / "a.ckpt")
    assert equal(mixed, configured)
    assert equal(mixed, resumed)
    assert states(mixed.configure_callbacks()) == states(resumed.configure_callbacks()) == states(given)
    assert not same(mixed.net.kernels, Plain().net.kernels)  # something was trained


class Overrides(Plain):
    """Overrides all hooks of mixins without ``super()``."""

    def configure_callbacks(self):
        return []

    def configure_model(self):
        pass

    def on_save_checkpoint(self, checkpoint):
        pass

    on_load_checkpoint = on_save_checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_a_mixin_may_be_the_last_base(name):
    attribute, value = MIXINS[name]
    last = type("Last", (Overrides, getattr(mixins, name)), {attribute: value})
    results = []
    for model in (MODELS[name](), last(), type("Below", (last,), {})()):
        model.configure_model()
        checkpoint = {"state_dict": {}}
        model.on_save_checkpoint(checkpoint)
        callbacks = [type(callback) for callback in model.configure_callbacks()]
        results.append(
            (callbacks, [*checkpoint["state_dict"]], [type(module).__name__ for module in model.modules()][1:])
        )
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_loads_without_a_trainer(name, tmp_path):
    model = MODELS[name]()
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    loaded = MODELS[name].load_from_checkpoint(tmp_path / "a.ckpt")
    assert equal(loaded, model)
    assert [type(module).__name__ for module in loaded.modules()] == [
        type(module).__name__ for module in model.modules()
    ]
    assert len([*loaded.parameters()]) == len([*model.parameters()])
    assert torch.equal(predicted(loaded), predicted(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_baked(name, tmp_path):
    model = MODELS[name]()
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    cli = SimpleNamespace(model=MODELS[name](), trainer=pl.Trainer(logger=False, enable_checkpointing=False))
    export(tmp_path / "a.ckpt", tmp_path / "a.pt", ["config.yaml"], lambda configs: cli)
    weights, baked = torch.load(tmp_path / "a.pt", weights_only=True), bake(model)
    assert weights.keys() == baked.keys()
    assert all(torch.equal(weights[key], baked[key]) for key in baked)


@pytest.mark.parametrize("name", MODELS)
def test_without_the_mixin_an_error_names_it(name, tmp_path):
    model = MODELS[name]()
    fit(model, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    if name in NEEDED:
        need = f"needs {NEEDED[name]} of tying.mixins.{name}"
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{need}"'):
            Plain.load_from_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{need}"'):
            fit(Plain(), max_epochs=1, ckpt_path=tmp_path / "a.ckpt")
    else:
        loaded = Plain.load_from_checkpoint(tmp_path / "a.ckpt")
        assert equal(loaded, model)
    assert not [key for key in model.state_dict() if key.startswith("needs ")]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_of_a_mixin_loads_wherever_its_callback_is(name, tmp_path):
    model, path = MODELS[name](), tmp_path / "a.ckpt"
    fit(model, max_epochs=1).save_checkpoint(path)
    configured = Plain()
    fit(configured, callbacks_like(name), max_epochs=1, ckpt_path=path)  # with the Trainer's callback
    assert equal(configured, model)
    loaded = MODELS[name].load_from_checkpoint(path)
    for other in (loaded, copy.deepcopy(loaded), torch.nn.Sequential(loaded)):  # by hand
        prefix = "0." if isinstance(other, torch.nn.Sequential) else ""
        weights = torch.load(path, weights_only=True)["state_dict"]
        other.load_state_dict({f"{prefix}{key}": value for key, value in weights.items()})
    checkpoint = torch.load(path, weights_only=True)  # as from before checkpoints said what they need
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("needs ")}
    torch.save(checkpoint, path)
    assert equal(MODELS[name].load_from_checkpoint(path), model)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_resume_with_a_mixin(tmp_path):
    whole, resumed = MODELS["WeightHashingMixin"](), MODELS["WeightHashingMixin"]()
    fit(whole, [EMAWeightAveraging(decay=0.5), SaveAt(0, tmp_path / "a.ckpt")])
    fit(resumed, [EMAWeightAveraging(decay=0.5)], ckpt_path=tmp_path / "a.ckpt")
    assert equal(whole, resumed)


def test_hooks_of_checkpoints_may_be_overridden_without_super(tmp_path):
    class Model(MODELS["WeightClusteringMixin"]):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.mine = checkpoint["mine"]

    model = Model()
    fit(model, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    loaded = Model.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.mine == 3
    assert equal(loaded, model)
    with pytest.raises(RuntimeError, match=r"needs WeightClustering of tying\.mixins\.WeightClusteringMixin"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt")


def test_merges_that_a_model_leaves_out_knowingly(tmp_path):
    """Without strict loading, Lightning warns of what the checkpoint needs, and the model computes plain sums."""
    model = MODELS["ResidualMergingMixin"]()
    fit(model, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="in the checkpoint: .*needs ResidualMerging of tying.mixins.ResidualMerging"):
        plain = Plain.load_from_checkpoint(tmp_path / "a.ckpt", strict=False)
    assert equal(plain, model)
    assert not torch.equal(predicted(plain), predicted(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", MODELS)
def test_copies_train_apart(name, duplicate):
    model = MODELS[name]()
    fit(model, max_epochs=1)
    copied, before = duplicate(model), copy.deepcopy(model.state_dict())
    callbacks, others = model.configure_callbacks(), copied.configure_callbacks()
    counted = states(callbacks)
    assert equal(copied, model)
    assert states(others) == counted
    assert not {*map(id, callbacks)} & {*map(id, others)}
    fit(copied, max_epochs=1)
    assert states(callbacks) == counted
    assert [*before] == [*model.state_dict()]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not same(copied.net.kernels, model.net.kernels)


@pytest.mark.parametrize("name", MODELS)
def test_instances_share_nothing(name):
    first, second = MODELS[name](), MODELS[name]()
    fresh = states(second.configure_callbacks())
    attribute, value = MIXINS[name]
    given = {*map(id, chain(value if name == "TyingMixin" else value.values()))}
    fit(first, max_epochs=1)
    for callback in chain(first.configure_callbacks(), second.configure_callbacks()):
        parts = [callback, *vars(callback).values()]
        assert not given & {id(part) for part in parts if isinstance(part, list | dict | torch.nn.Module | pl.Callback)}
    assert not {*map(id, first.configure_callbacks())} & {*map(id, second.configure_callbacks())}
    assert states(second.configure_callbacks()) == fresh
    assert getattr(MODELS[name], attribute) is value


@pytest.mark.parametrize("name", MODELS)
def test_hooks_may_be_overridden_without_super(name):
    class Model(MODELS[name]):
        def configure_callbacks(self):
            return EarlyStopping("loss")

        def configure_model(self):
            pass

    added = [type(callback) for callback in callbacks_like(name)]
    assert [type(callback) for callback in Model().configure_callbacks()] == [EarlyStopping, *added]
    model = Model()
    before = [type(module) for module in model.modules()], [*model.state_dict()], len([*model.parameters()])
    model.configure_model()
    model.configure_model()  # once
    after = [type(module) for module in model.modules()], [*model.state_dict()], len([*model.parameters()])
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    changed = before != after or shapes != {key: value.shape for key, value in Plain().state_dict().items()}
    assert changed == (name in TRANSFORMS)


@pytest.mark.parametrize("name", MODELS)
def test_a_mixin_replaces_the_trainers_callback_that_is_the_same(name):
    model, given = MODELS[name](), callbacks_like(name)
    message = rf"the (\w+) of Model{name} replaces the \1 of the Trainer, which has the same \w+: leave one of them out"
    with pytest.warns(UserWarning, match=message) as caught:
        callbacks = fit(model, given, max_epochs=1, limit_train_batches=1).callbacks
    assert len([w for w in caught if "of the Trainer" in str(w.message)]) == len(given)
    assert {*map(id, model.configure_callbacks())} <= {*map(id, callbacks)}
    assert not {*map(id, given)} & {*map(id, callbacks)}


def differing(name):
    """Return a model with a mixin and a callback for the Trainer, of one class, which act on different weights."""
    kind, (attribute, arguments) = type(callbacks_like(name)[0]), MIXINS[name]
    part = "bias" if name == "UntiedBiasesMixin" else "weight"
    first, second = {
        "name": ["mixed", "given"],
        "blocks": ["net.blocks.*", "net.kernels.*"]
        if name == "RecurrentDepthMixin"
        else ["net.blocks.0", "net.blocks.1"],
        "modules": ["net.lstms.0", "net.lstms.1"],
        "parameters": [[f"net.kernels.{index}.{part}"] for index in (0, 1)],
    }[kind.distinguished_by]
    model = type("Model", (MODELS[name],), {attribute: arguments | {kind.distinguished_by: first}})()
    others = {"ties": ["net.kernels.*.weight"]} if name == "RelaxedTyingMixin" else {}  # no weight is relaxed twice
    return model, kind(**arguments | others | {kind.distinguished_by: second})


@pytest.mark.parametrize("name", DISTINGUISHED)
def test_a_mixin_stays_beside_the_trainers_callback_that_differs(name):
    model, given = differing(name)
    callbacks = [given]
    for _ in range(2):  # two runs
        callbacks = fit(model, callbacks, max_epochs=1, limit_train_batches=1).callbacks
        added = model.configure_callbacks()[-1]
        assert [callback for callback in callbacks if type(callback) is type(given)] == [given, added]


@pytest.mark.parametrize("name", DISTINGUISHED)
def test_inspect_keeps_the_callbacks_that_training_keeps(name, capsys):
    model, given = differing(name)
    if name in ("SoftTyingMixin", "CouplingMixin", "HardTyingMixin"):  # groups of their own
        given.ties = SoftTying(["net.kernels.*.bias"]).ties
    inspect(model, [given], json=True)
    document = json.loads(capsys.readouterr().out)
    assert [entry["callback"] for entry in document["callbacks"]] == [type(given).__name__] * 2
    assert {entry["name"] for entry in document["callbacks"]} == {given.name, model.configure_callbacks()[0].name}
    assert document["replaced"] == []


def test_an_overridden_hook_that_calls_super_adds_the_callback_once():
    class Model(SoftTyingMixin, Trained):
        soft_tying: ClassVar = {"ties": [TIE]}

        def configure_callbacks(self):
            return [*super().configure_callbacks(), EarlyStopping("loss")]

    class Below(Model):
        def configure_callbacks(self):
            return super().configure_callbacks()

    assert [type(callback) for callback in Below().configure_callbacks()] == [SoftTying, EarlyStopping]


# TyingMixin

TIE = " ~ ".join(SITES.pair)
BIASES = "net.kernels.*.bias"


class Several(TyingMixin, Plain):
    tying: ClassVar = [
        SoftTying([TIE], strength=1.0, name="weights"),
        SoftTying([BIASES], strength=2.0, name="biases"),
        LowRankWeights(["net.kernels.0.weight"], rank=2),
        WeightHashing(["net.kernels.1.weight"], 0.25),
        WeightHashing(["net.kernels.2.weight"], 0.5),
        ResidualMerging("net.blocks.*", StochasticDepth(0.5)),
    ]


class More(Several):
    tying: ClassVar = [*Several.tying, HardTying(["net.blocks.*.branch.weight"])]


def labels(callbacks):
    return [callback.label for callback in callbacks]


@pytest.mark.parametrize("kind", [Several, More])
def test_several_callbacks_of_a_class(kind, tmp_path):
    mixed, configured = kind(), Plain()
    trainer = fit(mixed)
    fit(configured, copy.deepcopy(kind.tying))
    assert equal(mixed, configured)
    assert labels(trainer.callbacks) == labels(kind.tying)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "a.ckpt")
    assert equal(loaded, mixed)
    assert torch.equal(predicted(loaded), predicted(mixed))
    assert [callback.state_dict() for callback in mixed.configure_callbacks()[:2]] == [{"steps": {0: 20}}] * 2
    assert [callback.state_dict() for callback in kind.tying[:2]] == [{"steps": {}}] * 2  # unchanged


def test_the_list_may_be_set_in_init():
    class Model(TyingMixin, Plain):
        def __init__(self, strength):
            super().__init__()
            self.tying = [SoftTying([TIE], strength=strength)]

    models = [Model(1.0), Model(2.0)]
    assert [model.configure_callbacks()[0].strength for model in models] == [1.0, 2.0]
    assert [callback for model in models for callback in model.configure_callbacks() if callback in model.tying] == []


@pytest.mark.parametrize("tying", [None, SoftTying([TIE]), [SoftTying], {"ties": [TIE]}, "a ~ b"])
def test_the_list_holds_callbacks(tying):
    model = type("Model", (TyingMixin, Plain), {} if tying is None else {"tying": tying})()
    for hook in (model.configure_callbacks, model.configure_model):
        with pytest.raises(ConfigurationError, match="Model inherits TyingMixin and must set tying to a list of callb"):
            hook()


def test_two_of_a_name_are_refused_with_the_remedy():
    class Model(TyingMixin, Plain):
        tying: ClassVar = [SoftTying([TIE]), SoftTying([BIASES])]

    with pytest.raises(
        ConfigurationError, match=r"^SoftTying: 2 callbacks are SoftTying with name=None: give each its own name, or"
    ):
        fit(Model())


def test_an_error_names_the_callback_and_changes_nothing():
    class Model(TyingMixin, Plain):
        tying: ClassVar = [WeightHashing(["net.first.weight"]), LowRankWeights(["net.first.weight"], rank=2)]

    model = Model()
    with pytest.raises(ConfigurationError, match=r"^LowRankWeights and WeightHashing both act on 'net\.first\.weight'"):
        model.configure_model()


def test_the_list_beside_other_mixins_and_the_trainer():
    class Model(HardTyingMixin, Several):
        hard_tying: ClassVar = {"ties": ["net.blocks.*.branch.weight"]}

        def configure_callbacks(self):
            return [EarlyStopping("loss")]

    given = [SoftTying([TIE], name="given"), WeightHashing(["rnn.below.0.weight"]), SoftTying([TIE], name="weights")]
    with pytest.warns(
        UserWarning, match=r"^the SoftTying weights of Model replaces .* has the same name: .* its own name$"
    ):
        trainer = fit(Model(), [*given, TyingMonitor()], max_epochs=1)
    ours = [callback for callback in trainer.callbacks if not isinstance(callback, EarlyStopping)]
    assert labels(ours) == ["TyingMonitor", "SoftTying given", "WeightHashing", *labels(Several.tying), "HardTying"]
    assert given[2] not in trainer.callbacks


def test_other_callbacks_of_lightning():
    class Model(TyingMixin, Plain):
        tying: ClassVar = [EarlyStopping("loss"), SoftTying([TIE])]

    given = EarlyStopping("other")
    callbacks = fit(Model(), [given], max_epochs=1).callbacks
    assert [type(callback) for callback in callbacks] == [EarlyStopping, SoftTying]
    assert given not in callbacks


def test_the_command_line_trains_a_model_with_a_list(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_listed.py").write_text(
        "from tying.callbacks import HardTying, TyingMonitor\n"
        "from tying.mixins import TyingMixin\nfrom tying.models import Autoencoder\n"
        "class Listed(TyingMixin, Autoencoder):\n"
        "    tying = [HardTying(['encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o']), TyingMonitor()]\n"
    )
    options = ["max_epochs=1", "accelerator=cpu", "logger=false", "enable_checkpointing=false", "log_every_n_steps=1"]
    cli = parse(
        [
            "--seed_everything=0",
            "--model=mine_listed.Listed",
            "--model.sizes=[6, 5, 4]",
            *(f"--trainer.{option}" for option in options),
        ]
    )
    cli.trainer.fit(cli.model, batches(), batches())
    assert len(tied(cli.model)) == 2
    assert float(cli.trainer.callback_metrics["tying/gap"]) == 0.0


class Deep(TyingMixin, pl.LightningModule):
    def __init__(self, callback):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(*(Residual(torch.nn.Linear(6, 6)) for _ in range(4)))
        self.tying = [callback, TyingMonitor()]

    def predict_step(self, batch, batch_idx):
        return self.layers(batch[0])


@pytest.mark.parametrize(
    "callback",
    [
        ResidualMerging("layers.*", StochasticDepth(0.5), [0.9, 0.8, 0.7, 0.6]),
        ResidualMerging("layers.{2..3}", StochasticDepth(0.5), whole=True),
        WeightHashing(["layers.*.branch.weight"], 0.5),
        LowRankWeights(["layers.*.branch.weight"], 2),
        HardTying(["layers.0.branch.weight ~ layers.3.branch.weight"]),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_trainer_leaves_the_extracted_copy_as_it_is(callback):
    model = Deep(callback)
    model.configure_model()
    shallow = extract(model, "layers.*")
    kinds, x = [type(module).__name__ for module in shallow.modules()], next(iter(batches()))[0]
    expected = shallow.layers.eval()(x)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert torch.equal(trainer.predict(shallow, batches())[0], expected)
    assert [type(module).__name__ for module in shallow.modules()] == kinds
    assert [type(callback) for callback in shallow.configure_callbacks()] == [TyingMonitor]
    for other in (model, extract(Deep(callback), "layers.*", keep=1.0)):  # not changed before it was extracted
        assert [type(added) for added in other.configure_callbacks()] == [type(callback), TyingMonitor]
