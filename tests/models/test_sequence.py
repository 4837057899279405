"""Recurrent networks trained on sequences and on text."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import same, train

from tying import ConfigurationError
from tying.callbacks import HardTying, RandomState, SlopeAnnealing
from tying.data import Text
from tying.depth import PassthroughGRU, ZoneoutLSTM
from tying.hard import tie
from tying.models import HMNetwork, SequenceModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
NETWORKS = {
    "LSTM": lambda inputs, size: nn.LSTM(inputs, size),
    "GRU": lambda inputs, size: nn.GRU(inputs, size),
    "zoneout": lambda inputs, size: ZoneoutLSTM(inputs, size, zoneout_cell=0.1, zoneout_hidden=0.1),
    "passthrough": lambda inputs, size: PassthroughGRU(inputs, size, rank=2),
    "multiscale": lambda inputs, size: HMNetwork(inputs, size),
}


def sequences(count=64):
    x = torch.randn(count, 6, 1, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0, 0] > 0).long()), batch_size=16)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_text("abcd" * 1500)
    return str(tmp_path / "text.txt")


def language(kind="LSTM", size=12, **options):
    torch.manual_seed(0)
    options = {"num_classes": 8, "optimizer": "adamw", "lr": 0.02, "weight_decay": 0.0, **options}
    return SequenceModel(NETWORKS[kind](size, size), size=size, task="language", **options)


def text(path):
    return Text(path, window=10, batch_size=8, vocabulary=8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_classifies(kind):
    torch.manual_seed(0)
    model = SequenceModel(NETWORKS[kind](1, 12), size=12, num_classes=2, optimizer="adamw", lr=0.02)
    trainer = train(model, data=sequences(), max_epochs=25)
    [tested] = trainer.test(model, sequences(), verbose=False)
    assert tested["test/accuracy"] > 0.85
    assert "test/bits" not in tested
    assert trainer.predict(model, sequences())[0].shape == (16, 2)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_learns_a_text(kind, path):
    model = language(kind)
    trainer = train(model, data=text(path), max_epochs=2)
    assert trainer.callback_metrics["val/bits"] < 0.5
    [tested] = trainer.test(model, text(path), verbose=False)
    assert tested["test/bits"] < 0.5
    assert tested["test/loss"] == pytest.approx(tested["test/bits"] * 0.6931, rel=1e-3)


def test_states_are_carried_from_batch_to_batch_and_not_over_epochs(path):
    given = []

    class Watched(nn.LSTM):
        def forward(self, x, hx=None):
            if self.training:
                given.append(None if hx is None else hx[0].clone())
            return super().forward(x, hx)

    torch.manual_seed(0)
    model = SequenceModel(Watched(12, 12), size=12, task="language", num_classes=8)
    train(model, data=text(path), max_epochs=2)
    steps = len(given) // 2
    assert [state is None for state in given] == ([True] + [False] * (steps - 1)) * 2
    assert all(not state.requires_grad for state in given if state is not None)


def test_a_resume_within_an_epoch_is_bitwise(path, tmp_path):
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 30:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(*callbacks, ckpt_path=None):
        model = language("zoneout", schedule="constant")
        train(model, [RandomState(), *callbacks], data=text(path), ckpt_path=ckpt_path, max_epochs=1)
        return model

    assert same(run(SaveAt()), run(ckpt_path=tmp_path / "a.ckpt"))


def test_tied_embeddings_save_a_vocabulary_of_vectors(path):
    plain, tied = language(), language()
    tie(tied, ["embedding.weight ~ head.weight"])
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, tied)]
    assert counts[0] - counts[1] == 8 * 12
    model = language()
    trainer = train(model, [HardTying(["embedding.weight ~ head.weight"])], data=text(path), max_epochs=2)
    assert model.embedding.weight is model.head.weight
    assert trainer.callback_metrics["val/bits"] < 0.5


def test_slopes_of_a_multiscale_network(path):
    model = language("multiscale")
    train(model, [SlopeAnnealing(rate=1.0)], data=text(path), max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    assert model.network.recurrent.slope == 2.0


def test_mistakes():
    for options, told in (
        ({"task": "translation"}, "task is 'classification' or 'language'"),
        ({"embedding": 3}, "needs task='language'"),
        ({"test_samples": 2}, "tests by one pass"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            SequenceModel(nn.LSTM(1, 4), size=4, **options)
