"""Recurrent networks trained on sequences and on text."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toys import same, train

from tying import ConfigurationError
from tying.callbacks import HardTying, RandomState, SlopeAnnealing
from tying.data import Text
from tying.depth import HMLSTM, HyperLSTM, PassthroughGRU, ZoneoutLSTM
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
    "hypernetwork": lambda inputs, size: HyperLSTM(inputs, size, hyper_size=4, embedding_size=2),
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
    torch.manual_seed(1)
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


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 20}, {"val_check_interval": 0.3}], ids=str)
@pytest.mark.parametrize("place", ["within an epoch", "at its end", "after its end"])
def test_a_resume_is_bitwise(place, options, tmp_path):
    (tmp_path / "text.txt").write_text("".join("abcdefg"[i * i % 113 % 7] for i in range(4000)))
    path, ckpt_path = str(tmp_path / "text.txt"), tmp_path / "a.ckpt"
    steps = []

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if place == "within an epoch" and trainer.global_step == 13:
                trainer.save_checkpoint(ckpt_path)

        def on_train_epoch_end(self, trainer, *_):
            if place == "at its end" and trainer.current_epoch == 0:
                trainer.save_checkpoint(ckpt_path)

    def run(*callbacks, ckpt_path=None, max_epochs=2):
        model = language("zoneout", schedule="constant", warmup=0.0)
        trainer = train(
            model, [RandomState(), *callbacks], data=text(path), ckpt_path=ckpt_path, max_epochs=max_epochs, **options
        )
        steps.append(trainer.global_step)
        return model, trainer

    whole, _ = run(Saving())
    if place == "after its end":
        run(max_epochs=1)[1].save_checkpoint(ckpt_path)
    resumed, _ = run(ckpt_path=ckpt_path)
    assert same(whole, resumed)
    assert steps[0] == steps[-1] == 2 * options.get("limit_train_batches", 44)


def test_states_of_evaluation_go_on_and_begin_anew(path):
    given = []

    class Watched(nn.LSTM):
        def forward(self, x, hx=None):
            if not self.training:
                given.append(hx is None)
            return super().forward(x, hx)

    torch.manual_seed(0)
    model = SequenceModel(Watched(12, 12), size=12, task="language", num_classes=8)
    trainer = train(model, data=text(path), max_epochs=2, num_sanity_val_steps=0)
    assert given[: len(given) // 2] == given[len(given) // 2 :]
    assert given.count(True) == 2  # once an epoch
    given.clear()
    [tested] = trainer.test(model, text(path), verbose=False)
    trainer.test(model, text(path), verbose=False)
    assert len(given) > 2
    assert given.count(True) == 2
    given.clear()
    found = torch.cat(trainer.predict(model, text(path)), dim=1)
    assert given.count(True) == 1
    data = text(path)
    data.setup("test")
    y = torch.cat([y for _, y in data.test_dataloader()], dim=1)
    loss = nn.functional.nll_loss(found.log().flatten(0, 1), y.flatten())
    assert float(loss) == pytest.approx(tested["test/loss"], rel=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_bf16(kind, path):
    model = language(kind)
    trainer = train(model, data=text(path), max_epochs=1, precision="bf16-mixed")
    assert trainer.callback_metrics["val/bits"] < 2


def test_tied_embeddings_save_a_vocabulary_of_vectors(path):
    plain, tied = language(), language()
    tie(tied, ["head.weight ~ embedding.weight"])
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, tied)]
    assert counts[0] - counts[1] == 8 * 12
    model = language()
    trainer = train(model, [HardTying(["head.weight ~ embedding.weight"])], data=text(path), max_epochs=2)
    assert model.embedding.weight is model.head.weight
    assert trainer.callback_metrics["val/bits"] < 0.5


def test_the_scale_of_the_embedding():
    plain, scaled = language(), language(embedding_std=0.5)
    assert torch.equal(scaled.embedding.weight, 0.5 * plain.embedding.weight)
    assert torch.equal(scaled.head.weight, plain.head.weight)


@pytest.mark.parametrize("task", ["classification", "language"])
def test_dropout_is_on_the_inputs_and_the_outputs_of_the_network(task):
    model = SequenceModel(nn.LSTM(4, 4), size=4, num_classes=8, task=task, dropout=0.5)
    x = torch.randint(8, (3, 5)) if task == "language" else torch.randn(3, 5, 4)
    torch.manual_seed(3)
    logits = model(x)
    torch.manual_seed(3)
    steps = model.embedding(x.t()) if task == "language" else x.transpose(0, 1)
    outputs, _ = model.network(F.dropout(steps, 0.5))
    assert torch.equal(logits, model.head(F.dropout(outputs.transpose(0, 1) if task == "language" else outputs[-1])))
    plain = SequenceModel(nn.LSTM(4, 4), size=4, num_classes=8, task=task)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain(x))


def test_slopes_of_a_multiscale_network(path):
    model = language("multiscale")
    train(model, [SlopeAnnealing(rate=1.0)], data=text(path), max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    assert model.network.recurrent.slope == 2.0


def test_mistakes():
    for options, told in (
        ({"task": "translation"}, "task must be 'classification' or 'language'"),
        ({"embedding": 3}, "needs task='language'"),
        ({"embedding": 0, "task": "language"}, "embedding must be 1 or more, not 0"),
        ({"embedding_std": -1}, "embedding_std must be 0 or more, not -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1\.0"),
        ({"test_samples": 2}, "tests by one pass"),
        ({"network": nn.LSTM(1, 4, batch_first=True)}, "make it with batch_first=False"),
        ({"network": nn.LSTM(1, 4, bidirectional=True), "task": "language"}, "use one direction"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            SequenceModel(**{"network": nn.LSTM(1, 4), "size": 4, **options})
    with pytest.raises(ConfigurationError, match="size=5, and the network's outputs are 4"):
        SequenceModel(nn.LSTM(1, 4), size=5)(torch.zeros(2, 7, 1))


def test_a_vocabulary_larger_than_the_model(path):
    with pytest.raises(ConfigurationError, match="num_classes=7, and the data's vocabulary is 8: set it to 7 or fewer"):
        train(language(num_classes=7), data=text(path), max_epochs=1)


def test_a_multiscale_lstm_by_its_top_layer():
    torch.manual_seed(0)
    model = SequenceModel(HMLSTM(1, 4, outputs="top"), size=4)
    assert model(torch.randn(2, 7, 1)).shape == (2, 10)


@pytest.mark.parametrize("network", [HMLSTM(4, 4), nn.Linear(4, 4)])
def test_networks_of_another_interface(network):
    with pytest.raises(
        ConfigurationError, match=r"must return a pair of outputs and a state.*tying\.models\.HMNetwork"
    ):
        SequenceModel(network, size=4)(torch.zeros(2, 7, 4))


def test_images_layout_is_no_matter_of_sequences(path):
    model = language(channels_last=True)
    assert model(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 8)
