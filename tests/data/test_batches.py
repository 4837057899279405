from itertools import chain

import pytest
import torch

from tying.data.batches import BatchLoader, augment, normalize


def images(count=40):
    return torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loader(**arguments):
    return BatchLoader(images(), torch.arange(40), 8, **{"train": True, "pad": 2, **arguments})


def slowly(image, offset, flip, pad):
    height, width, channels = image.shape
    out = torch.zeros_like(image)
    for r in range(height):
        for c in range(width):
            source_r, source_c = r + offset[0] - pad, (width - 1 - c if flip else c) + offset[1] - pad
            if 0 <= source_r < height and 0 <= source_c < width:
                out[r, c] = image[source_r, source_c]
    assert channels == 3
    return out


def test_augment_equals_the_loop():
    x = images(6)
    offsets = torch.tensor([[0, 0], [2, 2], [4, 4], [0, 4], [3, 1], [2, 2]])
    flips = torch.tensor([False, False, False, True, True, True])
    got = augment(x, offsets, flips, pad=2)
    for image, offset, flip, one in zip(x, offsets, flips, got, strict=True):
        assert torch.equal(one, slowly(image, offset.tolist(), bool(flip), 2))
    assert torch.equal(got[1], x[1])
    assert torch.equal(got[5], x[5].flip(1))


def test_reflected_crops_are_those_of_torch():
    x = images(25)
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    flips = torch.arange(25) % 2 == 0
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), "reflect").byte().permute(0, 2, 3, 1)
    got = augment(x, offsets, flips, pad=2, border="reflect")
    for image, (top, left), flip, crop in zip(padded, offsets.tolist(), flips, got, strict=True):
        cut = image[top : top + 8, left : left + 8]
        assert torch.equal(crop, cut.flip(1) if flip else cut)


@pytest.mark.parametrize("seed", [0, 1])
def test_alternating_flips_mirror_every_image_in_one_of_two_epochs(seed):
    shuffled = loader(alternate=True, seed=seed)
    flipped = []
    for epoch in range(4):
        shuffled.set_epoch(epoch)
        batches = [*shuffled]
        order = torch.cat([batch.labels for batch in batches]).argsort()
        flipped.append(torch.cat([batch.flips for batch in batches])[order])
    assert torch.equal(flipped[0], ~flipped[1])
    assert torch.equal(flipped[0], flipped[2])
    assert 10 < flipped[0].sum() < 30
    assert not any(batch.flips.any() for batch in loader(alternate=True, flip=False))


def test_normalize_by_hand():
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    got = normalize(x, torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.5, 0.25, 0.1]))
    assert got.shape == (1, 3, 1, 1)
    assert got.is_contiguous()
    torch.testing.assert_close(got.flatten(), torch.tensor([-1.0, 2.0, 0.0]))


def test_an_epoch_visits_each_sample_once():
    labels = torch.cat([batch.labels for batch in loader()])
    assert labels.sort().values.tolist() == list(range(40))
    assert labels.tolist() != list(range(40))


def test_order_and_augmentation_depend_on_seed_epoch_and_batch_alone():
    torch.manual_seed(1)
    first = list(loader())
    torch.manual_seed(2)
    again = loader()
    torch.rand(5)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other_epoch = loader()
    other_epoch.set_epoch(1)
    for changed in (list(other_epoch), list(loader(seed=1))):
        assert not torch.equal(changed[0].labels, first[0].labels)
        assert not torch.equal(changed[0].offsets, first[0].offsets)
    assert not torch.equal(first[0].offsets, first[1].offsets)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_jointly_what_one_sees(train, world):
    alone = BatchLoader(images(), torch.arange(40), 4 * world, train=train)
    ranks = [BatchLoader(images(), torch.arange(40), 4, train=train, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for joint, *parts in zip(alone, *ranks, strict=True):
        for whole, *pieces in zip(joint, *parts, strict=True):
            if whole is None:  # no augmentation
                assert not train
                assert pieces == [None] * world
            else:
                assert torch.equal(whole, torch.cat(pieces))


def test_drops_the_last_batch_only_in_training():
    short = BatchLoader(images(), torch.arange(40), 16, train=True)
    assert len(short) == len(list(short)) == 2
    whole = BatchLoader(images(), torch.arange(40), 16, train=False)
    assert [len(batch.labels) for batch in whole] == [16, 16, 8]


def test_a_rank_without_samples_gets_no_batch():
    x = images(9)
    ranks = [BatchLoader(x, torch.arange(9), 4, train=False, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(batch.labels) for batch in rank] for rank in ranks] == [[4], [4, 1]]


def test_goes_on_where_it_was(tmp_path):
    whole = list(_epoch(3))
    first = _epoch(3)
    iterator = iter(first)
    taken = [next(iterator) for _ in range(2)]
    state = first.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    rest = list(resumed)
    for a, b in zip(whole, taken + rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(list(resumed)) == len(whole)
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert torch.equal(next(iter(resumed)).labels, next(iter(_epoch(4))).labels)


def test_starting_over_within_an_epoch_takes_another_order():
    one = _epoch(0)
    first, second = ([batch.labels.tolist() for batch in one] for _ in range(2))
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second))
    one.set_epoch(1)
    one.set_epoch(0)
    assert [batch.labels.tolist() for batch in one] == first


def test_all_epochs_as_the_first():
    own, epochs = loader(same=True), []
    for epoch in range(2):
        own.batch_sampler.sampler.set_epoch(epoch)
        epochs.append(list(own))
    for first, again in zip(*epochs, strict=True):
        assert all(torch.equal(*parts) for parts in zip(first, again, strict=True))


def test_offsets_and_flips_cover_their_range():
    many = [batch for epoch in range(20) for batch in _epoch(epoch)]
    offsets, flips = torch.cat([b.offsets for b in many]), torch.cat([b.flips for b in many])
    assert offsets.unique().tolist() == [0, 1, 2, 3, 4]
    assert 0.4 < flips.float().mean() < 0.6


def _epoch(epoch):
    one = loader()
    one.set_epoch(epoch)
    return one
