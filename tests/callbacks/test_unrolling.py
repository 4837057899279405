"""Tests with other numbers of steps than in training."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from tying import ConfigurationError
from tying.callbacks import Looping, Unrolling
from tying.depth import Recurrent, Residual, loop, loops_in
from tying.models import MLP, Classifier, SequenceModel


def loader():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)


def model():
    torch.manual_seed(0)
    network = nn.Sequential(Recurrent(Residual(nn.Linear(5, 5)), steps=2), MLP([5, 2]))
    return Classifier(network, num_classes=2)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_accuracy_by_steps(tmp_path):
    net = model()
    trainer = train(net, [Unrolling([-5, 0, 3])], data=loader(), max_epochs=2)
    [tested] = trainer.test(net, loader(), verbose=False)
    assert tested["test/steps+0/accuracy"] == pytest.approx(tested["test/accuracy"])
    x, y = loader().dataset.tensors
    for extra, steps in ((-5, 1), (3, 5)):
        net.network[0].steps = steps
        with torch.no_grad():
            right = (net(x).argmax(dim=1) == y).double().mean()
        assert tested[f"test/steps{extra:+d}/accuracy"] == pytest.approx(float(right))
    assert (tmp_path / "unrolling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_steps_are_those_of_training_afterwards():
    net = model()
    train(net, data=loader(), max_epochs=1, callbacks=[callback := Unrolling([4])]).test(net, loader(), verbose=False)
    assert net.network[0].steps == 2
    assert callback.extra == [4]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_mistakes():
    with pytest.raises(ConfigurationError, match="extra must be a list of numbers of steps"):
        Unrolling([])
    with pytest.raises(ConfigurationError, match=r"every entry of train_extra must be an integer, not 0\.5"):
        Unrolling([1], train_extra=[0.5])
    plain = Classifier(MLP([5, 2]), num_classes=2)
    with pytest.raises(ConfigurationError, match=r"Unrolling: the model has no tying\.depth\.Recurrent"):
        train(plain, [Unrolling([1])], data=loader(), max_epochs=1).test(plain, loader())
    with pytest.raises(ConfigurationError, match=r"Unrolling: the model has no tying\.depth\.Recurrent"):
        train(plain.train(), [Unrolling([1], train_extra=[1])], data=loader(), max_epochs=1)


class Counting(Classifier):
    """A classifier that notes how many steps each stage makes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = {"train": [], "val": []}

    def step(self, stage, batch, batch_idx):
        self.steps[stage].append(self.network[0].steps)
        if len(self.steps["train"]) == 20:
            raise KeyError("stop")
        return super().step(stage, batch, batch_idx)


def test_numbers_of_steps_in_training_are_drawn_for_each_batch():
    net = Counting(model().network, num_classes=2)
    expected = []

    class Drawing(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.random.fork_rng():
                expected.append(2 + (-1, 0, 3)[int(3 * torch.rand((), dtype=torch.float64))])

    data = DataLoader(loader().dataset, batch_size=16)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[Drawing(), Unrolling([0], train_extra=[-1, 0, 3])], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(net, data, data)
    assert net.steps == {"train": expected, "val": [2] * 16}
    assert {*expected} == {1, 2, 5}
    trainer.fit_loop.max_epochs = 8
    with pytest.raises(KeyError, match="stop"):
        trainer.fit(net, data, data)
    assert net.network[0].steps == 2


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_random_passes_come_after_those_that_looping_sets():
    def train_with(*callbacks):
        blocks = [Residual(nn.Linear(5, 5)) for _ in range(3)]
        net = Classifier(nn.Sequential(*blocks, MLP([5, 2])), num_classes=2)
        train(net, callbacks, data=loader(), max_epochs=2)
        return loops_in(net)[0].passes

    looping = Looping("network.[12]", passes=2)
    assert train_with(looping, Unrolling([1], train_extra=[1])) == 2
    with pytest.raises(ConfigurationError, match="train_extra adds to the passes that Looping sets: list it after"):
        train_with(Unrolling([1], train_extra=[1]), looping)


def evaluate(model, data, extra=(-1, 0, 2)):
    """Return what a test logs."""
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[Unrolling([*extra])], **options)
    [logged] = trainer.test(model, data, verbose=False)
    return logged


def test_accuracy_by_passes_of_loops(tmp_path):
    net = Classifier(nn.Sequential(*(Residual(nn.Linear(5, 5)) for _ in range(3)), MLP([5, 2])), num_classes=2)
    loop(net, "network.[12]", passes=2)
    tested = evaluate(net, loader())
    assert tested["test/steps+0/accuracy"] == pytest.approx(tested["test/accuracy"])
    x, y = loader().dataset.tensors
    [made] = loops_in(net)
    assert made.passes == 2
    for extra in (-1, 0, 2):
        made.passes = 2 + extra
        with torch.no_grad():
            right = (net(x).argmax(dim=1) == y).double().mean()
        assert tested[f"test/steps{extra:+d}/accuracy"] == pytest.approx(float(right))
    assert (tmp_path / "unrolling.png").read_bytes().startswith(b"\x89PNG")


class LanguageModel(pl.LightningModule):
    """A language model of transformers, whose loss is that of labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0
        )
        self.network = transformers.GPT2LMHeadModel(config)

    def forward(self, **batch):
        return self.network(**batch)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self(**batch).loss)


def test_loss_by_passes_of_a_language_model_of_transformers():
    net = LanguageModel()
    tokens = torch.randint(20, (10, 8), generator=torch.Generator().manual_seed(0))
    data = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=4)
    Looping("network.transformer.h.[12]", passes=2).apply(net)
    tested = evaluate(net, data)
    assert tested["test/steps+0/loss"] == pytest.approx(tested["test/loss"])
    [made] = loops_in(net.eval())
    for extra in (-1, 2):
        made.passes = 2 + extra
        with torch.no_grad():
            losses = torch.stack([net(input_ids=row[None], labels=row[None]).loss for row in tokens])
        assert tested[f"test/steps{extra:+d}/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert len({tested[f"test/steps{extra:+d}/loss"] for extra in (-1, 0, 2)}) == 3


class Stateless(nn.Module):
    """Blocks of a sequence model, without a state."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x, state=None):
        for block in self.blocks:
            x = block(x)
        return x, torch.zeros(1, x.shape[1], 1)


def test_bits_by_passes_of_a_sequence_model():
    torch.manual_seed(0)
    net = SequenceModel(Stateless(), size=6, task="language", num_classes=9)
    text = torch.randint(9, (12, 7), generator=torch.Generator().manual_seed(0))
    loop(net, "network.blocks.*", passes=2)
    tested = evaluate(net, DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), batch_size=5))
    assert tested["test/steps+0/bits"] == pytest.approx(tested["test/bits"])
    assert len({tested[f"test/steps{extra:+d}/bits"] for extra in (-1, 0, 2)}) == 3


def test_models_without_a_measure():
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(5, 5))
            loop(self, "network.*", passes=2)

        def forward(self, x):
            return self.network(x)

        def test_step(self, batch, batch_idx):
            pass

    data = DataLoader(TensorDataset(torch.zeros(4, 5), torch.zeros(4, 5)))
    message = (
        r"^Unrolling needs a model that returns a loss, or logits of shape \(\*labels\.shape, classes\); Regression "
        r"returns a tensor of shape \(1, 5\), and the labels of the batch are a tensor of shape \(1, 5\)$"
    )
    with pytest.raises(ConfigurationError, match=message):
        evaluate(Regression(), data)
