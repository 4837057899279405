"""Statistics of batch norms, when weights have been made equal to others at the end."""

import pytest
import torch
from torch import nn
from toys import Toy, batches, train

from tying.callbacks import MixtureTying

pytestmark = pytest.mark.filterwarnings("ignore:MixtureTying begins with")


class Normed(Toy):
    """With batch norms behind both layers of the encoder, and a noise that consumes random numbers."""

    def __init__(self):
        super().__init__(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
        first, tanh, second = self.encoder
        self.encoder = nn.Sequential(first, nn.BatchNorm1d(5), tanh, nn.Dropout(0.1), second, nn.BatchNorm1d(4))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def callback(**options):
    return MixtureTying(["encoder.*.weight"], 0.1, components=4, zero_weight=0.5, **options)


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_statistics_are_those_of_the_weights_at_the_end():
    model = Normed()
    model.encoder[3].p = 0.0
    train(model, [callback()], max_epochs=2)
    found = statistics(model)
    first, norm, tanh, drop, second, last = model.encoder
    moments = []
    for [x] in batches():
        hidden = first(x)
        deeper = second(drop(tanh(nn.functional.batch_norm(hidden, None, None, norm.weight, norm.bias, True))))
        moments.append([hidden.mean(0), hidden.var(0), deeper.mean(0), deeper.var(0)])
    means = [torch.stack(column).mean(0) for column in zip(*moments, strict=True)]
    for name, mean in zip(["1.running_mean", "1.running_var", "5.running_mean", "5.running_var"], means, strict=True):
        torch.testing.assert_close(found[f"encoder.{name}"], mean)
    assert norm.momentum == last.momentum == 0.1


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_all_else_stays():
    """Weights, the generator's next number, batch norms that are frozen: as without the pass."""
    models, numbers = [Normed(), Normed()], []
    for model, estimates in zip(models, (True, False), strict=True):
        torch.manual_seed(3)
        model.encoder[5].eval()
        train(model, [callback(batch_norms=estimates)], max_epochs=2)
        numbers.append(torch.rand(()))
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
    assert numbers[0] == numbers[1]
    with_pass, without = map(statistics, models)
    assert {name.split(".")[1] for name in with_pass if not torch.equal(with_pass[name], without[name])} == {"1"}


def test_only_as_many_batches_as_training_takes():
    model = Normed()
    train(model, [callback()], max_epochs=2, limit_train_batches=3)
    assert int(model.encoder[1].num_batches_tracked) == 3


class Named(Normed):
    def loss(self, batch):
        return super().loss([batch["x"]])


def test_batches_that_the_model_is_not_called_on():
    data = torch.utils.data.DataLoader([{"x": torch.randn(6)} for _ in range(8)], batch_size=4)
    found = []
    for estimates in (True, False):
        model, own = Named(), callback(examples=8, batch_norms=estimates)
        torch.manual_seed(3)
        if estimates:
            told = (
                r"keep the statistics of the weights before, .* \(batches are of dict\); see torch\.optim\.swa_utils\."
            )
            with pytest.warns(UserWarning, match=told):
                train(model, [own], data=data, max_epochs=2)
        else:
            train(model, [own], data=data, max_epochs=2)
        found.append(statistics(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert model.encoder[1].momentum == 0.1


def test_a_model_without_batch_norms_is_not_called():
    class Uncallable(Toy):
        def forward(self, x):
            raise AssertionError

    train(Uncallable(lambda parameters: torch.optim.Adam(parameters, lr=0.01)), [callback()], max_epochs=2)
