"""Hashed layers: every path gives the numbers of a slow loop."""

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from reference import hashed_by_loops
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tying import ConfigurationError
from tying.hard import bake
from tying.hashing import (
    BlockHash,
    CodebookHash,
    DirichletHash,
    Hash,
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    HashedParametrization,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
)
from tying.hashing.fast_paths import RepeatedRows
from tying.hashing.gather import CHUNK

HASHES = [
    IdentityHash(),
    ModulusHash(),
    UniformHash(1),
    DirichletHash(0.3, 1),
    NeighborhoodHash(2, 1),
    XXHash(1),
    BlockHash(3, 1),
]
TOEPLITZ = ToeplitzHash(2, 3, input_size=(4, 3), kernel_size=2, padding=(1, 0), stride=(1, 2))


def ratio(hash):
    return None if isinstance(hash, IdentityHash) else 0.3


def indexes(hash):
    return (
        ["stored", "computed", "structured"] if isinstance(hash, ModulusHash | IdentityHash) else ["stored", "computed"]
    )


@pytest.mark.parametrize("hash", HASHES, ids=lambda hash: type(hash).__name__)
@pytest.mark.parametrize(("sign", "density"), [(False, 1.0), (True, 1.0), (False, 0.4), (True, 0.4)])
def test_every_path_is_the_loop(hash, sign, density):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    for index in indexes(hash):
        if index == "structured" and (sign or density < 1):
            continue
        layer = HashedLinear(7, 9, True, ratio(hash), hash, sign, density, index, dtype=torch.float64)
        weight, slots, signs = hashed_by_loops(layer)
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12)
        output = layer(x)
        torch.testing.assert_close(output, x @ weight.T + layer.bias, rtol=0, atol=1e-12)
        upstream = torch.randn_like(output)
        given, entries = torch.autograd.grad((output * upstream).sum(), [x, layer.table])
        dense = upstream.T @ x.detach()
        expected = torch.zeros_like(layer.table)
        for i, (slot, xi) in enumerate(zip(slots, signs, strict=True)):
            if slot >= 0:
                expected[slot] += xi * dense.flatten()[i]
        torch.testing.assert_close(entries, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(given, upstream @ weight.detach(), rtol=0, atol=1e-12)


def test_reconstruction_is_feature_hashing():
    """``z_i = Σ_k t_k Σ_{j: h(i,j)=k} ξ(i,j) a_j``."""
    layer = HashedLinear(8, 5, False, 0.2, XXHash(3), sign=True, dtype=torch.float64)
    _, slots, signs = hashed_by_loops(layer)
    a = torch.randn(8, dtype=torch.float64)
    slots, signs = torch.tensor(slots).view(5, 8), torch.tensor(signs).view(5, 8)
    features = torch.zeros(5, len(layer.table), dtype=torch.float64).scatter_add_(1, slots, signs * a)
    torch.testing.assert_close(layer(a), features @ layer.table, rtol=0, atol=1e-12)


def test_one_entry_is_a_constant_matrix():
    layer = HashedLinear(6, 4, False, 1e-9)
    assert layer.table.shape == (1,)
    assert torch.equal(layer.weight, layer.table.expand(4, 6))


def test_identity_is_a_dense_layer_bitwise():
    torch.manual_seed(0)
    hashed = nn.Sequential(HashedLinear(6, 5, hash=IdentityHash()), nn.ReLU(), HashedLinear(5, 3, hash=IdentityHash()))
    dense = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for ours, theirs in zip(hashed[::2], dense[::2], strict=True):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    x = torch.randn(4, 6)
    for model in (hashed, dense):
        model(x).square().sum().backward()
    assert torch.equal(hashed(x), dense(x))
    for ours, theirs in zip(hashed[::2], dense[::2], strict=True):
        assert torch.equal(ours.table.grad, theirs.weight.grad.flatten())
        assert torch.equal(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("shape", [(9, 6), (5, 7), (20, 4), (3, 50), (4, 48)])
@pytest.mark.parametrize("size", [1, 4, 6, 7, 24, 36])
@pytest.mark.parametrize("first", [0, 5, 100])
def test_repeated_rows(shape, size, first):
    count = shape[0] * shape[1]
    size = min(size, count)
    table = torch.randn(size, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    weight = table[((first + torch.arange(count)) % size).view(shape)]
    rows = RepeatedRows(shape, size, first % size)
    torch.testing.assert_close(rows.weight(table), weight, rtol=0, atol=0)
    torch.testing.assert_close(rows.linear(x, table), x @ weight.T, rtol=0, atol=1e-12)
    upstream = torch.randn(2, 3, shape[0], dtype=torch.float64)
    ours = torch.autograd.grad((rows.linear(x, table) * upstream).sum(), [x, table])
    theirs = torch.autograd.grad(((x @ weight.T) * upstream).sum(), [x, table])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert rows.distinct == len(weight.detach().unique(dim=0))


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "stride": 2}, {"groups": 2}, {"padding": 1, "padding_mode": "circular"}]
)
@pytest.mark.parametrize("hash", [ModulusHash(), UniformHash(2)], ids=str)
def test_convolution(options, hash):
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    layers = [
        HashedConv2d(4, 6, 3, **options, table_ratio=0.2, hash=hash, index=index, dtype=torch.float64)
        for index in indexes(hash)
    ]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    dense = nn.Conv2d(4, 6, 3, **options, dtype=torch.float64)
    dense.load_state_dict({"weight": layers[0].weight.detach(), "bias": layers[0].bias.detach()})
    for layer in layers:
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
        layer(x).square().sum().backward()
        torch.testing.assert_close(layer.table.grad, layers[0].table.grad, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("index", ["auto", "stored", "computed"])
@pytest.mark.parametrize("hash", [UniformHash(2), BlockHash(4, 2), ModulusHash()], ids=str)
def test_embedding(index, hash):
    layer = HashedEmbedding(
        30, 6, padding_idx=3, table_ratio=0.1, hash=hash, sign=True, index=index, dtype=torch.float64
    )
    ids = torch.tensor([[0, 3, 29], [7, 7, 3]])
    weight = layer.weight.detach().clone()
    weight[3] = 0
    torch.testing.assert_close(layer(ids), F.embedding(ids, weight), rtol=0, atol=0)
    upstream = torch.randn(2, 3, 6, dtype=torch.float64)
    (layer(ids) * upstream).sum().backward()
    grad, layer.table.grad = layer.table.grad, None
    ((layer.weight[ids] * (ids != 3)[..., None]) * upstream).sum().backward()
    torch.testing.assert_close(grad, layer.table.grad, rtol=0, atol=1e-12)


def test_the_structure_of_toeplitz_is_its_matrix():
    outputs, inputs = TOEPLITZ.features
    layers = [
        HashedLinear(inputs, outputs, hash=TOEPLITZ, index=index, dtype=torch.float64)
        for index in ("structured", "stored")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, inputs, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=0, atol=1e-12)
    table = layers[0].table.detach().clone()
    layers[0].weight = layers[0].weight.detach()
    torch.testing.assert_close(layers[0].table.detach(), table, rtol=0, atol=1e-12)


def test_density_leaves_the_table_its_size():
    layer = HashedLinear(100, 200, table_ratio=0.05, density=0.3)
    assert layer.table.shape == (1000,)
    kept = float((layer.virtual.slots() >= 0).double().mean())
    assert abs(kept - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20_000)
    assert torch.equal(layer.weight == 0, layer.virtual.slots() < 0)


FEW = pytest.mark.parametrize("few", [0, 1 << 20])  # looked up in chunks, or by torch


@FEW
@pytest.mark.parametrize("index", ["stored", "computed"])
def test_second_derivatives(index, few, monkeypatch):
    monkeypatch.setattr("tying.hashing.gather.FEW", few)
    layer = HashedLinear(4, 3, False, 0.4, UniformHash(1), sign=True, index=index, dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def compute(table, x):
        return F.linear(x, layer.virtual(table)).tanh()

    table = layer.table.detach().requires_grad_()
    assert torch.autograd.gradcheck(compute, (table, x))
    assert torch.autograd.gradgradcheck(compute, (table, x))


@FEW
@pytest.mark.parametrize("index", ["stored", "computed"])
def test_long_tables_add_up_in_chunks(index, few, monkeypatch):
    monkeypatch.setattr("tying.hashing.gather.FEW", few)
    monkeypatch.setattr("tying.hashing.gather.CHUNK", 7)
    monkeypatch.setattr("tying.hashing.parametrization.CHUNK", 7)
    layer = HashedLinear(11, 9, False, 0.2, UniformHash(1), index=index, dtype=torch.float64)
    weight, slots, _ = hashed_by_loops(layer)
    assert torch.equal(layer.weight, weight)
    upstream = torch.randn(9, 11, dtype=torch.float64)
    [grad] = torch.autograd.grad((layer.weight * upstream).sum(), layer.table)
    expected = torch.zeros_like(layer.table).index_add_(0, torch.tensor(slots), upstream.flatten())
    torch.testing.assert_close(grad, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*CUDA")
def test_compiled_entries_are_those_of_the_hash(monkeypatch):
    monkeypatch.setattr("tying.hashing.parametrization.COMPILED", 1)
    computed, stored = (
        HashedLinear(1201, 499, False, 0.1, XXHash(1), sign=True, density=0.9, index=index)
        for index in ("computed", "stored")
    )
    stored.load_state_dict(computed.state_dict())
    assert torch.equal(computed.weight, stored.weight)
    assert computed.virtual._fastest.read is not None
    upstream = torch.randn(499, 1201)
    grads = [torch.autograd.grad(layer.weight, layer.table, upstream)[0] for layer in (computed, stored)]
    torch.testing.assert_close(*grads)


@pytest.fixture
def computed(monkeypatch):
    """A layer whose entries are to be computed by compiled code."""
    monkeypatch.setattr("tying.hashing.parametrization.COMPILED", 1)
    return HashedLinear(1201, 499, False, 0.1, XXHash(1), index="computed")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("before", [False, True], ids=["at first", "afterwards"])
def test_compiled_entries_are_left_out_of_traces(computed, before):
    x = torch.randn(2, 1201)
    if before:
        computed(x)
    expected = F.linear(x, computed.table[computed.virtual.slots()])
    torch.testing.assert_close(torch.jit.trace(computed, x)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert computed(mode.from_tensor(x)).shape == (2, 499)
    torch.testing.assert_close(torch.compile(computed, fullgraph=True, backend="aot_eager")(x), expected)


def test_where_compilation_is_off_entries_are_computed_in_chunks(computed, monkeypatch):
    asked, numbered = [], HashedParametrization._extended_slot

    def record(self, numbers):
        asked.append(numbers.numel())
        return numbered(self, numbers)

    monkeypatch.setattr(HashedParametrization, "_extended_slot", record)
    with torch.compiler.set_stance("force_eager"):
        weight = computed.weight
    assert max(asked) <= 2 * CHUNK < weight.numel()


def test_what_torch_cannot_compile_is_computed_slowly(monkeypatch):
    class Listed(Hash):
        def slot(self, ids, table_size, drawn=None):
            return torch.tensor([number % table_size for number in ids.flatten().tolist()]).view(ids.shape)

    monkeypatch.setattr("tying.hashing.parametrization.COMPILED", 1)
    layer = HashedLinear(6, 4, False, 0.25, Listed(), index="computed")
    with pytest.warns(UserWarning, match=r"Listed\(\) is computed slowly, without compilation: "):
        weight = layer.weight
    assert torch.equal(weight, layer.table[torch.arange(24) % 6].view(4, 6))


def test_gradients_add_up_in_float32():
    """1,000 · 100 ones in bfloat16 would stop growing at 256."""
    layer = HashedLinear(1000, 100, False, 1e-9, dtype=torch.bfloat16)
    layer.weight.sum().backward()
    assert layer.table.grad.dtype == torch.bfloat16
    assert float(layer.table.grad) == float(torch.tensor(100_000.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("index", ["stored", "computed", "structured"])
def test_autocast(index):
    layer = HashedLinear(16, 8, table_ratio=0.25, hash=ModulusHash(), index=index)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert layer.table.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "hash", [UniformHash(1), DirichletHash(0.5, 1), ModulusHash(), TOEPLITZ], ids=lambda h: type(h).__name__
)
@pytest.mark.parametrize("index", ["stored", "computed", "structured"])
def test_compile_in_one_graph(hash, index):
    if index == "structured" and not isinstance(hash, ModulusHash | ToeplitzHash):
        pytest.skip("it has no structure")
    torch.compiler.reset()
    outputs, inputs = TOEPLITZ.features
    layer = HashedLinear(inputs, outputs, hash=hash, index=index)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, inputs)
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).square().sum(), layer.table)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer.table), expected)


@pytest.mark.parametrize("index", ["stored", "computed", "structured"])
def test_export(index):
    layer = HashedLinear(6, 4, table_ratio=0.5, hash=ModulusHash(), index=index).eval()
    x = torch.randn(2, 6)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


@pytest.mark.parametrize("hash", [UniformHash(1), DirichletHash(0.5, 1)], ids=str)
def test_copies(hash):
    layer = HashedLinear(6, 4, hash=hash)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight, layer.weight)
    with torch.no_grad():
        copied.table.zero_()
    assert layer.weight.any()
    pickled = pickle.loads(pickle.dumps(layer))
    assert torch.equal(pickled.weight, layer.weight)
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert torch.equal(moved.weight, layer.weight)
    assert torch.equal(layer.double().weight, moved.weight.double())


@pytest.mark.parametrize("hash", [*HASHES, CodebookHash(torch.arange(24) % 5)], ids=lambda hash: type(hash).__name__)
def test_a_checkpoint_holds_table_and_description(hash):
    layer = HashedLinear(
        6, 4, table_ratio=5 / 24 if isinstance(hash, CodebookHash) else ratio(hash), hash=hash, sign=True
    )
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    draws = isinstance(hash, DirichletHash | CodebookHash)
    assert set(state) == {"table", "bias", "virtual._extra_state", *["virtual.drawn"] * draws}
    other = HashedLinear(6, 4, table_ratio=len(layer.table) / 24, hash=hash, sign=True)
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)


def test_what_was_drawn_in_floating_point_is_the_checkpoints():
    layer, other = (HashedLinear(30, 20, table_ratio=0.1, hash=DirichletHash(0.5, 1)) for _ in range(2))
    layer.virtual._take(
        layer.virtual.drawn, DirichletHash(0.5, 2).state(60)
    )  # as another machine might have drawn it, and much more
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.virtual.slots(), layer.virtual.slots())
    assert torch.equal(other.weight, layer.weight)


BAND = ToeplitzHash(1, 1, input_size=(1, 4), kernel_size=(1, 3), padding=(0, 1))


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (16,)])
def test_inputs_of_another_width_are_refused(shape):
    for layer in (HashedLinear(4, 4, hash=BAND), HashedLinear(4, 4, hash=ModulusHash())):
        with pytest.raises(ConfigurationError, match=f"this layer takes 4 features, not {shape[-1]}"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 4), (4,), (2, 3, 4)])
def test_empty_batches_and_others(shape):
    x = torch.randn(shape)
    layer, stored = (HashedLinear(4, 4, hash=BAND, index=index) for index in ("structured", "stored"))
    stored.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), stored(x))


def test_mistakes_of_types():
    with pytest.raises(IndexError, match=r"row indices must be integers, not torch.float32"):
        HashedEmbedding(9, 3)(torch.tensor([1.7]))
    with pytest.raises(ConfigurationError, match=r"seed must be an integer, not 1.5"):
        HashedLinear(4, 4, hash=UniformHash(1.5))
    with pytest.raises(
        ConfigurationError, match=r"IdentityHash\(\).slot must return integers in .* not torch.int64 from 0 to 3"
    ):
        HashedParametrization((2, 2), 2, IdentityHash())
    with pytest.raises(ConfigurationError, match="an empty weight cannot be hashed"):
        HashedParametrization((0, 2), 2, UniformHash())


def test_what_does_not_fit_is_refused_by_name():
    layer = nn.Sequential(HashedLinear(30, 20, table_ratio=0.1, hash=DirichletHash(0.5, 1)))
    state = layer.state_dict()
    with pytest.raises(ConfigurationError, match=r"'0.virtual': .* truncated or corrupted"):
        layer.load_state_dict({**state, "0.virtual._extra_state": state["0.virtual._extra_state"][:-3]})
    told = r"'0.virtual': the state of its hash is torch.int32 of shape \(60,\); in the checkpoint it is .* \(59,\)"
    with pytest.raises(ConfigurationError, match=told):
        layer.load_state_dict({**state, "0.virtual.drawn": state["0.virtual.drawn"][:-1]})
    del state["0.virtual.drawn"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.virtual.drawn"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["0.virtual.drawn"]
    uniform = HashedLinear(30, 20, table_ratio=0.1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "virtual.drawn"'):
        uniform.load_state_dict({**uniform.state_dict(), "virtual.drawn": torch.zeros(60)})


def test_what_is_loaded_is_copied_and_what_is_refused_is_not_taken():
    layer, other = (HashedLinear(6, 4, table_ratio=0.25, hash=CodebookHash(torch.arange(24) % n)) for n in (6, 5))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    other.load_state_dict(state)
    state["virtual.drawn"].zero_()
    assert torch.equal(copy.deepcopy(other).weight, layer.weight)
    with pytest.raises(ConfigurationError, match=r"'virtual': .* integers in \[-1, 6\), not .* from 6 to 6"):
        other.load_state_dict({**state, "virtual.drawn": state["virtual.drawn"] + 6})
    assert torch.equal(copy.deepcopy(other).weight, layer.weight)
    empty = {name: value.to("meta") for name, value in state.items()}
    other.load_state_dict(empty, assign=True)
    assert other.table.is_meta
    assert torch.equal(other.virtual.drawn, layer.virtual.drawn)


def test_what_was_drawn_elsewhere_is_compiled_and_exported():
    layer, other = (HashedEmbedding(9, 3, table_ratio=0.5, hash=DirichletHash(0.5, 1)) for _ in range(2))
    drawn = layer.virtual.drawn.clone()
    drawn[1] += 1  # as another machine might have rounded it
    layer.virtual._take(layer.virtual.drawn, drawn)
    other.load_state_dict(layer.state_dict())
    chosen = torch.tensor([1])
    assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(chosen), layer(chosen))
    assert torch.equal(torch.export.export(other, (chosen,)).module()(chosen), layer(chosen))


class Stripes(Hash):
    """As the README says: a subclass with one method."""

    def __init__(self, width=2):
        self.width = width

    def slot(self, ids, table_size, drawn=None):
        return ids // self.width % table_size


def test_a_hash_of_ones_own_is_known_by_its_arguments():
    layer, other = (HashedLinear(6, 4, hash=Stripes(3), sign=True) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(
        ValueError, match=r"by Stripes\(width=2\), signed; in the checkpoint it is .* by Stripes\(width=3\)"
    ):
        HashedLinear(6, 4, hash=Stripes(), sign=True).load_state_dict(layer.state_dict())
    for wrong in ("UniformHash", UniformHash):
        with pytest.raises(ValueError, match=r"hash must be one of tying\.hashing, such as UniformHash\(seed=0\), not"):
            HashedLinear(6, 4, hash=wrong)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hash": UniformHash(2)}, r"by UniformHash\(seed=1\); in the checkpoint it is .* by UniformHash\(seed=2\)"),
        ({"sign": True}, r"in the checkpoint it is .*, signed"),
        ({"density": 0.5}, r"in the checkpoint it is .*, density 0.5"),
    ],
)
def test_another_hash_is_refused(change, told):
    layer = HashedLinear(6, 4, hash=UniformHash(1))
    other = HashedLinear(6, 4, **{"hash": UniformHash(1), **change})
    with pytest.raises(ValueError, match=told):
        layer.load_state_dict(other.state_dict())


def test_the_modes_load_each_others_checkpoints():
    layers = [
        HashedLinear(6, 4, table_ratio=0.5, hash=ModulusHash(), index=index) for index in ("stored", "structured")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_assigning_a_weight_takes_the_nearest_table():
    layer = HashedLinear(6, 4, table_ratio=0.3, hash=UniformHash(1), sign=True, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)
    before = layer.table.detach().clone()
    layer.weight = weight
    with torch.no_grad():
        design = torch.stack(
            [layer.virtual(row).flatten() for row in torch.eye(len(layer.table), dtype=torch.float64)], 1
        )
        used = design.abs().sum(0) > 0
        best = torch.linalg.lstsq(design[:, used], weight.flatten()).solution
    torch.testing.assert_close(layer.table[used].detach(), best)
    assert torch.equal(layer.table[~used], before[~used])  # entries that no weight uses stay
    before = layer.weight.detach().clone()
    layer.weight = before
    torch.testing.assert_close(layer.weight.detach(), before)
    with pytest.raises(ValueError, match=r"a weight of shape \(2, 6\) is not one of \(4, 6\)"):
        layer.weight = weight[:2]


def test_memory_is_the_tables():
    """What is held between steps: table, gradient, momentum and checkpoint are the ratio of the dense layer's."""
    layer = HashedLinear(500, 400, False, 0.05, index="computed")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(3, 500)).sum().backward()
    optimizer.step()
    held = [layer.table, layer.table.grad, optimizer.state[layer.table]["momentum_buffer"]]
    assert [tensor.numel() for tensor in held] == [10_000] * 3
    assert layer.virtual._stored is None
    assert not [*layer.buffers()]
    sizes = []
    for module in (layer, nn.Linear(500, 400, bias=False)):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] / sizes[1] == pytest.approx(0.05, abs=0.02 * 0.05 + 3000 / sizes[1])


def test_deterministic_algorithms():
    layer = HashedLinear(20, 30, table_ratio=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(layer(torch.ones(2, 20)).sum(), layer.table)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def test_repr_tells_the_choice():
    assert "index='structured'" in repr(HashedLinear(6, 4, hash=ModulusHash()))
    assert "index='stored'" in repr(HashedLinear(6, 4))
    assert "a table of 3 by UniformHash(seed=0)" in repr(HashedLinear(6, 4))
    assert HashedParametrization((1 << 13, 1 << 12), 10, UniformHash(), index="computed").index == "computed"


def test_a_hash_of_ones_own_needs_one_method_of_two_arguments():
    class Halves(Hash):
        def slot(self, ids, table_size):
            return ids // 2 % table_size

    layer = HashedLinear(4, 2, table_ratio=0.25, hash=Halves())
    assert layer.virtual.slots().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert Halves().index(3, 2).tolist() == [0, 0, 1]


@pytest.mark.parametrize("parent", [ModulusHash, BlockHash, UniformHash])
def test_another_slot_than_the_parents_is_nowhere_the_parents(parent):
    class Strided(parent):
        def slot(self, ids, table_size, drawn=None):
            return (ids * 7 + 3) % table_size

    own, table = Strided(), torch.arange(64.0)
    expected = own.index(4096, 64).view(64, 64).float()
    for index in ("auto", "stored", "computed"):
        virtual = HashedParametrization((64, 64), 64, own, index=index)
        assert torch.equal(virtual(table), expected)
        assert torch.equal(virtual.slots().float(), expected)
    assert own.probabilities(4096, 64) is None


def test_a_hash_is_known_by_all_that_its_tensors_hold():
    class Own(Hash):
        def __init__(self, entries):
            self.entries = entries

    one = torch.arange(2000)
    other = one.clone()
    other[1000] = 0
    assert repr(Own(one)) == repr(Own(one.clone()))
    assert len({repr(Own(entries)) for entries in (one, other, one.int(), one.view(2, -1))}) == 4


def test_arguments_stand_in_the_order_of_the_papers():
    assert DirichletHash(0.1, 7) == DirichletHash(alpha=0.1, seed=7)
    assert NeighborhoodHash(2, 7) == NeighborhoodHash(radius=2, seed=7)
    assert BlockHash(8, 7) == BlockHash(block=8, seed=7)
    assert repr(DirichletHash(1)) == repr(DirichletHash(1.0))
    assert ToeplitzHash(1, 1, 4, 3) == ToeplitzHash(1, 1, [4, 4], (3, 3))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda hash: HashedLinear(8, 8, hash=hash), r"from 16 to 4, not for \(8, 8\) weights"),
        (
            lambda hash: HashedLinear(4, 16, hash=hash),
            r"from 16 to 4, not for \(4, 16\)|from 16 to 4, not for \(16, 4\)",
        ),
        (lambda hash: HashedConv2d(4, 4, 2, hash=hash), r"from 16 to 4, not for \(4, 4, 2, 2\)"),
    ],
)
def test_a_toeplitz_hash_fits_its_own_geometry_alone(make, told):
    assert HashedLinear(16, 4, hash=ToeplitzHash(1, 1, 4, 3))(torch.zeros(2, 16)).shape == (2, 4)
    with pytest.raises(ValueError, match=told):
        make(ToeplitzHash(1, 1, 4, 3))


def test_rows_longer_than_the_table_take_no_memory_beyond_the_weight():
    layer = HashedLinear(20_000, 2, False, 0.25, ModulusHash())
    x = torch.randn(3, 20_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x).sum().backward()
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest < 40 * layer.virtual.shape.numel()  # bytes: five times the weight


def test_gradients_of_long_rows_add_up_in_float32():
    shape, entries = (1000, 1025), 1021
    make = {"table_ratio": entries / (1000 * 1025), "hash": ModulusHash(), "bias": False, "dtype": torch.bfloat16}
    layers = [HashedLinear(shape[1], shape[0], index=index, **make) for index in ("structured", "stored")]
    exact = HashedLinear(shape[1], shape[0], index="stored", **{**make, "dtype": torch.float64})
    x, up = torch.randn(4, shape[1]).bfloat16(), torch.randn(4, shape[0]).bfloat16()
    with torch.no_grad():
        exact.table.copy_(torch.randn(entries).bfloat16())
    for layer in layers:
        layer.load_state_dict(exact.state_dict())
        layer(x).backward(up)
    exact(x.double()).backward(up.double())
    for layer in layers:
        error = (layer.table.grad.double() - exact.table.grad).norm() / exact.table.grad.norm()
        assert error < 0.02


def test_an_embedding_refuses_ids_that_it_has_not():
    layer = HashedEmbedding(10, 4)
    for wrong in (10, -1):
        with pytest.raises(IndexError, match=r"row indices must be in \[0, 10\)"):
            layer(torch.tensor([0, wrong]))


def test_padding_is_zero_in_the_weight_too():
    layer = HashedEmbedding(6, 4, padding_idx=2, table_ratio=0.5)
    ids = torch.arange(6)
    assert torch.equal(layer.weight, layer(ids))
    assert not layer.weight[2].any()
    dense = nn.Embedding(6, 4, padding_idx=2)
    dense.load_state_dict(bake(layer))
    assert torch.equal(dense(ids), layer(ids))
    layer(torch.tensor([2])).sum().backward()
    assert not layer.table.grad.any()


@pytest.mark.parametrize("shape", [(600, 1000), (601, 999)], ids=["aligned", "not aligned"])
def test_blocks_need_no_index(shape):
    out, into = shape
    layers = [HashedLinear(into, out, table_ratio=0.01, hash=BlockHash(32, 5), index=i) for i in ("auto", "stored")]
    assert [layer.virtual.index for layer in layers] == ["structured", "stored"]
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[0].weight, layers[1].weight)
    x, up = torch.randn(3, into), torch.randn(3, out)
    for layer in layers:
        layer(x).backward(up)
    torch.testing.assert_close(layers[0].table.grad, layers[1].table.grad)
    assert pickle.loads(pickle.dumps(layers[0])).virtual.index == "structured"


@pytest.mark.parametrize(
    ("hash", "index", "text"),
    [
        (ModulusHash(), "auto", r"structured index into a table of 1,568 by ModulusHash(); only 2 of 200 units are distinct"),
        (UniformHash(2), "computed", r"computed index into a table of 1,568 by UniformHash(seed=2)"),
    ],
)  # fmt: skip
def test_descriptions(hash, index, text):
    assert HashedParametrization((200, 784), 1568, hash, index=index).describe() == text


@pytest.mark.parametrize("index", ["stored", "computed"])
def test_a_weight_is_gathered_within_six_calls(index):
    layer = HashedLinear(8, 8, table_ratio=0.5, index=index)
    layer.weight  # noqa: B018  # the first read chooses the fastest way
    calls = []

    def record(frame, event, argument):
        if event == "call" and "/tying/hashing/" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    sys.setprofile(record)
    try:
        layer.weight  # noqa: B018  # it is computed
    finally:
        sys.setprofile(None)
    before = calls.index("gather") if "gather" in calls else len(calls)
    assert before <= 6, calls


def test_two_weights_share_a_state():
    first = HashedParametrization((4, 6), 5, DirichletHash(0.5, 1))
    second = HashedParametrization((4, 6), 5, DirichletHash(0.5, 1), first=24, state=first.state)
    assert second.drawn is first.drawn
