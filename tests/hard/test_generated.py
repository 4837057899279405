"""Weights of any shape that small networks generate."""

import itertools
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toys import train
from zoo import TRANSFORMERS, ZOO, build, loss_of, output_of

from tying.callbacks import GeneratedWeights
from tying.errors import ConfigurationError
from tying.hard import HyperWeight, audit, bake, generate_weights, load_plain
from tying.hard.hypernetwork import choose_tiling
from tying.weights.derived import derived_weights, effective_weight

D = torch.float64


class Experts(nn.Module):
    """Three matrices in one parameter, as mixtures of experts have them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))


KINDS = {  # a layer, and the tiling of its weight from basic kernels of 2 inputs and 3 outputs
    "matrix": (lambda: nn.Linear(4, 6), (2, 3, ())),
    "matrix of a prime": (lambda: nn.Linear(7, 6), (1, 3, ())),
    "embedding": (lambda: nn.Embedding(9, 4), (2, 3, ())),
    "stack of matrices": (Experts, (2, 3, ())),
    "convolution, 1-d": (lambda: nn.Conv1d(4, 6, 5), (2, 3, (5,))),
    "convolution, 1 × 1": (lambda: nn.Conv2d(4, 6, 1), (2, 3, (1, 1))),
    "convolution, not square": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 3, (3, 2))),
    "convolution, depthwise": (lambda: nn.Conv2d(6, 6, 7, groups=6), (1, 3, (7, 7))),
    "convolution, 3-d": (lambda: nn.Conv3d(4, 6, (2, 1, 3)), (2, 3, (2, 1, 3))),
    "convolution, transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), (2, 3, (3, 3))),
}


def generated(kind, count=2, embedding=4):
    """Return layers of a kind with generated weights, in double precision."""
    model = nn.Sequential(*(KINDS[kind][0]() for _ in range(count))).double()
    generate_weights(model, ["*.weight"], embedding, in_channels=2, out_channels=3)
    return model


def embeddings_of(layer):
    return layer.parametrizations.weight.original


@pytest.mark.parametrize("kind", KINDS)
def test_weights_by_loop(kind):
    """The paper's sum, entry by entry."""
    torch.manual_seed(0)
    model = generated(kind)
    hyper = model[0].parametrizations.weight[0]
    into, out, size = KINDS[kind][1]
    assert (len(hyper.inner), len(hyper.outer), hyper.kernel_size) == (into, out, size)
    with torch.no_grad():
        hyper.inner_bias.normal_()
        hyper.outer_bias.normal_()
    for layer in model:
        weight, embeddings = layer.weight, embeddings_of(layer)
        leading = weight.ndim - 2 - len(size)
        for index in itertools.product(*map(range, weight.shape)):
            stack, (o, i), position = index[:leading], index[leading : leading + 2], index[leading + 2 :]
            z = embeddings[(*stack, o // out, i // into)]
            a = hyper.inner[i % into] @ z + hyper.inner_bias[i % into]
            expected = hyper.outer[(o % out, *position)] @ a + hyper.outer_bias[(o % out, *position)]
            torch.testing.assert_close(weight[index], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_parameters(kind):
    (into, out, size), z = KINDS[kind][1], 4
    positions = math.prod(size)
    for count in (1, 3):
        weight, model = KINDS[kind][0]().weight, generated(kind, count)
        tiles = count * weight.numel() / (into * out * positions)
        stored = {p for derived in derived_weights(model).values() for p in derived.originals}
        assert sum(p.numel() for p in stored) == into * z * z + into * z + out * positions * (z + 1) + tiles * z


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_equal_embeddings_are_equal(kind):
    first, second = generated(kind)
    assert not torch.equal(first.weight, second.weight)
    with torch.no_grad():
        embeddings_of(second).copy_(embeddings_of(first))
    assert torch.equal(first.weight, second.weight)
    assert first.weight.stride() == KINDS[kind][0]().weight.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_weights(kind):
    """Weights of other networks of these sizes are held exactly, alone or together; others become the nearest."""
    source, model = generated(kind), generated(kind)
    assert load_plain(model, bake(source)) == {}
    for key, value in bake(source).items():
        torch.testing.assert_close(bake(model)[key], value, rtol=0, atol=1e-10)
    model[0].weight = source[1].weight.detach()
    torch.testing.assert_close(model[0].weight, source[1].weight, rtol=0, atol=1e-10)
    target = torch.randn_like(model[0].weight)
    model[0].weight = target
    loss = (model[0].weight - target).square().sum()
    [gradient] = torch.autograd.grad(loss, embeddings_of(model[0]))
    assert float(gradient.abs().max()) < 1e-10  # no other embeddings are nearer


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Linear(256, 128), 256),
        (lambda: nn.Linear(256, 254), 256),
        (lambda: nn.Conv1d(64, 128, 3), 192),
        (lambda: nn.Conv2d(64, 64, (3, 1), groups=2), 96),
        (lambda: nn.MultiheadAttention(64, 4), 64),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_weights_have_kaimings_variance(make, inputs, reset):
    torch.manual_seed(0)
    layer = make()
    generate_weights(layer, ["**"])
    if reset:
        (layer._reset_parameters if isinstance(layer, nn.MultiheadAttention) else layer.reset_parameters)()
    weight = effective_weight(next(iter(derived_weights(layer).values())))
    assert float(weight.detach().std()) == pytest.approx((2 / inputs) ** 0.5, rel=0.25)


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((64, 32), (16, 16)),
        ((48, 16), (16, 16)),
        ((10, 512), (16, 10)),
        ((197, 64), (16, 197)),  # a prime, whole: a row for each of its embeddings would cost more
        ((50257, 768), (16, 29)),
        ((30522, 768), (16, 5087)),
        ((200, 200), (10, 20)),
        ((8, 1), (1, 8)),
    ],
)
def test_divisors_are_chosen_by_cost(shape, tiling):
    weight = torch.empty(shape, device="meta")
    assert choose_tiling(weight, False, 64, 16, 16) == (*tiling, ())
    rows, columns = ([n for n in range(1, size + 1) if size % n == 0] for size in shape)
    near = [
        (max(n for n in numbers if n <= 16), next((n for n in numbers if n >= 16), numbers[-1]))
        for numbers in (columns, rows)
    ]
    costs = {
        (into, out): 65 * (64 * into + out) + 64 * weight.numel() // (into * out)
        for into, out in itertools.product(*near)
    }
    assert costs[tiling] == min(costs.values())


def test_given_sizes_that_divide_are_used():
    weight = torch.empty(96, 72, 3, 3, device="meta")
    assert choose_tiling(weight, True, 64, 24, 32) == (24, 32, (3, 3))


class Mixed(nn.Module):
    """Has weights of several tilings, and a head that no network of its own would make smaller."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))
        self.norm, self.linear, self.head = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.linear(self.norm(self.convs(x).mean(dim=(2, 3)))))


LARGE = ["convs.1.weight", "convs.2.weight", "linear.weight"]
ALL = ["convs.0.weight", *LARGE, "head.weight"]


@pytest.mark.parametrize(
    ("patterns", "names", "left_out"),
    [
        (["**"], LARGE, "'convs.0.weight', 'head.weight'"),
        (["**.weight", "!linear"], LARGE[:2], "'convs.0.weight', 'head.weight'"),
        (["**", "head.weight"], [*LARGE, "head.weight"], "'convs.0.weight'"),
        (["head.*"], ALL[-1:], None),  # or nothing would be left
        (["convs.0.weight", "head.weight"], [ALL[0], ALL[-1]], None),
        (ALL, ALL, None),
    ],
)
def test_wildcards_leave_out_what_would_not_become_smaller(patterns, names, left_out, caplog):
    model, callback = Mixed(), GeneratedWeights(patterns, 6)
    affected = callback.affected(model)
    with caplog.at_level(logging.INFO, "tying.hard.hypernetwork"):
        assert sorted(generate_weights(model, patterns, 6)) == sorted(names)
    assert affected.keys() == derived_weights(model).keys() == {*names}
    reason = f"{left_out} left out: networks and embeddings would have as many parameters as they"
    assert not caplog.text if left_out is None else reason in caplog.text
    networks = {id(derived.steps[0]): derived.steps[0] for derived in derived_weights(model).values()}.values()
    tilings = {(len(hyper.inner), len(hyper.outer), hyper.kernel_size) for hyper in networks}
    assert len(networks) == len(tilings)  # weights of equal tiling share a network
    model(torch.randn(2, 3, 9, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["**"], 0), "embedding must be 1 or more, not 0"),
        ((["**"], 4, 0), "in_channels must be 1 or more, not 0"),
        ((["**"], 4, 16, -1), "out_channels must be 1 or more, not -1"),
        ((["norm.*"],), r"parameters \['norm.\*'\] match nothing of two dimensions or more"),
        ((["**", "norm.weight"], 6), "'norm.weight' has fewer than two dimensions: leave it out"),
        ((["nrm.*"],), r"pattern 'nrm.\*' matches no parameter or module"),
    ],
)
def test_mistakes(arguments, message):
    model = Mixed()
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigurationError, match=message):
        generate_weights(model, *arguments)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state


@pytest.mark.parametrize(
    ("make", "tile"),
    [
        (lambda: nn.Linear(6, 4), (2, 3, ())),  # 3 does not divide 4
        (lambda: nn.Linear(6, 4), (2, 2, (1, 1))),
        (lambda: nn.LayerNorm(4), (1, 1, ())),
        (lambda: nn.Conv1d(6, 4, 3), (2, 2, (2,))),
        (lambda: nn.Conv2d(6, 4, 3), (2, 2, 2)),
        (lambda: nn.Conv3d(6, 4, 3), (2, 2, 3)),
    ],
)
def test_weights_that_basic_kernels_do_not_tile(make, tile):
    layer = make()
    with pytest.raises(
        ConfigurationError, match=r"a kernel of shape \(4.*\) cannot be tiled from basic kernels of \(\d"
    ):
        HyperWeight(*tile, embedding=2).right_inverse(layer.weight)


class Training(pl.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net, self.inputs = build(name), ZOO[name].inputs()

    def training_step(self, batch, batch_idx):
        return loss_of(output_of(self.net, self.inputs))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", [*TRANSFORMERS, "convnext_tiny", "convnext_atto", "mobilenetv3_small_050"])
def test_whole_networks(name):
    torch.manual_seed(0)
    module = Training(name)
    before = sum(p.numel() for p in module.parameters())
    train(module, [GeneratedWeights(["**"], embedding=4)], data=[0, 1], max_epochs=1)
    model, report = module.net, audit(module)
    assert report.problems == ()
    assert report.unique < before / 2
    matrices = sum(p.ndim > 1 for p in build(name).parameters())
    assert len(derived_weights(model)) > 0.7 * matrices
    plain = build(name)
    plain.load_state_dict(bake(model))
    with torch.no_grad():
        torch.testing.assert_close(output_of(plain.eval(), module.inputs), output_of(model.eval(), module.inputs))
