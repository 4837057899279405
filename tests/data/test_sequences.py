"""MNIST pixel by pixel."""

import gzip

import pytest
import torch

from tying import ConfigurationError
from tying.data import SequentialMNIST
from tying.data.mnist import pixels_in_order


@pytest.fixture
def root(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.numpy().tobytes()))
        labels = bytes(i % 10 for i in range(count))
        head = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        (raw / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels))
    return tmp_path


@pytest.mark.parametrize("shrink", [1, 4])
def test_pixels_in_one_order_for_all(root, shrink):
    plain, permuted, other = (
        SequentialMNIST(root, permuted, shrink, seed, batch_size=10, validation=0.0)
        for permuted, seed in ((False, 0), (True, 0), (True, 1))
    )
    sequences = []
    for data in (plain, permuted, other):
        data.setup("test")
        x, y = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
        assert x.shape == (10, (28 // shrink) ** 2, 1)
        assert y.tolist() == list(range(10))
        sequences.append(x)
    assert torch.equal(sequences[0][:, permuted.order], sequences[1])
    assert not torch.equal(sequences[1], sequences[2])


def test_pixels_by_hand():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert pixels_in_order(image, torch.tensor([1, 0, 3, 2]), shrink=2).flatten().tolist() == [4.5, 2.5, 12.5, 10.5]


def test_mistakes(root):
    with pytest.raises(ConfigurationError, match="shrink must divide the images' 28 pixels, not 3"):
        SequentialMNIST(root, shrink=3)
