"""Residual networks and their variants."""

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.depth import Recurrent, Residual, StochasticDepth, Swapout
from tying.hard import tie
from tying.models import ResNet
from tying.models.resnet import PadShortcut

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def count(**options):
    return sum(p.numel() for p in ResNet(**options).parameters())


@pytest.mark.parametrize(("depth", "width", "millions"), [(20, 2, 1.08), (20, 4, 4.327), (32, 4, 7.427)])
def test_the_networks_of_swapout(depth, width, millions):
    """Pre-activation, the first convolution widened too, and projections."""
    found = count(depth=depth, width=width, preactivation=True, shortcut="project") / 1e6
    assert found == pytest.approx(millions, abs=0.005 if width == 2 else 0.0005)


@pytest.mark.parametrize("options", [{}, {"preactivation": True}, {"shortcut": "pool"}, {"shortcut": "project"},
                                     {"shared": True}, {"shared": True, "per_step_norm": False}])  # fmt: skip
def test_every_variant_trains(options):
    net = ResNet(depth=14, **options)
    out = net(X)
    assert out.shape == (2, 10)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_preactivated_block_by_hand():
    net = ResNet(depth=8, preactivation=True, shortcut="project")
    block = net.layer2[0]
    x = torch.randn(2, 16, 8, 8)
    b = block.branch
    inner = b.conv1(b.norm1(x).relu())
    assert torch.equal(block(x), block.shortcut(x) + b.conv2(b.norm2(inner).relu()))
    assert isinstance(net.norm[0], nn.BatchNorm2d)


def test_pooled_shortcuts_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert PadShortcut(1, 2, pool=True)(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]], [[0, 0], [0, 0]]]]
    assert PadShortcut(0, 2)(x).tolist() == [[[[0, 2], [8, 10]]]]
    assert (
        PadShortcut(0, 2, pool=True)(torch.zeros(1, 1, 5, 5)).shape == PadShortcut(0, 2)(torch.zeros(1, 1, 5, 5)).shape
    )


def test_a_merge_for_every_block():
    net = ResNet(depth=14, merge=StochasticDepth(0.5))
    blocks = [m for m in net.modules() if isinstance(m, Residual)]
    assert len({id(block.merge) for block in blocks}) == len(blocks) == 6
    assert all(block.merge.keep == 0.5 for block in blocks)
    torch.manual_seed(0)
    plain = ResNet(depth=14)
    torch.manual_seed(0)
    kept = ResNet(depth=14, merge=Swapout(1.0, 1.0))
    assert torch.equal(plain(X), kept(X))


def test_shared_stages_are_those_of_a_hard_tie():
    torch.manual_seed(0)
    shared = ResNet(depth=20, shared=True)
    torch.manual_seed(0)
    tied = ResNet(depth=20)
    tie(tied, [f"layer{stage}.{blocks}.branch.conv{i}.weight"
               for stage, blocks in ((1, "*"), (2, "[12]"), (3, "[12]")) for i in (1, 2)])  # fmt: skip
    assert torch.equal(shared(X), tied(X))
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in tied.parameters())
    assert isinstance(shared.layer1[0], Recurrent)
    assert isinstance(shared.layer2[1], Recurrent)
    assert shared.layer2[1].steps == 2
    common = count(depth=20, shared=True, per_step_norm=False)
    assert common == count(depth=20, shared=True) - 2 * (2 * 16 * 2 + 2 * 32 * 1 + 2 * 64 * 1)
    assert count(depth=32, shared=True, per_step_norm=False) == common


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"depth": 21}, "depth is 6n \\+ 2"),
        ({"width": 0}, "width is a multiple of 1/16, such as 0.5, 1 or 2, not 0"),
        ({"width": 0.3}, "width is a multiple of 1/16.*not 0.3"),
        ({"width": float("inf")}, "width is a multiple of 1/16.*not inf"),
        ({"shortcut": "none"}, "shortcut must be 'pad', 'pool' or 'project', not 'none'"),
        ({"depth": 8, "shared": True}, "needs two blocks a stage: a depth of 14 or more, not 8"),
    ],
)
def test_mistakes(options, told):
    with pytest.raises(ConfigurationError, match=told):
        ResNet(**options)
