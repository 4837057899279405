import torch
from torch import nn

from tying.depth import Residual, Sum


def test_sum_by_hand():
    assert torch.equal(Sum()(torch.tensor([1.0]), lambda: torch.tensor([2.0])), torch.tensor([3.0]))


def test_residual_equals_the_formula():
    branch, shortcut = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(Residual(branch, shortcut, activation=nn.ReLU())(x), torch.relu(shortcut(x) + branch(x)))
    square = nn.Linear(3, 3)
    assert torch.equal(Residual(square)(x), x + square(x))


def test_a_merge_may_leave_the_branch_out():
    class Skip(nn.Module):
        def forward(self, x, branch):
            return x

    class Fails(nn.Module):
        def forward(self, x):
            raise AssertionError("computed")

    x = torch.randn(4, 3)
    assert Residual(Fails(), merge=Skip())(x) is x


def test_empty_sequences_are_modules_too():
    x = torch.randn(4, 3)
    assert torch.equal(Residual(nn.Sequential(), nn.Sequential(), activation=nn.Sequential())(x), 2 * x)
