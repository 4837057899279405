"""A tied weight that is computed is one weight of all its names, however it was tied and in every way."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from toys import train
from zoo import TRANSFORMERS, build, loss_of, output_of

from tying import ConfigurationError
from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    TemplateWeights,
    WeightClustering,
    WeightHashing,
)
from tying.hard import audit, bake, generate_weights, load_plain, lower_rank, restore, share_templates, tie, tied, untie
from tying.hard.hypernetwork import plan_generation
from tying.hashing import (
    HashedEmbedding,
    HashedLinear,
    ModulusHash,
    cluster_weight,
    hash_weights,
    load_packed,
    report,
    save_packed,
    table_loads,
)
from tying.hashing.packing import contents
from tying.selection.relation import Relation
from tying.weights.derived import count_parameters, derived_weights, locate_parameters, names_by_weight, remove

SIZE = 16


class Network(nn.Module):
    """A language model whose head has the shape of its embedding."""

    def __init__(self, embedding=nn.Embedding):
        super().__init__()
        self.embedding, self.norm = embedding(SIZE, SIZE), nn.LayerNorm(SIZE)
        self.middle, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids):
        return self.head(self.norm(self.middle(self.embedding(ids)).tanh()))


class Scaled(nn.Embedding):
    """An embedding of another class, as of BART."""

    def forward(self, ids):
        return super().forward(ids) * 2


class Translator(Network):
    """A language model whose embedding has a third owner and a row of zeros."""

    def __init__(self):
        super().__init__(lambda *sizes: Scaled(*sizes, padding_idx=0))
        self.decoder = nn.Embedding(SIZE, SIZE, padding_idx=0)

    def forward(self, ids):
        return super().forward(ids) + self.decoder(ids)


class Recurrent(nn.Module):
    """A recurrent network of which one layer has two weights that are one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(SIZE, SIZE), nn.RNN(SIZE, SIZE)

    def forward(self, ids):
        return self.rnn(self.embedding(ids))[0]


def by_hand(model):
    model.head.weight = model.embedding.weight
    return model


def by_tie(model):
    tie(model, ["head.weight ~ embedding.weight"])
    return model


def three():
    model = by_hand(Translator())
    model.decoder.weight = model.embedding.weight
    return model


def within_a_module():
    model = Recurrent()
    model.rnn.weight_hh_l0 = model.rnn.weight_ih_l0
    return model


def whole_module():
    model = Network()
    model.head = model.middle
    return model


KINDS = {  # the model, and the names of its tied weight
    "by hand": (lambda: by_hand(Network()), ("embedding.weight", "head.weight")),
    "by tie": (lambda: by_tie(Network()), ("embedding.weight", "head.weight")),
    "three owners": (three, ("embedding.weight", "head.weight", "decoder.weight")),
    "one module of two names": (whole_module, ("middle.weight", "head.weight")),
    "two weights of a module": (within_a_module, ("rnn.weight_ih_l0", "rnn.weight_hh_l0")),
}


def clustered(model, patterns):
    """Cluster the weights that a callback would choose."""
    names = [*WeightClustering(patterns, clusters=8).affected(model)]
    for name in names:
        cluster_weight(model, name, 8)
    return names


def hashed(model, patterns, *arguments, **options):
    return [weight.name for weight in hash_weights(model, patterns, *arguments, **options).weights]


WAYS = {
    "hashed by layer": lambda m, p: hashed(m, p, 0.3),
    "hashed by layer, signed": lambda m, p: hashed(m, p, 0.3, sign=True, density=0.8),
    "hashed by layer, means": lambda m, p: hashed(m, p, 0.3, init="mean"),
    "hashed by network": lambda m, p: hashed(m, p, 0.3, scope="network"),
    "hashed by modulus": lambda m, p: hashed(m, p, 0.25, ModulusHash()),
    "low rank": lambda m, p: lower_rank(m, p, 4),
    "low rank + diagonal": lambda m, p: lower_rank(m, p, 4, diagonal=True),
    "templates": lambda m, p: [*share_templates(m, p, 2)],
    "generated": lambda m, p: generate_weights(m, p, 4, 8, 8),
    "clustered": clustered,
}
CASES = [pytest.param(kind, way, id=f"{kind}, {way}") for kind in KINDS for way in WAYS]


def made(kind, way, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[kind][0]()
        WAYS[way](model, ["**"])
    return model


def ids():
    return torch.arange(SIZE).view(4, 4)


def assert_one(model, names):
    """Fail unless the names of a weight are those of one computed weight."""
    weights = derived_weights(model, aliases=True)
    assert names in names_by_weight(weights)
    values = [getattr(weights[name].owner, weights[name].name) for name in names]
    assert all(torch.equal(value, values[0]) for value in values)
    assert [name for name in names if name in derived_weights(model)] == [names[0]]


def trained(kind, way):
    model = made(kind, way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids()).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_wildcards_and_each_name_compute_it_once(kind, way):
    make, names = KINDS[kind]
    wild = make()
    assert [name for name in WAYS[way](wild, ["**"]) if name in names] == [names[0]]
    assert_one(wild, names)
    assert not isinstance(wild.embedding.weight, nn.Parameter)  # the others, too
    for name in names:
        model = make()
        assert WAYS[way](model, [name]) == [name]
        assert_one(model, names)
        assert count_parameters(model)[1] == count_parameters(make())[1]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_counted_once(way):
    tied, (name, other) = by_hand(Network()), KINDS["by hand"][1]
    alone = copy.deepcopy(tied)
    del alone.head
    for model in (alone, tied):
        WAYS[way](model, ["**"])
    assert count_parameters(tied)[0] == count_parameters(alone)[0] + SIZE  # the head's bias
    [row] = [row for row in audit(tied).rows if name in row.names]
    [single] = [row for row in audit(alone).rows if name in row.names]
    assert row.names == (name, other)
    assert (row.stored, row.used) == (single.stored, 2 * single.used)
    assert (name, other) in audit(tied).groups
    assert audit(tied).problems == ()
    assert [weight.name for weight in report(tied).weights] == [weight.name for weight in report(alone).weights]
    loads, expected = table_loads(tied), table_loads(alone)
    assert all(torch.equal(loads[table], expected[table]) for table in expected)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_its_gradient_is_that_of_all_its_uses(kind, way):
    model, dense = made(kind, way).double(), KINDS[kind][0]().double()
    dense.load_state_dict(bake(model))
    for network in (model, dense):
        network(ids()).square().sum().backward()
    name = KINDS[kind][1][0]
    derived = derived_weights(model)[name]
    weights, inputs = [getattr(derived.owner, derived.name)], derived.inputs
    gradients = [dense.get_parameter(name).grad]
    if way == "hashed by network":  # other weights read the table, too
        others = {key: other for key, other in derived_weights(model).items() if key != name}
        weights += [getattr(other.owner, other.name) for other in others.values()]
        gradients += [dense.get_parameter(key).grad for key in others]
    for tensor, expected in zip(inputs, torch.autograd.grad(weights, inputs, gradients), strict=True):
        torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_it_stays_one_weight(kind, way):
    names, model = KINDS[kind][1], trained(kind, way)
    assert_one(model, names)
    expected = model(ids())
    fresh = made(kind, way, seed=1)
    fresh.load_state_dict(model.state_dict())
    assigned = made(kind, way, seed=2)
    assigned.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    emptied = made(kind, way, seed=3).to("meta").to_empty(device="cpu")
    restore(emptied)
    emptied.load_state_dict(model.state_dict())
    untied = copy.deepcopy(model)
    untie(untied)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh, assigned, emptied, untied):
        assert_one(other, names)
        assert torch.equal(other(ids()), expected)
        if other is not untied or way != "hashed by network":  # whose table untie divides among the weights
            assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_files_of_safetensors_hold_it_once(kind, way, tmp_path):
    model, fresh = trained(kind, way), made(kind, way, seed=1)
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_one(fresh, KINDS[kind][1])
    assert torch.equal(fresh(ids()), model(ids()))


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_plain_models_get_all_its_names_and_give_them_back(kind, way, tmp_path):
    (make, names), model = KINDS[kind], trained(kind, way)
    plain = bake(model)
    dense, back = make(), made(kind, way, seed=1)
    dense.load_state_dict(plain)
    torch.testing.assert_close(dense(ids()), model(ids()))
    exact = {"hashed by network", "low rank + diagonal"}  # whose scales, and diagonals, are fitted
    assert load_plain(back, plain) == {} or way in exact
    assert_one(back, names)
    torch.testing.assert_close(back(ids()), model(ids()), rtol=0, atol=1e-4)
    partly = {key: value for key, value in plain.items() if key not in names[1:]}
    assert load_plain(made(kind, way, seed=1), partly).keys() <= {*names}
    plain[names[1]] = plain[names[1]] + 1
    before = {key: value.clone() for key, value in back.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"'{names[0]}' and '{names[1]}' are tied, but differ"):
        load_plain(back, plain)
    assert all(torch.equal(value, before[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_removed_it_is_one_parameter_again(kind, way):
    names, model = KINDS[kind][1], trained(kind, way)
    expected, plain = model(ids()), KINDS[kind][0]()
    for name in [*derived_weights(model)]:
        parameter = remove(model, name)
        if name in names:
            assert all(model.get_parameter(alias) is parameter for alias in names)
    torch.testing.assert_close(model(ids()), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert (audit(model).problems, tied(model)) == ((), [])


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_resets_and_assignments_reach_all_its_owners(kind, way):
    names, model = KINDS[kind][1], trained(kind, way)
    before = model.get_submodule(names[0].rpartition(".")[0]).weight if "rnn" not in names[0] else None
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.reset_parameters()
        assert_one(model, names)
    assert before is None or not torch.equal(before, model.get_submodule(names[0].rpartition(".")[0]).weight)
    path, _, attribute = names[1].rpartition(".")
    other = getattr(made(kind, way, seed=5).get_submodule(path), attribute)
    setattr(model.get_submodule(path), attribute, nn.Parameter(other.detach()))
    assert_one(model, names)


def test_packed_files_hold_it_once(tmp_path):
    model, names = trained("three owners", "clustered"), KINDS["three owners"][1]
    assert contents(model).ties == dict.fromkeys(names[1:], (names[0], Relation()))
    save_packed(model, tmp_path / "packed.pt")
    plain = bake(model)
    assert all(torch.equal(value, plain[key]) for key, value in load_packed(tmp_path / "packed.pt").items())


def test_layers_of_different_kinds_read_one_table_by_one_index():
    model = by_hand(Network())
    hash_weights(model, ["**"], 0.3)
    assert (type(model.embedding), type(model.head)) == (HashedEmbedding, HashedLinear)
    assert model.embedding.table is model.head.table
    assert model.embedding.virtual is model.head.virtual
    assert model.head.virtual.index == "stored"  # which the linear layer needs
    assert torch.equal(model.embedding(ids()), model.head.weight[ids()])


def test_the_row_of_zeros_is_one_for_all_owners():
    model = three()
    hash_weights(model, ["**"], 0.3)
    for layer in (model.embedding, model.head, model.decoder):
        assert not layer.weight[0].any()
        assert layer.weight[1].any()
    model = three()
    model.decoder.padding_idx = 1
    with pytest.raises(
        ConfigurationError, match=r"'head\.weight': it belongs to embeddings that differ in padding_idx"
    ):
        hash_weights(model, ["head.weight"], 0.3)
    with pytest.warns(UserWarning, match=r"leaves out 'embedding\.weight' \(it belongs to embeddings that differ"):
        assert hash_weights(model, ["**"], 0.3).unfit == ("embedding.weight",)
    assert model.head.weight is model.embedding.weight


CALLBACKS = {
    "hashed": lambda: WeightHashing(["**"], 0.3),
    "hashed by network": lambda: WeightHashing(["**"], 0.3, scope="network"),
    "low rank": lambda: LowRankWeights(["**"], 4),
    "templates": lambda: TemplateWeights(["**"], 2),
    "generated": lambda: GeneratedWeights(["**"], 4, 8, 8),
    "clustered": lambda: WeightClustering(["**"], 8),
}


class Model(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(ids()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("way", CALLBACKS)
def test_callbacks_compute_what_a_callback_has_tied(way, tmp_path):
    def fit(epochs, **options):
        torch.manual_seed(0)
        model = Model(Network())
        callbacks = [HardTying(["net.head.weight ~ net.embedding.weight"]), CALLBACKS[way]()]
        return model, train(model, callbacks, data=[0], max_epochs=epochs, **options)

    whole, _ = fit(2)
    stopped, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    for model in (whole, stopped, resumed):
        assert_one(model.net, ("embedding.weight", "head.weight"))
    assert torch.equal(whole.net(ids()), resumed.net(ids()))


# Models of transformers


COMPRESSING = ["hashed by layer", "hashed by network", "low rank", "templates", "generated", "clustered"]


def shared_names(model):
    return [tuple(names) for names in locate_parameters(model).names.values() if len(names) > 1]


@pytest.mark.parametrize("way", COMPRESSING)
@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_whole_models_are_computed(architecture, way):
    """Every matrix is computed, its ties with it, or a notice names it."""
    model, plain = build(architecture), build(architecture)
    ties = [names for names in shared_names(model) if model.get_parameter(names[0]).ndim > 1]
    matrices = {name for name, weight in model.named_parameters() if weight.ndim > 1}
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        computed = {*WAYS[way](model, ["**"])}
    left_out = {*plan_generation(plain, ["**"], 4, 8, 8).excluded} if way == "generated" else set()
    notice = " ".join(str(warning.message) for warning in notices)
    assert matrices - computed <= left_out | {name for name in matrices if repr(name) in notice}
    assert len(computed) > len(matrices) / 2
    assert len(notices) == bool(notice)
    for names in ties:
        assert_one(model, names)
    inputs = TRANSFORMERS[architecture].inputs()
    loss = loss_of(output_of(model, inputs))
    loss.backward()
    originals = [original for derived in derived_weights(model).values() for original in derived.originals]
    assert all(original.grad is not None for original in originals if original.requires_grad)
    plain.load_state_dict(bake(model))
    torch.testing.assert_close(loss_of(output_of(plain, inputs)), loss)


@pytest.mark.parametrize("way", COMPRESSING)
@pytest.mark.parametrize("architecture", ["GPT2", "BERT", "T5"])
def test_transformers_does_not_part_it_silently(architecture, way):
    """Its functions raise errors, since they look for parameters."""
    model = build(architecture)
    [names] = [names for names in shared_names(model) if names[0].endswith("weight")]
    WAYS[way](model, [names[0]])
    expected = loss_of(output_of(model, inputs := TRANSFORMERS[architecture].inputs()))
    with pytest.raises((AttributeError, ValueError)):
        model.tie_weights()
    assert_one(model, names)
    assert torch.equal(loss_of(output_of(model, inputs)), expected)
    with pytest.raises((AttributeError, ValueError)):
        model.resize_token_embeddings(60)


@pytest.mark.parametrize("architecture", ["GPT2", "BERT", "T5"])
def test_transformers_saves_the_baked_model(architecture, tmp_path):
    model = build(architecture)
    hash_weights(model, ["**"], 0.3)
    model.save_pretrained(tmp_path, state_dict=bake(model))
    plain = type(model).from_pretrained(tmp_path)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    inputs = TRANSFORMERS[architecture].inputs()
    torch.testing.assert_close(loss_of(output_of(plain.eval(), inputs)), loss_of(output_of(model.eval(), inputs)))
