"""FractalNet, its columns, and its draws."""

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.models import FractalNet

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(**options):
    torch.manual_seed(0)
    return FractalNet(columns=3, widths=(4, 6), **options)


def plain(net, column):
    """The network of one column, and pooling."""
    parts = [part for block in net.blocks for part in (*block.columns[column], nn.MaxPool2d(2))]
    return lambda x: net.head(nn.Sequential(*parts)(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("column", [0, 1, 2])
def test_columns_alone_are_plain_networks_bitwise(column):
    net = small().eval()
    net(X)
    net.column = column
    assert torch.equal(net(X), plain(net, column)(X))


def test_global_sampling_trains_one_column_of_the_whole_network():
    net = small(global_share=1.0)
    torch.manual_seed(0)
    seen = set()
    for _ in range(12):
        net.zero_grad()
        net(X).sum().backward()
        trained = [
            {column for column in range(3) if any(p.grad.any() for p in block.columns[column].parameters())}
            for block in net.blocks
        ]
        assert trained[0] == trained[1]
        assert len(trained[0]) == 1
        seen |= trained[0]
        assert all(p.grad is not None for p in net.parameters())
    assert seen == {0, 1, 2}


def test_without_drop_path_all_columns_train():
    net = small(drop_path=0.0, global_share=0.0)
    net(X).sum().backward()
    assert all(p.grad.any() for name, p in net.named_parameters() if "conv" in name)


def test_twenty_layers():
    """C = 3 and B = 5, as in the paper: the deepest column has 20 convolutions."""
    net = FractalNet(dropout=(0, 0.1, 0.2, 0.3, 0.4))
    assert sum(len(block.columns[2]) for block in net.blocks) == 20
    assert isinstance(net.blocks[0].columns[0][0].dropout, nn.Identity)
    assert net.blocks[4].columns[2][3].dropout.p == 0.4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dropout": (0.1,)}, "1 dropout rates for 2 blocks"),
        ({"global_share": 2.0}, "global_share must be in \\[0, 1\\]"),
        ({"column": 3}, r"column must be an integer in \[0, 2\], not 3"),
        ({"drop_path": -1.0}, "drop_path must be in"),
    ],
)
def test_mistakes(options, told):
    with pytest.raises(ConfigurationError, match=told):
        small(**options)
