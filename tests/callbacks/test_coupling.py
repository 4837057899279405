"""Two models of one run, coupled."""

import math
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from toys import Toy, batches, same, train

from tying import resolve
from tying.callbacks import AnchorTying, Coupling, SoftTying
from tying.mixins import CouplingMixin
from tying.models import MLP, HybridClassifier
from tying.soft import TyingPenalty, coupling_strength

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

PAIR = {"first": "classifier.encoder", "second": "autoencoder.encoder"}
LABELLED = 24


def hybrid(seed=0, **options):
    torch.manual_seed(seed)
    options = {"num_classes": 3, "lr": 0.1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, **options}
    return HybridClassifier(MLP([6, 5]), MLP([5, 3]), MLP([5, 6]), **options).double()


def data(unlabelled=0):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(LABELLED, 6, generator=generator).double(), torch.arange(LABELLED) % 3
    other = torch.randn(40, 6, generator=torch.Generator().manual_seed(unlabelled)).double()
    parts = {"labelled": (x, y), "unlabelled": (other, torch.full((40,), -1))}
    loaders = {name: DataLoader(TensorDataset(*part), batch_size=8) for name, part in parts.items()}
    return CombinedLoader(loaders, "max_size_cycle")


@pytest.mark.parametrize("exponent", [0.5, 2.0, 4.0])
def test_strength(exponent):
    assert coupling_strength(0, exponent) == math.inf
    assert coupling_strength(1, exponent) == 0
    assert coupling_strength(0.5, exponent) == 1
    assert coupling_strength(0.25, exponent) == pytest.approx(3**exponent)


def test_at_one_the_classifier_knows_nothing_of_the_unlabelled_data():
    models = [hybrid() for _ in range(2)]
    for seed, model in enumerate(models):
        train(model, [Coupling(**PAIR, alpha=1.0)], data=data(unlabelled=seed))
    assert same(models[0].classifier, models[1].classifier)
    assert not same(models[0].autoencoder, models[1].autoencoder)


class TieRecord(HybridClassifier):
    """One encoder, in both models."""

    def training_step(self, batch, batch_idx):
        self.autoencoder.encoder = self.classifier.encoder
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        own = [*self.classifier.encoder.parameters()]
        rest = [*self.classifier.head.parameters(), *self.autoencoder.decoder.parameters()]
        rate = self.hparams["lr"]
        return SGD([{"params": own, "lr": rate / 2}, {"params": rest}], lr=rate, momentum=0.9, nesterov=True)


def test_at_zero_it_is_one_encoder_at_half_the_learning_rate():
    coupled = hybrid()
    torch.manual_seed(0)
    shared = TieRecord(MLP([6, 5]), MLP([5, 3]), MLP([5, 6]), **{**coupled.hparams, "reconstruction": 1.0}).double()
    train(coupled, [Coupling(**PAIR, alpha=0.0)], data=data())
    train(shared, data=data())
    for a, b in zip(coupled.classifier.parameters(), shared.classifier.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(coupled.autoencoder.encoder.parameters(), shared.classifier.encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(coupled.autoencoder.decoder.parameters(), shared.autoencoder.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", ["proximal", "gradient", "decoupled"])
def test_swapping_the_two_changes_nothing(update):
    models = [hybrid() for _ in range(2)]
    swapped = {"first": PAIR["second"], "second": PAIR["first"]}
    for model, pair in zip(models, [PAIR, swapped], strict=True):
        train(model, [Coupling(**pair, alpha=0.4, update=update)], data=data())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("examples", [None, LABELLED, 1000])
def test_it_is_soft_tying_with_the_prior_over_the_examples(examples):
    coupled, tied = hybrid(), hybrid()
    callback = Coupling(**PAIR, alpha=0.3, exponent=3.0, examples=examples)
    trainer = train(coupled, [callback], data=data())
    strength = (0.7 / 0.3) ** 3 / (examples or LABELLED)
    assert float(trainer.callback_metrics["tying/strength"]) == pytest.approx(strength)
    train(tied, [SoftTying([f"{PAIR['first']} ~ {PAIR['second']}"], strength=strength, update="proximal")], data=data())
    for a, b in zip(coupled.parameters(), tied.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_the_only_loader_counts_too():
    callback = Coupling("encoder.0", "decoder.2", 0.5)
    model = Toy()
    model.decoder[2] = nn.Linear(5, 6)
    model.encoder[0] = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"'encoder\.0\.weight' is \(5, 6\) and 'decoder\.2\.weight' \(6, 5\)"):
        train(model, [callback])
    callback = Coupling("encoder.0.bias", "decoder.0.bias", 0.5)
    trainer = train(Toy(), [callback], data=batches(10, 4))
    assert float(trainer.callback_metrics["tying/strength"]) == pytest.approx(1 / 40)


def test_mixin():
    class Coupled(CouplingMixin, HybridClassifier):
        coupling: ClassVar = {**PAIR, "alpha": 0.3}

    torch.manual_seed(0)
    options = {"num_classes": 3, "lr": 0.1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    inherited = Coupled(MLP([6, 5]), MLP([5, 3]), MLP([5, 6]), **options).double()
    configured = hybrid()
    train(inherited, data=data())
    train(configured, [Coupling(**PAIR, alpha=0.3)], data=data())
    assert same(inherited, configured)


def test_it_resumes_bitwise(tmp_path):
    whole, resumed = hybrid(), hybrid()
    train(whole, [Coupling(**PAIR, alpha=0.3)], data=data(), max_epochs=4)
    train(hybrid(), [Coupling(**PAIR, alpha=0.3)], data=data(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    train(resumed, [Coupling(**PAIR, alpha=0.3)], data=data(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert same(whole, resumed)


def test_three_callbacks_add_their_gradients():
    ties = ["classifier.encoder.1.weight ~ autoencoder.decoder.1.weight | o i -> i o"]
    start = [w.detach().clone() for w in hybrid().classifier.parameters()]

    class InTheLoss(HybridClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            pairs = resolve(self, [f"{PAIR['first']} ~ {PAIR['second']}"])
            loss = loss + coupling_strength(0.6) / LABELLED * TyingPenalty(pairs)()
            moved = zip(self.classifier.parameters(), start, strict=True)
            loss = loss + 0.05 / 2 * sum((w - fixed).square().sum() for w, fixed in moved)
            return loss + 0.02 * TyingPenalty(resolve(self, ties))()

    torch.manual_seed(0)
    reference = InTheLoss(MLP([6, 5]), MLP([5, 3]), MLP([5, 6]), **{**hybrid().hparams, "reconstruction": 1.0})
    torch.manual_seed(0)
    ours, reference = hybrid(), reference.double()
    callbacks = [
        Coupling(**PAIR, alpha=0.6, update="gradient"),
        AnchorTying(["classifier.**"], strength=0.05),
        SoftTying(ties, strength=0.02),
    ]
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        b.data.copy_(a)
    train(ours, callbacks, data=data(), gradient_clip_val=0.3, accumulate_grad_batches=5)
    train(reference, data=data(), gradient_clip_val=0.3, accumulate_grad_batches=5)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


class Endless:
    def __iter__(self):
        return iter(batches(2))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Coupling("a", "b", -0.1), r"alpha must be in \[0, 1\], not -0.1"),
        (lambda: Coupling("a", "b", 1.1), "not 1.1"),
        (lambda: Coupling("a", "b", math.nan), "not nan"),
        (lambda: Coupling("a", "b", 0.5, exponent=0.0), "exponent must be above 0, not 0.0"),
        (lambda: Coupling("a", "b", 0.5, examples=0), "examples must be 1 or more, not 0"),
        (lambda: Coupling("a", "b", 0.0, update="gradient"), "alpha=0 makes the weights of both models equal, which needs update='proximal', not 'gradient'"),
        (lambda: train(Toy(), [Coupling("encoder.0.bias", "decoder.0.bias", 0.5)], data=Endless(), limit_train_batches=2), "number of labelled examples is not known, .*: give it as examples"),
        (lambda: train(hybrid(), data=DataLoader(TensorDataset(torch.zeros(8, 6).double(), torch.zeros(8).long()))), "HybridClassifier trains on batches of a labelled and an unlabelled part: set the data's labelled"),
        (lambda: hybrid(reconstruction=-1.0), "reconstruction must be 0 or more, not -1.0"),
    ],
)  # fmt: skip
def test_mistakes(make, told):
    with pytest.raises(ValueError, match=told):
        make()


class Unpaired(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
        self.second = nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(3, 2), "d": nn.Linear(2, 2)})


def test_all_that_does_not_pair_is_told_at_once():
    with pytest.raises(ValueError, match="'first' and 'second' cannot be paired") as caught:
        Coupling("first", "second", 0.5).build_penalties(None, Unpaired())
    for told in (
        "'first.c.weight' has no partner",
        "'first.c.bias' has no partner",
        "'second.d.weight' has no partner",
        "'first.a.weight' is (3, 2) and 'second.a.weight' (4, 2)",
        "'first.a.bias' is (3,) and 'second.a.bias' (4,)",
        "'first.b.weight' is (2, 2) and 'second.b.weight' (2, 3)",
    ):
        assert told in str(caught.value)


@pytest.mark.parametrize("update", ["gradient", "decoupled"])
def test_the_stability_bound_is_of_the_strength_for_each_example(update):
    pair = Coupling("encoder.0.bias", "decoder.0.bias", alpha=0.1, examples=500, update=update)
    train(Toy(lambda parameters: SGD(parameters, lr=0.1)), [pair], max_epochs=1)
    pair = Coupling("encoder.0.bias", "decoder.0.bias", alpha=0.1, examples=1, update=update)
    with pytest.warns(UserWarning, match="past the stability bound"):
        train(Toy(lambda parameters: SGD(parameters, lr=0.1)), [pair], max_epochs=1, limit_train_batches=1)


def test_a_sampler_of_a_subset_counts():
    dataset = batches(10, 4).dataset
    loader = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(range(20)))
    trainer = train(Toy(), [Coupling("encoder.0.bias", "decoder.0.bias", 0.5)], data=loader)
    assert float(trainer.callback_metrics["tying/strength"]) == pytest.approx(1 / 20)
