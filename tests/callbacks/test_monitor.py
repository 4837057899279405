import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from toys import TIES, Toy, train

from tying import resolve
from tying.callbacks import SoftTying, TyingMonitor
from tying.soft import gap


def test_logs_the_largest_gap_and_plots(tmp_path):
    model, monitor = Toy(), TyingMonitor()
    logger = CSVLogger(tmp_path, name="run", version=0)
    train(model, [SoftTying(TIES), monitor], logger=logger, max_epochs=2, log_every_n_steps=5)
    gaps = {f"SoftTying: {' ~ '.join(group.names)}": gap(group.tensors()) for group in resolve(model, TIES)}
    with open(tmp_path / "run" / "version_0" / "metrics.csv") as file:
        logged = [float(row["tying/gap"]) for row in csv.DictReader(file) if row["tying/gap"]]
    assert len(logged) == 4
    assert logged[-1] == pytest.approx(max(gaps.values()), rel=1e-6)
    assert monitor.steps == [5, 10, 15, 20]
    assert all([step for step, _ in history] == monitor.steps for history in monitor.history.values())
    assert {name: history[-1][1] for name, history in monitor.history.items()} == pytest.approx(gaps)
    with Image.open(tmp_path / "run" / "version_0" / "tying_gap.png") as image:
        assert image.size[0] > 100
    assert [path.name for path in (tmp_path / "run" / "version_0").glob("*.png")] == ["tying_gap.png"]


def test_accumulation_logs_once_a_step(tmp_path):
    monitor = TyingMonitor()
    train(Toy(), [SoftTying(TIES), monitor], accumulate_grad_batches=4, max_epochs=1, default_root_dir=tmp_path)
    assert monitor.steps == [1, 2, 3]


def test_history_is_resumed(tmp_path):
    monitor = TyingMonitor()
    trainer = train(Toy(), [SoftTying(TIES), monitor], max_epochs=1, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = TyingMonitor()
    train(Toy(), [SoftTying(TIES), resumed], max_epochs=2, ckpt_path=tmp_path / "a.ckpt", default_root_dir=tmp_path)
    assert resumed.steps == list(range(1, 21))
    assert all(len(history) == 20 for history in resumed.history.values())
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["TyingMonitor"]["steps"] == monitor.steps


def test_a_long_history_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr("tying.callbacks.observers.monitor.VALUES", 30)
    monitor, model = TyingMonitor(), Toy()
    train(model, [SoftTying(TIES), monitor], max_epochs=3, default_root_dir=tmp_path)
    assert 5 <= len(monitor.steps) <= 10
    assert monitor.steps[-1] == 30
    assert [[step for step, _ in history] for history in monitor.history.values()] == [monitor.steps] * 3
    assert max(history[-1][1] for history in monitor.history.values()) == pytest.approx(
        max(gap(group.tensors()) for group in resolve(model, TIES)), rel=1e-6
    )


def test_the_plot_is_of_what_is_logged(tmp_path, monkeypatch):
    """Also where most groups have no line: its largest value is the gap that is logged, at every step."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or path.touch())
    model, logger = Toy(), CSVLogger(tmp_path, name="run", version=0)
    with torch.no_grad():
        model.encoder[0].bias.fill_(9.0)
        model.decoder[0].bias.fill_(-9.0)  # the last group is furthest apart
    monitor = TyingMonitor(max_lines=1)
    train(model, [SoftTying(TIES), monitor], logger=logger, max_epochs=2)
    with open(tmp_path / "run" / "version_0" / "metrics.csv") as file:
        logged = [float(row["tying/gap"]) for row in csv.DictReader(file) if row["tying/gap"]]
    largest, line = drawn[0].axes[0].lines
    assert line.get_label() == "SoftTying: encoder.0.bias ~ decoder.0.bias"
    assert largest.get_ydata() == pytest.approx(logged, rel=1e-6)
    assert line.get_ydata() == pytest.approx(logged, rel=1e-6)
    assert len(monitor.history) == 3


def test_groups_that_start_with_the_same_weight(tmp_path):
    callbacks = [
        SoftTying([f"encoder.0.bias ~ {other}"], name=other) for other in ("decoder.0.bias", "encoder.0.bias2")
    ]
    model = Toy()
    model.encoder[0].bias2 = torch.nn.Parameter(-5 * torch.ones(5))
    trainer = train(model, [*callbacks, TyingMonitor()], max_epochs=1, default_root_dir=tmp_path)
    gaps = [gap(group.tensors()) for callback in callbacks for group in callback.groups]
    assert float(trainer.callback_metrics["tying/gap"]) == pytest.approx(max(gaps), rel=1e-6)


def test_two_callbacks_that_pull_the_same_weights(tmp_path):
    monitor = TyingMonitor()
    train(Toy(), [SoftTying(TIES[:1]), SoftTying(TIES[:1], name="b"), monitor], max_epochs=1, default_root_dir=tmp_path)
    assert [name.split(":")[0] for name in monitor.history] == ["SoftTying"] * 2 + ["SoftTying b"] * 2
    assert [len(history) for history in monitor.history.values()] == [10] * 4
    assert (tmp_path / "tying_gap.png").exists()


def test_groups_that_harden_keep_their_lines(tmp_path):
    model, monitor = Toy(), TyingMonitor()
    with torch.no_grad():
        model.encoder[0].weight.copy_(model.decoder[2].weight.T)  # hardens first, and then is the last of the groups
    trainer = train(
        model, [SoftTying(TIES, strength=1e-3, harden_below=0.3), monitor], max_epochs=3, default_root_dir=tmp_path
    )
    assert float(trainer.callback_metrics["tying/hardened"]) in (1, 2)
    assert [[step for step, _ in history] for history in monitor.history.values()] == [[*range(1, 31)]] * 3


def test_other_callbacks_may_have_groups_too(tmp_path):
    class Other(pl.Callback):
        groups = ("lr", "wd")

    train(Toy(), [Other(), TyingMonitor()], max_epochs=1, default_root_dir=tmp_path)


def test_without_ties_nothing_happens(tmp_path):
    monitor = TyingMonitor()
    trainer = train(Toy(), [monitor], max_epochs=1, default_root_dir=tmp_path)
    assert "tying/gap" not in trainer.callback_metrics
    assert list(tmp_path.iterdir()) == []
