"""Hydra makes every callback; what it hands over, ListConfig and DictConfig, does not reach models and checkpoints."""

import hydra
import pytest
import torch
from families import SITES, Trained
from omegaconf import Container, OmegaConf

from tying import callbacks, resolve
from tying.hard import tie
from tying.lightning_namespace import pl

PAIR = f"{SITES.pair[0]} ~ {SITES.pair[1]}"
TIES = {
    "strings": [PAIR],
    "mappings": [{"source": SITES.pair[0], "target": SITES.pair[1], "exclude": ["net.blocks"]}],
    "objects": [{"_target_": "tying.Tie", "source": SITES.pair[0], "target": SITES.pair[1], "exclude": ["net.blocks"]}],
}
HASH = {"_target_": "tying.hashing.UniformHash", "seed": 1}
MERGE = {"_target_": "tying.depth.StochasticDepth", "keep": 0.75}
SCHEDULE = {"_target_": "tying.soft.Schedule", "start": 0.0, "end": 1.0, "length": 4}
ANNEAL = {"_target_": "tying.soft.Schedule", "start": 1.0, "end": 0.0, "length": 4}
RESIDUAL = {"_target_": "tying.hard.LowRankResidual", "rank": 2}
HUBER = {"_target_": "tying.soft.Huber", "delta": 0.5}
SYNAPTIC = {"_target_": "tying.callbacks.Synaptic", "damping": 0.2}
HEAD = {"head_strength": 0.1, "head": ["net.kernels"]}
ARGUMENTS = {
    "AnchorTying": {"parameters": ["net.**", "!net.kernels"], "strength": 0.1, "importance": SYNAPTIC, **HEAD},
    "BoundaryPlot": {},
    "Coupling": {"first": SITES.twins[0], "second": SITES.twins[1], "alpha": 0.5, "examples": 20},
    "GeneratedWeights": {"parameters": [SITES.alike], "embedding": 2, "in_channels": 3, "out_channels": 3},
    "HardTying": {"ties": [PAIR]},
    "Looping": {"blocks": [SITES.blocks], "passes": 3, "start": 0.25, "per_pass": "scale", "grow": 0.25},
    "LowRankWeights": {"parameters": [SITES.pair[0]], "rank": 2},
    "MixtureTying": {"parameters": [SITES.pair[0]], "components": 4, "rates": [1e-4, 3e-3, 3e-3]},
    "RandomState": {},
    "RecurrentDepth": {"blocks": [SITES.blocks]},
    "RelaxedTying": {"ties": [PAIR], "residual": RESIDUAL, "anneal": ANNEAL, "calibration": 2},
    "ResidualMerging": {"blocks": [SITES.blocks], "merge": MERGE, "keep_schedule": [0.9, 0.8], "schedule": SCHEDULE},
    "SlopeAnnealing": {},
    "SoftTying": {"ties": [PAIR], "schedule": SCHEDULE, "penalty": HUBER, "harden_below": 0.1},
    "TemplateWeights": {"parameters": [SITES.alike], "templates": 1},
    "TyingMonitor": {},
    "TyingSummary": {},
    "Unrolling": {"extra": [1, 2]},
    "UntiedBiases": {"parameters": ["net.kernels.*.bias"], "input_size": [6]},
    "WeightClustering": {"parameters": [SITES.pair[0]], "clusters": 4},
    "WeightHashing": {"parameters": [SITES.pair[0]], "table_ratio": 0.25, "hash": HASH},
    "ZoneoutStates": {"modules": [SITES.lstms], "cell": 0.5, "hidden": 0.25},
}
UNTRAINED = {"BoundaryPlot", "SlopeAnnealing", "Unrolling"}  # need other models


def from_hydra(name, **arguments):
    return hydra.utils.instantiate(
        OmegaConf.create({"_target_": f"tying.callbacks.{name}", **ARGUMENTS[name], **arguments})
    )


def containers(value, seen=None):
    """Return what is of OmegaConf in a value, in all its attributes and entries."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, torch.Tensor | str | bytes | int | float | type(None)):
        return []
    seen[id(value)] = value  # kept, so that no other object takes its identity
    if isinstance(value, Container):
        return [value]
    parts = [*getattr(value, "__dict__", {}).values()]
    if isinstance(value, dict):
        parts += [*value, *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts += [*value]
    return [found for part in parts for found in containers(part, seen)]


def test_every_callback_is_made():
    kinds = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), pl.Callback)}
    assert kinds - {"TyingCallback"} == ARGUMENTS.keys()


@pytest.mark.filterwarnings("ignore:MixtureTying begins", "ignore:training stopped before")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_hydra_makes_callbacks_of_plain_types(name):
    callback = from_hydra(name)
    assert type(callback) is getattr(callbacks, name)
    assert containers(callback) == []
    if name in UNTRAINED:
        return
    options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    model, trainer = Trained(), pl.Trainer(callbacks=[callback], **options)
    trainer.fit(model)
    assert containers(model) == []
    trainer.save_checkpoint("last.ckpt")
    assert containers(torch.load("last.ckpt", weights_only=True)) == []
    again = pl.Trainer(callbacks=[from_hydra(name)], **{**options, "max_epochs": 3})
    again.fit(Trained(), ckpt_path="last.ckpt", weights_only=True)


@pytest.mark.parametrize("form", TIES)
@pytest.mark.parametrize("name", ["SoftTying", "HardTying"])
def test_forms_of_ties(name, form):
    callback = from_hydra(name, ties=TIES[form])
    [tied] = callback.ties
    assert (tied.source, tied.target) == SITES.pair
    assert containers(callback) == []


@pytest.mark.parametrize("form", ["strings", "mappings"])
@pytest.mark.parametrize("wrap", [list, tuple, OmegaConf.create], ids=["list", "tuple", "ListConfig"])
def test_functions_take_sequences_and_mappings(wrap, form):
    [group] = resolve(Trained(), wrap(TIES[form]))
    assert group.names == SITES.pair
    model = Trained()
    [group] = tie(model, wrap(TIES[form]))
    assert group.names == SITES.pair
    assert containers(model) == []


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ({"source": "a"}, r"ties must be a list; write \["),
        ([{"sorce": "a"}], r"must have a source, and may have a target, a relation and an exclude"),
        ([{"source": "a", "tagret": "b"}], r"not tagret\. Nearest existing names: target"),
        ([{"source": 3}], "3 is not a pattern of names"),
        ([{"source": "a", "exclude": "b"}], r"exclude must be a list of patterns; write \['b'\]"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda ties: ties, OmegaConf.create], ids=["plain", "OmegaConf"])
def test_mappings_that_are_no_ties(wrap, ties, message):
    for take in (callbacks.SoftTying, callbacks.HardTying, lambda ties: resolve(Trained(), ties)):
        with pytest.raises(ValueError, match=message):
            take(wrap(ties))
