"""``tying demo``: what it prints and keeps, how it goes on, and which precision it takes."""

import csv
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tying.callbacks import HardTying, ResidualMerging
from tying.cli import demo, main, parse
from tying.errors import ConfigurationError
from tying.weights.derived import count_parameters

SMALL = tuple(f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test"))
SMALL += ("--trainer.log_every_n_steps=1", "--data.batch_size=8")


def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch, capsys):
    names = ("untied", "soft")
    monkeypatch.setattr(demo, "ROWS", [row for row in demo.ROWS if row.name in names])
    monkeypatch.setattr(demo, "QUIET", (*demo.QUIET, *SMALL))
    record = demo.History.on_train_epoch_end

    def interrupted(history, trainer, module):
        record(history, trainer, module)
        if trainer.current_epoch and "soft" in history.label:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo.History, "on_train_epoch_end", interrupted)
        with pytest.raises(SystemExit) as exited:
            main(["demo", "--epochs=2"])
    assert exited.value.code == 130
    out = capsys.readouterr().out
    assert re.match(
        r"Precision (\S+): a step takes \d\.\d{3} s, and \d\.\d{3} s in (?!\1)\S+\.\n"
        r"2 runs of 2 epochs will take about \d+ minutes? in all\.\n",
        out,
    )
    assert "[1/2] untied, epoch 2/2: loss " in out
    assert "[2/2] soft, epoch 1/2: loss " in out
    assert out.endswith("interrupted: repeat the command to resume\n")
    folder = tmp_path / "runs" / "demo"
    finished = (folder / "untied" / "measured.json").stat().st_mtime_ns

    main(["demo", "--epochs=2"])
    out = capsys.readouterr().out
    assert "[1/2]" not in out
    assert "soft, epoch 1/2" not in out
    assert "[2/2] soft, epoch 2/2: loss " in out
    assert re.match(r"Resuming the runs in runs/demo, in precision (32-true|bf16-mixed)\.\n", out)
    assert "a step takes" not in out  # the precision is kept
    assert "Command: `tying demo --epochs 2`" in out
    assert ", 2 epochs, " in out
    assert out.count("too short to judge") == 2  # a verdict, and the conclusion
    assert "| soft | untied | accuracy  | " in out
    assert (folder / "untied" / "measured.json").stat().st_mtime_ns == finished
    assert (folder / "demo.md").read_text().strip() in out
    with (folder / "demo.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [(row["run"], row["epoch"]) for row in rows] == [(name, epoch) for name in names for epoch in ("1.0", "2.0")]
    assert [bool(row["gap"]) for row in rows] == [False, False, True, True]
    with Image.open(folder / "demo.png") as image:
        assert image.size[0] > 100
    with pytest.raises(ConfigurationError, match=r"^--out: runs/demo holds runs with epochs 2, not 3: give another"):
        demo.demo(demo.OUT, 3, parse)


def test_plain_networks_cost_what_the_ties_beside_them_do():
    """The hard ties as many parameters, stochastic depth as many blocks a step, in the mean."""
    models = {}
    for row in demo.ROWS:
        cli = parse([f"--config={demo.CONFIGS}/base.yaml", *row.arguments, *demo.QUIET])
        for callback in cli.trainer.callbacks:
            if isinstance(callback, HardTying | ResidualMerging):
                callback.apply(cli.model)
        models[row.name] = cli.model
    sizes = {name: count_parameters(model)[0] for name, model in models.items()}
    blocks = {name: demo.blocks_per_step(model) for name, model in models.items()}
    channels = {name: model.network.head.in_features for name, model in models.items()}
    for row in demo.ROWS:
        assert row.network == f"ResNet-{row.depth}, width {channels[row.name] / 64:g}"
        assert len([*models[row.name].network.layer1]) * 6 + 2 == row.depth
        assert sizes[row.peer or row.name] == pytest.approx(sizes[row.name], rel=0.1) or row.name == "stochastic depth"
        assert blocks[row.peer or row.name] == pytest.approx(blocks[row.name], rel=0.1)
        assert (channels[row.peer or row.name] == channels[row.name]) == row.is_as_fast


def outcomes(seconds=(), epochs=demo.EPOCHS, **accuracies):
    """Results of all rows, equal except for some accuracies and seconds."""
    return {
        row.name: demo.Result(
            accuracies.get(row.name, 0.5), 9, 9, 9.0, [{"seconds": dict(seconds).get(row.name, 1.0)}] * epochs
        )
        for row in demo.ROWS
    }


def test_the_report_ends_with_what_the_runs_show():
    text = demo.report(outcomes(hard=0.6, soft=0.51, **{"stochastic depth": 0.4}))
    assert (
        "\n\nSoft: undecided; hard: better than a narrower network of equal size; stochastic depth: worse than a "
        "shallower network with as many blocks a step.\n\nOne run each."
    ) in text
    assert "| narrower         | ResNet-20, width 0.5 |" in text
    assert "benchmarks/results" in text


def test_short_runs_have_no_verdict():
    text = demo.report(outcomes(epochs=demo.EPOCHS - 1, hard=0.9))
    assert text.count("| too short to judge |") == 3
    assert "+0.400 ± " in text
    assert "The runs are too short to judge: the demo's own length is 6 epochs." in text
    assert "better" not in text


@pytest.mark.parametrize(
    ("seconds", "pair"),
    [
        ({}, None),
        ({"hard": 9.0, "narrower": 0.1}, None),  # of other widths
        ({"stochastic depth": 1.2}, None),
        ({"stochastic depth": 1.3}, ("untied", "stochastic depth", "1.0 and 1.3 s")),
        ({"untied": 2.0, "soft": 1.9}, ("untied", "stochastic depth", "2.0 and 1.0 s")),
    ],
)
def test_disturbed_times_are_told(seconds, pair):
    text = demo.report(outcomes(seconds))
    assert ("disturbed" in text) == bool(pair)
    if pair:
        first, second, times = pair
        assert f"{first} and {second} compute equally many blocks a step, and took {times} an epoch" in text


@pytest.mark.parametrize(
    ("out", "epochs", "command"),
    [
        ("runs/demo", 6, "tying demo"),
        ("runs/demo", 1, "tying demo --epochs 1"),
        ("my runs", 6, "tying demo --out 'my runs'"),
        ("a", 2, "tying demo --epochs 2 --out a"),
    ],
)
def test_the_report_has_the_command(out, epochs, command):
    text = demo.conditions("32-true", Path(out), epochs)
    assert text.endswith(f"Command: `{command}`.")
    assert f", {epochs} epoch{'s' * (epochs > 1)}, 32-true, " in text


@pytest.mark.parametrize(("slower", "faster"), [demo.PRECISIONS, demo.PRECISIONS[::-1]])
def test_the_faster_precision_is_first(slower, faster):
    weight = torch.ones(4, 4, requires_grad=True)

    def model(images):
        is_mixed = torch.is_autocast_enabled("cpu")
        time.sleep(0.02 * (is_mixed == (slower == "bf16-mixed")))
        return images @ weight

    times = demo.time_precisions(model, torch.ones(2, 4))
    assert [*times] == [faster, slower]
    assert times[slower] > 0.02


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--epochs=0", "epochs must be 1 or more, not 0"), ("--epochs=some", "epochs"), ("--turns=2", "--turns")],
)
def test_mistakes(argument, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["demo", argument])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capsys):
    (tmp_path / "demo").touch()
    with pytest.raises(SystemExit):
        main(["demo", f"--out={tmp_path / 'demo'}"])
    assert f"--out: {tmp_path / 'demo'} cannot be a folder: File exists: give another one" in capsys.readouterr().err


def test_an_absent_package_is_named_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="plots"):
        demo.demo(tmp_path / "demo", 1, parse)
    assert not (tmp_path / "demo").exists()
