"""Recurrent layers exported, traced, compiled and scripted, and per-sample gradients through them.

`test_graphs.py` asks the default `torch.export` and `torch.fx`.
"""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap

from tying import ConfigurationError
from tying.depth import (
    HMLSTM,
    HyperLSTM,
    HyperLSTMCell,
    PassthroughGRU,
    PassthroughHighway,
    StochasticDepth,
    ZoneoutLSTM,
    ZoneoutLSTMCell,
    apply_merge,
    loop,
    zone_out,
)
from tying.models import GRU, HMNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights"),  # of torch's own LSTM, too
]
D = torch.float64
RATES = {"zoneout_cell": 0.3, "zoneout_hidden": 0.2}


def zoned():
    net = nn.ModuleList([nn.LSTM(3, 4)])
    zone_out(net, "0", cell=0.3, hidden=0.2)
    return net[0]


CELLS = {
    "ZoneoutLSTM": lambda: ZoneoutLSTM(3, 4, proj_size=2, **RATES),
    "ZoneoutLSTM, rates 0": lambda: ZoneoutLSTM(3, 4, bias=False),
    "nn.LSTM with zoneout": zoned,
    "ZoneoutLSTMCell": lambda: ZoneoutLSTMCell(3, 4, **RATES),
    "PassthroughGRU": lambda: PassthroughGRU(3, 4, 2),
    "PassthroughHighway": lambda: PassthroughHighway(3, 2),
    "HyperLSTM": lambda: HyperLSTM(3, 4, hyper_size=2, embedding_size=2),
    "HyperLSTMCell": lambda: HyperLSTMCell(3, 4, 2, 2),
    "HMLSTM": lambda: HMLSTM(3, 4, layers=2),
}
LARGE = {
    "ZoneoutLSTM, large": lambda: ZoneoutLSTM(3, 4, 2, bidirectional=True, dropout=0.0, **RATES),
    "PassthroughGRU, large": lambda: PassthroughGRU(3, 4, 2, num_layers=2, bidirectional=True, learned_state=True),
    "HyperLSTM, large": lambda: HyperLSTM(3, 4, hyper_size=2, embedding_size=2, num_layers=2),
    "HMLSTM, large": lambda: HMLSTM(3, 4),
    "HMLSTM, top": lambda: HMLSTM(3, 4, layers=2, outputs="top"),
    "HMNetwork": lambda: HMNetwork(3, 4, 2),
}
STEPS = ("ZoneoutLSTMCell", "HyperLSTMCell", "PassthroughHighway")  # of one step: their batch comes first


def draws(name):
    return "zoneout" in name.lower() and "rates 0" not in name


def cases(*long):
    """Return names and modes; slow are large networks, others that take long, and training that draws nothing."""
    return [
        pytest.param(
            name, training, marks=[pytest.mark.slow] * (name in (*LARGE, *long) or (training and not draws(name)))
        )
        for name in CELLS | LARGE
        for training in (False, True)
    ]


def network(name, training=False):
    torch.manual_seed(0)
    return (CELLS | LARGE)[name]().to(D).train(training)


def inputs(name, batch=3, steps=2):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(*((batch, 3) if name in STEPS else (steps, batch, 3)), dtype=D, generator=generator)


def outputs_and_gradients(run, x, net=None):
    """Return the outputs, and the gradients of the input and of the weights, by name."""
    x = x.clone().requires_grad_()
    weights = dict((net or run).named_parameters())
    outputs = torch.utils._pytree.tree_leaves(run(x))
    loss = sum(number * out.square().sum() for number, out in enumerate(outputs, 1))
    gradients = torch.autograd.grad(loss, [x, *weights.values()])
    return dict(enumerate(outputs)) | dict(zip(["x", *weights], gradients, strict=True))


def check(ours, theirs, drawn):
    """Compare outputs and gradients; masks in graphs are of other draws."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if drawn:
            assert ours[key].shape == value.shape
            assert ours[key].isfinite().all()
        else:
            torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "training"), cases("HyperLSTM", "HMLSTM"))
def test_strict_export_with_gradients(name, training):
    """For another batch than the exported one."""
    net, x = network(name, training), inputs(name, 5)
    shapes = ({0 if name in STEPS else 1: Dim("batch")},)
    run = torch.export.export(net, (inputs(name),), dynamic_shapes=shapes, strict=True).module()
    check(outputs_and_gradients(run, x), outputs_and_gradients(net, x), training and draws(name))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are checked
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*CELLS, *LARGE])
def test_trace_with_gradients(name, training):
    """For another batch than the traced one."""
    net, x = network(name, training), inputs(name, 5)
    run = torch.jit.trace(net, (inputs(name),), check_trace=False)
    check(outputs_and_gradients(run, x, net), outputs_and_gradients(net, x), training and draws(name))


@pytest.mark.parametrize(("name", "training"), cases())
def test_compile_with_gradients(name, training):
    """Without a graph break, at subclasses of torch's recurrent layers where torch allows that."""
    torch.compiler.reset()
    net, x = network(name, training), inputs(name)
    with torch._dynamo.config.patch(allow_rnn=True):
        run = torch.compile(net, backend="eager", fullgraph=True)
        check(outputs_and_gradients(run, x, net), outputs_and_gradients(net, x), training and draws(name))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's compiler
@pytest.mark.parametrize("kind", ["ZoneoutLSTM", "ZoneoutLSTM in a loop", "LSTM in a loop", "LSTM with a merge", "GRU"])
def test_the_compiler_breaks_its_graph_at_layers_of_torchs_classes(kind):
    torch.manual_seed(0)
    layers = nn.ModuleList([GRU(4, 4) if kind == "GRU" else nn.LSTM(4, 4)])
    if "Zoneout" in kind:
        zone_out(layers, "0", cell=0.3, hidden=0.2)
    if "loop" in kind:
        loop(layers, "0", passes=2)
    if "merge" in kind:
        apply_merge(layers, "0", StochasticDepth(0.5, scale="train"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layers[0], nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(x + 1)[0])

    torch.compiler.reset()
    net, x = Model().train(kind == "ZoneoutLSTM"), torch.randn(2, 3, 4)
    run = torch.compile(net, backend="eager")
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = net(x)
        torch.manual_seed(seed)
        assert torch.equal(run(x), expected)  # eagerly, hence with the same draws
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(net, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("name", [*CELLS, *LARGE])
def test_gradients_of_each_sample_are_those_of_it_alone(name):
    net, x = network(name), inputs(name)
    dim = 0 if name in STEPS else 1
    weights = {key: weight.detach() for key, weight in net.named_parameters()}

    def loss(weights, sample):
        outputs = torch.utils._pytree.tree_leaves(functional_call(net, weights, (sample.unsqueeze(dim),)))
        return sum(number * out.square().sum() for number, out in enumerate(outputs, 1))

    together = vmap(grad(loss), in_dims=(None, dim))(weights, x)
    for number, sample in enumerate(x.unbind(dim)):
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(loss(parameters, sample), parameters.values())
        for key, gradient in zip(weights, gradients, strict=True):
            torch.testing.assert_close(together[key][number], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in [*CELLS, *LARGE] if name != "PassthroughHighway"])
@pytest.mark.parametrize("inside", [True, False])
def test_script_is_refused_in_one_line(name, inside):
    net = network(name)
    layer = net.recurrent if name == "HMNetwork" else net
    message = rf"^torch\.jit\.script cannot compile {type(layer).__name__}: use torch\.export, torch\.compile or torch\.jit\.trace$"
    with pytest.raises(ConfigurationError, match=message) as error:
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), net) if inside else net)
    assert "\n" not in str(error.value)


def test_script_does_not_lose_a_loop():
    net = nn.Sequential(nn.Linear(3, 3))
    loop(net, "0", passes=2)
    with pytest.raises(ConfigurationError, match=r"torch\.jit\.script cannot compile LoopedLinear"):
        torch.jit.script(net)


def test_a_highway_block_is_scripted():
    net, x = network("PassthroughHighway"), inputs("PassthroughHighway")
    check(outputs_and_gradients(torch.jit.script(net), x, net), outputs_and_gradients(net, x), drawn=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CELLS, *LARGE])
def test_onnx(name):
    reference = pytest.importorskip("onnx.reference")
    net, x = network(name).float(), inputs(name).float()
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
    run = reference.ReferenceEvaluator(program)
    outputs = run.run(None, {program.graph.input[0].name: x.numpy()})
    for ours, theirs in zip(outputs, torch.utils._pytree.tree_leaves(net(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=0, atol=1e-6)
