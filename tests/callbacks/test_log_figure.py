"""Every callback that draws, with every logger that takes figures and with what takes none."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import matplotlib
import pytest
import torch
from families import Trained, inputs
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tying.callbacks
from tying.callbacks import (
    AnchorTying,
    BoundaryPlot,
    Importance,
    Looping,
    MixtureTying,
    SoftTying,
    TemplateWeights,
    TyingMonitor,
    Unrolling,
    WeightHashing,
)
from tying.callbacks.figures import log_figure, run_folder
from tying.depth import HMLSTM

pytestmark = pytest.mark.filterwarnings("ignore:MixtureTying begins with")

NAMES = ["net.kernels.0.weight", "net.kernels.1.weight"]


@dataclass(frozen=True)
class Equal(Importance):
    def measure(self, trainer, module, weights, path):
        return {name: torch.ones_like(weight) for name, weight in weights.items()}


class Reads(Trained):
    """Trains a network, and tests it or a reader of six characters."""

    def __init__(self):
        super().__init__()
        self.reader = HMLSTM(6, 6)

    def test_step(self, batch, batch_idx):
        if not batch[0].is_floating_point():
            self.reader(F.one_hot(batch[0], 6).float().transpose(0, 1))


class Data(pl.LightningDataModule):
    def __init__(self, tested):
        super().__init__()
        self.tested = tested

    def train_dataloader(self):
        return DataLoader(TensorDataset(inputs(4)), batch_size=2)

    val_dataloader = train_dataloader

    def test_dataloader(self):
        return DataLoader(TensorDataset(*self.tested), batch_size=4)

    def text(self, ids):
        return "".join("abcdef"[index] for index in ids)


LABELLED = inputs(8), torch.zeros(8, dtype=torch.long)
TEXT = torch.arange(40).view(8, 5) % 6, torch.arange(40).view(8, 5) % 6
# what draws each picture, and the test data where it is drawn in a test
DRAWING = {
    "tying_gap": (lambda: [SoftTying([" ~ ".join(NAMES)]), TyingMonitor()], None),
    "importance": (lambda: [AnchorTying(NAMES, 1.0, importance=Equal())], None),
    "hash_loads": (lambda: [WeightHashing(NAMES, 0.25)], None),
    "layer_similarity": (lambda: [TemplateWeights(NAMES, templates=1)], None),
    "mixture_end": (lambda: [MixtureTying(NAMES, 0.01, 4)], None),  # after mixture_start
    "unrolling": (lambda: [Looping("net.blocks.*", passes=2), Unrolling([0, 1])], LABELLED),
    "boundaries": (lambda: [BoundaryPlot(characters=12)], TEXT),
}


def draw(picture, loggers, **options):
    """Fit or test for one picture."""
    make, tested = DRAWING[picture]
    trainer = pl.Trainer(
        callbacks=make(),
        logger=loggers,
        max_epochs=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        **options,
    )
    if tested is None:
        trainer.fit(Reads(), datamodule=Data(LABELLED))
    else:
        trainer.test(Reads(), datamodule=Data(tested), verbose=False)
    return trainer


def test_every_callback_that_draws_is_asked():
    sources = {path: path.read_text() for path in Path(tying.callbacks.__file__).parent.rglob("*.py")}
    drawing = {path.name for path, text in sources.items() if "log_figure(trainer" in text} - {"figures.py"}
    asked = {type(callback).__module__.rpartition(".")[2] for make, _ in DRAWING.values() for callback in make()}
    assert drawing <= {f"{name}.py" for name in asked}
    assert not [path for path, text in sources.items() if "save_figure(" in text and path.name != "figures.py"]


# Loggers: their classes' and methods' names, and their arguments, are those of Lightning and of the packages


class Kept(Logger):
    """Keeps the pictures that it takes: their name and step."""

    name, version = "experiment", "run"

    def __init__(self):
        super().__init__()
        self.pictures, self.run_id = [], "1234"

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def keep(self, figure, name, step):
        assert isinstance(figure, Figure)
        self.pictures.append((name, step))


class TensorBoardLogger(Kept):
    def add_figure(self, tag, figure, global_step=None, close=True, walltime=None):
        self.keep(figure, tag, global_step)


class WandbLogger(Kept):
    def log_image(self, key, images, step=None, **kwargs):
        assert isinstance(images, list)
        [figure] = images
        self.keep(figure, key, step)


class MLFlowLogger(Kept):
    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        assert run_id == self.run_id
        self.keep(figure, artifact_file, None)


class CometLogger(Kept):
    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
        self.keep(figure, figure_name, step)


class OwnLogger(WandbLogger):
    """A subclass is a logger of the same kind."""


TAKING = [TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger]


@pytest.fixture
def quick(monkeypatch):
    """Leave out the drawing of pixels, which each callback's own tests include."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.write_bytes(b"\x89PNG"))


@pytest.mark.parametrize("kind", TAKING)
@pytest.mark.parametrize("picture", DRAWING)
def test_a_logger_that_takes_figures_has_the_picture(picture, kind, tmp_path):
    logger = kind()
    draw(picture, [CSVLogger(tmp_path / "csv"), logger])
    step = 0 if DRAWING[picture][1] or picture == "hash_loads" else 2
    name = f"tying/{picture.removeprefix('tying_')}"
    expected = (f"{picture}.png", None) if kind is MLFlowLogger else (name, step)
    assert expected in logger.pictures
    assert len(logger.pictures) == 1 + (picture == "mixture_end")
    assert not [*tmp_path.rglob("*.png")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("picture", DRAWING)
def test_without_it_the_picture_is_in_the_folder_of_the_run(picture, tmp_path, caplog):
    for version in range(2):
        draw(picture, CSVLogger(tmp_path, name="runs"))
        path = tmp_path / "runs" / f"version_{version}" / f"{picture}.png"
        assert path.is_file()
        assert caplog.messages.count(f"the picture {picture} is {path}") == 1
    assert len([*tmp_path.rglob(f"{picture}*.png")]) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("picture", DRAWING)
def test_no_run_writes_over_the_pictures_of_another(picture, tmp_path):
    for _ in range(2):
        draw(picture, False, default_root_dir=tmp_path)
    assert {path.name for path in tmp_path.glob(f"{picture}*.png")} == {f"{picture}.png", f"{picture}-v1.png"}


@pytest.mark.parametrize("picture", DRAWING)
def test_a_folder_that_cannot_be_written_is_told_and_training_goes_on(picture, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder"
    message = f"^pictures are not saved, since {folder} cannot be written: Not a directory$"
    with pytest.warns(UserWarning, match=message) as warned:
        trainer = draw(picture, False, default_root_dir=folder)
    assert trainer.state.finished
    assert len({str(warning.message) for warning in warned if "picture" in str(warning.message)}) == 1


def test_several_pictures_of_a_run_are_told_of_once(tmp_path):
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        draw("mixture_end", False, default_root_dir=tmp_path / "file")  # after mixture_start
    assert [str(warning.message).split(",")[0] for warning in warned if "picture" in str(warning.message)] == [
        "pictures are not saved"
    ]


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def fail(figure, path, **_):
        path.write_bytes(b"\x89P")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.warns(UserWarning, match="cannot be written: No space left on device"):
        assert draw("tying_gap", False, default_root_dir=tmp_path).state.finished
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [*TAKING, OwnLogger])
def test_a_logger_that_fails_is_told_and_the_picture_is_written(kind, tmp_path):
    class Broken(kind):
        save_dir = str(tmp_path)

        def keep(self, figure, name, step):
            raise ConnectionError("no route to host")

    message = r"^Broken could not log the picture tying_gap \(ConnectionError: no route to host\)$"
    with pytest.warns(UserWarning, match=message):
        assert draw("tying_gap", Broken()).state.finished
    assert [*tmp_path.rglob("*.png")] == [tmp_path / "experiment" / "run" / "tying_gap.png"]


@pytest.mark.parametrize("picture", DRAWING)
def test_without_matplotlib_training_goes_on(picture, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(picture, False, default_root_dir=tmp_path).state.finished
    message = "is not drawn: matplotlib.figure is not installed: pip install 'tying[plots]'"
    assert f"the picture {picture} {message}" in caplog.messages
    assert [*tmp_path.iterdir()] == []


def test_a_broken_matplotlib_does_not_end_training(tmp_path, monkeypatch, caplog):
    broken = ModuleType("matplotlib.figure")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", broken)
    assert draw("tying_gap", False, default_root_dir=tmp_path).state.finished
    [line] = [message for message in caplog.messages if "picture" in message]
    assert line.startswith(
        "the picture tying_gap is not drawn: a package of tying[plots] is broken: cannot import name"
    )
    assert line.endswith(": pip install --force-reinstall 'tying[plots]'")
    assert [*tmp_path.iterdir()] == []


def test_a_broken_part_that_writes_does_not_end_training(tmp_path, monkeypatch, caplog):
    def fail(figure, path, **_):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(Figure, "savefig", fail)
    assert draw("tying_gap", False, default_root_dir=tmp_path).state.finished
    assert "the picture tying_gap is not drawn: numpy.core.multiarray failed to import" in caplog.messages
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("has_logger", [False, True])
def test_an_address_in_place_of_the_folder_is_told(has_logger, caplog):
    address = "memory://bucket/runs"
    logger = CSVLogger(address, name="first", version=0) if has_logger else False
    assert draw("tying_gap", logger, default_root_dir=address).state.finished
    [line] = [message for message in caplog.messages if "picture" in message]
    folder = f"{address}/first/version_0" if has_logger else address
    assert line.startswith(
        f"the picture tying_gap is not drawn: {folder} is not a local folder: add a logger that takes"
    )
    assert not Path("memory:").exists()


def test_a_machine_without_a_screen_draws(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(matplotlib.rcParams, "backend", "tkagg")  # which rc_context would not restore
    draw("tying_gap", False, default_root_dir=tmp_path)
    assert (tmp_path / "tying_gap.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_first_process_draws(tmp_path, monkeypatch):
    trainer = pl.Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)
    log_figure(trainer, lambda: pytest.fail("drawn"), "picture")
    assert [*tmp_path.iterdir()] == []


def test_a_trial_run_draws_nothing(tmp_path):
    draw("tying_gap", False, default_root_dir=tmp_path, fast_dev_run=True)
    assert [*tmp_path.iterdir()] == []


def test_the_folder_of_a_run(tmp_path):
    class Plain(Kept):
        save_dir = str(tmp_path)

    class Numbered(Plain):
        version = 3

    csv = CSVLogger(tmp_path, name="runs")
    expected = {
        (Plain(),): tmp_path / "experiment" / "run",
        (Numbered(),): tmp_path / "experiment" / "version_3",
        (Kept(),): tmp_path / "root" / "experiment" / "run",
        (Plain(), csv): tmp_path / "runs" / "version_0",
        (): tmp_path / "root",
    }
    for loggers, folder in expected.items():
        trainer = pl.Trainer(logger=[*loggers], default_root_dir=tmp_path / "root", accelerator="cpu")
        assert run_folder(trainer) == folder
