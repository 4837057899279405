"""Baking, loading plain weights, and the audit."""

import copy
import json

import pytest
import torch
from survival import ROWS, TIES, Net, assert_shared, batch, made
from torch import nn

from tying.hard import LowRankResidual, audit, bake, load_plain, lower_rank, relax, share_templates, tie, untie
from tying.hashing import hash_weights
from tying.weights.derived import derived_weights


def unequal():
    state = Net().state_dict()
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.mark.parametrize("row", ROWS)
def test_bake_is_plain(row):
    net = made(row)
    baked = bake(net)
    assert baked.keys() == Net().state_dict().keys()
    assert len({value.untyped_storage().data_ptr() for value in baked.values()}) == len(baked)
    assert all(value.is_contiguous() and not value.requires_grad for value in baked.values())
    torch.testing.assert_close(baked["encoder.weight"], net.encoder.weight.detach())


@pytest.mark.parametrize("choice", ["source", "mean"])
@pytest.mark.parametrize("row", TIES)
def test_unequal_copies_by_choice(row, choice):
    net, state = made(row), unequal()
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        errors = load_plain(net, state, choice)
    assert_shared(net, row)
    source, target, transposed = {
        "plain tie": ("first.weight", "second.weight", False),
        "transposed tie": ("encoder.weight", "decoder.weight", True),
        "whole modules": ("blocks.0.linear.weight", "blocks.1.linear.weight", False),
    }[row]
    assert {source, target} - errors.keys() == ({source} if choice == "source" else set())
    other = state[target].T if transposed else state[target]
    expected = state[source] if choice == "source" else (state[source] + other) / 2
    torch.testing.assert_close(net.state_dict()[source], expected, rtol=0, atol=0)


def test_unequal_copies_are_an_error_that_names_the_choice():
    net = made("transposed tie")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"'encoder.weight' and 'decoder.weight' are tied, but differ .* unequal='source'"
    ):
        load_plain(net, unequal())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="unequal must be 'error', 'source' or 'mean', not 'first'"):
        load_plain(net, unequal(), "first")


def test_plain_weights_that_cannot_be_parametrized():
    net = Net()
    net.first.register_parameter("weight", nn.Parameter(torch.ones(6, 6)))
    nn.utils.parametrize.register_parametrization(net.first, "weight", nn.Tanh())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"'first\.weight' is parametrized without a right_inverse"):
        load_plain(net, Net().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("row", "how"), [("plain tie", "shared"), ("transposed tie", "o i -> i o"), ("whole modules", "shared")]
)
def test_audit_counts(row, how):
    net = made(row)
    report = audit(net, [torch.optim.SGD(net.parameters(), 0.1)])
    assert report.problems == ()
    assert set(report.relations) == {how}
    unique = sum(p.numel() for p in net.parameters())
    virtual = sum(p.numel() for p in Net().parameters())
    assert (report.unique, report.virtual, report.saved_bytes) == (unique, virtual, 4 * (virtual - unique))
    assert any("fully_shard" in limit for limit in report.limits)
    assert any("ONNX and safetensors store copies" in limit for limit in report.limits) == (row == "transposed tie")
    assert f"{unique:,} unique parameters" in str(report)


def test_audit_finds_what_others_share():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    report = audit(model)
    assert report.groups == (("0.weight", "1.weight"),)
    assert report.relations == ("shared, by others",)


def test_audit_finds_two_parameters_on_one_storage():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    model[1].weight = nn.Parameter(model[0].weight.T)
    [problem] = audit(model).problems
    assert "'0.weight' and '1.weight' are two parameters on one storage: they look tied" in problem


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_audit_of_optimizers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    early = torch.optim.SGD(model.parameters(), 0.1)
    tie(model, ["0.weight ~ 1.weight"])
    assert "1 tensors in the optimizers are not the model's" in audit(model, [early]).problems[0]
    twice = torch.optim.SGD([model[0].weight, model[1].weight, model[0].bias, model[1].bias], 0.1)
    assert "0.weight = 1.weight occurs twice in the optimizers" in audit(model, [twice]).problems[0]
    missing = torch.optim.SGD([model[0].weight], 0.1)
    assert "0.bias, 1.bias is in no optimizer" in audit(model, [missing]).problems[0]
    frozen = nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    assert audit(frozen, [torch.optim.SGD([frozen.weight], 0.1)]).problems == ()


def test_audit_says_what_was_taken_apart():
    net = made("plain tie")
    net.second.weight = nn.Parameter(torch.zeros(6, 6))
    [problem] = audit(net).problems
    assert "'second.weight' was tied to 'first.weight', and is another tensor now" in problem
    untie(net)
    assert audit(net).problems == ()


def test_tied_linear_autoencoder_is_principal_component_analysis():
    """Loss, projector and WᵀW at the optimum; columns only up to a rotation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64) * torch.tensor([5, 4, 3, 1, 0.8, 0.6, 0.4, 0.2])
    x = x - x.mean(0)
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(8, 3, bias=False), "decoder": nn.Linear(3, 8, bias=False)}).double()
    tie(model, ["encoder.weight ~ decoder.weight | o i -> i o"])
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (x - model["decoder"](model["encoder"](x))).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    w = model["encoder"].weight.detach().T
    torch.testing.assert_close(loss().detach(), s[3:].square().sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(w @ w.T, v[:3].T @ v[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(w.T @ w, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


class Twice(nn.Module):
    """Holds its layers under two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.net = nn.Sequential(*self.layers)

    def forward(self, x):
        return self.net(x)


CHANGES = {
    "low rank": lambda model, names: lower_rank(model, names, 2),
    "relaxed": lambda model, names: relax(model, names, LowRankResidual(2)),
    "templates": lambda model, names: share_templates(model, names, 2),
    "hashed": lambda model, names: hash_weights(model, names, 0.5),
    "by others": lambda model, names: [nn.utils.parametrizations.weight_norm(layer) for layer in model.layers],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("names", ["layers.*.weight", "net.*.weight"])
def test_layers_of_two_names(change, names):
    model, plain, x = Twice(), Twice(), torch.randn(2, 4)
    change(model, [names])
    assert derived_weights(model, aliases=True).keys() >= {"layers.0.weight", "net.0.weight"}
    plain.load_state_dict(bake(model))
    torch.testing.assert_close(plain(x), model(x))
    assert load_plain(model, plain.state_dict()) == {}
    torch.testing.assert_close(model(x), plain(x))


def test_templates_of_layers_of_two_names():
    assert [*share_templates(Twice(), ["net.*.weight"], 2)] == ["net.0.weight", "net.1.weight"]


def test_extra_state_stays():
    class Noting(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            assert state == {"note": 1}

    model = nn.Sequential(Noting(3, 3), Noting(3, 3))
    tie(model, ["0.weight ~ 1.weight"])
    nn.Sequential(Noting(3, 3), Noting(3, 3)).load_state_dict(bake(model))


def test_outputs_are_those_of_the_baked_model():
    net, plain = made("generated"), Net()
    plain.load_state_dict(bake(net))
    torch.testing.assert_close(plain(batch()), net(batch()))


def test_audit_folds_modules_that_are_alike():
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=8)
    model = nn.TransformerEncoder(layer, num_layers=12, enable_nested_tensor=False)
    tie(model, ["layers.*"])
    [row] = audit(model).rows
    values = sum(parameter.numel() for parameter in model.layers[0].parameters())
    assert (row.names, row.weights) == (tuple(f"layers.{i}" for i in range(12)), 12)
    assert (row.stored, row.used) == (values, 12 * values)
    assert "layers.10 = layers.11 (12 weights): " in str(audit(model))
    assert json.loads(json.dumps(audit(model).as_dict()))["rows"][0]["names"][1] == "layers.1"
    untie(model)
    tie(model, ["layers.[01].linear1", "layers.[01].linear2", "layers.[23].norm1.weight"])  # only parts of layers
    names = [row.names for row in audit(model).rows]
    assert names == [
        ("layers.0.linear1", "layers.1.linear1"),
        ("layers.0.linear2", "layers.1.linear2"),
        ("layers.2.norm1.weight", "layers.3.norm1.weight"),
    ]


def test_audit_describes_what_is_computed():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

        def describe(self):
            return "half of a parameter"

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    lower_rank(model, ["0.weight"], 1)
    nn.utils.parametrize.register_parametrization(model[1], "weight", Halved())
    low_rank, halved = audit(model).rows
    assert (low_rank.names, low_rank.shape, low_rank.stored, low_rank.used) == (("0.weight",), (3, 4), 7, 12)
    assert str(halved) == "1.weight (3, 4): 12 values from 12, half of a parameter"
