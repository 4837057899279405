"""``tying demo``: what it prints and keeps, how it goes on, and which precision it takes."""

import csv
import sys
import time

import pytest
import torch
from PIL import Image

from tying.callbacks import HardTying, ResidualMerging
from tying.cli import demo, main, parse
from tying.depth import Residual
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
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["demo", "--epochs=2"])
    out = capsys.readouterr().out
    assert "s a step" in out
    assert "[1/2] untied, epoch 2/2: loss " in out
    assert "[2/2] soft, epoch 1/2: loss " in out
    assert out.endswith("interrupted: the same command goes on\n")
    folder = tmp_path / "runs" / "demo"
    finished = (folder / "untied" / "result.json").stat().st_mtime_ns

    main(["demo", "--epochs=2"])
    out = capsys.readouterr().out
    assert "[1/2]" not in out
    assert "soft, epoch 1/2" not in out
    assert "[2/2] soft, epoch 2/2: loss " in out
    assert "s a step" not in out  # the precision is kept
    assert "| soft | untied | accuracy  | " in out
    assert (folder / "untied" / "result.json").stat().st_mtime_ns == finished
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
    blocks = {
        name: sum(getattr(block.merge, "keep", 1.0) for block in model.modules() if isinstance(block, Residual))
        for name, model in models.items()
    }
    for row in demo.ROWS:
        assert sizes[row.peer or row.name] == pytest.approx(sizes[row.name], rel=0.1) or row.name == "stochastic depth"
        assert blocks[row.peer or row.name] == pytest.approx(blocks[row.name], rel=0.1)


@pytest.mark.parametrize(("slower", "faster"), [demo.PRECISIONS, demo.PRECISIONS[::-1]])
def test_the_faster_precision_is_taken(slower, faster, capsys):
    weight = torch.ones(4, 4, requires_grad=True)

    def model(images):
        is_mixed = torch.is_autocast_enabled("cpu")
        time.sleep(0.02 * (is_mixed == (slower == "bf16-mixed")))
        return images @ weight

    assert demo.fastest_precision(model, torch.ones(2, 4)) == faster
    assert f"{slower}: 0.0" in capsys.readouterr().out


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
