"""Random merges and recurrent layers in graphs (torch.fx, export, tracing) and under transforms of torch."""

import copy
import math
import operator

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from tying import ConfigurationError
from tying.depth import (
    HMLSTM,
    FeedForward,
    HyperLSTM,
    HyperLSTMCell,
    Merge,
    PassthroughGRU,
    PassthroughHighway,
    Recurrent,
    Residual,
    SkipForward,
    StochasticDepth,
    Sum,
    Swapout,
    ZoneoutLSTM,
    ZoneoutLSTMCell,
    apply_merge,
    sampling,
    skip_forward,
    stochastic_depth,
    swapout,
    zoned_lstm,
)
from tying.depth.draws import keep_mask
from tying.depth.fractal import FractalBlock
from tying.depth.rnn.hm_lstm import detect_boundary
from tying.hashing import UniformHash, hash_weights
from tying.models import GRU, FractalNet, HMNetwork, ResNet

D = torch.float64
X = torch.randn(6, 5, dtype=D, generator=torch.Generator().manual_seed(1))
RANDOM = [
    *(StochasticDepth(0.3, mode, scale) for mode in ("batch", "row", "subset", "auto") for scale in ("test", "train")),
    StochasticDepth(0.95, "auto"),
    Swapout(0.3, 0.6),
    Swapout(1.0, 0.6),
    Swapout(0.3, 0.0),
    SkipForward(0.3),
]
FIXED = [
    Sum(),
    FeedForward(),
    StochasticDepth(0.0),
    StochasticDepth(1.0, "subset", "train"),
    Swapout(0.0, 1.0),
    SkipForward(0.0),
    SkipForward(1.0),
]
every_merge = pytest.mark.parametrize("merge", [*RANDOM, *FIXED], ids=repr)


def block(merge):
    torch.manual_seed(7)
    return Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh()).to(D), merge=copy.deepcopy(merge))


def dynamic(batch_dim=0):
    return ({batch_dim: Dim("batch", min=2)},)


def exported(net, x, batch_dim=0):
    return torch.export.export(net, (x,), dynamic_shapes=dynamic(batch_dim)).module()


def outcomes(merge):
    """The values that a unit may have, each as (probability, factor of the shortcut, factor of the branch)."""
    if isinstance(merge, StochasticDepth):
        factor = 1 / merge.keep if merge.scale == "train" and merge.keep else 1
        return [(1 - merge.keep, 1, 0), (merge.keep, 1, factor)]
    if isinstance(merge, SkipForward):
        return [(1 - merge.keep, 1, 0), (merge.keep, 0, 1)]
    if isinstance(merge, Swapout):
        p, q = merge.keep_skip, merge.keep_branch
        return [((1 - p) * (1 - q), 0, 0), (p * (1 - q), 1, 0), ((1 - p) * q, 0, 1), (p * q, 1, 1)]
    return [(1, int(type(merge) is Sum), 1)]


def drawn(merge, out, x, f):
    """The index of the outcome of each unit of ``out``, (..., batch, size)."""
    distances = torch.stack([(out - (a * x + b * f)).abs() for _, a, b in outcomes(merge)])
    smallest = distances.min(dim=0)
    assert float(smallest.values.max()) < 1e-12
    return smallest.indices


def check_statistics(merge, out, x, f):
    """Each outcome is as frequent as it should be, and drawn for the unit that the mode names; out: (passes, 6, 5)."""
    index = drawn(merge, out, x, f)
    if isinstance(merge, StochasticDepth):
        assert torch.equal(index, index[..., :1].expand_as(index))  # a row is one
        index = index[..., 0]
        if merge.mode == "batch":
            assert torch.equal(index, index[:, :1].expand_as(index))
            index = index[:, 0]
        elif 0 < merge.keep < 1:
            assert not torch.equal(index, index[:, :1].expand_as(index))
    for number, (p, _, _) in enumerate(outcomes(merge)):
        share = float((index == number).double().mean())
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / index.numel()) + 2**-16


def check_gradients(net, reference, x):
    """The gradient of one pass is that of the outcomes that it drew; none is missing."""
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    f = reference.branch(x)
    factors = torch.tensor([(a, b) for _, a, b in outcomes(reference.merge)], dtype=D)[
        drawn(reference.merge, out.detach(), x, f.detach())
    ]
    reference.zero_grad()
    (factors[..., 0] * x + factors[..., 1] * f).square().sum().backward()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def check_random(net, reference, x, passes=300):
    torch.manual_seed(0)
    with torch.no_grad():
        out = torch.stack([net(x) for _ in range(passes)])
        check_statistics(reference.merge, out, x, reference.branch(x))
    for _ in range(3):
        check_gradients(net, reference, x)


# torch.fx


@every_merge
def test_merges_stay_random_under_fx(merge):
    residual = block(merge)
    traced = symbolic_trace(residual)
    check_random(copy.deepcopy(traced), block(merge), X)
    assert torch.equal(traced.eval()(X), residual.eval()(X))
    assert torch.equal(symbolic_trace(residual)(X), residual(X))
    check_random(symbolic_trace(traced).train(), block(merge), X)  # traced once more, from evaluation


def test_sums_stay_additions_under_fx():
    targets = [str(node.target) for node in symbolic_trace(block(Sum())).graph.nodes]
    assert "merge" not in targets
    assert str(operator.add) in targets


def test_merges_of_users_are_random_under_fx():
    class Coin(Merge):
        def forward(self, x, branch):
            return branch() if float(torch.rand(())) < self.keep_prob("keep") else x

    residual = block(Coin(keep=0.5))
    traced, f = symbolic_trace(residual), residual.branch(X)
    assert 5 < sum(torch.equal(traced(X), f) for _ in range(40)) < 35


def test_a_schedule_reaches_the_graph():
    traced = symbolic_trace(block(StochasticDepth(0.0, "row")))
    assert torch.equal(traced(X), X)
    traced.merge.drop_scale = 0.0
    assert torch.equal(traced(X), block(Sum())(X))


def test_sampled_passes_of_a_graph():
    traced = symbolic_trace(block(Swapout(0.5, 0.5))).eval()
    assert torch.equal(traced(X), traced(X))
    with sampling(traced):
        assert not torch.equal(traced(X), traced(X))


class Functions(nn.Module):
    """The functions of the package, called by a user's module."""

    def __init__(self, name):
        super().__init__()
        self.name, self.branch = name, nn.Linear(5, 5).to(D)

    def forward(self, x):
        f = self.branch(x)
        if self.name in ("batch", "row"):
            return stochastic_depth(x, lambda: f, 0.5, self.name)
        mask = keep_mask(0.5, x.shape, x.device)
        return swapout(x, f, mask, None) if self.name == "swapout" else skip_forward(x, f, mask)


@pytest.mark.parametrize("name", ["batch", "row", "swapout", "skip_forward"])
@pytest.mark.parametrize("graph", [symbolic_trace, lambda net: exported(net, X)], ids=["fx", "export"])
def test_functions_stay_random_in_graphs(name, graph):
    merges = {
        "batch": StochasticDepth(0.5),
        "row": StochasticDepth(0.5, "row"),
        "swapout": Swapout(0.5, 1.0),
        "skip_forward": SkipForward(0.5),
    }
    net = Functions(name)
    check_random(graph(net), Residual(copy.deepcopy(net.branch), merge=merges[name]), X)


def merged_resnet18(merge):
    model = resnet18(num_classes=3)
    apply_merge(model, "layer*.*", merge)
    return model


MODELS = {
    "ResNet": (lambda merge: ResNet(8, width=0.25, merge=merge), ["layer1.0", "layer3"]),
    "shared": (lambda merge: ResNet(14, width=0.25, merge=merge, shared=True), ["layer1.0.blocks.1", "layer3"]),
    "resnet18": (merged_resnet18, ["layer1.0", "layer4"]),
    "FractalNet": (lambda _: FractalNet(3, (4, 8), drop_path=0.3), ["blocks.0.columns.2.1.conv", "blocks.1"]),
}


@pytest.mark.parametrize("merge", [StochasticDepth(0.5), StochasticDepth(0.5, "subset"), Swapout(0.5, 0.5)], ids=repr)
@pytest.mark.parametrize("kind", MODELS)
def test_feature_extractors_stay_random(kind, merge):
    torch.manual_seed(0)
    make, nodes = MODELS[kind]
    model, x = make(merge).to(D), torch.randn(4, 3, 16, 16, dtype=D)
    extractor, features = create_feature_extractor(model, nodes, suppress_diff_warning=True), {}
    for name in nodes:
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: features.update({name: call[2]}))
    model.eval()(x)
    for name, feature in extractor.eval()(x).items():
        assert torch.equal(feature, features[name])
    extractor.train()
    passes = {tuple(extractor(x)[nodes[1]].flatten().tolist()) for _ in range(12)}
    assert len(passes) > 2
    extractor(x)[nodes[1]].sum().backward()
    weights = {name: weight for name, weight in extractor.named_parameters() if "head" not in name}
    assert all(weight.grad is not None for weight in weights.values())


@pytest.mark.parametrize("graph", ["fx", "export", "vmap"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_paths_of_fractals_in_graphs(graph, share):
    """With weights of 1 each input of the last join is known, so that the mean tells which ones were kept."""

    class Scale(nn.Module):
        """Column c doubles its input in total 2ᶜ times."""

        def __init__(self, inputs, outputs):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0, dtype=D))

        def forward(self, x):
            return self.factor * x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = FractalNet(2, (5,), drop_path=0.4, global_share=share).to(D)
            self.net.blocks = nn.ModuleList([FractalBlock(2, Scale, 5, 5, drop_path=0.4)])
            self.net.pool, self.net.head = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.net(x)

    net, x = Net(), torch.ones(3, 5, 1, 1, dtype=D)
    torch.manual_seed(0)
    if graph == "vmap":
        out = torch.func.vmap(lambda x: net(x), randomness="different")(x.expand(400, 3, 5, 1, 1))
    else:
        run = symbolic_trace(net) if graph == "fx" else exported(net, x)
        run(x).sum().backward()
        assert all(weight.grad is not None for weight in net.net.blocks.parameters())
        out = torch.stack([run(x) for _ in range(400)])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    both = 0.6 * 0.6  # neither: one of both
    expected = {2.0: 0.5, 4.0: 0.5} if share else {3.0: both, 2.0: (1 - both) / 2, 4.0: (1 - both) / 2}
    values = out[:, 0, 0]
    assert {*values.tolist()} == {*expected}
    for value, p in expected.items():
        assert abs(float((values == value).double().mean()) - p) <= 5 * math.sqrt(p * (1 - p) / 400)


class Layers(nn.Module):
    """Encoder layers of torch, one after another: an nn.TransformerEncoder is one node as a whole."""

    def __init__(self, merge, batch_first):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, dtype=D)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        apply_merge(self, "layers.*", merge)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("merge", [StochasticDepth(0.5), StochasticDepth(0.5, "subset"), Swapout(0.5, 0.5)], ids=repr)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("graph", ["fx", "export"])
def test_transformer_layers_stay_random(graph, batch_first, merge):
    net, dim = Layers(merge, batch_first), 0 if batch_first else 1
    x, larger = torch.randn(4, 6, 8, dtype=D), torch.randn(*((9, 6) if batch_first else (4, 9)), 8, dtype=D)
    run = symbolic_trace(net) if graph == "fx" else exported(net, x, dim)
    torch.manual_seed(0)
    assert len({tuple(run(larger).flatten().tolist()) for _ in range(12)}) > 4
    run(x).sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())
    net.eval()
    run = symbolic_trace(net) if graph == "fx" else exported(net, x, dim)
    assert torch.equal(run(larger), net(larger))


# torch.export


@every_merge
def test_exported_merges_train_on_any_batch(merge):
    residual = block(merge)
    check_random(exported(residual, X), block(merge), torch.cat([X, X + 1, X[:1]]))
    residual.eval()
    assert torch.equal(exported(residual, X)(X[:3]), residual(X[:3]))


@every_merge
def test_recorded_merges_draw_anew(merge):
    """By make_fx, by dynamo's export, and on fake tensors, whose values nobody knows."""
    graphs = [torch.export.export(block(merge), (X,), strict=True).module()] if merge in RANDOM[::3] else []
    for run in (*graphs, make_fx(block(merge))(X)):
        with torch.no_grad():
            torch.manual_seed(0)
            check_statistics(merge, torch.stack([run(X) for _ in range(200)]), X, block(merge).branch(X))
    residual = block(merge)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert residual(torch.empty(6, 5, dtype=D)).shape == (6, 5)


# torch.func


@every_merge
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gradients_of_each_sample(merge, randomness):
    residual, samples = block(merge), 400
    parameters = dict(residual.named_parameters())

    def loss(parameters, x):
        out = torch.func.functional_call(residual, parameters, (x,))
        return out.square().sum(), out

    torch.manual_seed(0)
    per_sample = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, 0), randomness=randomness)
    gradients, out = per_sample(parameters, X.expand(samples, 6, 5))
    with torch.no_grad():
        index = drawn(merge, out, X, residual.branch(X))
        if randomness == "different":
            check_statistics(merge, out, X, residual.branch(X))
        else:
            assert torch.equal(index, index[:1].expand_as(index))
    for sample in range(4):
        factors = torch.tensor([(a, b) for _, a, b in outcomes(merge)], dtype=D)[index[sample]]
        residual.zero_grad()
        (factors[..., 0] * X + factors[..., 1] * residual.branch(X)).square().sum().backward()
        for name, weight in residual.named_parameters():
            torch.testing.assert_close(gradients[name][sample], weight.grad, rtol=1e-12, atol=1e-12)


# shapes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("run", ["eager", "evaluated", "fx", "exported", "compiled", "vmap"])
@every_merge
def test_a_branch_of_another_shape_is_refused(merge, run):
    if not any(b for p, _, b in outcomes(merge) if p):
        return  # the branch is never computed
    net = Residual(nn.Linear(5, 1).to(D), merge=copy.deepcopy(merge)).train(run != "evaluated")
    torch._dynamo.reset()

    def passes():
        call = {
            "exported": lambda: exported(net, X),
            "compiled": lambda: torch.compile(net, backend="eager")(X),
            "vmap": lambda: torch.func.vmap(net, randomness="different")(X.unsqueeze(1)),
            "fx": lambda: symbolic_trace(net)(X),
        }.get(run, lambda: net(X))
        for _ in range(60):  # random merges may skip the branch
            call()

    if run == "fx" and type(merge) in (Sum, FeedForward):
        passes()  # torch.fx records the addition, which broadcasts
        return
    told = r"a merge needs a branch and a shortcut of the same shape, not \((\w+), 1\) and \(\1, 5\): let the branch"
    with pytest.raises(ConfigurationError, match=told):
        passes()


# recurrent networks


def hashed(layer):
    hash_weights(layer, ["weight_*"], 0.5, UniformHash(0))
    return layer


NETS = {
    "ZoneoutLSTM": lambda: ZoneoutLSTM(3, 4, 2, zoneout_cell=0.3, zoneout_hidden=0.2),
    "ZoneoutLSTM, plain": lambda: ZoneoutLSTM(3, 4, bias=False),
    "ZoneoutLSTM, two ways": lambda: ZoneoutLSTM(3, 4, bidirectional=True, zoneout_cell=0.3, zoneout_hidden=0.2),
    "PassthroughGRU": lambda: PassthroughGRU(3, 4, 2, num_layers=2),
    "HMLSTM": lambda: HMLSTM(3, 4),
    "HMLSTM, sampled": lambda: HMLSTM(3, 4, boundary="sample"),
    "HMNetwork": lambda: HMNetwork(3, 4, 2),
    "HyperLSTM": lambda: HyperLSTM(3, 4, hyper_size=2, embedding_size=2, num_layers=2),
    "GRU": lambda: GRU(3, 4),
    "hashed LSTM": lambda: hashed(nn.LSTM(3, 4)),
    "hashed GRU": lambda: hashed(nn.GRU(3, 4)),
    "ZoneoutLSTMCell": lambda: ZoneoutLSTMCell(3, 4, zoneout_cell=0.3, zoneout_hidden=0.2),
    "HyperLSTMCell": lambda: HyperLSTMCell(3, 4, 2, 2),
    "PassthroughHighway": lambda: PassthroughHighway(3, 2),
    "Recurrent": lambda: Recurrent(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 3),
}
ROWS = ("ZoneoutLSTMCell", "HyperLSTMCell", "PassthroughHighway", "Recurrent")  # of one step: their batch comes first
ZONED = [name for name in NETS if "Zoneout" in name and "plain" not in name]


def network(name, training=True):
    torch.manual_seed(0)
    return NETS[name]().to(D).train(training)


def inputs(name, batch=6):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(*((batch, 3) if name in ROWS else (3, batch, 3)), dtype=D, generator=generator)


def outputs_and_gradients(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    net.zero_grad()
    outputs = torch.utils._pytree.tree_leaves(net(x))
    sum(number * out.square().sum() for number, out in enumerate(outputs, 1)).backward()
    gradients = {f"gradient of {name}": weight.grad for name, weight in net.named_parameters()}
    return {**{f"output {number}": out.detach() for number, out in enumerate(outputs)}, "x": x.grad, **gradients}


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # of torch's own GRU and LSTM, too
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_exported_networks_equal_eager_ones(name, training):
    """With gradients on, for another batch than the exported one; zoneout in training has draws of its own."""
    run, x = exported(network(name, training), inputs(name), 0 if name in ROWS else 1), inputs(name, 9)
    ours, theirs = outputs_and_gradients(run, x), outputs_and_gradients(network(name, training), x)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if training and name in ZONED:
            assert ours[key].shape == value.shape
        else:
            torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-13)
    torch.manual_seed(0)
    passes = {tuple(torch.utils._pytree.tree_leaves(run(x))[0].flatten().tolist()) for _ in range(4)}
    assert len(passes) == (4 if training and (name in ZONED or "sampled" in name) else 1)


@pytest.mark.parametrize("name", [name for name in NETS if "hashed" not in name])
def test_networks_are_nodes_of_fx(name):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(name)

        def forward(self, x):
            return self.net(x)

    net, x = Around(), inputs(name)
    ours, theirs = outputs_and_gradients(symbolic_trace(copy.deepcopy(net)), x), outputs_and_gradients(net, x)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    run = symbolic_trace(net).eval()
    evaluated = [torch.utils._pytree.tree_leaves(module(x)) for module in (run, net.eval())]
    assert all(map(torch.equal, *evaluated))


@pytest.mark.parametrize("graph", ["fx", "export", "vmap"])
def test_zoneout_in_graphs_keeps_units_as_often_as_it_says(graph):
    torch.manual_seed(0)
    net = ZoneoutLSTM(3, 400, zoneout_cell=0.3, zoneout_hidden=0.2).to(D)
    h, c = torch.randn(1, 6, 400, dtype=D), torch.randn(1, 6, 400, dtype=D)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, h, c):
            return self.net(x, (h, c))[1]

    step, x = Step(), torch.randn(1, 6, 3, dtype=D)
    if graph == "vmap":
        run = torch.func.vmap(
            lambda *sample: step(*(x.unsqueeze(1) for x in sample)), in_dims=1, out_dims=1, randomness="different"
        )
    else:
        run = symbolic_trace(step) if graph == "fx" else torch.export.export(step, (x, h, c)).module()
    new_h, new_c = (new.reshape(h.shape) for new in run(x, h, c))
    for new, old, rate in ((new_h, h, 0.2), (new_c, c, 0.3)):
        kept = (new == old).double()
        assert abs(float(kept.mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / kept.numel())
        assert (kept[:, 0] != kept[:, 1]).any()


@pytest.mark.parametrize("keeps", ["masks", "means"])
def test_the_loop_of_graphs_is_the_fused_one(keeps):
    """The same draws, so that gradients of zoneout in training are compared, too."""
    torch.manual_seed(0)
    arguments = [torch.randn(*shape, dtype=D) for shape in ((5, 2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,))]
    given = [keep_mask(0.6, (5, 2, 4)) for _ in range(2)] if keeps == "masks" else [0.7, 0.4]

    def loss(*arguments):
        out, h, c = zoned_lstm(*arguments, *given)
        return out.square().sum() + h.sum() + (2 * c).sum()

    fused = [x.clone().requires_grad_() for x in arguments]
    loss(*fused).backward()
    for ours, theirs in zip(torch.func.grad(loss, argnums=tuple(range(6)))(*arguments), fused, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-12, atol=1e-12)


# straight-through steps


def straight_through(x, slope, w):
    """By hand: the forward value of the step, and the gradient of the hard sigmoid, entry by entry."""
    values, gradients = [], []
    for entry, weight in zip(x.tolist(), w.tolist(), strict=True):
        values.append(1.0 if entry > 0 else 0.0)
        gradients.append(weight * slope / 2 if abs(slope * entry) < 1 else 0.0)
    return torch.tensor(values, dtype=x.dtype), torch.tensor(gradients, dtype=x.dtype)


class Boundary(nn.Module):
    def forward(self, x):
        return detect_boundary(x, 0.7, sample=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("graph", ["eager", "fx", "export", "make_fx", "vmap"])
def test_boundaries_are_bitwise_hard_and_keep_their_gradient(graph, dtype):
    edges = [0.0, -0.0, 1e-30, -1e-30, 1 / 0.7, -1 / 0.7, 1e30, -1e30, math.inf, -math.inf]
    x = torch.cat([torch.randn(300, generator=torch.Generator().manual_seed(0)), torch.tensor(edges)]).to(dtype)
    w = torch.arange(1, len(x) + 1).to(dtype)
    run = {
        "eager": Boundary,
        "fx": lambda: symbolic_trace(Boundary()),
        "export": lambda: exported(Boundary(), x[:7]),
        "make_fx": lambda: make_fx(Boundary(), pre_dispatch=True)(x),  # later, torch's own graph has no detach
        "vmap": lambda: torch.func.vmap(Boundary()),
    }[graph]()
    x.requires_grad_()
    out = run(x)
    (w * out).sum().backward()
    values, gradients = straight_through(x.detach(), 0.7, w)
    assert torch.equal(out.detach(), values)
    near = (x.detach().abs() * 0.7 - 1).abs() < 0.01  # where rounding decides on which side of the kink it is
    torch.testing.assert_close(x.grad[~near], gradients[~near], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("merge", [FeedForward(), StochasticDepth(0.0), Swapout(1.0, 0.0), SkipForward(1.0)])
def test_what_is_unused_can_be_traced_with_gradients(merge):
    net = Residual(nn.Linear(5, 5).to(D), merge=merge).eval()
    torch.testing.assert_close(torch.jit.trace(net, X)(X), net(X))
