"""The mixture prior: values, gradients, limits, merging and quantising."""

import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from tying import compiled
from tying.soft import GaussianMixturePrior, l2, mixture_nll, responsibilities

MIXTURE = (
    torch.tensor([0.0, -0.4, 0.3], dtype=torch.float64),
    torch.tensor([-3.0, -1.5, -2.0], dtype=torch.float64),
    torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(),
)


def weights(*shape, seed=0):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_torch(w, means, log_stds, log_proportions):
    mixture = MixtureSameFamily(Categorical(logits=log_proportions), Normal(means, log_stds.exp()))
    return -mixture.log_prob(w.flatten()).sum()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 3), (20_000,), (3, 2, 4097)])
def test_value_and_gradients_equal_autograd(shape):
    leaves = [part.clone().requires_grad_() for part in (weights(*shape), *MIXTURE)]
    value = mixture_nll(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    means, log_stds, log_proportions = leaves[1:]
    density = log_proportions[:, None] + Normal(means[:, None], log_stds.exp()[:, None]).log_prob(leaves[0].flatten())
    reference = -density.logsumexp(dim=0).sum()
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    if leaves[0].numel():
        torch.testing.assert_close(value, by_torch(*leaves), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(reference, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-10)


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is an optional package")
@pytest.mark.parametrize("std", [None, 0.003], ids=["wide", "tight"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 3), (3000,), (400, 500)])
def test_compiled_loops_compute_what_torch_does(shape, std, monkeypatch):
    prior = GaussianMixturePrior(std=std)
    w, results = (0.1 * weights(*shape)).float(), []
    for works in (True, False):
        monkeypatch.setattr(compiled, "is_working", partial(bool, works))
        leaves = [part.detach().requires_grad_() for part in (w, *prior.mixture())]
        value = mixture_nll(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for fast, by_torch in zip(*results, strict=True):
        scale = float(by_torch.detach().abs().max()) if by_torch.numel() else 0.0
        torch.testing.assert_close(fast, by_torch, rtol=0, atol=5e-6 * scale)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the compiler
def test_the_prior_compiles_as_a_whole():
    w, mixture = weights(20).float(), [part.detach() for part in GaussianMixturePrior().mixture()]
    compiled_nll = torch.compile(lambda w: mixture_nll(w, *mixture), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_nll(w), mixture_nll(w, *mixture))


def test_negative_views_are_read():
    w, mixture = torch.randn(8, dtype=torch.cfloat).conj().imag, GaussianMixturePrior().mixture()
    torch.testing.assert_close(mixture_nll(w, *mixture), mixture_nll(w.clone(), *mixture))


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is an optional package")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_compiled_loops_keep_what_is_not_finite(bad):
    leaves = [part.detach().requires_grad_() for part in (torch.tensor([0.1, bad]), *GaussianMixturePrior().mixture())]
    value = mixture_nll(*leaves)
    into_w, *_ = torch.autograd.grad(value, leaves)
    assert value.isnan()
    assert into_w.isfinite().tolist() == [True, False]


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is an optional package")
def test_compiled_loops_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(compiled, "TWO_THREADS", 1)
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [part.detach().requires_grad_() for part in (weights(999).float(), *GaussianMixturePrior().mixture())]
        value = mixture_nll(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_gradients_are_the_papers_formulas():
    w = weights(50)
    means, log_stds, _ = MIXTURE
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    leaves = [part.clone().requires_grad_() for part in (w, means, log_stds, logits)]
    proportions = leaves[3].log_softmax(dim=0)
    into_w, into_means, into_stds, into_logits = torch.autograd.grad(mixture_nll(*leaves[:3], proportions), leaves)
    r, precisions, away = responsibilities(w, means, log_stds, proportions), (-2 * log_stds).exp(), w - means[:, None]
    torch.testing.assert_close(into_w, (r * away * precisions[:, None]).sum(0))
    torch.testing.assert_close(into_means, (-r * away * precisions[:, None]).sum(1))
    torch.testing.assert_close(into_stds, (r * (1 - away.square() * precisions[:, None])).sum(1))
    torch.testing.assert_close(into_logits, (logits.softmax(0)[:, None] - r).sum(1))


def test_a_second_derivative_is_refused():
    leaves = [part.clone().requires_grad_() for part in (weights(5), *MIXTURE)]
    with pytest.raises(RuntimeError, match="mixture_nll has no second derivative"):
        torch.autograd.grad(mixture_nll(*leaves), leaves[0], create_graph=True)


def test_one_component_at_zero_is_weight_decay():
    w = weights(9, 4).requires_grad_()
    zero, std = torch.zeros(1, dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    [gradient] = torch.autograd.grad(mixture_nll(w, zero, std.log(), zero), w)
    torch.testing.assert_close(gradient, w.detach() / 0.2**2)


def test_one_component_at_the_mean_is_soft_tying():
    w, sigma = weights(6), 0.3
    leaf = w.clone().requires_grad_()
    one = torch.zeros(1, dtype=torch.float64)
    [gradient] = torch.autograd.grad(mixture_nll(leaf, w.mean()[None], one + math.log(sigma), one), leaf)
    pairs = [entry.clone().requires_grad_() for entry in w]
    expected = torch.autograd.grad(l2(pairs) / (len(w) * sigma**2), pairs)
    torch.testing.assert_close(gradient, torch.stack(expected))


def test_narrow_components_are_responsible_for_what_is_nearest():
    w, means = weights(100), MIXTURE[0]
    r = responsibilities(w, means, torch.full((3,), -9.0).double(), torch.zeros(3).double())
    assert torch.equal(r.argmax(0), (w - means[:, None]).abs().argmin(0))
    assert bool((r.amax(0) > 1 - 1e-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    exact, low = weights(5000).requires_grad_(), weights(5000).to(dtype).requires_grad_()
    value = mixture_nll(low, *(part.float() for part in MIXTURE))
    reference = mixture_nll(low.detach().double().requires_grad_(), *MIXTURE)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-3)
    value.backward()
    mixture_nll(exact, *MIXTURE).backward()
    assert low.grad.dtype is dtype
    scale = exact.grad.abs().max()
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert float((low.grad.double() - exact.grad).norm() / exact.grad.norm()) < tolerance, scale


def prior(**options):
    return GaussianMixturePrior(**{"components": 5, "zero_weight": 0.6, "low": -0.5, "high": 0.5, **options}).double()


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_in_place_equal_autograd(contiguous):
    ours, reference = prior(), prior()
    made = [torch.nn.Parameter(weights(30, 20, seed=seed)) for seed in (0, 1)]
    if not contiguous:
        made[0] = torch.nn.Parameter(made[0].detach().T)
    copies = [torch.nn.Parameter(w.detach().clone()) for w in made]
    made[1].grad, copies[1].grad = torch.ones_like(made[1]), torch.ones_like(made[1])
    value = ours.add_gradients_(made, strength=0.01, scale=3.0)
    whole = mixture_nll(torch.cat([w.flatten() for w in copies]), *reference.mixture()) + reference.hyper_penalty()
    torch.testing.assert_close(value, whole.detach())
    before = [None if w.grad is None else w.grad.clone() for w in copies]
    (0.01 * whole).backward()
    for w, copy, old in zip(made, copies, before, strict=True):
        old = torch.zeros_like(copy) if old is None else old
        torch.testing.assert_close(w.grad, old + 3.0 * (copy.grad - old))
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_start():
    one = GaussianMixturePrior(components=17, zero_weight=0.999, low=-0.6, high=0.6)
    means, log_stds, log_proportions = (part.detach() for part in one.mixture())
    assert means[0] == 0
    torch.testing.assert_close(means[1:], torch.linspace(-0.6, 0.6, 16))
    torch.testing.assert_close(log_proportions.exp(), torch.tensor([0.999, *[0.001 / 16] * 16]))
    assert float(log_stds[0].exp()) == pytest.approx(0.02, rel=1e-3)
    assert float(log_stds[1].exp()) == pytest.approx(0.08)


def test_hyper_priors_have_their_mode_where_gammas_have():
    one = prior()
    optimizer = torch.optim.LBFGS([one.log_stds], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = one.hyper_penalty()
        penalty.backward()
        return penalty

    optimizer.step(closure)
    precisions = (-2 * one.log_stds.detach()).exp()
    assert float(precisions[0]) == pytest.approx((5e3 - 1) / 2.0, rel=1e-4)
    assert precisions[1:].tolist() == pytest.approx([(250 - 1) / 0.1] * 4, rel=1e-4)


def density(one, at):
    return by_torch(at, *(part.detach() for part in one.mixture())).detach()


@pytest.mark.parametrize("average", ["variance", "precision"])
def test_merging_equal_components_changes_no_density(average):
    one = prior()
    with torch.no_grad():
        one.means.copy_(torch.tensor([-0.3, 0.2, -0.3, 0.5]))
        one.log_stds.copy_(torch.tensor([-3.0, -2.0, -1.0, -2.0, -1.5]))
        one.logits.copy_(torch.tensor([0.3, -0.2, 0.5, 1.0]))
    before = [density(one, at) for at in weights(50)[:, None]]
    assert one.merge(average=average) == 4
    assert sorted(one.means.tolist()) == pytest.approx([-0.3, 0.2, 0.5])
    torch.testing.assert_close([density(one, at) for at in weights(50)[:, None]], before)
    assert one.merge() == 4


def test_merging_follows_chains_and_averages():
    one = prior()
    with torch.no_grad():
        one.means.copy_(torch.tensor([0.30, 0.31, 0.32, -0.4]))
        one.log_stds.copy_(torch.tensor([0.02, 0.02, 0.03, 0.02, 0.02]).log())
        one.logits.copy_(torch.tensor([0.5, 0.3, 0.1, 0.1]).log())
    near, far = (Normal(one.means[i], one.log_stds[i + 1].exp()) for i in (0, 2))
    middle = Normal(one.means[1], one.log_stds[2].exp())
    threshold = 0.26
    assert min(kl_divergence(near, middle), kl_divergence(middle, near)) < threshold
    assert min(kl_divergence(far, middle), kl_divergence(middle, far)) < threshold
    assert min(kl_divergence(near, far), kl_divergence(far, near)) > threshold
    assert one.merge(threshold) == 3
    one.requires_grad_(False)
    share = torch.tensor([0.5, 0.3, 0.1]) / 0.9
    assert float(one.means[0]) == pytest.approx(float((share * torch.tensor([0.30, 0.31, 0.32])).sum()))
    spread = (share * torch.tensor([0.02, 0.03, 0.02]).square()).sum().sqrt()
    assert float(one.log_stds[1].exp()) == pytest.approx(float(spread))
    assert one.mixture()[2].exp().tolist() == pytest.approx([0.6, 0.36, 0.04])


def test_what_merges_with_zero_is_at_zero():
    one = prior()
    with torch.no_grad():
        one.means.copy_(torch.tensor([1e-4, 0.3, 0.5, -0.4]))
        one.log_stds.fill_(math.log(0.05))
    assert one.merge(1e-3) == 4
    assert one.all_means()[0] == 0
    assert one.zero_weight == pytest.approx(0.7)


def test_quantising():
    one, w = prior(), weights(40, 30)
    quantised = one.quantize(w)
    assert quantised.shape == w.shape
    assert len(quantised.unique()) <= 5
    assert torch.equal(one.quantize(quantised), quantised)
    assert torch.equal(quantised == 0, one.assign(w) == 0)
    assert torch.equal(one.all_means()[one.assign(w)], quantised)
    assert one.quantize(torch.zeros(0)).shape == (0,)


def test_a_component_that_does_not_own_its_mean_owns_nothing():
    one = prior(components=3)
    with torch.no_grad():
        one.means.copy_(torch.tensor([0.1, 0.11]))
        one.log_stds.copy_(torch.tensor([0.01, 0.001, 0.3]).log())  # the last is buried under the first at its mean?
        one.logits.copy_(torch.tensor([5.0, 0.0]))
    w = torch.linspace(-1, 1, 2001).double()
    quantised = one.quantize(w)
    assert torch.equal(one.quantize(quantised), quantised)
    owned = one.assign(one.all_means())
    assert set(one.assign(w).tolist()) <= set(owned.tolist())


def test_a_merged_prior_is_saved_and_loaded():
    one, other = prior(), prior()
    with torch.no_grad():
        one.means[0] = one.means[1]
        one.log_stds[1] = one.log_stds[2]
    assert one.merge() == 4
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(weights(10)), one(weights(10)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"components": 1}, "components must be 2 or more, not 1"),
        ({"zero_weight": 1.0}, r"zero_weight must be in \(0, 1\), not 1.0"),
        ({"low": 1.0, "high": 1.0}, "low must be below high, not 1.0 and 1.0"),
        ({"std": 0.0}, "std must be above 0, not 0.0"),
        ({"gamma": (1.0, 0.1)}, "a of gamma must be above 1, not 1.0"),
        ({"zero_gamma": (5.0, 0.0)}, "b of zero_gamma must be above 0, not 0.0"),
    ],
)
def test_mistakes(options, told):
    with pytest.raises(ValueError, match=told):
        GaussianMixturePrior(**options)


MEMORY = """
import resource, torch
from tying.soft import GaussianMixturePrior
prior, weights = GaussianMixturePrior(), (0.05 * torch.randn(8_000_000)).requires_grad_()
prior(weights[:1000]).backward()
weights.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prior(weights).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * len(weights)))
"""


def test_memory_is_that_of_two_copies_of_the_weights():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.2


def test_quantising_in_low_precision_is_idempotent():
    one = GaussianMixturePrior(components=4)
    with torch.no_grad():
        one.means.copy_(torch.tensor([0.1, 0.3, 0.5]))
        one.log_stds.fill_(math.log(1e-4))
    quantised = one.quantize(one.means.detach().bfloat16())
    assert torch.equal(quantised, one.means.detach().bfloat16())
    assert torch.equal(one.quantize(quantised), quantised)


def test_weights_far_from_all_components():
    w = torch.tensor([0.0, 3.0, -50.0, 1e4], dtype=torch.float64, requires_grad=True)
    value = mixture_nll(w, *MIXTURE)
    density = MIXTURE[2][:, None] + Normal(MIXTURE[0][:, None], MIXTURE[1].exp()[:, None]).log_prob(w)
    reference = -density.logsumexp(dim=0).sum()
    torch.testing.assert_close(value, reference)
    for ours, theirs in zip(torch.autograd.grad(value, w), torch.autograd.grad(reference, w), strict=True):
        torch.testing.assert_close(ours, theirs)
    far = torch.linspace(-2.0, 2.0, 1000)
    low = mixture_nll(far, *(part.float() for part in MIXTURE))
    torch.testing.assert_close(low.double(), mixture_nll(far.double(), *MIXTURE), rtol=1e-5, atol=1e-3)


def test_an_optimizer_keeps_what_is_loaded():
    prior, trained = GaussianMixturePrior(components=4), GaussianMixturePrior(components=4, low=-1.0, high=1.0)
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.1)
    prior.load_state_dict(trained.state_dict())
    prior(torch.randn(9)).backward()
    optimizer.step()
    assert not torch.equal(prior.means, trained.means)
