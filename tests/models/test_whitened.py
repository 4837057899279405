import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tying.data import CIFAR10
from tying.errors import ConfigurationError
from tying.models import WhitenedClassifier, WhitenedConvNet
from tying.models.whitened import six_views

SMALL = {"widths": [4, 4], "num_classes": 10}
OPTIONS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def correlated_images():
    generator = torch.Generator().manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(200, 3, 14, 14, generator=generator), 3, stride=1)
    return smooth + 0.5 * smooth.mean(dim=1, keepdim=True)


def test_the_filters_whiten_patches():
    network, images = WhitenedConvNet(**SMALL).double(), correlated_images().double()
    assert not network.is_whitened
    network.whiten(images, epsilon=0.0)
    responses = network.whitening(images)
    covariance = torch.cov(responses[:, :12].transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(12).double(), atol=1e-6, rtol=0)
    assert torch.equal(network.whitening.weight[:12], -network.whitening.weight[12:])
    assert network.is_whitened
    network.whiten(images, epsilon=1e3)  # a large epsilon shortens the filters, those of small variance most
    assert network.whitening.weight.norm() < 0.2


def test_convolutions_begin_as_the_identity():
    network = WhitenedConvNet([24, 30])
    x = torch.rand(2, 24, 4, 4)
    assert torch.equal(network.blocks[0].conv1(x), x)
    assert torch.equal(network.blocks[1].conv1(x)[:, :24], x)


def test_six_views_by_hand():
    x = torch.randn(2, 3, 8, 8)
    weight = torch.randn(3, 8, 8)
    model = lambda images: (images * weight).sum(dim=(1, 2, 3)).unsqueeze(1).tanh()  # noqa: E731
    padded = F.pad(x, (1, 1, 1, 1), "reflect")
    views = {0.25: [x], 0.125: [padded[:, :, :8, :8], padded[:, :, 2:, 2:]]}
    expected = sum(share * (model(view) + model(view.flip(3))) for share, some in views.items() for view in some)
    torch.testing.assert_close(six_views(model, x), expected)


def fit(model, **arguments):
    trainer = Trainer(**{**OPTIONS, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, **arguments})
    trainer.fit(model, CIFAR10(batch_size=100))
    return trainer


def test_a_fit_whitens_by_training_images_without_augmentation():
    model = WhitenedClassifier(WhitenedConvNet(**SMALL), lr=0.0)
    fit(model)
    data = CIFAR10(batch_size=100, augment=False)
    data.setup("fit")
    images = next(iter(data.make_loader("fit", train=False, rank=0, world=1)))
    expected = WhitenedConvNet(**SMALL)
    expected.whiten(data.on_after_batch_transfer(images, 0)[0])
    torch.testing.assert_close(model.network.whitening.weight, expected.whitening.weight)
    kept = model.network.whitening.weight.clone()
    trained = WhitenedClassifier(WhitenedConvNet(**SMALL))
    trained.network.load_state_dict(model.network.state_dict() | {"whitening.weight": kept + 1})
    fit(trained)
    assert torch.equal(trained.network.whitening.weight, kept + 1)


def test_other_data_than_images_are_refused():
    batches = DataLoader(TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4).long()))
    with pytest.raises(ConfigurationError) as error:
        Trainer(**OPTIONS, max_epochs=1).fit(WhitenedClassifier(WhitenedConvNet(**SMALL)), batches, batches)
    assert str(error.value) == (
        "the filters of WhitenedConvNet come from the training images of a data module of tying.data, not of NoneType. "
        "With other data, call network.whiten(images) before"
    )


def test_biases_have_a_rate_of_their_own_and_the_decay_of_the_weights():
    model = WhitenedClassifier(WhitenedConvNet(**SMALL), bias_lr=10.0, lr=0.5, weight_decay=0.01)
    weights, biases = model.parameter_groups()
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(0.5 * 0.01)
    assert biases["lr"] == 5.0
    assert {*biases["params"]} == {m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {*weights["params"]} | {*biases["params"]} == {*model.parameters()}


def test_tests_with_six_views():
    model = WhitenedClassifier(WhitenedConvNet(**SMALL), test_views=True)
    trainer = fit(model, limit_test_batches=2)
    [metrics] = trainer.test(model, CIFAR10(batch_size=100), verbose=False)
    assert {*metrics} == {"test/loss", "test/accuracy", "test/views/loss", "test/views/accuracy"}
    data = CIFAR10(batch_size=100)
    data.setup("test")
    batches = [
        data.on_after_batch_transfer(batch, 0) for batch, _ in zip(data.test_dataloader(), range(2), strict=False)
    ]
    right = [(six_views(model.eval(), x).argmax(dim=1) == y).float().mean() for x, y in batches]
    assert metrics["test/views/accuracy"] == pytest.approx(float(sum(right)) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"widths": []}, "widths must be the channels of one block or more"),
        ({"widths": [4, 0]}, "widths[1] must be 1 or more, not 0"),
        ({"scale": 0.0}, "scale must be above 0, not 0.0"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ConfigurationError) as error:
        WhitenedConvNet(**arguments)
    assert str(error.value) == text
