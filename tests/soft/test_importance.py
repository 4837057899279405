"""Penalties that weigh each entry by its importance, and the importances themselves."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tying import ConfigurationError
from tying.hard import lower_rank, share_templates, tie
from tying.hashing import HashedLinear, ModulusHash
from tying.soft import anchored, fisher_diagonal, importance, path_importance, path_integral


def weights_and_anchors(dtype, seed=0):
    torch.manual_seed(seed)
    weights = {name: nn.Parameter(torch.randn(*shape).to(dtype)) for name, shape in [("a", (7, 5)), ("b", (3,))]}
    return weights, {name: torch.randn_like(weight) for name, weight in weights.items()}


def apply(penalty, weights, method, strength):
    """Apply a method of a penalty to weights that have gradients, and return all that it changes."""
    for weight in weights.values():
        weight.grad = torch.full_like(weight, 0.1)
    rates = dict.fromkeys(weights.values(), 0.3)
    getattr(penalty, method)(strength, rates)
    return [tensor.detach() for weight in weights.values() for tensor in (weight, weight.grad)]


METHODS = [("add_gradients_", 0.7), ("pull_", 0.7), ("prox_", 0.7), ("prox_", 1e-9), ("prox_", math.inf)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "strength"), METHODS)
def test_importance_one_is_the_unweighted_anchor_bitwise(method, strength, dtype):
    ends = []
    for importances in (None, {"a": torch.ones(7, 5), "b": torch.ones(3)}):
        weights, anchors = weights_and_anchors(dtype)
        penalty = anchored(weights, anchors, importances=importances)
        ends.append([penalty().detach(), *apply(penalty, weights, method, strength)])
    assert all(torch.equal(ours, plain) for plain, ours in zip(*ends, strict=True))


@pytest.mark.parametrize(("method", "strength"), METHODS)
def test_the_equations(method, strength):
    """``F (w − w⁰)`` is the gradient of the penalty, and the proximal step is ``(w + sF w⁰) / (1 + sF)``."""
    weights, anchors = weights_and_anchors(torch.float64)
    importances = {name: torch.rand_like(weight) for name, weight in weights.items()}
    importances["a"][0] = 0
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    penalty = anchored(weights, anchors, importances=importances)
    value = sum(0.5 * (importances[n] * (before[n] - anchors[n]).square()).sum() for n in weights)
    torch.testing.assert_close(penalty().detach(), value, rtol=1e-14, atol=0)
    by_autograd = torch.autograd.grad(penalty(), [*weights.values()])
    apply(penalty, weights, method, strength)
    for (name, weight), gradient in zip(weights.items(), by_autograd, strict=True):
        f, w, w0, s = importances[name], before[name], anchors[name], strength * 0.3
        torch.testing.assert_close(gradient, f * (w - w0), rtol=1e-12, atol=1e-15)
        change = {"add_gradients_": torch.zeros(()), "pull_": -s * f * (w - w0)}
        expected = torch.where(f == 0, w, w0) if math.isinf(s) else (w + s * f * w0) / (1 + s * f)
        expected = w + change[method] if method in change else expected
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=1e-15)
        added = s * f * (w - w0) if method == "add_gradients_" else 0.0 * w
        torch.testing.assert_close(weight.grad, 0.1 + added, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.7, math.inf])
def test_no_importance_is_free_and_an_infinite_one_frozen(strength, dtype):
    weights, anchors = weights_and_anchors(dtype)
    importance = torch.ones(7, 5)
    importance[0], importance[1] = 0, math.inf
    before = weights["a"].detach().clone()
    penalty = anchored({"a": weights["a"]}, anchors, importances={"a": importance})
    penalty.prox_(strength)
    assert torch.equal(weights["a"][0], before[0])
    assert torch.equal(weights["a"][1], anchors["a"][1])
    assert penalty().isfinite()
    for method in ("add_gradients_", "pull_"):
        weights, anchors = weights_and_anchors(dtype)
        penalty = anchored(weights, anchors, importances={"a": torch.zeros(7, 5), "b": torch.zeros(3)})
        before = [weight.detach().clone() for weight in weights.values()]
        weight_a, grad_a, weight_b, grad_b = apply(penalty, weights, method, 0.7)
        assert torch.equal(weight_a, before[0])
        assert torch.equal(weight_b, before[1])
        assert torch.equal(grad_a, torch.full_like(grad_a, 0.1))
        assert torch.equal(grad_b, torch.full_like(grad_b, 0.1))


def test_the_stability_bound_is_that_of_the_largest_importance():
    weights, anchors = weights_and_anchors(torch.float32)
    importances = {"a": torch.full((7, 5), 0.1), "b": torch.tensor([0.1, 4.0, 0.1])}
    penalty = anchored(weights, anchors, importances=importances)
    rates = dict.fromkeys(weights.values(), 0.5)
    assert penalty.stability_warning(1.0, rates) is None  # 0.5 · 1 · 4 = 2
    assert penalty.stability_warning(1.01, rates).startswith(
        "lr · strength · largest importance = 2.02 is past the stability bound 2/(m − 1) = 2 of the group of 'b'"
    )


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(5, 7), r"the importance of 'a' is \(5, 7\), and the weight \(7, 5\)"),
        (-torch.ones(7, 5), "the importance of 'a' must be 0 or more throughout, and some is not"),
        (torch.full((7, 5), math.nan), "the importance of 'a' must be 0 or more throughout, and some is not"),
    ],
)
def test_wrong_importances(importance, message):
    weights, anchors = weights_and_anchors(torch.float32)
    with pytest.raises(ConfigurationError, match=message):
        anchored({"a": weights["a"]}, anchors, importances={"a": importance})


def by_hand(model, batches, log_probability):
    """The squared gradients of single samples, by backward passes."""
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    samples = 0
    training = model.training
    model.eval()
    for inputs, labels in batches:
        for x, y in zip(inputs, labels, strict=True):
            model.zero_grad()
            log_probability(model(x[None]), y[None]).backward()
            for name, weight in model.named_parameters():
                sums[name] += 0 if weight.grad is None else weight.grad.square()
            samples += 1
    model.zero_grad()
    model.train(training)
    return {name: squares / samples for name, squares in sums.items()}


def log_softmax(logits, y):
    return logits.log_softmax(-1).gather(-1, y[..., None]).sum()


class Decides(nn.Linear):
    """Decides by values, as vmap cannot."""

    def forward(self, x):
        return super().forward(x) * (2 if float(x.sum()) < math.inf else 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


class Recurrent(nn.Module):
    """Reads a sequence, sample by sample: vmap does not support it."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def changed(change):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    change(model)
    return model


MODELS = {
    "perceptron": (lambda: changed(lambda model: None), (8,)),
    "convolutions and batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 3)),
        (2, 4, 4),
    ),
    "tied": (lambda: changed(lambda model: tie(model, ["0.weight ~ 2.weight"])), (8,)),
    "tied, transposed": (lambda: changed(lambda model: tie(model, ["0.weight ~ 2.weight | o i -> i o"])), (8,)),
    "low rank": (lambda: changed(lambda model: lower_rank(model, ["0.weight"], 2)), (8,)),
    "templates": (lambda: changed(lambda model: share_templates(model, ["0.weight", "2.weight"], 1)), (8,)),
    "hashed": (lambda: nn.Sequential(HashedLinear(8, 3, hash=ModulusHash())), (8,)),
    "attention": (Attention, (6, 8)),
    "LSTM": (Recurrent, (6, 4)),
    "decisions by values": (lambda: nn.Sequential(Decides(8, 3)), (8,)),
    "frozen": (lambda: changed(lambda model: model[0].requires_grad_(False)), (8,)),
}  # fmt: skip


ONE_BY_ONE = ("LSTM", "decisions by values")


@pytest.mark.parametrize("rows", [1, 3, 100], ids=["one by one", "in parts", "together"])
@pytest.mark.parametrize("case", MODELS)
def test_the_fisher_information_of_given_labels(case, rows, monkeypatch):
    """Gradients of single samples, squared and averaged."""
    make, shape = MODELS[case]
    model = make().double()
    monkeypatch.setattr(importance, "MAX_GRADIENTS", rows * sum(weight.numel() for weight in model.parameters()))
    if rows > 1 and case not in ONE_BY_ONE:
        monkeypatch.setattr(importance, "_squares_one_by_one", pytest.fail)
    x, y = torch.randn(8, *shape, dtype=torch.float64), torch.arange(8) % 3
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    parameters = [(id(weight), weight.requires_grad, weight.grad) for weight in model.parameters()]
    found = fisher_diagonal(model, batches, labels="given")
    assert [(id(weight), weight.requires_grad, weight.grad) for weight in model.parameters()] == parameters
    model.requires_grad_()
    expected = by_hand(model, batches, log_softmax)
    assert len(found) == len(expected)
    for value, reference in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-14)
        assert value.any()


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def test_sampled_labels_give_the_fisher_information():
    """The expectation over the model's own labels, ``Σ_y p(y|x) (∂ log p(y|x))²``, which given labels do not give."""
    model, x = small(), torch.randn(5, 4, dtype=torch.float64)
    exact = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for sample in x:
        for y, p in enumerate(model(sample[None]).detach().softmax(-1)[0]):
            parts = by_hand(model, [(sample[None], torch.tensor([y]))], log_softmax)
            exact = {name: exact[name] + p * part / len(x) for name, part in parts.items()}
    found = fisher_diagonal(model, [x.repeat(2000, 1)])  # a batch may be inputs alone
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=1e-3)
    given = fisher_diagonal(model, [(x, torch.zeros(5, dtype=torch.int64))], labels="given")
    assert not all(torch.allclose(value, exact[name], rtol=0.1, atol=1e-3) for name, value in given.items())


def test_a_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[1].eval()
    model(torch.randn(6, 4)).sum().backward()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [weight.grad.clone() for weight in model.parameters()]
    generator = torch.get_rng_state()
    loader = DataLoader(TensorDataset(torch.randn(9, 4)), batch_size=4, shuffle=True)
    torch.set_rng_state(generator)
    with torch.autocast("cpu", torch.bfloat16):
        first = fisher_diagonal(model, loader)
    assert torch.is_autocast_cache_enabled()
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(model.parameters(), gradients, strict=True))
    torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        again, other = fisher_diagonal(model, loader), fisher_diagonal(model, loader, seed=1)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    assert all(value.dtype == torch.float32 for value in first.values())


class Language(nn.Module):
    """Predicts the next token, with outputs as those of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids, attention_mask=None, labels=None, scale=1.0):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)) * scale)


def test_sequences_sum_over_the_steps_that_count():
    """Labels of -100 and padding do not count, and labels that are the inputs are those of the next token."""
    model = Language().double()
    tokens = torch.tensor([[1, 2, 3, 4], [4, 0, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    following = torch.tensor([[2, 3, 4], [0, 2, 1]])

    def only(rows):
        return lambda output, y: sum(log_softmax(output.logits[:, step], y[:, step]) for step in rows)

    def found(**batch):
        return fisher_diagonal(model, [{"input_ids": tokens, "scale": 1.0, **batch}], labels="given")

    pairs = [
        (found(labels=tokens), by_hand(model, [(tokens, following)], only(range(3)))),
        (found(labels=tokens.roll(1)), by_hand(model, [(tokens, tokens.roll(1))], only(range(4)))),
        (
            found(labels=tokens.roll(1).where(torch.tensor([True, False, True, True]), -100)),
            by_hand(model, [(tokens, tokens.roll(1))], only([0, 2, 3])),
        ),
        (
            found(labels=tokens.roll(1), attention_mask=mask[1:].expand(2, 4) * torch.tensor([1, 1, 0, 0])),
            by_hand(model, [(tokens, tokens.roll(1))], only([0, 1])),
        ),
    ]
    for ours, expected in pairs:
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)
    sampled = fisher_diagonal(model, [{"input_ids": tokens, "attention_mask": torch.zeros_like(mask)}])
    assert not any(value.any() for value in sampled.values())


@pytest.mark.parametrize(
    ("model", "batches", "labels", "message"),
    [
        (small(), [], "sampled", "the Fisher information is a mean over batches of data, and there are none"),
        (small(), [torch.zeros(2, 4).double()], "given", r"needs integer labels of shape \(2,\), for logits of shape \(2, 2\)"),
        (small(), [(torch.zeros(2, 4).double(), torch.zeros(2))], "given", "needs integer labels"),
        (small(), [torch.zeros(2, 4).double()], "true", "labels must be 'sampled' or 'given', not 'true'"),
        (nn.Linear(4, 1), [torch.zeros(2, 4)], "sampled", r"returns a Tensor of shape \(2, 1\): it must return logits"),
        (nn.Flatten(0), [torch.zeros(2, 4)], "sampled", "'\\*\\*'.* matches no"),
        (nn.LSTM(4, 4), [torch.zeros(2, 4)], "sampled", "returns a tuple: it must return logits"),
        (nn.ModuleList([nn.Linear(4, 2)]), [torch.zeros(2, 4)], "sampled", "forward cannot be called on a batch"),
        (nn.Linear(4, 2), [{"x": torch.zeros(2, 4)}], "sampled", "forward cannot be called on a batch .*'x'"),
    ],
)  # fmt: skip
def test_mistakes(model, batches, labels, message):
    with pytest.raises(ConfigurationError, match=message):
        fisher_diagonal(model, batches, labels=labels)


def test_the_path_integral_is_the_loss_that_the_moves_have_saved():
    """``Σ_i ω_i → L(start) − L(end)`` for small steps; and importance by hand."""
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % 2
    model = small()
    start = [weight.detach().clone() for weight in model.parameters()]
    paths = [torch.zeros_like(weight) for weight in start]
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        with torch.no_grad():
            for i, (weight, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
                weight -= 1e-3 * gradient
                paths[i] = path_integral(paths[i], gradient, -1e-3 * gradient)
    saved = losses[0] - float(F.cross_entropy(model(x), y).detach())
    assert float(sum(path.sum() for path in paths)) == pytest.approx(saved, rel=1e-2)
    change = model[0].weight.detach() - start[0]
    assert torch.equal(path_importance(paths[0], change, 0.5), paths[0] / (change.square() + 0.5))
    assert torch.equal(path_importance(-paths[0], change), torch.zeros(3, 4).double())
