"""Layers and tables at the edges of their sizes: very many weights, very large tables, tables that a hash fixes."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.hashing import (
    BlockHash,
    DirichletHash,
    Hash,
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    HashedParametrization,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    RecurrentHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
    hash_weights,
    hashes,
    report,
    table_loads,
)
from tying.hashing import parametrization as hashing_parametrization
from tying.hashing.parametrization import STORED, table_slots


@dataclass(frozen=True)
class Halves(Hash):
    """Makes every third weight zero; a hash of a user."""

    seed: int = 0

    def slot(self, ids, table_size):
        return torch.where(ids % 3 == 2, -1, ids // 2 % table_size)


class Shifted(UniformHash):
    """Overrides the slots of a known hash, and makes the weight of number 2³⁰ zero."""

    def slot(self, ids, table_size, drawn=None):
        return torch.where(ids == 1 << 30, -1, super().slot(ids, table_size))


HASHES = {
    type(hash).__name__: hash
    for hash in (
        ModulusHash(),
        UniformHash(),
        DirichletHash(),
        NeighborhoodHash(radius=3),
        XXHash(),
        BlockHash(block=8),
        Halves(),
        Shifted(),
    )
}
LAYERS = {
    "linear": lambda **options: HashedLinear(60_000, 70_000, bias=False, table_ratio=1e-6, device="meta", **options),
    "convolution": lambda **options: HashedConv2d(20_000, 20_000, 3, table_ratio=1e-6, device="meta", **options),
    "embedding": lambda **options: HashedEmbedding(10**9, 4, table_ratio=1e-6, device="meta", **options),
}


@pytest.fixture
def counted(monkeypatch):
    """Count the weights whose slots are computed."""
    counts = []
    slot = HashedParametrization._slot
    monkeypatch.setattr(
        HashedParametrization,
        "_slot",
        lambda self, positions: counts.append(positions.numel()) or slot(self, positions),
    )
    return counts


@pytest.mark.parametrize("options", [{}, {"index": "computed"}, {"sign": True}, {"density": 0.5}], ids=str)
@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_billions_of_weights_are_made_at_once(layer, hash, options, counted):
    started = time.monotonic()
    made = LAYERS[layer](hash=HASHES[hash], **options)
    assert made.virtual.shape.numel() > 3e9
    assert sum(counted) <= 1 << 20
    assert time.monotonic() - started < 5
    str(report(nn.Sequential(HashedEmbedding(5, 2))))  # as before
    assert made.virtual.zeros == (hash in ("Halves", "Shifted") or "density" in options)
    made.virtual.describe()
    assert sum(counted) <= 1 << 20


@pytest.mark.parametrize("kind", [lambda: HashedLinear(720_000, 720_000, hash=toeplitz(), device="meta")])
def test_a_structured_layer_of_many_weights_is_made_at_once(kind, counted):
    layer = kind()
    assert layer.table.shape == (8 * 8 * 9,)
    assert sum(counted) <= 10
    assert layer.virtual.index == "structured"


def toeplitz():
    return ToeplitzHash(8, 8, input_size=300, kernel_size=3, padding=1)


@pytest.mark.parametrize("hash", HASHES)
def test_an_embedding_of_billions_of_weights_is_read(hash):
    layer = HashedEmbedding(10**9, 4, padding_idx=7, table_ratio=1e-6, hash=HASHES[hash])
    ids = torch.tensor([0, 7, (1 << 28), 10**9 - 1])
    rows = layer(ids)
    slots = HASHES[hash].with_salt(0)
    state = slots.state(len(layer.table))
    positions = ids[:, None] * 4 + torch.arange(4)
    index = slots.slot(positions, len(layer.table), *([] if state is None else [state]))
    expected = torch.where(index < 0, 0.0, layer.table[index.clamp(min=0)])
    expected[1] = 0
    assert torch.equal(rows, expected)
    rows.square().sum().backward()
    assert layer.table.grad.count_nonzero() > 0


def test_what_is_sampled_beyond_a_limit_is_the_same(monkeypatch):
    """With a small limit, layers of few weights take the path of those of many."""
    exact = {
        name: HashedLinear(40, 8192, hash=hash, index="computed", table_ratio=0.01) for name, hash in HASHES.items()
    }
    monkeypatch.setattr(hashing_parametrization, "STORED", 1 << 12)
    for name, layer in exact.items():
        sampled = HashedLinear(40, 8192, hash=HASHES[name], index="computed", table_ratio=0.01)
        sampled.load_state_dict(layer.state_dict())
        assert torch.equal(sampled.weight, layer.weight)
        assert torch.equal(sampled.virtual.loads(), layer.virtual.loads())
        assert sampled.virtual.distinct_rows() is None
        assert "units" not in str(report(nn.Sequential(sampled)))


def test_slots_outside_the_table_are_still_refused_at_the_ends():
    class Wrong(Hash):
        def slot(self, ids, table_size):
            return ids

    with pytest.raises(ConfigurationError, match=r"integers in \[-1, 4000\), not"):
        HashedEmbedding(10**9, 4, table_ratio=1e-6, hash=Wrong(), device="meta")


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("index", ["stored", "computed"])
def test_tables_beyond_the_slots_are_refused(hash, index, monkeypatch):
    """A smaller limit stands for 2³¹ − 1."""
    monkeypatch.setattr(hashes, "LARGEST_TABLE", 1000)
    small, largest, large = (
        {"table_ratio": size / 2000, "hash": HASHES[hash], "index": index} for size in (998, 999, 1001)
    )
    HashedLinear(50, 40, **small)
    HashedLinear(50, 40, **largest)  # with zero: 1,000
    words = (
        r"the index must address [\d,]+ values .* 32 bits address only 1,000: lower table_ratio, or use several tables"
    )
    for refuse in (
        lambda: HashedLinear(50, 40, **large),
        lambda: HashedEmbedding(50, 40, **large),
        lambda: HashedConv2d(5, 400, 1, **large),
        lambda: HashedLinear(50, 40, **small, sign=True),
        lambda: hash_weights(nn.Sequential(nn.Linear(50, 40)), ["0.weight"], **large),
        lambda: hash_weights(
            nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 50)), ["*.weight"], **large, scope="network"
        ),
        lambda: HASHES[hash].index(2000, 1001),
    ):
        with pytest.raises(ConfigurationError, match=words):
            refuse()
    for scope, names in (("layer", "'0.weight'"), ("network", "'0.weight', '1.weight'")):
        model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 50))
        with pytest.raises(ConfigurationError, match=rf"^{names}: .*{words}"):
            hash_weights(model, ["*.weight"], **large, scope=scope)


def test_the_limit_is_that_of_32_bits():
    """Nothing is allocated: on the meta device, or before."""
    assert torch.iinfo(torch.int32).max == hashes.LARGEST_TABLE
    for refuse in (
        lambda: HashedEmbedding(1 << 31, 4, table_ratio=0.25, device="meta"),
        lambda: HashedEmbedding(1 << 31, 4, hash=IdentityHash(), device="meta"),
        lambda: HashedLinear(1 << 16, 1 << 16, table_ratio=0.3, sign=True, device="meta"),
        lambda: HashedParametrization((1 << 16, 1 << 16), 1 << 31, DirichletHash()),
    ):
        with pytest.raises(ConfigurationError, match=r"32 bits address only 2,147,483,647"):
            refuse()
    assert HashedLinear(1 << 16, 1 << 16, False, 0.3, device="meta").table.shape == (1_288_490_189,)


@dataclass(frozen=True)
class Fixed(Hash):
    """Has a table of given size, whatever the weights."""

    entries: int = 7

    def slot(self, ids, table_size):
        return ids % table_size

    def table_size(self, count):
        return self.entries


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (
            lambda ratio: HashedLinear(
                3, 5, table_ratio=ratio, hash=ToeplitzHash(3, 5, input_size=1, kernel_size=3, padding=1)
            ),
            r"ToeplitzHash\(in_channels=3, out_channels=5, input_size=\(1, 1\), kernel_size=\(3, 3\), .*\) needs a table of "
            "135 slots for 15 weights, but .* at most one for each weight: change the sizes",
        ),
        (lambda ratio: HashedLinear(3, 2, table_ratio=ratio, hash=Fixed()), r"Fixed\(entries=7\) needs a table of 7 slots for 6"),
        (lambda ratio: HashedConv2d(3, 2, 1, table_ratio=ratio, hash=Fixed()), "7 slots for 6 weights"),
        (lambda ratio: HashedEmbedding(3, 2, table_ratio=ratio, hash=Fixed()), "7 slots for 6 weights"),
        (lambda ratio: HashedLinear(3, 2, table_ratio=ratio, hash=Fixed(0)), "0 slots for 6 weights"),
        (
            lambda ratio: hash_weights(nn.Sequential(nn.Linear(3, 2)), ["0.weight"], ratio, Fixed()),
            "7 slots for 6 weights",
        ),
        (
            lambda ratio: hash_weights(nn.Sequential(nn.Linear(3, 2)), ["0.weight"], ratio, Fixed(), scope="network"),
            "7 slots for 6 weights",
        ),
    ],
)  # fmt: skip
def test_a_table_larger_than_its_weights_is_named(layer, ratio, told):
    with pytest.raises(ConfigurationError, match=told):
        layer(ratio)


@pytest.mark.parametrize(
    ("hash", "count", "size"),
    [
        (IdentityHash(), 15, 15),
        (RecurrentHash(layers=3), 15, 5),
        (ToeplitzHash(1, 1, input_size=4, kernel_size=3), 64, 9),
        (Fixed(), 15, 7),
    ],
)
def test_hashes_that_fix_their_table_choose_it(hash, count, size):
    assert table_slots(count, None, hash) == size
    with pytest.raises(ConfigurationError, match=rf"needs a table of {size} slots, table_ratio={size}/{count}, not 1"):
        table_slots(count, 1 / count, hash)


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_loads_are_recounted(scope):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    hash_weights(model, ["*.weight"], 0.1, NeighborhoodHash(5), scope=scope, density=0.7)
    counts = {}
    for name in ("0", "1"):
        virtual = model.get_submodule(name).virtual
        holder = f"{name}.weight" if scope == "layer" else "0.weight"
        row = counts.setdefault(holder, [0] * virtual.table_size)
        for slot in virtual.slots().flatten().tolist():
            if slot >= 0:
                row[slot] += 1
    assert {name: uses.tolist() for name, uses in table_loads(model).items()} == counts
    assert STORED == 1 << 24
