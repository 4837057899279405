"""A dynamic hypernetwork against weights rescaled row by row, and against the LSTM as which it begins."""

import pytest
import torch
from torch import nn

from tying import ConfigurationError
from tying.depth import HyperLSTM, HyperLSTMCell, HyperState

D = torch.float64


def drawn(layers=1, bias=True):
    """Return a network whose scales and shifts are drawn."""
    torch.manual_seed(0)
    net = HyperLSTM(3, 5, hyper_size=4, embedding_size=2, num_layers=layers, bias=bias).to(D)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def by_hand(cell, x, state):
    """The equations for one sample at a time, with the rescaled weights written out."""
    outs = []
    for h, c, small_h, small_c, sequence in zip(*state, x.transpose(0, 1), strict=True):
        own = []
        for step in sequence:
            small_h, small_c = cell.hyper(torch.cat((h, step)), (small_h, small_c))
            scale_z = cell.scale_embedding(small_h).view(8, -1)
            shift_z = cell.shift_embedding(small_h).view(4, -1)
            gates = []
            for y, (across, into) in enumerate(zip(cell.weight_hh.chunk(4), cell.weight_ih.chunk(4), strict=True)):
                across = torch.diag(scale_z[y] @ cell.scale[y]) @ across
                into = torch.diag(scale_z[4 + y] @ cell.scale[4 + y]) @ into
                gate = across @ h + into @ step + shift_z[y] @ cell.shift[y]
                if cell.bias:
                    gate = gate + (cell.bias_ih + cell.bias_hh).chunk(4)[y]
                gates.append(gate)
            i, f, g, o = gates
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            own.append(h)
        outs.append(torch.stack(own))
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_rescaled_step_by_step(bias):
    net = drawn(bias=bias)
    state = HyperState(*(torch.randn(1, 2, size, dtype=D) for size in (5, 5, 4, 4)))
    x = torch.randn(6, 2, 3, dtype=D)
    outputs, last = net(x, state)
    expected = by_hand(net.layers[0], x, [part[0] for part in state])
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(last.h[0], outputs[-1])


def test_it_begins_as_the_lstm_of_its_weights():
    torch.manual_seed(0)
    net, plain = HyperLSTM(3, 5, num_layers=2).to(D), nn.LSTM(3, 5, num_layers=2).to(D)
    with torch.no_grad():
        for cell in net.layers:
            cell.reset_parameters()  # in double precision
        for number, cell in enumerate(net.layers):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(plain, f"{kind}_l{number}").copy_(getattr(cell, kind))
    x = torch.randn(7, 2, 3, dtype=D)
    (outputs, state), (expected, (h, c)) = net(x), plain(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((state.h, state.c), (h, c), rtol=1e-12, atol=1e-12)


def test_its_parameters():
    size, inputs, small, embedding = 5, 3, 4, 2
    own = 4 * size * (inputs + size + 2) + 4 * small * (inputs + size + small + 2)
    between = (small + 1) * 8 * embedding + small * 4 * embedding + 12 * embedding * size
    assert sum(p.numel() for p in HyperLSTM(3, 5, 4, 2).parameters()) == own + between


def test_layers_are_loops_over_their_cells():
    net, x = drawn(layers=2), torch.randn(4, 2, 3, dtype=D)
    below, state = x, None
    for layer, inputs in zip(net.layers, (3, 5), strict=True):
        cell, state, outs = HyperLSTMCell(inputs, 5, 4, 2, dtype=D), None, []
        cell.load_state_dict(layer.state_dict())
        for step in below:
            state = cell(step, state)
            outs.append(state.h)
        below = torch.stack(outs)
    outputs, last = net(x)
    torch.testing.assert_close(outputs, below, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([part[1] for part in last], [*state], rtol=1e-12, atol=1e-12)


def test_gradients():
    net = drawn()
    inputs = torch.randn(3, 2, 3, dtype=D, requires_grad=True)
    names, parameters = zip(*net.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (inputs, *parameters))


def test_parameters_that_begin_anew_begin_alike():
    torch.manual_seed(0)
    cell = HyperLSTMCell(3, 5, 4, 2)
    nn.init.ones_(cell.shift)
    cell.reset_parameters()
    assert not cell.shift.any()
    torch.testing.assert_close(cell.scale.sum(dim=1), torch.ones(8, 5))
    assert (cell.scale[:, 0] - cell.scale[:, 1]).abs().min() > 0  # or else both embeddings would stay one


def test_mistakes():
    for sizes, told in (((3, 5, 0, 2), "hyper_size must be 1 or more"), ((3, 5, 4, 0), "embedding_size must be 1")):
        with pytest.raises(ConfigurationError, match=told):
            HyperLSTM(*sizes)
    with pytest.raises(ConfigurationError, match="num_layers must be 1 or more, not 0"):
        HyperLSTM(3, 5, num_layers=0)
