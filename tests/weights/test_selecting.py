"""Which weights patterns select to be replaced: tied ones are left out, or refused by name, by every function alike."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from toys import train

from tying import ConfigurationError
from tying.callbacks import (
    GeneratedWeights,
    LowRankWeights,
    TemplateWeights,
    UntiedBiases,
    WeightClustering,
    WeightHashing,
)
from tying.errors import NonFiniteError
from tying.hard import bake, generate_weights, lower_rank, share_templates, tie, untie_biases
from tying.hashing import HashedConv2d, HashedEmbedding, HashedLinear, HashReport, cluster, cluster_weight, hash_weights
from tying.weights.derived import derived_weights
from tying.weights.replace import select_weights

DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NETWORKS = {
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False, **DROPOUT
        )
    ),
    "BERT": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=8)
    ),
}


class Model(pl.LightningModule):
    """A language model whose embedding is tied, and convolutions of which the first two are tied by hand."""

    def __init__(self, network):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = NETWORKS[network]()
            self.convs = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
        self.convs[1].weight, self.convs[1].bias = self.convs[0].weight, self.convs[0].bias

    def forward(self, images):
        return self.net(torch.arange(16).view(2, 8)).logits.square().mean() + self.convs(images).square().mean()

    def training_step(self, batch, batch_idx):
        return self(torch.ones(1, *IMAGE))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


WEIGHTS = ["**.weight", "!**.[lL][na]*.weight"]  # without norms
IMAGE = [4, 5, 5]


class Way(NamedTuple):
    """A function that replaces weights, and its callback.

    Attributes:
        patterns: patterns with wildcards.
        function: replaces the weights that patterns match; returns a list of names, a mapping by name, or a report.
        callback: the callback, given patterns.
        named: a tied weight; ``None`` stands for the embedding.
    """

    patterns: list[str]
    function: Callable
    callback: Callable
    named: str | None = None


WAYS = {
    "hashed": Way(["**"], lambda m, p: hash_weights(m, p, 0.3), lambda p: WeightHashing(p, 0.3)),
    "hashed, one table": Way(
        ["**"],
        lambda m, p: hash_weights(m, p, 0.3, scope="network"),
        lambda p: WeightHashing(p, 0.3, scope="network"),
    ),
    "low rank": Way(WEIGHTS, lambda m, p: lower_rank(m, p, 2), lambda p: LowRankWeights(p, 2)),
    "templates": Way(WEIGHTS, lambda m, p: share_templates(m, p, 2), lambda p: TemplateWeights(p, 2)),
    "generated": Way(
        ["convs.*.weight"],
        lambda m, p: generate_weights(m, p, 2, 4, 4),
        lambda p: GeneratedWeights(p, 2, 4, 4),
        "convs.0.weight",
    ),
    "untied biases": Way(
        ["convs.*.bias"],
        lambda m, p: untie_biases(m.convs, [one.removeprefix("convs.") for one in p], torch.zeros(1, *IMAGE)),
        lambda p: UntiedBiases(p, IMAGE),
        "convs.0.bias",
    ),
    "clustered": Way(["**"], None, lambda p: WeightClustering(p, clusters=4)),
}
FUNCTIONS = [way for way, (_, function, _, _) in WAYS.items() if function]


def tied_names(model, way):
    """Return the names that share a weight of those which a way could replace, by brute force."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    kind = ".bias" if way == "untied biases" else ".weight"
    inside = "convs" if WAYS[way].named else ""
    return {
        name
        for several in names.values()
        if len(several) > 1
        for name in several
        if name.endswith(kind) and name.startswith(inside)
    }


def embedding_of(model):
    return (
        next(name for name, module in model.named_modules() if module is model.net.get_input_embeddings()) + ".weight"
    )


def names_in(result):
    return [weight.name for weight in result.weights] if isinstance(result, HashReport) else [*result]


def fingerprint(model):
    return [(type(module), {name: id(p) for name, p in module._parameters.items()}) for module in model.modules()]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", FUNCTIONS)
def test_wildcards_leave_out_tied_weights_with_a_notice(way, network):
    model, (patterns, function, _, _) = Model(network), WAYS[way]
    tied = tied_names(model, way)
    with pytest.warns(UserWarning, match="leaves out .* a weight is either tied or computed") as notices:
        result = function(model, patterns)
    [notice] = [str(notice.message) for notice in notices]
    names = {name if name.startswith(("net.", "convs.")) else f"convs.{name}" for name in names_in(result)}
    assert names
    assert not names & tied
    for name in tied:
        assert f"'{name.removeprefix('convs.') if way == 'untied biases' else name}'" in notice  # and its partners
    assert model.convs[0].weight is model.convs[1].weight
    assert model.net.get_input_embeddings().weight is model.net.get_output_embeddings().weight
    model.training_step(None, 0).backward()
    if isinstance(result, HashReport):
        assert result.tied
        assert {*result.tied} < tied  # one of the names of each
        assert f"left out because they are tied: {', '.join(result.tied)}" in str(result)
        assert not {*result.tied} & {*result.skipped}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", FUNCTIONS)
def test_the_name_of_a_tied_weight_is_refused(way, network):
    model, (_, function, _, named) = Model(network), WAYS[way]
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"is tied to '.*untie them, or choose others"):
        function(model, [named or embedding_of(model)])
    with pytest.raises(ConfigurationError, match=r"match tied weights only: .*Untie them, or choose others"):
        function(model, [f"convs.[01].{'bias' if way == 'untied biases' else 'weight'}"])
    assert fingerprint(model) == before


def test_clustering_refuses_the_name_of_a_tied_weight():
    model = Model("GPT-2")
    for refuse in (
        lambda: cluster_weight(model, embedding_of(model), 4),
        lambda: train(model, [WeightClustering([embedding_of(model)], 4)], data=[0], max_epochs=1),
    ):
        with pytest.raises(ConfigurationError, match=r"wte.weight' is tied to 'net.lm_head.weight'"):
            refuse()


@pytest.mark.filterwarnings(
    "ignore:.*a weight is either tied or computed", "ignore:Be aware that when using `ckpt_path`"
)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", WAYS)
def test_callbacks_affect_change_and_resume_the_same_weights(way, network, tmp_path):
    patterns, _, make, _ = WAYS[way]
    fresh = Model(network)
    before = fingerprint(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        affected = make(patterns).affected(fresh)
    assert fingerprint(fresh) == before
    tied = tied_names(fresh, way)
    assert affected
    assert not affected.keys() & tied
    whole, stopped, resumed = Model(network), Model(network), Model(network)
    kept = {name: parameter for name, parameter in whole.named_parameters(remove_duplicate=False) if name in tied}
    torch.manual_seed(1)
    train(whole, [make(patterns)], data=[0], max_epochs=2)
    if way != "untied biases":
        assert derived_weights(whole).keys() == affected.keys()
    assert {name: whole.get_parameter(name) for name in kept} == kept  # the same parameters
    assert len(whole.state_dict()) == len(copy.deepcopy(whole).state_dict())
    torch.manual_seed(1)
    train(stopped, [make(patterns)], data=[0], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    train(resumed, [make(patterns)], data=[0], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    ends = bake(resumed)
    for name, value in bake(whole).items():
        assert torch.equal(ends[name], value), name


def test_a_tie_through_a_relation_is_left_out_from_both_sides():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    tie(model, ["1.weight ~ 0.weight | o i -> i o"])  # 0.weight is computed
    assert [*select_weights(model, ["*.weight"]).untied] == ["2.weight"]
    assert [*select_weights(model, ["*"]).tied.values()] in ([("1.weight",)], [("0.weight",)])


def twice():
    """Use one module under two names: its weight is computed once."""
    linear = nn.Linear(8, 8)
    return nn.ModuleDict({"a": linear, "b": linear})


@pytest.mark.parametrize("function", [lambda m, p: hash_weights(m, p, 0.5), lambda m, p: lower_rank(m, p, 2)])
def test_a_module_of_two_names_is_not_tied(function):
    model = twice()
    assert len(names_in(function(model, ["*.weight"]))) == 1
    assert torch.equal(model["a"].weight, model["b"].weight)


# Values that no way can replace.

KERNELS = ["*.weight"]
REPLACING = {
    "hash_weights": lambda m: hash_weights(m, KERNELS, 0.5),
    "cluster_weight": lambda m: cluster_weight(m, "1.weight", 2),
    "lower_rank": lambda m: lower_rank(m, KERNELS, 1),
    "share_templates": lambda m: share_templates(m, KERNELS, 2),
    "generate_weights": lambda m: generate_weights(m, KERNELS, 2, 4, 4),
}


def convolutions(dtype=torch.float32):
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, dtype=dtype) for _ in range(3)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("way", REPLACING)
def test_values_that_are_not_finite_are_refused(way, value):
    model = convolutions()
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = value
    before = fingerprint(model)
    kind = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(NonFiniteError, match=rf"^'1\.weight' holds {kind}\. The initial weights are not finite"):
        REPLACING[way](model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int32])
@pytest.mark.parametrize("way", REPLACING)
def test_weights_that_are_not_real_are_refused(way, dtype):
    model = convolutions()
    model[1].weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=dtype), requires_grad=False)
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=rf"^'1\.weight' is of {dtype}, and only real .*by '!1.weight'$"):
        REPLACING[way](model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("way", REPLACING)
def test_weights_that_are_not_initialised_are_refused(way):
    model = convolutions()
    model[1] = nn.LazyConv2d(4, 3)
    with pytest.raises(
        ConfigurationError, match=r"'1\.weight' has no shape yet, since its layer is lazy: call the model"
    ):
        REPLACING[way](model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
@pytest.mark.parametrize(
    "layer",
    [
        lambda dtype: HashedLinear(4, 4, dtype=dtype),
        lambda dtype: HashedConv2d(4, 4, 3, dtype=dtype),
        lambda dtype: HashedEmbedding(4, 4, dtype=dtype),
    ],
)
def test_hashed_layers_are_real(layer, dtype):
    real = layer(None)
    with pytest.raises(ConfigurationError, match=rf"^'weight' is of {dtype}, and only real"):
        real.weight = torch.ones(real.weight.shape, dtype=dtype)
    with pytest.raises(ConfigurationError, match=rf"dtype must be real and floating-point, not {dtype}"):
        layer(dtype)


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        (torch.tensor([1.0, torch.nan, 2.0]), NonFiniteError, "'weights' holds NaN"),
        (torch.ones(3, dtype=torch.complex64), ConfigurationError, "'weights' is of torch.complex64, and only real"),
    ],
)
def test_kmeans_takes_finite_real_numbers(weights, error, told):
    with pytest.raises(error, match=told):
        cluster(weights, 2)


@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch")
def test_values_on_the_meta_device_are_not_looked_at():
    with torch.device("meta"):
        model = convolutions()
    assert len(hash_weights(model, KERNELS, 0.5).weights) == 3
