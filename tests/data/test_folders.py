import io
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from tying import ConfigurationError
from tying.data import CIFAR10, folders
from tying.data.sample import CLASSES


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """Caches in a folder of this test alone."""
    monkeypatch.setenv("TYING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(shade, size=(32, 32)):
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three training images and one test image of each class, one level below the folder given."""
    for split, count in (("train", 3), ("test", 1)):
        for label, kind in enumerate(CLASSES):
            for number in range(count):
                path = tmp_path / "data" / "cifar" / split / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(10 * label + number))
    (tmp_path / "data" / "cifar" / "train" / "readme.txt").write_text("not an image")
    return tmp_path / "data"


def packed(folder, name):
    path = folder.parent / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, f"w:{name.rpartition('.tar')[2].lstrip('.')}") as archive:
            archive.add(folder, "top")
    return path


def ready(root, **arguments):
    data = CIFAR10(root, **{"validation": 0.0, "batch_size": 5, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["", "a.tar", "a.tar.xz", "a.tar.gz", "a.zip"])
def test_every_form_gives_the_same_images(folder, name):
    root = packed(folder, name) if name else folder
    data = ready(root)
    assert data.description == f"class folders in {root.name}"
    images, labels = data._splits["fit"]
    assert labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert images[:, 0, 0].tolist() == [
        [10 * label + n, 255 - 10 * label - n, 7] for label in range(10) for n in range(3)
    ]
    assert len(data._splits["test"][1]) == 10
    assert torch.equal(ready(folder / "cifar", source="folder")._splits["fit"][0], images)


def test_decoded_once(folder, store, monkeypatch):
    first = ready(folder)
    monkeypatch.setattr(folders, "decode", None)
    assert torch.equal(ready(folder)._splits["fit"][0], first._splits["fit"][0])
    assert [path.suffix for path in store.iterdir()] == [".pt"]


def test_changed_content_is_decoded_again(folder, store):
    ready(folder)
    (folder / "cifar" / "train" / "cat" / "0.png").write_bytes(png(200))
    assert 200 in ready(folder)._splits["fit"][0][:, 0, 0, 0]
    assert len(list(store.iterdir())) == 2


def test_writing_to_the_images_leaves_the_cache_alone(folder):
    ready(folder)._splits["fit"][0].zero_()
    assert ready(folder)._splits["fit"][0].any()


def test_two_processes_start_at_once(folder, store):
    code = f"from tying.data import CIFAR10; d = CIFAR10({str(folder)!r}, validation=0.0); d.setup('fit'); print(int(d._splits['fit'][0].sum()))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert told[0] == told[1] != ""
    assert len(list(store.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "replaced"])
def test_broken_cache_is_named(folder, store, damage):
    images = ready(folder)._splits["fit"][0]
    [made] = store.iterdir()
    content = made.read_bytes()
    at = content.index(images.numpy().tobytes()) + 100
    made.write_bytes(
        {
            "truncated": content[:-1],
            "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "empty": b"",
            "replaced": b"{" + content[1:],
        }[damage]
    )
    message = "is corrupted: its checksums are wrong" if damage in ("flipped", "replaced") else "is truncated"
    with pytest.raises(ConfigurationError, match=rf"cached images: {made} .*{message}.*Remove {made}, and it will be"):
        ready(folder)
    assert made.exists()
    made.unlink()
    assert torch.equal(ready(folder)._splits["fit"][0], images)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_truncated_archive_is_named(folder, store, name, kept):
    path = packed(folder, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigurationError, match=rf"{name}"):
        ready(path)
    assert not store.exists() or list(store.iterdir()) == []


def test_class_missing_empty_or_unknown(folder):
    for file in (folder / "cifar" / "test" / "dog").iterdir():
        file.unlink()
    (folder / "cifar" / "test" / "cat").rename(folder / "cifar" / "test" / "kitten")
    with pytest.raises(ConfigurationError, match=r"missing or empty: cat, dog; not expected: kitten"):
        ready(folder)


def test_a_split_that_is_missing_is_named(folder, store):
    shutil.rmtree(folder / "cifar" / "test")
    with pytest.raises(ConfigurationError, match=r"must hold test/<class>/ .* missing or empty: airplane"):
        ready(folder / "cifar", source="folder")


def test_image_of_another_size_or_broken(folder):
    path = folder / "cifar" / "train" / "cat" / "1.png"
    path.write_bytes(png(1, (28, 30)))
    with pytest.raises(ConfigurationError, match=r"train/cat/1\.png in .* has 28×30 pixels, not 32×32"):
        ready(folder)
    path.write_bytes(b"no image")
    with pytest.raises(ConfigurationError, match=r"train/cat/1\.png in .* is not a readable image"):
        ready(folder)
    path.write_bytes(png(1)[:60])
    with pytest.raises(ConfigurationError, match=r"train/cat/1\.png in .* is not a readable image"):
        ready(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is nothing at .*none"):
        ready(tmp_path / "none", source="folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no CIFAR-10 under"):
        ready(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="missing or empty: airplane"):
        ready(tmp_path / "empty", source="folder")


def test_archives_that_unpack_to_too_much(folder, monkeypatch):
    path = packed(folder, "a.tar.xz")
    monkeypatch.setattr(folders, "LARGEST_IMAGE", 50)
    with pytest.raises(ConfigurationError, match=r"unpacks to \d+ bytes: not a small image"):
        ready(path)
    monkeypatch.setattr(folders, "LARGEST_IMAGE", 2**20)
    monkeypatch.setattr(folders, "LARGEST_TOTAL", 1000)
    with pytest.raises(ConfigurationError, match=r"unpacks to more than 1,000 bytes"):
        ready(path)


def bomb(path, size=2**26):
    """Write an archive that unpacks to far more than it says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train/cat/0.png", bytes(size))
        content = path.read_bytes()
        path.write_bytes(content.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little")))
        return
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("train/cat/" + "0" * size))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_headers_that_lie_unpack_nothing(name, tmp_path):
    bomb(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(ConfigurationError, match=r"truncated or corrupted: (Bad CRC-32|a header of 67,1..,... bytes)"):
        ready(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_checksums_at_the_end(folder):
    path = packed(folder, "a.tar.gz")
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    with pytest.raises(ConfigurationError, match="truncated or corrupted: CRC check failed"):
        ready(path)
    assert not Path(os.environ["TYING_CACHE"]).exists()


def test_archives_that_cannot_be_read(folder):
    path = packed(folder, "a.zip")
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2")
    for offset, value, told in ((8, 1, "encrypted"), (10, 97, "compression method")):
        broken = bytearray(content)
        broken[at + offset] = value
        path.write_bytes(broken)
        with pytest.raises(ConfigurationError, match=rf"a.zip cannot be read: .*{told}"):
            ready(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content[:16] + (30000).to_bytes(4, "big") * 2 + content[24:], "is not a readable image: .*decompression bomb|pixels|broken"),
        (lambda content: content[:20], "is not a readable image"),
        (lambda _: b"GIF89a" + bytes(100), "is not a readable image: cannot identify"),
    ],
)  # fmt: skip
def test_broken_images(folder, change, told):
    path = next((folder / "cifar" / "train" / "cat").iterdir())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=told):
        ready(folder)


def test_what_is_no_file(folder):
    (folder / "cifar" / "train" / "cat" / "folder.png").mkdir()
    (folder / "cifar" / "train" / "cat" / "._0.png").write_bytes(b"macOS puts these beside files")
    assert len(ready(folder)._splits["fit"][1]) == 30
    (folder / "cifar" / "train" / "cat" / "link.png").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match=r"data cannot be read: .*link.png"):
        ready(folder)


def test_a_cache_of_other_objects_is_named(folder, store):
    ready(folder)
    [made] = store.iterdir()
    torch.save(Path("elsewhere"), made)
    with pytest.raises(ConfigurationError, match=rf"(?s){made} is not a checkpoint of tensors .*Remove {made}"):
        ready(folder)


def test_nothing_is_extracted_outside(folder, tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "top")
        for name in ("../../train/cat/evil.png", "/train/cat/absolute.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            archive.addfile(info, io.BytesIO(png(1)))
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = set(tmp_path.rglob("*"))
    assert len(ready(path)._splits["fit"][1]) == 32  # read as images of the class; the link passed over
    assert all((tmp_path / "cache") in [made, *made.parents] for made in set(tmp_path.rglob("*")) - before)


def test_cache_that_cannot_be_written(folder, monkeypatch):
    Path(os.environ["TYING_CACHE"]).write_text("a file where the folder should be")
    with pytest.raises(ConfigurationError, match=r"could not be written to .*cache.*TYING_CACHE"):
        ready(folder)


def test_a_full_disk_leaves_nothing_half_written(folder, store, monkeypatch):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        ready(folder)
    assert list(store.iterdir()) == []


def test_labelled_and_the_rest():
    data = CIFAR10(labelled=40, batch_size=32)
    data.setup("fit")
    other = CIFAR10(labelled=40, batch_size=7, seed=9, augment=False)
    other.setup("fit")
    images, labels = data._splits["labelled"]
    assert labels.bincount().tolist() == [4] * 10
    assert torch.equal(images, other._splits["labelled"][0])
    assert len(data._splits["unlabelled"][1]) == 4460
    loader = data.train_dataloader()
    seen = [batch for batch, _, _ in iter(loader)]
    assert len(seen) == 4460 // 32
    assert {len(batch["labelled"].labels) for batch in seen} == {32}
    assert all((batch["unlabelled"].labels == -1).all() for batch in seen)
    assert not torch.equal(seen[0]["labelled"].labels, seen[1]["labelled"].labels)
    moved = data.on_after_batch_transfer(seen[0], 0)
    assert moved["labelled"][0].shape == (32, 3, 32, 32)
    assert moved["unlabelled"][0].shape == (32, 3, 32, 32)


@pytest.mark.parametrize("labelled", [0, 9, 4501, 10.5])
def test_labelled_out_of_range(labelled):
    with pytest.raises(ConfigurationError, match=r"labelled must be an integer from 10 .* to 4500"):
        CIFAR10(labelled=labelled).setup("fit")


@pytest.mark.parametrize("labelled", [40, 43])
def test_label_seeds_draw_other_labels_as_evenly(labelled):
    def drawn(**seeds):
        data = CIFAR10(labelled=labelled, **seeds)
        data.setup("fit")
        images, labels = data._splits["labelled"]
        assert labels.bincount().tolist() == [labelled // 10 + (kind < labelled % 10) for kind in range(10)]
        assert len(data._splits["unlabelled"][1]) == 4500 - labelled
        return images, data._splits["val"][0]

    (images, held_out), (others, also_held_out), (again, _) = drawn(), drawn(label_seed=1), drawn(label_seed=1, seed=5)
    assert torch.equal(images, drawn(label_seed=0)[0])
    assert not torch.equal(images, others)
    assert torch.equal(others, again)
    assert torch.equal(held_out, also_held_out)


def test_the_first_labels_drawn_stay_those_of_earlier_releases():
    data = CIFAR10(labelled=40)
    data.setup("fit")
    assert zlib.crc32(data._splits["labelled"][0].numpy().data) == 4053543347


def test_a_label_seed_is_no_negative_number():
    with pytest.raises(ConfigurationError, match="label_seed must be 0 or more, not -1"):
        CIFAR10(label_seed=-1)


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.delenv("TYING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folders.cache_root() == Path("/x/tying")


def test_another_folder_beside_does_not_stand_in_the_way(folder):
    (folder / "apps" / "test").mkdir(parents=True)
    assert len(ready(folder)._splits["fit"][1]) == 30
