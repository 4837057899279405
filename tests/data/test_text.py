"""Text in streams."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from toys import train

from tying import ConfigurationError
from tying.callbacks import RandomState
from tying.data import Text
from tying.data.text import UNKNOWN, StreamLoader


@pytest.fixture
def path(tmp_path):
    text = "".join("abcdefghij"[i * i % 10] for i in range(4000))
    (tmp_path / "text.txt").write_text(text)
    return str(tmp_path / "text.txt")


def test_streams_go_on_and_targets_are_what_follows():
    loader = StreamLoader(torch.arange(43), streams=2, window=5)
    assert len(loader) == 4
    batches = list(loader)
    for (x, y), (after, _) in pairwise(batches):
        assert torch.equal(x + 1, y)
        assert torch.equal(y[:, -1], after[:, 0])
    assert batches[0][0][:, 0].tolist() == [0, 21]
    assert torch.equal(next(iter(loader))[0], batches[0][0])


def test_processes_share_the_streams():
    whole = StreamLoader(torch.arange(50), streams=4, window=3)
    parts = [StreamLoader(torch.arange(50), streams=2, window=3, rank=rank, world=2) for rank in (0, 1)]
    for (x, _), (a, _), (b, _) in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([a, b]))


def test_a_position_is_restored():
    loader, again = (StreamLoader(torch.arange(50), streams=2, window=3) for _ in range(2))
    running = iter(loader)
    next(running), next(running)
    again.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(again))[0], next(running)[0])
    assert len(list(again)) == len(loader)  # from the beginning


def test_splits_vocabulary_and_unknown_characters(path, tmp_path):
    data = Text(path, window=10, batch_size=4, vocabulary=4)
    data.setup("fit")
    assert [len(data._ids[split]) for split in ("fit", "val", "test")] == [3600, 200, 200]
    assert len(data.letters) == 3
    assert set(data._ids["fit"].unique().tolist()) == {UNKNOWN, 1, 2, 3}
    whole = Text(path, window=10, batch_size=4)
    whole.setup("fit")
    assert whole.letters == "014569".translate(str.maketrans("014569", "abefgj"))
    x, y = next(iter(whole.train_dataloader()))
    assert whole.text(x[0]) == "abejgfgjeb"
    assert x.shape == y.shape == (4, 10)
    other = Text(path, window=10, batch_size=4, characters=1000)
    other.setup("fit")
    assert len(other._ids["fit"]) == 1000
    assert other.key != whole.key
    (tmp_path / "odd.txt").write_text("ab" * 2000 + "é" * 100)
    odd = Text(str(tmp_path / "odd.txt"), window=10, batch_size=2)
    odd.setup("fit")
    assert odd.text(odd._ids["test"][-2:]) == "��"


def test_files_of_other_encodings(tmp_path):
    (tmp_path / "old.txt").write_bytes("café naïve ".encode("latin-1") * 100)
    with pytest.raises(ConfigurationError, match="cannot be read as utf-8: 'utf-8' codec can't decode byte 0xe9"):
        Text(str(tmp_path / "old.txt"), window=10, batch_size=2).setup("fit")
    data = Text(str(tmp_path / "old.txt"), window=10, batch_size=2, encoding="latin-1")
    data.setup("fit")
    assert data.text(data._ids["fit"][:10]) == "café naïve"
    assert data.text(torch.tensor([1, 99])) == " �"  # a slot that no character has


def test_the_standard_library():
    data = Text(characters=10_000)
    data.setup("fit")
    assert len(data._ids["fit"]) == 10_000
    assert "def " in data.text(data._ids["test"])
    assert data.description.startswith("sources of Python 3.")
    again = Text(characters=10_000)
    again.setup("fit")
    assert again.key == data.key


class Guess(pl.LightningModule):
    def __init__(self, stop=None):
        super().__init__()
        self.table, self.seen, self.stop = torch.nn.Linear(1, 1), [], stop

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x[:, 0].tolist())
        return (self.table(x[:, :1].float()) - y[:, :1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_training_goes_on_at_the_next_window(path, tmp_path):
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def data():
        return Text(path, window=30, batch_size=8)

    whole, resumed = Guess(), Guess()
    train(whole, [RandomState(), SaveAt()], data=data(), max_epochs=1, limit_val_batches=0)
    train(resumed, [RandomState()], data=data(), ckpt_path=tmp_path / "a.ckpt", max_epochs=1, limit_val_batches=0)
    assert resumed.seen == whole.seen[7:]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"window": 0}, "window must be 1 or more, not 0"),
        ({"vocabulary": 1}, "vocabulary must be 2 or more, not 1"),
        ({"characters": 1}, "characters must be 2 or more, not 1"),
        ({"path": "none.txt"}, "path: none.txt cannot be read as utf-8"),
        ({"encoding": "klingon"}, "cannot be read as klingon: unknown encoding"),
        ({"window": 250}, "the text for val has 200 characters: a window of 250, and what follows it, needs 251"),
        (
            {"window": 150, "batch_size": 64},
            "3,600 characters: a window of 150, and what follows it, for each of 64 streams needs 9,664",
        ),
    ],
)
def test_mistakes(arguments, told, path):
    def use():
        data = Text(**{"path": path, **arguments})
        data.setup("fit")
        data.train_dataloader()

    with pytest.raises(ConfigurationError, match=told):
        use()
