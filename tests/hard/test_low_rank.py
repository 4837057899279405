"""Low rank plus a diagonal takes back every weight that it can produce, and comes as near others as alternating."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tying import ConfigurationError
from tying.hard import LowRankPlusDiagonal, lower_rank
from tying.hard.factorization import factorize
from tying.hard.low_rank import low_rank_plus_diagonal

SIZE = 32


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(rank):
    return torch.linalg.qr(normal(SIZE, SIZE))[0][:, :rank]


PRODUCTS = {
    "random": lambda rank: normal(SIZE, rank) @ normal(rank, SIZE) / SIZE**0.5,
    "small": lambda rank: normal(SIZE, rank) @ normal(rank, SIZE) / 1e3,
    "symmetric": lambda rank: (lambda factor: factor @ factor.T)(normal(SIZE, rank)),
    "repeated singular values": lambda rank: orthogonal(rank) @ orthogonal(rank).T,
    "rank-deficient": lambda rank: normal(SIZE, rank // 2) @ normal(rank // 2, SIZE),
    "rows of all scales": lambda rank: torch.logspace(-3, 3, SIZE).double()[:, None] * normal(SIZE, rank) @ normal(rank, SIZE),
}  # fmt: skip
DIAGONALS = {
    "random": lambda: normal(SIZE),
    "large": lambda: 1e4 * normal(SIZE),
    "of all scales": lambda: torch.logspace(-6, 6, SIZE).double() * normal(SIZE).sign(),
    "equal": lambda: torch.ones(SIZE).double(),
}


def error(weight, rank):
    """Return the relative error, weighted so that a large diagonal does not hide the other entries."""
    step = LowRankPlusDiagonal(rank)
    stored = step(*step.right_inverse(weight))
    beside = [matrix.double() - torch.diag(matrix.diag()).double() for matrix in (stored - weight, weight)]
    whole = (stored - weight).double().norm() / weight.double().norm()
    return float(max(whole, beside[0].norm() / beside[1].norm().clamp(min=1e-300)))


@pytest.mark.parametrize("rank", [0, 1, 7, SIZE // 2 - 1])
@pytest.mark.parametrize("diagonal", DIAGONALS.values(), ids=DIAGONALS)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_every_weight_of_the_form_is_taken_back(product, diagonal, rank):
    torch.manual_seed(0)
    weight = product(rank) + torch.diag(diagonal())
    state = torch.get_rng_state()
    assert error(weight, rank) < 1e-6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "rank"), [(64, 16), (33, 16), (5, 2), (3, 1), (2, 0)])
def test_weights_of_several_sizes_are_taken_back(size, rank):
    for seed in range(5):
        torch.manual_seed(seed)
        product = (torch.randn(size, rank).double() / 4) @ (torch.randn(rank, size).double() / 8)
        weight = product + torch.diag(torch.randn(size).double())
        assert error(weight, rank) < 1e-6
        assert error(weight.float(), rank) < 1e-5


@pytest.mark.parametrize("rank", [SIZE // 2, SIZE // 2 + 2, SIZE - 1, SIZE])
def test_of_half_the_side_or_more(rank):
    """Several diagonals may do, and the search has no exact start: most weights are taken back all the same."""
    torch.manual_seed(0)
    assert error(PRODUCTS["random"](rank) + torch.diag(normal(SIZE)), rank) < 1e-6


SCALES = {
    "inputs": torch.logspace(-2, 2, SIZE)[None].double(),
    "rows": torch.logspace(-2, 2, SIZE)[:, None].double(),
    "with dead ones": torch.logspace(-2, 2, SIZE)[None].double() * (torch.arange(SIZE) % 3 > 0),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_scale_weighs_the_errors(scale):
    """The error is that of the truncated singular value decomposition of the weighted matrix."""
    torch.manual_seed(0)
    weight = normal(SIZE, SIZE)
    least = torch.linalg.svdvals(scale * weight)[4:].norm()
    left, right = factorize(weight, 4, scale)
    assert float((scale * (left @ right - weight)).norm()) == pytest.approx(float(least), rel=1e-4)
    plain = factorize(weight, 4)
    assert float((scale * (plain[0] @ plain[1] - weight)).norm()) > 1.5 * float(least)


def test_a_scale_of_zero_throughout_says_nothing():
    weight = normal(SIZE, SIZE)
    for factor, expected in zip(factorize(weight, 4, torch.zeros(1, SIZE)), factorize(weight, 4), strict=True):
        assert torch.equal(factor, expected)


def alternated(weight, rank, sweeps=50):
    """Return the weight after alternating between the best factors and the best diagonal."""
    diagonal = torch.zeros(len(weight)).double()
    for _ in range(1 + sweeps):
        left, right = factorize(weight - torch.diag(diagonal), rank)
        diagonal = torch.diag(weight - left @ right)
    return low_rank_plus_diagonal(left, right, diagonal)


OTHERS = {
    "random": lambda rank: normal(SIZE, SIZE),
    "uniform": lambda rank: torch.rand(SIZE, SIZE).double() - 0.5,
    "orthogonal": lambda rank: orthogonal(SIZE),
    "symmetric": lambda rank: (lambda weight: weight + weight.T)(normal(SIZE, SIZE)),
    "large diagonal": lambda rank: normal(SIZE, SIZE) + 20 * torch.diag(normal(SIZE)),
    "near the identity": lambda rank: torch.eye(SIZE).double() + normal(SIZE, SIZE) / SIZE,
    "noise": lambda rank: PRODUCTS["random"](rank) + torch.diag(normal(SIZE)) + 0.01 * normal(SIZE, SIZE),
    "of higher rank": lambda rank: PRODUCTS["random"](rank + 3) + torch.diag(normal(SIZE)),
}


@pytest.mark.parametrize("rank", [0, 1, 4, 12, 20])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_weights_come_as_near_as_by_alternating(other, rank):
    for seed in range(3):
        torch.manual_seed(seed)
        weight, step = other(rank), LowRankPlusDiagonal(rank)
        ours, theirs = (step(*step.right_inverse(weight)), alternated(weight, rank) if rank else weight.diag().diag())
        assert (weight - ours).norm() <= (weight - theirs).norm() * (1 + 1e-5)


CHEAP = {
    "linear": (lambda: nn.Linear(20, 30), (7, 20)),
    "linear without a bias": (lambda: nn.Linear(20, 30, bias=False), (2, 3, 20)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "dilated, circular": (lambda: nn.Conv1d(6, 8, 3, padding="same", dilation=2, padding_mode="circular"), (2, 6, 9)),
    "three dimensions": (lambda: nn.Conv3d(2, 6, (1, 2, 3), bias=False), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("layer", CHEAP)
def test_layers_of_low_rank_multiply_by_the_factors(layer, diagonal):
    make, shape = CHEAP[layer]
    make = (lambda: nn.Linear(20, 20)) if diagonal and layer.startswith("linear") else make
    model, x = nn.Sequential(make()).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if diagonal and not layer.startswith("linear"):
        with pytest.raises(ConfigurationError, match="needs a square weight"):
            lower_rank(model, ["*"], 2, diagonal)
        return
    plain = copy.deepcopy(model)
    lower_rank(model, ["0.weight"], 2, diagonal)
    assert type(model[0]).forward is not type(plain[0]).forward
    weights = {"weight": model[0].weight} | ({"bias": model[0].bias} if model[0].bias is not None else {})
    outputs = [model(x), torch.func.functional_call(plain[0], weights, (x,))]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), [x, *model.parameters()]) for output in outputs]
    for by_factors, by_weight in zip(*gradients, strict=True):
        torch.testing.assert_close(by_factors, by_weight, rtol=1e-10, atol=1e-10)
    restored = copy.deepcopy(model)
    parametrize.remove_parametrizations(restored[0], "weight")
    torch.testing.assert_close(restored(x), outputs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda: nn.Linear(20, 30), 12),  # 12 · (20 + 30) = 20 · 30
        (lambda: nn.Conv2d(8, 8, 3, groups=2), 2),
        (lambda: nn.ConvTranspose2d(4, 8, 3), 2),
        (lambda: nn.Bilinear(4, 4, 8), 2),
    ],
)
def test_other_layers_compute_their_weights(make, rank):
    model = nn.Sequential(make())
    forward = type(model[0]).forward
    lower_rank(model, ["0.weight"], rank)
    assert type(model[0]).forward is forward
