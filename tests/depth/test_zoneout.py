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
    ],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_without_zoneout_it_is_torchs_lstm(options, with_state):
    theirs, ours = pair(**options)
    x = torch.randn(2, 6, 3, dtype=D) if "batch_first" in options else torch.randn(6, 2, 3, dtype=D)
    rows = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    state = (torch.randn(rows, 2, 4, dtype=D), torch.randn(rows, 2, 4, dtype=D)) if with_state else None
    for own, other in zip(gradients(ours, x, state), gradients(theirs, x, state), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_single_precision_to_a_millionth():
    theirs, ours = pair(torch.float32, num_layers=2)
    x = torch.randn(20, 5, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-6)


def test_one_sequence_alone_and_errors_of_shapes():
    theirs, ours = pair()
    x = torch.randn(6, 3, dtype=D)
    state = torch.randn(1, 4, dtype=D), torch.randn(1, 4, dtype=D)
    for given in (None, state):
        (out, (h, c)), (other, (g, b)) = ours(x, given), theirs(x, given)
        for one, same in zip((out, h, c), (other, g, b), strict=True):
            torch.testing.assert_close(one, same)
    with pytest.raises(ConfigurationError, match=r"states are \(1, 2, 4\), \(1, 2, 4\), not \(1, 3, 4\), \(1, 3, 4\)"):
        ours(torch.zeros(5, 2, 3, dtype=D), (torch.zeros(1, 3, 4, dtype=D), torch.zeros(1, 3, 4, dtype=D)))
    with pytest.raises(ConfigurationError, match="an empty sequence has no steps"):
        ours(torch.zeros(0, 2, 3, dtype=D))


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


def by_hand(inputs, h, c, weight_ih, weight_hh, bias, keep_cell, keep_hidden):
    """The equations, with skip-forward's merge over time."""
    outs = []
    for t, x in enumerate(inputs):
        i, f, g, o = (x @ weight_ih.t() + h @ weight_hh.t() + bias).chunk(4, dim=1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        mixed = [
            torch.where(k[t], n, old) if isinstance(k, torch.Tensor) else old + k * (n - old)
            for k, n, old in ((keep_cell, new, c), (keep_hidden, o.sigmoid() * new.tanh(), h))
        ]
        c, h = mixed
        outs.append(h)
    return torch.stack(outs), h, c


@pytest.mark.parametrize("keeps", ["masks", "means"])
def test_values_and_gradients_of_the_equations(keeps):
    torch.manual_seed(0)
    x, h, c = torch.randn(5, 2, 4, dtype=D), torch.randn(2, 3, dtype=D), torch.randn(2, 3, dtype=D)
    weights = [torch.randn(12, *shape, dtype=D) for shape in ((4,), (3,), ())]
    given = [keep_mask(0.6, (5, 2, 3)) for _ in range(2)] if keeps == "masks" else [0.7, 0.4]
    arguments = [one.requires_grad_() for one in (x, h, c, *weights)]
    ours, theirs = zoned_lstm(*arguments, *given), by_hand(*arguments, *given)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: zoned_lstm(*a, *given), arguments)


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
    net = ZoneoutLSTM(3, 4000, zoneout_cell=0.1, zoneout_hidden=0.7)
    h, c = torch.randn(1, 4, 4000), torch.randn(1, 4, 4000)
    _, (new_h, new_c) = net(torch.randn(1, 4, 3), (h, c))
    for old, new, rate in ((c, new_c, 0.1), (h, new_h, 0.7)):
        assert abs(float((old == new).double().mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / old.numel())


def test_the_mean_over_masks_of_one_step_is_evaluation():
    _, net = pair(zoneout_cell=0.0, zoneout_hidden=0.4)
    x = torch.randn(1, 2, 3, dtype=D)
    state = torch.randn(1, 2, 4, dtype=D), torch.randn(1, 2, 4, dtype=D)
    torch.manual_seed(0)
    passes = torch.stack([net(x, state)[0] for _ in range(4000)])
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
    cells = torch.stack([net(x, state)[1][1] for _ in range(4000)])
    spread = cells.std(dim=0) / math.sqrt(4000)
    assert bool(((cells.mean(dim=0) - net.eval()(x, state)[1][1]).abs() <= 5 * spread + 1e-12).all())


def test_rates_of_one_keep_the_state_whatever_the_input():
    net = ZoneoutLSTM(3, 4, zoneout_cell=1.0, zoneout_hidden=1.0)
    state = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    out, (h, c) = net(torch.full((3, 2, 3), math.nan), state)
    assert torch.equal(h, state[0])
    assert torch.equal(c, state[1])
    assert torch.equal(out, state[0].expand(3, 2, 4))


def test_inputs_of_other_shapes():
    net, cell = ZoneoutLSTM(3, 4), ZoneoutLSTMCell(3, 4)
    for wrong in (torch.zeros(5, 2, 4), torch.zeros(1, 5, 2, 3), torch.zeros(5, 2)):
        with pytest.raises(ConfigurationError, match=r"inputs are \(steps, batch, 3\), not"):
            net(wrong)
    with pytest.raises(ConfigurationError, match=r"inputs are \(batch, 3\) or \(3,\), not \(2, 5, 3\)"):
        cell(torch.zeros(2, 5, 3))
    with pytest.raises(ConfigurationError, match=r"states are \(2, 4\), \(2, 4\), not \(4, 2\), \(4, 2\)"):
        cell(torch.zeros(2, 3), (torch.zeros(4, 2), torch.zeros(4, 2)))
    mask = torch.rand(5, 2, 4, requires_grad=True)
    with pytest.raises(ConfigurationError, match="must not require gradients: detach them"):
        zoned_lstm(torch.zeros(5, 2, 3), *torch.zeros(2, 2, 4), torch.zeros(16, 3), torch.zeros(16, 4), None, mask)


def test_device_and_dtype_are_those_asked_for():
    net = ZoneoutLSTM(3, 4, device="meta", dtype=D)
    assert net.weight_hh_l0.device.type == "meta"
    assert net.weight_hh_l0.dtype == D
    assert "zoneout_cell=0.3" in repr(ZoneoutLSTMCell(3, 4, zoneout_cell=0.3, dtype=D))
