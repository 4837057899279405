import pytest
import torch
from torch import nn

from tying import ConfigurationError, resolve
from tying.soft import L1, L2, Huber, Penalty, TyingPenalty, anchored, group_penalty

PATTERNS = {
    "plain": (None, (6, 4), (6, 4)),
    "transposed": ("o i -> i o", (6, 4), (4, 6)),
    "permuted": ("o i h w -> w o h i", (3, 2, 4, 5), (5, 3, 4, 2)),
    "reshaped": ("o (h w) -> (o h) w", (6, 4), (12, 2)),
    "reshaped after transposing": ("o i -> (i o)", (6, 4), (24,)),
}


def model_of(kind, m=2, dtype=torch.float64):
    relation, source, target = PATTERNS[kind]
    shapes = [source] + [target] * (m - 1)
    model = nn.ParameterDict({f"w{i}": torch.randn(shape, dtype=dtype) for i, shape in enumerate(shapes)})
    ties = [f"w0 ~ w{i}" + (f" | {relation}" if relation else "") for i in range(1, m)]
    return model, resolve(model, ties)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("strided", [1, 2**14])
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("penalty", [L2(), L1(), Huber(0.5)], ids=["l2", "l1", "huber"])
def test_gradients_equal_autograd(kind, m, penalty, strided, monkeypatch):
    if penalty.pairs_only and m > 2:
        pytest.skip("takes pairs only")
    monkeypatch.setattr(group_penalty, "STRIDED", strided)
    model, groups = model_of(kind, m)
    tying = TyingPenalty(groups, penalty)
    (0.3 * tying()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    tying.add_gradients_(0.3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-12)
    tying.add_gradients_(0.3)  # adds
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * expected[name], rtol=1e-12, atol=1e-12)


def test_weights_in_one_order_of_memory_are_pulled_where_they_are(monkeypatch):
    """A copy in another order is for members whose orders differ: in a model with channels last, none do."""
    monkeypatch.setattr(group_penalty, "STRIDED", 1)
    monkeypatch.setattr(group_penalty, "_add_in_order_", None)
    model = nn.ModuleList(nn.Conv2d(4, 4, 3, bias=False) for _ in range(3)).to(memory_format=torch.channels_last)
    weights = [layer.weight for layer in model]
    expected = [3 * (weight - sum(weights) / 3).detach() for weight in weights]
    TyingPenalty(resolve(model, ["*.weight"])).add_gradients_(1.0)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
        assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("m", [2, 4])
def test_pull_contracts_by_one_minus_m_s(kind, m):
    _, groups = model_of(kind, m)
    before = torch.stack(groups[0].tensors()).detach()
    TyingPenalty(groups).pull_(0.05)
    after = torch.stack(groups[0].tensors()).detach()
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        after - after.mean(0), (1 - m * 0.05) * (before - before.mean(0)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", PATTERNS)
def test_prox_contracts_by_one_over_one_plus_m_s(kind):
    _, groups = model_of(kind, 3)
    before = torch.stack(groups[0].tensors()).detach()
    TyingPenalty(groups).prox_(0.2)
    after = torch.stack(groups[0].tensors()).detach()
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after - after.mean(0), (before - before.mean(0)) / 1.6, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("move", ["add_gradients_", "pull_", "prox_"])
def test_strength_zero_touches_nothing(move):
    model, groups = model_of("plain", 3)
    before = snapshot(model)
    getattr(TyingPenalty(groups), move)(0.0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("move", ["add_gradients_", "pull_", "prox_"])
def test_frozen_members_count_and_stay(move):
    model, groups = model_of("plain", 3)
    model["w1"].requires_grad_(False)
    before = snapshot(model)
    getattr(TyingPenalty(groups), move)(0.1)
    assert model["w1"].grad is None
    assert torch.equal(model["w1"], before["w1"])
    if move == "pull_":
        mean = (before["w0"] + before["w1"] + before["w2"]) / 3
        torch.testing.assert_close(model["w0"].detach(), before["w0"] - 0.3 * (before["w0"] - mean))


@pytest.mark.parametrize("move", ["add_gradients_", "pull_", "prox_"])
def test_members_without_a_rate_stay(move):
    model, groups = model_of("plain", 2)
    before = snapshot(model)
    getattr(TyingPenalty(groups), move)(0.1, {model["w0"]: 1.0})
    assert model["w1"].grad is None
    assert torch.equal(model["w1"], before["w1"])
    assert model["w0"].grad is not None or not torch.equal(model["w0"], before["w0"])


@pytest.mark.parametrize("penalty", [L2(), L1()], ids=["l2", "l1"])
def test_each_member_moves_at_its_own_rate(penalty):
    _, groups = model_of("plain", 3)
    before = [w.detach().clone() for w in groups[0].tensors()]
    rates = dict(zip(groups[0].parameters, (0.1, 0.2, 0.4), strict=True))
    TyingPenalty(groups, penalty).pull_(0.5, rates)
    for old, new, gradient, rate in zip(
        before, groups[0].tensors(), penalty.gradient(before), rates.values(), strict=True
    ):
        torch.testing.assert_close(new.detach(), old - 0.5 * rate * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 7, 10**6])
@pytest.mark.parametrize("kind", PATTERNS)
def test_batches_do_not_change_the_numbers(kind, limit, monkeypatch):
    model, groups = model_of(kind, 3)
    model["b0"], model["b1"] = (
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
    )
    groups += resolve(model, ["b0 ~ b1"])
    expected = [L2().gradient([w.detach() for w in group.tensors()]) for group in groups]
    monkeypatch.setattr(group_penalty, "CPU_BATCH", limit)
    TyingPenalty(groups).add_gradients_(1.0)
    for group, gradients in zip(groups, expected, strict=True):
        for p, to_source, gradient in zip(group.parameters, group.to_source, gradients, strict=True):
            torch.testing.assert_close(to_source(p.grad), gradient, rtol=1e-12, atol=1e-12)


def test_scalars_and_channels_last():
    model = nn.ParameterDict({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
    TyingPenalty(resolve(model, ["a ~ b"])).pull_(0.5)
    assert model["a"] == model["b"] == 2
    convs = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
    convs[0].to(memory_format=torch.channels_last)
    TyingPenalty(resolve(convs, ["*.weight"])).pull_(0.5)
    torch.testing.assert_close(convs[0].weight, convs[1].weight)


def test_the_penalty_holds_no_parameters():
    _, groups = model_of("plain")
    assert list(TyingPenalty(groups).parameters()) == []


def test_an_anchor_does_not_follow_its_weight():
    layer = nn.Linear(2, 2)
    penalty = anchored(dict(layer.named_parameters()), layer.state_dict())
    with torch.no_grad():
        layer.weight += 1
    assert float(penalty().detach()) == pytest.approx(2.0)


def test_no_groups_no_penalty():
    assert TyingPenalty([])() == 0


def test_sparse_gradients_are_refused():
    model = nn.ModuleDict({"a": nn.Embedding(3, 2, sparse=True), "b": nn.Embedding(3, 2)})
    model["a"](torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match=r"sparse gradients.*decoupled"):
        TyingPenalty(resolve(model, ["a.weight ~ b.weight"])).add_gradients_(1.0)


def test_unknown_penalty():
    with pytest.raises(ConfigurationError, match=r"unknown penalty 'l3': use 'l2', 'l1', Huber\(delta\)"):
        TyingPenalty([], "l3")


def test_huber_refuses_larger_groups():
    with pytest.raises(ConfigurationError, match=r"takes pairs, but w0, w1, w2 are one group of 3"):
        TyingPenalty(model_of("plain", 3)[1], Huber(1.0))


def test_a_penalty_of_ones_own():
    class Fourth(Penalty):
        def value(self, tensors):
            return ((tensors[0] - tensors[1]) ** 4).sum()

    model, groups = model_of("transposed")
    TyingPenalty(groups, Fourth()).add_gradients_(2.0)
    d = (model["w0"] - model["w1"].T).detach()
    torch.testing.assert_close(model["w0"].grad, 8 * d**3)
    torch.testing.assert_close(model["w1"].grad, -8 * d.T**3)


def test_strength_is_carried_and_not_used():
    w = [torch.nn.Parameter(torch.tensor([value])) for value in (0.0, 2.0)]
    penalty = anchored({"w": w[0]}, {"w": w[1].detach()}, strength=3.0)
    assert penalty.strength == 3.0
    assert TyingPenalty([]).strength == 1.0
    assert penalty().item() == 2.0
    penalty.pull_(0.5)
    assert w[0].item() == 1.0
