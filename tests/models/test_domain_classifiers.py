"""Networks of several domains: apart as two models, or one."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from tying import ConfigurationError, Tie
from tying.callbacks import SoftTying
from tying.models import MLP, Classifier, DomainClassifiers

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def loader(offset=0.0, count=64):
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + offset
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > offset).long()), batch_size=16)


def both():
    return CombinedLoader({"near": loader(), "far": loader(1.0)}, "min_size")


def make(**options):
    pl.seed_everything(0, verbose=False)
    return DomainClassifiers(MLP([48, 16, 2]), ["near", "far"], num_classes=2, lr=0.05, **options)


def test_networks_begin_alike_and_each_learns_its_domain():
    model = make(channels_last=True)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in model.networks.values()), strict=True))
    trainer = train(model, data=both(), max_epochs=60)
    [tested] = trainer.test(model, both(), verbose=False)
    assert tested.keys() == {f"test/{d}/{metric}" for d in ("near", "far") for metric in ("loss", "accuracy")}
    assert min(tested["test/near/accuracy"], tested["test/far/accuracy"]) > 0.9
    for domain, loaded, predicted in zip(
        model.domains, (loader(), loader(1.0)), trainer.predict(model, [loader(), loader(1.0)]), strict=True
    ):
        probabilities = torch.cat(predicted)
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(64))
        labels = torch.cat([y for _, y in loaded])
        assert (probabilities.argmax(dim=1) == labels).float().mean() == tested[f"test/{domain}/accuracy"]


def test_apart_a_network_trains_as_it_would_alone():
    alone = Classifier(make().networks["near"], num_classes=2, lr=0.05)
    joint = make()
    for model, data in ((alone, loader()), (joint, both())):
        train(model, data=data, max_epochs=3)
    for own, same in zip(alone.network.parameters(), joint.networks["near"].parameters(), strict=True):
        assert torch.equal(own, same)


def test_pulled_without_limit_they_are_one():
    model = make()
    tying = SoftTying([Tie("networks.near", "networks.far")], strength=float("inf"), update="proximal")
    train(model, data=both(), max_epochs=3, callbacks=[tying])
    near, far = ([*net.parameters()] for net in model.networks.values())
    for one, other in zip(near, far, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_predictions_go_by_the_names_of_loaders():
    model = make()
    trainer = train(model, data=both(), max_epochs=3)
    found = trainer.predict(model, CombinedLoader({"far": loader(1.0), "near": loader()}, "sequential"))
    again = trainer.predict(model, [loader(), loader(1.0)])
    for one, other in zip(found, reversed(again), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))


def test_other_batches_and_bad_domains():
    with pytest.raises(ConfigurationError, match="dictionaries of batches of 'near', 'far', not on list"):
        train(make(), data=loader())
    with pytest.raises(ConfigurationError, match="'near', 'far', not on 'near', 'odd'"):
        train(make(), data=CombinedLoader({"near": loader(), "odd": loader()}, "min_size"))
    for domains in ([], ["a", "a"], ["a.b"]):
        with pytest.raises(ConfigurationError, match="domains must be distinct names"):
            DomainClassifiers(MLP([2, 2]), domains)
    with pytest.raises(ConfigurationError, match="tests by one pass"):
        make(test_samples=3)
