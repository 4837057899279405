import re

import pytest
import torch
from rich.console import Console
from toys import TIES, Toy, train

from tying import resolve
from tying.callbacks import AnchorTying, Looping, RecurrentDepth, ResidualMerging, SoftTying, TyingSummary
from tying.callbacks.observers.summary import group_row, summary, summary_lines, summary_table
from tying.cli.inspect import inspect
from tying.depth import Residual, StochasticDepth, apply_merge, loop, recur
from tying.hashing import hash_weights
from tying.soft import gap

LONG = "network.layer{}.0.branch.convolution.weight"


def shown(table):
    console = Console(width=200, file=None, record=True, quiet=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_table_by_hand():
    model = Toy()
    rows = [group_row("SoftTying", group) for group in resolve(model, TIES)]
    text = shown(summary_table(rows))
    first = gap([model.encoder[0].weight, model.decoder[2].weight.T])
    assert re.search(rf"SoftTying .*encoder\.0\.weight.* 2 .*5×6 .*o i -> i o .*{first:.4f}", text)
    assert "decoder.2.weight" in text
    assert "… and 2 more groups" in shown(summary_table(rows, max_rows=1))


def test_full_table_names_all():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    rows = [group_row("SoftTying", group) for group in resolve(model, ["*.weight"])]
    assert "3.weight" not in shown(summary_table(rows))
    assert "3.weight" in shown(summary_table(rows, max_rows=None))


def test_counts_by_hand():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(4)])
    model[1].weight = model[0].weight
    groups = resolve(model, ["0.weight ~ 2.weight"])
    shared = "0.weight = 1.weight (2, 2): 8 values from 4, shared, by others"
    assert summary_lines(model, groups) == [
        shared,
        "12 unique parameters, 16 counting each use; 16 bytes saved by sharing.",
        "Hard ties in place of soft ones would save 4 parameters and 16 bytes.",
    ]
    assert summary_lines(model, groups * 2) == summary_lines(model, groups)
    assert summary_lines(model, []) == [
        shared,
        "12 unique parameters, 16 counting each use; 16 bytes saved by sharing.",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_names_stay_whole_at_80_columns(terminal, monkeypatch):
    """A file takes a wider table, and a terminal gets a list."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "is_terminal", terminal)
    names = [LONG.format(number) for number in range(3)]
    row = {"by": "SoftTying", "names": names, "shape": [64, 64, 3, 3], "relation": None, "gap": 0.5}
    words = summary([row] * 2, ["One line."], max_rows=1).split()
    assert {*names[:2], "0.5000", "One", "line."} <= {*words}
    assert names[2] not in words
    assert ("┃" in words) is not terminal
    assert "more group" in " ".join(words)
    assert {*names} <= {*summary([row], [], max_rows=None).split()}


def test_printed_once_below_the_lines_of_all_callbacks(capsys, monkeypatch):
    monkeypatch.setattr("tying.callbacks.base.pl.utilities.rank_zero_info", print)
    train(Toy(), [TyingSummary(), SoftTying(TIES)], max_epochs=2, enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert printed.count("Tied weights") == 1
    assert printed.index("SoftTying: 3 groups") < printed.index("\nTied weights") < printed.index("Epoch")


class Blocks(Toy):
    """Has residual blocks, which keep their input's shape."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(Residual(torch.nn.Linear(6, 6)), Residual(torch.nn.Linear(6, 6)))

    def loss(self, batch):
        return super().loss([self.blocks(batch[0])])


NONE = "No tied weights."
ACTING = {
    "ResidualMerging": lambda: ResidualMerging("blocks.*", StochasticDepth(0.5)),
    "Looping": lambda: Looping("blocks.*", passes=2),
    "RecurrentDepth": lambda: RecurrentDepth("blocks.*"),
    "AnchorTying": lambda: AnchorTying(["blocks.0.branch.weight"], 0.1),
}
CHANGES = {
    "apply_merge": lambda model: apply_merge(model, "blocks.*", StochasticDepth(0.5)),
    "loop": lambda model: loop(model, ["blocks.0", "blocks.1"], 2),
    "recur": lambda model: recur(model, "blocks.*"),
}


def test_none_are_tied(capsys):
    train(Blocks(), [TyingSummary()], max_epochs=1)
    assert NONE in capsys.readouterr().out
    inspect(Blocks(), [])
    assert NONE in capsys.readouterr().out


@pytest.mark.parametrize("callback", ACTING)
def test_callbacks_that_act_otherwise_do_not_leave_all_untied(callback, capsys):
    train(Blocks(), [ACTING[callback](), TyingSummary()], max_epochs=1)
    inspect(Blocks(), [ACTING[callback]()])
    printed = capsys.readouterr().out
    assert "counting each use" in printed
    assert NONE not in printed


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_depth_do_not_leave_all_untied(change, capsys):
    CHANGES[change](model := Blocks())
    train(model, [TyingSummary()], max_epochs=1)
    inspect(model, [])
    assert NONE not in capsys.readouterr().out


def test_what_is_computed_is_told(capsys):
    hash_weights(model := Toy(), ["encoder.*.weight"], 0.5, scope="network")
    train(model, [TyingSummary()], max_epochs=1)
    printed = capsys.readouterr().out
    assert "No tied weights" not in printed
    assert "encoder.0.table = encoder.2.table " in printed
    assert "encoder.2.weight " in printed
