"""CIFAR-10 in colour and in degraded grey."""

import pytest
import torch

from tying import ConfigurationError
from tying.data import CIFAR10, TwoDomains
from tying.data.cifar10 import degrade


def test_no_image_is_in_both_domains_in_training():
    data, whole = TwoDomains(grey=100, validation=0.0), CIFAR10(validation=0.0)
    data.setup("fit")
    whole.setup("fit")
    parts = data.train_dataloader().iterables
    assert {domain: len(loader.labels) for domain, loader in parts.items()} == {"colour": 4900, "grey": 100}
    assert parts["grey"].labels.bincount().tolist() == [10] * 10
    images = whole._splits["fit"][0]
    in_colour = {image.numpy().tobytes() for image in parts["colour"].images}
    others = torch.stack([image for image in images if image.numpy().tobytes() not in in_colour])
    assert torch.equal(degrade(others, 2), parts["grey"].images)
    assert data.val_dataloader() == []


def test_the_smaller_domain_is_started_over():
    data = TwoDomains(grey=100, batch_size=500, seed=3)
    data.setup("fit")
    batches = [batch for batch, _, _ in data.train_dataloader()]
    assert len(batches) == 4400 // 500
    assert {len(batch["grey"].labels) for batch in batches} == {100}
    assert not torch.equal(batches[0]["grey"].labels, batches[1]["grey"].labels)


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_image_is_evaluated_in_both_domains(split):
    data = TwoDomains(shrink=4)
    data.setup("fit")
    loader = getattr(data, f"{split}_dataloader")()
    seen = 0
    for batch, _, _ in loader:
        assert torch.equal(batch["colour"].labels, batch["grey"].labels)
        assert torch.equal(degrade(batch["colour"].images, 4), batch["grey"].images)
        seen += len(batch["grey"].labels)
    assert seen == {"val": 500, "test": 1000}[split]
    assert {name: len(one.labels) for name, one in data.predict_dataloader().iterables.items()} == {
        "colour": 1000,
        "grey": 1000,
    }
    images, labels = data.on_after_batch_transfer(batch, 0)["grey"]
    assert images.shape == (len(labels), 3, 32, 32)


def test_degraded_images_by_hand():
    pixels = torch.tensor([[[[255, 255, 255], [0, 0, 0]], [[255, 0, 0], [0, 0, 255]]]], dtype=torch.uint8)
    whole = round((255 + 0.299 * 255 + 0.114 * 255) / 4)
    assert degrade(pixels, 2).tolist() == [[[[whole] * 3] * 2] * 2]
    assert degrade(pixels[:0], 2).shape == (0, 2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"shrink": 3}, "shrink must divide the images' 32 pixels, not 3"),
        ({"shrink": 0}, "shrink must be 1 or more, not 0"),
        ({"grey": 5}, r"grey must be an integer from 10 \(one for each class\) to 4500"),
        ({"grey": 4500}, "grey=4500 leaves no image in colour"),
    ],
)
def test_bad_arguments(arguments, told):
    with pytest.raises(ConfigurationError, match=told):
        TwoDomains(**arguments).setup("fit")
