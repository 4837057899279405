"""Passthrough networks against the equations, and at the limits of their rank."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from tying import ConfigurationError
from tying.depth import PassthroughGRU, PassthroughHighway, StateMatrix

D = torch.float64


def by_hand(layer, x, h, weights):
    """The equations, by full matrices U of u, r and m."""
    size, outs = h.shape[1], []
    w, b = layer.input.weight, layer.input.bias
    parts = [(w[n * size : (n + 1) * size], b[n * size : (n + 1) * size]) for n in range(3)]
    for step in x:
        u = torch.sigmoid(step @ parts[0][0].t() + h @ weights[0].t() + parts[0][1])
        r = torch.sigmoid(step @ parts[1][0].t() + h @ weights[1].t() + parts[1][1])
        m = torch.tanh(step @ parts[2][0].t() + (h * r) @ weights[2].t() + parts[2][1])
        h = (1 - u) * m + u * h
        outs.append(h)
    return torch.stack(outs)


@pytest.mark.parametrize(("rank", "diagonal"), [(0, True), (2, True), (2, False), (5, True), (5, False)])
def test_the_recurrence_by_full_matrices(rank, diagonal):
    torch.manual_seed(0)
    net = PassthroughGRU(3, 5, rank, diagonal).to(D)
    layer = net.layers[0]
    x, h = torch.randn(6, 2, 3, dtype=D), torch.randn(1, 2, 5, dtype=D)
    weights = [one.weight for one in (layer.update, layer.reset, layer.candidate)]
    assert all(int(torch.linalg.matrix_rank(w - torch.diag(one.diagonal) if diagonal else w)) <= rank for w, one in
               zip(weights, (layer.update, layer.reset, layer.candidate), strict=True))  # fmt: skip
    out, last = net(x, h)
    torch.testing.assert_close(out, by_hand(layer, x, h[0], weights), rtol=1e-12, atol=1e-12)
    assert torch.equal(last[0], out[-1])
    if rank == 0:
        assert all(torch.equal(w, torch.diag(torch.diag(w))) for w in weights)


def test_full_rank_with_an_identity_is_the_network_of_full_matrices():
    torch.manual_seed(0)
    net = PassthroughGRU(3, 4, rank=4, diagonal=False).to(D)
    layer, x = net.layers[0], torch.randn(6, 2, 3, dtype=D)
    full = [torch.randn(4, 4, dtype=D) for _ in range(3)]
    with torch.no_grad():
        for one, weight in zip((layer.update, layer.reset, layer.candidate), full, strict=True):
            one.left.copy_(weight)
            one.right.copy_(torch.eye(4))
    torch.testing.assert_close(net(x)[0], by_hand(layer, x, torch.zeros(2, 4, dtype=D), full), rtol=1e-12, atol=1e-12)


def test_a_state_that_is_carried_on():
    net = PassthroughGRU(3, 4, rank=2, update_bias=100.0)
    h = torch.randn(1, 2, 4)
    torch.testing.assert_close(net(torch.randn(9, 2, 3), h)[1], h)
    assert torch.equal(PassthroughGRU(3, 4, rank=2).layers[0].input.bias[:4], torch.ones(4))


def test_parameters():
    def count(**options):
        return sum(p.numel() for p in PassthroughGRU(1, 128, **options).parameters())

    inputs = 3 * 128 * (1 + 1)
    assert count(rank=24) == inputs + 3 * (2 * 128 * 24 + 128)
    assert count(rank=24, diagonal=False) == inputs + 3 * 2 * 128 * 24
    assert count(rank=24, shared_projection=True) == inputs + 3 * (128 * 24 + 128) + 128 * 24


def test_layers_read_the_outputs_below():
    torch.manual_seed(0)
    net = PassthroughGRU(3, 4, rank=2, num_layers=2).to(D)
    x, h = torch.randn(6, 2, 3, dtype=D), torch.randn(2, 2, 4, dtype=D)
    out, last = net(x, h)
    first, _ = net.layers[0](x, [h[0]])
    assert torch.equal(out, net.layers[1](first, [h[1]])[0])
    assert torch.equal(last, torch.stack([first[-1], out[-1]]))


def test_a_learned_state_begins_as_zeros_and_learns():
    torch.manual_seed(0)
    net, x = PassthroughGRU(3, 4, rank=2, num_layers=2, learned_state=True), torch.randn(6, 2, 3)
    plain = PassthroughGRU(3, 4, rank=2, num_layers=2)
    assert {*net.state_dict()} - {*plain.state_dict()} == {"initial_state"}
    assert "learned_state=True" in repr(net)
    plain.load_state_dict(net.state_dict(), strict=False)
    assert torch.equal(net(x)[0], plain(x)[0])
    net(x)[0].sum().backward()
    assert net.initial_state.grad.all()
    net.zero_grad()
    net(x, torch.zeros(2, 2, 4))[0].sum().backward()
    assert net.initial_state.grad is None
    nn.init.ones_(net.initial_state)
    net.reset_parameters()
    assert not net.initial_state.any()


def test_gradients():
    torch.manual_seed(0)
    net = PassthroughGRU(2, 3, rank=1, shared_projection=True).to(D)
    x = torch.randn(4, 2, 2, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: net(x)[0], (x, *net.parameters()))
    net(x)[0].sum().backward()
    assert all(p.grad.any() for p in net.parameters())


def test_a_highway_by_hand():
    torch.manual_seed(0)
    block, x = PassthroughHighway(5, rank=2).to(D), torch.randn(3, 5, dtype=D)
    gate = torch.sigmoid(x @ block.gate.weight.t() - 1)
    f = torch.tanh(x @ block.transform.weight.t())
    torch.testing.assert_close(block(x), f * gate + x * (1 - gate))
    carried = PassthroughHighway(5, rank=2, carry_bias=100.0).to(D)
    torch.testing.assert_close(carried(x), x)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_highway_maps_packed_sequences(enforce_sorted):
    block, sequences = PassthroughHighway(3, 2), [torch.randn(steps, 3) for steps in (4, 2, 1)]
    outputs = block(pack_sequence(sequences, enforce_sorted))
    for output, sequence in zip(unpack_sequence(outputs), sequences, strict=True):
        torch.testing.assert_close(output, block(sequence))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"^Expected input size \(\.\.\., 3\), got \(2, 5\)$"),
        (torch.zeros(()), r"^Expected input size \(\.\.\., 3\), got \(\)$"),
        (torch.zeros(2, 3, dtype=D), r"^input dtype \(torch\.float64\) does not match weight dtype \(torch\.float32\)"),
        (pack_sequence([torch.zeros(2, 5)]), r"^Expected input size \(\.\.\., 3\), got \(2, 5\)$"),
    ],
)
def test_mistakes_of_inputs_of_a_highway(x, message):
    with pytest.raises(ConfigurationError, match=message):
        PassthroughHighway(3, 2)(x)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PassthroughGRU(3, 4, rank=5), "rank=5 is over the size 4: its factors would have 40 entries, .* has 16"),
        (lambda: PassthroughGRU(3, 4, rank=-1), "rank must be 0 or more, not -1"),
        (lambda: StateMatrix(4, 0, diagonal=False), "rank must be 1 or more, not 0"),
        (lambda: StateMatrix(0, 0), "size must be 1 or more, not 0"),
        (lambda: PassthroughHighway(4.0, 2), "size must be an integer, not 4.0"),
        (lambda: PassthroughGRU(3, 4, rank=2, num_layers=0), "num_layers must be 1 or more"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ConfigurationError, match=told):
        make()


@pytest.mark.parametrize("diagonal", [True, False])
def test_autocast(diagonal):
    torch.manual_seed(0)
    net, x = PassthroughGRU(3, 5, 2, diagonal), torch.randn(6, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = net(x)
    torch.testing.assert_close(out.float(), net(x)[0], rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_a_highway_under_autocast():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), PassthroughHighway(8, 2)), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x)
    torch.testing.assert_close(low.float(), net(x), rtol=0.05, atol=0.05)


def test_each_input_matrix_begins_by_glorot():
    weight = PassthroughGRU(1, 500, rank=1).layers[0].input.weight
    bound = (6 / 501) ** 0.5
    assert all(0.95 * bound < float(part.detach().abs().max()) <= bound for part in weight.chunk(3))
