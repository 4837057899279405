"""A block used again against copies of it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tying import ConfigurationError
from tying.depth import Recurrent, Residual
from tying.hard import audit


def block():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    return Residual(branch, activation=nn.ReLU()).double()


X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_unrolled_it_is_a_network_of_copies_and_its_gradient_is_the_sum():
    recurrent, copies = Recurrent(block(), 4), nn.Sequential(*(block() for _ in range(4)))
    ours, theirs = recurrent(X), copies(X)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, weight in recurrent.blocks[0].named_parameters():
        others = [one.get_parameter(name).grad for one in copies]
        if "branch.1" in name:  # a norm of each step's own
            for step, gradient in enumerate(others):
                torch.testing.assert_close(recurrent.blocks[step].get_parameter(name).grad, gradient)
        else:
            torch.testing.assert_close(weight.grad, sum(others), rtol=1e-12, atol=1e-12)
            assert all(one.get_parameter(name) is weight for one in recurrent.blocks)
    for one, other in zip(recurrent.blocks, copies, strict=True):
        assert torch.equal(one.branch[1].running_mean, other.branch[1].running_mean)
    means = {tuple(one.branch[1].running_mean.tolist()) for one in recurrent.blocks}
    assert len(means) == 4


def test_parameters_grow_with_the_norms_alone():
    counts = {(steps, own): sum(p.numel() for p in Recurrent(block(), steps, own).parameters())
              for steps in (1, 5) for own in (True, False)}  # fmt: skip
    plain = sum(p.numel() for p in block().parameters())
    assert counts == {(1, True): plain, (1, False): plain, (5, True): plain + 4 * 2 * 3, (5, False): plain}


def test_common_norms_see_every_step():
    recurrent, one = Recurrent(block(), 3, per_step_norm=False), block()
    expected = one(one(one(X)))
    assert torch.equal(recurrent(X), expected)
    assert torch.equal(recurrent.blocks[0].branch[1].running_var, one.branch[1].running_var)
    assert int(one.branch[1].num_batches_tracked) == 3


def test_more_and_fewer_steps_than_in_training():
    recurrent = Recurrent(block(), 3)
    recurrent(X)
    recurrent.eval()
    first, second, third = recurrent.blocks
    recurrent.steps = 5
    assert torch.equal(recurrent(X), third(third(third(second(first(X))))))
    recurrent.steps = 1
    assert torch.equal(recurrent(X), first(X))


def test_saved_copied_and_audited():
    recurrent = Recurrent(block(), 3)
    other = Recurrent(block(), 3)
    with torch.no_grad():
        for weight in recurrent.parameters():
            weight.add_(0.1)
    other.load_state_dict(recurrent.state_dict())
    assert torch.equal(other(X), recurrent(X))
    twin = copy.deepcopy(recurrent)
    assert twin.blocks[2].branch[0].weight is twin.blocks[0].branch[0].weight
    assert len(audit(recurrent).groups) == 4


def test_checkpointing_a_block_inside():
    gradients = []
    for saved in (False, True):
        recurrent = Recurrent(block(), 3)
        x = X.clone().requires_grad_()
        for one in recurrent.blocks:
            x = checkpoint(one, x, use_reentrant=False) if saved else one(x)
        x.square().sum().backward()
        gradients.append([p.grad for p in recurrent.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_steps_left_out_in_training_have_zero_gradients():
    recurrent = Recurrent(block(), 3)
    recurrent.steps = 1
    recurrent(X).sum().backward()
    assert all(p.grad is not None for p in recurrent.parameters())
    assert not recurrent.blocks[2].branch[1].weight.grad.any()


def test_every_kind_of_norm_is_of_each_step():
    for norm in (nn.RMSNorm(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)):
        recurrent = Recurrent(nn.Sequential(nn.Linear(4, 4), norm), 2)
        assert recurrent.blocks[0][1].weight is not recurrent.blocks[1][1].weight
        assert recurrent.blocks[0][0].weight is recurrent.blocks[1][0].weight


class TwoStates(nn.Module):
    """Returns two states, or one and its second argument, or one and another tensor."""

    def __init__(self, further):
        super().__init__()
        self.linear, self.further = nn.Linear(4, 4), further

    def forward(self, x, y):
        return x + self.linear(y), self.further(y)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("further", "steps", "refused"),
    [
        (lambda y: y + 1, 2, True),
        (lambda y: y + 1, 1, False),
        (lambda y: y, 2, False),
        (lambda y: y.sum(-1), 2, False),
        (lambda y: None, 2, False),
    ],
)
def test_a_second_state_is_refused(further, steps, refused, by_name):
    recurrent, x, y = Recurrent(TwoStates(further), steps), torch.randn(3, 4), torch.randn(3, 4)
    call = (lambda: recurrent(x, y=y)) if by_name else (lambda: recurrent(x, y))
    if refused:
        with pytest.raises(
            ConfigurationError, match=r"must have one state, and its output 2 seems to be a second one: .*\(3, 4\)"
        ):
            call()
    else:
        call()


class Stack(nn.Module):
    def forward(self, tensors):
        return torch.stack(tensors)


def test_mistakes():
    with pytest.raises(ConfigurationError, match=r"whose weights are parameters, not parametrizations\.weight"):
        Recurrent(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 2)
    with pytest.raises(ConfigurationError, match="steps must be an integer, 1 or more, not 0"):
        Recurrent(nn.Linear(2, 2), 2).steps = 0
    with pytest.raises(ConfigurationError, match="steps must be an integer, 1 or more, not 0"):
        Recurrent(nn.Linear(2, 2), 0)
    with pytest.raises(ConfigurationError, match=r"must keep .* a tensor: it returns \(2, 3\) for \(2, 4\)"):
        Recurrent(nn.Linear(4, 3), 1)(torch.zeros(2, 4))
    with pytest.raises(ConfigurationError, match=r"must keep .* a tensor: it returns \(2, 4\) for a list"):
        Recurrent(nn.Sequential(Stack(), nn.Linear(4, 4)), 1)([torch.zeros(4), torch.zeros(4)])
