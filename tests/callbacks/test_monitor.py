import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from toys import TIES, Toy, batches, train

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


class Seen(pl.Callback):
    """Notes the gap that other callbacks read, and the gap of the weights, whenever EarlyStopping may ask."""

    def __init__(self, within_epochs=False):
        self.read, self.expected, self.within_epochs = [], [], within_epochs

    def note(self, trainer, model):
        self.read.append(float(trainer.callback_metrics["tying/gap"]))
        self.expected.append(max(gap(group.tensors()) for group in resolve(model, TIES)))

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        if self.within_epochs and not trainer.sanity_checking:
            self.note(trainer, pl_module)


class Validated(Toy):
    def validation_step(self, batch, batch_idx):
        pass

    val_dataloader = staticmethod(batches)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 6),  # the first step that is logged comes after the first epoch
        ({"log_every_n_steps": 7}, 6),
        ({"accumulate_grad_batches": 4}, 6),
        ({"val_check_interval": 0.3, "num_sanity_val_steps": 1}, 12),
        ({"check_val_every_n_epoch": 2}, 4),
    ],
)
def test_early_stopping_always_has_the_gap(options, times, before):
    model, seen = Validated(), Seen(within_epochs=True)
    stop = [
        EarlyStopping("tying/gap", mode=mode, patience=100, check_on_train_epoch_end=mode == "min")
        for mode in ("min", "max")
    ]
    callbacks = [SoftTying(TIES), *[*stop, seen] * before, TyingMonitor(), *[*stop, seen] * (not before)]
    train(model, callbacks, **{"log_every_n_steps": 50, "max_epochs": 3} | options)
    assert seen.read == pytest.approx(seen.expected, rel=1e-6)
    assert len(seen.read) == times


def test_early_stopping_stops_below_a_gap():
    stop = EarlyStopping("tying/gap", stopping_threshold=0.2, patience=100)
    trainer = train(Toy(), [stop, SoftTying(TIES, strength=1.0), TyingMonitor()], log_every_n_steps=50, max_epochs=20)
    assert 1 <= trainer.current_epoch < 20
    assert float(trainer.callback_metrics["tying/gap"]) < 0.2


def test_callbacks_have_the_gap_where_training_ends_within_an_epoch(tmp_path):
    model, seen = Toy(), Seen()
    saves = ModelCheckpoint(tmp_path, monitor="tying/gap", save_on_train_epoch_end=True)
    train(
        model,
        [EarlyStopping("tying/gap"), SoftTying(TIES), TyingMonitor(), seen, saves],
        log_every_n_steps=50,
        max_epochs=3,
        max_steps=24,
        enable_checkpointing=True,
    )
    assert len(seen.read) == 3
    assert seen.read == pytest.approx(seen.expected, rel=1e-6)
    assert float(saves.best_model_score) == pytest.approx(min(seen.read))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_model_that_takes_no_step_has_a_gap():
    class Idle(Toy):
        def training_step(self, batch, batch_idx):
            return None

    seen = Seen()
    train(
        Idle(), [SoftTying(TIES), EarlyStopping("tying/gap"), TyingMonitor(), seen], log_every_n_steps=50, max_epochs=2
    )
    assert seen.read == pytest.approx(seen.expected, rel=1e-6)


def test_what_is_measured_for_others_is_not_logged(tmp_path):
    monitor, logger = TyingMonitor(), CSVLogger(tmp_path, name="run", version=0)
    train(Validated(), [SoftTying(TIES), monitor], logger=logger, max_epochs=2, log_every_n_steps=7)
    with open(tmp_path / "run" / "version_0" / "metrics.csv") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["tying/gap"]]
    assert logged == [6, 13]
    assert monitor.steps == [7, 14]


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_shows_the_gap(shown):
    trainer = train(Toy(), [SoftTying(TIES), TyingMonitor(prog_bar=shown)], max_epochs=1)
    assert ("tying/gap" in trainer.progress_bar_metrics) == shown


def test_the_gap_of_each_group_is_logged_on_demand(tmp_path):
    model, logger = Toy(), CSVLogger(tmp_path, name="run", version=0)
    callbacks = [SoftTying(TIES), TyingMonitor(per_group=True), EarlyStopping("tying/gap/encoder.2.weight")]
    metrics = train(model, callbacks, logger=logger, max_epochs=1).callback_metrics
    groups = {group.names[0]: gap(group.tensors()) for group in resolve(model, TIES)}
    assert {name for name in metrics if name.startswith("tying/gap/")} == {f"tying/gap/{name}" for name in groups}
    for name, value in groups.items():
        assert float(metrics[f"tying/gap/{name}"]) == pytest.approx(value, rel=1e-6)
    assert "tying/gap/encoder.0.bias" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    metrics = train(Toy(), [callbacks[0], TyingMonitor()], max_epochs=1).callback_metrics
    assert [name for name in metrics if "gap" in name] == ["tying/gap"]


def test_groups_that_start_with_the_same_weight_have_their_own_gaps():
    model = Toy()
    model.encoder[0].bias2 = torch.nn.Parameter(-5 * torch.ones(5))
    callbacks = [
        SoftTying([f"encoder.0.bias ~ {other}"], name=name)
        for other, name in (("decoder.0.bias", "a"), ("encoder.0.bias2", "b"))
    ]
    metrics = train(model, [*callbacks, TyingMonitor(per_group=True)], max_epochs=1).callback_metrics
    for callback in callbacks:
        [group] = callback.groups
        value = float(metrics[f"tying/gap/{callback.label}/encoder.0.bias"])
        assert value == pytest.approx(gap(group.tensors()), rel=1e-6)
