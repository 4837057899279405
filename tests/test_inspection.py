"""What a configuration ties, without training: what training accepts, and nothing else."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying.callbacks import (
    AnchorTying,
    HardTying,
    LowRankWeights,
    MixtureTying,
    SoftTying,
    WeightClustering,
    WeightHashing,
)
from tying.cli.inspect import inspect
from tying.depth import Recurrent, StochasticDepth, apply_merge, loop
from tying.errors import ConfigurationError
from tying.soft import Huber, Schedule

A, B = "encoder.0.bias", "decoder.0.bias"
V, W = "encoder.0.weight", "decoder.2.weight"
TIE = f"{V} ~ {W} | o i -> i o"


def hashed():
    return WeightHashing([V, W], table_ratio=0.5)


def error_of(call, *args, **kwargs):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is never trained long enough
            call(*args, **kwargs)
    except ConfigurationError as error:
        return str(error)


CASES = {
    "soft of tables": lambda: [hashed(), SoftTying(["encoder.0.table ~ decoder.2.table"])],
    "soft of tables, listed first": lambda: [SoftTying(["encoder.0.table ~ decoder.2.table"]), hashed()],
    "anchored tables": lambda: [AnchorTying(["encoder.0.table"], 0.1), hashed()],
    "mixture of tables": lambda: [MixtureTying(["*coder.*.table"]), hashed()],
    "hard of tables": lambda: [hashed(), HardTying(["encoder.0.table ~ decoder.2.table"])],
    "hard, then hashed": lambda: [HardTying([f"{A} ~ {B}"]), hashed()],
    "hard and soft": lambda: [HardTying([TIE]), SoftTying([f"{A} ~ {B}"])],
    "clustered beside": lambda: [SoftTying([f"{A} ~ {B}"]), WeightClustering([V], clusters=2)],
    "soft of hashed": lambda: [hashed(), SoftTying([TIE])],
    "soft of low rank": lambda: [LowRankWeights([V], rank=1), SoftTying([TIE])],
    "hard and soft of one": lambda: [HardTying([TIE]), SoftTying([TIE])],
    "hard and clustered": lambda: [HardTying([TIE]), WeightClustering([V], clusters=2)],
    "clustered and hard": lambda: [WeightClustering([V], clusters=2), HardTying([TIE])],
    "clustered and soft": lambda: [WeightClustering([V], clusters=2), SoftTying([TIE])],
    "clustered and anchored": lambda: [AnchorTying(["encoder.**"], 0.1), WeightClustering([V], clusters=2)],
    "anchor of nothing": lambda: [AnchorTying(["encodr.*"], 0.1)],
    "anchor in no file": lambda: [AnchorTying(["encoder.**"], 0.1, anchor="none.ckpt")],
    "mixture of nothing": lambda: [MixtureTying(["encodr.*"])],
    "clusters of nothing": lambda: [WeightClustering(["encodr.*"])],
    "clusters of few": lambda: [WeightClustering([V], clusters=100)],
}
FIT = [*CASES][:8]


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_what_training_says(case):
    told = error_of(inspect, Toy(), CASES[case]())
    trained = error_of(train, Toy(), CASES[case](), max_steps=1)
    assert (told is None) == (trained is None) == (case in FIT), (told, trained)
    if not case.startswith("clustered and"):  # there, in words of their own
        assert told == trained


def test_every_callback_that_does_not_fit_is_told():
    with pytest.raises(ConfigurationError, match=r"'encodr.\*' matches no .*; .*'decodr.\*' matches no"):
        inspect(Toy(), [AnchorTying(["encodr.*"], 0.1), MixtureTying(["decodr.*"])])


def test_the_weights_of_every_callback_are_told(capsys):
    inspect(Toy(), [AnchorTying(["encoder.*.weight"], 0.1), HardTying([f"{A} ~ {B}"]), LowRankWeights([W], rank=1)])
    told = capsys.readouterr().out
    assert "AnchorTying: 2 weights: encoder.0.weight, encoder.2.weight" in told
    assert "Not matched by any tie: 3: encoder.2.bias, decoder.0.weight, decoder.2.bias" in told


def test_json_has_what_the_text_says(capsys):
    def callbacks():
        return [AnchorTying(["encoder.*.weight"], 0.1), HardTying([TIE]), SoftTying([f"{A} ~ {B}"]), hashed_bias()]

    def hashed_bias():
        return WeightHashing(["decoder.0.weight"], table_ratio=0.5)

    inspect(Toy(), callbacks())
    text = capsys.readouterr().out
    inspect(Toy(), callbacks(), json=True)
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    entries = {entry["callback"]: entry for entry in document["callbacks"]}
    assert [*entries] == ["HardTying", "WeightHashing", "AnchorTying", "SoftTying"]
    assert entries["HardTying"]["ties"] == [{"tie": TIE, "weights": 2, "groups": 1}]
    [group] = entries["HardTying"]["groups"]
    assert group.items() >= {"names": [V, W], "shape": [5, 6], "relation": "o i -> i o"}.items()
    assert f"{group['gap']:.4f}" in text
    assert entries["AnchorTying"]["affects"] == ["encoder.0.weight", "encoder.2.weight"]
    assert entries["WeightHashing"]["description"] in text
    assert f"Not matched by any tie: {len(document['unmatched'])}: {', '.join(document['unmatched'])}\n" in text
    assert document["report"]["rows"][0]["names"] == [V, W]
    assert f"{document['report']['unique']} unique parameters" in text
    assert [weight["name"] for weight in document["hashes"]["weights"]] == ["decoder.0.weight"]
    assert document["problems"] == []
    assert all(f"Limit: {limit}." in text for limit in document["limits"])


def test_json_of_weights_that_are_not_finite(capsys):
    model = Toy()
    model.encoder[0].bias.data[0] = float("nan")
    inspect(model, [SoftTying([f"{A} ~ {B}"])], json=True)
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["callbacks"][0]["groups"][0]["gap"] is None


def test_errors_are_alone_where_json_is_asked_for(capsys):
    with pytest.raises(ConfigurationError, match="matches no"):
        inspect(Toy(), [SoftTying([TIE]), MixtureTying(["encodr.*"])], json=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda model: apply_merge(model, "[01]", StochasticDepth(0.5)),
        *(partial(loop, blocks="[01]", passes=2, per_pass=per_pass) for per_pass in (None, "norm", "scale")),
    ],
    ids=["merge", "loop", "norms", "scales"],
)
def test_blocks_with_merges_or_in_loops_are_no_shared_modules(change, capsys):
    model = Toy()
    model.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Recurrent(nn.Linear(4, 4), steps=3))
    change(model.net)
    inspect(model, [], json=True)
    assert json.loads(capsys.readouterr().out)["modules"] == {"Recurrent(steps=3)": ["net.2"]}


def sgd(lr=0.1, momentum=0.0):
    return lambda parameters: torch.optim.SGD(parameters, lr, momentum)


SPEEDS = {
    "gradient": (sgd(), {}, "lr 0.1 · strength 0.001 · m 2: shrinks the gap by 0.02 % a step, half in 3,466 steps"),
    "momentum": (sgd(momentum=0.5), {}, "m 2 · momentum 0.5: shrinks the gap by 0.04 % a step, half in 1,732 steps"),
    "decoupled": (torch.optim.Adam, {"update": "decoupled"}, "lr 0.001 · strength 0.001 · m 2: shrinks the gap by "),
    "proximal": (sgd(), {"update": "proximal", "strength": 10.0}, "shrinks the gap by 67 % a step, half in 1 step"),
    "infinite": (
        sgd(),
        {"update": "proximal", "strength": math.inf},
        "an infinite strength closes the gap in each step",
    ),
    "none": (sgd(), {"strength": 0.0}, "strength 0 pulls nothing"),
    "adaptive": (torch.optim.Adam, {}, "Adam rescales the pull together with the loss's gradients"),
    "diverging": (
        sgd(),
        {"strength": 15.0},
        "m 2: diverges: it multiplies the gap by 2 a step. Lower the strength, or",
    ),
    "scheduled": (sgd(), {"strength": 1.0, "schedule": Schedule(0.0, 0.001, 9)}, "lr 0.1 · strength 0.001 · m 2"),
    "l1": (sgd(), {"penalty": "l1"}, "lr 0.1 · strength 0.001 · m 2: moves each entry by up to 0.0001 a step"),
    "Huber": (sgd(), {"penalty": Huber(0.5)}, "half in 3,466 steps, where it is below 0.5"),
}


@pytest.mark.parametrize("case", SPEEDS)
def test_inspect_says_what_a_strength_does(case, capsys):
    optimizer, arguments, sentence = SPEEDS[case]
    inspect(Toy(optimizer), [SoftTying([TIE], **arguments)])
    [line] = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("SoftTying: ") and TIE not in line
    ]
    assert sentence in line


def test_frozen_members_and_unknown_optimizers(capsys):
    model = Toy(sgd())
    model.decoder[2].weight.requires_grad_(False)
    inspect(model, [SoftTying([TIE])])
    assert "SoftTying: lr 0.1 · strength 0.001 · m 1: shrinks the gap by 0.01 % a step" in capsys.readouterr().out
    model.make_optimizer = lambda parameters: model.trainer.train_dataloader.dataset
    inspect(model, [SoftTying([TIE])])
    assert "lr 0.1" not in capsys.readouterr().out
