import gzip
import tracemalloc

import pytest
import torch

from tying import ConfigurationError
from tying.data import MNIST
from tying.data.mnist import read_idx


def idx(tensor):
    header = b"\0\0\x08" + bytes([tensor.dim()]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return header + tensor.numpy().tobytes()


@pytest.fixture(params=["plain", "packed"])
def root(request, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        for name, tensor in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", torch.arange(count, dtype=torch.uint8) % 10),
        ):
            content = idx(tensor)
            if request.param == "packed":
                (raw / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / name).write_bytes(content)
    return tmp_path


def ready(root, **arguments):
    data = MNIST(root, **{"batch_size": 10, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def test_reads_both_forms(root):
    data = ready(root, validation=0.5)
    assert {split: len(labels) for split, (_, labels) in data._splits.items()} == {"fit": 30, "val": 30, "test": 20}
    x, y = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert (x.shape, y.dtype) == ((10, 1, 28, 28), torch.int64)
    raw = read_idx(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte")
    x, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    torch.testing.assert_close(x[0, 0], (raw[0] / 255 - 0.1307) / 0.3081)


def test_augmentation_shifts_but_never_mirrors(root):
    loader = ready(root, augment=True).train_dataloader()
    batches = list(loader)
    assert not any(batch.flips.any() for batch in batches)
    assert torch.cat([batch.offsets for batch in batches]).unique().tolist() == [0, 1, 2, 3, 4]


def replace(root, name, change):
    raw = root / "MNIST" / "raw"
    path = next(file for file in (raw / name, raw / f"{name}.gz") if file.exists())
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("size", [0, 2**28 + 1, 2**62])
def test_sizes_that_are_not_mnists(root, size):
    """Nothing is unpacked to find that out."""
    head = b"\0\0\x08\x02" + (size >> 31).to_bytes(4, "big") + (min(size, 2**31)).to_bytes(4, "big")
    replace(
        root, "train-labels-idx1-ubyte", lambda _: head if size > 2**32 else head[:3] + b"\1" + size.to_bytes(4, "big")
    )
    with pytest.raises(ConfigurationError, match=r"entries, and must have 1 to 268,435,456"):
        ready(root)


def test_a_file_that_unpacks_to_more_than_it_says(root):
    path = replace(root, "train-labels-idx1-ubyte", lambda content: content + bytes(2**24))
    tracemalloc.start()
    with pytest.raises(ConfigurationError, match=r"truncated or corrupted: more than 60 bytes, not 60 entries for 60"):
        ready(root)
    if path.suffix == ".gz":
        assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_what_is_missing_is_downloaded(root, monkeypatch):
    def download(folder, download):
        assert download
        (root / "MNIST" / "raw" / name).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.MNIST", download)
    first = next((root / "MNIST" / "raw").iterdir())
    name, content = first.name, first.read_bytes()
    first.unlink()  # as after a download that was interrupted
    assert ready(root, download=True)._splits
    monkeypatch.setattr("torchvision.datasets.MNIST", None)
    assert ready(root, download=True)._splits  # all is there


def test_broken_files_are_named(root):
    labels = "train-labels-idx1-ubyte"
    replace(root, labels, lambda content: content[:4] + (59).to_bytes(4, "big") + content[8:-1])
    with pytest.raises(ConfigurationError, match="train has 60 images but 59 labels"):
        ready(root)
    replace(root, labels, lambda content: content[:-3])
    with pytest.raises(ConfigurationError, match=rf"{labels}.* truncated or corrupted: 56 bytes, not 59"):
        ready(root)
    path = replace(root, labels, lambda content: b"\1" + content)
    with pytest.raises(ConfigurationError, match="not an idx file"):
        ready(root)
    if path.suffix == ".gz":
        replace(root, labels, lambda content: content[1:])
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ConfigurationError, match="truncated or corrupted"):
            ready(root)
    path.unlink()
    with pytest.raises(ConfigurationError, match=rf"no {labels} or {labels}\.gz in .*download: true"):
        ready(root)
