"""Biases for each place of a convolution's output."""

import copy
import pickle

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying.callbacks import UntiedBiases
from tying.hard import lower_rank, tie, untie_biases


class Convolutions(nn.Sequential):
    def __init__(self, spare: bool = False) -> None:
        super().__init__(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        if spare:
            self[2].spare = nn.Conv2d(1, 1, 1)


def lowered(model: nn.Module) -> nn.Module:
    lower_rank(model, ["0.weight"], 1)
    return model


def test_starts_as_the_tied_bias_and_its_gradient_sums_to_the_tied_ones():
    model, x = Convolutions().double(), torch.randn(4, 2, 6, 5, dtype=torch.float64)
    free = copy.deepcopy(model)
    assert untie_biases(free, ["*.bias", "!1.bias"], x) == ["0.bias", "3.bias"]
    assert free.training
    assert torch.equal(free[1].running_mean, model[1].running_mean)
    assert [tuple(free[i].bias.shape) for i in (0, 3)] == [(3, 4, 3), (3, 4, 3)]
    assert list(free.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(free(x), model(x), rtol=0, atol=1e-12)
    for one in (model, free):
        one(x).square().sum().backward()
    torch.testing.assert_close(free[3].bias.grad.sum((1, 2)), model[3].bias.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(free[3].weight.grad, model[3].weight.grad, rtol=0, atol=1e-12)


def test_outputs_keep_the_dtype_of_autocast():
    model, x = Convolutions()[:1], torch.randn(1, 2, 6, 5)
    untie_biases(model, ["0.bias"], x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(self.conv(x))


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (5,)), (nn.Conv2d, (5, 4)), (nn.Conv3d, (5, 4, 3))])
def test_dimensions_copies_and_other_sizes(kind, size):
    model, x = nn.Sequential(kind(1, 2, 1)), torch.randn(2, 1, *size)
    before = model(x)
    untie_biases(model, ["0.bias"], x)
    torch.testing.assert_close(model(x), before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    with pytest.raises(ValueError, match=r"biases for \(2, 5.* do not fit an output of \(2, 2, 6"):
        model(torch.randn(2, 1, 6, *size[1:]))


@pytest.mark.parametrize(
    ("make", "patterns", "told"),
    [
        (Convolutions, ["0.weight"], "0.weight: only biases of Conv1d, Conv2d, Conv3d can be untied"),
        (Convolutions, ["0.bias", "1.bias"], "1.bias: only biases of"),
        (
            lambda: Convolutions(spare=True),
            ["0.bias", "2.spare.bias"],
            "'2.spare.bias': .* one size, and the example gives none",
        ),
        (lambda: Convolutions(spare=True), ["nothing"], "nothing"),
        (
            lambda: lowered(Convolutions()),
            ["0.bias"],
            "0.bias: belongs to a layer that is parametrized: untie biases first",
        ),
    ],
)
def test_mistakes_change_nothing(make, patterns, told):
    model = make()
    before = [(type(one), *one._parameters.values()) for one in model.modules()]
    with pytest.raises(ValueError, match=told):
        untie_biases(model, patterns, torch.zeros(1, 2, 6, 6))
    after = [(type(one), *one._parameters.values()) for one in model.modules()]
    assert [[id(x) for x in one] for one in after] == [[id(x) for x in one] for one in before]


@pytest.mark.parametrize("by_hand", [True, False])
def test_convolutions_that_share_a_bias_share_the_new_one(by_hand):
    model, x = Convolutions(), torch.randn(1, 2, 6, 6)
    if by_hand:
        model[3].bias = model[0].bias
    else:
        tie(model, ["0.bias ~ 3.bias"])
    before = model(x)
    assert untie_biases(model, ["*.bias", "!1.bias"], x) == ["0.bias"]
    assert model[3].bias is model[0].bias
    assert model[0].bias.shape == (3, 4, 4)
    torch.testing.assert_close(model(x), before)
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_biases_seen_at_two_sizes_are_refused():
    model = Convolutions()
    model[3].padding = 0
    model[3].bias = model[0].bias
    with pytest.raises(
        ValueError, match=r"outputs of one size, and the example gives outputs of \[\(2, 2\), \(4, 4\)\]"
    ):
        untie_biases(model, ["0.bias"], torch.zeros(1, 2, 6, 6))
    with pytest.raises(
        ValueError, match=r"outputs of one size, and the example gives outputs of \[\(2, 2\), \(4, 4\)\]"
    ):
        untie_biases(Twice(), ["conv.bias"], torch.zeros(1, 2, 6, 6))
    with pytest.raises(ValueError, match="input_size must be that of one sample"):
        UntiedBiases(["0.bias"], [])


class Images(Toy):
    """A Toy whose first layer is a convolution of 6 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.front(x[:, None])[:, 0]

    def loss(self, batch):
        return super().loss([self(batch[0])])


def test_callback_trains_resumes_and_applies_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = UntiedBiases(["front.bias"], input_size=[6])
    model = Images()
    trainer = train(model, [callback], max_epochs=2)
    bias = model.front.bias
    assert bias.shape == (1, 6)
    assert bias.detach().unique().numel() > 1
    assert callback.apply(model) == ["front.bias"]
    assert model.front.bias is bias
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = Images()
    train(again, [UntiedBiases(["front.bias"], input_size=[6])], max_epochs=2, ckpt_path=tmp_path / "whole.ckpt")
    assert torch.equal(again.front.bias, bias)
