import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tying import ConfigurationError
from tying.models import MLP, ResNet


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962)]
)
def test_resnet_has_the_papers_size(depth, parameters):
    """0.27, 0.46, 0.66, 0.85 and 1.7 M in He et al. 2016, table 6."""
    network = ResNet(depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len([m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth


def test_resnet_block_equals_the_formula():
    network = ResNet(8).eval()
    block, x = network.layer2[0], torch.randn(2, 16, 8, 8)
    branch = block.branch
    y = F.conv2d(x, branch.conv1.weight, stride=2, padding=1)
    y = branch.norm2(F.conv2d(torch.relu(branch.norm1(y)), branch.conv2.weight, padding=1))
    shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], dim=1)
    torch.testing.assert_close(block(x), torch.relu(shortcut + y))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [0, 2, 21, -4])
def test_resnet_of_another_depth(depth):
    with pytest.raises(ConfigurationError, match=rf"6n \+ 2 .*not {depth}"):
        ResNet(depth)


def test_resnet_width_and_memory_format():
    network = ResNet(8, width=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(x), network(x.contiguous(memory_format=torch.channels_last)))
    assert network.head.in_features == 128


def test_mlp():
    mlp = MLP([12, 8, 2])
    x = torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(mlp(x), mlp[3](torch.relu(mlp[1](x.flatten(1)))))
    with pytest.raises(ConfigurationError, match="sizes must hold"):
        MLP([3])
