"""Weights that modules compute: one class for each module, one way in and one way out."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import cached, is_parametrized, register_parametrization, remove_parametrizations

from tying.hard import LowRank, bake, generate_weights, lower_rank, share_templates, tie
from tying.hashing import hash_weights
from tying.weights.derived import derived_in, install, remove, swap_class


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def names_of(module):
    return [name for name, _ in module.named_parameters()]


def test_a_copy_has_a_class_of_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    tie(model, ["0.weight ~ 1.weight | o i -> i o"])
    other = copy.deepcopy(model)
    assert type(other[1]) is not type(model[1])
    register_parametrization(other[1], "bias", Double())  # torch writes into the class
    remove_parametrizations(other[1], "weight")
    assert isinstance(model[1].bias, nn.Parameter)
    assert torch.equal(model[1].weight, model[0].weight.T)
    assert type(model[1]).__name__ == "ParametrizedLinear"
    assert type(model[1]).__bases__[0] is nn.Linear


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("by_torch", [True, False])
def test_parametrizations_of_ours_and_others_in_one_module(ours_first, by_torch):
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    steps = [lambda: install(layer, "weight", LowRank(3)), lambda: register_parametrization(layer, "bias", Double())]
    before = layer(x)
    for step in steps if ours_first else steps[::-1]:
        step()
    torch.testing.assert_close(layer(x), before)
    for name in ("weight", "bias") if ours_first else ("bias", "weight"):
        (remove_parametrizations if by_torch else remove)(layer, name)
        torch.testing.assert_close(layer(x), before)
    assert type(layer) is nn.Linear
    assert not is_parametrized(layer)
    if ours_first and not by_torch:
        assert names_of(layer) == ["weight", "bias"]  # at its former place


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.LSTM(6, 5), lambda: nn.Conv1d(6, 5, 3)])
def test_a_hashed_weight_is_a_parameter_again(make):
    module = make()
    names, kind = names_of(module), type(module)
    hash_weights(module, ["weight*"], 0.5)
    plain = bake(module)
    for derived in derived_in(module):
        remove(module, derived.name)
    assert (type(module), names_of(module)) == (kind, names)
    assert derived_in(module) == []
    assert all(torch.equal(value, plain[name]) for name, value in module.state_dict().items())


def test_a_hashed_and_a_parametrized_weight_of_one_module():
    lstm = nn.LSTM(4, 4)
    plain, x = type(lstm), torch.randn(3, 4)
    lower_rank(lstm, ["weight_hh_l0"], 2)
    hash_weights(lstm, ["weight_ih_l0"], 0.5)
    expected = lstm(x)[0]
    assert torch.equal(copy.deepcopy(lstm)(x)[0], expected)
    remove_parametrizations(lstm, "weight_hh_l0")  # the hashed weight outlives torch's way back
    assert torch.equal(lstm(x)[0], expected)
    assert [kind.__name__ for kind in type(lstm).__mro__[:2]] == ["HashedLSTM", "LSTM"]
    remove(lstm, "weight_ih_l0")
    assert type(lstm) is plain
    assert torch.equal(lstm(x)[0], expected)


def test_cached_reads_a_weight_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lower_rank(model, ["0.weight"], 2)
    with cached():
        weight = model[0].weight
        assert model[0].weight is weight
        assert copy.deepcopy(model)[0].weight is not weight
    assert model[0].weight is not weight


def test_derived_weights_describe_themselves():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    lower_rank(model, ["0.weight"], 2)
    share_templates(model, ["1.weight"], 3)
    generate_weights(model, ["2.weight"], 8, 4, 4)
    described = [derived.steps[-1].describe() for layer in model for derived in derived_in(layer)]
    assert described == ["of rank 2", "a mixture of 3 templates", "generated from embeddings of 8"]


def test_weights_that_others_parametrize_are_derived():
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    [derived] = derived_in(layer)
    assert (derived.name, len(derived.originals)) == ("weight", 2)
    remove(layer, "weight")
    assert names_of(layer) == ["bias", "weight"]
    assert type(layer) is nn.Linear


def test_a_class_is_swapped_with_its_state():
    class Shouting(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul(100)

    layer, x = nn.Linear(2, 2), torch.ones(2)
    before = layer(x)
    swap_class(layer, Shouting)
    assert torch.equal(layer(x), before * 100)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: tie(model, ["0.weight ~ 1.weight"]),
        lambda model: tie(model, ["0.weight ~ 1.weight"], init="mean"),
        lambda model: lower_rank(model, ["*.weight"], 2),
        lambda model: lower_rank(model, ["*.weight"], 2, diagonal=True),
    ],
)
def test_fake_tensors_have_no_values_to_check(change):
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        change(model)
        model.load_state_dict(model.state_dict())
        assert model(torch.ones(2, 8)).shape == (2, 8)
