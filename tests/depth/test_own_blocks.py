"""Blocks of users, which call a merge in their forward: every form of the call, with every merge and mode."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.utils.checkpoint import checkpoint

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
from tying.depth.draws import draw, keep_mask
from tying.depth.merge import Branch

D = torch.float64
SAMPLES, WIDTH = 6, 5


class Gated(nn.Module):
    """A branch with a further argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, gate=None):
        f = self.linear(x).tanh()
        return f if gate is None else f * gate


class OwnBlock(nn.Module):
    """A block in two lines: the merge is a sum until another one is put in its place."""

    def __init__(self):
        super().__init__()
        self.branch = Gated()
        self.merge = Sum()


class CallsFunction(OwnBlock):
    def forward(self, x, gate=None):
        return self.merge(x, lambda: self.branch(x, gate))


class CallsModule(OwnBlock):
    def forward(self, x, gate=None):
        return self.merge(x, self.branch, gate)


class CallsBranch(OwnBlock):
    def forward(self, x, gate=None):
        return self.merge(x, Branch(self.branch, [(x, 0), (gate, 0)], [self.branch]))


class CallsOutput(OwnBlock):
    def forward(self, x, gate=None):
        return self.merge(x, self.branch(x, gate))


FORMS = {
    "function": CallsFunction,
    "module": CallsModule,
    "branch": CallsBranch,
    "output": CallsOutput,
    "Residual": lambda: Residual(Gated()),
}
every_form = pytest.mark.parametrize("form", FORMS)
MERGES = [
    Sum(),
    FeedForward(),
    *(StochasticDepth(0.5, mode, scale) for mode in ("batch", "row", "subset", "auto") for scale in ("test", "train")),
    StochasticDepth(0.0),
    StochasticDepth(1.0, "subset"),
    Swapout(0.5, 0.7),
    Swapout(0.5, 0.0),
    SkipForward(0.5),
]
every_merge = pytest.mark.parametrize("merge", MERGES, ids=repr)


def made(form, merge=None):
    torch.manual_seed(0)
    model = nn.Sequential(FORMS[form]()).to(D)
    if merge is not None:
        assert apply_merge(model, "0", merge) == 1
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SAMPLES, WIDTH, dtype=D, generator=generator).requires_grad_() for _ in range(2)]


def at(seed, function, *arguments):
    torch.manual_seed(seed)
    return function(*arguments)


def reference(merge, x, f):
    """What a merge returns in training, written out; it draws as the merge does."""
    if isinstance(merge, StochasticDepth):
        if merge.keep in (0, 1):
            return x + merge.keep * f
        factor = 1 / merge.keep if merge.scale == "train" else 1
        kept = draw(merge.keep) if merge.mode == "batch" else keep_mask(merge.keep, (len(x),))[:, None]
        return x + factor * kept * f
    if isinstance(merge, Swapout):
        skip = keep_mask(merge.keep_skip, x.shape)
        return skip * x + keep_mask(merge.keep_branch, x.shape) * f
    if isinstance(merge, SkipForward):
        return torch.where(keep_mask(merge.keep, x.shape), f, x)
    return f if isinstance(merge, FeedForward) else x + f


def gradients(out, model, *tensors):
    """The gradients of the tensors and of all weights; None where there is none."""
    model.zero_grad()
    for tensor in tensors:
        tensor.grad = None
    out.square().sum().backward()
    return [tensor.grad for tensor in (*tensors, *model.parameters())]


@every_form
@every_merge
@pytest.mark.parametrize("gated", [True, False])
def test_each_form_merges_as_the_formula_says(form, merge, gated):
    model, (x, gate) = made(form, merge), inputs()
    arguments = [gate] if gated else []
    if form == "function" and getattr(merge, "mode", "") == "subset" and merge.keep == 0.5:
        with pytest.raises(ConfigurationError, match="which a function cannot"):
            model[0](x, *arguments)
        return
    for seed in range(4):
        out = at(seed, model[0], x, *arguments)
        ours = gradients(out, model, x, *arguments)
        expected = at(seed, reference, merge, x, model[0].branch(x, *arguments))
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        for gradient, other in zip(ours, gradients(expected, model, x, *arguments), strict=True):
            if form != "function" or gradient is not None:  # a function does not say which tensors it reads
                torch.testing.assert_close(gradient, other, rtol=1e-13, atol=1e-13)
    assert all(weight.grad is not None for weight in model.parameters())


@every_form
def test_what_is_skipped_has_a_zero_gradient(form):
    model, (x, gate) = made(form, StochasticDepth(0.0)), inputs()
    out = model[0](x, gate)
    assert torch.equal(out, x)
    first, second, *weights = gradients(out, model, x, gate)
    assert torch.equal(first, 2 * x)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in weights)
    if form != "function":
        assert torch.equal(second, torch.zeros_like(gate))


@every_form
@every_merge
def test_removal_is_bitwise(form, merge):
    (model, plain), (x, gate) = (made(form, merge), made(form)), inputs()
    assert [*model.state_dict()] == [*plain.state_dict()]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert remove_merge(copied) == 1
        assert type(copied[0].merge) is Sum
        assert torch.equal(copied[0](x, gate), plain[0](x, gate))


def test_copies_give_zero_gradients_to_their_own_weights():
    model, (x, _) = made("function", StochasticDepth(0.0)), inputs()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(x).sum().backward()
        assert all(not weight.grad.any() for weight in copied.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    merge = model[0].merge.with_keep(0.0)  # still the same block's
    merge(x, lambda: x).sum().backward()
    assert all(not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_merge_of_another_model_comes_without_its_block(keep, whole):
    source, model = made("function", StochasticDepth(0.5)), made("function")
    size = len(pickle.dumps(model))
    apply_merge(model, "0", StochasticDepth(0.5), keep, whole)
    merged = len(pickle.dumps(model))
    remove_merge(model)
    assert len(pickle.dumps(model)) == size
    apply_merge(model, "0", source[0].merge, keep, whole)
    assert len(pickle.dumps(model)) == merged


class TwoBranches(nn.Module):
    """Attention and a feed-forward layer, each with its merge, or both with one."""

    def __init__(self, shared):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.feed_forward = nn.LayerNorm(4), nn.Linear(4, 4)
        self.merge = Sum()
        self.second = self.merge if shared else Sum()

    def forward(self, x, padding=None):
        x = self.merge(x, lambda: self.attention(x, x, x, key_padding_mask=padding)[0])
        return self.second(x, lambda: self.feed_forward(self.norm(x)))


@pytest.mark.parametrize("shared", [True, False])
def test_each_branch_of_a_block_draws(shared):
    torch.manual_seed(0)
    model, x = nn.Sequential(TwoBranches(shared)), torch.randn(3, 5, 4)
    apply_merge(model, "0", StochasticDepth(0.5))
    outs = {tuple(at(seed, model, x).flatten().tolist()) for seed in range(24)}
    assert len(outs) == 4
    assert remove_merge(model) == 1
    assert type(model[0].merge) is type(model[0].second) is Sum
    assert (model[0].merge is model[0].second) == shared


def test_a_merge_of_ones_own_takes_every_form():
    class Average(Merge):
        def forward(self, x, branch):
            return (x + branch()) / 2

    x, gate = inputs()
    for form in FORMS:
        model = made(form, Average())
        assert torch.equal(model[0](x, gate), (x + model[0].branch(x, gate)) / 2)


def test_samples_along_another_dimension():
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 3), torch.randn(4, 6, 3)
    for merge in (StochasticDepth(0.5, "row"), StochasticDepth(0.5, "subset")):
        mask = at(1, keep_mask, 0.5, (6,))
        expected = x + mask[None, :, None] * linear(x)
        torch.testing.assert_close(at(1, lambda merge=merge: merge(x, linear, dim=1)), expected)
    row = StochasticDepth(0.5, "row")
    for branch in (lambda: linear(x), linear(x)):
        torch.testing.assert_close(at(1, lambda branch=branch: row(x, branch, dim=1)), expected)


# arguments for some samples


class Scaled(nn.Module):
    """A branch that takes the mean of all samples from its further arguments."""

    def forward(self, x, scale=None, scales=None):
        return x * (scales["first"] if scale is None else scale).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda merge, x, scale: merge(x, Scaled(), scale[:3]),
            r"argument 2 of Scaled, which has no row for each of 6 samples, of shape \(3, 5\): give it a first dimension "
            "of 6, or of 1 if all samples share it, or use mode='row'",
        ),
        (
            lambda merge, x, scale: Residual(Scaled(), merge=merge)(x, scales={"first": scale[:2]}),
            r"argument 'scales' of Scaled\['first'\], which has no row for each of 6 samples, of shape \(2, 5\)",
        ),
        (
            lambda merge, x, scale: merge(x, Scaled(), scale[:, :1].expand(6, 6)),
            r"argument 2 of Scaled, which could be a mask for all samples, of shape \(6, 6\)",
        ),
        (
            lambda merge, x, scale: merge(x, lambda: x * scale),
            r"needs a branch .* pass the module and its further arguments, as in self\.merge\(x, self\.branch, mask\)",
        ),
    ],
    ids=["position", "keyword", "square", "function"],
)
def test_subset_refuses_what_has_no_rows(call, message):
    x, scale = inputs()
    with pytest.raises(ConfigurationError, match=message):
        call(StochasticDepth(0.5, "subset"), x, scale)
    auto, row = (at(0, call, StochasticDepth(0.5, mode), x, scale) for mode in ("auto", "row"))
    assert torch.equal(auto, row)
    assert torch.equal(
        call(StochasticDepth(0.5, "subset").eval(), x, scale), call(StochasticDepth(0.5, "row").eval(), x, scale)
    )


def test_arguments_go_to_modules_alone():
    x, gate = inputs()
    with pytest.raises(ConfigurationError, match=r"Sum passes further arguments to a module, not to a function: write"):
        Sum()(x, lambda: x, gate)
    with pytest.raises(ConfigurationError, match="not to a Tensor"):
        Sum()(x, x, gate)


def test_a_branch_returns_a_tensor():
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
    for merge in (Sum(), StochasticDepth(0.5, "row"), Swapout(0.5, 0.5)):
        with pytest.raises(ConfigurationError, match="a branch that returns a tensor, not a tuple: pass merge"):
            merge(x, attention, x, x)
        assert merge(x, lambda: attention(x, x, x)[0]).shape == x.shape


# in the company of torch


@every_form
@pytest.mark.parametrize("merge", [StochasticDepth(0.5), StochasticDepth(0.5, "row"), Swapout(0.5, 0.5)], ids=repr)
def test_checkpointing_draws_the_same(form, merge):
    results = []
    for saved in (False, True):
        model, (x, gate) = made(form, merge), inputs()
        out = at(3, lambda: checkpoint(model[0], x, gate, use_reentrant=False) if saved else model[0](x, gate))  # noqa: B023
        results.append(gradients(out, model, x, *([gate] if form != "function" else [])))
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


@every_form
def test_own_blocks_are_compiled(form):
    torch._dynamo.reset()
    model, (x, gate) = made(form, StochasticDepth(0.5, "row")), [tensor.detach() for tensor in inputs()]
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    outs = [compiled(x, gate) for _ in range(6)]
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 1
    torch._dynamo.reset()
    model = made(form, StochasticDepth(0.0))
    compiled = torch.compile(model[0], backend="aot_eager")
    compiled(x, gate).sum().backward()
    assert all(not weight.grad.any() for weight in model.parameters())


@every_form
def test_own_blocks_are_exported(form):
    x, gate = (tensor.detach() for tensor in inputs())
    for merge in (StochasticDepth(0.5, "subset"), Swapout(0.5, 0.5)):
        block = made(form, merge)[0].eval()
        assert torch.equal(torch.export.export(block, (x, gate)).module()(x, gate), block(x, gate))


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, gate):
        return self.block(x, gate)


@every_form
@every_merge
def test_graphs_record_a_merge_as_one_node(form, merge):
    x, gate = (tensor.detach() for tensor in inputs())
    block = made(form, merge)[0]
    traced = symbolic_trace(Wrapped(block))
    assert [str(node.target) for node in traced.graph.nodes].count("block.merge") == merge.draws
    assert torch.equal(traced.eval()(x, gate), block.eval()(x, gate))
    out, f = at(3, traced.train(), x, gate), block.branch(x, gate)
    torch.testing.assert_close(out, at(3, reference, merge, x, f), rtol=1e-13, atol=1e-13)


def test_a_residual_traced_alone_takes_no_arguments():
    traced, (x, gate) = symbolic_trace(made("Residual")[0]), inputs()
    assert torch.equal(traced(x), made("Residual")[0](x))
    with pytest.raises(ConfigurationError, match="this graph of a Residual takes only x: trace the model"):
        traced(x, gate)
