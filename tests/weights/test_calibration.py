"""Calibration: the scales of inputs against slow loops, and nothing else changed."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tying.errors import ConfigurationError
from tying.weights.calibration import call, input_scales

LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3), 1, 1),
    "linear over steps": (lambda: nn.Linear(3, 2), (4, 5, 3), 1, 1),
    "transposed linear": (lambda: Conv1D(2, 3), (4, 5, 3), 0, 1),
    "convolution": (lambda: nn.Conv2d(3, 2, 3), (4, 3, 6, 5), 1, 1),
    "one sample": (lambda: nn.Conv1d(3, 2, 3), (3, 6), 1, 1),
    "grouped convolution": (lambda: nn.Conv2d(6, 4, 3, groups=2), (4, 6, 5, 5), 1, 2),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 3), (4, 3, 5, 5), 0, 1),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_scales_are_the_root_mean_squares_of_a_slow_loop(case: str) -> None:
    make, shape, dim, groups = LAYERS[case]
    layer, batches = make(), [torch.randn(shape), torch.randn(shape)]
    scale = input_scales(layer, ["weight"], batches)["weight"]
    channel_dim = len(shape) - 1 if layer.weight.ndim == 2 else len(shape) - (layer.weight.ndim - 2) - 1
    features = scale.shape[dim]
    for feature in range(features):
        channels = [feature + group * features for group in range(groups)]
        values = torch.cat([batch.select(channel_dim, channel).flatten() for batch in batches for channel in channels])
        assert scale.select(dim, feature).item() == pytest.approx(values.square().mean().sqrt().item(), rel=1e-6)
    assert (scale * layer.weight).shape == layer.weight.shape
    assert scale.numel() == features


def test_other_weights_and_modules_that_are_not_called_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.MultiheadAttention(3, 1))
    names = [name for name, _ in model.named_parameters()]
    scales = input_scales(model, names, [torch.ones(2, 3)], lambda model, batch: model[1](model[0](batch)))
    assert [*scales] == ["0.weight"]


def test_a_module_that_is_called_several_times_averages_over_its_calls() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.eye(2))
    model = nn.Sequential(layer, layer)
    assert input_scales(model, ["1.weight"], [torch.ones(1, 2)])["1.weight"].tolist() == [
        [torch.tensor(2.5).sqrt().item()] * 2
    ]


def test_the_model_and_random_generators_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches, state = [torch.randn(4, 2)], torch.get_rng_state()

    def draw(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch + torch.rand(2))

    input_scales(model, ["0.weight"], batches, draw)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_pre_hooks for module in model)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("batch", [torch.ones(2), (torch.ones(2), 1), [torch.ones(2), 1], {"input": torch.ones(2)}])
def test_a_batch_is_an_input_or_holds_it(batch: object) -> None:
    assert call(nn.Identity(), batch).tolist() == [1.0, 1.0]
    assert call(nn.Identity(), batch, lambda model, given: given is batch)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "calibration has no batches"), ([torch.tensor([[1.0, float("nan")]])], "an input of '0.weight' is NaN")],
)
def test_bad_batches_are_errors(batches: list[Tensor], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=message):
        input_scales(model, ["0.weight"], batches)
    assert not model[0]._forward_pre_hooks
