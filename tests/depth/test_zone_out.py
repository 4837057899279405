"""LSTMs of a model that get zoneout in place, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.rnn import pack_sequence

from tying import ConfigurationError
from tying.depth import (
    HyperLSTMCell,
    StochasticDepth,
    ZoneoutLSTM,
    ZoneoutLSTMCell,
    apply_merge,
    loop,
    remove_merge,
    remove_zoneout,
    unloop,
    zone_out,
)
from tying.hard import audit, bake, lower_rank, tie, untie
from tying.hashing import UniformHash, hash_weights

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Subclass(nn.LSTM):
    """An LSTM with initial values of its own."""

    def reset_parameters(self):
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.5)


class Shouting(nn.LSTM):
    """An LSTM with a forward of its own."""

    def forward(self, x, hx=None):
        out, state = super().forward(x, hx)
        return 2 * out, state


LSTMS = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "two layers": lambda: nn.LSTM(3, 4, num_layers=2, bias=False, batch_first=True),
    "both directions": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5),
    "projected": lambda: nn.LSTM(3, 4, bidirectional=True, proj_size=2),
    "subclass": lambda: Subclass(3, 4, 2),
    "cell": lambda: nn.LSTMCell(3, 4),
}


class Net(nn.Module):
    def __init__(self, kind="LSTM"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head, self.lstm = nn.Linear(3, 3), LSTMS[kind]()

    def forward(self, x):
        return self.lstm(self.head(x))


def inputs(kind="LSTM"):
    return torch.randn(*((5, 3) if kind == "cell" else (6, 5, 3)), generator=torch.Generator().manual_seed(1))


def outputs(net, x):
    torch.manual_seed(2)
    return torch.utils._pytree.tree_leaves(net(x))


def train(net, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(out.square().mean() for out in outputs(net, x)).backward()
        optimizer.step()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LSTMS)
def test_at_rate_0_outputs_are_the_lstms(kind, training):
    net, x = Net(kind).train(training), inputs(kind)
    if net.lstm.__dict__.get("dropout"):
        net.lstm.dropout = 0.0  # its masks are of other draws
    expected = outputs(net, x)
    assert zone_out(net, "lstm", cell=0.0, hidden=0.0) == 1
    assert isinstance(net.lstm, ZoneoutLSTMCell if kind == "cell" else ZoneoutLSTM)
    for ours, theirs in zip(outputs(net, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", LSTMS)
def test_it_is_the_layer_with_zoneout_and_trains_with_the_same_optimizer(kind):
    net, built, x = Net(kind), Net(kind), inputs(kind)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    parameters, keys = [*net.parameters()], [*net.state_dict()]
    zone_out(net, "lstm", cell=0.5, hidden=0.25)
    assert [*map(id, net.parameters())] == [*map(id, parameters)]
    assert [*net.state_dict()] == keys
    options = {"zoneout_cell": 0.5, "zoneout_hidden": 0.25}
    lstm = built.lstm
    if kind == "cell":
        built.lstm = ZoneoutLSTMCell(3, 4, **options)
    else:
        names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        built.lstm = ZoneoutLSTM(3, 4, **{name: getattr(lstm, name) for name in names}, **options)
    built.lstm.load_state_dict(lstm.state_dict())
    train(net, optimizer, x)
    train(built, torch.optim.Adam(built.parameters(), lr=0.1), x)
    for converted, constructed in zip(net.parameters(), built.parameters(), strict=True):
        assert torch.equal(converted, constructed)
    assert all(map(torch.equal, outputs(net.eval(), x), outputs(built.eval(), x)))
    assert not all(map(torch.equal, outputs(net, x), outputs(Net(kind).eval(), x)))


@pytest.mark.parametrize("kind", LSTMS)
def test_the_way_back_is_the_lstm_of_its_weights_bitwise(kind):
    net, plain, x = Net(kind), Net(kind), inputs(kind)
    zone_out(net, "lstm", cell=0.5, hidden=0.25)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), x)
    assert remove_zoneout(net) == 1
    assert remove_zoneout(net) == 0
    assert type(net.lstm) is type(plain.lstm)
    assert vars(net.lstm).keys() == vars(plain.lstm).keys()
    plain.load_state_dict(net.state_dict())
    for training in (True, False):
        assert all(map(torch.equal, outputs(net.train(training), x), outputs(plain.train(training), x)))
    if kind != "cell":
        packed = pack_sequence([x[:4, 0], x[:2, 1]])
        for ours, theirs in zip(net.lstm(packed)[1], plain.lstm(packed)[1], strict=True):
            assert torch.equal(ours, theirs)
    assert zone_out(net, "lstm", cell=0.5, hidden=0.25) == 1


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "state dict": lambda net: _loaded(net.state_dict()),
}


def _loaded(state):
    net = Net("subclass")
    net.load_state_dict(state)
    zone_out(net, "lstm", cell=0.5, hidden=0.25)
    return net


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_have_zoneout_and_a_way_back(duplicate):
    net, x = Net("subclass"), inputs()
    zone_out(net, "lstm", cell=0.5, hidden=0.25)
    copied = COPIES[duplicate](net)
    assert type(copied.lstm) is type(net.lstm)
    assert repr(copied) == repr(net)
    assert all(map(torch.equal, outputs(copied, x), outputs(net, x)))
    assert remove_zoneout(copied) == 1
    assert type(copied.lstm) is Subclass
    assert isinstance(net.lstm, ZoneoutLSTM)


CHANGES = {
    "tied": lambda net: tie(net, ["first.weight_hh_l0 ~ second.weight_hh_l0"]),
    "tied by a relation": lambda net: tie(net, ["first.weight_hh_l0 ~ back.weight | o i -> i o"]),
    "low rank": lambda net: lower_rank(net, ["*.weight_hh_l0"], rank=2),
    "hashed": lambda net: hash_weights(net, ["*.weight_*"], 0.5, UniformHash(0)),
    "orthogonal": lambda net: orthogonal(net["first"], "weight_hh_l0"),
}


def pair():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.LSTM(4, 4), "second": nn.LSTM(4, 4), "back": nn.Linear(16, 4)}).double()


def run(net, x):
    torch.manual_seed(1)
    return net["second"](net["first"](x)[0])[0]


@pytest.mark.parametrize("change", CHANGES)
def test_computed_and_tied_weights_stay_whether_made_before_or_after(change):
    """And the ties and parametrizations are undone as from an nn.LSTM."""
    x = torch.randn(3, 2, 4, dtype=torch.double)
    before, after, plain = pair(), pair(), pair()
    for net in (before, plain):
        torch.manual_seed(3)
        CHANGES[change](net)
    for net in (before, after):
        assert zone_out(net, ["first", "second"], cell=0.5, hidden=0.25) == 2
    torch.manual_seed(3)
    CHANGES[change](after)
    assert [*before.state_dict()] == [*after.state_dict()] == [*plain.state_dict()]
    assert torch.equal(run(before, x), run(after, x))
    assert not torch.allclose(run(before, x), run(plain, x))
    assert audit(before).problems == audit(plain).problems
    assert all(torch.equal(value, bake(plain)[key]) for key, value in bake(before).items())
    for net in (before, after):
        copies = [net, copy.deepcopy(net)]
        if change != "orthogonal":  # torch does not pickle its own parametrizations
            copies.append(pickle.loads(pickle.dumps(net)))
        for copied in copies:
            assert remove_zoneout(copied) == 2
            assert torch.equal(run(copied, x), run(plain, x))
    if "tied" in change:
        assert untie(before) == untie(plain) == 1
        assert type(before["first"]) is nn.LSTM


def test_patterns_choose_layers():
    net = nn.ModuleDict({"a": nn.LSTM(2, 2), "b": nn.LSTMCell(2, 2), "c": nn.LSTM(2, 2), "head": nn.Linear(2, 2)})
    net["alias"] = net["a"]
    assert zone_out(net, ["?", "!c"], cell=0.5, hidden=0.25) == 2
    assert [type(module) for module in net.values()][:3] == [ZoneoutLSTM, ZoneoutLSTMCell, nn.LSTM]
    assert zone_out(net, "c", cell=0.0, hidden=1.0) == 1
    assert (net["a"].zoneout_hidden, net["c"].zoneout_hidden) == (0.25, 1.0)
    assert remove_zoneout(net) == 3
    assert zone_out(net, "alias", cell=0.5, hidden=0.25) == 1


def test_layers_that_were_built_with_zoneout_stay():
    net = nn.Sequential(ZoneoutLSTM(2, 2, zoneout_cell=0.5))
    assert remove_zoneout(net) == 0
    assert type(net[0]) is ZoneoutLSTM


def many():
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 4),
            "shouting": Shouting(4, 4),
            "hyper": HyperLSTMCell(4, 4, 2, 2),
            "patched": nn.LSTM(4, 4),
            "zoned": ZoneoutLSTM(4, 4),
            "looped": nn.LSTM(4, 4),
            "gru": nn.GRU(4, 4),
        }
    )
    net["patched"].forward = net["patched"].forward
    loop(net, "looped", passes=2)
    return net


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lstmm", 0.1, 0.1), r"^modules: pattern 'lstmm' matches no module\. Nearest existing names: lstm"),
        (([], 0.1, 0.1), r"^modules must be a pattern of module names, or several, not \[\]"),
        ((["lstm", "!*"], 0.1, 0.1), "^modules: 'lstm', '!\\*' exclude all that they match"),
        ((["lstm", "gru"], 0.1, 0.1), r"^modules: the GRU 'gru' is not an nn\.LSTM or nn\.LSTMCell: name only these"),
        ((["lstm", "zoned"], 0.1, 0.1), "^modules: the ZoneoutLSTM 'zoned' has zoneout already: set its zoneout_cell"),
        ((["lstm", "shouting"], 0.1, 0.1), r"the Shouting 'shouting' has another forward than nn\.LSTM, .* exclude it"),
        ((["lstm", "hyper"], 0.1, 0.1), r"the HyperLSTMCell 'hyper' has another forward than nn\.LSTMCell, .* exclude it"),
        ((["lstm", "patched"], 0.1, 0.1), "the LSTM 'patched' has another forward than nn.LSTM, which zoneout would replace"),
        ((["lstm", "looped"], 0.1, 0.1), "the LoopedLSTM 'looped' is in a loop or has a merge: call zone_out before"),
        (("lstm", 1.1, 0.1), r"^cell must be in \[0, 1\], not 1\.1"),
        (("lstm", 0.1, -0.1), r"^hidden must be in \[0, 1\], not -0\.1"),
        (("lstm", 0.1, float("nan")), r"^hidden must be in \[0, 1\], not nan"),
    ],
)  # fmt: skip
def test_mistakes_change_nothing(arguments, message):
    net = many()
    before = [type(module) for module in net.modules()], [sorted(vars(module)) for module in net.modules()]
    with pytest.raises(ConfigurationError, match=message):
        zone_out(net, *arguments)
    assert before == ([type(module) for module in net.modules()], [sorted(vars(module)) for module in net.modules()])


@pytest.mark.parametrize("pattern", ["", "*", "**", "lstm"])
def test_a_model_that_is_an_lstm(pattern):
    model = nn.LSTM(3, 4)
    with pytest.raises(
        ConfigurationError, match=r"no module\. The model has no submodules: .* nn\.ModuleList\(\[model\]\)"
    ):
        zone_out(model, pattern, 0.1, 0.1)
    assert zone_out(nn.ModuleList([model]), "0", 0.1, 0.1) == 1
    assert isinstance(model, ZoneoutLSTM)


@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (lambda net: loop(net, "lstm", passes=2), unloop),
        (lambda net: apply_merge(net, "lstm", StochasticDepth(0.5)), remove_merge),
    ],
)
def test_merges_and_loops_come_after_and_are_undone_before(change, undo):
    net = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})
    zone_out(net, "lstm", cell=0.5, hidden=0.25)
    change(net)
    with pytest.raises(
        ConfigurationError, match=r"^the class of 'lstm' has changed to \w+ZoneoutLSTM after .*before what"
    ):
        remove_zoneout(net)
    assert isinstance(net["lstm"], ZoneoutLSTM)
    assert undo(net) == 1
    assert remove_zoneout(net) == 1
    assert type(net["lstm"]) is nn.LSTM
