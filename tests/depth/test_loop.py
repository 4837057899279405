"""Loops of blocks against networks in which the repeats are written out."""

import copy
import pickle
import weakref

import pytest
import torch
import transformers
from reference import written_out
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, build, loss_of, output_of

from tying import ConfigurationError
from tying.depth import (
    Recurrent,
    Residual,
    StochasticDepth,
    apply_merge,
    extract,
    loop,
    loops_in,
    recur,
    remove_merge,
    unloop,
)
from tying.hard import audit, bake, load_plain, lower_rank, tie
from tying.hashing import hash_weights

KINDS = (None, "norm", "scale")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chain(count=5):
    """Return a network whose residual blocks have batch norms, and learn."""
    torch.manual_seed(0)
    blocks = (Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())) for _ in range(count))
    return nn.Sequential(*blocks, nn.Linear(4, 2)).double()


def step(model, *arguments):
    """Return the output of a training step, and all gradients by name."""
    model.zero_grad()
    output = model(*arguments)
    output = output[0] if isinstance(output, tuple) else output
    (output * torch.arange(output.numel()).view(output.shape).sin()).sum().backward()
    return output.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def differ(looping):
    """Give the norms and scales of each pass values of their own."""
    with torch.no_grad():
        for norm in looping.norms:
            for part in norm.passes:
                for tensor in (part.weight, part.bias):
                    tensor.add_(torch.randn_like(tensor))
        for scale in looping.scales:
            scale.uniform_(0.5, 1.5)


def by_hand(model, looping, x, passes):
    """Compute a chain with a loop by the plain functions of its blocks."""
    places = [int(name) for name in looping.names]
    plain = copy.deepcopy(model)
    unloop(plain)
    for block in plain[: places[0]]:
        x = block(x)
    for number in range(1, passes + 1):
        for place in places:
            block, further = copy.deepcopy(plain[place]), number - 2
            norm = model[place].branch[1]
            if looping.per_pass == "norm" and number > 1:
                block.branch[1] = norm.passes[min(further, len(norm.passes) - 1)]
            y = block(x)
            if looping.per_pass == "scale" and number > 1:
                scale = model[place].pass_scale
                y = x + scale[min(further, len(scale) - 1)] * (y - x)
            x = y
    for block in plain[places[-1] + 1 :]:
        x = block(x)
    return x


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("per_pass", [None, "norm"])
def test_passes_are_tied_copies(passes, per_pass):
    """Values, gradients and statistics, bitwise."""
    model, expected = chain(), chain()
    assert loop(model, "{1..3}", passes, per_pass) == 1
    written_out(expected, "{1..3}", passes, shares_norms=per_pass is None)
    (output, gradients), (wanted, sums) = step(model, X), step(expected, X)
    assert_equal(output, wanted)
    for place, block in enumerate(model):
        copies = [place] if place < 4 else [place + 3 * (passes - 1)]
        for key, _ in block.named_parameters():
            if ".passes." not in key:
                assert_equal(gradients[f"{place}.{key}"], sums[f"{copies[0]}.{key}"])
    for number in range(2, passes + 1) if per_pass else ():
        for place in range(3):
            norm, copied = (
                model[1 + place].branch[1].passes[number - 2],
                expected[1 + 3 * (number - 1) + place].branch[1],
            )
            assert_equal(norm.weight.grad, copied.weight.grad)
            assert_equal(dict(norm.named_buffers()), dict(copied.named_buffers()))
    assert_equal(model.eval()(X), expected.eval()(X))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_pass", KINDS)
def test_one_pass_is_the_plain_model(per_pass, training):
    model, plain = chain().train(training), chain().train(training)
    loop(model, "{1..3}", 3, per_pass)
    differ(loops_in(model)[0])
    loops_in(model)[0].passes = 1
    (output, gradients), (wanted, expected) = step(model, X), step(plain, X)
    assert_equal(output, wanted)
    assert_equal({key: gradients.pop(key) for key in expected}, expected)
    assert_equal({key: model.state_dict()[key] for key in plain.state_dict()}, dict(plain.state_dict()))
    if training:  # distributed training waits for no gradient
        assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("passes", [2, 3, 5])
@pytest.mark.parametrize("per_pass", KINDS)
def test_any_number_of_passes_later(passes, per_pass):
    model = chain().eval()
    loop(model, "{1..2}", 3, per_pass)
    looping = loops_in(model)[0]
    differ(looping)
    looping.passes = passes
    torch.testing.assert_close(model(X), by_hand(model, looping, X, passes), rtol=1e-13, atol=1e-13)
    _, gradients = step(model.train(), X)
    assert all(gradient is not None for gradient in gradients.values())
    used = {number for number in (2, 3) if number <= passes}
    for norm in looping.norms:
        assert {number for number in (2, 3) if norm.passes[number - 2].weight.grad.any()} == used
    for scale in looping.scales:
        assert {number for number in (2, 3) if scale.grad[number - 2]} == used


def test_new_passes_begin_with_the_former_ones_values():
    model = chain()
    loop(model, "{1..2}", 4, "norm")
    looping = loops_in(model)[0]
    looping.passes = 1
    for norm in looping.norms:
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    looping.passes = 2  # as when a run is resumed
    assert_equal(dict(model.state_dict()), before)
    looping.passes = 1
    looping.grow(2)
    nn.init.normal_(looping.norms[0].passes[0].weight)
    looping.grow(6)
    assert looping.passes == 6
    for norm in looping.norms:
        first, *further = norm.passes
        assert_equal(first.running_mean, norm.running_mean)
        assert all(torch.equal(part.weight, first.weight) for part in further)
    assert not torch.equal(looping.norms[0].weight, looping.norms[0].passes[0].weight)
    assert_equal(looping.norms[1].weight, looping.norms[1].passes[2].weight)


def test_new_scales_begin_with_1_or_the_former_pass():
    model = chain()
    loop(model, "1", 4, "scale")
    looping = loops_in(model)[0]
    looping.passes = 1
    looping.scales[0].data.fill_(0.9)  # by weight decay
    looping.grow(2)
    assert looping.scales[0].tolist() == [1.0, 0.9, 0.9]
    looping.scales[0].data[0] = 0.5
    looping.grow(3)
    assert looping.scales[0].tolist() == [0.5, 0.5, 0.9]


@pytest.mark.parametrize("per_pass", KINDS)
def test_removal_restores_the_model(per_pass):
    model, plain = chain(), chain()
    loop(model, ["{0..1}"], 3, per_pass)
    loop(model, "4", 2, per_pass)
    keys = {key for key in model.state_dict() if ".passes." in key or key.endswith("pass_scale")}
    assert bool(keys) == bool(per_pass)
    assert [key for key in model.state_dict() if key not in keys] == [*plain.state_dict()]
    step(model, X)
    assert [(looping.names, looping.passes) for looping in loops_in(model)] == [(("0", "1"), 3), (("4",), 2)]
    assert unloop(model) == 2
    assert loops_in(model) == []
    assert [*model.state_dict()] == [*plain.state_dict()]
    for restored, original in zip(model.modules(), plain.modules(), strict=True):
        assert type(restored) is type(original)
        assert restored.__dict__.keys() == original.__dict__.keys()


class Block(nn.Module):
    """A block that takes its hidden state by keyword, and returns further outputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, hidden_states, bias, scale=1.0, position=None):
        hidden_states = hidden_states + scale * self.linear(self.norm(hidden_states)) + bias
        return hidden_states, hidden_states.mean(), position


class Layers(nn.Module):
    """Calls each block with arguments of its own, in gradient checkpoints if need be."""

    def __init__(self, count=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(Block() for _ in range(count)), nn.Linear(4, 1)
        self.double()
        self.options = None

    def forward(self, x):
        bias, means = x.mean(1, keepdim=True), []
        for number, block in enumerate(self.layers):
            arguments = {"bias": bias.detach() * number, "scale": 1.0 + number, "position": [number]}
            if self.options is None:
                x, mean, position = block(hidden_states=x, **arguments)
            else:
                call = lambda x, bias, block=block, rest=arguments: block(x, **{**rest, "bias": bias})  # noqa: E731
                x, mean, position = checkpoint(call, x, arguments["bias"], **self.options)
            means.append(mean)
        return self.head(x), means, position


def layers_by_hand(model, x, passes):
    """Compute layers 1 and 2 several times, each with its own arguments."""
    bias, means = x.mean(1, keepdim=True), []
    for number in [0, *[1, 2] * passes, 3]:
        x, mean, position = model.layers[number](x, bias * number, 1.0 + number, [number])
        means.append((number, mean))
    return model.head(x), [dict(means)[number] for number in range(4)], position


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_keep_their_arguments_and_return_what_the_last_pass_does(compiled):
    model, plain = Layers(), Layers()
    loop(model, "layers.{1..2}", 3)
    expected, means, _ = layers_by_hand(plain, X, 3)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    output, ours, position = run(X)
    assert_equal(output, expected)
    assert_equal(ours[2], means[2])
    assert position == [3]


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "to the end": {"use_reentrant": False, "early_stop": False},
}


@pytest.mark.parametrize("options", CHECKPOINTS)
@pytest.mark.parametrize("per_pass", KINDS)
def test_checkpoints_around_single_blocks(per_pass, options):
    """Their recomputation calls the last block of a loop alone, also of two forward passes before a backward pass."""
    results = []
    for chosen in (None, CHECKPOINTS[options]):
        model = Layers()
        loop(model, "layers.{1..3}", 3, per_pass)
        differ(loops_in(model)[0])
        model.options = chosen
        inputs = [X.clone().requires_grad_(), (2 * X).requires_grad_()]
        outputs = [model(x)[0] for x in inputs]
        sum(loss_of(output) for output in outputs).backward()
        results.append((outputs, [x.grad for x in inputs], [weight.grad for weight in model.parameters()]))
    assert_equal(results[0][:2], results[1][:2])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-13, atol=1e-15)  # sums in another order


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("per_pass", KINDS)
def test_checkpoints_of_transformers(per_pass, reentrant):
    models, arguments = [build("GPT2").double(), build("GPT2").double()], ZOO["GPT2"].inputs(2)
    for model in models:
        loop(model, "transformer.h.{1..2}", 3, per_pass)
        differ(loops_in(model)[0])
    models[1].load_state_dict(models[0].state_dict())
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in models:
        loss_of(output_of(model, arguments)).backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in models]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)  # sums in another order


def test_a_norm_that_is_recomputed_alone_does_not_know_its_pass():
    class Checkpointed(Block):
        def forward(self, hidden_states, bias, scale=1.0, position=None):
            normal = checkpoint(self.norm, hidden_states, use_reentrant=False)
            return hidden_states + self.linear(normal), hidden_states.mean(), position

    model = Layers()
    model.layers[1] = Checkpointed().double()
    loop(model, "layers.1", 2, "norm")
    output = model(X.clone().requires_grad_())[0]
    with pytest.raises(
        ConfigurationError, match=r"gradient checkpointing within a block of the loop layers\.1 recompu"
    ):
        output.sum().backward()


def test_arguments_live_as_long_as_the_pass():
    model, alive = Layers(), []
    loop(model, "layers.{1..2}", 3)
    model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: alive.append(weakref.ref(kwargs["bias"])), with_kwargs=True
    )
    with torch.no_grad():
        model(X)
    assert [reference() for reference in alive] == [None] * 3
    model(X)[0].sum().backward()
    assert [reference() for reference in alive] == [None] * 6


GRAPHS = {
    "torch.fx": torch.fx.symbolic_trace,
    "torch.jit.trace": lambda model: torch.jit.trace(model, X),
    "torch.export": lambda model: torch.export.export(model, (X,)).module(),
    "torch.compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:FutureWarning")
@pytest.mark.parametrize(
    ("per_pass", "graph"),
    [(kind, graph) for kind in KINDS for graph in GRAPHS if kind == "scale" or graph != "torch.compile"],
)
def test_graphs_and_copies(per_pass, graph):
    model = chain()
    loop(model, "{1..3}", 3, per_pass)
    differ(loops_in(model)[0])
    step(model, X)
    model.eval()
    made = GRAPHS[graph](model)
    assert_equal(made(X), model(X))
    if graph in ("deepcopy", "pickle"):
        loops_in(made)[0].passes = 1
        assert not torch.equal(made(X), model(X))
        assert all(block is made[number] for number, block in enumerate(loops_in(made)[0].blocks, 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, at a graph break
def test_compiled_blocks_and_training():
    model, expected = chain(), chain()
    for net in (model, expected):
        loop(net, "{1..3}", 3, "norm")
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    assert_equal(step(model, X), step(expected, X))


@pytest.mark.parametrize(
    ("per_pass", "merge"),
    [(None, StochasticDepth(0.5)), ("norm", StochasticDepth(0.5, "row")), ("scale", StochasticDepth(0.0))],
)
def test_merges_before_and_after(merge, per_pass):
    models = [build("GPT2"), build("GPT2"), build("GPT2")]
    for merging, model in zip(("before", "after", "none"), models, strict=True):
        if merging == "before":
            apply_merge(model, "transformer.h.*", merge)
        loop(model, "transformer.h.{1..2}", 2, per_pass)
        if merging == "after":
            apply_merge(model, "transformer.h.*", merge)
    arguments, losses = ZOO["GPT2"].inputs(4), []
    for model in models[:2]:
        torch.manual_seed(1)
        losses.append(loss_of(output_of(model, arguments)))
        losses[-1].backward()
    assert_equal(losses[0], losses[1])
    assert_equal(*([parameter.grad for parameter in model.parameters()] for model in models[:2]))
    assert unloop(models[0]) == remove_merge(models[1]) - 2 == 1
    assert remove_merge(models[0]) == 3
    assert_equal(output_of(models[1].eval(), arguments), output_of(models[2].eval(), arguments))
    assert [type(module) for module in models[0].modules()] == [type(module) for module in build("GPT2").modules()]


def test_each_branch_has_a_draw_in_each_pass():
    model, expected = chain(), chain()
    loop(model, "{1..2}", 2)
    written_out(expected, "{1..2}", 2)
    for net in (model, expected):
        apply_merge(net, ["{0..3}"] if net is model else ["{0..5}"], StochasticDepth(0.5))
    for seed in range(4):
        outputs = []
        for net in (model, expected):
            torch.manual_seed(seed)
            outputs.append(net(X))
        assert_equal(*outputs)


class Attending(nn.Module):
    """A network whose attention layers get their hidden state as query, key and value, or all its input as memory."""

    def __init__(self, memory, options=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(3))
        self.double()
        self.memory, self.options = memory, options

    def forward(self, x, order=(0, 1, 2)):
        hidden = x
        for layer in (self.layers[number] for number in order):
            memory = x if self.memory else hidden
            if self.options is None:
                hidden = layer(hidden, key=memory, value=memory)[0]
            else:
                hidden = checkpoint(layer, hidden, memory, memory, **self.options)[0]
        return hidden


@pytest.mark.parametrize("options", [None, *CHECKPOINTS])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (1,), (0, 1, 2)])
def test_a_hidden_state_that_is_given_several_times(blocks, memory, options):
    """It is replaced wherever it stands; a memory stays, even if it is the first hidden state."""
    model, plain = Attending(memory, CHECKPOINTS.get(options)), Attending(memory)
    loop(model, [f"layers.{number}" for number in blocks], 3)
    order = [*range(blocks[0]), *[*blocks] * 3, *range(blocks[-1] + 1, 3)]
    inputs = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in range(2)]
    outputs = [model(inputs[0].requires_grad_()), plain(inputs[1].requires_grad_(), order)]
    assert_equal(*outputs)
    for output in outputs:
        loss_of(output).backward()
    gradients = [[x.grad, *(p.grad for p in net.parameters())] for x, net in zip(inputs, (model, plain), strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)  # sums in another order


@pytest.mark.filterwarnings("ignore:.*max_length")
@pytest.mark.parametrize("name", ["GPT2", "Llama", "T5"])
def test_caches(name):
    model, expected = build(name), build(name)
    pattern = {"T5": "*coder.block.[12]"}.get(name, ZOO[name].blocks)
    loop(model, pattern, 2)
    written_out(expected, pattern, 2)
    arguments = ZOO[name].inputs(2)
    assert_equal(output_of(model, arguments), output_of(expected, arguments))  # both with an empty cache
    prompt = {key: value for key, value in arguments.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.eval().generate(**prompt, **options, use_cache=False)
    assert_equal(tokens, expected.eval().generate(**prompt, **options))
    with pytest.raises(
        ConfigurationError, match=r"is called with a filled cache, '(past_key_values?|cache)', .* use_cache=False$"
    ):
        model.generate(**prompt, **options)


CHANGES = {
    "loop": lambda model: loop(model, "h.1", 2),
    "merge": lambda model: apply_merge(model, "h.1", StochasticDepth(0.5, mode="row")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_empty_cache_of_gpt_neo(change):
    """Its blocks name their number ``layer_id``."""
    sizes = {"hidden_size": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPTNeoModel(transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    CHANGES[change](model.train())
    tokens = torch.ones(2, 3, dtype=torch.long)
    cache = model(tokens)[1]
    with pytest.raises(ConfigurationError, match=r"is called with a filled cache, '(layer_past|cache)'"):
        model(tokens, cache)


@pytest.mark.parametrize("per_pass", KINDS)
def test_torchs_encoder(per_pass):
    """In evaluation it computes each layer at once, from the weights of its norms."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    loop(model, "layers.{1..2}", 2, per_pass)
    differ(loops_in(model)[0])
    slow = copy.deepcopy(model)
    loops_in(slow)[0].passes = 1
    with torch.no_grad():
        assert_equal(slow(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding))
        slow.train()
        loops_in(slow)[0].passes = 2
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[~padding], slow(x, src_key_padding_mask=padding)[~padding]
        )
        model(x, src_key_padding_mask=padding)
    assert model.layers[1].activation_relu_or_gelu == plain.layers[1].activation_relu_or_gelu == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 3).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with pytest.raises(
        ConfigurationError, match=r"gets nested tensors .* make the TransformerEncoder with enable_nested"
    ):
        loop(model, "layers.*", 2, "norm")
    loop(model, "layers.*", 2)
    plain.layers = nn.ModuleList([*plain.layers, *plain.layers])
    with torch.no_grad():
        assert_equal(model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding))


COMPUTED = {
    "tie": lambda model: tie(model, ["1.branch.0 ~ 2.branch.0"]),
    "relation": lambda model: tie(model, ["1.branch.0.weight ~ 2.branch.0.weight | o i -> i o"]),
    "low rank": lambda model: lower_rank(model, ["{1..3}.branch.0.weight"], 2),
    "hashed": lambda model: hash_weights(model, ["{1..3}.branch.0.weight"], 0.5, scope="network"),
    "parametrized block": lambda model: nn.utils.parametrizations.weight_norm(model[1].branch[0]),
}


@pytest.mark.parametrize("per_pass", KINDS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_before_and_after(kind, per_pass):
    models = [chain(), chain()]
    for name, model in zip(("before", "after"), models, strict=True):
        torch.manual_seed(0)
        if name == "after":
            loop(model, "{1..3}", 2, per_pass)
        COMPUTED[kind](model)
        if name == "before":
            loop(model, "{1..3}", 2, per_pass)
    (output, gradients), (wanted, expected) = (step(model, X) for model in models)
    assert_equal(output, wanted)
    assert_equal(gradients, {key: expected[key] for key in gradients})
    plain = chain()
    loop(plain, "{1..3}", 2, per_pass)
    plain.load_state_dict(bake(models[0]))
    torch.testing.assert_close(plain.eval()(X), models[0].eval()(X), rtol=1e-6, atol=1e-6)
    assert audit(models[0]).problems == ()
    assert unloop(models[0]) == unloop(models[1]) == 1


@pytest.mark.parametrize("per_pass", [None, "scale"])
def test_blocks_that_compute_their_weights(per_pass):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    lower_rank(model, ["*.weight"], 2)
    loop(model, "{0..1}", 2, per_pass)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(copied(X), model(X))
    expected, output = bake(model), model(X)
    assert unloop(model) == 1
    assert_equal(model[2](model[1](model[0](model[1](model[0](X))))), output)
    assert {type(block).__name__ for block in model} == {"ParametrizedLinear"}
    assert [key for key in expected if key.endswith("weight")] == ["0.weight", "1.weight", "2.weight"]


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu_()) + x


def test_scales_need_the_input():
    model = nn.Sequential(nn.Linear(4, 4), InPlace(4, 4)).double()
    loop(model, "1", 2)
    model(X)
    unloop(model)
    loop(model, "1", 2, "scale")
    with pytest.raises(
        ConfigurationError,
        match=r"^'1' overwrites its input, which per_pass='scale' needs afterwards: set inplace=False",
    ):
        model(X)


def test_a_recurrent_block_runs_again():
    model, plain = chain(), chain()
    for net in (model, plain):
        recur(net, "{1..3}", per_step_norm=False)
        net.eval()
    loop(model, "1", 2)
    assert isinstance(model[1], Recurrent)
    assert_equal(model(X), nn.Sequential(plain[0], plain[1], plain[1], plain[2], plain[3])(X))


def looped(blocks="{1..2}", model=None, **arguments):
    model = chain() if model is None else model
    loop(model, blocks, 2, **arguments)
    return model


class Reversible(nn.Linear):
    def backward_pass(self):
        pass


def with_forward():
    model = chain()
    model[1].forward = model[1].forward
    return model


def lazy():
    return nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 4))


MISTAKES = {
    "gap": (
        chain,
        ("[014]", 2),
        r"^blocks: '1' and '4' are not consecutive: '2', '3' between them would not be repeated\. Name it, too, or call",
    ),
    "nothing matches": (chain, ("layers.*", 2), r"^blocks: pattern 'layers\.\*' matches no module"),
    "no pass": (chain, ("1", 0), "^passes must be an integer, 1 or more, not 0$"),
    "half a pass": (chain, ("1", 1.5), r"^passes must be an integer, 1 or more, not 1\.5$"),
    "per pass": (chain, ("1", 2, "bias"), "^per_pass, if given, must be 'norm' or 'scale', not 'bias'"),
    "empty per pass": (chain, ("1", 2, ""), "^per_pass, if given, must be 'norm' or 'scale', not ''"),
    "looped": (
        looped,
        ("{2..3}", 2),
        "^blocks: the LoopedResidual '2' is in a loop already, or overlaps with one, of 1, 2",
    ),
    "within": (looped, ("1.branch", 2), r"^blocks: the Sequential '1\.branch' is in a loop already, or overlaps"),
    "around": (lambda: looped("1.branch"), ("1", 2), "^blocks: the Residual '1' is in a loop already, or overlaps"),
    "twice": (lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), ("*", 2), "the Linear '0' occurs several times"),
    "reversible": (
        lambda: nn.Sequential(Reversible(4, 4)),
        ("0", 2),
        "is reversible, and computes its gradients without",
    ),
    "container": (lambda: Layers(), ("layers", 2), "^blocks: the ModuleList 'layers' has no forward: name the blocks"),
    "own forward": (
        with_forward,
        ("1", 2, "norm"),
        r"^blocks: the Residual '1' has a patched forward, which is not that of its class: .* or leave per_",
    ),
    "no norms": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        ("*", 2, "norm"),
        "^per_pass='norm': '0', '1' contain no normalisation layer: use per_pass='scale', or leave per_pass out",
    ),
    "lazy": (lazy, ("*", 2, "norm"), r"^per_pass='norm': '0\.weight' has no shape yet, since its layer is lazy"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_change_nothing(case):
    make, arguments, message = MISTAKES[case]
    model = make()
    kinds, entries = [type(module) for module in model.modules()], [*model.state_dict()]
    with pytest.raises(ConfigurationError, match=message):
        loop(model, *arguments)
    assert [type(module) for module in model.modules()] == kinds
    assert [*model.state_dict()] == entries


class Skips(nn.Sequential):
    def forward(self, x):
        return self[3](self[2](x))


class Dictionary(nn.Linear):
    def forward(self, x):
        return {"x": super().forward(x)}


USES = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        r"^'1' maps \(6, 4\) to \(6, 3\): a loop needs blocks that keep the shape of their first tensor argument",
    ),
    "later shape": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), r"^'0' maps \(6, 4\) to \(6, 6\)"),
    "skipped": (
        lambda: Skips(*(nn.Linear(4, 4) for _ in range(4))),
        r"^the model calls '3' without calling '0' before: a loop needs all of its blocks, in order\. Turn off what skips",
    ),
    "no tensor": (
        lambda: nn.Sequential(nn.Identity(), Returning()),
        "^'1' is called without a tensor: a loop needs blocks whose first tensor argument is the hidden state",
    ),
    "output": (
        lambda: nn.Sequential(Dictionary(4, 4)),
        "^'0' returns a dict: a loop needs blocks that return a tensor",
    ),
}


class Returning(nn.Module):
    def forward(self, pair):
        return pair


@pytest.mark.parametrize("case", USES)
def test_mistakes_in_use(case):
    make, message = USES[case]
    model = looped("*", make())
    x = {"x": X.float()} if case == "no tensor" else X.float()
    with pytest.raises(ConfigurationError, match=r"^'0' is called without" if case == "no tensor" else message):
        model(x)
    loops_in(model)[0].passes = 1
    model(x)


def test_passes_of_a_loop_are_checked():
    looping = loops_in(looped())[0]
    for change in (lambda: setattr(looping, "passes", 0), lambda: looping.grow(True - 1), lambda: looping.grow(2.0)):
        with pytest.raises(ConfigurationError, match=r"^passes must be an integer, 1 or more, not "):
            change()
    assert looping.passes == 2


@pytest.mark.parametrize(
    "change", [lambda model: recur(model, "{1..2}"), lambda model: extract(model, "{0..3}", [0, 1])]
)
def test_blocks_in_loops_stay(change):
    with pytest.raises(ConfigurationError, match="is in a loop: call unloop first"):
        change(looped())


def test_a_changed_class_cannot_be_restored():
    model = looped()
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    with pytest.raises(
        ConfigurationError,
        match=r"^the class of '1' has changed to Sharded after the loop was made, which cannot be undo",
    ):
        unloop(model)


def test_plain_weights_of_all_passes_are_loaded():
    model, source = looped(per_pass="norm"), looped(per_pass="norm")
    differ(loops_in(source)[0])
    tie(model, ["1.branch.0 ~ 2.branch.0"])
    tie(source, ["1.branch.0 ~ 2.branch.0"])
    assert load_plain(model, source.state_dict()) is not None
    assert_equal(model.eval()(X), source.eval()(X))
