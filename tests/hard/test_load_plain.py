"""Plain weights become the nearest that a model can hold, jointly where weights share parameters; errors are returned."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from tying.hard import (
    DiagonalResidual,
    LowRankResidual,
    ScaleResidual,
    bake,
    fold,
    generate_weights,
    load_plain,
    lower_rank,
    relax,
    share_templates,
    tie,
)
from tying.hard.hypernetwork import nearest_network
from tying.hashing import cluster_weight, hash_weights

D = torch.float64


def layers(dtype=D, count=4):
    return nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for _ in range(count)))


def convolutions(dtype=D, count=3):
    return nn.Sequential(nn.Conv2d(4, 8, 3, dtype=dtype), *(nn.Conv2d(8, 8, 3, dtype=dtype) for _ in range(count - 1)))


def relative(model, given):
    baked = bake(model)
    return {key: float((baked[key] - value).double().norm() / value.double().norm()) for key, value in given.items()}


WAYS = {
    "plain tie": (layers, lambda model: tie(model, ["0.weight ~ 1.weight"])),
    "transposed tie": (layers, lambda model: tie(model, ["0.weight ~ 1.weight | o i -> i o"])),
    "low rank": (layers, lambda model: lower_rank(model, ["*.weight"], 2)),
    "low rank, kernels": (convolutions, lambda model: lower_rank(model, ["*.weight"], 2)),
    "low rank plus diagonal": (layers, lambda model: lower_rank(model, ["*.weight"], 2, diagonal=True)),
    "relaxed": (layers, lambda model: relax(model, ["*.weight"], LowRankResidual(2))),
    "relaxed pair": (layers, lambda model: relax(model, ["0.weight ~ 1.weight"], LowRankResidual(2))),
    "relaxed, transposed": (
        layers,
        lambda model: relax(model, ["0.weight ~ {1..3}.weight | o i -> i o"], LowRankResidual(2)),
    ),
    "relaxed, kernels": (
        lambda dtype=D: convolutions(dtype)[1:],
        lambda model: relax(model, ["*.weight"], LowRankResidual(1)),
    ),
    "relaxed by scales": (layers, lambda model: relax(model, ["*.weight"], ScaleResidual())),
    "relaxed by diagonals": (layers, lambda model: relax(model, ["*.weight"], DiagonalResidual())),
    "templates": (layers, lambda model: share_templates(model, ["*.weight"], 2)),
    "templates of several shapes": (convolutions, lambda model: share_templates(model, ["*.weight"], 1)),
    "generated": (convolutions, lambda model: generate_weights(model, ["*.weight"], 3, 4, 4)),
    "hashed by layer": (layers, lambda model: hash_weights(model, ["*.weight"], 0.2)),
    "hashed by layer, signed": (layers, lambda model: hash_weights(model, ["*.weight"], 0.2, sign=True, density=0.5)),
    "hashed by network": (layers, lambda model: hash_weights(model, ["*.weight"], 0.2, scope="network")),
    "hashed by network, unscaled": (
        layers,
        lambda m: hash_weights(m, ["*.weight"], 0.2, scope="network", scaled=False),
    ),
    "clustered": (layers, lambda model: cluster_weight(model, "0.weight", 4)),
}


def changed(way, dtype=D, seed=0):
    make, change = WAYS[way]
    torch.manual_seed(3 + seed)
    model = make(dtype)
    change(model)
    if way not in ("plain tie", "transposed tie", "clustered"):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_the_same_form_are_held_exactly(way, dtype):
    source, model = changed(way, dtype, seed=1), changed(way, dtype, seed=2)
    state = torch.get_rng_state()
    assert load_plain(model, bake(source)) == {}
    assert torch.equal(torch.get_rng_state(), state)
    assert max(relative(model, bake(source)).values()) < (1e-10 if dtype is D else 1e-6)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_errors_of_other_weights_are_returned(way):
    model = changed(way)
    names, parameters = [name for name, _ in model.named_parameters()], [*model.parameters()]
    torch.manual_seed(4)
    given = WAYS[way][0]().state_dict()
    with pytest.warns(UserWarning, match=r"cannot hold all weights as they are given: '\d\.weight' is off by \d"):
        errors = load_plain(model, given, unequal="mean")
    expected = {key: error for key, error in relative(model, given).items() if error > 1e-6}
    assert errors == pytest.approx(expected)
    assert errors
    assert [name for name, _ in model.named_parameters()] == names
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_plain(model, bake(model)) == {}  # what it holds now, it can hold


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoil", ["missing", "unexpected", "shape", "bias"])
def test_nothing_is_written_if_names_or_shapes_do_not_fit(way, spoil):
    model = changed(way)
    before = copy.deepcopy(model.state_dict())
    given = bake(changed(way, seed=1))
    name = [*given][-1] if spoil == "bias" else "0.weight"
    if spoil == "missing":
        del given["2.weight"]
    elif spoil == "unexpected":
        given["other"] = torch.zeros(2)
    else:
        given[name] = torch.zeros(3, 5, 2)
    with pytest.raises((ValueError, RuntimeError)):
        load_plain(model, given)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("way", ["hashed by layer", "hashed by network", "clustered"])
def test_means_of_many_entries_are_exact(way):
    """Sums of a quarter of a million entries in float32 left errors above 1e-3."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(2)))
    if way == "clustered":
        cluster_weight(model, "0.weight", 4)
    else:
        hash_weights(model, ["*.weight"], 1e-5, scope=way.split()[-1])
    given = bake(model)
    assert load_plain(model, given) == {}
    model[0].weight = given["0.weight"]
    torch.testing.assert_close(model[0].weight.detach(), given["0.weight"])


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_given_as_zero(way):
    """Zero has no relative error: it is held, or the error is infinite and told in words."""
    model = changed(way)
    torch.manual_seed(4)
    given = WAYS[way][0]().state_dict()
    given["1.weight"].zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors = load_plain(model, given, unequal="mean")
    stored = bake(model)["1.weight"].any()
    assert errors.get("1.weight") == (math.inf if stored else None)
    message = "".join(str(warning.message) for warning in caught)
    assert ("'1.weight' is not zero as given" in message) == bool(stored)
    assert len(message) < 400


def test_clusters_are_never_farther_than_with_the_present_assignments():
    model, fixed = changed("clustered"), changed("clustered")
    given = bake(model)
    given["0.weight"] += 1e-3 * torch.randn_like(given["0.weight"])
    fixed[0].weight = given["0.weight"]
    before = fixed[0].weight.detach()
    with pytest.warns(UserWarning, match="cannot hold"):
        errors = load_plain(model, given)
    assert 0 < errors["0.weight"] <= float((before - given["0.weight"]).norm() / given["0.weight"].norm()) * (1 + 1e-9)


def test_weights_are_fitted_jointly():
    """The input of the fault: four templates hold four weights; a fit of each alone left 0.96 to 0.99 of each."""
    plain, model = layers(torch.float32), layers(torch.float32)
    share_templates(model, ["*.weight"], 4)
    assert load_plain(model, plain.state_dict()) == {}


@pytest.mark.parametrize("templates", [1, 2, 3])
def test_mixtures_are_the_nearest(templates):
    """The error of the best mixtures is that of the truncated singular value decomposition."""
    plain, model = layers(), layers()
    share_templates(model, ["*.weight"], templates)
    with pytest.warns(UserWarning, match="cannot hold"):
        load_plain(model, plain.state_dict())
    stacked, stored = (torch.stack([layer.weight.detach().flatten() for layer in net]) for net in (plain, model))
    torch.testing.assert_close((stored - stacked).norm(), torch.linalg.svdvals(stacked)[templates:].norm())
    alphas = torch.stack([layer.parametrizations.weight.original for layer in model])
    assert 0.5 < alphas.norm(dim=1).max() < 2  # coefficients and templates are of their initial scales
    bank = model[0].parametrizations.weight[0].bank
    torch.testing.assert_close(bank.templates.norm(dim=1), torch.full((templates,), stacked.norm() / 2, dtype=D))


def test_templates_that_no_weight_needs_can_be_trained():
    plain, model = layers(), layers()
    share_templates(model, ["*.weight"], 6)
    assert load_plain(model, plain.state_dict()) == {}
    model(torch.randn(3, 8, dtype=D)).square().sum().backward()
    assert all(layer.parametrizations.weight.original.grad.abs().min() > 0 for layer in model)


def test_folded_weights_get_their_mean():
    plain, model = layers(), layers()
    share_templates(model, ["*.weight"], 3)
    with torch.no_grad():
        alphas = [layer.parametrizations.weight.original for layer in model]
        alphas[1].copy_(alphas[0])
    assert fold(model) == [("0.weight", "1.weight")]
    with pytest.warns(UserWarning, match="cannot hold"):
        assert load_plain(model, plain.state_dict()).keys() == {"0.weight", "1.weight"}
    torch.testing.assert_close(model[0].weight, (plain[0].weight + plain[1].weight) / 2)
    assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original


def test_one_change_of_a_network_never_raises_the_error():
    """Kernels that no network of these sizes holds: more passes are no worse, and better than one."""
    import tying.hard.hypernetwork as module

    kernels = torch.randn(12, 4, 36, dtype=D)
    inner, outer, errors = torch.randn(4, 3, 2, dtype=D), torch.randn(4, 3, 3, 3, dtype=D), []
    for module.SWEEPS in (1, 2, 3, 20):
        (w, b, o, p), z = nearest_network(kernels, inner, outer, 0.1)
        hidden = torch.einsum("tz,idz->tid", z, w) + b
        errors.append(float((torch.einsum("tid,xd->tix", hidden, o.flatten(0, 2)) + p.flatten() - kernels).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_a_network_of_enough_components_holds_any_kernels():
    plain, model = convolutions(), convolutions()
    generate_weights(model, ["*.weight"], 40, 4, 4)
    assert load_plain(model, plain.state_dict()) == {}
    embeddings = torch.cat([layer.parametrizations.weight.original.flatten(0, 1) for layer in model])
    assert 0.3 < embeddings.std() < 1.1
    model(torch.randn(1, 4, 9, 9, dtype=D)).square().sum().backward()
    hyper = model[0].parametrizations.weight[0]
    unmoved = (hyper.outer.grad == 0).flatten(0, 2).all(dim=0) & (hyper.inner.grad == 0).all(dim=2).all(dim=0)
    assert not unmoved.any()  # each component can be trained, through one factor at least


def test_a_table_of_a_network_fits_its_scales():
    """Weights from the same hash with other scales are exact; the scales are in the state dict."""
    source, model = changed("hashed by network"), changed("hashed by network")
    for layer, scale in zip(source, (0.1, 1.0, 3.0, 20.0), strict=True):
        layer.virtual.scale = scale
    given = bake(source)
    assert load_plain(model, given) == {}
    fresh = changed("hashed by network", seed=5)
    fresh.load_state_dict(model.state_dict())
    assert max(relative(fresh, given).values()) < 1e-10


def test_no_weight_is_farther_off_for_the_scales_of_others():
    """The scales that are best for the sum of squares would give up small weights."""
    given = layers().state_dict()
    given["0.weight"] *= 10
    model, fixed = changed("hashed by network"), changed("hashed by network")
    parts = [(layer.virtual, given[f"{i}.weight"]) for i, layer in enumerate(fixed)]
    with torch.no_grad():
        fixed[0].table.copy_(parts[0][0].nearest_table(parts, fixed[0].table))
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        errors = load_plain(model, given)
    for key, error in relative(fixed, {f"{i}.weight": weight for i, (_, weight) in enumerate(parts)}).items():
        assert errors[key] <= error * (1 + 1e-6)


def test_the_nearest_table_is_a_weighted_mean():
    """Entries of two weights of scales 1 and 3: the table of least squares, by hand."""
    model = changed("hashed by network")
    for layer, scale in zip(model, (1.0, 3.0, 1.0, 3.0), strict=True):
        layer.virtual.scale = scale
    parts = [(layer.virtual, torch.randn(8, 8, dtype=D)) for layer in model]
    table = parts[0][0].nearest_table(parts, model[0].table.detach())
    design = torch.cat([p.scale * nn.functional.one_hot(p.slots().flatten(), len(table)).double() for p, _ in parts])
    expected = torch.linalg.lstsq(design, torch.cat([w.flatten() for _, w in parts])[:, None]).solution[:, 0]
    torch.testing.assert_close(table, expected)


def test_a_parametrization_with_a_right_inverse_alone():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

        def right_inverse(self, weight):
            return weight / 2

    plain, model = layers(), layers()
    register_parametrization(model[0], "weight", Doubled())
    lower_rank(model, ["1.weight"], 8)
    register_parametrization(model[1], "weight", Doubled())
    assert load_plain(model, plain.state_dict()) == {}
    assert torch.equal(model[0].weight, plain[0].weight)
    torch.testing.assert_close(model[1].weight, plain[1].weight)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "clustered"])  # whose centroids need values
def test_a_model_on_the_meta_device_takes_plain_weights(way):
    make, change = WAYS[way]
    with torch.device("meta"):
        model = make()
        change(model)
        assert load_plain(model, make().state_dict()) == {}


def test_a_failed_load_of_a_lazy_model_changes_nothing():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    lower_rank(model, ["1.weight"], 2)
    before = model[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match="Missing key"):
        load_plain(model, {"1.weight": torch.ones(4, 4)})
    assert torch.equal(model[1].weight, before)


def test_the_error_of_a_weight_of_zeros_is_infinite():
    model, given = layers(), layers().state_dict()
    hash_weights(model, ["*.weight"], 0.2, scope="network")
    given["1.weight"] = torch.zeros(8, 8)
    with pytest.warns(UserWarning, match="'1.weight' is not zero as given"):
        assert load_plain(model, given)["1.weight"] == float("inf")
