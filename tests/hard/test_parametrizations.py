"""One contract for every parametrization, and the facts of each."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

from tying.hard import (
    HyperWeight,
    LowRank,
    LowRankPlusDiagonal,
    TemplateBank,
    TemplateMixture,
    fold,
    generate_weights,
    layer_similarity,
    load_plain,
    plot_similarity,
    share_templates,
)
from tying.hard.hypernetwork import generate
from tying.hard.low_rank import low_rank_plus_diagonal


def rank_of(matrix):
    return int(torch.linalg.matrix_rank(matrix.detach(), rtol=1e-4))


def is_low_rank(layer):
    return rank_of(layer.weight.flatten(1)) <= 2


def is_low_rank_plus_diagonal(layer):
    left, right, diagonal = layer.parametrizations.weight[0].right_inverse(layer.weight.detach())
    return torch.allclose(left @ right + diagonal.diag(), layer.weight, atol=0.05)


def is_mixture(layer):
    templates = layer.parametrizations.weight[0].bank.templates
    return rank_of(torch.stack([*templates, layer.weight.flatten()])) == len(templates)


def is_generated(layer):
    hyper = layer.parametrizations.weight[0]
    return torch.allclose(hyper(hyper.right_inverse(layer.weight)), layer.weight, atol=1e-4)


CASES = {
    "low rank": (lambda: nn.Linear(6, 5), lambda: LowRank(2), is_low_rank),
    "low rank, kernel": (lambda: nn.Conv2d(4, 6, 3), lambda: LowRank(2), is_low_rank),
    "low rank plus diagonal": (lambda: nn.Linear(6, 6), lambda: LowRankPlusDiagonal(2), is_low_rank_plus_diagonal),
    "templates": (lambda: nn.Conv2d(4, 6, 3), lambda: TemplateMixture(TemplateBank(3, (6, 4, 3, 3))), is_mixture),
    "hypernetwork": (lambda: nn.Conv2d(4, 6, 3), lambda: HyperWeight(2, 3, 3, embedding=4), is_generated),
}


@pytest.mark.parametrize(("layer", "parametrization", "holds"), CASES.values(), ids=CASES)
def test_contract(layer, parametrization, holds):
    layer = layer()
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", parametrization())
    assert layer.weight.shape == plain.weight.shape
    assert holds(layer)  # after right_inverse of the first weight
    layer.weight = torch.randn_like(plain.weight)
    assert holds(layer)  # and of any
    x = torch.randn(2, 6 if isinstance(layer, nn.Linear) else 4, 8, 8).flatten(1)[
        :, : 6 if isinstance(layer, nn.Linear) else None
    ]
    x = x if isinstance(layer, nn.Linear) else x.view(2, 4, 8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
    assert holds(layer)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    with torch.no_grad():
        layer.weight = layer.weight * 0
    assert not torch.equal(copied(x), layer(x))
    state = copied.state_dict()
    layer.load_state_dict(state)
    assert torch.equal(copied(x), layer(x))


def test_low_rank_is_the_nearest():
    weight = torch.randn(5, 7, dtype=torch.float64)
    layer = nn.Linear(7, 5, bias=False, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", LowRank(3))
    layer.weight = weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - layer.weight).norm(), values[3:].norm())


@pytest.mark.parametrize("kind", [LowRank, LowRankPlusDiagonal])
def test_full_rank_is_the_full_matrix(kind):
    layer = nn.Linear(5, 5, dtype=torch.float64)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", kind(5))
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plus", [False, True], ids=["", "plus diagonal"])
@pytest.mark.parametrize("rank", [0, 1], ids=["zero", "deficient"])
def test_a_weight_of_less_than_the_rank_trains(rank, plus):
    """Factors that are both zero would be a saddle; rows of zeros and a one would see one input alone."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64))
    before, state = layer.weight.detach().clone(), torch.get_rng_state()
    parametrize.register_parametrization(layer, "weight", LowRankPlusDiagonal(3) if plus else LowRank(3))
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.parametrizations.weight.original1.abs().min() > 0
    optimizer, x = torch.optim.SGD(layer.parameters(), 0.1), torch.randn(8, 6, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    for factor, dim in ((layer.parametrizations.weight.original0, 0), (layer.parametrizations.weight.original1, 1)):
        assert factor.grad.norm(dim=dim).min() > 0


def test_identity_factor_and_rank_zero():
    left, diagonal = torch.randn(4, 4), torch.randn(4)
    assert torch.equal(low_rank_plus_diagonal(left, torch.eye(4), torch.zeros(4)), left)
    assert torch.equal(low_rank_plus_diagonal(torch.zeros(4, 0), torch.zeros(0, 4), diagonal), diagonal.diag())
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", LowRankPlusDiagonal(0))
    assert torch.equal(layer.weight, before.diag().diag())


def test_alternating_finds_both_parts():
    torch.manual_seed(0)
    true = torch.randn(12, 1, dtype=torch.float64) @ torch.randn(1, 12, dtype=torch.float64) + 3 * torch.eye(12)
    left, right, diagonal = LowRankPlusDiagonal(1).right_inverse(true)
    torch.testing.assert_close(low_rank_plus_diagonal(left, right, diagonal), true, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "m", "rank", "plus"), [(8, 8, 3, True), (8, 5, 3, False)])
def test_parameters_of_low_rank(n, m, rank, plus):
    layer = nn.Linear(m, n, bias=False)
    parametrize.register_parametrization(layer, "weight", LowRankPlusDiagonal(rank) if plus else LowRank(rank))
    assert sum(p.numel() for p in layer.parameters()) == (n + m) * rank + n * plus


def mixed(count, templates, layers=3):
    bank = TemplateBank(templates, (4, 4))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", TemplateMixture(bank))
    return bank, model


def alphas(model):
    return [layer.parametrizations.weight.original for layer in model]


def test_one_template_makes_all_layers_proportional():
    _, model = mixed(3, 1)
    assert rank_of(torch.stack([layer.weight.flatten() for layer in model])) == 1
    torch.testing.assert_close(layer_similarity(alphas(model)), torch.ones(3, 3))


def test_as_many_templates_as_layers_is_the_unshared_net():
    free = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    bank, model = mixed(3, 3)
    with torch.no_grad():
        for k, (layer, own) in enumerate(zip(model, free, strict=True)):
            bank.templates[k] = own.weight.flatten()
            layer.bias.copy_(own.bias)
            layer.parametrizations.weight.original.copy_(torch.eye(3)[k])
    x = torch.randn(5, 4)
    assert torch.equal(model(x), free(x))
    for net in (model, free):
        net(x).square().sum().backward()
    for k, own in enumerate(free):
        torch.testing.assert_close(bank.templates.grad[k], own.weight.grad.flatten())


def test_similarity_is_symmetric_and_blind_to_scale():
    rows = torch.randn(5, 3, dtype=torch.float64)
    matrix = layer_similarity(rows)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(layer_similarity(rows * torch.tensor([[1.0], [-2], [3], [4], [5]])), matrix)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(5, dtype=torch.float64))
    expected = abs(rows[0] @ rows[1]) / (rows[0].norm() * rows[1].norm())
    torch.testing.assert_close(matrix[0, 1], expected)


def test_folding_equal_layers_changes_nothing():
    _, model = mixed(3, 2, layers=4)
    with torch.no_grad():
        alphas(model)[2].copy_(alphas(model)[0])
    x = torch.randn(5, 4)
    before = model(x)
    assert fold(model) == [("0.weight", "2.weight")]
    assert torch.equal(model(x), before)
    assert model[2].parametrizations.weight.original is model[0].parametrizations.weight.original
    assert model[1].parametrizations.weight.original is not model[0].parametrizations.weight.original


def test_plot_of_similarity(tmp_path):
    plot_similarity(mixed(3, 2)[1], tmp_path / "lsm.png")
    with Image.open(tmp_path / "lsm.png") as image:
        assert image.size[0] > 100
    with pytest.raises(ValueError, match="no weight of the model is a mixture"):
        plot_similarity(nn.Linear(2, 2), tmp_path / "none.png")


def test_hypernetwork_by_loop():
    """The paper's sum, entry by entry."""
    hyper = HyperWeight(2, 3, 2, embedding=4, hidden=5).double()
    z = torch.randn(4, dtype=torch.float64)
    kernel = generate(z, hyper.inner, hyper.inner_bias, hyper.outer, hyper.outer_bias)
    for i in range(2):
        a = hyper.inner[i] @ z + hyper.inner_bias[i]
        for o in range(3):
            for f in range(2):
                for g in range(2):
                    expected = hyper.outer[o, f, g] @ a + hyper.outer_bias[o, f, g]
                    torch.testing.assert_close(kernel[o, i, f, g], expected, rtol=0, atol=1e-12)


def test_hypernetwork_has_the_papers_parameters():
    layer = parametrize.register_parametrization(nn.Conv2d(16, 16, 7, bias=False), "weight", HyperWeight(16, 16, 7, 4))
    assert sum(p.numel() for p in layer.parameters()) == 4244
    assert layer.parametrizations.weight.original.shape == (1, 1, 4)
    wide = parametrize.register_parametrization(nn.Conv2d(64, 32, 3), "weight", HyperWeight(16, 16, 3, 64))
    assert wide.parametrizations.weight.original.shape == (2, 4, 64)  # the paper's eight


def test_layers_of_equal_embeddings_have_equal_kernels():
    hyper = HyperWeight(2, 3, 3, embedding=4)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(2, 3, 3))
    for layer in model[::2]:
        parametrize.register_parametrization(layer, "weight", hyper)
    assert not torch.equal(model[0].weight, model[2].weight)
    with torch.no_grad():
        model[2].parametrizations.weight.original.copy_(model[0].parametrizations.weight.original)
    assert torch.equal(model[0].weight, model[2].weight)
    assert len({id(p) for p in model.parameters()}) == 2 + 2 + 4


def test_tiles_stand_where_they_belong():
    hyper = HyperWeight(2, 3, 3, embedding=4)
    embeddings = torch.randn(2, 3, 4)
    kernel = hyper(embeddings)
    assert kernel.shape == (6, 6, 3, 3)
    torch.testing.assert_close(kernel[3:, 4:], hyper(embeddings[1:, 2:]))


@pytest.mark.parametrize(
    ("layer", "make", "told"),
    [
        (lambda: nn.Linear(6, 4), lambda: LowRank(5), r"rank=5 is more than 4, the smaller side of a weight of shape \(4, 6\)"),
        (lambda: nn.LayerNorm(4), lambda: LowRank(1), r"a weight of shape \(4,\) has no rank to lower: leave it out"),
        (lambda: nn.Linear(6, 4), lambda: LowRankPlusDiagonal(1), r"needs a square weight, not \(4, 6\)"),
        (lambda: nn.Linear(6, 4), lambda: TemplateMixture(TemplateBank(1, (6, 4))), r"templates of shape \(6, 4\) do not fit a weight of shape \(4, 6\)"),
        (lambda: nn.Conv2d(6, 4, 3), lambda: HyperWeight(4, 4, 3), r"cannot be tiled from basic kernels of \(4, 4, 3, 3\)"),
        (lambda: nn.Linear(6, 4), lambda: LowRank(0), "rank must be 1 or more, not 0"),
        (lambda: nn.Linear(6, 4), lambda: LowRankPlusDiagonal(-1), "rank must be 0 or more, not -1"),
        (lambda: nn.Linear(6, 4), lambda: TemplateBank(0, (2, 2)), "templates must be 1 or more"),
    ],
)  # fmt: skip
def test_mistakes(layer, make, told):
    layer = layer()
    with pytest.raises(ValueError, match=told):
        parametrize.register_parametrization(layer, "weight", make())
    assert not parametrize.is_parametrized(layer)


def test_opposite_layers_are_not_folded():
    _, model = mixed(2, 2)
    with torch.no_grad():
        alphas(model)[1].copy_(-alphas(model)[0])
        alphas(model)[2].copy_(alphas(model)[0].flip(0) * torch.tensor([1.0, -1.0]))
    assert fold(model) == []
    with torch.no_grad():
        alphas(model)[1].copy_(3 * alphas(model)[0])
    assert fold(model) == [("0.weight", "1.weight")]


def test_a_low_rank_weight_keeps_its_shape():
    layer = parametrize.register_parametrization(nn.Linear(6, 4), "weight", LowRank(2))
    with pytest.raises(ValueError, match=r"a weight of shape \(4, 6\) cannot become one of \(3, 5\)"):
        layer.weight = torch.randn(3, 5)
    assert layer.weight.shape == (4, 6)


def test_plain_weights_of_wrong_shape_change_nothing():
    _, model = mixed(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).state_dict()
    with pytest.raises(
        ValueError, match=r"'2.weight' has shape \(5, 4\) in this state dict, and \(4, 4\) in the model"
    ):
        load_plain(model, {**plain, "2.weight": torch.zeros(5, 4)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_generated_kernels_have_kaimings_variance():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(64, 64, 3))
    generate_weights(model, ["*.weight"], embedding=64)
    for layer, inputs in zip(model, (16, 64), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (9 * inputs)) ** 0.5, rel=0.25)


KERNELS = {
    "templates": lambda model: share_templates(model, ["*.weight"], 2),
    "generated": lambda model: generate_weights(model, ["*.weight"], 4, 2, 2),
}


def kernels():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))


@pytest.mark.parametrize("share", KERNELS.values(), ids=KERNELS)
def test_shared_kernels_take_a_memory_format(share):
    model, x = kernels(), torch.randn(1, 4, 5, 5)
    share(model)
    before = model(x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), before)


@pytest.mark.parametrize("share", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("model", ["cpu", "meta"])
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_shared_kernels_lie_where_the_weights_do(share, model, default):
    net = kernels().to(model)
    with torch.device(default):
        share(net)
    assert {parameter.device.type for parameter in net.parameters()} == {model}


@pytest.mark.parametrize("share", KERNELS.values(), ids=KERNELS)
def test_shared_kernels_under_another_default_dtype(share):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = kernels()
        share(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("share", KERNELS.values(), ids=KERNELS)
def test_kernels_of_two_types_share_nothing(share):
    model = kernels()
    model[1].bfloat16()
    with pytest.raises(
        ValueError, match=r"'1\.weight' is torch.bfloat16 on cpu, and the parameters that it would share are torch.f"
    ):
        share(model)
    assert not any(parametrize.is_parametrized(layer) for layer in model)
