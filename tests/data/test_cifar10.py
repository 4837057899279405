import hashlib
import io
import pickle
import tarfile
from importlib import resources

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10 as Official

from tying import ConfigurationError
from tying.data import CIFAR10
from tying.data.sample import CLASSES, FILE, PER_CLASS, cut_sample, load_sample
from tying.models import MLP, Classifier

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A tiny archive in the official layout, and torchvision's checksums to go with it."""
    root, rng = tmp_path / "root", np.random.default_rng(0)
    root.mkdir()
    packed = io.BytesIO()
    md5s = {}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:

        def add(name, content):
            info = tarfile.TarInfo(f"{Official.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            md5s[name] = hashlib.md5(content).hexdigest()

        for name, _ in Official.train_list + Official.test_list:
            data = rng.integers(256, size=(20, 3072), dtype=np.uint8)
            add(name, pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}))
        add("batches.meta", pickle.dumps({"label_names": list(CLASSES)}))
    (root / Official.filename).write_bytes(packed.getvalue())
    monkeypatch.setattr(Official, "train_list", [[name, md5s[name]] for name, _ in Official.train_list])
    monkeypatch.setattr(Official, "test_list", [[name, md5s[name]] for name, _ in Official.test_list])
    monkeypatch.setattr(Official, "meta", {**Official.meta, "md5": md5s["batches.meta"]})
    monkeypatch.setattr(Official, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    return root


def ready(**arguments):
    data = CIFAR10(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_archive(archive):
    data = ready(root=archive, batch_size=10)
    assert data.description == "official archive"
    images, labels = data._splits["fit"]
    assert images.shape == (90, 32, 32, 3)
    assert len(data._splits["val"][1]) == 10
    assert data._splits["val"][1].bincount().tolist() == [1] * 10
    assert labels.bincount().tolist() == [9] * 10
    assert sorted(path.name for path in archive.iterdir()) == [Official.base_folder, Official.filename]
    official = Official(str(archive), train=False)
    assert torch.equal(data._splits["test"][0], torch.from_numpy(official.data))


def test_extracted_folder_alone(archive):
    ready(root=archive)
    (archive / Official.filename).unlink()
    assert len(ready(root=archive)._splits["test"][1]) == 20


def test_truncated_archive(archive):
    packed = archive / Official.filename
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match=r"truncated or corrupted.*download: true"):
        ready(root=archive)
    assert [path.name for path in archive.iterdir()] == [Official.filename]


def test_broken_folder(archive):
    ready(root=archive)
    (archive / Official.base_folder / "data_batch_3").write_bytes(b"broken")
    ready(root=archive)  # the archive is still there: extracted again
    (archive / Official.filename).unlink()
    (archive / Official.base_folder / "data_batch_3").unlink()
    with pytest.raises(ConfigurationError, match=r"incomplete or corrupted \(data_batch_3\)"):
        ready(root=archive)


def test_missing_archive(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"no CIFAR-10 under .*nowhere: expected cifar-10-python\.tar\.gz.*download: true"
    ):
        ready(root=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(Official, "url", "http://localhost:9/none")
    with pytest.raises(ConfigurationError, match=r"could not be downloaded from http://localhost:9.*by hand"):
        ready(root=tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_sample_is_small():
    assert resources.files("tying.data").joinpath(FILE).stat().st_size <= 2.5e6


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("stop", [7, 11, 13])
def test_lightning_sets_epochs_and_goes_on_mid_epoch(stop, tmp_path):
    """The batches of two epochs, and those of a run that is interrupted and resumed."""

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, batch_idx, float(batch[0].sum()), batch[1].tolist()))
            return self.weight * 0.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Interrupted(Exception):
        pass

    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise Interrupted

    def run(model, ckpt_path=None, **arguments):
        trainer = pl.Trainer(**QUIET, **arguments)
        trainer.fit(model, CIFAR10(batch_size=450, validation=0.0), ckpt_path=ckpt_path)

    whole, first, second = Model(), Model(), Model()
    run(whole, max_epochs=2)
    assert len(whole.seen) == 22
    assert whole.seen[0][3] != whole.seen[11][3]
    with pytest.raises(Interrupted):
        run(first, max_epochs=2, callbacks=[Interrupt()])
    run(second, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_images_are_of_the_trainers_precision(precision, dtype):
    seen = []

    class Model(Classifier):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    trainer = pl.Trainer(precision=precision, max_steps=2, limit_val_batches=1, **QUIET)
    trainer.fit(Model(MLP([3072, 10])), CIFAR10(batch_size=50))
    assert {*seen} == {dtype}


def test_overfitting_sees_the_same_batches_again():
    seen = []

    class Model(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    trainer = pl.Trainer(overfit_batches=2, max_epochs=2, **QUIET)
    trainer.fit(Model(MLP([3072, 10])), CIFAR10(batch_size=50))
    assert len(seen) == 4
    assert all(torch.equal(seen[i], seen[i + 2]) for i in range(2))
    assert not torch.equal(seen[0], seen[1])


def test_sample():
    data = ready()
    assert data.description == "embedded sample of a JPEG copy"
    assert {split: len(labels) for split, (_, labels) in data._splits.items()} == {
        "fit": 4500,
        "val": 500,
        "test": 1000,
    }
    assert data._splits["val"][1].bincount().tolist() == [50] * 10
    batch = next(iter(data.train_dataloader()))
    x, y = data.on_after_batch_transfer(batch, 0)
    assert (x.shape, x.dtype, y.shape) == ((128, 3, 32, 32), torch.float32, (128,))
    assert abs(float(x.mean())) < 0.3
    assert data.on_after_batch_transfer((x, y), 0) == (x, y)


def test_held_out_samples_are_the_same_for_every_seed_and_batch_size():
    first, second = ready(), ready(seed=5, batch_size=3)
    assert torch.equal(first._splits["val"][0], second._splits["val"][0])
    assert ready(validation=0.0).val_dataloader() == []


def test_evaluation_images_are_left_as_they_are():
    data = ready()
    batch = next(iter(data.test_dataloader()))
    x, _ = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(batch.images, load_sample()["test"][0][:128])
    expected = (batch.images[0, 0, 0].float() / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    )
    torch.testing.assert_close(x[0, :, 0, 0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "achive"}, "source must be .*, not 'achive'.*archive"),
        ({"source": "archive"}, "needs root"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\)"),
        ({"validation": -0.1}, r"validation must be in \[0, 1\)"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        CIFAR10(**arguments)


def test_cutting_the_sample(tmp_path):
    source, out = tmp_path / "all.tar", tmp_path / "out.tar.xz"
    with tarfile.open(source, "w") as tar:
        for split, count in PER_CLASS.items():
            for shade, kind in enumerate(CLASSES):
                for number in reversed(range(2 * count)):
                    jpeg = io.BytesIO()
                    Image.new("RGB", (4, 4), (shade, number % 256, 0)).save(jpeg, "JPEG")
                    info = tarfile.TarInfo(f"anything/{split}/{kind}/{number:04}.jpg")
                    info.size = len(jpeg.getvalue())
                    info.mtime = number
                    tar.addfile(info, io.BytesIO(jpeg.getvalue()))
    size = cut_sample(source, out)
    content = out.read_bytes()
    assert size == len(content)
    with tarfile.open(out) as tar:
        names = tar.getnames()
    assert len(names) == 6000
    assert names[:2] == ["cifar10/train/airplane/0000.jpg", "cifar10/train/airplane/0002.jpg"]
    cut_sample(source, out)
    assert out.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "out.tar.xz"]


def test_key_stands_for_the_content():
    """Whatever is held out or kept; another image changes it."""
    keys = []
    for arguments in ({}, {"validation": 0.5}, {"labelled": 50}):
        data = CIFAR10(**arguments)
        data.setup("fit")
        keys.append(data.key)
    assert len(set(keys)) == 1
    loaded = {split: (images.clone(), labels) for split, (images, labels) in CIFAR10().load().items()}
    loaded["train"][0][1, 0, 0, 0] ^= 1
    changed = CIFAR10()
    changed.load = lambda: loaded
    changed.setup("fit")
    assert changed.key != keys[0]


def test_some_classes_alone():
    whole, some = CIFAR10(validation=0.0), CIFAR10(validation=0.0, classes=[7, 2], augment=False)
    for data in (whole, some):
        data.setup("fit")
    images, labels = whole._splits["fit"]
    for place, label in enumerate([7, 2]):
        kept, found = some._splits["fit"]
        assert torch.equal(kept[found == place], images[labels == label])
    assert len(some.train_dataloader()) == 1000 // 128
    few = CIFAR10(validation=0.0, classes=[7, 2], labelled=10)
    few.setup("fit")
    assert few._splits["labelled"][1].bincount().tolist() == [5, 5]
    assert some.key != whole.key


@pytest.mark.parametrize(
    ("classes", "told"),
    [([], "classes must be distinct labels"), ([1, 1], r"not \[1, 1\]"), ([1, 10], "classes: there is no image of 10")],
)
def test_classes_that_are_not_there(classes, told):
    with pytest.raises(ValueError, match=told):
        CIFAR10(classes=classes).setup("fit")
