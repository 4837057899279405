"""What reports say of ties and of bytes, for every family: the sentences agree with each other and with the model."""

import re
import warnings

import pytest
from families import FAMILIES, SITES, Trained
from toys import train

from tying.callbacks import TyingSummary
from tying.cli.inspect import inspect
from tying.hard import audit

WAYS = {
    "LowRankWeights": "computing weights",
    "WeightHashing": "computing weights",
    "WeightClustering": "computing weights",
    "TemplateWeights": "sharing and computing weights",  # a bank is shared
    "GeneratedWeights": "sharing and computing weights",
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
