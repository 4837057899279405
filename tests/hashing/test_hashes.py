"""Hashes: golden values, limits, statistics and mistakes."""

import math
from dataclasses import dataclass

import pytest
import torch
import xxhash
from reference import toeplitz_by_loops
from torch.nn import functional as F

from tying.hashing import (
    BlockHash,
    CodebookHash,
    DirichletHash,
    Hash,
    HashedParametrization,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    RecurrentHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
    entropy,
    loads,
)
from tying.hashing.hashes import hash32, log_gammas, xxh32
from tying.hashing.parametrization import table_slots

# written down once: they hold every hash to what it was, on every machine and in every release
GOLDEN = [
    (IdentityHash(), 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    (ModulusHash(), 5, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]),
    (UniformHash(seed=1), 7, [3, 1, 3, 5, 0, 4, 0, 5, 5, 3, 3, 2]),
    (DirichletHash(seed=1, alpha=0.5), 7, [1, 1, 1, 6, 1, 2, 1, 3, 3, 1, 1, 1]),
    (NeighborhoodHash(seed=1, radius=1), 7, [0, 0, 2, 4, 3, 5, 5, 1, 2, 2, 3, 4]),
    (XXHash(seed=1), 7, [1, 1, 6, 2, 3, 1, 5, 4, 2, 3, 5, 4]),
    (BlockHash(seed=1, block=4), 7, [2, 3, 4, 5, 1, 2, 3, 4, 2, 3, 4, 5]),
    (RecurrentHash(layers=3), 4, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]),
]


@pytest.mark.parametrize(("hash", "size", "golden"), GOLDEN, ids=lambda value: str(value)[:30])
def test_golden_values(hash, size, golden):
    before = torch.random.get_rng_state()
    index = hash.index(12, size)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert index.dtype == torch.int64
    assert index.tolist() == golden
    in_parts = [hash.slot(torch.arange(a, a + 3), size, hash.state(size)) for a in (0, 3, 6, 9)]
    assert torch.equal(torch.cat(in_parts), index)
    assert torch.equal(hash.slot(torch.arange(12).view(3, 4), size).flatten(), index)


def test_xxhash_is_the_packages():
    ids = torch.tensor([0, 1, 2, 255, 256, 65_535, 1 << 31, (1 << 32) - 1])
    for seed in (0, 1, 1691, (1 << 32) - 1):
        expected = [xxhash.xxh32_intdigest(int(i).to_bytes(4, "little"), seed=seed) for i in ids]
        assert xxh32(ids, seed).tolist() == expected
        assert XXHash(seed).slot(ids, 1000).tolist() == [value % 1000 for value in expected]


def chi_square(index, size):
    """In standard deviations from its mean, for a uniform distribution."""
    counts = loads(index, size).double()
    expected = counts.sum() / size
    return float((((counts - expected) ** 2 / expected).sum() - (size - 1)) / math.sqrt(2 * (size - 1)))


@pytest.mark.parametrize("size", [2, 1000, 1021])
@pytest.mark.parametrize("seed", [0, 1, -3, 1 << 40])
def test_uniform_draws_are_uniform_and_independent_of_the_seed(size, seed):
    """Five standard deviations: about one test in two million would fail by chance, had the seeds not been fixed."""
    count = 1_000_000
    index = UniformHash(seed).index(count, size)
    assert abs(chi_square(index, size)) < 5
    other = UniformHash(seed + 1).index(count, size)
    agreeing = float((index == other).double().mean())
    assert abs(agreeing - 1 / size) < 5 * math.sqrt((1 / size) * (1 - 1 / size) / count)
    follows = float((index[1:] == index[:-1]).double().mean())
    assert abs(follows - 1 / size) < 5 * math.sqrt((1 / size) * (1 - 1 / size) / count)


def test_identifiers_beyond_32_bits_are_mixed_too():
    low = torch.arange(1000)
    assert float((hash32(low, 0) == hash32(low + (1 << 32), 0)).double().mean()) < 0.01


@pytest.mark.parametrize("hash", [UniformHash(3), XXHash(3), DirichletHash(0.3, 3)])
def test_signs_are_fair_and_independent_of_slots(hash):
    ids = torch.arange(1_000_000)
    signs = hash.sign(ids).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5e-3
    slots = hash.slot(ids, 2).double() * 2 - 1
    assert abs(float((signs * (slots - slots.mean())).mean())) < 5e-3


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.1, 1.0, 10.0, 100.0])
def test_entropy_of_a_dirichlet(alpha):
    """``E[H(p)] = ψ(nα + 1) − ψ(α + 1)``; five standard errors over 200 draws."""
    n = 1000
    expected = float(torch.digamma(torch.tensor(n * alpha + 1.0)) - torch.digamma(torch.tensor(alpha + 1.0)))
    drawn = torch.tensor([entropy(DirichletHash(alpha, seed).probabilities(1, n)) for seed in range(200)])
    assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / math.sqrt(200) + 1e-6


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_gamma_draws(alpha):
    """Mean α, variance α; five standard errors."""
    count = 200_000
    drawn = log_gammas(alpha, count, seed=0).exp()
    assert abs(float(drawn.mean()) - alpha) < 5 * math.sqrt(alpha / count)
    assert abs(float(drawn.var()) - alpha) < 5 * math.sqrt((6 * alpha + 2 * alpha**2) / count)


def test_dirichlet_loads_follow_its_probabilities():
    hash, n, count = DirichletHash(seed=2, alpha=0.5), 50, 1_000_000
    shares = hash.probabilities(count, n)
    assert abs(float(shares.sum()) - 1) < 1e-12
    counts = loads(hash.index(count, n), n).double()
    assert float(((counts - count * shares).abs() / (count * shares * (1 - shares)).sqrt().clamp(min=1)).max()) < 5
    assert abs(chi_square(DirichletHash(seed=2, alpha=1e6).index(count, n), n)) < 5
    assert DirichletHash(1e-6, 0).index(1000, 20).unique().numel() == 1


def test_neighborhood_limits():
    count = 10_000
    for n in (100, 101):
        assert torch.equal(NeighborhoodHash(0, 5).index(count, n), ModulusHash().index(count, n))
        assert torch.equal(NeighborhoodHash(51, 5).index(count, n), UniformHash(5).index(count, n))
        assert torch.equal(NeighborhoodHash(1000, 5).index(count, n), UniformHash(5).index(count, n))
    away = (NeighborhoodHash(3, 5).index(count, 100) - ModulusHash().index(count, 100) + 50) % 100 - 50
    assert away.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_neighborhood_load_variance():
    """``(N/n) · 2r/(2r + 1)``, over 300 seeds of 100 loads; the share of one in five standard errors."""
    n, turns = 100, 50
    for radius in (1, 4):
        variance = torch.stack(
            [loads(NeighborhoodHash(radius, seed).index(n * turns, n), n).double().var() for seed in range(300)]
        )
        expected = turns * 2 * radius / (2 * radius + 1)
        assert abs(float(variance.mean()) - expected) < 5 * float(variance.std()) / math.sqrt(300)


def test_modulus_loads():
    counts = loads(ModulusHash().index(1003, 100), 100)
    assert int(counts.max() - counts.min()) == 1
    assert entropy(loads(ModulusHash().index(1000, 100), 100)) == pytest.approx(math.log(100), abs=1e-12)


@pytest.mark.parametrize(
    "hash",
    [
        ModulusHash(),
        UniformHash(3),
        NeighborhoodHash(2, 3),
        NeighborhoodHash(60, 3),
        BlockHash(8, 3),
        BlockHash(80, 3),
        XXHash(3),
        DirichletHash(seed=3),
    ],
    ids=str,
)
def test_probabilities_are_those_of_the_loads(hash):
    n, count = 103, 1_600_000
    counts, shares = loads(hash.index(count, n), n).double(), hash.probabilities(count, n)
    assert float(shares.sum()) == pytest.approx(1)
    block = getattr(hash, "block", 1)  # blocks come in one draw
    assert float(((counts - count * shares).abs() / (count * block * shares).sqrt().clamp(min=1)).max()) < 5


def test_entropy_and_loads():
    index = torch.tensor([[0, 1], [1, -1]])
    assert loads(index, 3).tolist() == [1, 2, 0]
    assert entropy(loads(index, 3)) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert entropy(torch.tensor([5, 0])) == 0.0
    n, count = 1000, 100_000
    short = math.log(n) - entropy(loads(UniformHash().index(count, n), n))
    assert short == pytest.approx((n - 1) / (2 * count), rel=0.2)


GEOMETRIES = [
    {"input_size": 5, "kernel_size": 3},
    {"input_size": (6, 5), "kernel_size": (3, 2), "padding": (1, 0)},
    {"input_size": (7, 6), "kernel_size": (2, 3), "stride": (2, 1), "padding": 1},
    {"input_size": 8, "kernel_size": 3, "dilation": 2, "padding": 2},
    {"input_size": 9, "kernel_size": 2, "stride": 3, "dilation": 3, "padding": 1},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_toeplitz_is_a_convolution(geometry):
    hash = ToeplitzHash(2, 3, **geometry)
    outputs, inputs = hash.features
    size = hash.table_size(outputs * inputs)
    index = hash.index(outputs * inputs, size).view(outputs, inputs)
    assert torch.equal(index, toeplitz_by_loops(hash))
    kernel = torch.randn(size, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, inputs, dtype=torch.float64)
    weight = HashedParametrization((outputs, inputs), size, hash, index="stored")(kernel)
    shape = hash.kernel_size if isinstance(hash.kernel_size, tuple) else (hash.kernel_size,) * 2
    images = x.view(4, 2, *((hash.input_size,) * 2 if isinstance(hash.input_size, int) else hash.input_size))
    options = {key: geometry[key] for key in ("stride", "padding", "dilation") if key in geometry}
    expected = F.conv2d(images, kernel.view(3, 2, *shape), **options).flatten(1)
    torch.testing.assert_close(x @ weight.T, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    [ours] = torch.autograd.grad((x @ weight.T * upstream).sum(), kernel)
    [theirs] = torch.autograd.grad((expected * upstream).sum(), kernel)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_toeplitz_loads_are_equal_without_padding():
    hash = ToeplitzHash(1, 1, input_size=(6, 7), kernel_size=(3, 2))
    index = hash.index(math.prod(hash.features), 6)
    assert loads(index, 6).tolist() == [4 * 6] * 6
    assert entropy(loads(index, 6)) == pytest.approx(math.log(6), abs=1e-12)


def test_blocks():
    index = BlockHash(seed=4, block=8).index(8 * 500, 100).view(500, 8)
    assert torch.equal(index - index[:, :1], torch.arange(8).expand(500, 8))
    assert (int(index.min()), int(index.max())) == (0, 99)
    assert torch.equal(BlockHash(1, 4).index(500, 100), UniformHash(4).index(500, 100))
    whole = BlockHash(100, 4).index(300, 100).view(3, 100)
    assert torch.equal(whole, torch.arange(100).expand(3, 100))


def test_codebook():
    hash = CodebookHash(torch.tensor([[0, 2], [-1, 1]]))
    assert hash.index(4, 3).tolist() == [0, 2, -1, 1]
    with pytest.raises(ValueError, match="4 assignments do not fit 5 weights"):
        hash.index(5, 3)


@pytest.mark.parametrize(
    ("count", "ratio", "size"),
    [(25, 0.1, 3), (4_000_000, 0.1, 400_000), (6, 5 / 6, 5), (11, 0.1, 2), (7, 1.0, 7), (1000, 1e-9, 1), (3, 1 / 3, 1)],
)
def test_table_sizes_are_exact(count, ratio, size):
    assert table_slots(count, ratio, UniformHash()) == size


@dataclass(frozen=True)
class Wild(Hash):
    offset: int = 0

    def slot(self, ids, table_size, drawn=None):
        return ids % table_size + self.offset


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: table_slots(10, 0.0, UniformHash()), r"table_ratio must be in \(0, 1\], not 0.0"),
        (lambda: table_slots(10, 1.1, UniformHash()), r"table_ratio must be in \(0, 1\], not 1.1"),
        (lambda: table_slots(10, math.nan, UniformHash()), r"table_ratio must be in \(0, 1\], not nan"),
        (lambda: table_slots(10, 0.5, IdentityHash()), r"IdentityHash\(\) needs a table of 10 slots, table_ratio=10/10, not 5"),
        (lambda: UniformHash().index(10, 0), "table_size must be 1 or more, not 0"),
        (lambda: IdentityHash().index(10, 9), "needs a table of 10 slots, table_ratio=10/10, not 9"),
        (lambda: DirichletHash(alpha=0.0), "alpha must be above 0, not 0.0"),
        (lambda: DirichletHash(alpha=-1.0), "alpha must be above 0, not -1.0"),
        (lambda: DirichletHash(alpha=math.inf), "alpha must be above 0 and finite, not inf"),
        (lambda: NeighborhoodHash(radius=-1), "radius must be 0 or more, not -1"),
        (lambda: XXHash(seed=-1), r"seed must be in \[0, 4294967296\), not -1"),
        (lambda: BlockHash(block=0), "block must be 1 or more, not 0"),
        (lambda: BlockHash(block=8).index(10, 7), r"block must be in \[1, 7\], not 8"),
        (lambda: RecurrentHash(layers=3).index(10, 3), "10 weights are not those of 3 equal layers"),
        (lambda: ToeplitzHash(1, 1, 2, 3), r"a kernel of \(3, 3\) does not fit images of \(2, 2\)"),
        (lambda: ToeplitzHash(1, 1, 5, 3, stride=0), "stride must be 1 or more, not 0"),
        (lambda: ToeplitzHash(1, 1, 4, 3).index(10, 9), "is for a linear layer from 16 to 4, not for 10 weights"),
        (lambda: HashedParametrization((2, 2), 2, Wild(1)), r"slot must return integers in \[-1, 2\), not torch.int64 from 1 to 2"),
        (lambda: HashedParametrization((2, 2), 2, Wild(-2)), "from -2 to -1"),
        (lambda: HashedParametrization((2, 2), 2, UniformHash(), density=0.0), r"density must be in \(0, 1\], not 0.0"),
        (lambda: HashedParametrization((2, 2), 2, UniformHash(), index="storde"), r"index must be .*Nearest.*stored"),
        (lambda: HashedParametrization((2, 2), 2, UniformHash(), index="structured"), "has no structure here: use index='stored'"),
        (lambda: HashedParametrization((2, 2), 2, ModulusHash(), index="structured", sign=True), "has no structure here"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()
