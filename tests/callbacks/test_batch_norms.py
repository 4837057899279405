"""Statistics of batch norms, when weights have been made equal to others at the end."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from toys import Toy, batches, train

from tying.callbacks import MixtureTying
from tying.data.batches import BatchLoader

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
        [x] = batch.values()
        return super().loss([x])


FORMS = {
    "tuple": lambda x: (x,),
    "list": lambda x: [x, "labels"],
    "mapping": lambda x: {"x": x},
    "tensor": lambda x: x,
}


class AnyForm(Normed):
    def loss(self, batch):
        parts = [*batch.values()] if isinstance(batch, dict) else batch
        return super().loss([parts if isinstance(parts, torch.Tensor) else parts[0]])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_batches_of_each_form(form):
    expected, model = Normed(), AnyForm()
    for trained, make in ((expected, FORMS["tuple"]), (model, form)):
        torch.manual_seed(3)
        data = DataLoader([make(x) for [x] in batches()], batch_size=None)
        train(trained, [callback(examples=40)], data=data, max_epochs=2)
    assert all(torch.equal(value, statistics(expected)[name]) for name, value in statistics(model).items())


def test_batches_that_the_model_is_not_called_on():
    data = DataLoader([{"features": torch.randn(6)} for _ in range(8)], batch_size=4)
    found = []
    for estimates in (True, False):
        model, own = Named(), callback(examples=8, batch_norms=estimates)
        torch.manual_seed(3)
        if estimates:
            warning = r"keep the statistics of the former weights, since .*argument 'features'\): encoder\.1, encoder\.5; see torch"
            with pytest.warns(UserWarning, match=warning):
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


class Stream(IterableDataset):
    """Has no end, and counts what is read of it."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        for number in itertools.count():
            self.read += 1
            yield (torch.linspace(-1, 1, 6) * number,)


def test_of_a_stream_without_an_end_as_much_as_trained_on():
    model, stream = Normed(), Stream()
    train(model, [callback(examples=40)], data=DataLoader(stream, batch_size=4), max_epochs=-1, max_steps=10)
    assert int(model.encoder[1].num_batches_tracked) == 10
    assert stream.read <= 2 * 4 * 12  # and what is loaded ahead


class Halved(Normed):
    """Called, it encodes; the decoder's batch norm only training calls."""

    def __init__(self):
        super().__init__()
        self.decoder.insert(1, nn.BatchNorm1d(5))

    def forward(self, x):
        return self.encoder(x)


def test_batch_norms_that_the_model_does_not_call_keep_theirs():
    found = []
    for estimates in (True, False):
        torch.manual_seed(3)
        model = Halved()
        told = pytest.warns(UserWarning, match=r"does not call these, in some process: decoder\.1; see torch")
        with told if estimates else contextlib.nullcontext():
            train(model, [callback(batch_norms=estimates)], max_epochs=2)
        found.append(statistics(model))
    same = {name for name in found[0] if torch.equal(found[0][name], found[1][name])}
    assert {name for name in same if "running" in name} == {"decoder.1.running_mean", "decoder.1.running_var"}


class Numbered(Normed):
    """Makes its inputs of labels, before they are on the device."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch.labels[:, None].expand(-1, 6) / 40]


def test_the_loader_begins_anew_afterwards():
    images, labels = torch.zeros(40, 2, 2, 1, dtype=torch.uint8), torch.arange(40)
    loader = BatchLoader(images, labels, 4, train=True)
    for _ in range(2):
        trainer = train(Numbered(), [callback()], data=loader, max_epochs=1)
        assert trainer.global_step == 10
        assert len(list(loader)) == 10


def test_the_generator_of_a_loader_stays():
    drawn = []
    for estimates in (True, False):
        generator = torch.Generator().manual_seed(5)
        data = DataLoader(TensorDataset(torch.randn(40, 6)), 4, shuffle=True, generator=generator)
        train(Normed(), [callback(batch_norms=estimates)], data=data, max_epochs=2)
        drawn.append(torch.rand((), generator=generator))
    assert drawn[0] == drawn[1]


class OutsideAutocast(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, number):
        assert not torch.is_autocast_enabled("cpu")
        return (torch.linspace(-1, 1, 6) * number,)


def test_data_are_loaded_in_their_own_precision():
    data = DataLoader(OutsideAutocast(), batch_size=4)
    model = Normed()
    train(model, [callback()], data=data, max_epochs=2, precision="bf16-mixed")
    assert int(model.encoder[1].num_batches_tracked) == 10


def test_one_loader_in_a_list_and_several():
    class Listed(Normed):
        def loss(self, batch):
            return super().loss(batch[0])

    model = Listed()
    train(model, [callback(examples=40)], data=[batches()], max_epochs=2)
    assert int(model.encoder[1].num_batches_tracked) == 10
    with pytest.warns(UserWarning, match=r"the training data has 2 loaders, not one\): encoder\.1"):
        train(Listed(), [callback(examples=40)], data=[batches(), batches()], max_epochs=2)


def test_a_compiled_model():
    model = torch.compile(Normed(), backend="eager", fullgraph=True)
    train(model, [callback()], max_epochs=2)
    assert int(model.encoder[1].num_batches_tracked) == 10


def test_a_batch_norm_that_was_never_called():
    model = Normed()
    model.unused = nn.LazyBatchNorm1d(affine=False)
    train(model, [callback()], max_epochs=2)
    assert int(model.encoder[1].num_batches_tracked) == 10


def test_an_interrupt_leaves_no_half_of_a_pass():
    class Interrupted(Normed):
        calls = 0

        def forward(self, x):
            self.calls += not torch.is_grad_enabled()
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    models = [Interrupted(), Normed()]
    for model, estimates in zip(models, (True, False), strict=True):
        torch.manual_seed(3)
        with pytest.raises(SystemExit) if estimates else contextlib.nullcontext():
            train(model, [callback(batch_norms=estimates)], max_epochs=2)
    found = [statistics(model) for model in models]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert models[0].encoder[1].momentum == 0.1
