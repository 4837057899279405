"""What reports say of ties and of bytes, for every family: the sentences agree with each other and with the model."""

import re
import warnings

import pytest
import torch
from families import FAMILIES, SITES, Trained
from torch import nn
from toys import train

from tying import Tie
from tying.callbacks import TyingSummary
from tying.cli.inspect import inspect
from tying.hard import audit, restore, tie
from tying.weights.derived import locate_parameters

WAYS = {
    "LowRankWeights": "computing weights",
    "WeightHashing": "computing weights",
    "WeightClustering": "computing weights",
    "TemplateWeights": "sharing and computing weights",  # a bank is shared
    "GeneratedWeights": "sharing and computing weights",
    "RelaxedTying": "sharing and computing weights",
}
COUNTS = r"([\d,]+) unique parameters, ([\d,]+) counting each use; ([\d,]+) bytes (?:saved|more) by ([a-z ]+)\."


def numbers(*texts):
    return [int(text.replace(",", "")) for text in texts]


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_what_is_said_of_ties_and_of_bytes_agrees(family, capsys):
    callbacks = [FAMILIES[family].callback(SITES)] if family else []
    model = Trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inspect(Trained(), callbacks)
        train(model, [*callbacks, TyingSummary()], data=model.train_dataloader(), max_epochs=1)
    print(audit(model))
    told = " ".join(capsys.readouterr().out.split())  # without the breaks of lines
    counts = re.findall(COUNTS, told)
    assert len(counts) >= 2  # of the summary or inspect, and of audit
    for *texts, _ in counts:
        unique, used, size = numbers(*texts)
        assert size == 4 * abs(used - unique)
    for saying in told.split("No tied weights. ")[1:]:
        assert re.match(COUNTS, saying)[3] == "0"
    assert counts[-1][3] == WAYS.get(family, "sharing")


@pytest.mark.parametrize("relation", [None, "o i -> i o"])
@pytest.mark.parametrize(
    ("parted", "row"),
    [
        ([], "0.weight = 1.weight = 2.weight"),
        ([1], "0.weight = 2.weight"),
        ([0], "1.weight = 2.weight"),
        ([0, 1], None),
    ],
)
def test_a_row_has_the_names_that_still_hold_one_weight(parted, row, relation):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    tie(model, [Tie("0.weight", f"{index}.weight", relation) for index in (1, 2)])
    for location in [locate_parameters(model)[f"{index}.weight"] for index in parted]:
        setattr(location.holder, location.original, nn.Parameter(torch.randn(4, 4)))
    report = audit(model)
    used = 16 * (3 - len(parted))
    expected = [f"{row} (4, 4): {used} values from 16, {relation or 'shared'}"] if row else []
    assert [str(line) for line in report.rows] == expected
    assert report.saved_bytes == 4 * (used - 16)
    assert len(report.problems) == bool(parted)
    restore(model)
    assert audit(model).groups == (("0.weight", "1.weight", "2.weight"),)
