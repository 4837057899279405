import re

import torch
from rich.console import Console
from toys import TIES, Toy, train

from tying import resolve
from tying.callbacks import SoftTying, TyingSummary
from tying.callbacks.observers.summary import group_row, summary_lines, summary_table
from tying.hashing import hash_weights
from tying.soft import gap


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


def test_printed_once_when_training_starts_whatever_the_order(capsys):
    train(Toy(), [TyingSummary(), SoftTying(TIES)], max_epochs=1)
    assert capsys.readouterr().out.count("Tied weights") == 1
    train(Toy(), [TyingSummary()], max_epochs=1)
    assert "No tied weights." in capsys.readouterr().out


def test_what_is_computed_is_told(capsys):
    hash_weights(model := Toy(), ["encoder.*.weight"], 0.5, scope="network")
    train(model, [TyingSummary()], max_epochs=1)
    printed = capsys.readouterr().out
    assert "No tied weights" not in printed
    assert "encoder.0.table = encoder.2.table " in printed
    assert "encoder.2.weight " in printed
