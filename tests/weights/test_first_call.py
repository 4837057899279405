"""The check of shards at the first forward pass in a run of several processes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tying.hard import lower_rank, tie
from tying.weights import first_call
from tying.weights.first_call import check_at_first_call


@pytest.fixture
def _distributed(monkeypatch):
    monkeypatch.setattr(first_call, "is_distributed", lambda: True)


def model():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tie(net, ["0.weight ~ 1.weight"])
    lower_rank(net, ["2.weight"], 1)
    return net


def hooks(net):
    return sum(len(module._forward_pre_hooks) for module in net.modules())


CALLED = []


@pytest.mark.usefixtures("_distributed")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net])
def test_a_model_and_its_copies_are_checked_once(copied):
    net = model()
    copy_of_net = copied(net)
    for checked in {net, copy_of_net}:
        assert hooks(checked) == 2
        expected = [checked(torch.ones(2, 3)) for _ in range(2)]
        assert torch.equal(*expected)
        assert hooks(checked) == 0


@pytest.mark.usefixtures("_distributed")
def test_the_check_sees_the_module_before_its_first_pass_only():
    layer = nn.Linear(2, 2)
    check_at_first_call(layer, CALLED.append)
    check_at_first_call(layer, CALLED.append)
    for _ in range(2):
        layer(torch.ones(2))
        assert [layer] == CALLED


@pytest.mark.usefixtures("_distributed")
def test_a_module_has_every_check():
    layer, called = nn.Linear(2, 2), []

    def first(module):
        called.append("first")

    def second(module):
        called.append("second")

    check_at_first_call(layer, first)
    check_at_first_call(layer, second)
    for _ in range(2):
        layer(torch.ones(2))
    assert called == ["first", "second"]


def test_one_process_checks_nothing():
    assert hooks(model()) == 0
