"""Fractal blocks: their structure, their draws, and what is not computed."""

import math

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.depth import FractalBlock, fractal_join
from tying.depth.fractal import draw_column, draw_paths


class Layer(nn.Linear):
    """A layer that counts its uses."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, dtype=torch.float64)
        self.uses = 0

    def forward(self, x):
        self.uses += 1
        return super().forward(x).tanh()


def block(columns=3, drop_path=0.15):
    torch.manual_seed(0)
    return FractalBlock(columns, Layer, 3, 5, drop_path)


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(net, x):
    """The fractal of three columns, written out; joins that meet are one."""
    (a,), (b0, b1), (c0, c1, c2, c3) = net.columns
    first = (b0(x) + c1(c0(x))) / 2
    return (a(x) + b1(first) + c3(c2(first))) / 3


def test_three_columns_by_hand():
    net = block(drop_path=0.0)
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(X), by_hand(net, X), rtol=1e-14, atol=1e-14)


def test_nothing_is_dropped_in_evaluation():
    net = block(drop_path=0.9).eval()
    torch.testing.assert_close(net(X), by_hand(net, X), rtol=1e-14, atol=1e-14)


def test_one_column_is_a_layer():
    net = block(columns=1)
    assert torch.equal(net(X), net.columns[0][0](X))


@pytest.mark.parametrize("training", [True, False])
def test_a_column_alone_is_the_plain_network_bitwise(training):
    net = block().train(training)
    for number, column in enumerate(net.columns):
        for layer in net.modules():
            if isinstance(layer, Layer):
                layer.uses = 0
        out = net(X, column=number)
        assert [layer.uses for other in net.columns for layer in other] == [
            int(other is column) for other in net.columns for _ in other
        ]
        assert torch.equal(out, nn.Sequential(*column)(X))
    with pytest.raises(ConfigurationError, match=r"column must be an integer in \[0, 2\], not 3"):
        net(X, column=3)


def test_joins_keep_one_input_at_least():
    torch.manual_seed(0)
    for count in (1, 2, 3):
        for drop in (0.15, 0.9, 1.0):
            drawn = [draw_paths(count, drop) for _ in range(2000)]
            assert all(paths and paths == sorted({*paths}) and paths[-1] < count for paths in drawn)
            for place in range(count):
                share = sum(place in paths for paths in drawn) / 2000
                expected = 1 - drop + drop**count / count
                assert abs(share - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1e-12) / 2000)


def test_columns_are_drawn_as_often_as_said():
    torch.manual_seed(0)
    drawn = [draw_column(3, 0.5) for _ in range(3000)]
    assert abs(drawn.count(None) / 3000 - 0.5) < 5 * math.sqrt(0.25 / 3000)
    for column in range(3):
        assert abs(drawn.count(column) / 3000 - 1 / 6) < 5 * math.sqrt(5 / 36 / 3000)


def test_a_join_of_equal_inputs_is_any_of_them():
    same = torch.randn(5, dtype=torch.float64)
    for count in (1, 2, 3, 4):
        torch.testing.assert_close(fractal_join([same] * count), same, rtol=1e-15, atol=0)


def test_what_is_dropped_is_not_computed_and_has_a_zero_gradient():
    net = block(drop_path=0.6)
    torch.manual_seed(1)
    seen = set()
    for _ in range(30):
        for layer in net.modules():
            if isinstance(layer, Layer):
                layer.uses = 0
        net.zero_grad()
        net(X).square().sum().backward()
        layers = [layer for column in net.columns for layer in column]
        assert {layer.uses for layer in layers} <= {0, 1}
        seen.add(tuple(layer.uses for layer in layers))
        for layer in layers:
            assert (layer.weight.grad != 0).any() == (layer.uses == 1)
            assert layer.weight.grad is not None
    assert len(seen) > 5


def test_mistakes():
    with pytest.raises(ConfigurationError, match="columns must be 1 or more"):
        FractalBlock(0, nn.Linear, 2, 2)
    with pytest.raises(ConfigurationError, match=r"drop_path must be in \[0, 1\], not 1\.5"):
        FractalBlock(2, nn.Linear, 2, 2, drop_path=1.5)
