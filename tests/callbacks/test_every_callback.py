"""The same questions to every callback, and to every function that changes a model: each list is built from the code."""

from __future__ import annotations

import inspect as python
import math
import sys
import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from families import FAMILIES, SITES, Trained
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from toys import train

import tying.callbacks
import tying.depth
import tying.hard
import tying.hashing
from tying import ConfigurationError, resolve
from tying.callbacks import (
    AnchorTying,
    Coupling,
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    MixtureTying,
    RandomState,
    RecurrentDepth,
    RelaxedTying,
    ResidualMerging,
    SoftTying,
    TemplateWeights,
    TyingCallback,
    TyingMonitor,
    UntiedBiases,
    WeightClustering,
    WeightHashing,
    ZoneoutStates,
)
from tying.callbacks.penalty import PenaltyCallback
from tying.callbacks.transform import ModelTransform
from tying.cli.inspect import inspect
from tying.depth import StochasticDepth
from tying.errors import NonFiniteError
from tying.hard import LowRankResidual, audit, tie
from tying.hashing import ModulusHash, hashes
from tying.soft import Huber, Schedule, gap

pytestmark = pytest.mark.filterwarnings("ignore:MixtureTying begins with")

NAMES = ["net.kernels.0.weight", "net.kernels.1.weight"]
TIES = [" ~ ".join(NAMES)]
# each callback on these weights, which a test may name
MAKERS = {
    SoftTying: lambda name=None, **more: SoftTying(TIES, **{"strength": 1.0, "name": name} | more),
    Coupling: lambda name=None, **more: Coupling(
        "net.kernels.0", "net.kernels.1", **{"alpha": 0.1, "examples": 20, "name": name} | more
    ),
    AnchorTying: lambda name=None, **more: AnchorTying(NAMES, **{"strength": 1.0, "name": name} | more),
    MixtureTying: lambda name=None, **more: MixtureTying(NAMES, 0.01, 4, name=name, **more),
    HardTying: lambda name=None: HardTying(TIES, name=name),
    RelaxedTying: lambda name=None: RelaxedTying(TIES, LowRankResidual(rank=2), name=name),
    LowRankWeights: lambda name=None: LowRankWeights(NAMES, rank=2),
    TemplateWeights: lambda name=None: TemplateWeights(NAMES, templates=1),
    GeneratedWeights: lambda name=None: GeneratedWeights(NAMES, 2, 3, 3),
    UntiedBiases: lambda name=None: UntiedBiases([name.replace("weight", "bias") for name in NAMES], [6]),
    WeightHashing: lambda name=None: WeightHashing(NAMES, 0.25),
    WeightClustering: lambda name=None: WeightClustering(NAMES, clusters=4),
    ResidualMerging: lambda name=None: ResidualMerging("net.blocks.*", StochasticDepth(0.75)),
    Looping: lambda name=None: Looping("net.blocks.*", passes=2),
    RecurrentDepth: lambda name=None: RecurrentDepth("net.blocks.*"),
    ZoneoutStates: lambda name=None: ZoneoutStates("net.lstms.*", cell=0.5, hidden=0.25),
}
FLATTENING = [pl.strategies.FSDPStrategy, pl.strategies.DeepSpeedStrategy]
ON_WEIGHTS = [
    kind for kind in MAKERS if kind not in (Looping, ResidualMerging, RecurrentDepth, UntiedBiases, ZoneoutStates)
]
PENALTIES = [kind for kind in MAKERS if issubclass(kind, PenaltyCallback)]
COMPUTING = [LowRankWeights, TemplateWeights, GeneratedWeights, WeightHashing, WeightClustering]
TRANSFORMS = [kind for kind in MAKERS if issubclass(kind, ModelTransform)]


def fit(model, callbacks, **options):
    return train(
        model,
        callbacks,
        data=model.train_dataloader(),
        **{"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0} | options,
    )


def test_every_callback_on_weights_is_asked():
    public = {getattr(tying.callbacks, name) for name in tying.callbacks.__all__}
    assert {kind for kind in public if issubclass(kind, TyingCallback)} == {TyingCallback, *MAKERS}


def functions_of(*arguments):
    """Return the public functions that take a model and one of these arguments, by name."""
    return {
        f"{room.__name__}.{name}": value
        for room in (tying.hard, tying.hashing, tying.depth, tying)
        for name in getattr(room, "__all__", ())
        if python.isfunction(value := getattr(room, name))
        and {"model"} < {*python.signature(value).parameters}
        and not {*arguments}.isdisjoint(python.signature(value).parameters)
    }


def call(function, model):
    """Call a function on the kernels of a model, with small numbers for the arguments that it requires."""
    names = [name.replace("weight", "bias") for name in NAMES] if function is tying.hard.untie_biases else NAMES
    given = {"model": model, "ties": TIES, "parameters": [*names], "name": NAMES[0], "example": torch.zeros(2, 6)}
    numbers = {"rank": 2, "templates": 1, "clusters": 4, "in_channels": 3, "out_channels": 3, "embedding": 2}
    return function(
        **{key: (given | numbers)[key] for key in python.signature(function).parameters if key in given | numbers}
    )


# functions that change weights
CHANGES = functions_of("ties", "parameters", "name")


# Lazy layers


class Lazy(Trained):
    def __init__(self):
        super().__init__()
        self.net.kernels[0], self.net.kernels[1] = nn.LazyConv2d(6, 1), nn.LazyConv2d(6, 1)


LAZY = r"'net\.kernels\.0\.(weight|bias)' has no shape yet, since its layer is lazy: call the model on a batch first"


@pytest.mark.parametrize("kind", [*ON_WEIGHTS, UntiedBiases])
def test_callbacks_name_the_lazy_weight_and_the_remedy(kind):
    with pytest.raises(ConfigurationError, match=rf"^{kind.__name__}: .*{LAZY}"):
        fit(Lazy(), [MAKERS[kind]()])


@pytest.mark.parametrize("kind", PENALTIES)
def test_callbacks_accept_lazy_layers_that_have_seen_a_batch(kind):
    model = Lazy()
    model(torch.zeros(2, 6))
    fit(model, [MAKERS[kind]()])


@pytest.mark.parametrize("function", CHANGES)
def test_functions_name_the_lazy_weight_and_the_remedy(function):
    with pytest.raises(ConfigurationError, match=LAZY):
        call(CHANGES[function], Lazy())


# Weights that are not finite


class Infinite(Trained):
    value = math.inf

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for kernel in self.net.kernels:
                kernel.weight[0, 0] = self.value


class NotANumber(Infinite):
    value = math.nan


@pytest.mark.parametrize(("model", "what"), [(Infinite, "infinity"), (NotANumber, "NaN")])
@pytest.mark.parametrize("kind", [*ON_WEIGHTS, UntiedBiases])
def test_callbacks_name_the_weight_that_is_not_finite(kind, model, what):
    told = rf"^{kind.__name__}: .*'net\.kernels\.0\.weight' holds {what}.*The initial weights are not finite: check"
    with pytest.raises(NonFiniteError, match=told):
        fit(model(), [MAKERS[kind]()])


@pytest.mark.parametrize(("model", "what"), [(Infinite, "infinity"), (NotANumber, "NaN")])
@pytest.mark.parametrize("function", CHANGES)
def test_functions_compute_nothing_from_weights_that_are_not_finite(function, model, what):
    module = model()
    if CHANGES[function] in (tie, resolve, tying.hard.untie_biases):  # they keep the source's values, or the weights
        call(CHANGES[function], module)
        assert not torch.isfinite(module.net.kernels[0].weight).all()
    else:
        with pytest.raises(NonFiniteError, match=rf"'net\.kernels\.0\.weight' holds {what}.*check what"):
            call(CHANGES[function], module)


def test_a_mean_is_not_taken_of_weights_that_are_not_finite():
    with pytest.raises(NonFiniteError, match=r"'net\.kernels\.0\.weight' holds NaN"):
        tie(NotANumber(), TIES, init="mean")


# Bare strings


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "parameters" in python.signature(kind).parameters])
def test_a_string_of_parameters_is_refused_with_the_list(kind):
    arguments = {
        LowRankWeights: {"rank": 2},
        TemplateWeights: {"templates": 1},
        UntiedBiases: {"input_size": [6]},
        AnchorTying: {"strength": 1.0},
    }
    with pytest.raises(ConfigurationError, match=r"parameters must be a list of patterns; write \['net\.\*'\]"):
        kind("net.*", **arguments.get(kind, {}))


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "ties" in python.signature(kind).parameters])
def test_a_string_of_ties_is_refused_with_the_list(kind):
    with pytest.raises(ConfigurationError, match=r"ties must be a list; write \['a ~ b'\]"):
        kind("a ~ b")


@pytest.mark.parametrize("function", CHANGES)
def test_functions_refuse_a_string_with_the_list(function):
    names = python.signature(CHANGES[function]).parameters
    argument = next((name for name in ("ties", "parameters") if name in names), None)
    if argument is None:  # one name
        return
    whole = {"model": Trained(), argument: "net.*", "rank": 2, "templates": 1, "example": torch.zeros(1, 6)}
    with pytest.raises(ConfigurationError, match=rf"{argument} must be a list.*; write \['net\.\*'\]"):
        CHANGES[function](**{name: whole[name] for name in names if name in whole})


@pytest.mark.parametrize("size", ["3, 32", [], [3, 0], [3.5], ["3"]])
def test_sizes_are_numbers(size):
    with pytest.raises(ConfigurationError, match="input_size must be that of one sample, such as"):
        UntiedBiases(["**.bias"], size)


# Mappings, as in YAML


def test_schedules_are_mappings_too():
    mapping = {"start": 0.0, "end": 1.0, "length": 10}
    for callback in (SoftTying(TIES, schedule=mapping), ResidualMerging("**", StochasticDepth(0.5), schedule=mapping)):
        assert callback.schedule == Schedule(0.0, 1.0, 10)
    for wrong in ({"begin": 0.0}, {"class_path": "tying.soft.Huber"}, {"class_path": "Schedul"}):
        with pytest.raises(ConfigurationError, match=r"^schedule(:| cannot be)"):
            SoftTying(TIES, schedule=wrong)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "schedule" in python.signature(kind).parameters])
@pytest.mark.parametrize("value", [3, "linear", Huber(0.1)])
def test_schedules_of_other_types_are_refused_with_the_remedy(kind, value):
    given = {"ties": TIES, "blocks": "**", "merge": StochasticDepth(0.5), "parameters": NAMES, "strength": 1.0}
    given |= {"first": "net.kernels.0", "second": "net.kernels.1", "alpha": 0.1, "schedule": value}
    with pytest.raises(ConfigurationError, match=r"schedule must be a tying\.soft\.Schedule, or a mapping"):
        kind(**{key: given[key] for key in python.signature(kind).parameters if key in given})


def test_a_hash_that_does_not_fit_is_named_with_weight_and_callback(monkeypatch):
    monkeypatch.setattr(hashes, "LARGEST_TABLE", 20)  # stands for 2³¹ − 1
    for scope, names in (("layer", r"'net\.kernels\.0\.weight'"), ("network", ", ".join(map(repr, NAMES)))):
        message = rf"^WeightHashing: {names}: .*the index must address .*: lower table_ratio, or use several tables"
        with pytest.raises(ConfigurationError, match=message):
            fit(Trained(), [WeightHashing(NAMES, 1.0, scope=scope)])


@pytest.mark.parametrize("path", ["Huber", "tying.soft.Huber", "tying.soft.penalties.Huber"])
def test_penalties_merges_and_hashes_are_mappings_too(path):
    assert SoftTying(TIES, penalty={"class_path": path, "init_args": {"delta": 0.5}}).penalty == Huber(0.5)
    merging = ResidualMerging("**", {"class_path": "StochasticDepth", "init_args": {"keep": 0.5}})
    assert (type(merging.merge), merging.merge.keep) == (StochasticDepth, 0.5)
    assert WeightHashing(NAMES, hash={"class_path": "tying.hashing.ModulusHash"}).hash == ModulusHash()


@pytest.mark.parametrize(
    ("penalty", "told"),
    [
        ({"delta": 0.5}, r"penalty cannot be {'delta': 0\.5}: .*; write class_path, such as .*Huber.*, and init_args"),
        ({"class_path": "Hubre"}, r"penalty: class_path 'Hubre' is not a Penalty.*Nearest existing names: Huber"),
        ({"class_path": "tying.soft.Schedule"}, "class_path 'tying.soft.Schedule' is not a Penalty"),
        ({"class_path": "Huber", "init_args": {"dleta": 1}}, "penalty cannot be .*dleta"),
        (["l2"], "unknown penalty"),
    ],
)
def test_mappings_that_describe_nothing(penalty, told):
    with pytest.raises(ConfigurationError, match=told):
        SoftTying(TIES, penalty=penalty)


# Names


STATEFUL = {  # every callback that saves a state, and the argument by which two of a class differ
    **{kind: (MAKERS[kind], "name", ["one", "two"]) for kind in PENALTIES},
    ResidualMerging: (
        lambda blocks: ResidualMerging(blocks, StochasticDepth(0.75), "uniform"),
        "blocks",
        ["net.blocks.0", "net.blocks.1"],
    ),
    Looping: (lambda blocks: Looping(blocks, passes=2), "blocks", ["net.blocks.0", "net.blocks.1"]),
    ZoneoutStates: (
        lambda modules: ZoneoutStates(modules, cell=0.5, hidden=0.25),
        "modules",
        ["net.lstms.0", "net.lstms.1"],
    ),
    RelaxedTying: (
        lambda name: RelaxedTying(
            ["net.first.weight ~ net.second.weight"] if name == "two" else TIES, LowRankResidual(rank=2), name=name
        ),
        "name",
        ["one", "two"],
    ),
    RandomState: (RandomState, None, []),
    TyingMonitor: (TyingMonitor, None, []),
}


def test_every_stateful_callback_is_asked():
    public = {getattr(tying.callbacks, name) for name in tying.callbacks.__all__}
    stateful = {k for k in public if issubclass(k, pl.Callback) and k.state_dict is not pl.Callback.state_dict}
    assert stateful == STATEFUL.keys()


@pytest.mark.parametrize("kind", STATEFUL)
def test_two_of_a_class_that_would_save_one_state_are_refused_with_the_remedy(kind):
    make, argument, values = STATEFUL[kind]
    cases = [((value,), f" with {argument}={value!r}: give each its own {argument}, or") for value in values]
    if argument == "name":
        cases.append(((None,), " with name=None: give each its own name, or"))
    for arguments, told in cases or [((), ":")]:
        with pytest.raises(
            ConfigurationError, match=rf"^{kind.__name__}: 2 callbacks are {kind.__name__}{told} leave all but one out$"
        ):
            fit(Trained(), [make(*arguments), make(*arguments)])


@pytest.mark.parametrize("kind", STATEFUL)
def test_keys_of_states_have_the_distinguishing_argument_alone(kind):
    make, argument, values = STATEFUL[kind]
    callbacks = [make(value) for value in values] or [make()]
    fit(Trained(), callbacks)
    expected = [f"{kind.__name__}{ {argument: value} }" for value in values] or [kind.__name__]
    assert [callback.state_key for callback in callbacks] == expected


# The line at the start

LINES = {
    SoftTying: "1 group, 2 weights, strength 1; gap 0.69",
    Coupling: "2 groups, 4 weights, strength 81 over 20 examples; gap 0.95",
    AnchorTying: "2 weights, strength 1, anchor initial",
    MixtureTying: f"2 weights: {', '.join(NAMES)}; strength 0.01 over 20 examples, 4 components, from epoch 0 on",
    HardTying: f"{NAMES[1]} is now {NAMES[0]} (with the latter's values); before, they differed (largest gap 0.",
    RelaxedTying: f"{', '.join(NAMES)} share 1 weight, and differ by rank 2 each",
    LowRankWeights: f"2 weights of rank 2: {', '.join(NAMES)}",
    TemplateWeights: f"2 weights from 1 template a shape: {', '.join(NAMES)}",
    GeneratedWeights: f"2 weights generated from embeddings of 2: {', '.join(NAMES)}",
    UntiedBiases: "2 weights with an entry for each position: net.kernels.0.bias, net.kernels.1.bias",
    WeightHashing: "2 weights (72 values) have 2 tables with a total of 18 slots (ratio 0.25)",
    WeightClustering: f"2 weights, each of 4 values from epoch 0 on: {', '.join(NAMES)}",
    ResidualMerging: "2 blocks, net.blocks.0: StochasticDepth(keep=0.875",
    Looping: "2 passes through net.blocks.0 to net.blocks.1",
    RecurrentDepth: "1 recurrent block: net.blocks.0 (2 steps)",
    ZoneoutStates: "2 LSTMs with zoneout, cell=0.5, hidden=0.25: net.lstms.0, net.lstms.1",
    TyingMonitor: "0 tied groups; no gap to log",
    RandomState: "the random generators of each process are saved in checkpoints",
}
# it prints a table; they act in tests; it needs another model
WITHOUT_LINE = {tying.callbacks.TyingSummary, tying.callbacks.Unrolling, tying.callbacks.BoundaryPlot}
WITHOUT_LINE |= {tying.callbacks.SlopeAnnealing, TyingCallback}


def test_every_callback_is_asked_for_its_line():
    public = {getattr(tying.callbacks, name) for name in tying.callbacks.__all__}
    assert {kind for kind in public if issubclass(kind, pl.Callback)} == LINES.keys() | WITHOUT_LINE


@pytest.mark.parametrize("kind", LINES)
def test_each_callback_says_one_line_when_training_starts(kind, caplog):
    class Listen(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            lines.extend(message for message in caplog.messages if message.startswith(kind.__name__))

    lines = []
    fit(Trained(), [MAKERS.get(kind, kind)(), Listen()], limit_train_batches=1)
    assert [line[: len(kind.__name__ + LINES[kind]) + 2] for line in lines] == [f"{kind.__name__}: {LINES[kind]}"]


@pytest.mark.parametrize("kind", PENALTIES)
def test_lines_have_the_name_of_the_callback(kind, caplog):
    fit(Trained(), [MAKERS[kind]("one")], limit_train_batches=1)
    assert f"{kind.__name__} one: {LINES[kind]}" in caplog.messages


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"strength": 1e-3}, "strength 0.001; gap"),
        ({"strength": math.inf, "update": "proximal"}, "strength inf; gap"),
        ({"schedule": Schedule(0.0, 1.0, 500)}, "strength 1, times 0 to 1 in 500 steps; gap"),
        ({"schedule": Schedule(1.0, 0.5, 1, "cosine", "epoch")}, "strength 1, times 1 to 0.5 in 1 epoch; gap"),
    ],
)
def test_the_line_of_soft_ties_has_strength_and_schedule(more, told):
    assert MAKERS[SoftTying](**more).describe(Trained()) == f"1 group, 2 weights, {told} 0.69"


# Queries

QUERIES = {
    "affected": lambda callback, model: callback.affected(model),
    "monitored": lambda callback, model: callback.monitored(model),
    "replaced": lambda callback, model: callback.replaced(model),
    "selects": lambda callback, model: callback.selects("net.first.weight"),
    "is_same": lambda callback, model: callback.is_same(callback),
    "is_needed": lambda callback, model: callback.is_needed(model),
    "layer_importances": lambda callback, model: callback.layer_importances({}),
    "check_conflicts": lambda callback, model: callback.check_conflicts(model, []),
    "check_groups": lambda callback, model: callback.check_groups([]),
    "check_fits": lambda callback, model: callback.check_fits("net.first.weight", model.net.first.weight),
    "state_dict": lambda callback, model: callback.state_dict(),
    "audit": lambda callback, model: audit(model),
    "properties": lambda callback, model: [getattr(callback, name) for name in properties(callback)],
    "is_applied": lambda callback, model: callback.is_applied(model),
    "changed": lambda callback, model: callback.changed(model),
    "describe": lambda callback, model: callback.describe(model),
    "value": lambda callback, model: callback.value(),
    "selected": lambda callback, model: (
        callback.parameters and not callback.is_applied(model) and callback.selected(model)
    ),
}
# all other public methods, but for Lightning's hooks
COMMANDS = {"apply", "apply_among", "change", "prepare", "monitor", "build_penalties", "add_gradients", "on_step"}
COMMANDS |= {"adopt", "begin", "restore_structure", "follow_names"}  # of other callbacks, or of configure_model
CHECKS = {"check_finite", "check_optimizers"}  # raise errors during training


def properties(callback):
    return [name for name, value in python.getmembers_static(type(callback)) if isinstance(value, property)]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_method_is_a_query_or_a_command(kind):
    methods = {name for name, _ in python.getmembers(kind, python.isfunction) if name[0] != "_"}
    own = {name for name in methods if not hasattr(pl.Callback, name)} - {"check"}  # a former name
    assert own <= QUERIES.keys() | COMMANDS | CHECKS


def contents(value, known):
    """Return all that a value holds, as deep as our classes go, by value; modules and parameters by identity."""
    if id(value) in known:
        return "known"
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.tolist()
    if isinstance(value, dict):
        return {key: contents(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [contents(item, known) for item in value]
    if type(value).__module__.startswith("tying.") and not isinstance(value, nn.Module):
        known.add(id(value))
        return {key: contents(item, known) for key, item in vars(value).items()}
    return id(value) if isinstance(value, nn.Module) else repr(value)


def snapshot(callback, model):
    modules = [(name, type(m), id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    values = {name: value.tolist() for name, value in model.state_dict().items()}
    return modules, parameters, values, contents(callback, set()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("moment", ["fresh", "after setup", "after fit"])
@pytest.mark.parametrize("kind", MAKERS)
def test_queries_change_nothing(kind, moment):
    callback, model = MAKERS[kind](), Trained()
    if kind is UntiedBiases:
        callback.input_size = [6]
    if moment == "after setup" and isinstance(callback, ModelTransform):
        callback.apply(model)
    if moment == "after fit":
        fit(model, [callback])
    for query, ask in QUERIES.items():
        described = moment != "fresh" or not isinstance(callback, ModelTransform)  # what it has changed
        if (described or query != "describe") and (query in ("audit", "properties") or hasattr(callback, query)):
            before = snapshot(callback, model)
            ask(callback, model)
            assert snapshot(callback, model) == before, query


@pytest.mark.parametrize("kind", MAKERS)
def test_inspect_changes_nothing(kind, capsys):
    callback, model = MAKERS[kind](), Trained()
    before = snapshot(callback, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about scales
        inspect(model, [callback])
    assert kind.__name__ in capsys.readouterr().out
    assert snapshot(callback, model) == before


@pytest.mark.parametrize("kind", ON_WEIGHTS)
def test_a_query_on_another_model_is_about_that_model(kind):
    callback = MAKERS[kind]()
    expected = [*callback.affected(Trained())]
    fit(Trained(), [callback])
    other = Trained()
    affected = callback.affected(other)
    assert [*affected] == expected
    assert {id(weight) for weight in affected.values()} <= {id(weight) for weight in other.parameters()}


# Two callbacks on one weight


@pytest.mark.parametrize("second", ON_WEIGHTS)
@pytest.mark.parametrize("first", ON_WEIGHTS)
def test_two_callbacks_on_one_weight(first, second):
    callbacks = [MAKERS[first]("one"), MAKERS[second]("two")]
    pulls = {SoftTying, Coupling, AnchorTying, MixtureTying}
    together = {first, second} <= pulls or {first, second} <= {HardTying, AnchorTying} or first is second is HardTying
    together |= {first, second} == {HardTying, MixtureTying}  # one weight is pulled once
    together |= first is second in {*TRANSFORMS} - {RelaxedTying}  # equal callbacks are one, unless names differ
    together |= first is HardTying and second in COMPUTING  # a tied weight is computed once
    model = Trained()
    if together:
        fit(model, callbacks)
        if HardTying in (first, second):
            assert torch.equal(model.net.kernels[0].weight, model.net.kernels[1].weight)
            assert second in COMPUTING or model.net.kernels[0].weight is model.net.kernels[1].weight
        return
    with pytest.raises(
        ConfigurationError, match=r"both act on 'net\.kernels\.[01]\.weight': .*\. Leave the weight to one"
    ):
        fit(model, callbacks)
    with pytest.raises(ConfigurationError) as told:
        fit(Trained(), callbacks)
    assert all(callback.label in str(told.value) for callback in callbacks)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [RelaxedTying, LowRankWeights, TemplateWeights, GeneratedWeights, WeightHashing])
def test_an_anchor_of_all_parameters_holds_a_computed_weight(kind):
    model = Trained()
    callback = MAKERS[kind]()
    callback.apply(model)
    before = [kernel.weight.detach().clone() for kernel in model.net.kernels]
    anchor = AnchorTying(["net.kernels"], strength=math.inf, update="proximal")
    fit(model, [callback, anchor])
    for kernel, weight in zip(model.net.kernels, before, strict=True):
        assert torch.equal(kernel.weight, weight)


def test_a_rule_of_patterns_that_excludes_is_no_conflict():
    model = Trained()
    fit(model, [LowRankWeights([NAMES[0]], rank=2), MixtureTying(["net.kernels.*", "!net.kernels.0"], 0.01, 4)])
    fit(Trained(), [LowRankWeights(["net.first.weight"], rank=2), SoftTying(["net.kernels.0 ~ net.kernels.1"])])


# A weight in several groups of an optimizer


class Grouped(Trained):
    """Gives each kernel a parameter group, or an optimizer, of its own."""

    optimizers_made = 1

    def configure_optimizers(self):
        groups = [{"params": [*kernel.parameters()]} for kernel in self.net.kernels]
        if self.optimizers_made == 1:
            return torch.optim.SGD(groups, lr=0.1)
        self.automatic_optimization = False
        return [torch.optim.SGD([group], lr=0.1) for group in groups]

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        return None


class Separate(Grouped):
    optimizers_made = 3


SHARING = {
    HardTying: lambda: HardTying(TIES),
    RelaxedTying: MAKERS[RelaxedTying],
    TemplateWeights: lambda: TemplateWeights(NAMES, templates=1),
    GeneratedWeights: lambda: GeneratedWeights(NAMES, 2, 3, 3),
    WeightHashing: lambda: WeightHashing(NAMES, 0.25, scope="network"),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("model", [Grouped, Separate])
def test_a_shared_weight_in_several_groups_is_named_with_its_tie(kind, model):
    module, callback = model(), SHARING.get(kind, MAKERS[kind])()
    if kind not in SHARING:
        fit(module, [callback])
        return
    told = rf"{kind.__name__} made net\.kernels\.0\..* = net\.kernels\.1\..* one parameter\. Build the optimizers from self"
    with pytest.raises(ValueError, match=told):
        fit(module, [callback])


def test_audit_names_the_tie_of_a_weight_that_stands_twice():
    model = Trained()
    tie(model, TIES)
    optimizers = [torch.optim.SGD(kernel.parameters(), lr=0.1) for kernel in model.net.kernels]
    told = [problem for problem in audit(model, optimizers).problems if "twice" in problem]
    assert told[0].startswith("net.kernels.0.weight = net.kernels.1.weight occurs twice in the optimizers")


# Infinite strength and averages of weights

AVERAGES = {
    "WeightAveraging": lambda: WeightAveraging(),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "EMA that never begins": lambda: EMAWeightAveraging(update_starting_at_step=1000),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}
INFINITE = {
    "SoftTying": (lambda: MAKERS[SoftTying](strength=math.inf, update="proximal"), True),
    "Coupling": (lambda: MAKERS[Coupling](alpha=0.0), True),
    "AnchorTying": (lambda: MAKERS[AnchorTying](strength=math.inf, update="proximal"), False),
    "AnchorTying's head": (lambda: MAKERS[AnchorTying](head_strength=math.inf, update="proximal"), False),
}


@pytest.mark.filterwarnings("ignore:AnchorTying. after 10 steps")  # a network of zeros has no gradients
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("case", INFINITE)
def test_averages_of_weights_keep_an_infinite_strength(case, average, order):
    make, ties = INFINITE[case]
    model, initial = Trained(), Trained()
    fit(model, [make(), AVERAGES[average]()][::order], max_epochs=2)
    if ties:
        assert [gap(group.tensors()) for group in resolve(model, TIES)] == [0.0]
    elif "head" in case:
        assert not any(p.any() for name, p in model.named_parameters() if not name.endswith(tuple(NAMES)))
    else:
        for name in NAMES:
            torch.testing.assert_close(model.get_parameter(name), initial.get_parameter(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average", ["EMA", "SWA"])
def test_a_resumed_average_keeps_an_infinite_strength(average, tmp_path):
    def callbacks():
        return [MAKERS[SoftTying](strength=math.inf, update="proximal"), AVERAGES[average]()]

    fit(Trained(), callbacks(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    model = Trained()
    train(
        model,
        callbacks(),
        data=model.train_dataloader(),
        max_epochs=3,
        limit_val_batches=0,
        ckpt_path=tmp_path / "a.ckpt",
    )
    assert [gap(group.tensors()) for group in resolve(model, TIES)] == [0.0]


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_the_first_step_begins_with_equal_weights_also_in_a_warm_up(start):
    class Warm(Trained):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: start + step / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def training_step(self, batch, batch_idx):
            gaps.append([gap(group.tensors()) for group in resolve(self, TIES)])
            return super().training_step(batch, batch_idx)

    gaps = []
    fit(Warm(), [MAKERS[SoftTying](strength=math.inf, update="proximal")])
    assert len(gaps) == 10
    assert Counter(map(tuple, gaps)) == {(0.0,): 10}


# Odd models


class Complex(Trained):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(6, 6, dtype=torch.complex64, generator=generator) for _ in range(2))
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def loss(self, batch):
        return super().loss(batch) + (self.first.abs() + self.second.abs()).mean()


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_complex_weights_are_pulled_by_the_squared_distance(update):
    model, free = Complex(), Complex()
    fit(free, [])
    fit(model, [SoftTying(["first ~ second"], strength=1.0, update=update)])
    assert (model.first - model.second).norm() < 0.9 * (free.first - free.second).norm()


@pytest.mark.parametrize("penalty", ["l1", Huber(0.1)])
def test_penalties_on_real_weights_refuse_complex_ones(penalty):
    told = rf"^SoftTying: 'first' is complex, and {'L1' if penalty == 'l1' else 'Huber'} takes real weights: use 'l2'"
    with pytest.raises(ConfigurationError, match=told):
        fit(Complex(), [SoftTying(["first ~ second"], penalty=penalty)])


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (
            lambda: MixtureTying(["first"]),
            "^MixtureTying: 'first' is complex, and a mixture takes real weights: exclude",
        ),
        (
            lambda: WeightClustering(["first"], 2),
            r"^WeightClustering: 'first' is torch\.complex64, and only real",
        ),
        (
            lambda: SoftTying(["first ~ net.first.weight"]),
            "^SoftTying: first, net.first.weight: some are complex and some",
        ),
    ],
)
def test_complex_weights_are_refused_where_only_real_ones_make_sense(callback, told):
    with pytest.raises(ConfigurationError, match=told):
        fit(Complex(), [callback()])


@pytest.mark.parametrize("kind", [LowRankWeights, TemplateWeights, GeneratedWeights])
def test_integers_are_refused(kind):
    model = Trained()
    model.net.kernels[0].weight = nn.Parameter(torch.ones(6, 6, 1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ConfigurationError, match=rf"^{kind.__name__}: 'net\.kernels\.0\.weight' is torch\.int8, and only real"
    ):
        fit(model, [MAKERS[kind]()])


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind, dtype):
    if kind is not UntiedBiases:
        fit(Trained().to(dtype), [MAKERS[kind]()])


@pytest.mark.parametrize("kind", ON_WEIGHTS)
def test_frozen_weights(kind):
    model = Trained()
    model.net.kernels.requires_grad_(False)
    before = [kernel.weight.clone() for kernel in model.net.kernels]
    if kind is MixtureTying:
        with pytest.raises(ConfigurationError, match=r"no single optimizer trains net\.kernels\.0\..*: unfreeze"):
            fit(model, [MAKERS[kind]()])
        return
    fit(model, [MAKERS[kind]()]) if kind not in (SoftTying, Coupling, AnchorTying) else warned(model, kind)
    if issubclass(kind, PenaltyCallback):
        assert all(torch.equal(kernel.weight, weight) for kernel, weight in zip(model.net.kernels, before, strict=True))
    assert not any(parameter.requires_grad for parameter in model.net.kernels[2].parameters())


def warned(model, kind):
    with pytest.warns(UserWarning, match="no optimizer trains any weight tied to net.kernels.0.weight"):
        fit(model, [MAKERS[kind]()])


def test_families_cover_the_callbacks():
    assert {*FAMILIES} == {kind.__name__ for kind in MAKERS} - {"UntiedBiases"}
    assert SITES.alike == "net.kernels.*.weight"


@pytest.mark.parametrize("strategy", FLATTENING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
def test_strategies_with_flat_weights_are_refused(kind, strategy):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.__class__ = type("Flat", (strategy,), {})
    message = f"{kind.__name__} does not support Flat, which replaces weights by parts .*: use ModelParallelStrategy"
    with pytest.raises(ConfigurationError, match=message):
        MAKERS[kind]().setup(trainer, Trained(), "fit")


@pytest.mark.parametrize(
    "kind", [kind for kind in MAKERS if issubclass(kind, PenaltyCallback)], ids=lambda k: k.__name__
)
def test_a_step_of_plain_weights_takes_no_detour_for_sharded_ones(kind):
    class Watch(pl.Callback):
        called: set[str] = set()  # noqa: RUF012  # of this test

        def on_before_backward(self, *_):
            sys.setprofile(lambda frame, event, _: self.called.add(frame.f_code.co_filename))

        def on_train_batch_end(self, *_):
            sys.setprofile(None)

    train(Trained(), [Watch(), MAKERS[kind]()], max_epochs=1)
    assert any(path.endswith("callbacks/penalty.py") for path in Watch.called)
    assert not any(path.endswith("weights/sharding.py") for path in Watch.called)
