import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from toys import TIES, Toy, batches, same, train

from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    SoftTying,
    TemplateWeights,
    TyingMonitor,
    TyingSummary,
    WeightHashing,
)
from tying.hard import audit, tied
from tying.mixins import HardTyingMixin, WeightHashingMixin


class Inherits(HardTyingMixin, Toy):
    hard_tying = {"ties": TIES}  # noqa: RUF012


class Late(Toy):
    """Makes its layers in configure_model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = self.encoder, self.decoder
        del self.encoder, self.decoder

    def configure_model(self):
        if not hasattr(self, "encoder"):
            self.encoder, self.decoder = self.kept


def test_weights_are_one_through_training():
    model = Toy()
    [callback] = [HardTying(TIES)]
    trainer = train(model, [callback])
    assert len(tied(model)) == 3
    assert torch.equal(model.decoder[2].weight, model.encoder[0].weight.T)
    assert [len(group) for group in callback.groups] == [2, 2, 2]
    held = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert held == sum(p.numel() for p in Toy().parameters()) - 5 * 6 - 4 * 5 - 5


def test_training_is_that_of_ties_written_by_hand():
    class ByHand(Toy):
        def loss(self, batch):
            first, second = self.encoder[0], self.encoder[2]
            x = batch[0]
            code = second(first(x).tanh())
            hidden = torch.nn.functional.linear(code, second.weight.T, first.bias).tanh()
            return (torch.nn.functional.linear(hidden, first.weight.T, self.decoder[2].bias) - x).square().mean()

        def configure_optimizers(self):
            return self.make_optimizer([*self.encoder.parameters(), self.decoder[2].bias])

    ours, by_hand = Toy(), ByHand()
    train(ours, [HardTying(TIES)])
    train(by_hand)
    for name in ("encoder.0.weight", "encoder.2.weight", "encoder.0.bias", "decoder.2.bias"):
        torch.testing.assert_close(ours.get_parameter(name), by_hand.get_parameter(name), rtol=0, atol=1e-6)


def test_mixin_callback_and_late_layers_are_the_same_run():
    models = [Toy(), Inherits(), Late()]
    for model in models:
        train(model, [] if isinstance(model, Inherits) else [HardTying(TIES)])
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_soft_tying_with_infinite_strength_is_hard_tying():
    """Equal weights stay equal; the mean of plain SGD's steps is half the step of the shared weight."""
    hard, soft = Toy(), Toy()
    sgd = lambda rate: lambda parameters: torch.optim.SGD(parameters, lr=rate)  # noqa: E731
    ties = ["encoder.0.weight ~ decoder.2.weight | o i -> i o"]
    hard.make_optimizer = sgd(0.1)
    rates = {"encoder.0.weight": 0.2, "decoder.2.weight": 0.2}
    soft.make_optimizer = lambda _: torch.optim.SGD(
        [{"params": [p], "lr": rates.get(name, 0.1)} for name, p in soft.named_parameters()]
    )
    with torch.no_grad():
        soft.decoder[2].weight.copy_(soft.encoder[0].weight.T)
    train(hard, [HardTying(ties)])
    train(soft, [SoftTying(ties, strength=float("inf"), update="proximal")])
    torch.testing.assert_close(soft.encoder[0].weight, hard.encoder[0].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft.decoder[2].weight, soft.encoder[0].weight.T, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.01}, {"precision": "bf16-mixed"}], ids=str
)
def test_in_mixed_company(arguments):
    model = Toy()
    train(model, [HardTying(TIES), TyingMonitor(), TyingSummary()], **arguments)
    assert len(tied(model)) == 3
    assert not torch.equal(model.encoder[0].weight, Toy().encoder[0].weight)


def test_monitor_and_summary(capsys):
    trainer = train(Toy(), [HardTying(TIES), TyingMonitor(), TyingSummary()], log_every_n_steps=1)
    assert float(trainer.callback_metrics["tying/gap"]) == 0.0
    told = capsys.readouterr().out
    assert "HardTying" in told
    assert "65 unique parameters, 120 counting each use; 220 bytes saved by sharing." in told
    assert "Were every group one weight" not in told


def test_it_says_that_weights_differed():
    model, callback = Toy(), HardTying(TIES, init="mean")
    callback.apply(model)
    told = (
        "decoder.2.weight is now encoder.0.weight, decoder.0.weight is now encoder.2.weight "
        "and 1 more (with their mean); before, they differed (largest gap 0."
    )
    assert callback.describe(model).startswith(told)


def test_several_fits_and_stages():
    model, callback = Toy(), HardTying(TIES)
    trainer = train(model, [callback], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches())
    assert len(tied(model)) == 3
    copied = copy.deepcopy(model)
    train(copied, [HardTying(TIES)], max_epochs=1)
    assert len(tied(copied)) == 3


def test_two_callbacks():
    model = Toy()
    first, second = HardTying(TIES[:1]), HardTying(TIES[1:], name="biases")
    train(model, [first, second], max_epochs=1)
    assert [group.names for group in second.groups] == [("encoder.0.bias", "decoder.0.bias")]
    assert len(first.groups) == 2
    assert audit(model).problems == ()


class EarlyOptimizer(Toy):
    """Holds an optimizer made before the ties."""

    def __init__(self):
        super().__init__()
        self.early = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self):
        return self.early


def test_ties_after_the_optimizer_are_refused():
    with pytest.raises(
        ValueError, match=r"an optimizer holds tensors of the shape of 'decoder\.2\.weight' that are not the model's"
    ):
        train(EarlyOptimizer(), [HardTying(TIES)])
    with pytest.raises(ValueError, match=r"of the shape of 'decoder\.2\.weight' that are not the model's"):
        train(EarlyOptimizer(), [LowRankWeights(["decoder.2.weight"], rank=1)])


def test_mistakes():
    with pytest.raises(ValueError, match="init must be 'source' or 'mean', not 'first'"):
        HardTying(TIES, init="first")
    with pytest.raises(ValueError, match="ties must be a list of at least one Tie"):
        HardTying([])
    model = Toy()
    with pytest.raises(ValueError, match=r"Nearest existing names: encoder\.0\.weight"):
        train(model, [HardTying(["encoder.0.wieght ~ decoder.2.weight | o i -> i o"])])
    assert same(model, Toy())


class Convolutions(Toy):
    def __init__(self):
        super().__init__()
        self.extra = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))

    def loss(self, batch):
        code = self.extra(self.encoder(batch[0])[:, :, None, None]).flatten(1)
        return (self.decoder(code) - batch[0]).square().mean()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: LowRankWeights(["encoder.0.weight"], rank=2), {"encoder.0.weight"}),
        (lambda: LowRankWeights(["extra.0.weight"], rank=1), {"extra.0.weight"}),
        (lambda: TemplateWeights(["extra.*.weight"], templates=1), {"extra.0.weight", "extra.1.weight"}),
        (lambda: GeneratedWeights(["extra.*.weight"], 1, 2, 2), {"extra.0.weight", "extra.1.weight"}),
    ],
)
def test_other_parametrizations(make, names, tmp_path):
    model, callback = Convolutions(), make()
    before = sum(p.numel() for p in model.parameters())
    train(model, [callback], max_epochs=1, default_root_dir=tmp_path)
    assert set(callback.apply(model)) == names
    computed = {f"{path}.{name}" for path, m in model.named_modules() for name in getattr(m, "parametrizations", {})}
    assert computed == names
    assert sum(p.numel() for p in model.parameters()) < before
    assert (tmp_path / "layer_similarity.png").exists() == isinstance(callback, TemplateWeights)


def test_parametrizations_are_all_or_none():
    model = Convolutions()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'decoder.0.bias' has fewer than two dimensions: leave it out"):
        LowRankWeights(["encoder.0.weight", "decoder.0.bias"], rank=1).apply(model)
    assert same(model, before)
    HardTying(["extra.0.weight ~ extra.1.weight | o i h w -> i o h w"]).apply(model)
    with pytest.raises(ValueError, match=r"'extra.0.weight' is tied to 'extra.1.weight' through a relation"):
        LowRankWeights(["extra.0.weight"], rank=1).apply(model)
    first = LowRankWeights(["encoder.0.weight"], rank=1).apply(model)
    assert LowRankWeights(["encoder.0.weight"], rank=1).apply(model) == first  # for the stages of another Trainer
    with pytest.raises(ValueError, match="matches no parameter or module"):
        LowRankWeights(["encoder.0.weight"], rank=2).apply(model)


def test_soft_ties_read_hard_ones_as_they_lie():
    model = Toy()
    model.extra = nn.Linear(5, 6)
    soft = SoftTying(["decoder.2.weight ~ extra.weight"], strength=float("inf"), update="proximal")
    train(model, [HardTying(TIES[:1]), soft], max_epochs=1)
    assert torch.equal(model.extra.weight, model.decoder[2].weight)
    assert torch.equal(model.extra.weight, model.encoder[0].weight.T)


class Unfrozen(Toy):
    """Two layers that are frozen until the second epoch, and whose gradient is 1."""

    def __init__(self):
        super().__init__(optimizer=lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], 0.1))
        self.pair = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))

    def loss(self, batch):
        return super().loss(batch) + next(self.pair.parameters()).sum()


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, model):
        self.freeze(model.pair)

    def finetune_function(self, model, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(model.pair, optimizer, lr=0.1)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "make",
    [
        lambda: HardTying(["pair.0.weight ~ pair.1.weight"]),
        lambda: WeightHashing(["pair.*.weight"], 0.5, scope="network", scaled=False),
    ],
    ids=["tied", "hashed"],
)
def test_layers_that_are_unfrozen_together_are_stepped_once(make, tmp_path):
    model = Unfrozen()
    before = copy.deepcopy(model)
    make().apply(before)
    trainer = train(model, [make(), Unfreeze()], max_epochs=3, default_root_dir=tmp_path)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [8, 1]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    if isinstance(make(), HardTying):
        torch.testing.assert_close(before.pair[0].weight - model.pair[1].weight, torch.full((3, 3), 2.0))
    where = {"ckpt_path": tmp_path / "a.ckpt", "default_root_dir": tmp_path}
    trainer = train(Unfrozen(), [make(), Unfreeze()], max_epochs=4, **where)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [8, 1]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_weights_that_several_optimizers_hold():
    class Add(pl.Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 1:
                for optimizer in trainer.optimizers:
                    optimizer.add_param_group({"params": [*model.pair.parameters()]})

    class Two(Unfrozen):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.encoder, self.decoder)]

    with pytest.raises(ValueError, match=r"'pair\.0\.weight' occurs 2 times in the optimizers"):
        train(Two(), [HardTying(["pair.0.weight ~ pair.1.weight"]), Add()], max_epochs=2)


def test_a_table_that_modules_share_is_stepped_once():
    model = Toy(lambda _: torch.optim.SGD([*model.encoder.parameters(), *model.decoder.parameters()], lr=0.1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        trainer = train(model, [WeightHashing(["*.0.weight"], 0.5, scope="network")], max_epochs=1)
    [group] = trainer.optimizers[0].param_groups
    assert len(group["params"]) == len({*group["params"]})


def test_ties_on_the_meta_device():
    model = Toy().to("meta")
    assert [group.shared for group in HardTying(TIES).apply(model)] == [True] * 3


@pytest.mark.filterwarnings("ignore:.*configure_sharded_model")
def test_layers_of_the_deprecated_hook_are_tied():
    class Sharded(Late):
        configure_sharded_model, configure_model = Late.configure_model, pl.LightningModule.configure_model

    model = Sharded()
    train(model, [HardTying(TIES)])
    assert len(tied(model)) == 3


class Hashed(WeightHashingMixin, Toy):
    weight_hashing = {"parameters": ["**.weight"], "table_ratio": 0.5, "scope": "network"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("make", "callback"),
    [
        (Toy, lambda: HardTying(TIES)),
        (Toy, lambda: WeightHashing(["**.weight"], 0.5, scope="network")),
        (Inherits, None),
        (Hashed, None),
    ],
    ids=["HardTying", "WeightHashing", "HardTyingMixin", "WeightHashingMixin"],
)
def test_weights_that_to_empty_parted_are_one_before_the_first_step(make, callback):
    model = make()
    callbacks = [callback()] if callback else []
    train(model, callbacks, max_epochs=1)
    count = len([*model.parameters()])
    model.to("meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert len([*model.parameters()]) > count
    assert "is another tensor now" in audit(model).problems[0]
    trainer = train(model, callbacks, max_epochs=1)
    assert audit(model, trainer.optimizers).problems == ()
    assert len([*model.parameters()]) == count
