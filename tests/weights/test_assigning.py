"""Derived weights are assigned, pickled, traced and described alike, whatever computes them."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import tying.hard
import tying.hashing
from tying.hard import (
    LowRankResidual,
    audit,
    bake,
    generate_weights,
    lower_rank,
    relax,
    restore,
    share_templates,
    tie,
    untie_biases,
)
from tying.hashing import (
    BlockHash,
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    ModulusHash,
    UniformHash,
    cluster_weight,
    hash_weights,
)


def changed(model, change):
    change(model)
    return model


def table(hash, **options):
    return lambda model: hash_weights(model, ["weight*"], 0.5, hash, **options)


def relaxing(model):
    return relax(model, ["*.weight"], LowRankResidual(2))


MODULES = {  # a module, the name of a derived weight of it, and an input
    "low rank": (lambda: changed(nn.Linear(6, 6), lambda m: lower_rank(m, ["weight"], 2)), "weight", (3, 6)),
    "low rank + diagonal": (
        lambda: changed(nn.Linear(6, 6), lambda m: lower_rank(m, ["weight"], 2, diagonal=True)),
        "weight",
        (3, 6),
    ),
    "low rank, recurrent": (
        lambda: changed(nn.LSTM(6, 6), lambda m: lower_rank(m, ["weight_hh_l0"], 2)),
        "weight_hh_l0",
        (3, 6),
    ),
    "relaxed": (
        lambda: changed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), relaxing)[0],
        "weight",
        (30, 6),
    ),
    "relaxed, of few inputs": (
        lambda: changed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), relaxing)[1],
        "weight",
        (2, 6),
    ),
    "templates": (lambda: changed(nn.Linear(6, 6), lambda m: share_templates(m, ["weight"], 1)), "weight", (3, 6)),
    "generated": (
        lambda: changed(nn.Conv2d(6, 6, 1), lambda m: generate_weights(m, ["weight"], 2, 3, 3)),
        "weight",
        (2, 6, 3, 3),
    ),
    "hashed": (lambda: changed(nn.Linear(6, 6), table(UniformHash())), "weight", (3, 6)),
    "hashed, signed, sparse": (
        lambda: changed(nn.Linear(6, 6), table(UniformHash(), sign=True, density=0.5)),
        "weight",
        (3, 6),
    ),
    "hashed by modulus": (lambda: changed(nn.Linear(6, 6), table(ModulusHash())), "weight", (3, 6)),
    "hashed, recurrent": (lambda: changed(nn.LSTM(6, 6), table(UniformHash())), "weight_hh_l0", (3, 6)),
    "hashed in one dimension": (lambda: changed(nn.Conv1d(6, 6, 3), table(UniformHash())), "weight", (2, 6, 5)),
    "clustered": (lambda: changed(nn.Linear(6, 6), lambda m: cluster_weight(m, "weight", 4)), "weight", (3, 6)),
    "HashedLinear": (lambda: HashedLinear(6, 6, table_ratio=0.5, hash=BlockHash(2)), "weight", (3, 6)),
    "HashedConv2d": (lambda: HashedConv2d(6, 6, 3, table_ratio=0.5), "weight", (2, 6, 4, 4)),
    "HashedConv2d by modulus": (
        lambda: HashedConv2d(6, 6, 1, table_ratio=0.5, hash=ModulusHash()),
        "weight",
        (2, 6, 4, 4),
    ),
    "HashedEmbedding": (lambda: HashedEmbedding(9, 6, table_ratio=0.5, padding_idx=2), "weight", ()),
}


def run(module, shape):
    torch.manual_seed(1)
    output = module(torch.randn(shape) if shape else torch.arange(9))
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("make", "name", "shape"), MODULES.values(), ids=MODULES)
def test_assigning_a_parameter_is_assigning_its_values(make, name, shape):
    module = make()
    other = copy.deepcopy(module)
    value = torch.randn_like(getattr(module, name))
    names = [key for key, _ in module.named_parameters()]
    setattr(module, name, nn.Parameter(value))
    setattr(other, name, value)
    assert torch.equal(getattr(module, name), getattr(other, name))
    assert torch.equal(run(module, shape), run(other, shape))
    assert [key for key, _ in module.named_parameters()] == names
    run(module, shape).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.bias = None if shape == () else nn.Parameter(torch.ones(6))  # other attributes are assigned as ever


def test_assigning_a_parameter_to_a_linked_weight_writes_through():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    tie(model, ["0.weight ~ 1.weight | o i -> i o"])
    source, value = model[0].weight, torch.randn(6, 4)
    model[1].weight = nn.Parameter(value)
    assert model[0].weight is source
    assert torch.equal(source, value.T)
    assert torch.equal(model[1].weight, value)


@pytest.mark.parametrize(("make", "name", "shape"), MODULES.values(), ids=MODULES)
def test_modules_are_pickled_with_classes_of_their_own(make, name, shape):
    module = make()
    again, copied = pickle.loads(pickle.dumps(module)), copy.copy(module)
    for other in (again, copied):
        assert torch.equal(run(other, shape), run(module, shape))
        assert [key for key, _ in other.named_parameters()] == [key for key, _ in module.named_parameters()]
    if is_parametrized(module):
        assert type(again) is not type(module)
    setattr(again, name, torch.zeros_like(getattr(again, name)))
    assert getattr(module, name).any()


def test_a_generated_class_makes_plain_modules():
    """Adapters make layers of the class of a layer."""
    layer = changed(nn.Conv2d(6, 6, 1), lambda m: lower_rank(m, ["weight"], 2))
    assert type(type(layer)(3, 4, 1)) is nn.Conv2d
    assert isinstance(layer, nn.Conv2d)


@pytest.mark.parametrize("key", [key for key in MODULES if "recurrent" not in key and "one dimension" not in key])
def test_torch_fx_traces_layers(key):
    make, name, shape = MODULES[key]
    module = make()
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    torch.testing.assert_close(run(traced, shape), run(module, shape))
    gradients = []
    for model in (traced, module):
        module.zero_grad()
        run(model, shape).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)
    setattr(module, name, torch.randn_like(getattr(module, name)))  # the graph reads the parameters
    torch.testing.assert_close(run(traced, shape), run(module, shape))


def test_untied_biases_are_traced_and_load_biases_of_channels():
    model, plain = (nn.Sequential(nn.Conv2d(2, 3, 3)) for _ in range(2))
    untie_biases(model, ["0.bias"], torch.zeros(1, 2, 5, 5))
    for assign in (False, True):
        model.load_state_dict(plain.state_dict(), assign=assign)
        assert model[0].bias.shape == (3, 3, 3)
        torch.testing.assert_close(run(model, (2, 2, 5, 5)), run(plain, (2, 2, 5, 5)))
    assert torch.equal(run(torch.fx.symbolic_trace(model), (2, 2, 5, 5)), run(model, (2, 2, 5, 5)))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.bias"):
        model.load_state_dict({"0.weight": model[0].weight, "0.bias": torch.zeros(4)})


@pytest.mark.parametrize(("make", "name", "shape"), MODULES.values(), ids=MODULES)
def test_audit_names_the_weights_to_which_writes_are_lost(make, name, shape):
    module = make()
    before = getattr(module, name).detach().clone()
    getattr(module, name).data.add_(1)
    nn.init.constant_(getattr(module, name), 0.5)
    assert torch.equal(getattr(module, name), before)
    [limit] = [limit for limit in audit(module).limits if "in-place writes" in limit]
    assert name in limit
    assert "bake(model)" in limit


@pytest.mark.parametrize(("relation", "is_lost"), [("o i -> i o", False), ("o i -> (i o) 1", True)])
def test_writes_reach_the_source_of_a_view(relation, is_lost):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(1, 24) if is_lost else nn.Linear(4, 6))
    tie(model, [f"0.weight ~ 1.weight | {relation}"])
    before = model[0].weight.detach().clone()
    model[1].weight.data.add_(1)
    assert torch.equal(model[0].weight, before) == is_lost
    assert any("1.weight: in-place writes" in limit for limit in audit(model).limits) == is_lost


@pytest.mark.parametrize(
    "function", [tie, lower_rank, relax, share_templates, generate_weights, hash_weights, cluster_weight]
)
def test_functions_say_which_writes_are_lost(function):
    told = " ".join(inspect.getdoc(function).replace("``", "").split())
    assert "In-place writes (.data, nn.init, an adapter's merge) to a" in told
    assert "are lost" in told
    assert ": assign the weight, or load bake(model) into the untied model first." in told


PUBLIC = {name: getattr(room, name) for room in (tying.hard, tying.hashing) for name in room.__all__}
COMPUTING = {  # all layers that compute their weights, and all steps that do
    name: kind
    for name, kind in PUBLIC.items()
    if inspect.isclass(kind)
    and issubclass(kind, nn.Module)
    and (hasattr(kind, "computes") or hasattr(kind, "describe"))
}


def test_all_layers_and_steps_are_asked():
    layers = {"HashedLinear", "HashedConv2d", "HashedEmbedding"}
    steps = {"LowRank", "LowRankPlusDiagonal", "TemplateMixture", "HyperWeight", "HashedParametrization"}
    assert COMPUTING.keys() == layers | steps


@pytest.mark.parametrize("name", COMPUTING)
def test_layers_and_steps_say_which_writes_are_lost(name):
    assert re.search(r"In-place writes to [^.]* are lost; see :func:`[\w.]+`\.", inspect.getdoc(COMPUTING[name]))


def test_audit_names_every_tie_that_is_parted():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    tie(model, ["0.weight ~ 1.weight", "2.weight ~ 3.weight | o i -> i o", "4.bias ~ 5.bias"])
    moved = model.to("meta").to_empty(device="cpu")
    problems = audit(moved).problems
    assert [problem.split()[0] for problem in problems] == ["'1.weight'", "'3.weight'", "'5.bias'"]
    assert all("to_empty" in problem and "tying.hard.restore(model)" in problem for problem in problems)
    assert len(restore(moved)) == 3
    assert audit(moved).problems == ()
    assert bake(moved).keys() == nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))).state_dict().keys()
