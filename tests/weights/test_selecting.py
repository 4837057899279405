"""Which weights patterns select to be replaced: tied ones once, in every function alike."""

import copy
import math
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
from tying.hard import LowRankResidual, bake, generate_weights, lower_rank, relax, share_templates, tie, untie_biases
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
    "low rank": Way(["**"], lambda m, p: lower_rank(m, p, 2), lambda p: LowRankWeights(p, 2)),
    "templates": Way(["**"], lambda m, p: share_templates(m, p, 2), lambda p: TemplateWeights(p, 2)),
    "generated": Way(["**"], lambda m, p: generate_weights(m, p, 2, 4, 4), lambda p: GeneratedWeights(p, 2, 4, 4)),
    "untied biases": Way(
        ["convs.*.bias"],
        lambda m, p: untie_biases(m.convs, [pattern.replace("convs.", "") for pattern in p], torch.zeros(1, *IMAGE)),
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


def embeddings_of(model):
    return model.net.get_input_embeddings(), model.net.get_output_embeddings()


def embedding_of(model):
    return (
        next(name for name, module in model.named_modules() if module is model.net.get_input_embeddings()) + ".weight"
    )


def names_in(result):
    return [weight.name for weight in result.weights] if isinstance(result, HashReport) else [*result]


def fingerprint(model):
    return [(type(module), {name: id(p) for name, p in module._parameters.items()}) for module in model.modules()]


def network_names(result):
    """Return the names of the weights that a function has replaced; one takes the convolutions alone."""
    return [name if name.startswith(("net.", "convs.")) else f"convs.{name}" for name in names_in(result)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", FUNCTIONS)
def test_patterns_select_a_tied_weight_once(way, network):
    (patterns, function, _, named), wild, spelt = WAYS[way], Model(network), Model(network)
    tied = tied_names(wild, way)
    once = [name for name, _ in wild.named_parameters() if name in tied]  # without aliases
    names = network_names(function(wild, patterns))
    assert [name for name in names if name in tied] == once
    assert len(names) > len(once)
    name = named or embedding_of(spelt)
    assert network_names(function(spelt, [name, *patterns])).count(name) == 1
    for model in (wild, spelt):
        for weight in ("weight", "bias"):
            assert torch.equal(getattr(model.convs[0], weight), getattr(model.convs[1], weight))
        assert torch.equal(*(layer.weight for layer in embeddings_of(model)))
        model.training_step(None, 0).backward()


@pytest.mark.parametrize("way", FUNCTIONS)
def test_an_excluded_name_excludes_the_weight(way):
    _, function, _, named = WAYS[way]
    if named is None:
        aliases, others = ["net.transformer.wte.weight", "net.lm_head.weight"], ["net.transformer.wpe.weight"]
    else:
        aliases, others = ["convs.0.bias", "convs.1.bias"], ["convs.2.bias"]
    for selected, excluded in (aliases, aliases[::-1]):
        model = Model("GPT-2")
        assert network_names(function(model, [selected, *others, f"!{excluded}"])) == others
        assert model.get_parameter(selected) is model.get_parameter(excluded)
        with pytest.raises(ConfigurationError, match="exclude all that they match, by one of its names"):
            function(model, [selected, f"!{excluded}"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", WAYS)
def test_callbacks_affect_change_and_resume_the_same_weights(way, network, tmp_path):
    patterns, _, make, _ = WAYS[way]
    fresh = Model(network)
    before = fingerprint(fresh)
    affected = make(patterns).affected(fresh)
    assert fingerprint(fresh) == before
    once = [name for name, _ in fresh.named_parameters() if name in tied_names(fresh, way)]
    assert {*once} <= affected.keys()
    whole, stopped, resumed = Model(network), Model(network), Model(network)
    torch.manual_seed(1)
    train(whole, [make(patterns)], data=[0], max_epochs=2)
    if way == "untied biases":
        assert whole.convs[0].bias is whole.convs[1].bias
    else:
        assert derived_weights(whole).keys() == affected.keys()
        assert torch.equal(*(layer.weight for layer in embeddings_of(whole)))
    assert len(whole.state_dict()) == len(copy.deepcopy(whole).state_dict())
    torch.manual_seed(1)
    train(stopped, [make(patterns)], data=[0], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    train(resumed, [make(patterns)], data=[0], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    ends = bake(resumed)
    for name, value in bake(whole).items():
        assert torch.equal(ends[name], value), name


RELATED = {way: (function, make) for way, (_, function, make, named) in WAYS.items() if named is None}


def related():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    tie(model, ["1.weight ~ 0.weight | o i -> i o"])  # 0.weight is computed
    return model


@pytest.mark.parametrize("way", RELATED)
def test_a_tie_through_a_relation_is_left_out_from_both_sides(way):
    function, make = RELATED[way]
    assert [*make(["*"]).affected(related())] == ["2.weight"]
    assert select_weights(related(), ["*"]).tied in ({"0.weight": ("1.weight",)}, {"1.weight": ("0.weight",)})
    if function is None:
        return
    model = related()
    with pytest.warns(
        UserWarning, match=r"leaves out '[01]\.weight' \(tied to '[01]\.weight'\): a relation"
    ) as notices:
        result = function(model, ["*"])
    assert len(notices) == 1
    assert names_in(result) == ["2.weight"]
    if isinstance(result, HashReport):
        assert f"left out because they are tied: {result.tied[0]}" in str(result)
    assert torch.equal(model[0].weight, model[1].weight.T)


@pytest.mark.parametrize("way", RELATED)
def test_a_tie_through_a_relation_is_refused_by_name(way):
    function, _ = RELATED[way]
    function = function or (lambda model, names: cluster_weight(model, names[0], 2))
    for name, other in ("01", "10"):
        model = related()
        before = fingerprint(model)
        with pytest.raises(
            ConfigurationError, match=rf"'{name}\.weight' is tied to '{other}\.weight' through a relation, .*: untie"
        ):
            function(model, [f"{name}.weight"])
        assert fingerprint(model) == before


def test_wildcards_that_match_related_weights_alone_are_refused():
    with pytest.raises(ConfigurationError, match=r"match only weights that a relation ties: .*Untie them, or choose"):
        select_weights(related(), ["[01].weight"])


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
    "relax": lambda m: relax(m, KERNELS, LowRankResidual(1)),
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
    remedy = "exclude it" if way == "relax" else "by '!1.weight'"  # from ties, or from patterns of parameters
    with pytest.raises(ConfigurationError, match=rf"^'1\.weight' is {dtype}, and only real .*{remedy}$"):
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
    with pytest.raises(ConfigurationError, match=rf"^'weight' is {dtype}, and only real"):
        real.weight = torch.ones(real.weight.shape, dtype=dtype)
    with pytest.raises(ConfigurationError, match=rf"dtype must be real and floating-point, not {dtype}"):
        layer(dtype)


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        (torch.tensor([1.0, torch.nan, 2.0]), NonFiniteError, "'weights' holds NaN"),
        (torch.ones(3, dtype=torch.complex64), ConfigurationError, "'weights' is torch.complex64, and only real"),
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


def normed():
    linear, norms = nn.Linear, nn.utils.parametrizations
    return nn.Sequential(norms.weight_norm(linear(8, 8)), linear(8, 8), norms.spectral_norm(linear(8, 8)), linear(8, 8))


@pytest.mark.parametrize("way", RELATED)
def test_weights_that_others_parametrize_are_left_out_by_wildcards(way):
    function, make = RELATED[way]
    assert [*make(["**"]).affected(normed())] == ["1.weight", "3.weight"]
    for only in ("0.**", "2.*"):
        with pytest.raises(ConfigurationError, match="parametrized already: choose other weights"):
            select_weights(normed(), [only], least_dims=2)
    if function is None:
        return
    model = normed()
    expected = [key for key in model.state_dict() if key[0] in "02"]
    with pytest.warns(UserWarning, match=r"leaves out '0\.parametrizations.*, '2\.weight' \(parametrized already\)"):
        result = function(model, ["**"])
    assert names_in(result) == ["1.weight", "3.weight"]
    assert [key for key in model.state_dict() if key[0] in "02"] == expected
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"'2\.weight' is parametrized already"):
        function(normed(), ["2.weight"])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (4, 0, 3, 3)])
def test_empty_weights_are_not_generated(shape):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.register_parameter("empty", nn.Parameter(torch.zeros(shape)))
    with pytest.warns(UserWarning, match=r"leaves out 'empty' \(a weight of shape \(.*\) has no entries"):
        assert generate_weights(model, ["**"], 4, 8, 8) == ["0.weight", "1.weight"]
    with pytest.raises(ConfigurationError, match=r"'empty': a weight of shape .* has no entries: leave it out"):
        generate_weights(model, ["empty"])
