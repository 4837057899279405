"""Whatever is asked for is done right or refused with a clear error; `make fuzz` asks often, and counts."""

import copy
import fnmatch
import io
import itertools
import os

import pytest
import torch
import yaml
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import nn

from tying import ConfigurationError, Tie, resolve
from tying.cli import main
from tying.hard import bake, tie, untie
from tying.hashing import (
    BlockHash,
    CodebookHash,
    DirichletHash,
    HashedLinear,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    RecurrentHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
)
from tying.selection.patterns import Pattern
from tying.selection.relation import bind

SHARE = float(os.environ.get("FUZZ", "0.002"))  # of the cases of `make fuzz`
CASES = {}


def cases(count):
    """Let hypothesis try a share of so many cases."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max(20, round(count * SHARE)),
        deadline=None,
        database=None,
        derandomize=SHARE < 1,  # the same cases in every short run
        suppress_health_check=quiet,
    )


@pytest.fixture(autouse=True)
def _counted(request, record_property):
    name = request.node.name.removeprefix("test_")
    CASES[name] = 0
    yield
    record_property("cell", ("fuzz", "cases", name.replace("_", " ")))
    record_property("remark", f"{CASES[name]:,}")


def clear(error):
    """Fail unless an error says something."""
    assert len(str(error).split()) > 3


def count(name):
    CASES[name] = CASES.get(name, 0) + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))
        self.layers = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(3), "a": nn.Linear(3, 3)}) for _ in range(3)])


NET = Net()
NAMES = [name for name, _ in NET.named_parameters()]
TOKENS = st.sampled_from(
    ["encoder", "decoder", "layers", "0", "1", "2", "weight", "bias", "norm", "a", "*", "**", "?", "[02]", "[!0]", "{i}", "{-i}", "{j}", "{-j}", "w*", "*s", "{0..1}", "{i:0..2}", "{-i:1..2}", "[0-11]", "[", "{", "}", "", "é"]
)  # fmt: skip
PATTERNS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join) | st.sampled_from(NAMES) | st.text(max_size=8)
PLAIN = st.lists(st.sampled_from(["encoder", "layers", "0", "2", "weight", "norm", "*", "**", "?", "[02]", "w*", "*s"]), min_size=1, max_size=5)  # fmt: skip


def matches(parts, names):
    """Tell whether parts of a pattern without captures match parts of a name."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(matches(parts[1:], names[k:]) for k in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches(parts[1:], names[1:])


@cases(30_000)
@given(PLAIN, st.sampled_from(NAMES))
def test_patterns_match_as_a_slow_reference(parts, name):
    count("patterns_match_as_a_slow_reference")
    assert (Pattern(".".join(parts)).match(name) is not None) == matches(parts, name.split("."))


@cases(30_000)
@given(PATTERNS, st.none() | PATTERNS, st.none() | st.sampled_from(["o i -> i o", "a -> a", "o i -> o", "x"]), st.lists(PATTERNS, max_size=1))  # fmt: skip
def test_ties_are_groups_or_refused(source, target, relation, exclude):
    count("ties_are_groups_or_refused")
    try:
        groups = resolve(NET, [Tie(source, target, relation, tuple(exclude))])
    except ConfigurationError as error:
        clear(error)
        return
    seen = [id(parameter) for group in groups for parameter in group.parameters]
    assert len(seen) == len({*seen})  # a weight is in one group
    named = dict(NET.named_parameters())
    for group in groups:
        assert len(group.names) > 1
        assert all(named[name] is p for name, p in zip(group.names, group.parameters, strict=True))
        assert len({tensor.shape for tensor in group.tensors()}) == 1
        assert not any(Pattern(one).match(name) is not None for one in exclude for name in group.names)


AXES = st.lists(st.sampled_from(["a", "b", "c", "(a b)", "(b c)", "1", "...", "()", "2", "(", "a"]), max_size=4).map(" ".join)  # fmt: skip
SHAPES = st.lists(st.integers(1, 4), max_size=4)


@cases(20_000)
@given(AXES, AXES, SHAPES, st.randoms(use_true_random=False))
def test_relations_move_entries_as_einops_does_or_are_refused(left, right, shape, random):
    count("relations_move_entries_as_einops_does_or_are_refused")
    pattern, tensor = f"{left} -> {right}", torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    try:
        expected = rearrange(tensor, pattern)
    except Exception:  # einops raises of many kinds
        expected = tensor.reshape(random.sample(shape, len(shape)))
    try:
        relation = bind(pattern, tensor.shape, expected.shape)
    except ConfigurationError as error:
        clear(error)
        return
    moved = relation(tensor)
    assert moved.shape == expected.shape
    assert sorted(moved.flatten().tolist()) == sorted(tensor.flatten().tolist())
    assert torch.equal(relation.inverse()(moved), tensor)
    axes = {name: size for step in relation.steps for name, size in step.axes}
    if "..." not in pattern:
        assert torch.equal(moved, rearrange(tensor, pattern, **axes))


NUMBERS = st.integers(-2, 70)
HASHES = st.one_of(
    st.just(IdentityHash),
    st.just(ModulusHash),
    *(st.builds(lambda kind, seed: lambda: kind(seed), st.just(kind), st.integers(-1, 2**70)) for kind in (UniformHash, XXHash)),
    st.builds(lambda alpha, seed: lambda: DirichletHash(alpha, seed), st.floats(-1, 1e6) | st.just(float("nan")), NUMBERS),
    st.builds(lambda radius, seed: lambda: NeighborhoodHash(radius, seed), NUMBERS, NUMBERS),
    st.builds(lambda block, seed: lambda: BlockHash(block, seed), NUMBERS, NUMBERS),
    st.builds(lambda layers: lambda: RecurrentHash(layers), st.integers(-1, 5)),
    st.builds(lambda *sizes: lambda: ToeplitzHash(*sizes), *[st.integers(-1, 3)] * 7),
    st.builds(lambda held: lambda: CodebookHash(torch.tensor(held, dtype=torch.int64)), st.lists(st.integers(-2, 9), max_size=12)),
)  # fmt: skip


@cases(20_000)
@given(HASHES, st.integers(1, 200), st.integers(0, 60), st.integers(0, 199))
def test_hashes_stay_within_their_table_or_are_refused(make, number, size, first):
    count("hashes_stay_within_their_table_or_are_refused")
    try:
        own = make()
        index = own.index(number, size)
    except ConfigurationError as error:
        clear(error)
        return
    assert index.shape == (number,)
    assert index.dtype == torch.int64
    assert -1 <= int(index.min()) <= int(index.max()) < size
    ids, drawn = torch.arange(min(first, number - 1), number), own.state(size)
    assert torch.equal(own.slot(ids, size, *([] if drawn is None else [drawn])), index[ids])  # in chunks, too
    assert torch.equal(own.index(number, size), index)
    assert set(own.sign(ids).tolist()) <= {-1, 1}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@cases(2_000)
@given(
    HASHES, st.integers(0, 12), st.integers(0, 12), st.none() | st.floats(-0.1, 1.1), st.booleans(), st.floats(-0.1, 1.1),
    st.sampled_from(["auto", "stored", "computed", "structured"]),
)  # fmt: skip
def test_hashed_layers_are_those_of_their_dense_weights_or_are_refused(
    make, inputs, outputs, ratio, sign, density, index
):
    count("hashed_layers_are_those_of_their_dense_weights_or_are_refused")
    try:
        layer = HashedLinear(inputs, outputs, table_ratio=ratio, hash=make(), sign=sign, density=density, index=index)
    except ConfigurationError as error:
        clear(error)
        return
    x = torch.randn(3, inputs)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.weight.shape == (outputs, inputs)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=6) | st.sampled_from(["**", "network.**", "l2", "gradient", "~"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
CALLBACKS = {
    "SoftTying": ["ties", "strength", "penalty", "update", "schedule", "harden_below", "name", "tie"],
    "HardTying": ["ties", "init", "name"],
    "RelaxedTying": ["ties", "residual", "anneal", "calibration", "name", "init"],
    "AnchorTying": ["parameters", "strength", "head_strength", "anchor", "importance", "head"],
    "WeightHashing": ["parameters", "table_ratio", "hash", "scope", "init", "density", "index"],
    "WeightClustering": ["parameters", "clusters", "start_epoch", "init", "gradient"],
    "ResidualMerging": ["blocks", "merge", "keep_schedule", "schedule"],
    "Looping": ["blocks", "passes", "start", "per_pass", "grow"],
    "LowRankWeights": ["parameters", "rank", "diagonal"],
    "ZoneoutStates": ["modules", "cell", "hidden"],
    "Coupling": ["first", "second", "alpha", "exponent", "examples", "update", "name"],
    "TemplateWeights": ["parameters", "templates"],
    "GeneratedWeights": ["parameters", "embedding", "in_channels", "out_channels"],
    "UntiedBiases": ["parameters", "input_size"],
    "MixtureTying": ["parameters", "strength", "components", "zero_weight", "rates"],
}
ENTRIES = st.sampled_from([*CALLBACKS]).flatmap(
    lambda kind: st.fixed_dictionaries(
        {
            "class_path": st.just(f"tying.callbacks.{kind}") | st.just(kind) | st.just(kind[:-1]),
            "init_args": st.dictionaries(st.sampled_from(CALLBACKS[kind]), VALUES, max_size=4),
        }
    )
)


@cases(1_000)
@given(ENTRIES, st.booleans())
def test_configurations_are_inspected_or_refused(tmp_path, capsys, entry, broken):
    count("configurations_are_inspected_or_refused")
    text = yaml.safe_dump({"trainer": {"callbacks": [entry], "logger": False}})
    (tmp_path / "own.yaml").write_text(text[:-3] if broken else text)
    model = [
        "--seed_everything=0",
        "--model=Classifier",
        "--model.network=tying.models.ResNet",
        "--model.network.depth=8",
    ]
    try:
        main(["inspect", "--config", str(tmp_path / "own.yaml"), *model])
    except SystemExit as ended:
        code = ended.code
    else:
        return
    told = capsys.readouterr().err
    assert code in (1, 2)
    assert "Traceback" not in told
    clear(told)


class Sharing(RuleBasedStateMachine):
    """Tie, untie, move, save, load, copy and train in random order, against a model of what must be equal."""

    TIES = ("encoder.0.weight ~ decoder.2.weight | o i -> i o", "layers.0.a.weight ~ layers.1.a.weight", "layers.{i}.norm ~ layers.2.norm", "encoder.0.bias ~ decoder.0.bias")  # fmt: skip

    @initialize()
    def start(self):
        torch.manual_seed(0)
        self.net, self.groups, self.saved = Net(), [], None

    @rule(which=st.sampled_from(TIES))
    def tie(self, which):
        try:
            found = tie(self.net, [which])
        except ConfigurationError:
            return
        self.groups = [group for group in self.groups if not any({*group} & {*new.names} for new in found)]
        self.groups += [group.names for group in found]

    @rule()
    def untie(self):
        untie(self.net)
        self.groups = []

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    def move(self, dtype):
        self.net.to(dtype)

    @rule()
    def copied(self):
        self.net = copy.deepcopy(self.net)

    @rule()
    def save(self):
        buffer = io.BytesIO()
        torch.save(self.net.state_dict(), buffer)
        self.saved = buffer.getvalue()

    @rule(assign=st.booleans())
    def load(self, assign):
        if self.saved is not None:
            state = torch.load(io.BytesIO(self.saved), weights_only=True)
            try:
                self.net.load_state_dict(state, assign=assign)
            except (ConfigurationError, RuntimeError) as error:  # copies that differ, where they are one here
                refused = str(error)
            else:
                return
            assert "load_plain" in refused
            assert any(not torch.equal(*pair) for pair in self.pairs(state))

    @rule()
    def train(self):
        dtype = next(self.net.parameters()).dtype
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        sum(value.square().sum() for value in self.values().values()).to(dtype).backward()
        optimizer.step()

    def values(self):
        owners = {name: self.net.get_submodule(name.rpartition(".")[0]) for name in NAMES}
        return {name: getattr(owner, name.rpartition(".")[2]) for name, owner in owners.items()}

    def pairs(self, values):
        for group in self.groups:
            for one, other in itertools.pairwise(group):
                a, b = values[one], values[other]
                yield a, b.T if a.shape != b.shape else b

    @invariant()
    def equal(self):
        if hasattr(self, "net"):
            count("sharing_in_random_order")
            assert all(torch.equal(*pair) for pair in self.pairs(self.values()))
            once = sum(p.numel() for p in self.net.parameters())
            assert once <= sum(value.numel() for value in self.values().values())
            plain = Net()
            plain.load_state_dict(bake(self.net))
            assert bool(self.groups) == (once < sum(p.numel() for p in plain.parameters()))


def test_sharing_in_random_order():
    run_state_machine_as_test(Sharing, settings=settings(cases(1_000), stateful_step_count=20))
