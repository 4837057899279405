"""Recurrent layers where an ``nn.LSTM`` or ``nn.GRU`` stood: the kinds of torch's own tests, asked of every layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from tying import ConfigurationError
from tying.depth import (
    HMLSTM,
    HyperLSTM,
    HyperLSTMCell,
    PassthroughGRU,
    PassthroughHighway,
    ZoneoutLSTM,
    ZoneoutLSTMCell,
)

D = torch.float64
LENGTHS = (3, 1, 5, 3)
DEVICES = ["meta", *["cuda"] * torch.cuda.is_available()]


def hm_lstm(num_layers=2, **options):
    return HMLSTM(3, 4, num_layers, outputs="top", **options)


LAYERS = {
    "LSTM": lambda **options: nn.LSTM(3, 4, **options),
    "GRU": lambda **options: nn.GRU(3, 4, **options),
    "PassthroughGRU": lambda **options: PassthroughGRU(3, 4, 2, **options),
    "PassthroughGRU, learned": lambda **options: PassthroughGRU(3, 4, 2, learned_state=True, **options),
    "HyperLSTM": lambda **options: HyperLSTM(3, 4, 3, 2, **options),
    "HMLSTM": hm_lstm,
    "ZoneoutLSTM": lambda **options: ZoneoutLSTM(3, 4, zoneout_cell=0.3, zoneout_hidden=0.2, **options),
    "ZoneoutLSTM, projected": lambda **options: ZoneoutLSTM(3, 5, proj_size=4, zoneout_cell=0.3, **options),
}
ONE_WAY = ("HMLSTM",)
CELLS = {
    "LSTMCell": lambda **options: nn.LSTMCell(3, 4, **options),
    "ZoneoutLSTMCell": lambda **options: ZoneoutLSTMCell(3, 4, zoneout_cell=0.3, **options),
    "HyperLSTMCell": lambda **options: HyperLSTMCell(3, 4, 3, 2, **options),
    "PassthroughHighway": lambda **options: PassthroughHighway(3, 2, **options),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_module = pytest.mark.parametrize("name", [*LAYERS, *CELLS])
OURS = [name for name in LAYERS if name not in ("LSTM", "GRU")]


def variants(*options):
    """Each layer with each of these options that it has."""
    return pytest.mark.parametrize(
        ("name", "options"),
        [
            (name, option)
            for name in LAYERS
            for option in options
            if name not in ONE_WAY or "bidirectional" not in option
        ],
    )


every_variant = variants({}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "bidirectional": True})


def draw(module):
    """Draw all parameters, also those that are initially constant, such as shifts and learned states."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=D) / 2)
    return module


def make(name, training=False, dtype=D, **options):
    return draw((LAYERS | CELLS)[name](dtype=dtype, **options)).train(training)


def inputs(*shape, dtype=D, seed=1):
    return torch.randn(*shape, 3, dtype=D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module_inputs(name, dtype=D):
    return inputs(2, dtype=dtype) if name in CELLS else inputs(5, 2, dtype=dtype)


def parts(state):
    return [state] if isinstance(state, torch.Tensor) else [*state]


def drawn_state(net, batch, dtype=D):
    """A state of random numbers; boundaries are 0 or 1."""
    _, state = net(inputs(1, batch, dtype=dtype))
    values = [torch.randn(part.shape, dtype=D).to(part.dtype) for part in parts(state)]
    if isinstance(net, HMLSTM):
        values[2] = (values[2] > 0).to(dtype)
    return values[0] if len(values) == 1 else tuple(values)


def rebuilt(state, change):
    """The state with each of its parts changed."""
    return change(state) if isinstance(state, torch.Tensor) else [change(part) for part in state]


def leaves(outputs):
    outputs, state = outputs
    return [outputs.data if isinstance(outputs, PackedSequence) else outputs, *parts(state)]


def tensors(module, x):
    """All tensors that a module returns."""
    return [part.data for part in torch.utils._pytree.tree_leaves(module(x))]


def assert_same(ours, theirs, **tolerances):
    assert len(ours) == len(theirs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, **{"rtol": 1e-12, "atol": 1e-12, **tolerances})


# interface


@variants({}, {"num_layers": 2, "batch_first": True, "dropout": 0.5, "bias": False}, {"bidirectional": True})
def test_attributes_are_those_of_torchs_lstm(name, options):
    net = LAYERS[name](**options)
    size = 5 if "projected" in name else 4
    expected = nn.LSTM(3, size, **{**({"num_layers": 2} if name == "HMLSTM" else {}), **options})
    for attribute in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(net, attribute) == getattr(expected, attribute)
        assert type(getattr(net, attribute)) is type(getattr(expected, attribute))
    for word in expected.extra_repr().split(", "):
        assert word in net.extra_repr().split(", ")
    before = [*net.parameters()]
    net.flatten_parameters()
    assert all(map(torch.equal, before, net.parameters()))


@every_module
def test_without_biases(name):
    net, biased = ((LAYERS | CELLS)[name](bias=bias) for bias in (False, True))
    x = module_inputs(name, torch.float32)
    # embeddings of scales, and the small LSTM, have biases of their own
    biases = [
        key for key, _ in net.named_parameters() if "bias" in key and "hyper" not in key and "embedding" not in key
    ]
    assert biases == []
    missing = {key for key, _ in biased.named_parameters()} - {key for key, _ in net.named_parameters()}
    assert missing
    assert all("bias" in key for key in missing)
    assert all(part.isfinite().all() for part in tensors(net, x))


@every_module
def test_a_reset_draws_every_parameter_anew(name):
    net = make(name, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(torch.nan)
    resets = []
    for _ in range(2):
        torch.manual_seed(0)
        net.reset_parameters()
        resets.append([parameter.detach().clone() for parameter in net.parameters()])
        assert all(part.isfinite().all() for part in resets[-1])
    assert all(map(torch.equal, *resets))


@every_layer
def test_arguments_have_torchs_names(name):
    net = make(name)
    x, state = inputs(5, 2), drawn_state(net, 2)
    assert_same(leaves(net(input=x, hx=state)), leaves(net(x, state)), rtol=0, atol=0)


READS_BELOW = ("weight_ih_l1", "weight_ih", "input.weight", "weight")  # by a second layer


@every_layer
def test_dropout_acts_between_layers(name):
    net, same = make(name, True, num_layers=2, dropout=0.5), make(name, num_layers=2)
    x = inputs(5, 2)
    assert not torch.equal(net(x)[0], net(x)[0])
    assert_same(leaves(net.eval()(x)), leaves(same(x)), rtol=0, atol=0)
    full = make(name, True, num_layers=2, dropout=1.0).train()
    outputs, _ = full(x)
    outputs.sum().backward()
    second = full.below[1] if name == "HMLSTM" else full.layers[1] if hasattr(full, "layers") else full
    weights = [weight for key, weight in second.named_parameters() if key in READS_BELOW]
    assert len(weights) == 1
    assert not weights[0].grad.any()


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "HMLSTM"])  # which has two layers or more
def test_dropout_of_one_layer_warns(name):
    with pytest.warns(UserWarning, match=r"dropout=0\.5.*num_layers=1"):
        LAYERS[name](dropout=0.5)


# layouts and states


@every_variant
@pytest.mark.parametrize("with_state", [True, False])
def test_batches_first_and_single_sequences(name, options, with_state):
    net, first = make(name, **options), make(name, batch_first=True, **options)
    x = inputs(5, 3)
    state = drawn_state(net, 3) if with_state else None
    outputs, *last = leaves(net(x, state))
    batch_first, *same = leaves(first(x.transpose(0, 1), state))
    assert_same([batch_first.transpose(0, 1), *same], [outputs, *last])
    for row in range(3):
        alone = None if state is None else rebuilt(state, lambda part, row=row: part[:, row])
        for single in (net, first):
            expected = [outputs[:, row], *(part[:, row] for part in last)]
            assert_same(leaves(single(x[:, row], alone)), expected)


@every_variant
def test_a_state_goes_on(name, options):
    net, x = make(name, **options), inputs(6, 2)
    if net.bidirectional:
        return
    whole, *end = leaves(net(x))
    first, state = net(x[:4])
    second, last = net(x[4:], state)
    assert_same([torch.cat([first, second]), *parts(last)], [whole, *end])
    assert all(part.shape[:2] == (net.num_layers - (part.shape[2] == 1), 2) for part in parts(state))


@every_layer
def test_without_a_state_it_starts_from_zeros_or_what_it_learned(name):
    net, x = make(name, num_layers=2), inputs(5, 2)
    state = rebuilt(net(x)[1], torch.zeros_like)
    if "learned" in name:
        state = net.initial_state.detach().unsqueeze(1).expand(2, 2, 4)
    assert_same(leaves(net(x)), leaves(net(x, state)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["HyperLSTM", "HMLSTM", "HyperLSTMCell"])
def test_a_state_of_h_and_c_is_enough(name):
    """What an LSTM returned; other parts are zeros."""
    net, x = make(name), module_inputs(name)
    state = rebuilt(net(x) if name in CELLS else net(x)[1], torch.randn_like)
    full = [*state[:2], *(torch.zeros_like(part) for part in state[2:])]
    ours, theirs = (torch.utils._pytree.tree_leaves(net(x, hx)) for hx in (tuple(state[:2]), full))
    assert_same(ours, theirs, rtol=0, atol=0)


def outputs_and_gradients(net, run, x, state):
    """What ``run`` returns for an input and a state, and gradients of both and of all parameters."""
    net.zero_grad()
    x = [sequence.clone().requires_grad_() for sequence in x]
    state = [part.clone().requires_grad_() for part in parts(state)]
    outputs = run(x, state)
    sum((number * part.square()).sum() for number, part in enumerate(outputs, 1)).backward()
    gradients = [tensor.grad for tensor in (*x, *state, *net.parameters()) if tensor.grad is not None]
    return [part.detach() for part in outputs] + gradients


@every_variant
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_as_each_alone(name, options, enforce_sorted):
    net = make(name, **options)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x, state = [inputs(length, seed=length) for length in lengths], drawn_state(net, len(lengths))
    one_part = isinstance(state, torch.Tensor)

    def packed(x, state):
        outputs, last = net(pack_sequence(x, enforce_sorted), state[0] if one_part else state)
        padded, packed_lengths = pad_packed_sequence(outputs)
        assert packed_lengths.tolist() == [*lengths]
        return [*(padded[:length, row] for row, length in enumerate(lengths)), *parts(last)]

    def alone(x, state):
        ends = []
        for row, sequence in enumerate(x):
            start = [part[:, row] for part in state]
            ends.append(net(sequence, start[0] if one_part else start))
        last = [torch.stack(rows, dim=1) for rows in zip(*(parts(end) for _, end in ends), strict=True)]
        return [*(outputs for outputs, _ in ends), *last]

    ours, theirs = (outputs_and_gradients(net, run, x, state) for run in (packed, alone))
    assert_same(ours, theirs)


@every_layer
def test_packed_sequences_of_one_length_are_the_padded_batch(name):
    """In training too, with the same draws; ``batch_first`` is no matter of packed sequences."""
    net, x = make(name, True, num_layers=2, dropout=0.5, batch_first=True), inputs(2, 5)
    packed = pack_padded_sequence(x, [5, 5], batch_first=True)
    torch.manual_seed(0)
    outputs, *state = leaves(net(x))
    torch.manual_seed(0)
    same, last = net(packed)
    assert isinstance(same, PackedSequence)
    assert torch.equal(same.batch_sizes, packed.batch_sizes)
    if name not in ("LSTM", "GRU"):  # which draw other masks
        assert_same([pad_packed_sequence(same, batch_first=True)[0], *parts(last)], [outputs, *state])


@every_layer
def test_a_batch_of_no_sequences(name):
    net = make(name)
    outputs, *state = leaves(net(inputs(5, 0)))
    assert outputs.shape == (5, 0, 4)
    assert all(part.shape[1] == 0 for part in state)


@pytest.mark.parametrize("name", ["PassthroughGRU", "HyperLSTM"])
def test_the_second_direction_is_a_layer_on_the_reversed_sequence(name):
    both, x = make(name, bidirectional=True), inputs(5, 2)
    forward, backward = make(name), make(name)
    forward.layers[0], backward.layers[0] = both.layers
    (outputs, state), (ahead, first), (back, second) = both(x), forward(x), backward(x.flip(0))
    assert_same([outputs], [torch.cat([ahead, back.flip(0)], dim=2)])
    assert_same(parts(state), [torch.cat(pair) for pair in zip(parts(first), parts(second), strict=True)])


# devices and dtypes


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name, dtype):
    made, moved = (LAYERS | CELLS)[name](dtype=dtype), (LAYERS | CELLS)[name]().to(dtype)
    for net in (draw(made), draw(moved)):
        assert {parameter.dtype for parameter in net.parameters()} == {dtype}
        assert {part.dtype for part in tensors(net.eval(), module_inputs(name, dtype))} == {dtype}
    assert_same(*(tensors(net, module_inputs(name, dtype)) for net in (made, moved)), rtol=0, atol=0)
    exact = tensors(make(name), module_inputs(name, dtype).double())
    if name != "HMLSTM" or dtype in (torch.float64, torch.float32):  # whose boundaries move with the rounding
        low = 1e-6 if dtype == torch.float32 else 0.05
        assert_same([part.double() for part in tensors(made, module_inputs(name, dtype))], exact, rtol=low, atol=low)


@every_module
@pytest.mark.parametrize("device", DEVICES)
def test_devices(name, device):
    made, moved = (LAYERS | CELLS)[name](device=device, dtype=D), make(name).to(device)
    x = module_inputs(name)
    expected = tensors(make(name), x)
    for net in (made.eval(), moved):
        assert {parameter.device.type for parameter in net.parameters()} == {device}
        outputs = tensors(net, x.to(device))
        assert [(part.shape, part.dtype, part.device.type) for part in outputs] == [
            (part.shape, part.dtype, device) for part in expected
        ]
    if device == "meta":
        back = moved.to_empty(device="cpu")
        back.reset_parameters()
        assert all(part.isfinite().all() for part in tensors(back, x))
    else:
        assert_same([part.cpu() for part in tensors(moved, x.to(device))], expected, rtol=1e-9, atol=1e-9)


# copies, pickles and pruning


@every_module
def test_copies_pickles_and_state_dicts(name, tmp_path):
    net, x = make(name), module_inputs(name)
    expected = tensors(net, x)
    torch.save(net, tmp_path / "net.pt")
    loaded = (LAYERS | CELLS)[name](dtype=D).eval()
    loaded.load_state_dict(net.state_dict())
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(tmp_path / "net.pt", weights_only=False),
        loaded,
    ]
    for same in copies:
        assert repr(same) == repr(net)
        assert_same(tensors(same, x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in same.parameters():
                parameter.zero_()
    assert_same(tensors(net, x), expected, rtol=0, atol=0)
    given = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    changed = [part.data for part in torch.utils._pytree.tree_leaves(torch.func.functional_call(net, given, (x,)))]
    assert not all(map(torch.equal, changed, expected))
    assert_same(tensors(net, x), expected, rtol=0, atol=0)


@every_module
@pytest.mark.parametrize("training", [True, False])
def test_a_seed_fixes_parameters_and_draws(name, training):
    options = {} if name in CELLS else {"num_layers": 2, "dropout": 0.5}
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net = (LAYERS | CELLS)[name](dtype=D, **options).train(training)
        results.append([*net.parameters(), *tensors(net, module_inputs(name))])
    assert_same(*results[:2], rtol=0, atol=0)
    assert not any(map(torch.equal, results[0][-1:], results[2][-1:]))


@every_module
def test_pruned_weights(name):
    """Masked now, and after a step of the weights beneath; ``hyper``, which is never called, cannot be pruned."""
    net, masked = make(name), make(name)
    x, places = module_inputs(name), []
    for path, module in [*net.named_modules()]:
        for key, weight in [*module.named_parameters(recurse=False)]:
            if weight.ndim > 1 and "hyper" not in path.split("."):
                prune.random_unstructured(module, key, amount=0.5)
                places.append((module, key, masked.get_submodule(path).get_parameter(key)))
    assert places
    for _ in range(2):
        with torch.no_grad():
            for module, key, weight in places:
                weight.copy_(getattr(module, f"{key}_orig") * getattr(module, f"{key}_mask"))
        assert_same(tensors(net, x), tensors(masked, x), rtol=0, atol=0)
        net.zero_grad()
        sum(part.square().sum() for part in torch.utils._pytree.tree_leaves(net(x))).backward()
        with torch.no_grad():
            for module, key, _ in places:
                original = getattr(module, f"{key}_orig")
                assert not original.grad[getattr(module, f"{key}_mask") == 0].any()
                original.sub_(original.grad)
    for module, key, _ in places:
        prune.remove(module, key)
    assert {key for key, _ in net.named_parameters()} == {key for key, _ in masked.named_parameters()}


# mistakes


def packed(*shapes, dtype=D):
    return pack_sequence([torch.zeros(shape, dtype=dtype) for shape in shapes], enforce_sorted=False)


def with_state(batch, layers=1, ndim=3, dtype=D, part=0):
    """A call with a state, one part of which is wrong."""

    def call(net, x):
        state = rebuilt(net(x)[1], torch.zeros_like)
        layer = net.num_layers - 1 + layers
        wrong = torch.zeros((layer, batch, 4)[-ndim:] if ndim == 3 else (layer, 4), dtype=dtype)
        net(x, wrong if isinstance(state, torch.Tensor) else [*state[:part], wrong, *state[part + 1 :]])

    return call


MISTAKES = {  # what is asked, and what torch and this package answer
    "four dimensions": (lambda net, x: net(inputs(1, 5, 2)), r"input to be 2D or 3D, got 4D instead"),
    "features": (lambda net, x: net(x[..., :2]), r"input\.size\(-1\) must be equal to input_size\. Expected 3, got 2"),
    "no steps": (lambda net, x: net(x[:0]), r"sequence length to be larger than 0"),
    "no steps of one": (lambda net, x: net(x[:0, 0]), r"sequence length to be larger than 0"),
    "dtype": (
        lambda net, x: net(x.float()),
        r"input dtype \(torch\.float32\) does not match weight dtype \(torch\.float64\)",
    ),
    "state of another batch": (with_state(3), r"Expected (hx|hidden)(\[0\])? size \(., 2, 4\), got .., 3, 4"),
    "state of more layers": (with_state(2, layers=2), r"Expected (hx|hidden)(\[0\])? size \(., 2, 4\), got .., 2, 4"),
    "state of one sequence": (with_state(2, ndim=2), r"size \(., 2, 4\), got .., 4|For batched 3-D input, hx"),
}
OUR_MISTAKES = {  # where torch says less, or nothing
    "packed features": (lambda net, x: net(packed((5, 2), (3, 2))), r"input\.size\(-1\) must be equal to .* got 2"),
    "packed data": (lambda net, x: net(packed((5, 2, 3))), r": Expected packed data to be 2D, got 3D instead"),
    "packed dtype": (
        lambda net, x: net(packed((5, 3), dtype=torch.float32)),
        r"input dtype \(torch.float32\) does not match",
    ),
    "packed, another batch": (
        lambda net, x: net(packed((5, 3), (6, 3)), rebuilt(net(inputs(1, 3))[1], torch.zeros_like)),
        r"Expected hx(\[0\])? size \(., 2, 4\), got \(., 3, 4\)",
    ),
    "dtype of a state": (
        with_state(2, dtype=torch.float32),
        r"hx(\[0\])? dtype \(torch.float32\) does not match input dtype \(torch.float64\)\. Convert it: hx.*\.to\(torch.float64\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@every_layer
def test_mistakes_of_inputs_and_states(name, mistake):
    call, message = MISTAKES[mistake]
    net = make(name)
    kind = ConfigurationError if name in OURS else (RuntimeError, ValueError)
    with pytest.raises(kind, match=message):
        call(net, inputs(5, 2))


@pytest.mark.parametrize("mistake", OUR_MISTAKES)
@pytest.mark.parametrize("name", OURS)
def test_mistakes_that_torch_lets_pass(name, mistake):
    call, message = OUR_MISTAKES[mistake]
    with pytest.raises(ConfigurationError, match=message):
        call(make(name), inputs(5, 2))


@pytest.mark.parametrize("name", ["HyperLSTM", "HMLSTM", "ZoneoutLSTM"])
def test_states_of_other_parts(name):
    net = make(name)
    with pytest.raises(ConfigurationError, match=r"Expected hx\[1\] size \(., 2, 4\), got \(., 3, 4\)"):
        with_state(3, part=1)(net, inputs(5, 2))
    counts = {"HyperLSTM": "2 or 4", "HMLSTM": "2 or 3", "ZoneoutLSTM": "2"}[name]
    with pytest.raises(ConfigurationError, match=f"Expected hx to be a tuple of {counts} tensors, got 1"):
        net(inputs(5, 2), [torch.zeros(2, 2, 4, dtype=D)])


@pytest.mark.parametrize("name", ["HyperLSTM", "HMLSTM", "ZoneoutLSTM", "ZoneoutLSTMCell", "HyperLSTMCell"])
def test_a_state_of_one_tensor(name):
    net, x = make(name), module_inputs(name)
    h = torch.zeros_like(net(x)[0] if name in CELLS else net(x)[1][0])
    size = ", ".join(map(str, h.shape))
    with pytest.raises(ConfigurationError, match=rf"^Expected hx to be a tuple of .* got a tensor of size \({size}\)$"):
        net(x, h)


@every_layer
@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_mistakes_of_dropout(name, dropout):
    with pytest.raises(ValueError, match=r"dropout (must be|should be a number) in (range )?\[0, 1\]"):
        LAYERS[name](dropout=dropout)


@pytest.mark.parametrize("name", ["ZoneoutLSTMCell", "HyperLSTMCell"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 3, dtype=D), "Cell: Expected input to be 1D or 2D, got 3D instead"),
        (torch.zeros(2, 2, dtype=D), "input has inconsistent input_size: got 2 expected 3"),
        (torch.zeros(2, 3), r"input dtype \(torch\.float32\) does not match weight dtype \(torch\.float64\)"),
    ],
)
def test_mistakes_of_cells(name, x, message):
    with pytest.raises(ConfigurationError, match=message):
        make(name)(x)
    with pytest.raises(ConfigurationError, match=r"Expected hx\[0\] size \(2, 4\), got \(3, 4\)"):
        make(name)(inputs(2), [torch.zeros(3, 4, dtype=D)] * 2)


@pytest.mark.parametrize("name", [name for name in CELLS if "Cell" in name])
def test_cells_read_single_inputs(name):
    cell, x = make(name), inputs(2)
    state = [torch.randn_like(part) for part in cell(x)]
    for row in range(2):
        assert_same([*cell(x[row], [part[row] for part in state])], [part[row] for part in cell(x, state)])
