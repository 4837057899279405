"""Layers with hashed weights under export, transforms and tracers, like dense ones."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from ways import made

from tying.hashing import (
    BlockHash,
    DirichletHash,
    HashedEmbedding,
    HashedLinear,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    UniformHash,
    XXHash,
    cluster_weight,
    hash_weights,
)

HASHES = (UniformHash(), XXHash(), ModulusHash(), DirichletHash(0.5), BlockHash(4), NeighborhoodHash(2), IdentityHash())


def embedding(hash, width=4, padding=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, width, padding_idx=padding), nn.Linear(width, 3))
    if hash is None:
        cluster_weight(model, "0.weight", 4)
    else:
        hash_weights(model, ["0.weight"], 1.0 if isinstance(hash, IdentityHash) else 0.3, hash, **options)
    return model, torch.randint(20, (3, 5))


EMBEDDINGS = {
    **{str(hash): {"hash": hash} for hash in HASHES},
    "signed": {"hash": UniformHash(), "sign": True},
    "sparse": {"hash": UniformHash(), "density": 0.5},
    "scaled": {"hash": UniformHash(), "scope": "network"},
    "padded": {"hash": UniformHash(), "padding": 0},
    "of width 1": {"hash": UniformHash(), "width": 1},
    "clustered": {"hash": None},
}


@pytest.mark.parametrize("way", EMBEDDINGS)
def test_per_sample_gradients_of_embeddings(way):
    model, tokens = embedding(**EMBEDDINGS[way])
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return functional_call(model, parameters, (row,)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    model(tokens).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name].sum(dim=0), parameter.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", EMBEDDINGS)
def test_export_of_embeddings_keeps_the_batch_dynamic(way, training):
    model, tokens = embedding(**EMBEDDINGS[way])
    sizes = ({0: torch.export.Dim("batch", min=2, max=9)},)
    exported = torch.export.export(model.train(training), (tokens,), dynamic_shapes=sizes, strict=False).module()
    longer = torch.cat([tokens, tokens])
    assert torch.equal(exported(longer), model(longer))


@pytest.mark.parametrize(
    "way", ["low rank, attention", "hashed, attention", "low rank, recurrent", "hashed, recurrent"]
)
def test_fx_does_not_trace_into_layers_of_torch(way):
    """A parametrized layer of torch is a leaf, as the dense one is."""
    model = made(way)
    inputs = (torch.randn(5, 2, 32),) * (3 if "attention" in way else 1)
    graph = torch.fx.Tracer().trace(Calls(model[0]))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["layer"]
    traced = torch.fx.symbolic_trace(Calls(model[0]))
    assert torch.equal(traced(*inputs), model[0](*inputs)[0])


class Calls(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, query, key=None, value=None):
        if isinstance(self.layer, nn.RNNBase):
            return self.layer(query)[0]
        return self.layer(query, key, value)[0]


@pytest.mark.parametrize("options", [{"sign": True}, {"density": 0.5}, {"sign": True, "density": 0.5}], ids=str)
def test_fx_traces_signs_and_zeros(options):
    layer = nn.Sequential(HashedLinear(30, 40, table_ratio=0.1, **options))
    x = torch.randn(2, 30)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_rows_under_vmap_compile_no_whole_weight(monkeypatch):
    """The compiler fails under vmap, and warned; what it returned stayed slow."""
    monkeypatch.setattr("tying.hashing.parametrization.COMPILED", 1)
    layer = HashedEmbedding(20, 8, table_ratio=0.1, hash=XXHash(1), index="computed")
    tables, chosen = torch.randn(3, len(layer.table)), torch.tensor([[0, 19], [3, 3], [7, 1]])
    found = torch.func.vmap(layer.virtual.rows)(tables, chosen)
    for row, table, numbers in zip(found, tables, chosen, strict=True):
        assert torch.equal(row, layer.virtual(table)[numbers])


def test_fx_traces_an_embedding_with_padding():
    layer, rows = nn.Sequential(HashedEmbedding(20, 8, table_ratio=0.1, padding_idx=0)), torch.tensor([[0, 3], [19, 0]])
    assert torch.equal(torch.fx.symbolic_trace(layer)(rows), layer(rows))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")  # of any torch.jit.trace
def test_a_large_weight_is_traced_by_jit():
    """Weights of more than a million entries were read in chunks with ``out=``, which torch.jit cannot trace."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(512, 256, 3, bias=False))
    hash_weights(model, ["0.weight"], 0.01)
    image = torch.randn(1, 512, 3, 3)
    traced = torch.jit.trace(model, image)
    torch.testing.assert_close(traced(image), model(image))
