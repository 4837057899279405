"""Soft ties that become hard."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from torch.nn.utils import prune
from toys import TIES, Toy, same, train

from tying import ConfigurationError, resolve
from tying.callbacks import SoftTying, TyingMonitor, TyingSummary
from tying.hard import audit, tied
from tying.soft import gap
from tying.weights.optimizers import merge_optimizer_state

NEAR = 0.3


def strongly(**arguments):
    return SoftTying(TIES, strength=1.0, update="proximal", harden_below=NEAR, **arguments)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_become_one_where_their_gap_is_below(kind, caplog):
    model = Toy(lambda parameters: kind(parameters, lr=0.05))
    callback = strongly()
    with caplog.at_level("INFO"):
        trainer = train(model, [callback, TyingMonitor(), TyingSummary()], max_epochs=6)
    assert tied(model)
    assert "hard tied from now on" in caplog.text
    assert (
        float(trainer.callback_metrics["tying/hardened"]) == len(tied(model)) == sum(g.shared for g in callback.groups)
    )
    assert len(callback.groups) == 3
    for group in callback.groups:
        assert group.shared or gap(group.tensors()) >= NEAR
    assert audit(model, trainer.optimizers).problems == ()


def test_nothing_hardens_above():
    model, free = Toy(), Toy()
    train(model, [SoftTying(TIES, strength=0.01, harden_below=1e-6)])
    train(free, [SoftTying(TIES, strength=0.01)])
    assert tied(model) == []
    assert same(model, free)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("stop", [2, 4])
def test_resume_is_bitwise(kind, stop, tmp_path):
    def made():
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return Toy(lambda parameters: kind(parameters, lr=0.05, **options))

    whole = made()
    train(whole, [strongly()], max_epochs=6)
    assert tied(whole)
    half = made()
    train(half, [strongly()], max_epochs=stop).save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback = made(), strongly()
    train(resumed, [callback], max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert [group.names for group in tied(resumed)] == [group.names for group in tied(whole)]
    assert same(resumed, whole)
    assert len(callback.groups) == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_states_are_the_mean_in_the_sources_layout(kind):
    model = Toy()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    model.loss([torch.randn(4, 6)]).backward()
    optimizer.step()
    source, target = model.encoder[0].weight, model.decoder[2].weight
    key = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg_sq"
    expected = (optimizer.state[source][key] + optimizer.state[target][key].T) / 2
    count = len(optimizer.param_groups[0]["params"])
    merge_optimizer_state([optimizer], resolve(model, TIES[:1])[:1])
    assert torch.equal(optimizer.state[source][key], expected)
    assert target not in optimizer.state
    assert len(optimizer.param_groups[0]["params"]) == count - 1
    if kind is torch.optim.AdamW:
        assert float(optimizer.state[source]["step"]) == 1


def test_states_over_several_optimizers():
    model = Toy()
    first = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    second = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    for group in resolve(model, TIES):
        merge_optimizer_state([first, second], [group])
    assert len(second.param_groups[0]["params"]) == 1
    assert len(first.param_groups[0]["params"]) == 4


class Late(Toy):
    """Lists the source of its tie last, in a group of its own, and has an alias."""

    def __init__(self):
        super().__init__()
        self.alias = self.decoder[0]

    def configure_optimizers(self):
        own = list(self.encoder.parameters())
        groups = [{"params": own}, {"params": list(self.decoder.parameters()), "lr": 0.03}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def late_ties():
    return SoftTying(
        ["decoder.{i}.weight ~ encoder.{-i}.weight | o i -> i o"],
        strength=1.0,
        update="proximal",
        harden_below=0.4,
        schedule=None,
    )


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_resume_is_bitwise_whatever_the_optimizers_order(stop, tmp_path):
    whole = Late()
    train(whole, [late_ties()], max_epochs=6)
    assert tied(whole)
    train(Late(), [late_ties()], max_epochs=stop).save_checkpoint(tmp_path / "a.ckpt")
    resumed = Late()
    train(resumed, [late_ties()], max_epochs=6, ckpt_path=tmp_path / "a.ckpt")
    assert len(tied(resumed)) == len(tied(whole))
    one, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hardened_model_goes_on_from_any_checkpoint(tmp_path):
    """In the same process: a later fit, an earlier checkpoint, and a test of it."""
    model, callback = Toy(), strongly()
    early = train(model, [callback], max_epochs=1)
    early.save_checkpoint(tmp_path / "early.ckpt")
    apart = not tied(model)
    train(model, [callback], max_epochs=6)
    assert tied(model)
    train(model, [callback], max_epochs=2)
    assert len(callback.groups) == 3
    again = Toy()
    train(again, [strongly()], max_epochs=3, ckpt_path=tmp_path / "early.ckpt")
    train(model, [callback], max_epochs=3, ckpt_path=tmp_path / "early.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert apart or tied(again)


def test_a_source_that_nobody_trained_takes_a_members_place():
    model = Toy()
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    merge_optimizer_state([optimizer], resolve(model, TIES[:1])[:1])
    held = optimizer.param_groups[0]["params"]
    assert any(parameter is model.encoder[0].weight for parameter in held)
    assert len(held) == 4


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_an_optimizer_that_is_left_with_nothing(update):
    class Two(Toy):
        automatic_optimization = False

        def configure_optimizers(self):
            first, second = self.encoder[0].bias, self.decoder[0].bias
            return [torch.optim.SGD([one], lr=0.1) for one in (first, second)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    model = Two()
    callback = SoftTying(["encoder.0.bias ~ decoder.0.bias"], strength=1.0, update=update, harden_below=0.99)
    trainer = train(model, [callback], max_epochs=3)
    assert not trainer.optimizers[1].param_groups[0]["params"]


def test_callbacks_that_share_weights_are_refused():
    with pytest.raises(ValueError, match=r"harden_below would replace .*which another SoftTying other ties too"):
        train(Toy(), [strongly(), SoftTying(TIES[:1], name="other")])


def pruning(parameters=None):
    return ModelPruning("l1_unstructured", parameters_to_prune=parameters, parameter_names=["weight"], amount=0.5)


@pytest.mark.parametrize("order", [1, -1])
def test_pruned_weights_are_refused(order):
    with pytest.raises(ConfigurationError, match=r"cannot tie '.*weight' to another weight once ModelPruning has"):
        train(Toy(), [pruning(), strongly()][::order])
    model = Toy()
    model.extra = torch.nn.Linear(6, 6)
    train(model, [pruning([(model.extra, "weight")]), strongly()][::order])
    assert tied(model)


def test_weights_that_something_has_pruned_are_told():
    class Prunes(Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                prune.identity(self.decoder[2], "weight")

    message = r"'decoder\.2\.weight' cannot be tied to 'encoder\.0\.weight': it is no longer a parameter of the model"
    with pytest.raises(ConfigurationError, match=message):
        train(Prunes(), [SoftTying(TIES[:1], strength=0.1, update="proximal", harden_below=0.5)], max_epochs=9)


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_averaging_is_refused(averaging):
    with pytest.raises(ValueError, match=f"harden_below cannot be combined with {type(averaging).__name__}"):
        train(Toy(), [strongly(), averaging])


def test_frozen_members_are_refused():
    model = Toy()
    model.decoder[2].weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"'decoder\.2\.weight' cannot be tied to 'encoder\.0\.weight': requires_grad is False"
    ):
        train(model, [strongly()])


@pytest.mark.parametrize("tolerance", [0, -1, 1.5])
def test_range(tolerance):
    with pytest.raises(ValueError, match=r"harden_below must be in \(0, 1\], not"):
        SoftTying(TIES, harden_below=tolerance)


@pytest.mark.parametrize("stop", [None, 2, 4])
def test_two_callbacks_harden_their_own_weights(stop, tmp_path):
    def callbacks():
        return [
            SoftTying(ties, strength=1.0, update="proximal", harden_below=NEAR, name=name)
            for name, ties in {"weights": TIES[:1], "biases": TIES[1:]}.items()
        ]

    together, one = Toy(), Toy()
    if stop is not None:
        half = Toy()
        train(half, callbacks(), max_epochs=stop).save_checkpoint(tmp_path / "half.ckpt")
    trainer = train(together, callbacks(), max_epochs=6, ckpt_path=stop and tmp_path / "half.ckpt")
    train(one, [strongly()], max_epochs=6)
    assert len(tied(together)) == len(tied(one)) > 1
    assert same(together, one)
    counts = [float(trainer.callback_metrics[f"tying/{name}/hardened"]) for name in ("weights", "biases")]
    assert sum(counts) == len(tied(together))
