"""Hierarchical multiscale LSTMs: their three branches, and gradients through boundaries."""

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tying import ConfigurationError
from tying.depth import HMLSTM, HMState, hm_update
from tying.depth.rnn.hm_lstm import detect_boundary

D = torch.float64


def net(layers=3, **options):
    torch.manual_seed(0)
    return HMLSTM(3, 4, layers, **options).to(D)


def by_cases(own, x, boundaries):
    """The paper's equations, sample by sample and case by case, with given boundaries."""
    layers, size = len(own.across), own.hidden_size
    out = torch.zeros(len(x), x.shape[1], layers, size, dtype=D)
    kinds = torch.zeros(3, layers, dtype=torch.long)
    for n in range(x.shape[1]):
        h, c = ([torch.zeros(size, dtype=D) for _ in range(layers)] for _ in range(2))
        z = [0] * layers
        for t in range(len(x)):
            before = list(z)
            for level in range(layers):
                below = 1 if level == 0 else z[level - 1]
                total = own.across[level](h[level])
                total = total + own.below[level](x[t, n] if level == 0 else h[level - 1]) * below
                if level < layers - 1 and before[level]:
                    total = total + own.above[level](h[level + 1])
                f, i, o, g = total[: 4 * size].chunk(4)
                f, i, o, g = f.sigmoid(), i.sigmoid(), o.sigmoid(), g.tanh()
                if before[level]:
                    kind, c[level] = 2, i * g
                elif below:
                    kind, c[level] = 1, f * c[level] + i * g
                else:
                    kind = 0
                if kind:
                    h[level] = o * c[level].tanh()
                kinds[kind, level] += 1
                if level < layers - 1:
                    z[level] = int(boundaries[t, n, level])
                out[t, n, level] = h[level]
    return out, kinds


def test_the_three_branches_under_forced_boundaries():
    own = net()
    x = torch.randn(12, 5, 3, dtype=D)
    boundaries = (torch.rand(12, 5, 2) < 0.5).to(D)
    found = own(x, boundaries=boundaries)
    expected, kinds = by_cases(own, x, boundaries)
    torch.testing.assert_close(found.hidden, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.boundaries, boundaries)
    assert kinds[0, 0] == 0  # the first layer never copies
    assert bool((kinds[:, 1] > 0).all())
    assert kinds[2, 2] == 0  # the top layer never flushes


@pytest.mark.parametrize(("z_before", "z_below"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_branches_bitwise(z_before, z_below):
    torch.manual_seed(0)
    h, c, f, i, o, g = torch.randn(6, 2, 4, dtype=D)
    marks = torch.full((2, 1), z_before, dtype=D), torch.full((2, 1), z_below, dtype=D)
    new_h, new_c = hm_update(h, c, (f, i, o, g), *marks)
    if z_before:
        assert torch.equal(new_c, i * g)
    elif z_below:
        assert torch.equal(new_c, f * c + i * g)
    else:
        assert torch.equal(new_c, c)
        assert torch.equal(new_h, h)
        return
    assert torch.equal(new_h, o * torch.tanh(new_c))


def test_gradients_of_the_boundaries():
    """Straight through: where a boundary is, or is not, changes what the layer does."""
    torch.manual_seed(0)
    h, c, f, i, o, g = torch.randn(6, 1, 4, dtype=D)
    for before, below in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        marks = [torch.full((1, 1), mark, dtype=D, requires_grad=True) for mark in (before, below)]
        new_h, new_c = hm_update(h, c, (f, i, o, g), *marks)
        update, copied = f * c + i * g, (1 - before) * (1 - below)
        d_cell = [i * g - below * update - (1 - below) * c, (1 - before) * (update - c)]
        d_copied = [below - 1, before - 1]
        for mark, d_c, d_k in zip(marks, d_cell, d_copied, strict=True):
            [found] = torch.autograd.grad(new_c.sum(), mark, retain_graph=True)
            torch.testing.assert_close(found, d_c.sum().view(1, 1))
            fresh = o * new_c.detach().tanh()
            d_h = d_k * (h - fresh) + (1 - copied) * o * (1 - new_c.detach().tanh() ** 2) * d_c
            [found] = torch.autograd.grad(new_h.sum(), mark, retain_graph=True)
            torch.testing.assert_close(found, d_h.sum().view(1, 1))


def test_detectors_learn_through_every_use_of_their_boundaries():
    own = net()
    out = own(torch.randn(6, 2, 3, dtype=D))
    out.hidden[:, :, 1:].square().sum().backward()  # what layers above the first make of its boundaries
    assert own.below[0].weight.grad[-1].any()
    assert own.across[0].weight.grad[-1].any()


def test_copying_has_an_identity_jacobian():
    gates = tuple(torch.randn(1, 3, dtype=D) for _ in range(4))
    zero = torch.zeros(1, 1, dtype=D)
    h, c = torch.randn(1, 3, dtype=D), torch.randn(1, 3, dtype=D)
    jacobian = torch.autograd.functional.jacobian(lambda h, c: torch.cat(hm_update(h, c, gates, zero, zero)), (h, c))
    whole = torch.cat([part.view(6, 3) for part in jacobian], dim=1)
    assert torch.equal(whole, torch.eye(6, dtype=D))


def test_without_boundaries_only_the_first_layer_moves():
    own = net()
    start = HMState(*(torch.randn(3, 2, 4, dtype=D) for _ in range(2)), torch.zeros(2, 2, 1, dtype=D))
    out = own(torch.randn(6, 2, 3, dtype=D), start, boundaries=torch.zeros(6, 2, 2, dtype=D))
    for layer in (1, 2):
        assert torch.equal(out.state.h[layer], start.h[layer])
        assert torch.equal(out.state.c[layer], start.c[layer])
    assert not torch.equal(out.state.h[0], start.h[0])


def test_the_slope_changes_gradients_and_no_value():
    x = torch.randn(10, 3, 3, dtype=D)
    outs, gradients = [], []
    for slope in (1.0, 5.0):
        own = net(slope=slope)
        out = own(x)
        out.hidden.square().sum().backward()
        outs.append(out)
        gradients.append(own.across[0].weight.grad)
    assert torch.equal(outs[0].hidden, outs[1].hidden)
    assert torch.equal(outs[0].boundaries, outs[1].boundaries)
    assert {*outs[0].boundaries.unique().tolist()} == {0.0, 1.0}
    assert not torch.allclose(*gradients)


def test_a_boundarys_value_and_gradient_by_hand():
    x = torch.tensor([-3.0, -0.4, 0.0, 0.4, 3.0], dtype=D, requires_grad=True)
    z = detect_boundary(x, 2.0, False)
    assert z.tolist() == [0, 0, 0, 1, 1]
    z.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    torch.manual_seed(0)
    drawn = detect_boundary(torch.full((20000,), 0.25), 2.0, True)
    assert abs(float(drawn.mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 20000)


def test_sampling_is_for_training_alone():
    own = net(boundary="sample")
    x = torch.randn(8, 4, 3, dtype=D)
    torch.manual_seed(0)
    first, second = own(x).boundaries, own(x).boundaries
    assert not torch.equal(first, second)
    step = net()
    assert torch.equal(own.eval()(x).hidden, step(x).hidden)


def test_all_layers_and_boundaries_in_every_layout():
    layer, other, top = net(), net(batch_first=True), net(outputs="top")
    x, boundaries = torch.randn(8, 2, 3, dtype=D), (torch.rand(8, 2, 2) < 0.5).to(D)
    for given in (None, boundaries):
        whole = layer(x, boundaries=given)
        outputs, state = top(x, boundaries=given)
        assert torch.equal(outputs, whole.hidden[:, :, -1])
        assert all(map(torch.equal, state, whole.state))
        out = other(x.transpose(0, 1), boundaries=None if given is None else given.transpose(0, 1))
        torch.testing.assert_close(out.hidden.transpose(0, 1), whole.hidden)
        assert torch.equal(out.boundaries.transpose(0, 1), whole.boundaries)
        single = layer(x[:, 1], boundaries=None if given is None else given[:, 1])
        torch.testing.assert_close(single.hidden, whole.hidden[:, 1])
        assert torch.equal(single.boundaries, whole.boundaries[:, 1])
        lengths = (5, 8)
        packed = layer(
            *(
                None if part is None else pack_padded_sequence(part, lengths, enforce_sorted=False)
                for part in (x, None, given)
            )
        )
        for part, expected in ((packed.hidden, whole.hidden), (packed.boundaries, whole.boundaries)):
            padded, _ = pad_packed_sequence(part)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(padded[:length, row], expected[:length, row])


def test_dropout_is_of_what_a_layer_reads_below():
    layer, x = net(dropout=1.0), torch.randn(8, 2, 3, dtype=D)
    layer(x).hidden.sum().backward()
    assert layer.below[0].weight.grad.any()
    assert not any(linear.weight.grad.any() for linear in layer.below[1:])
    assert layer.above[0].weight.grad.any()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: HMLSTM(3, 4, layers=1), "layers must be 2 or more"),
        (lambda: HMLSTM(3, 4, slope=0.0), "slope must be above 0"),
        (lambda: HMLSTM(3, 4, boundary="soft"), "boundary must be 'step' or 'sample', not 'soft'"),
        (lambda: HMLSTM(3, 4, slope=math.nan), "slope must be above 0, not nan"),
        (lambda: HMLSTM(3, 4, outputs="last"), "outputs must be 'all' or 'top', not 'last'"),
        (
            lambda: HMLSTM(3, 4)(torch.zeros(6, 2, 3), boundaries=torch.zeros(6, 2, 3)),
            r"Expected boundaries size \(6, 2, 2\), got \(6, 2, 3\)",
        ),
    ],
)
def test_mistakes(make, told):
    with pytest.raises(ConfigurationError, match=told):
        make()
