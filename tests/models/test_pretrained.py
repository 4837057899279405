"""Classifiers that begin with other classifiers' weights."""

import pytest
import torch
from test_lightning_modules import data
from torch import nn
from toys import train

from tying import ConfigurationError
from tying.models import MLP, Classifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def network(classes=2):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), MLP([48, 8, classes]))


@pytest.fixture
def pretrained(tmp_path):
    model = Classifier(network(), num_classes=2)
    trainer = train(model, data=data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "pretrained.ckpt")
    return model, tmp_path / "pretrained.ckpt"


def test_weights_and_statistics_are_loaded_and_the_head_is_fresh(pretrained):
    model, path = pretrained
    torch.manual_seed(1)
    head = MLP([48, 8, 3])[-1].weight.clone()
    torch.manual_seed(1)
    other = Classifier(network(3), pretrained=str(path), fresh=["network.2.3"], num_classes=3)
    loaded = other.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("network.2.3"):
            assert value.shape[0] == 2
        else:
            assert torch.equal(loaded[name], value), name
    assert float(loaded["network.1.running_mean"].abs().sum()) > 0
    assert torch.equal(other.network[2][3].weight, head)


def test_the_file_is_not_needed_again(pretrained, tmp_path):
    _, path = pretrained
    model = Classifier(network(), pretrained=str(path), num_classes=2)
    trainer = train(model, data=data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    path.unlink()
    again = Classifier.load_from_checkpoint(tmp_path / "tuned.ckpt", network=network())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_does_not_fit_is_told_and_nothing_is_written(pretrained, tmp_path):
    _, path = pretrained
    for wrong, told in [
        ({"network": network(3)}, r"'network.2.3.weight' is \(2, 8\) there and \(3, 8\) here, 'network.2.3.bias'"),
        (
            {"network": nn.Sequential(*network(), MLP([2, 2]))},
            "lacks network.3.1.weight, .* list in fresh what shall not",
        ),
        ({"fresh": ["network.2.9"]}, "fresh: 'network.2.9' matches nothing. Nearest"),
        ({"pretrained": str(tmp_path / "none.ckpt")}, "pretrained: there is no "),
        ({"pretrained": None, "fresh": ["network"]}, "needs pretrained: without it, no weight is loaded"),
    ]:
        given = {"network": network(), "pretrained": str(path), "num_classes": 2, **wrong}
        before = {name: value.clone() for name, value in given["network"].state_dict().items()}
        with pytest.raises(ConfigurationError, match=told):
            Classifier(**given)
        assert all(torch.equal(value, before[name]) for name, value in given["network"].state_dict().items())
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(ConfigurationError, match="is not a checkpoint of tensors and plain types"):
        Classifier(network(), pretrained=str(tmp_path / "text.ckpt"))
