"""LSTMs whose units may keep their old values, against torch's and against a loop."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from tying import ConfigurationError
from tying.depth import SkipForward, ZoneoutLSTM, ZoneoutLSTMCell, zoned_lstm
from tying.depth.draws import keep_mask

D = torch.float64


def pair(dtype=D, **options):
    """An LSTM of torch's, and ours of the same weights."""
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 4, **{k: v for k, v in options.items() if not k.startswith("zoneout")}).to(dtype)
    ours = ZoneoutLSTM(3, 4, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(net, x, state):
    x = x.clone().requires_grad_()
    state = None if state is None else tuple(one.clone().requires_grad_() for one in state)
    out, (h, c) = net(x, state)
    (out.square().sum() + h.sum() + (2 * c).sum()).backward()
    found = [out, h, c, x.grad, *(p.grad for p in net.parameters())]
    return found + ([one.grad for one in state] if state else [])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bias": False},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
        {"proj_size": 2},
        {"proj_size": 2, "bidirectional": True, "num_layers": 2, "bias": False},
    ],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_without_zoneout_it_is_torchs_lstm(options, with_state):
    theirs, ours = pair(**options)
    x = torch.randn(2, 6, 3, dtype=D) if "batch_first" in options else torch.randn(6, 2, 3, dtype=D)
    rows = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    sizes = options.get("proj_size", 4), 4
    state = tuple(torch.randn(rows, 2, size, dtype=D) for size in sizes) if with_state else None
    for own, other in zip(gradients(ours, x, state), gradients(theirs, x, state), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_single_precision_to_a_millionth():
    theirs, ours = pair(torch.float32, num_layers=2)
    x = torch.randn(20, 5, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-6)


def test_one_sequence_alone():
    theirs, ours = pair()
    x = torch.randn(6, 3, dtype=D)
    state = torch.randn(1, 4, dtype=D), torch.randn(1, 4, dtype=D)
    for given in (None, state):
        (out, (h, c)), (other, (g, b)) = ours(x, given), theirs(x, given)
        for one, same in zip((out, h, c), (other, g, b), strict=True):
            torch.testing.assert_close(one, same)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_sequences(enforce_sorted, bidirectional):
    theirs, ours = pair(bidirectional=bidirectional, num_layers=2)
    lengths = (5, 3, 3, 1) if enforce_sorted else (3, 1, 5, 3)
    packed = pack_sequence([torch.randn(n, 3, dtype=D) for n in lengths], enforce_sorted)
    rows = 4 if bidirectional else 2
    state = torch.randn(rows, 4, 4, dtype=D), torch.randn(rows, 4, 4, dtype=D)
    (out, ours_last), (other, their_last) = ours(packed, state), theirs(packed, state)
    torch.testing.assert_close(out.data, other.data)
    for one, same in zip(
        (*pad_packed_sequence(out), *ours_last), (*pad_packed_sequence(other), *their_last), strict=True
    ):
        torch.testing.assert_close(one, same)


def test_a_loop_over_the_cell_is_the_same_bitwise():
    """With inputs whose projection, of all steps at once or of one, is exact: BLAS rounds by the shape."""
    torch.manual_seed(0)
    cell = ZoneoutLSTMCell(3, 4, zoneout_cell=0.3, zoneout_hidden=0.2).to(D).eval()
    with torch.no_grad():
        for one in (cell.weight_ih, cell.bias_ih, cell.bias_hh):
            one.copy_((one * 16).round() / 16)
    whole = ZoneoutLSTM(3, 4, zoneout_cell=0.3, zoneout_hidden=0.2).to(D).eval()
    whole.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x, state, outs = torch.randn(9, 2, 3, dtype=D).mul(8).round() / 8, None, []
    for step in x:
        state = cell(step, state)
        outs.append(state[0])
    out, (h, c) = whole(x)
    assert torch.equal(out, torch.stack(outs))
    assert torch.equal(h[0], state[0])
    assert torch.equal(c[0], state[1])
    torch.testing.assert_close(cell(x[0, 0])[0], cell(x[0])[0][0])


def by_hand(inputs, h, c, weight_ih, weight_hh, bias, keep_cell, keep_hidden, weight_hr):
    """The equations, with skip-forward's merge over time."""
    outs = []
    for t, x in enumerate(inputs):
        i, f, g, o = (x @ weight_ih.t() + h @ weight_hh.t() + bias).chunk(4, dim=1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        mixed = [
            torch.where(k[t], n, old) if isinstance(k, torch.Tensor) else old + k * (n - old)
            for k, n, old in ((keep_cell, new, c), (keep_hidden, (o.sigmoid() * new.tanh()) @ weight_hr.t(), h))
        ]
        c, h = mixed
        outs.append(h)
    return torch.stack(outs), h, c


KEEPS = {
    "masks": lambda projection: [keep_mask(0.6, (3, 2, size)) for size in (3, projection)],
    "padding": lambda projection: [torch.tensor([[[1], [1]], [[1], [0]], [[1], [0]]], dtype=torch.bool)] * 2,
    "means": lambda projection: [0.7, 0.4],
    "no zoneout": lambda projection: [1.0, 1.0],
    "zoned": lambda projection: [0.0, 0.0],
}


@pytest.mark.parametrize("projection", [3, 2])
@pytest.mark.parametrize("keeps", KEEPS)
def test_values_and_gradients_of_the_equations(keeps, projection):
    torch.manual_seed(0)
    shapes = [(3, 2, 4), (2, projection), (2, 3), (12, 4), (12, projection), (12,), (projection, 3)]
    arguments = [torch.randn(shape, dtype=D) for shape in shapes]
    if projection == 3:
        arguments[-1] = torch.eye(3, dtype=D)
    keeps = KEEPS[keeps](projection)
    for tensor in arguments[: None if projection < 3 else -1]:
        tensor.requires_grad_()

    def ours(*tensors):
        return zoned_lstm(*tensors[:6], *keeps, None if projection == 3 else tensors[6])

    def theirs(*tensors):
        return by_hand(*tensors[:6], *keeps, tensors[6])

    for actual, expected in zip(ours(*arguments), theirs(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, arguments, fast_mode=True)
    for actual, expected in zip(
        second_derivatives(ours, arguments), second_derivatives(theirs, arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def second_derivatives(function, arguments):
    """Return the gradients of the squared gradients of a loss, with inputs that depend on each other."""
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    linked = [tensor + arguments[0].sum() if tensor.requires_grad else tensor for tensor in arguments]
    out, h, c = function(*linked)
    loss = out.square().sum() + h.sum() + (2 * c).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    return [*first, *torch.autograd.grad(penalty, leaves, materialize_grads=True)]


def test_gradients_without_a_graph_are_those_with_one():
    """The loop over steps that autograd records gives the gradients of the fused one."""
    _, net = pair(zoneout_cell=0.3, zoneout_hidden=0.2, num_layers=2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 2, 3, dtype=D, requires_grad=True)
    gradients = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        loss = net(x)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *net.parameters()], create_graph=create_graph))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert theirs.requires_grad
        assert not ours.requires_grad


def test_full_zoneout_freezes_the_state():
    for training in (True, False):
        _, net = pair(zoneout_cell=1.0, zoneout_hidden=1.0)
        net.train(training)
        x = torch.randn(6, 2, 3, dtype=D)
        state = tuple(torch.randn(1, 2, 4, dtype=D).requires_grad_() for _ in range(2))
        out, (h, c) = net(x, state)
        assert torch.equal(out, state[0].expand(6, 2, 4))
        assert torch.equal(h, state[0])
        assert torch.equal(c, state[1])
        (h.sum() + c.sum()).backward()
        assert all(not p.grad.any() for p in net.parameters())
        assert all(torch.equal(one.grad, torch.ones_like(one)) for one in state)  # through zoned units: the identity


def test_rates_are_those_of_keeping_the_old_value():
    """Which the original code's flags are not."""
    torch.manual_seed(0)
    net = ZoneoutLSTM(3, 1000, zoneout_cell=0.1, zoneout_hidden=0.7)
    h, c = torch.randn(1, 16, 1000), torch.randn(1, 16, 1000)
    _, (new_h, new_c) = net(torch.randn(1, 16, 3), (h, c))
    for old, new, rate in ((c, new_c, 0.1), (h, new_h, 0.7)):
        assert abs(float((old == new).double().mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / old.numel())


def test_the_mean_over_masks_of_one_step_is_evaluation():
    _, net = pair(zoneout_cell=0.0, zoneout_hidden=0.4)
    x = torch.randn(1, 2, 3, dtype=D)
    state = torch.randn(1, 2, 4, dtype=D), torch.randn(1, 2, 4, dtype=D)
    torch.manual_seed(0)
    repeated = [part.repeat(1, 4000, 1) for part in (x, *state)]
    passes = net(repeated[0], repeated[1:])[0].unflatten(1, (4000, 2)).movedim(1, 0)
    spread = passes.std(dim=0) / math.sqrt(4000)
    assert bool(((passes.mean(dim=0) - net.eval()(x, state)[0]).abs() <= 5 * spread + 1e-12).all())
    merge = SkipForward(0.6).eval()
    plain, _ = pair()
    torch.testing.assert_close(net(x, state)[0], merge(state[0], lambda: plain(x, state)[0]))


def test_masks_of_packed_sequences_freeze_what_is_past_the_end():
    _, net = pair(zoneout_cell=0.5, zoneout_hidden=0.5)
    packed = pack_sequence([torch.randn(5, 3, dtype=D), torch.randn(2, 3, dtype=D)])
    torch.manual_seed(0)
    out, (h, _) = net(packed)
    padded, _ = pad_packed_sequence(out)
    assert torch.equal(h[0, 1], padded[1, 1])
    assert torch.equal(h[0, 0], padded[4, 0])


def test_copies_keys_and_reprs():
    _, net = pair(zoneout_cell=0.15, num_layers=2)
    assert [*net.state_dict()] == [*nn.LSTM(3, 4, 2).state_dict()]
    x = torch.randn(4, 2, 3, dtype=D)
    assert torch.equal(copy.deepcopy(net).eval()(x)[0], net.eval()(x)[0])
    assert "zoneout_cell=0.15" in repr(net)


@pytest.mark.parametrize("kind", [ZoneoutLSTM, ZoneoutLSTMCell])
@pytest.mark.parametrize("name", ["zoneout_cell", "zoneout_hidden"])
def test_mistakes(kind, name):
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigurationError, match=rf"{name} must be in \[0, 1\], not"):
            kind(3, 4, **{name: wrong})


@pytest.mark.parametrize("training", [True, False])
def test_autocast_as_torchs_lstm(training):
    """Also of packed sequences; gradients come back in the parameters' own precision."""
    theirs, ours = pair(torch.float32, num_layers=2)
    zoned = ZoneoutLSTM(3, 4, 2, zoneout_cell=0.5, zoneout_hidden=0.3).train(training)
    x = torch.randn(6, 2, 3)
    packed = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0.03, atol=0.03)
        out, (h, c) = zoned(x)
        zoned(packed)
        ZoneoutLSTMCell(3, 4, zoneout_cell=0.5).train(training)(x[0])
    assert {out.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in zoned.parameters())


def test_packed_sequences_in_evaluation_mix_by_rates():
    for dtype in (D, torch.float32, torch.bfloat16):
        net = ZoneoutLSTM(3, 4, zoneout_cell=0.5, zoneout_hidden=0.3).to(dtype).eval()
        one, two = torch.randn(5, 3).to(dtype), torch.randn(2, 3).to(dtype)
        out, (h, _) = net(pack_sequence([one, two]))
        padded, _ = pad_packed_sequence(out)
        torch.testing.assert_close(padded[:2, 1], net(two)[0])
        torch.testing.assert_close(h[0, 1], net(two)[0][-1])


def test_masks_are_new_at_each_step_and_apart_for_cell_and_hidden_state():
    torch.manual_seed(0)
    net = ZoneoutLSTM(3, 500, zoneout_cell=0.5, zoneout_hidden=0.5)
    seen = []
    state = torch.randn(1, 1, 500), torch.randn(1, 1, 500)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        outputs, _ = net(torch.randn(3, 1, 3), state)
    before = state[0][0]
    for out in outputs:
        seen.append(out == before)
        before = out
    _, (h, c) = net(torch.randn(1, 1, 3), state)
    for one, other in ((seen[0], seen[1]), (seen[1], seen[2]), (h == state[0], c == state[1])):
        assert 0.35 < float((one == other).double().mean()) < 0.65


def test_masks_of_a_loop_over_the_cell():
    """Given the same masks, as the same draws make them."""
    torch.manual_seed(0)
    cell = ZoneoutLSTMCell(3, 4, zoneout_cell=0.3, zoneout_hidden=0.2).to(D)
    x, (h, c) = torch.randn(5, 2, 3, dtype=D), torch.zeros(2, 2, 4, dtype=D)
    masks, outs = [], []
    for t in range(5):
        torch.manual_seed(10 + t)
        masks.append([keep_mask(keep, (1, 2, 4)) for keep in (0.7, 0.8)])
        torch.manual_seed(10 + t)
        h, c = cell(x[t], (h, c))
        outs.append(h)
    biases = cell.bias_ih + cell.bias_hh
    given = [torch.cat(parts) for parts in zip(*masks, strict=True)]
    start = torch.zeros(2, 4, dtype=D)
    out, _, last = zoned_lstm(x, start, start, cell.weight_ih, cell.weight_hh, biases, *given)
    torch.testing.assert_close(out, torch.stack(outs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, c, rtol=1e-12, atol=1e-12)


def test_dropout_between_layers_in_training_alone():
    theirs, ours = pair(num_layers=2, dropout=1.0)
    x = torch.randn(4, 2, 3, dtype=D)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])  # of the last layer, whose inputs are zeros
    assert not torch.equal(ours(x)[0], ours.eval()(x)[0])
    torch.testing.assert_close(ours(x)[0], theirs.eval()(x)[0])


def test_the_mean_over_masks_of_the_cell():
    _, net = pair(zoneout_cell=0.4)
    x = torch.randn(1, 2, 3, dtype=D)
    state = torch.randn(1, 2, 4, dtype=D), torch.randn(1, 2, 4, dtype=D)
    torch.manual_seed(0)
    repeated = [part.repeat(1, 4000, 1) for part in (x, *state)]
    cells = net(repeated[0], repeated[1:])[1][1].unflatten(1, (4000, 2)).movedim(1, 0)
    spread = cells.std(dim=0) / math.sqrt(4000)
    assert bool(((cells.mean(dim=0) - net.eval()(x, state)[1][1]).abs() <= 5 * spread + 1e-12).all())


def test_rates_of_one_keep_the_state_whatever_the_input():
    net = ZoneoutLSTM(3, 4, zoneout_cell=1.0, zoneout_hidden=1.0)
    state = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    out, (h, c) = net(torch.full((3, 2, 3), math.nan), state)
    assert torch.equal(h, state[0])
    assert torch.equal(c, state[1])
    assert torch.equal(out, state[0].expand(3, 2, 4))


def test_a_mask_that_requires_a_gradient():
    mask = torch.rand(5, 2, 4, requires_grad=True)
    with pytest.raises(ConfigurationError, match="must not require gradients: detach them"):
        zoned_lstm(torch.zeros(5, 2, 3), *torch.zeros(2, 2, 4), torch.zeros(16, 3), torch.zeros(16, 4), None, mask)
