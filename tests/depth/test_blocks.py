"""Merges on whole blocks: of transformers, torchvision and timm, and of toys."""

import copy
import pickle
import warnings
from contextlib import nullcontext, suppress

import pytest
import timm
import torch
import transformers
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt

from tying import ConfigurationError
from tying.depth import (
    FeedForward,
    Merge,
    Residual,
    SkipForward,
    StochasticDepth,
    Sum,
    Swapout,
    apply_merge,
    remove_merge,
)
from tying.depth.draws import keep_mask
from tying.hard import lower_rank
from tying.selection.patterns import Pattern
from tying.weights.derived import swap_class

D = torch.float64
TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=D)
PADDING = torch.ones(4, 6, dtype=torch.long)
PADDING[1, 4:] = 0


def gpt2(drop):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2,
        resid_pdrop=drop, embd_pdrop=drop, attn_pdrop=drop, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def llama(drop):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=8, attention_dropout=drop,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def bert(drop):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def t5(drop):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=drop,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5Model(config)


def vit(drop):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def convnext(drop):
    settings = [CNBlockConfig(8, 16, 3), CNBlockConfig(16, None, 1)]
    return ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=1.0, num_classes=5)


def mobilenet(drop):
    return MobileNetV2(num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 3, 1]], dropout=drop)


TEXT = {"input_ids": TOKENS, "attention_mask": PADDING}
CASES = {  # make, inputs, the list of blocks, the blocks that are merged
    "GPT2": (gpt2, TEXT, "h", "h.{1..2}"),
    "Llama": (llama, TEXT, "layers", "layers.{1..2}"),
    "BERT": (bert, TEXT, "encoder.layer", "encoder.layer.{1..2}"),
    "T5": (t5, {**TEXT, "decoder_input_ids": TOKENS}, "decoder.block", "decoder.block.{1..2}"),
    "ViT": (vit, {"pixel_values": IMAGES}, "layers", "layers.{1..2}"),
    "ConvNeXt": (convnext, {"x": IMAGES}, "features.1", "features.1.{1..2}"),
    "MobileNetV2": (mobilenet, {"x": IMAGES}, "features", "features.{3..4}"),
}
every_model = pytest.mark.parametrize("case", CASES)
every_mode = pytest.mark.parametrize("mode", ["batch", "row", "subset", "auto"])


def build(case, drop=0.0):
    torch.manual_seed(0)
    return CASES[case][0](drop).to(D)


def run(model, case, seed=0, rows=None):
    torch.manual_seed(seed)
    inputs = {name: x if rows is None else x[rows] for name, x in CASES[case][1].items()}
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def shallow(model, case):
    """Return a copy of the model without the merged blocks."""
    copied, (container, pattern) = copy.deepcopy(model), CASES[case][2:]
    layers = copied.get_submodule(container)
    merged = [number for number in range(len(layers)) if Pattern(pattern).match(f"{container}.{number}") is not None]
    for number in reversed(merged):  # the later ones are renamed
        del layers[number]
    return copied


def equal_training(ours, theirs, case):
    """Compare outputs and gradients bitwise, in training mode and in evaluation."""
    for training in (True, False):
        outputs = [run(model.train(training), case) for model in (ours, theirs)]
        assert torch.equal(*outputs)
    gradients = []
    for model in (ours.train(), theirs.train()):
        model.zero_grad()
        run(model, case).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() >= gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@every_model
@pytest.mark.parametrize(
    "merge", [StochasticDepth(1.0, "batch"), StochasticDepth(1.0, "subset", "train"), Sum(), Swapout(1.0, 1.0)], ids=str
)
def test_keeping_everything_changes_nothing(case, merge):
    model, plain = build(case, drop=0.2), build(case, drop=0.2)
    names = [*model.state_dict()]
    apply_merge(model, CASES[case][3], merge, whole=True)
    assert [*model.state_dict()] == names
    equal_training(model, plain, case)


@every_model
@every_mode
@pytest.mark.parametrize("scale", ["test", "train"])
def test_dropping_everything_removes_the_blocks(case, mode, scale):
    model = build(case, drop=0.2)
    removed = shallow(model, case)
    apply_merge(model, CASES[case][3], StochasticDepth(0.0, mode, scale), whole=True)
    for training in (True, False):
        assert torch.equal(run(model.train(training), case), run(removed.train(training), case))
    run(model.train(), case).square().sum().backward()
    unused = {name for name, p in build_used(case).items() if p.grad is None}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in unused), name


def build_used(case):
    plain = build(case)
    run(plain.train(), case).square().sum().backward()
    return dict(plain.named_parameters())


class Reference(nn.Module):
    """``x + factor · F`` of a block, sample by sample; the factors are set by a test."""

    def __init__(self, block):
        super().__init__()
        self.block, self.factor = block, 1.0

    def forward(self, x, *args, **kwargs):
        output = self.block(x, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        merged = x + self.factor * (y - x)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged


def with_references(model, case):
    """Replace the merged blocks of a model by references; return these."""
    container, pattern = CASES[case][2:]
    layers = model.get_submodule(container)
    for number, layer in enumerate(layers):
        if Pattern(pattern).match(f"{container}.{number}") is not None:
            layers[number] = Reference(layer)
    return [layer for layer in layers if isinstance(layer, Reference)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "MobileNetV2"])  # batch norm mixes samples
@pytest.mark.parametrize("mode", ["row", "subset", "auto"])
@pytest.mark.parametrize("scale", ["test", "train"])
def test_samples_equal_a_loop_over_samples(case, mode, scale):
    model, plain = build(case).train(), build(case).train()
    references = with_references(plain, case)
    apply_merge(model, CASES[case][3], StochasticDepth(0.5, mode, scale), whole=True)
    for seed in range(2):
        merged = run(model, case, seed)
        torch.manual_seed(seed)
        masks = [keep_mask(0.5, (4,)) for _ in references]
        for sample in range(4):
            for reference, mask in zip(references, masks, strict=True):
                reference.factor = float(mask[sample]) * (1 if scale == "test" else 2)
            alone = run(plain, case, rows=[sample])
            length = int(PADDING[sample].sum()) if "attention_mask" in CASES[case][1] and case != "T5" else None
            torch.testing.assert_close(merged[[sample], :length], alone[:, :length], rtol=1e-9, atol=1e-10)


@every_model
def test_evaluation_takes_the_mean_or_the_plain_block(case):
    model, plain, mean = build(case).eval(), build(case).eval(), build(case).eval()
    for reference in with_references(mean, case):
        reference.factor = 0.7
    apply_merge(model, CASES[case][3], StochasticDepth(0.7, "batch", "train"), whole=True)
    assert torch.equal(run(model, case), run(plain, case))
    remove_merge(model)
    apply_merge(model, CASES[case][3], StochasticDepth(0.7, "batch", "test"), whole=True)
    torch.testing.assert_close(run(model, case), run(mean, case), rtol=1e-12, atol=1e-12)


def attributes(model):
    return [(type(module), sorted(module.__dict__), sorted(dir(module))) for module in model.modules()]


@every_model
def test_removal_restores_the_model(case):
    model, plain = build(case), build(case)
    for merge in (StochasticDepth(0.5), Swapout(0.5, 0.5)):
        count = apply_merge(model, CASES[case][3], merge, whole=True)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied.train(), case, 3), run(model.train(), case, 3))
            assert remove_merge(copied) == count
            assert attributes(copied) == attributes(plain)
        assert remove_merge(model) == count
        assert attributes(model) == attributes(plain)
    model.load_state_dict(plain.state_dict())
    equal_training(model, plain, case)


class Negative(Merge):
    """x − F."""

    def forward(self, x, branch):
        return x - branch()


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        (FeedForward(), lambda x, f: f),
        (SkipForward(1.0), lambda x, f: f),
        (Swapout(0.0, 1.0), lambda x, f: f),
        (Swapout(1.0, 0.0), lambda x, f: x),
        (Negative(), lambda x, f: x - f),
    ],
    ids=["feed-forward", "skip-forward", "swapout of the branch", "swapout of the shortcut", "negative"],
)
@pytest.mark.parametrize("training", [True, False])
def test_other_merges_take_the_output_minus_the_input(merge, expected, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=D, batch_first=True)).train(training)
    x = torch.randn(3, 5, 8, dtype=D, requires_grad=True)
    y = model(x)
    apply_merge(model, "0", merge, whole=True)
    merged = model(x)
    torch.testing.assert_close(merged, expected(x, y - x), rtol=1e-12, atol=1e-12)
    merged.square().sum().backward()
    assert x.grad is not None


def test_units_of_random_merges():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=D, batch_first=True))
    x = torch.randn(3, 5, 8, dtype=D)
    f = model(x) - x
    for merge, outcomes in ((SkipForward(0.5), [x, f]), (Swapout(0.5, 0.5), [x, f, x + f, 0 * x])):
        apply_merge(model, "0", merge, whole=True)
        merged = model(x)
        matches = torch.stack([(merged - outcome).abs() < 1e-12 for outcome in outcomes])
        assert bool(matches.any(0).all())
        assert all(bool(match.any()) for match in matches)
        remove_merge(model)


# what a skipped block returns, and what it leaves alone


class Layer(nn.Module):
    """A residual block with further arguments and outputs, as in older transformers."""

    def __init__(self, makes_bias=False):
        super().__init__()
        self.linear, self.norm, self.makes_bias = nn.Linear(4, 4), nn.BatchNorm1d(4), makes_bias

    def forward(self, hidden_states, bias=None, states=None, *, scale=1.0, tables=()):
        if self.makes_bias and bias is None:
            bias = hidden_states.mean()
        added = self.norm(self.linear(hidden_states)) * scale
        if states is not None:
            added = added + states
        for table in tables:
            added = added * table
        return hidden_states + nn.functional.dropout(added, 0.5, self.training), bias, None, 2


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, bias=None, **arguments):
        for layer in self.layers:
            x, bias, *further = layer(x, bias, **arguments)
        return x, bias, *further


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@every_mode
def test_a_skipped_block_leaves_everything_alone(mode):
    """Its first call, which finds out what it returns, is no exception."""
    model = Layers(Layer(), Layer())
    apply_merge(model, "layers.*", StochasticDepth(0.0, mode))
    buffers, state = [buffer.clone() for buffer in model.buffers()], torch.get_rng_state()
    states, bias = torch.randn(6, 4, requires_grad=True), torch.zeros((), requires_grad=True)
    state = torch.get_rng_state()
    x, passed, nothing, number = model(X, bias, states=states)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert torch.equal(x, X)
    assert (passed is bias, nothing, number) == (True, None, 2)
    x.sum().backward()
    for tensor in (*model.parameters(), states, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_the_first_call_of_a_kind_leaves_buffers_to_earlier_calls():
    """A block that is used twice in a step, with arguments of two kinds."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("scale", torch.full((4,), 2.0))

        def forward(self, x, twice=False):
            return (x + self.linear(x) * self.scale, twice)

    block = Scaled()
    apply_merge(nn.Sequential(block), "0", StochasticDepth(1 - 1e-12))
    block(block(X, twice=True)[0])[0].sum().backward()  # the backward pass reads the buffer of the first call
    assert bool(block.linear.weight.grad.any())


def test_outputs_follow_the_kind_of_arguments():
    """A block that has been called with a bias passes on that it has none, and the other way round."""
    model = Layers(Layer())
    apply_merge(model, "layers.*", StochasticDepth(0.0))
    bias = torch.zeros(())
    assert [model(X, given)[1] is given for given in (bias, None, bias, None)] == [True] * 4
    assert model(hidden_states := X, tables=[torch.ones(1, 4)])[0].equal(hidden_states)


class Returns(nn.Module):
    """A block that returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x, *further):
        return self.function(x + self.linear(x))


class Positioned(Returns):
    def forward(self, x, cache_position=None):
        return self.function(x + self.linear(x))


def test_positions_along_a_sequence_have_no_rows():
    model = nn.Sequential(Positioned(lambda y: y))
    apply_merge(model, "0", StochasticDepth(0.5, "subset"))
    for arguments in ([torch.arange(6)], [torch.arange(3)]):  # as many as samples, or not
        torch.manual_seed(0)
        rows = keep_mask(0.5, (6,)).unsqueeze(1)
        torch.manual_seed(0)
        expected = torch.where(rows, X + model[0].linear(X), X)
        torch.testing.assert_close(model[0](X, *arguments), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["row", "subset", "auto"])
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_samples_of_torchs_layers(layer, mode, batch_first):
    """Without ``batch_first`` they lie along the second dimension, and the first is the sequence."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(4, 2, 8, dropout=0.0, batch_first=batch_first, dtype=D))
    x = torch.randn(5, 5, 4, dtype=D)
    arguments = (x, x) if layer is nn.TransformerDecoderLayer else (x,)
    plain = model[0](*arguments)
    apply_merge(model, "0", StochasticDepth(0.5, mode), whole=True)
    if mode == "subset" and not batch_first:
        with pytest.raises(ConfigurationError, match=r"^mode='subset' .* 0 \(\w+\) along dim.*batch_first=True, or"):
            model[0](*arguments)
        return
    torch.manual_seed(1)
    out = model[0](*arguments)
    torch.manual_seed(1)
    mask = keep_mask(0.5, (5,))
    assert 0 < mask.sum() < 5
    expected = torch.where(mask.view(-1, 1, 1) if batch_first else mask.view(-1, 1), plain, x)
    torch.testing.assert_close(out, expected)


def test_a_hidden_state_given_by_name():
    block = nn.ModuleDict({"block": Layer()})
    apply_merge(block, "block", StochasticDepth(0.0))
    assert torch.equal(block["block"](bias=torch.ones(6, 4), hidden_states=X)[0], X)


@pytest.mark.parametrize("mode", ["batch", "subset"])
def test_what_only_the_block_computes_is_not_invented(mode):
    """The error comes in the first call, whatever the draw; masks and evaluation need nothing invented."""
    pattern = r"^layers\.0 \(Layer\) cannot be skipped, .* computes output 2 \(a tensor of shape \(\)\).*Leave it out of blocks"
    model = Layers(Layer(makes_bias=True), Layer())
    for layer in model.layers:
        layer.norm = nn.Identity()
    apply_merge(model, "layers.*", StochasticDepth(0.999, mode))
    with pytest.raises(ConfigurationError, match=pattern):
        model(X)
    assert model.eval()(X)[1] == X.mean()
    for blocks, other in (("layers.*", "row"), ("layers.*", "auto"), (["layers.*", "!layers.0"], mode)):
        remove_merge(model.train())
        apply_merge(model, blocks, StochasticDepth(0.5, other))
        assert model(X)[1] == X.mean()


def test_further_outputs_of_a_dropped_block_in_evaluation():
    model = Layers(Layer(makes_bias=True)).eval()
    apply_merge(model, "layers.*", StochasticDepth(0.0))
    x, bias, *_ = model(X)
    assert torch.equal(x, X)
    assert bias == X.mean()


def test_rows_of_nested_arguments():
    model, plain = Layers(Layer()).double(), Layers(Layer()).double()
    plain.load_state_dict(model.state_dict())
    plain.eval().layers[0].norm.eval()
    model.layers[0].eval()
    apply_merge(model, "layers.*", StochasticDepth(0.5, "subset"))
    model.layers[0].merge.train()
    x, states, tables = X.double(), torch.randn(6, 4, dtype=D), (torch.randn(6, 1, dtype=D), torch.randn(1, 4, dtype=D))
    torch.manual_seed(0)
    merged = model(x, states=states, tables=tables)[0]
    torch.manual_seed(0)
    mask = keep_mask(0.5, (6,)).unsqueeze(1)
    assert mask.any() and not mask.all()  # noqa: PT018
    expected = torch.where(mask, plain(x, states=states, tables=tables)[0], x)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


class Given(Returns):
    def forward(self, x=None, mask=None, layer_past=None):
        return self.function(x + self.linear(x))


@pytest.mark.parametrize(
    ("block", "arguments", "pattern"),
    [
        (
            lambda: Returns(lambda y: y[:, :2]),
            [X],
            r"^0 \(Returns\) maps \(6, 4\) to \(6, 2\): a merge needs a block that keeps",
        ),
        (
            lambda: Returns(lambda y: (y[:3], y)),
            [X],
            r"^0 \(Returns\) maps \(6, 4\) to \(3, 4\): .*Name only such blocks",
        ),
        (
            lambda: Returns(lambda y: {"y": y}),
            [X],
            r"^0 \(Returns\) returns a dict: a merge needs a block that returns a tensor",
        ),
        (lambda: Returns(lambda y: (None, y)), [X], r"^0 \(Returns\) returns a tuple"),
        (lambda: Given(lambda y: y), [], r"^0 \(Given\) is called without a tensor"),
        (lambda: Given(lambda y: y), [[X]], r"^0 \(Given\) is called without a tensor"),
        (
            lambda: Given(lambda y: y),
            [X, None, (X, X)],
            r"^0 \(Given\) is called with a filled cache, 'layer_past', in training mode.*Call model.eval\(\) to generate, "
            "or train with use_cache=False",
        ),
    ],
)
@every_mode
def test_blocks_that_are_none(mode, block, arguments, pattern):
    model = nn.Sequential(block())
    apply_merge(model, "0", StochasticDepth(0.5, mode))

    def calls():
        for _ in range(30):  # some of which skip the block
            model[0](*arguments)

    with pytest.raises(ConfigurationError, match=pattern):
        calls()


@pytest.mark.parametrize("block", [lambda: nn.Linear(4, 3), lambda: nn.Sequential(nn.Linear(4, 3))])
@every_mode
def test_a_block_that_is_skipped_at_once_must_keep_the_shape(mode, block):
    model = nn.Sequential(block())  # torch annotates that nn.Linear returns a tensor
    apply_merge(model, "0", StochasticDepth(0.0, mode))
    with pytest.raises(ConfigurationError, match=r"^0 \(\w+\) maps \(6, 4\) to \(6, 3\): .*Name only such blocks"):
        model(X)


class Declared(nn.Module):
    """Declares to return a tensor alone, and halves the length of its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[::2]


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["batch", "subset"])
@pytest.mark.parametrize("seed", range(3))
def test_a_skipped_block_of_another_shape_is_refused_at_once(mode, keep, seed):
    model = nn.Sequential(Declared())
    apply_merge(model, "0", StochasticDepth(keep, mode))
    torch.manual_seed(seed)
    with pytest.raises(ConfigurationError, match=r"^0 \(Declared\) maps \(6, 4\) to \(3, 4\): "):
        model(X)


class Sized(Returns):
    """Returns its hidden state and the sizes of its image, as multiscale vision transformers do."""

    def forward(self, x, sizes):
        return x + self.linear(x), self.function(sizes)


@pytest.mark.parametrize("sizes", [[3, 2], (3, 2)])
@pytest.mark.parametrize("mode", ["batch", "subset"])
def test_a_skipped_block_passes_on_equal_sizes(mode, sizes):
    model = nn.Sequential(
        Sized(lambda sizes: type(sizes)(sizes)), Sized(lambda sizes: type(sizes)(n // 2 for n in sizes))
    )
    apply_merge(model, "*", StochasticDepth(0.0, mode))
    x, passed = model[0](X, sizes)
    assert torch.equal(x, X)
    assert passed == sizes
    with pytest.raises(ConfigurationError, match=r"1 \(Sized\) cannot be skipped, since only it computes output 2"):
        model[1](X, sizes)


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [
        (
            torch.zeros(3, 4),
            r"mode='subset' cannot select samples of mask of 0 \(Given\), which has no row for each of 6",
        ),
        (torch.zeros(6, 6), "mode='subset' cannot select samples of mask of .*could be a mask for all samples"),
    ],
)
def test_arguments_without_rows(mask, pattern):
    model = nn.Sequential(Given(lambda y: y))
    apply_merge(model, "0", StochasticDepth(0.5, "subset"))
    with pytest.raises(ConfigurationError, match=pattern):
        model[0](X, mask)
    remove_merge(model)
    apply_merge(model, "0", StochasticDepth(0.5, "auto"))
    torch.manual_seed(0)
    rows = keep_mask(0.5, (6,)).unsqueeze(1)
    torch.manual_seed(0)
    assert torch.equal(model[0](X, mask), torch.where(rows, X + model[0].linear(X), X))


class Rotary(Returns):
    def forward(self, x, position_embeddings=(), states=None):
        return x + self.linear(x) * sum(position_embeddings, states)


def test_tables_of_positions_have_no_rows_by_chance():
    model, table = nn.Sequential(Rotary(None)), torch.ones(6, 4)
    apply_merge(model, "0", StochasticDepth(0.5, "subset"))
    model[0](X, (), table)
    with pytest.raises(
        ConfigurationError, match=r"position_embeddings of 0 \(Rotary\)\[0\], a table with a row for each"
    ):
        model[0](X, (table,), table)


# which dimension is that of samples


class Attends(nn.Module):
    """A block of sequences, whose samples lie along the given dimension."""

    def __init__(self, dim):
        super().__init__()
        self.linear, self.dim = nn.Linear(4, 4), dim

    def forward(self, x):
        return x + torch.tanh(self.linear(x).mean(1 - self.dim, keepdim=True))


class Packed(nn.Module):
    """A block of samples that lie one after the other, as in the vision towers of transformers."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return x + self.norm(self.linear(x)) + self.linear(x).mean(0)


SEQUENCE_FIRST = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    "decoder layer": lambda: nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0), 1),
    "recurrent": lambda: nn.GRU(4, 4),
}


@pytest.mark.parametrize("kind", SEQUENCE_FIRST)
@pytest.mark.parametrize("mode", ["row", "auto", "subset"])
@pytest.mark.filterwarnings("ignore:.*does not add its input:UserWarning")
def test_samples_of_torchs_layers_lie_along_the_second_dimension(kind, mode):
    torch.manual_seed(0)
    block, x = SEQUENCE_FIRST[kind](), torch.randn(5, 6, 4)
    further = (torch.randn(3, 6, 4),) if "decoder" in kind else ()
    outputs = block(x, *further)
    expected = outputs[0] if isinstance(outputs, tuple) else outputs
    model = nn.Sequential(block)
    apply_merge(model, "0", StochasticDepth(0.5, mode), whole=True)
    if mode == "subset":
        with pytest.raises(
            ConfigurationError, match=r"along dimension 1: .*batch_first=True, or use mode='row'|computes"
        ):
            model[0](x, *further)
        return
    torch.manual_seed(0)
    mask = keep_mask(0.5, (6,)).view(1, 6, 1)
    torch.manual_seed(0)
    merged = model[0](x, *further)
    torch.testing.assert_close(
        merged[0] if isinstance(merged, tuple) else merged, torch.where(mask, expected, x), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["row", "subset", "auto"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize(
    ("block", "shape", "depends"),
    [
        (lambda: Attends(1), (3, 6, 4), True),
        (lambda: Attends(0), (3, 6, 4), False),
        (lambda: Packed().eval(), (6, 4), True),
        (lambda: Packed(), (6, 4), False),  # batch normalisation mixes samples rightly
        (lambda: Attends(1), (1, 6, 4), False),
    ],
)
def test_a_notice_says_that_samples_depend_on_each_other(block, shape, depends, keep, mode):
    model, x = nn.Sequential(block(), block()), torch.randn(shape, requires_grad=True)
    apply_merge(model, "*", StochasticDepth(keep, mode))
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.train()
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        for layer in model:
            with suppress(ConfigurationError):  # too few samples for batch normalisation
                layer(x)
    messages = [str(notice.message) for notice in notices if "depends on other samples" in str(notice.message)]
    assert len(messages) == (depends and keep < 1)
    assert all(message.startswith("0 (") and "use mode='batch'" in message for message in messages)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.relu_()) + x


@pytest.mark.parametrize(
    ("merge", "training", "works"),
    [
        (StochasticDepth(0.5, "batch"), True, True),
        (StochasticDepth(0.5, "subset"), True, True),
        (StochasticDepth(0.5, "row"), True, False),
        (StochasticDepth(0.5, "row", "train"), True, False),
        (StochasticDepth(0.5, "batch", "test"), False, False),
        (StochasticDepth(0.5, "row", "train"), False, True),
        (Swapout(0.5, 0.5), True, False),
        (Sum(), True, True),
    ],
    ids=str,
)
def test_a_block_that_overwrites_its_input(merge, training, works):
    model = nn.Sequential(nn.Linear(4, 4), InPlace())
    x = model[0](X)
    expected = [model[1](x.clone()), x.clone()]
    apply_merge(model, "1", merge)
    model.train(training)
    torch.manual_seed(0)
    if works:
        out = model(X)
        assert all(
            any(map(torch.equal, row, rows))
            for row, rows in zip(out.unsqueeze(1).expand(6, 2, 4), zip(*expected, strict=True), strict=True)
        )
    else:
        with pytest.raises(
            ConfigurationError, match=r"^1 \(InPlace\) overwrites its input, which the merge needs afterwards"
        ):
            model(X)


class Reversible(nn.Linear):
    """A block whose model calls another method in the backward pass, as Reformer does."""

    def backward_pass(self, y):
        return y


def patched(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("blocks", "pattern"),
    [
        ("list", r"blocks: the ModuleList 'list' has no forward: name the blocks within it"),
        ("dict", r"blocks: the ModuleDict 'dict' has no forward"),
        ("list.1", r"blocks: the ReLU 'list\.1' has no parameters, so that there is nothing to skip"),
        ("**", r"blocks: the ModuleList 'list' has no forward"),
        (1, r"blocks must be a pattern of module names, or several, not 1"),
        (["stage", 1], r"blocks must be a pattern of module names, or several, not \['stage', 1\]"),
        (
            ["stage", "stage.0"],
            r"blocks: the Linear 'stage\.0' lies within 'stage', which matches, too: name one of them",
        ),
        ("patched", r"blocks: the Linear 'patched' has a patched forward, which is not that of its class"),
        (
            "reversible",
            r"blocks: the Reversible 'reversible' is reversible, and computes its gradients without a merge",
        ),
    ],
)
def test_modules_that_are_no_blocks(blocks, pattern):
    model = nn.Module()
    model.list, model.dict = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]), nn.ModuleDict()
    model.stage, model.patched = nn.Sequential(nn.Linear(4, 4)), patched(nn.Linear(4, 4))
    model.reversible = Reversible(4, 4)
    before = attributes(model)
    with pytest.raises(ConfigurationError, match=pattern):
        apply_merge(model, blocks, StochasticDepth(0.5))
    assert attributes(model) == before


# modules that drop paths already


def drops(rates):
    """Convolutional blocks of torchvision that drop their branch at these rates."""
    torch.manual_seed(0)
    return nn.Sequential(*(CNBlock(4, 1.0, rate) for rate in rates))


FEATURES = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("whole", [True, False])
def test_drop_paths_are_taken_over(whole):
    model, plain = drops([0.0, 0.2, 0.4]), drops([0.0, 0.0, 0.0])
    before = attributes(model)
    apply_merge(model, "*", StochasticDepth(0.5, "row"), keep="model", whole=whole)
    assert [block.merge.keep for block in model] == [1.0, 0.8, 0.6]
    for block in model:
        block.merge.keep = 1.0
    assert torch.equal(model(FEATURES), plain(FEATURES))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert remove_merge(copied) == 3
        assert attributes(copied) == before
    outputs = []
    for restored in (model, drops([0.0, 0.2, 0.4])):
        torch.manual_seed(0)
        outputs.append(restored(FEATURES))
    assert torch.equal(*outputs)


def test_a_notice_names_the_drop_paths():
    pattern = r"^2 DropPath or StochasticDepth modules in the blocks, with drop probabilities from 0\.2 to 0\.4, return their input"
    with pytest.warns(UserWarning, match=pattern):
        apply_merge(drops([0.0, 0.2, 0.4]), "*", StochasticDepth(0.5))
    apply_merge(drops([0.0, 0.0]), "*", StochasticDepth(0.5))  # without a notice


def test_drop_paths_of_timm_and_transformers():
    config = transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 2], num_stages=2, drop_path_rate=0.3)
    models = {
        "blocks": timm.create_model("test_vit2", drop_path_rate=0.3),
        "encoder.stages.1.layers": transformers.ConvNextModel(config),
    }
    for blocks, model in models.items():
        apply_merge(model, f"{blocks}.*", StochasticDepth(0.5), keep="model", whole=True)
        assert [*model.get_submodule(blocks)][-1].merge.keep == pytest.approx(0.7)


def test_a_model_without_rates():
    with pytest.warns(UserWarning, match=r"^keep='model' found no DropPath .*: set the model's own rate"):
        apply_merge(drops([0.0, 0.0]), "*", StochasticDepth(0.5), keep="model")


def test_a_model_of_several_rates():
    pattern = (
        "keep='model': '0' contains DropPath or StochasticDepth modules with the drop probabilities 0.2, 0.4: name the"
    )
    with pytest.raises(ConfigurationError, match=pattern):
        apply_merge(nn.Sequential(drops([0.2, 0.4])), "0", StochasticDepth(0.5), keep="model")


# whether a block is residual


def test_a_notice_names_the_first_block_that_adds_no_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Residual(nn.Linear(4, 4)))
    apply_merge(model, "*", StochasticDepth(1.0))
    model.eval()(X)
    with pytest.warns(
        UserWarning, match=r"^0 \(Linear\) does not add its input to its output.*name other blocks"
    ) as notices:
        model.train()(X)
    assert len(notices) == 1
    model(X)


@every_model
def test_residual_blocks_of_others_need_no_notice(case):
    model = build(case)
    apply_merge(model, CASES[case][3], Sum(), whole=True)
    run(model, case)  # warnings are errors


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16])
def test_a_sum_in_another_dtype_needs_no_notice(convert):
    """As in Mamba, which adds in float32."""

    class Block(nn.Linear):
        def forward(self, x):
            return (super().forward(x).float() + x.to(torch.float32)).to(x.dtype)

    model = convert(nn.Sequential(Block(4, 4)))
    apply_merge(model, "0", Sum())
    model(X.to(model[0].weight.dtype))  # warnings are errors


# blocks of every kind of class


def test_a_sequence_of_layers_is_a_block():
    model = nn.Sequential(drops([0.0, 0.0]), drops([0.0]))
    x = model[1](FEATURES)
    apply_merge(model, "1", StochasticDepth(1.0))
    assert torch.equal(model[1](FEATURES), x)
    assert (len(model[1]), type(model[1][0]), [*model[1]]) == (1, CNBlock, [model[1][-1]])
    assert torch.equal(model[1][:1](FEATURES), x)
    remove_merge(model)
    assert type(model[1]) is nn.Sequential


class Stacked(nn.ModuleDict):
    def forward(self, x):
        out = x
        for name, layer in self.items():
            out = layer(out) if name in self.keys() else out  # the keys are asked
        return x + len(self) * out * len([*self.values()])


class Doubled(nn.ModuleList):
    def forward(self, x):
        return x + len(self) * self[-1](sum(layer(x) for layer in self))


ACTIVATION = nn.Tanh()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "block",
    [
        nn.Sequential(nn.Linear(4, 4), ACTIVATION, nn.Linear(4, 4), ACTIVATION),
        Doubled([nn.Linear(4, 4), ACTIVATION, ACTIVATION]),
        Stacked({"linear": nn.Linear(4, 4), "first": ACTIVATION, "second": ACTIVATION}),
    ],
    ids=lambda block: type(block).__name__,
)
def test_a_block_that_iterates_over_its_layers_finds_all_of_them_and_no_merge(block, whole):
    model = nn.Sequential(copy.deepcopy(block))
    layers, expected = [*model[0]], model(X)
    apply_merge(model, "0", Sum(), whole=whole)
    with pytest.warns(UserWarning, match="does not add its input") if type(block) is nn.Sequential else nullcontext():
        assert torch.equal(model(X), expected)
    assert torch.equal(torch.export.export(model.eval(), (X,)).module()(X), expected)
    assert [*model[0]] == layers
    assert len(model[0]) == len(layers)
    remove_merge(model)
    assert type(model[0]) is type(block)


def test_a_block_that_calls_all_its_children():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            out = x
            for layer in self.children():
                out = layer(out)
            return x + out

    model = nn.Sequential(Block())
    apply_merge(model, "0", Sum())
    with pytest.raises(ConfigurationError, match=r"^Sum is called without a branch\. .* or those of an nn\.ModuleList"):
        model(X)


def test_a_block_of_another_metaclass():
    class Meta(type):
        pass

    class Block(Layer, metaclass=Meta):
        pass

    model = Layers(Block())
    apply_merge(model, "layers.*", StochasticDepth(0.0))
    assert torch.equal(copy.deepcopy(model)(X)[0], X)
    remove_merge(model)
    assert type(model.layers[0]) is Block


def test_a_block_with_another_merge_keeps_it():
    class Block(Layer):
        merge = "concatenation"

    model = Layers(Block())
    apply_merge(model, "layers.*", StochasticDepth(0.0))
    assert (model.layers[0].merge, model.layers[0].block_merge.keep) == ("concatenation", 0.0)
    assert torch.equal(model(X)[0], X)
    assert remove_merge(model) == 1
    assert not hasattr(model.layers[0], "block_merge")


@pytest.mark.parametrize("first", ["merge", "weights"])
def test_blocks_with_computed_weights(first):
    """A block whose weight is computed has a generated class already, or gets it later."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    steps = [
        lambda: apply_merge(model, "0", StochasticDepth(0.0)),
        lambda: lower_rank(model, ["0.weight"], 4),
    ]
    for step in steps if first == "merge" else steps[::-1]:
        step()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), other[1](X))
        remove_merge(other)
        assert not hasattr(other[0], "merge")
        torch.testing.assert_close(other(X), plain(X))
        assert other[0].weight.shape == (4, 4)
        assert sorted(other.state_dict()) == [
            "0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "1.bias", "1.weight"
        ]  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
def test_a_merge_below_another_class_is_not_removed(whole):
    """As fully_shard makes one; a block with a merge of its own has kept its class."""

    class Sharded(nn.Module):
        pass

    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, norm_first=True), Residual(nn.Linear(4, 4)))
    apply_merge(model, "0", StochasticDepth(0.0), whole=whole)
    apply_merge(model, "1", StochasticDepth(0.0))
    for block in model:
        swap_class(block, type(f"Sharded{type(block).__name__}", (Sharded, type(block)), {}))
    with pytest.raises(
        ConfigurationError, match=r"class of '0' has changed to ShardedMerged\w+ after .*before .* such as fully_shard"
    ):
        remove_merge(model)
    assert torch.equal(model(X), X)
    del model[0]
    assert remove_merge(model) == 1
    assert (type(model[0].merge), type(model[0]).__name__) == (Sum, "ShardedResidual")


def test_isinstance_and_hooks_see_the_plain_block():
    model, calls = drops([0.0]), []
    model[0].register_forward_hook(lambda module, args, output: calls.append(output.shape))
    apply_merge(model, "*", StochasticDepth(0.0))
    assert isinstance(model[0], CNBlock)
    model(FEATURES)
    assert calls == [FEATURES.shape]


# transforms of libraries


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [({"output_router_logits": True}, "router_logits"), ({"output_attentions": True}, "attentions")],
)
def test_what_transformers_records_within_blocks_is_of_all_samples(asked, recorded):
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    apply_merge(model, "model.layers.*", StochasticDepth(0.5, "auto"))
    output = model(**TEXT, labels=TOKENS, **asked)
    assert all(len(tensor) in (4, 24) for tensor in output[recorded])
    output.loss.backward()
    remove_merge(model)
    apply_merge(model, "model.layers.*", StochasticDepth(0.5, "subset"))
    model(**TEXT, labels=TOKENS).loss.backward()
    with pytest.raises(ConfigurationError, match=rf"cannot select samples of .* while transformers records {recorded}"):
        model(**TEXT, labels=TOKENS, **asked)


@pytest.mark.parametrize("case", ["GPT2", "T5", "BERT"])
@every_mode
def test_gradient_checkpointing_changes_nothing(case, mode):
    results = []
    for checkpointing in (False, True):
        model = build(case, drop=0.1)
        apply_merge(model, CASES[case][3], StochasticDepth(0.5, mode))
        if checkpointing:
            model.activation_checkpointing_enable()
        run(model.train(), case).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_of_timm():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_vit2", img_size=32)
        apply_merge(model, "blocks.*", StochasticDepth(0.5), whole=True)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(IMAGES.float()).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_caches():
    """An empty one, which the model makes, passes; a filled one is refused in training, and serves to generate."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2(0.0).config)
    plain = copy.deepcopy(model).eval()
    apply_merge(model, "transformer.h.*", StochasticDepth(0.5, "batch", "train"))
    cache = model(TOKENS, use_cache=True)[1]
    while cache.get_seq_length() == 0:
        cache = model(TOKENS, use_cache=True)[1]
    argument = "'(past_key_values|cache)'"  # until transformers 5.23, and from 5.24 on
    pattern = rf"^transformer\.h\.0 \(GPT2Block\) is called with a filled cache, {argument}, in training mode"
    with pytest.raises(ConfigurationError, match=pattern):
        model(TOKENS[:, :2], cache)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(TOKENS, **options), plain.generate(TOKENS, **options))


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_generation_with_the_mean_of_blocks_needs_their_caches(keep):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2(0.0).config).eval()
    apply_merge(model, "transformer.h.*", StochasticDepth(keep))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(TOKENS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_autocast_finds_gradients_after_the_first_call():
    model = Layers(Layer(), Layer())
    apply_merge(model, "layers.*", StochasticDepth(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        model(X)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("mode", ["batch", "row", pytest.param("subset", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [pytest.param("Llama", marks=pytest.mark.slow), "ConvNeXt"])
def test_compiled_blocks_draw_anew(case, mode):
    model = build(case).train()
    apply_merge(model, CASES[case][3], StochasticDepth(0.5, mode), whole=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    outputs = [run(compiled, case, seed) for seed in range(6)]
    outputs[0].square().sum().backward()
    if mode == "batch":
        assert all(torch.equal(output, run(model, case, seed)) for seed, output in enumerate(outputs))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 2


@pytest.mark.parametrize("scale", ["test", pytest.param("train", marks=pytest.mark.slow)])
@every_model
def test_exports_in_evaluation(case, scale):
    model = build(case).eval()
    apply_merge(model, CASES[case][3], StochasticDepth(0.5, "batch", scale), whole=True)
    inputs = {**CASES[case][1], **({"use_cache": False} if case in ("GPT2", "Llama", "T5") else {})}
    output = torch.export.export(model, (), inputs).module()(**inputs)
    assert torch.equal(output if isinstance(output, torch.Tensor) else output[0], run(model, case))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", ["ConvNeXt", "MobileNetV2"])
def test_graphs(case):
    model = build(case)
    apply_merge(model, CASES[case][3], StochasticDepth(0.5, "row"), whole=True)
    graph = torch.fx.symbolic_trace(model)
    assert [
        node
        for node in graph.graph.nodes
        if node.target == CASES[case][3].replace("{1..2}", "1").replace("{3..4}", "3")
    ]
    assert torch.equal(run(graph, case), run(model, case))
    assert torch.equal(torch.jit.trace(model.eval(), (IMAGES,))(IMAGES), model(IMAGES))
