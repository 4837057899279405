"""Every argument that counts something asks for an integer, and names itself."""

import pytest
import torch
from torch import nn

from tying.advice import advise
from tying.callbacks import Fisher, Looping, LowRankWeights, RelaxedTying
from tying.depth import StateMatrix, loop
from tying.errors import ConfigurationError
from tying.hard import LowRankResidual, lower_rank, relax
from tying.models import Transformer


def stack():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


COUNTS = {
    "rank of a residual": lambda model, count: relax(model, ["{0..2}"], LowRankResidual(rank=count)),
    "rank of a weight": lambda model, count: lower_rank(model, ["0.weight"], rank=count),
    "rank of a callback": lambda model, count: LowRankWeights(["0.weight"], rank=count).apply(model),
    "rank of a state matrix": lambda model, count: StateMatrix(4, rank=count),
    "calibration": lambda model, count: RelaxedTying(["{0..2}"], LowRankResidual(1), calibration=count),
    "passes": lambda model, count: loop(model, "*", passes=count),
    "passes of a callback": lambda model, count: Looping("*", passes=count),
    "Fisher's batches": lambda model, count: Fisher(batches=count),
    "steps": lambda model, count: advise(model, [torch.ones(2, 4)], 0.5, steps=count, progress=False),
    "size": lambda model, count: Transformer(count, layers=1, heads=1, context=4),
    "layers": lambda model, count: Transformer(4, count, heads=1, context=4),
    "heads": lambda model, count: Transformer(4, layers=1, heads=count, context=4),
    "context": lambda model, count: Transformer(4, layers=1, heads=1, context=count),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_are_integers(case):
    model = stack()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for count in (1.5, 2.0):
        with pytest.raises(ConfigurationError, match=rf"{case.split(' of ')[0]} must be an integer.* not {count}$"):
            COUNTS[case](model, count)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
