"""Tests with other numbers of steps than in training."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from tying import ConfigurationError
from tying.callbacks import Unrolling
from tying.depth import Recurrent, Residual
from tying.models import MLP, Classifier


def loader():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)


def model():
    torch.manual_seed(0)
    network = nn.Sequential(Recurrent(Residual(nn.Linear(5, 5)), steps=2), MLP([5, 2]))
    return Classifier(network, num_classes=2)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_accuracy_by_steps(tmp_path):
    own = model()
    trainer = train(own, [Unrolling([-5, 0, 3])], data=loader(), max_epochs=2)
    [tested] = trainer.test(own, loader(), verbose=False)
    assert tested["test/steps+0/accuracy"] == pytest.approx(tested["test/accuracy"])
    x, y = loader().dataset.tensors
    for extra, steps in ((-5, 1), (3, 5)):
        own.network[0].steps = steps
        with torch.no_grad():
            right = (own(x).argmax(dim=1) == y).double().mean()
        assert tested[f"test/steps{extra:+d}/accuracy"] == pytest.approx(float(right))
    assert (tmp_path / "unrolling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_steps_are_those_of_training_afterwards():
    own = model()
    train(own, data=loader(), max_epochs=1, callbacks=[callback := Unrolling([4])]).test(own, loader(), verbose=False)
    assert own.network[0].steps == 2
    assert callback.extra == [4]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_mistakes():
    with pytest.raises(ConfigurationError, match="extra must be a list of numbers of steps"):
        Unrolling([])
    plain = Classifier(MLP([5, 2]), num_classes=2)
    with pytest.raises(ConfigurationError, match=r"Unrolling: the model has no tying\.depth\.Recurrent"):
        train(plain, [Unrolling([1])], data=loader(), max_epochs=1).test(plain, loader())
