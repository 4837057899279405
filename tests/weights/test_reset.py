"""A reset draws what a weight is computed from as the reset of the dense layer draws the weight."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from ways import BUILT, MADE, SIZE, made

import tying
from tying.depth.rnn.hyper_lstm import HyperLSTM
from tying.depth.rnn.passthrough import PassthroughGRU, PassthroughHighway, StateMatrix
from tying.hard import HyperWeight, TemplateBank, lower_rank, share_templates, tie
from tying.hashing import hash_weights
from tying.soft import GaussianMixturePrior
from tying.weights.derived import derived_weights, remove

# the spread of a weight, over that of the dense layer's: what a rank, Kaiming's factor or few slots leave of it
KAIMING = 6**0.5
SPREADS = {
    "low rank": (0.55, 0.95),
    "low rank, kernels": (0.4, 0.95),
    "low rank, recurrent": (0.4, 0.95),
    "low rank, attention": (0.4, 0.95),
    "low rank plus diagonal": (0.55, 0.95),
    "templates": (0.8 * KAIMING, 1.2 * KAIMING),
    "templates, kernels": (0.8 * KAIMING, 1.2 * KAIMING),
    "generated": (0.6 * KAIMING, 1.4 * KAIMING),
    "clustered": (0.9, 1.1),
    "clustered, kernels": (0.9, 1.1),
    "clustered, recurrent": (0.9, 1.1),
    "clustered, embedding": (0.85, 1.1),
}
DEFAULT = (0.85, 1.15)


def reset(model, order):
    """Move a model to the meta device and back, fill it with NaN, and reset each module that can be."""
    model = model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    for module in list(model.modules())[::order]:
        for method in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, method):
                getattr(module, method)()
                break
    return model


def weights(model):
    """Return the weights that modules compute with, by the names of the dense model."""
    computed = {key: getattr(derived.owner, derived.name) for key, derived in derived_weights(model).items()}
    plain = {name: p for name, p in model.named_parameters() if "parametrizations" not in name and "table" not in name}
    return {key: value.detach() for key, value in (plain | computed).items()}


@pytest.mark.parametrize("order", [1, -1], ids=["parents first", "children first"])
@pytest.mark.parametrize("way", MADE)
def test_a_reset_draws_weights_like_the_dense_layers(way, order):
    make, _ = MADE[way]
    model, dense = reset(made(way), order), make()
    names = [[name for name, _ in net.named_parameters(remove_duplicate=False)] for net in (model, made(way))]
    assert names[0] == names[1]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    derived = derived_weights(model)
    for name, drawn in weights(model).items():
        if drawn.ndim > 1 and "bias" not in name:
            low, high = SPREADS.get(way, DEFAULT) if name in derived else DEFAULT
            expected = float(dense.state_dict()[name].std())
            assert low * expected <= float(drawn.std()) <= high * expected, name
            assert abs(float(drawn.mean())) < 0.35 * float(drawn.std())
        elif "attention" not in way:  # whose biases are 0
            assert 0 < float(drawn.abs().max()) <= SIZE**-0.5
            assert drawn.std() > 0


@pytest.mark.parametrize("way", [way for way in MADE if "tie" not in way])
def test_each_reset_draws_anew_into_the_same_parameters(way):
    model = made(way)
    parameters, classes = [*model.parameters()], [type(module).__name__ for module in model.modules()]
    before = [parameter.detach().clone() for parameter in parameters]
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif hasattr(module, "_reset_parameters"):
            module._reset_parameters()
    assert [type(module).__name__ for module in model.modules()] == classes
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    same = [name for (name, p), b in zip(model.named_parameters(), before, strict=True) if torch.equal(p, b)]
    assert all("bias" in name for name in same), same  # attention's are 0
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    for module in copied.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # of the copy alone
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("order", [1, -1], ids=["parents first", "children first"])
@pytest.mark.parametrize("way", BUILT)
def test_networks_of_this_package_are_reset_as_they_are_made(way, order):
    torch.manual_seed(0)
    fresh, model = BUILT[way](), reset(BUILT[way](), order)
    parts = (net.named_parameters(remove_duplicate=False) for net in (model, fresh))  # to_empty parts what was one
    for (name, drawn), (_, expected) in zip(*parts, strict=True):
        assert torch.isfinite(drawn).all(), name
        drawn, expected = drawn.detach().double(), expected.detach().double()
        spread, root = float(expected.std()), expected.numel() ** 0.5
        assert abs(float(drawn.mean() - expected.mean())) <= 6 * spread / root + 1e-6, name
        assert abs(float(drawn.std()) - spread) <= 5 * spread / root, name


@pytest.mark.parametrize(
    "make",
    [
        lambda: StateMatrix(SIZE, 8),
        lambda: StateMatrix(SIZE, 0),
        lambda: PassthroughGRU(SIZE, SIZE, rank=0),
        lambda: PassthroughHighway(SIZE, rank=4),
        lambda: HyperLSTM(4, SIZE, hyper_size=4),
        lambda: TemplateBank(3, (SIZE, SIZE)),
        lambda: HyperWeight(4, 8, 3, embedding=5, hidden=6),
        lambda: GaussianMixturePrior(components=5),
    ],
)
def test_modules_with_parameters_of_their_own_can_be_reset(make):
    model = reset(make(), 1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_no_class_of_this_package_holds_parameters_that_cannot_be_reset():
    """Each module class of the package that is made in these tests and holds a parameter has a reset method."""
    made_of = [*map(made, [*MADE, *BUILT]), GaussianMixturePrior(components=3)]
    kinds = {
        type(module)
        for model in made_of
        for module in model.modules()
        if module._parameters
        and type(module).__module__.startswith(tying.__name__)
        and not isinstance(module, ParametrizationList)  # whose parameters are drawn with the weight, by its module
    }
    assert len(kinds) > 10
    resets = ("reset_parameters", "_reset_parameters")  # the latter is attention's
    assert [kind.__name__ for kind in kinds if not any(hasattr(kind, name) for name in resets)] == []


def test_a_low_rank_weight_is_the_nearest_to_what_the_dense_layer_draws():
    model, dense = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
    lower_rank(model, ["weight"], 8)
    for layer in (model, dense):
        torch.manual_seed(5)
        layer.reset_parameters()
    u, s, v = torch.linalg.svd(dense.weight)
    torch.testing.assert_close(model.weight, u[:, :8] * s[:8] @ v[:8], rtol=0, atol=1e-6)
    assert torch.equal(model.bias, dense.bias)


def test_a_module_resets_its_coefficients_and_the_bank_itself():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    share_templates(model, ["*.weight"], 3)
    bank, other = model[0].parametrizations.weight[0].bank, model[1].weight.detach().clone()
    templates = bank.templates.detach().clone()
    model[0].reset_parameters()
    assert torch.equal(bank.templates, templates)
    assert torch.equal(model[1].weight, other)
    torch.testing.assert_close(model[0].parametrizations.weight.original.norm(), torch.tensor(1.0))
    bank.reset_parameters()
    assert not torch.equal(model[1].weight, other)


def test_a_module_of_several_kinds_of_weights_is_reset():
    lstm = nn.LSTM(SIZE, SIZE)
    lower_rank(lstm, ["weight_hh_l0"], 4)
    hash_weights(lstm, ["weight_ih_l0"], 0.5)
    reset(lstm, 1)
    assert all(torch.isfinite(weight).all() for weight in weights(lstm).values())
    x = torch.randn(3, SIZE)
    plain = nn.LSTM(SIZE, SIZE)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        remove(lstm, name)
    plain.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], plain(x)[0])


def test_a_weight_that_a_tie_computes_stays_tied():
    model = nn.Sequential(nn.Linear(SIZE, 8), nn.Linear(8, SIZE))
    tie(model, ["0.weight ~ 1.weight | o i -> i o"])
    for layer in model:
        layer.reset_parameters()
    assert is_parametrized(model[1])
    assert torch.equal(model[1].weight, model[0].weight.T)


def test_a_copy_can_be_reset_within_a_fork_of_the_generator():
    """As the mixture of weights does to learn the initial spread of a layer."""
    layer = nn.Linear(SIZE, SIZE)
    lower_rank(layer, ["weight"], 4)
    before, state = layer.weight.detach().clone(), torch.get_rng_state()
    with torch.random.fork_rng():
        copy.deepcopy(layer).reset_parameters()
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
