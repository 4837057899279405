"""Relaxed ties: every layer is the shared weight and a residual, from a hard tie to separate weights."""

import copy
import logging
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from tying.errors import ConfigurationError, NonFiniteError
from tying.hard import (
    DiagonalResidual,
    LowRankResidual,
    ScaleResidual,
    WeightResidual,
    audit,
    bake,
    harden,
    load_plain,
    lower_rank,
    relax,
    relaxed,
    set_residual_factor,
    share_templates,
    tie,
    tied,
)
from tying.hard.relaxed import RelaxedLinear
from tying.hard.shared_part import nearest_shared_part
from tying.selection.relation import Relation
from tying.weights.derived import plain_class, remove

D = torch.float64
RESIDUALS = {
    "low rank": LowRankResidual(2),
    "low rank and scale": LowRankResidual(2, scale=True),
    "diagonal": DiagonalResidual(),
    "scale": ScaleResidual(),
}


def linear(dtype=D, count=4, size=8):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size, dtype=dtype) for _ in range(count)))


def stack(dtype=D):
    """Linear layers whose shapes are transposed of one another."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 6, dtype=dtype), nn.Linear(6, 8, dtype=dtype))


def kernels(dtype=D, kind=nn.Conv2d):
    torch.manual_seed(0)
    return nn.Sequential(*(kind(4, 4, 3, padding=1, dtype=dtype) for _ in range(3)))


CASES = {
    "linear": (linear, ["*.weight"], (5, 8)),
    "modules": (linear, ["{0..2}"], (5, 8)),
    "transposed": (stack, ["0.weight ~ 1.weight | o i -> i o", "0.weight ~ 2.weight"], (5, 6)),
    "kernels": (kernels, ["*.weight"], (2, 4, 5, 5)),
    "turned kernels": (kernels, ["0.weight ~ {1..2}.weight | o i h w -> i o w h"], (2, 4, 5, 5)),
}


def batch_of(case, dtype=D):
    return torch.randn(CASES[case][2], generator=torch.Generator().manual_seed(1), dtype=dtype)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def train(model, x, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def assert_same(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    gradients = [[p.grad for p in model.parameters()] for model in (first, second)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("init", "value"), [("nearest", "mean"), ("source", "source")])
@pytest.mark.parametrize("case", CASES)
def test_without_a_residual_it_is_the_hard_tie(case, init, value):
    make, ties, _ = CASES[case]
    model, hard = make(), make()
    groups, expected = relax(model, ties, init=init), tie(hard, ties, init=value)
    assert [group.names for group in groups] == [group.names for group in expected]
    optimizers = [train(net, batch_of(case)) for net in (model, hard)]
    assert_same(model, hard)
    states = [[value for state in o.state.values() for value in state.values()] for o in optimizers]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_residual_of_full_rank_is_the_untied_model(case):
    make, ties, _ = CASES[case]
    for dtype, tolerance in ((D, 1e-12), (torch.float32, 1e-6)):
        model, plain = make(dtype), make(dtype)
        rank = min(plain[0].weight.flatten(1).shape)
        relax(model, ties, LowRankResidual(rank))
        for layer, other in zip(model, plain, strict=True):
            torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=tolerance)
        torch.testing.assert_close(model(batch_of(case, dtype)), plain(batch_of(case, dtype)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("residual", [r for name, r in RESIDUALS.items() if name != "diagonal"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_equation(case, residual):
    make, ties, _ = CASES[case]
    model, plain = make(), make()
    [group] = relax(model, ties, residual)
    shapes = [plain.get_parameter(name).flatten(1).shape for name in group.names]
    rank, scale = (residual.rank, residual.scale) if isinstance(residual, LowRankResidual) else (0, True)
    others = sum(p.numel() for name, p in plain.named_parameters() if name not in group.names)
    assert count(model) == others + math.prod(shapes[0]) + sum(rank * sum(shape) + scale * shape[0] for shape in shapes)


def test_a_diagonal_adds_a_side_for_each_layer():
    model = linear()
    relax(model, ["*.weight"], DiagonalResidual())
    assert count(model) == 8 * 8 + 4 * 8 + 4 * 8


def by_loop(residual, shared, factor, parameters):
    """The equations, entry by entry."""
    weight = shared.clone()
    for o in range(shared.shape[0]):
        for i in range(shared.shape[1]):
            if isinstance(residual, LowRankResidual):
                left, right, *scale = parameters
                weight[o, i] += factor * sum(left[o, k] * right[k, i] for k in range(residual.rank))
                if scale:
                    weight[o, i] *= 1 + factor * scale[0][o]
            elif isinstance(residual, ScaleResidual):
                weight[o, i] *= 1 + factor * parameters[0][o]
            elif o == i:
                weight[o, i] += factor * parameters[0][o]
    return weight


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_weights_by_a_slow_loop(residual, factor):
    model, x = linear(), torch.randn(5, 8, dtype=D)
    [group] = relax(model, ["*.weight"], residual)
    set_residual_factor(group, factor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    y = x
    for layer, parameters in zip(model, group.residuals, strict=True):
        weight = by_loop(residual, group.parameters[0].detach(), factor, [p.detach() for p in parameters])
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12)
        y = F.linear(y, weight, layer.bias)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-9)
    assert all(torch.equal(layer.weight, group.parameters[0]) for layer in model) or factor


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_residuals_begin_at_zero_from_the_source(residual):
    """Then the model is the hard tie of the source's values, and its residuals can leave zero."""
    model, hard, x = linear(), linear(), torch.randn(200, 8, dtype=D)
    [group] = relax(model, ["*.weight"], residual, init="source")
    tie(hard, ["*.weight"])
    assert all(torch.equal(layer.weight, hard[0].weight) for layer in model)
    assert group.distances() == dict.fromkeys(group.names, 0.0)
    assert torch.equal(model(x), hard(x))
    for net in (model, hard):
        net(x).square().sum().backward()
    assert torch.equal(group.parameters[0].grad, hard[0].weight.grad)
    train(model, x, steps=1)
    assert min(group.distances().values()) > 0


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_the_nearest_residuals(residual):
    """No residual nearby is nearer to a layer's weight: the best of a convex problem, or of the truncated SVD."""
    model, plain = linear(), linear()
    [group] = relax(model, ["*.weight"], residual)
    weights = torch.stack([layer.weight.detach() for layer in plain])
    assert torch.equal(group.parameters[0], weights.mean(dim=0))
    for layer, weight in zip(model, weights, strict=True):
        error = float((layer.weight - weight).detach().norm())
        if isinstance(residual, LowRankResidual):
            assert error == pytest.approx(float(torch.linalg.svdvals(weight - weights.mean(dim=0))[2:].norm()))
        parameters = list(layer.parametrizations.weight.parameters(recurse=False))
        for _ in range(20):
            moved = [
                p + 1e-3 * torch.randn_like(p) for p in parameters[: 2 if residual == RESIDUALS["low rank"] else 1]
            ]
            changed = layer.parametrizations.weight[0](*moved, *parameters[len(moved) :])
            assert float((changed - weight).detach().norm()) >= error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("residual", [LowRankResidual(2), LowRankResidual(1, scale=True), ScaleResidual()], ids=str)
def test_hardening_is_the_hard_tie(case, residual):
    make, ties, _ = CASES[case]
    ties = ties if case != "modules" else ["{0..2}.weight"]  # biases stay separate
    model, hard, x = make(), make(), batch_of(case)
    [group] = relax(model, ties, residual)
    optimizer = train(model, x)
    shared = group.parameters[0]
    state = {key: value.clone() for key, value in optimizer.state[shared].items()}
    set_residual_factor(model, 0.0)
    before = {name: layer.weight.detach().clone() for name, layer in model.named_children()}
    [hardened] = harden(model)
    [expected] = tie(hard, ties)
    assert hardened.names == expected.names
    assert hardened.parameters[0] is shared
    assert all(torch.equal(layer.weight, before[name]) for name, layer in model.named_children())
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[shared].items())
    assert relaxed(model) == []
    assert [type(layer).__mro__[-3:] for layer in model] == [type(layer).__mro__[-3:] for layer in hard]
    assert audit(model).groups == audit(hard).groups
    assert audit(model).relations == audit(hard).relations
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in hard.named_parameters()]
    hard.load_state_dict(model.state_dict())
    hard.zero_grad()
    model.zero_grad()
    for net in (model, hard):
        train(net, x)
    assert_same(model, hard)


def test_some_groups_are_hardened():
    model = linear()
    relax(model, ["{0..1}.weight", "{2..3}.weight"], LowRankResidual(1))
    [group] = harden(model, ["3.weight"])
    assert group.names == ("2.weight", "3.weight")
    assert [group.names for group in relaxed(model)] == [("0.weight", "1.weight")]
    assert model[2].weight is model[3].weight
    assert plain_class(model[2]) is nn.Linear
    assert plain_class(model[0]) is RelaxedLinear


def test_a_part_of_a_model_is_hardened():
    model = linear()
    relax(model, ["0.weight ~ 2.weight"], LowRankResidual(1))
    [group] = relaxed(model)
    assert harden(model[2:]) == []
    assert model[2].weight is group.parameters[0]
    assert [group.names for group in relaxed(model)] == [("0.weight",)]
    turned = linear()
    relax(turned, ["0.weight ~ 2.weight | o i -> i o"], LowRankResidual(1))
    with pytest.raises(ConfigurationError, match=r"'2\.weight': the source of its tie is not a part of this model"):
        harden(turned[2:])
    assert len(relaxed(turned)[0]) == 2


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_plain_weights_of_a_relaxed_model(residual):
    model, plain, x = linear(dtype=torch.float32), linear(dtype=torch.float32), torch.randn(5, 8)
    [group] = relax(model, ["*.weight"], residual)
    train(model, x)
    plain.load_state_dict(bake(model))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-6)
    assert load_plain(model, bake(model)) == {}  # held already
    other = linear(dtype=torch.float32)
    relax(other, ["*.weight"], residual)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    set_residual_factor(group, 0.5)
    other.load_state_dict(model.state_dict())
    assert relaxed(other)[0].factor == 0.5


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("residual", [LowRankResidual(2), DiagonalResidual(), ScaleResidual()], ids=str)
def test_plain_weights_become_the_nearest(residual, factor):
    """The error that is returned is that of each weight; no shared weight nearby leaves less in all."""
    model, given = linear(), {key: torch.randn_like(value) for key, value in linear().state_dict().items()}
    [group] = relax(model, ["*.weight"], residual)
    set_residual_factor(model, factor)
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        errors = load_plain(model, given)
    assert errors.keys() == {*group.names}
    for name, error in errors.items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight.detach()
        assert error == pytest.approx(float((weight - given[name]).norm() / given[name].norm()))
    if isinstance(residual, LowRankResidual):
        weights = [given[name] for name in group.names]
        total = math.sqrt(
            sum((error * float(w.norm())) ** 2 for error, w in zip(errors.values(), weights, strict=True))
        )
        mean = torch.stack(weights).mean(dim=0)
        assert total < math.sqrt(sum(float(torch.linalg.svdvals(w - mean)[2:].norm()) ** 2 for w in weights))


def test_a_pair_is_split_between_its_layers():
    """Two residuals of rank r hold a difference of rank 2 r; what is left is shared."""
    pair = [torch.randn(9, 7, dtype=D), torch.randn(9, 7, dtype=D)]
    shared = nearest_shared_part(pair, [Relation(), Relation()], rank=2)
    left = [float(torch.linalg.svdvals(weight - shared)[2:].square().sum()) for weight in pair]
    assert sum(left) == pytest.approx(float(torch.linalg.svdvals(pair[0] - pair[1])[4:].square().sum()) / 2)


@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_an_assigned_weight_becomes_the_nearest_beside_the_shared_one(residual):
    model = linear()
    [group] = relax(model, ["*.weight"], residual)
    shared, others = group.parameters[0].detach().clone(), [layer.weight.detach().clone() for layer in model[1:]]
    set_residual_factor(group, 0.5)
    weight = group.steps[0](*(torch.randn_like(p) for p in group.residuals[0])).detach()
    if not (isinstance(residual, LowRankResidual) and residual.scale):
        model[0].weight = weight
        torch.testing.assert_close(model[0].weight, weight, rtol=0, atol=1e-12)
    set_residual_factor(group, 1.0)
    assert torch.equal(group.parameters[0], shared)
    assert all(torch.equal(layer.weight, other) for layer, other in zip(model[1:], others, strict=True))
    set_residual_factor(group, 0.0)
    model[0].weight = weight
    assert torch.equal(model[0].weight, shared)


SCALED = {
    "linear": (lambda: linear(torch.float32, 3), lambda: torch.randn(64, 8) * torch.logspace(-2, 1, 8)),
    "kernels": (
        lambda: kernels(torch.float32),
        lambda: torch.randn(8, 4, 6, 6) * torch.logspace(-2, 1, 4)[:, None, None],
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_calibration_weighs_by_the_inputs(case):
    """The first layer's inputs are of scales apart: the error of its outputs is that of the weighted truncated SVD."""
    make, data = SCALED[case]
    plain, plainly, calibrated, x = make(), make(), make(), data()
    relax(plainly, ["*.weight"], LowRankResidual(1))
    state = torch.get_rng_state()
    relax(calibrated, ["*.weight"], LowRankResidual(1), calibration=[x[:4], (x[4:], "labels")])
    assert torch.equal(torch.get_rng_state(), state)
    scale = x.square().mean(dim=[d for d in range(x.ndim) if d != 1]).sqrt().view(1, -1, *[1] * (x.ndim - 2))
    scale = scale.transpose(0, 1) if case == "transposed kernels" else scale  # whose weight is (in, out, …)

    def error(model):
        return float((scale * (model[0].weight - plain[0].weight)).detach().norm())

    mean = torch.stack([layer.weight for layer in plain]).mean(dim=0)
    least = torch.linalg.svdvals((scale * (plain[0].weight - mean)).flatten(1))[1:].norm()
    assert error(calibrated) == pytest.approx(float(least.detach()), rel=1e-4)
    assert error(plainly) > 1.02 * error(calibrated)
    dead = make()
    relax(dead, ["*.weight"], LowRankResidual(1), calibration=[x * 0])
    assert torch.isfinite(dead[0].weight).all()


def layer_of(size=64, **options):
    model = linear(count=2, size=size)
    relax(model, ["*.weight"], LowRankResidual(3), **options)
    return model


def weights_computed(model, x):
    """Return how many weights a forward pass computes."""
    calls = []
    hooks = [layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1)) for layer in model]
    model(x)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_few_inputs_are_multiplied_without_the_weight():
    model = layer_of()
    assert [plain_class(layer) for layer in model] == [RelaxedLinear] * 2
    few, many = torch.randn(4, 7, 64, dtype=D), torch.randn(4, 8, 64, dtype=D)  # 28 and 32 rows: 64² / (64 + 64) is 32
    assert (weights_computed(model, few), weights_computed(model, many)) == (0, 2)
    for x in (few, many):
        expected = x
        for layer in model:
            expected = F.linear(expected, layer.weight, layer.bias)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def gradients(function, model, x):
    """Return the first and second derivatives of a function of a model's output."""
    first = torch.autograd.grad(function(model, x), [*model.parameters(), x], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [*model.parameters(), x])
    return [*first, *second]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_products_have_the_derivatives_of_the_weight(factor):
    model, x = layer_of(16), torch.randn(3, 16, dtype=D, requires_grad=True)
    set_residual_factor(model, factor)

    def formed(model, x):
        for layer in model:
            x = F.linear(x, layer.weight, layer.bias).tanh()
        return x.sum()

    def called(model, x):
        for layer in model:
            x = layer(x).tanh()
        return x.sum()

    for product, expected in zip(gradients(called, model, x), gradients(formed, model, x), strict=True):
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-10)


def test_products_under_autocast_and_compilation():
    model = linear(torch.float32, 2, 64)
    relax(model, ["*.weight"], LowRankResidual(3))
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), rtol=0, atol=0.02)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (4, 100):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_alike_and_are_hardened_alone(copied):
    model, x = layer_of(), torch.randn(3, 64, dtype=D)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert weights_computed(other, x) == 0
    harden(other)
    assert len(tied(other)) == 1
    assert len(relaxed(model)) == 1
    assert weights_computed(model, x) == 0


@pytest.mark.parametrize(
    "undo", [remove, lambda model, name: nn.utils.parametrize.remove_parametrizations(model[0], "weight")]
)
def test_a_layer_without_its_residual_is_a_linear_layer(undo):
    model, x = layer_of(), torch.randn(3, 64, dtype=D)
    before = model(x)
    undo(model, "0.weight")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert not is_parametrized(model[0])
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_reset_keeps_the_fast_layer():
    model = layer_of()
    model[0].reset_parameters()
    assert weights_computed(model, torch.randn(3, 64, dtype=D)) == 0
    assert torch.equal(model[0].weight, relaxed(model)[0].parameters[0])


def test_other_layers_and_kinds_compute_the_weight():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8))
    relax(model, ["*.weight"], LowRankResidual(1))
    assert [plain_class(layer) for layer in model] == [Special, RelaxedLinear]
    scaled = linear()
    relax(scaled, ["*.weight"], LowRankResidual(1, scale=True))
    assert plain_class(scaled[0]) is nn.Linear


@dataclass(frozen=True)
class InputScales(WeightResidual):
    """A scale of each input: a user's own kind."""

    def combine(self, shared, factor, *parameters):
        return shared * (1 + factor * parameters[0])

    def zero(self, shared):
        return (shared.new_zeros(shared.shape[1]),)

    def nearest(self, shared, weight, input_scale=None):
        return ((weight * shared).sum(dim=0) / shared.square().sum(dim=0) - 1,)


def test_a_kind_of_ones_own():
    model, x = linear(), torch.randn(3, 8, dtype=D)
    [group] = relax(model, ["*.weight"], {"class_path": f"{__name__}.InputScales"})
    assert isinstance(group.steps[0].residual, InputScales)
    assert count(model) == 8 * 8 + 4 * 8 + 4 * 8
    train(model, x)
    plain = linear()
    plain.load_state_dict(bake(model))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    assert load_plain(model, bake(model)) == {}
    harden(model)
    assert model[0].weight is model[3].weight


def test_vectors_stay_separate(caplog):
    model = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    with caplog.at_level(logging.INFO):
        groups = relax(model, ["{0..1}"], LowRankResidual(1))
    assert {name.partition(".")[2] for group in groups for name in group.names} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    [record] = caplog.records
    assert record.getMessage().startswith(
        "relax leaves vectors separate: 0.self_attn.in_proj_bias, 1.self_attn.in_proj_bias"
    )
    assert "1.norm2.weight" in record.getMessage()
    assert not any("norm" in name for group in audit(model).groups for name in group)
    tie(model, ["{0..1}.norm1"])  # the rest is for a hard tie
    assert model[0].norm1.weight is model[1].norm1.weight


def test_a_weight_of_several_modules_is_one_member():
    model = linear()
    model[1].weight = model[0].weight
    relax(model, ["0.weight ~ 2.weight"], LowRankResidual(1))
    assert torch.equal(model[0].weight, model[1].weight)
    assert not torch.equal(model[0].weight, model[2].weight)
    [group] = harden(model)
    assert model[0].weight is model[1].weight is model[2].weight
    assert {*group.names} == {"0.weight", "1.weight", "2.weight"}


def test_the_report_says_how_far_layers_are():
    model = linear()
    [group] = relax(model, ["1.weight ~ {0..3}.weight"], LowRankResidual(2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rows = {row.names[0]: str(row) for row in audit(model).rows}
    for name, distance in group.distances().items():
        weight, shared = model.get_submodule(name.rpartition(".")[0]).weight.detach(), group.parameters[0].detach()
        assert distance == pytest.approx(float((weight - shared).norm() / weight.norm()))
        assert f"a shared weight and rank 2, {distance:.1%} of its norm from it" in rows[name]
    assert [found.names for found in relaxed(model)] == [("1.weight", "0.weight", "2.weight", "3.weight")]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [group.names for group in relaxed(model[:2])] == [("1.weight", "0.weight")]
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        relax(empty, ["*.weight"], LowRankResidual(2))
    assert "a shared weight and rank 2" in str(audit(empty))


def frozen(model):
    model[1].weight.requires_grad_(False)
    return model


def spoilt(model, value):
    with torch.no_grad():
        model[1].weight[0, 0] = value
    return model


def changed(model, change, *arguments):
    change(model, *arguments)
    return model


ONE = ["0.weight ~ 1.weight"]
MISTAKES = {
    "rank": (stack, ["0.weight ~ 2.weight"], LowRankResidual(7), r"'0\.weight': rank=7 is more than 6, the smaller side of a matrix of shape \(8, 6\): the residual would have 98 parameters, where the untied weight has 48\. Lower the rank"),
    "rank of a kernel": (kernels, ["*.weight"], LowRankResidual(5), r"rank=5 is more than 4, the smaller side of a matrix of shape \(4, 36\)"),
    "diagonal": (stack, ["0.weight ~ 2.weight"], DiagonalResidual(), r"'0\.weight': a diagonal residual needs a square weight, not \(8, 6\)"),
    "vectors, spelt": (linear, [*ONE, "0.bias ~ 1.bias"], LowRankResidual(1), r"'0\.bias', '1\.bias': a vector has no residual that costs less than itself: leave it separate"),
    "vectors only": (linear, ["*.bias"], LowRankResidual(1), "a vector has no residual"),
    "frozen": (lambda: frozen(linear()), ONE, LowRankResidual(1), r"'1\.weight' cannot be tied to '0\.weight': requires_grad is False for one"),
    "complex": (lambda: linear(dtype=torch.complex64), ONE, LowRankResidual(1), r"'0\.weight' is torch\.complex64, and only real floating-point weights can be relaxed"),
    "low rank already": (lambda: changed(linear(), lower_rank, ["1.weight"], 2), ONE, LowRankResidual(1), "parametrize"),
    "relaxed already": (lambda: changed(linear(), relax, ONE, LowRankResidual(1)), ONE, LowRankResidual(1), "parametrize"),
    "tied already": (lambda: changed(linear(), tie, ["0.weight ~ 1.weight | o i -> i o"]), ["1.weight ~ 2.weight"], LowRankResidual(1), "through a relation"),
    "nothing": (linear, ["a.weight ~ b.weight"], LowRankResidual(1), "matches no parameter"),
    "residual": (linear, ONE, 8, r"residual must be a WeightResidual, such as LowRankResidual\(8\), not 8"),
    "class": (linear, ONE, {"class_path": "LowRankResidul"}, "LowRankResidual"),
    "infinite": (lambda: spoilt(linear(), math.inf), ONE, LowRankResidual(1), r"'1\.weight' holds infinity"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_change_nothing(mistake):
    make, ties, residual, message = MISTAKES[mistake]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises((ConfigurationError, NonFiniteError), match=message):
        relax(model, ties, residual)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert [type(module) for module in model.modules()] == classes


def test_mistakes_of_arguments():
    with pytest.raises(ConfigurationError, match="rank must be 1 or more, not 0"):
        LowRankResidual(0)
    with pytest.raises(ConfigurationError, match="init must be 'nearest' or 'source', not 'mean'"):
        relax(linear(), ONE, LowRankResidual(1), init="mean")
    for residual, init in ((None, "nearest"), (LowRankResidual(1), "source")):
        with pytest.raises(ConfigurationError, match="calibration needs a residual, and init='nearest'"):
            relax(linear(), ONE, residual, [torch.ones(1, 8, dtype=D)], init)
    with pytest.raises(ConfigurationError, match="calibration has no batches"):
        relax(linear(), ONE, LowRankResidual(1), [])
    model = changed(linear(), relax, ONE, LowRankResidual(1))
    for factor in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigurationError, match=r"factor must be in \[0, 1\]"):
            set_residual_factor(model, factor)


def test_values_are_drawn_from_the_global_generator_only_at_random():
    model, state = linear(), torch.get_rng_state()
    relax(model, ["*.weight"], LowRankResidual(2))
    assert torch.equal(torch.get_rng_state(), state)
    [group] = relax(linear(), ["*.weight"], LowRankResidual(2), init="source")
    assert not torch.equal(torch.get_rng_state(), state)
    assert len({right[0, 0].item() for _, right in group.residuals}) == 4


COMPUTED = {
    "relaxed": lambda model: relax(model, ["{0..3}"], LowRankResidual(2)),
    "templates": lambda model: share_templates(model, ["*.weight"], 2),
}


@pytest.mark.parametrize("ties", [["{0..3}"], ["{0..3}.weight"]])
@pytest.mark.parametrize("change", [relax, tie], ids=lambda change: change.__name__)
@pytest.mark.parametrize("made", COMPUTED)
def test_weights_that_are_computed_already_are_named(made, change, ties):
    """By the names of the model, not of what hides in it."""
    model = changed(linear(), COMPUTED[made])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"'0\.weight'.*(is|are) (computed|parametrized)") as raised:
        change(model, ties, *[LowRankResidual(1)] * (change is relax))
    assert ".parametrizations." not in str(raised.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
