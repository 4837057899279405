"""Weights that gather around a few values while they train."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.optim import SGD, Adam
from toys import TIES, Toy, batches, same, train

from tying.callbacks import MixtureTying, SoftTying
from tying.soft import GaussianMixturePrior

pytestmark = [
    pytest.mark.filterwarnings("ignore:MixtureTying begins with"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
EXAMPLES = 40  # of ten batches of four


def adam(parameters):
    return Adam(parameters, lr=0.01)


def callback(**options):
    return MixtureTying(["**.weight"], **{"strength": 0.1, "components": 4, "zero_weight": 0.5, **options})


def values(model):
    return torch.cat([w.detach().flatten() for name, w in model.named_parameters() if name.endswith("weight")])


class ByHand(Toy):
    """The prior in the loss, its parameters in the optimizer."""

    def __init__(self):
        super().__init__(adam)
        self.double()
        low, high = values(self).aminmax()
        self.prior = GaussianMixturePrior(4, 0.5, float(low), float(high)).double()

    def loss(self, batch):
        named = [w.flatten() for n, w in self.named_parameters() if n.endswith("weight")]
        return super().loss(batch) + 0.1 / EXAMPLES * self.prior(torch.cat(named))

    def configure_optimizers(self):
        rates = zip(self.prior.parameters(), (1e-4, 3e-3, 3e-3), strict=True)
        own = [*self.encoder.parameters(), *self.decoder.parameters()]
        return Adam([{"params": own}, *({"params": [p], "lr": rate} for p, rate in rates)], lr=0.01)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_equals_the_prior_in_the_loss(accumulate):
    ours, reference = Toy(adam).double(), ByHand()
    own = callback()
    arguments = {"precision": "64-true", "accumulate_grad_batches": accumulate, "max_epochs": 3}
    own._finish = lambda trainer, model: vars(own).update(_optimizer=None) or {}  # compare before they are quantised
    train(ours, [own], **arguments)
    train(reference, **arguments)
    torch.testing.assert_close(values(ours), values(reference), rtol=0, atol=1e-10)
    for a, b in zip(own.prior.parameters(), reference.prior.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_at_the_end_weights_are_the_means():
    model, own = Toy(adam), callback()
    trainer = train(model, [own], max_epochs=3)
    found = values(model)
    assert len(found.unique()) <= 4
    assert torch.equal(own.prior.quantize(found), found)
    logged = trainer.callback_metrics
    assert logged["tying/distinct"] == len(found.unique())
    assert float(logged["tying/nonzero"]) == pytest.approx(float((found != 0).float().mean()))
    assert float(logged["tying/compression_huffman"]) >= float(logged["tying/compression"]) > 1
    assert float(logged["tying/penalty"]) != 0
    for name in ("mixture_start.png", "mixture_end.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_the_last_checkpoint_is_that_of_the_quantised_network(tmp_path):
    model = Toy(adam)
    train(model, [callback(), ModelCheckpoint(tmp_path, "last")], max_epochs=2, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_it_resumes_bitwise(start, stop, tmp_path):
    whole, resumed = Toy(adam), Toy(adam)
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train(whole, [callback(start_epoch=start), saves], max_epochs=5, enable_checkpointing=True)
    checkpoint = tmp_path / f"epoch={stop - 1}.ckpt"
    torch.load(checkpoint, weights_only=True)
    train(resumed, [callback(start_epoch=start)], max_epochs=5, ckpt_path=checkpoint)
    assert same(whole, resumed)


def test_training_goes_on_from_the_quantised_network():
    model, own = Toy(adam), callback()
    train(model, [own], max_epochs=2).save_checkpoint("a.ckpt")
    again = Toy(adam)
    train(again, [callback()], max_epochs=4, ckpt_path="a.ckpt")
    assert len(values(again).unique()) <= 4
    assert not torch.equal(values(again), values(model))
    train(model, [own], max_epochs=2)
    assert len(values(model).unique()) <= 4


def test_before_its_epoch_nothing_happens():
    ours, untied = Toy(adam), Toy(adam)
    own = callback(start_epoch=2)
    with pytest.warns(UserWarning, match="training ends before"):
        train(ours, [own], max_epochs=2)
    train(untied, max_epochs=2)
    assert same(ours, untied)
    assert own.prior is None


def test_an_early_end_is_told():
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    model = Toy(adam)
    with pytest.warns(UserWarning, match="stopped before the end of its last epoch"):
        train(model, [callback(), Stops()], max_epochs=50)
    assert len(values(model).unique()) <= 4


def test_an_untrained_network_is_told():
    with pytest.warns(UserWarning, match="begins with .* as initialised"):
        train(Toy(adam, seed=3), [callback()], max_epochs=1)
    trained = Toy(adam)
    train(trained, max_epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?!MixtureTying).*")
        train(trained, [callback()], max_epochs=1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: callback(components=1), "components must be 2 or more"),
        (lambda: callback(strength=-1.0), "strength must be 0 or more, not -1.0"),
        (lambda: callback(start_epoch=-1), "start_epoch must be 0 or more, not -1"),
        (lambda: callback(examples=0), "examples must be 1 or more, not 0"),
        (lambda: callback(rates=(1.0, 1.0)), "rates are three learning rates"),
        (lambda: callback(rates=(1.0, 1.0, float("nan"))), "rates are three learning rates"),
        (lambda: train(Toy(), [callback(), EMAWeightAveraging()]), "cannot be combined with EMAWeightAveraging"),
        (lambda: train(Toy(), [callback(), SoftTying(TIES, harden_below=0.5)]), "harden_below would replace 'encoder.0.weight', which another MixtureTying ties too"),
        (lambda: train(Toy(lambda p: SGD([*p][:2], lr=0.1)), [callback()]), "no single optimizer trains encoder.0.weight, encoder.2.weight"),
        (lambda: train(Toy(), [MixtureTying(["nothing"])]), "'nothing' matches no parameter"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_constant_has_no_range():
    model = Toy()
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.constant_(weight, 0.5)
    with pytest.raises(ValueError, match="there is no range to spread means over"):
        train(model, [callback()], data=batches(1))


def test_a_stop_before_its_time_is_no_end():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    model = Toy(adam)
    train(model, [callback(), Stops()], max_epochs=50, min_epochs=4)
    assert len(values(model).unique()) <= 4


def test_a_restored_mixture_is_restored_once():
    own = callback()
    saves = ModelCheckpoint(".", "{epoch}", save_top_k=-1)
    train(Toy(adam), [callback(), saves], max_epochs=3, enable_checkpointing=True)
    trainer = train(Toy(adam), [own], max_epochs=2, ckpt_path="epoch=0.ckpt")
    learned = own.prior.means.detach().clone()
    trainer.fit_loop.max_epochs = 3
    own.rates = (0.0, 0.0, 0.0)
    trainer.fit(trainer.lightning_module, batches())
    torch.testing.assert_close(own.prior.means.detach(), learned)


def test_frozen_weights_stay_until_the_end():
    model = Toy(adam)
    model.encoder.requires_grad_(False)
    own, before = callback(), values(model.encoder).clone()
    own._finish = lambda trainer, model: vars(own).update(_optimizer=None) or {}
    train(model, [own], max_epochs=2)
    assert torch.equal(values(model.encoder), before)


def test_two_of_them_draw_their_own_pictures():
    own = [MixtureTying([f"{side}.**.weight"], components=3, name=side) for side in ("encoder", "decoder")]
    train(Toy(adam), own, max_epochs=1)
    assert Path("mixture_end_encoder.png").exists()
    assert Path("mixture_end_decoder.png").exists()


def test_an_end_before_its_beginning_is_told():
    with pytest.warns(UserWarning, match="begins in epoch 5, and training ends before: max_epochs is 2"):
        train(Toy(adam), [callback(start_epoch=5)], max_epochs=2)
