"""The work that ties take grows as their number: counted in instructions of this package, which are the same each time."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tying
from tying import resolve
from tying.callbacks import AnchorTying, Coupling, HardTying, SoftTying, TyingMonitor, TyingSummary
from tying.hard import (
    LowRankResidual,
    audit,
    bake,
    harden,
    load_plain,
    lower_rank,
    relax,
    share_templates,
    tie,
    tied,
    untie,
)
from tying.hashing import hash_weights

FOLDER = str(Path(tying.__file__).parent)
FEW, MANY = 24, 96


def instructions(run, *arguments):
    """Return the number of instructions of this package that a function executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(*arguments)
    finally:
        sys.settrace(before)
    return count


def parameters(count):
    """Two lists of parameters; torch itself loads them in linear time."""
    return nn.ModuleDict(
        {side: nn.ParameterList([nn.Parameter(torch.randn(2, 2)) for _ in range(count)]) for side in "ab"}
    )


def layers(count):
    return nn.ModuleDict({side: nn.ModuleList([nn.Linear(2, 2) for _ in range(count)]) for side in "ab"})


# a model of so many pairs, and their ties
PAIRS = {
    "a pattern": lambda n: (parameters(n), ["a.{i} ~ b.{i}"]),
    "a tie for each pair": lambda n: (parameters(n), [f"a.{i} ~ b.{i}" for i in range(n)]),
    "a tie for each pair of modules": lambda n: (layers(n), [f"a.{i} ~ b.{i}" for i in range(n)]),
    "a relation": lambda n: (layers(n), ["a.{i}.weight ~ b.{-i}.weight | o i -> i o"]),
    "modules within modules": lambda n: (nn.ModuleList([layers(1) for _ in range(n)]), ["{i}.a ~ {i}.b"]),
}
# of a model that is tied already, but for the first two
QUESTIONS = {
    "resolve": resolve,
    "tie": tie,
    "tie again": tie,
    "tied": lambda model, ties: tied(model),
    "audit": lambda model, ties: audit(model, [torch.optim.SGD(model.parameters())]),
    "untie": lambda model, ties: untie(model),
    "untie each": lambda model, ties: untie(model, [name for group in tied(model) for name in group.names[1:]]),
    "state_dict": lambda model, ties: model.state_dict(),
    "load_state_dict": lambda model, ties: model.load_state_dict(model.state_dict()),
    "load_plain": lambda model, ties: load_plain(model, bake(model)),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_ties_are_linear(pairs, question):
    counts = []
    for number in (FEW, MANY):
        model, ties = PAIRS[pairs](number)
        if question not in ("resolve", "tie"):
            tie(model, ties)
        counts.append(instructions(QUESTIONS[question], model, ties))
    assert counts[1] <= counts[0] * MANY / FEW * 1.02


COMPUTED = {
    "lower_rank": lambda model: lower_rank(model, ["**.weight"], 1),
    "relax": lambda model: relax(model, ["a.{i}.weight ~ b.{i}.weight"], LowRankResidual(1)),
    "share_templates": lambda model: share_templates(model, ["**.weight"], 2),
    "hash_weights by layer": lambda model: hash_weights(model, ["**.weight"], 0.5),
    "hash_weights by network": lambda model: hash_weights(model, ["**.weight"], 0.5, scope="network"),
}


ASKED = {"load_plain": load_plain, "bake": lambda model, plain: bake(model), "audit": lambda model, plain: audit(model)}


@pytest.mark.filterwarnings("ignore:the model cannot hold")
@pytest.mark.parametrize("question", ["compute", *ASKED])
@pytest.mark.parametrize("way", COMPUTED)
def test_computed_weights_are_linear(way, question):
    counts = []
    for number in (FEW, MANY):
        model = layers(number)
        plain = model.state_dict()
        if question == "compute":
            counts.append(instructions(COMPUTED[way], model))
        else:
            COMPUTED[way](model)
            counts.append(instructions(ASKED[question], model, plain))
    assert counts[1] <= counts[0] * MANY / FEW * 1.02


def test_hardening_is_linear():
    counts = []
    for number in (FEW, MANY):
        model = layers(number)
        relax(model, ["a.{i}.weight ~ b.{i}.weight"], LowRankResidual(1))
        counts.append(instructions(harden, model))
    assert counts[1] <= counts[0] * MANY / FEW * 1.02


CALLBACKS = {
    "SoftTying": lambda: SoftTying(["a.{i} ~ b.{i}"]),
    "SoftTying, hardened": lambda: SoftTying(["a.{i} ~ b.{i}"], harden_below=1.0),
    "HardTying": lambda: HardTying(["a.{i} ~ b.{i}"]),
    "AnchorTying": lambda: AnchorTying(["a.*"], strength=0.1, head_strength=0.1),
    "Coupling": lambda: Coupling("a", "b", alpha=0.5, examples=4),
}


class Model(pl.LightningModule):
    def __init__(self, count):
        super().__init__()
        self.a, self.b = layers(count).values()

    def training_step(self, batch, batch_idx):
        return sum(parameter.sum() for parameter in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_are_linear(callback):
    def fit(count):
        callbacks = [CALLBACKS[callback](), TyingSummary(), TyingMonitor()]
        options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        pl.Trainer(callbacks=callbacks, **options).fit(Model(count), DataLoader(torch.zeros(2, 1)))

    counts = [instructions(fit, number) for number in (FEW, MANY)]
    assert counts[1] <= counts[0] * MANY / FEW * 1.02
