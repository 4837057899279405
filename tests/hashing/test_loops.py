"""Reads and sums by compiled loops are those of torch; without numba, or with a broken one, torch computes them."""

import math
import re
import warnings
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tying import compiled
from tying.hashing import (
    BlockHash,
    CodebookHash,
    DirichletHash,
    HashedEmbedding,
    HashedLinear,
    ModulusHash,
    NeighborhoodHash,
    XXHash,
    fast_paths,
    gather,
    hash_weights,
)

BACKENDS = ["torch", *["numba"] * bool(find_spec("numba"))]
SHAPES = [(40, 30), (31, 33)]  # of even and odd numbers of weights


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Let few weights be read as many are."""
    monkeypatch.setattr(gather, "FEW", 0)
    for module in (gather, fast_paths):
        monkeypatch.setattr(module, "CHUNK", 96)


def choose(backend, monkeypatch):
    """Let hashed layers use a backend from now on."""
    monkeypatch.setattr(compiled, "is_working", lambda: backend == "numba")


CASES = {
    "stored": {"index": "stored"},
    "computed": {"index": "computed"},
    "signed, stored": {"index": "stored", "sign": True},
    "signed, computed": {"index": "computed", "sign": True},
    "a part is zero": {"density": 0.7, "index": "stored"},
    "a part is zero, signed, computed": {"density": 0.7, "index": "computed", "sign": True},
    "neighbours": {"hash": NeighborhoodHash(3), "index": "stored"},
    "Dirichlet": {"hash": DirichletHash(0.5), "index": "stored"},
    "xxHash, signed": {"hash": XXHash(1), "sign": True, "index": "stored"},
    "modulus, stored": {"hash": ModulusHash(), "index": "stored"},
    "blocks": {"hash": BlockHash(8)},
    "blocks that rows cut": {"hash": BlockHash(7)},
    "blocks, signed": {"hash": BlockHash(8), "sign": True},
}


def layer_of(case, shape, dtype=torch.float32):
    torch.manual_seed(0)
    return HashedLinear(*shape, bias=False, table_ratio=0.1, dtype=dtype, **CASES[case])


def codebook_of(shape, slots, dtype):
    torch.manual_seed(0)
    model = nn.Linear(*shape, bias=False, dtype=dtype)
    assigned = torch.randint(slots, (math.prod(shape),), generator=torch.Generator().manual_seed(1))
    hash_weights(model, ["weight"], slots / math.prod(shape), CodebookHash(assigned))
    return model


def results(layer, upstream):
    """Return the weight and the gradient of the table."""
    weight = layer.weight
    [table] = layer.parameters()
    return weight.detach(), torch.autograd.grad(weight, table, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, "a codebook of few slots", "a codebook of many slots"])
def test_the_index_decides_alone(case, shape, dtype, monkeypatch):
    """Weights are exact with any backend; sums differ in their order alone."""
    for backend in BACKENDS:
        choose(backend, monkeypatch)
        slots = {"a codebook of few slots": 16, "a codebook of many slots": 300}.get(case)
        layer = codebook_of(shape, slots, dtype) if slots else layer_of(case, shape, dtype)
        virtual = layer.virtual
        [table] = layer.parameters()
        upstream = torch.randn(virtual.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        weight, grad = results(layer, upstream)
        extended = torch.cat([table, -table, table.new_zeros(1)]).detach()
        entries = virtual.slots()
        signed = virtual.hash.sign(torch.arange(virtual.shape.numel())).view(virtual.shape) if virtual.sign else 1
        expected = torch.where(entries < 0, 0, extended[entries] * signed)
        assert torch.equal(weight, expected)
        exact = torch.zeros(len(table) + 1, dtype=torch.float64)
        exact.index_add_(0, entries.flatten() % (len(table) + 1), (upstream * signed).flatten().double())
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(grad.double(), exact[:-1], rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("case", ["stored", "computed", "signed, computed", "blocks", "blocks that rows cut"])
def test_sums_do_not_depend_on_the_number_of_threads(case, monkeypatch):
    for backend in BACKENDS:
        choose(backend, monkeypatch)
        if backend == "numba":
            monkeypatch.setattr(compiled, "TWO_THREADS", 1)
        layer, threads = layer_of(case, SHAPES[0]), torch.get_num_threads()
        both = []
        for count in (1, 2):
            torch.set_num_threads(count)
            both.append(results(layer, torch.ones(layer.weight.shape)))
        torch.set_num_threads(threads)
        assert all(torch.equal(one, two) for one, two in zip(*both, strict=True))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sign": True}], ids=str)
def test_rows_of_an_embedding_of_blocks(options, monkeypatch):
    chosen = torch.tensor([[3, 0], [19, 3]])
    for backend in BACKENDS:
        choose(backend, monkeypatch)
        torch.manual_seed(0)
        layer = HashedEmbedding(20, 16, table_ratio=0.2, hash=BlockHash(8), **options)
        assert torch.equal(layer(chosen), layer.weight[chosen])
        upstream = torch.randn(2, 2, 16)
        by_rows, by_weight = (
            torch.autograd.grad(output, layer.table, upstream)[0] for output in (layer(chosen), layer.weight[chosen])
        )
        torch.testing.assert_close(by_rows, by_weight)


def test_half_precision_is_read_by_torch():
    layer = layer_of("stored", SHAPES[0], torch.bfloat16)
    weight, grad = results(layer, torch.ones(30, 40, dtype=torch.bfloat16))
    assert torch.equal(weight, layer.table.detach()[layer.virtual.slots()])
    assert torch.equal(grad, layer.virtual.loads().bfloat16())


def test_a_broken_backend_is_told_once(monkeypatch):
    def fail(name):
        raise SystemError("initialization of _internal failed")

    monkeypatch.setattr(compiled, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled, "import_module", fail)
    monkeypatch.setattr(compiled, "is_working", cache(compiled.is_working.__wrapped__))
    layer = layer_of("stored", SHAPES[0])
    message = (
        "numba cannot compile the loops of hashed layers and mixtures, which are slower without: initialization of "
        "_internal failed. Update it by pip install -U 'tying[fast]', or uninstall it"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        weight, _ = results(layer, torch.ones(30, 40))
    assert torch.equal(layer.weight, weight)  # without a second warning
    assert torch.equal(weight, layer.table.detach()[layer.virtual.slots()])


def test_nothing_is_said_without_the_backend(monkeypatch):
    choose("torch", monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer_of("stored", SHAPES[0]).weight.shape == (30, 40)
