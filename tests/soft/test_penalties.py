import math

import pytest
import torch
from reference import pairwise, prox_by_search, rho_huber, rho_l1, rho_l2
from torch import nn
from torch.autograd import gradcheck

from tying import ConfigurationError, resolve
from tying.soft import (
    L1,
    L2,
    GaussianMixturePrior,
    Huber,
    Penalty,
    TyingPenalty,
    anchored,
    gap,
    huber,
    l1,
    l2,
    mixture_nll,
)

CASES = [(L2(), rho_l2), (L1(), rho_l1), (Huber(0.5), rho_huber(0.5))]
IDS = ["l2", "l1", "huber"]


def draw(m, shape=(2, 3)):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(m)]


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize(("penalty", "rho"), CASES, ids=IDS)
def test_value_and_gradient_equal_the_loop(penalty, rho, m):
    if penalty.pairs_only and m > 2:
        pytest.skip("takes pairs only")
    tensors = [w.requires_grad_() for w in draw(m)]
    slow = pairwise(tensors, rho)
    torch.testing.assert_close(penalty.value(tensors), slow, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(slow, tensors)
    by_autograd = torch.autograd.grad(penalty.value(tensors), tensors)
    detached = [w.detach() for w in tensors]
    for got in (penalty.gradient(detached), by_autograd, Penalty.gradient(penalty, detached)):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_hand_worked():
    a, b, c = (torch.tensor([x]) for x in (1.0, 3.0, 8.0))
    assert l2([a, b]) == 2
    assert l2([a, b, c]) == (4 + 49 + 25) / 2
    assert l1([a, b, c]) == 2 + 7 + 5
    assert huber(a, b, 1.0) == 1.5
    assert huber(a, b, 4.0) == 2
    assert L2().gradient([a, b, c]) == [torch.tensor([x]) for x in (-9.0, -3.0, 12.0)]
    assert L1().gradient([a, b, c]) == [torch.tensor([x]) for x in (-2.0, 0.0, 2.0)]
    assert gap([a, b]) == pytest.approx(math.sqrt(2 / 10))


@pytest.mark.parametrize("m", [2, 3, 7, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_tensors_give_exactly_zero(m, dtype):
    w = torch.randn(100, dtype=torch.float64).to(dtype)
    for penalty in (L2(), L1(), *([Huber(1.0)] if m == 2 else [])):
        tensors = [w.clone() for _ in range(m)]
        assert penalty.value(tensors) == 0
        assert all((g == 0).all() for g in penalty.gradient(tensors))
        assert all(torch.equal(v, w) for v in penalty.prox(tensors, 0.7, [1.0] * m))
    assert gap([w.clone() for _ in range(m)]) == 0


@pytest.mark.parametrize("strength", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("rates", [[1.0, 1.0], [1.0, 0.0], [0.5, 2.0]])
@pytest.mark.parametrize(("penalty", "rho"), CASES, ids=IDS)
def test_prox_of_pairs_equals_search(penalty, rho, rates, strength):
    tensors = draw(2, (3,))
    got = torch.stack(penalty.prox(tensors, strength, rates))
    for k in range(3):
        w = [float(t[k]) for t in tensors]
        slow = prox_by_search(w, rates, strength, rho)
        torch.testing.assert_close(got[:, k], torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [0.05, 0.4])
@pytest.mark.parametrize("rates", [[1.0] * 4, [0.5, 0.0, 0.5, 0.5], [1.0, 0.0, 0.0, 1.0]])
@pytest.mark.parametrize(("penalty", "rho"), CASES[:2], ids=IDS[:2])
def test_prox_of_groups_equals_search(penalty, rho, rates, strength):
    tensors = draw(4, (2,))
    got = torch.stack(penalty.prox(tensors, strength, rates))
    for k in range(2):
        w = [float(t[k]) for t in tensors]
        slow = prox_by_search(w, rates, strength, rho, sweeps=20)
        torch.testing.assert_close(got[:, k], torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-5)


def test_l2_prox_closed_forms():
    s, tensors = 0.3, draw(5)
    mean = torch.stack(tensors).mean(0)
    for w, v in zip(tensors, L2().prox(tensors, s, [1.0] * 5), strict=True):
        torch.testing.assert_close(v, mean + (w - mean) / (1 + 5 * s), rtol=1e-12, atol=1e-12)
    w, f = tensors[:2]
    torch.testing.assert_close(L2().prox([w, f], s, [1.0, 0.0])[0], f + (w - f) / (1 + s), rtol=1e-12, atol=1e-12)
    free, frozen = tensors[:3], tensors[3:]
    moved = L2().prox(tensors, s, [1.0] * 3 + [0.0] * 2)
    free_mean, frozen_mean = torch.stack(free).mean(0), torch.stack(frozen).mean(0)
    centre = (free_mean + s * 2 * frozen_mean) / (1 + 2 * s)
    torch.testing.assert_close(torch.stack(moved[:3]).mean(0), centre, rtol=1e-12, atol=1e-12)
    for before, after in zip(free, moved, strict=False):
        torch.testing.assert_close(after - centre, (before - free_mean) / (1 + 5 * s), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(moved[3:], frozen, strict=True))


@pytest.mark.parametrize("strength", [0.01, 4.0, 1e30])
@pytest.mark.parametrize("rates", [[0.5, 2.0], [1.0, 1.0], [0.5] * 3, [3.0] * 5], ids=str)
def test_an_explicit_step_of_l2_is_its_proximal_step(rates, strength):
    tensors = [torch.randn(50, dtype=torch.float64) for _ in rates]
    steps, gradients = L2().explicit_steps(strength, rates), L2().gradient(tensors)
    for w, step, gradient, expected in zip(tensors, steps, gradients, L2().prox(tensors, strength, rates), strict=True):
        torch.testing.assert_close(w - step * gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("penalty", "strength", "rates"),
    [
        (L2(), math.inf, [1.0, 1.0]),  # which makes them equal, bit by bit
        (L2(), 1.0, [1.0, 0.0]),
        (L2(), 1.0, [1.0, 2.0, 1.0]),
        (L1(), 1.0, [1.0, 1.0]),
        (Huber(1.0), 1.0, [1.0, 1.0]),
        (type("Changed", (L2,), {"prox": L1.prox})(), 1.0, [1.0, 1.0]),
    ],
)
def test_other_proximal_steps_are_no_explicit_ones(penalty, strength, rates):
    assert penalty.explicit_steps(strength, rates) is None


@pytest.mark.parametrize("penalty", [L2(), L1()], ids=["l2", "l1"])
@pytest.mark.parametrize("m", [2, 5])
def test_infinite_strength_gives_the_mean(penalty, m):
    tensors = draw(m)
    mean = torch.stack(tensors).mean(0)
    for v in penalty.prox(tensors, math.inf, [0.1] * m):
        torch.testing.assert_close(v, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [L2(), L1(), Huber(0.5)], ids=IDS)
def test_infinite_strength_is_the_limit_for_unequal_rates(penalty):
    equal = penalty.prox([torch.randn(1000), torch.randn(1000)], math.inf, [0.1, 0.1])
    assert torch.equal(*equal)
    tensors, rates = draw(2), [0.1, 0.3]
    limit = penalty.prox(tensors, 1e12, rates)
    for v, expected in zip(penalty.prox(tensors, math.inf, rates), limit, strict=True):
        torch.testing.assert_close(v, expected, rtol=1e-9, atol=1e-9)
    frozen = penalty.prox(tensors, math.inf, [0.1, 0.0])
    torch.testing.assert_close(frozen[0], tensors[1])
    assert torch.equal(frozen[1], tensors[1])
    assert all(torch.equal(a, b) for a, b in zip(penalty.prox(tensors, math.inf, [0.0, 0.0]), tensors, strict=True))


def test_l1_prox_of_groups_needs_one_rate():
    with pytest.raises(ValueError, match="needs one learning rate"):
        L1().prox(draw(3), 0.1, [0.1, 0.2, 0.1])


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, math.nan])
def test_huber_delta_out_of_range(delta):
    with pytest.raises(ValueError, match="delta must be above 0"):
        Huber(delta)


def test_gradcheck():
    tensors = [w.requires_grad_() for w in draw(3)]
    assert gradcheck(lambda *w: l2(w), tensors)
    assert gradcheck(lambda *w: l1(w), tensors)
    assert gradcheck(lambda a, b: huber(a, b, 0.5), tensors[:2])


def test_a_new_penalty_is_a_few_lines():
    class LogCosh(Penalty):
        def value(self, tensors):
            a, b = tensors
            return (a - b).cosh().log().sum()

    a, b = draw(2)
    [grad, _] = LogCosh().gradient([a, b])
    torch.testing.assert_close(grad, (a - b).tanh())


def complex_numbers(m):
    return [torch.randn(2, 3, dtype=torch.complex128) for _ in range(m)]


def as_real(tensors):
    return [torch.view_as_real(tensor).clone() for tensor in tensors]


def test_a_complex_distance_by_hand():
    assert l2([torch.tensor([1j]), torch.tensor([0j])]).item() == 0.5
    assert gap([torch.tensor([1j]), torch.tensor([-1j])]) == 1.0
    assert l2([torch.tensor([1j]), torch.tensor([-1j]).conj()]).item() == 0.0  # its conjugation is lazy


@pytest.mark.parametrize("m", [2, 3, 5])
def test_l2_of_complex_weights_is_that_of_their_real_and_imaginary_parts(m):
    """Its value, its gradients by autograd and by hand, its proximal step, and the gap."""
    weights = complex_numbers(m)
    assert l2(weights).item() == pytest.approx(l2(as_real(weights)).item(), rel=1e-12)
    assert gap(weights) == pytest.approx(gap(as_real(weights)), rel=1e-12)
    rates = [0.3, *[0.0] * (m - 2), 0.7]
    for ask in (L2().gradient, lambda w: Penalty.gradient(L2(), w), lambda w: L2().prox(w, 0.4, rates)):
        for got, expected in zip(ask(weights), ask(as_real(weights)), strict=True):
            torch.testing.assert_close(torch.view_as_real(got), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["add_gradients_", "pull_", "prox_"])
@pytest.mark.parametrize("relation", ["", " | o i -> i o"])
def test_the_updates_of_complex_weights_are_those_of_their_parts(method, relation):
    model, parts = nn.Module(), nn.Module()
    model.a, model.b = map(nn.Parameter, complex_numbers(2))
    if relation:
        model.b = nn.Parameter(model.b.detach().T.clone())
    parts.a, parts.b = map(nn.Parameter, as_real([model.a.detach(), model.b.detach()]))
    getattr(TyingPenalty(resolve(model, [f"a ~ b{relation}"])), method)(0.3)
    getattr(TyingPenalty(resolve(parts, [f"a ~ b{relation and ' | o i c -> i o c'}"])), method)(0.3)
    for name, parameter in model.named_parameters():
        given, expected = (p.grad if method == "add_gradients_" else p for p in (parameter, parts.get_parameter(name)))
        torch.testing.assert_close(torch.view_as_real(given.detach()), expected.detach(), rtol=1e-12, atol=1e-12)


def test_complex_anchors():
    weight, anchor = complex_numbers(2)
    penalty = anchored({"w": nn.Parameter(weight)}, {"w": anchor})
    assert penalty().item() == pytest.approx(0.5 * float((weight - anchor).abs().square().sum()), rel=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        l1,
        lambda w: huber(*w, delta=1.0),
        L1().value,
        Huber().value,
        lambda w: mixture_nll(w[0], *torch.zeros(3, 1)),
        lambda w: GaussianMixturePrior()(w[0]),
        lambda w: GaussianMixturePrior().add_gradients_([nn.Parameter(w[0])], 1.0),
    ],
)
def test_complex_weights_are_refused_where_there_is_no_order(call):
    with pytest.raises(ConfigurationError, match="takes real weights, and some are complex"):
        call(complex_numbers(2))
