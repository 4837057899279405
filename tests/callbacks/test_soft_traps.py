"""Every way in which a training loop can make an injected gradient wrong."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim import LBFGS, SGD, Adam, AdamW
from toys import STRENGTH, TIES, Toy, batches, by_hand, largest_difference, same, train

from tying import ConfigurationError
from tying.callbacks import AnchorTying, Coupling, HardTying, MixtureTying, SoftTying, WeightClustering

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
UPDATES = ["gradient", "decoupled", "proximal"]


class Skips(Toy):
    """Returns None for some micro-batches."""

    skipped = (2, 5, 6, 7)  # with windows of two: half of one, half of another, and all of a third

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_returns_none(accumulate):
    ours, reference = Skips().double(), Skips(penalty=by_hand).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH)], accumulate_grad_batches=accumulate)
    train(reference, accumulate_grad_batches=accumulate)
    assert largest_difference(ours, reference) < 1e-10


@pytest.mark.parametrize("update", UPDATES)
def test_a_window_of_none_pulls_nothing(update):
    class Nothing(Toy):
        def training_step(self, batch, batch_idx):
            return None

    model, callback = Nothing(), SoftTying(TIES, strength=STRENGTH, update=update)
    train(model, [callback])
    assert same(model, Toy())
    assert callback.state_dict() == {"steps": {}}


def scaled(init_scale=2.0**10):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_real_scaler_and_fused_optimizer(fused, accumulate):
    def optimizer(parameters):
        return SGD(parameters, lr=0.1, momentum=0.9, fused=fused)

    ours, reference = Toy(optimizer), Toy(optimizer, penalty=by_hand)
    arguments = {"max_epochs": 1, "limit_train_batches": accumulate, "accumulate_grad_batches": accumulate}
    train(ours, [SoftTying(TIES, strength=STRENGTH)], plugins=[scaled()], **arguments)
    train(reference, plugins=[scaled()], **arguments)
    assert largest_difference(ours, reference) < 1e-6
    assert largest_difference(ours, Toy()) > 1e-4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_steps_that_the_scaler_skips_pull_nothing(fused, update):
    class Overflows(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    model = Overflows(lambda parameters: SGD(parameters, lr=0.1, fused=fused))
    callback = SoftTying(TIES, strength=STRENGTH, update=update)
    train(model, [callback], plugins=[scaled()], max_epochs=1)
    assert same(model, Toy())
    assert callback.state_dict() == {"steps": {}}


@pytest.mark.parametrize("update", UPDATES)
def test_frozen_partner_stays(update):
    model, start = Toy(), Toy()
    model.decoder.requires_grad_(False)
    train(model, [SoftTying(TIES, strength=STRENGTH, update=update)])
    assert same(model.decoder, start.decoder)
    assert all(p.grad is None for p in model.decoder.parameters())
    assert not same(model.encoder, start.encoder)


@pytest.mark.parametrize("update", UPDATES)
def test_partner_outside_the_optimizer_stays(update):
    class Half(Toy):
        def configure_optimizers(self):
            return SGD(self.encoder.parameters(), lr=0.1)

    model, reference = Half().double(), Half(penalty=by_hand).double()
    train(model, [SoftTying(TIES, strength=STRENGTH, update=update)])
    assert same(model.decoder, Toy().double().decoder)
    if update == "gradient":
        train(reference)
        assert largest_difference(model, reference) < 1e-10


def test_missing_gradients_are_created():
    class EncoderOnly(Toy):
        def loss(self, batch):
            loss = self.encoder(batch[0].double()).square().mean()
            return loss if self.penalty is None else loss + self.penalty(self)

    ours, reference = EncoderOnly().double(), EncoderOnly(penalty=by_hand).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH)])
    train(reference)
    assert largest_difference(ours, reference) < 1e-10
    assert not same(ours.decoder, Toy().double().decoder)


class TwoOptimizers(Toy):
    """Manual optimisation of encoder and decoder in turn."""

    def __init__(self, penalty=None, accumulate=1):
        super().__init__(penalty=penalty)
        self.automatic_optimization = False
        self.accumulate = accumulate

    def configure_optimizers(self):
        return SGD(self.encoder.parameters(), lr=0.1, momentum=0.9), Adam(self.decoder.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            for _ in range(self.accumulate):
                self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_manual_optimisation_with_two_optimizers():
    ours, reference = TwoOptimizers().double(), TwoOptimizers(by_hand).double()
    callback = SoftTying(TIES, strength=STRENGTH)
    train(ours, [callback])
    train(reference)
    assert largest_difference(ours, reference) < 1e-10
    assert callback.state_dict() == {"steps": {0: 50, 1: 50}}


def test_manual_accumulation_adds_the_pull_once_a_step():
    ours = TwoOptimizers(accumulate=2).double()
    reference = TwoOptimizers(lambda model: by_hand(model, STRENGTH / 2), accumulate=2).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH)])
    train(reference)
    assert largest_difference(ours, reference) < 1e-10


@pytest.mark.parametrize("update", ["decoupled", "proximal"])
def test_each_member_moves_after_its_own_optimizer(update):
    model = TwoOptimizers().double()
    moved = []

    class Watch(SoftTying):
        def _after_step(self, trainer, pl_module, optimizer, *arguments):
            before = [p.detach().clone() for p in pl_module.parameters()]
            super()._after_step(trainer, pl_module, optimizer, *arguments)
            changed = {
                name.split(".")[0]
                for (name, p), old in zip(pl_module.named_parameters(), before, strict=True)
                if not torch.equal(p, old)
            }
            moved.append((trainer.optimizers.index(optimizer), changed))

    train(model, [Watch(TIES, strength=STRENGTH, update=update)], max_epochs=1, limit_train_batches=1)
    assert moved == [(0, {"encoder"}), (1, {"decoder"})]


def test_lbfgs():
    def plain(parameters):
        return LBFGS(parameters, lr=0.1, max_iter=4)

    ours, reference = Toy(plain).double(), Toy(plain, penalty=by_hand).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH)], max_epochs=1)
    train(reference, max_epochs=1)
    assert largest_difference(ours, reference) < 1e-10

    def searching(parameters):
        return LBFGS(parameters, line_search_fn="strong_wolfe")

    with pytest.raises(ConfigurationError, match=r"line search of LBFGS.*proximal"):
        train(Toy(searching), [SoftTying(TIES)])
    train(Toy(searching), [SoftTying(TIES, update="proximal")], max_epochs=1)


def test_parameter_groups_of_different_learning_rates():
    def optimizer(parameters):
        first, *others = parameters
        return SGD([{"params": [first], "lr": 0.2}, {"params": others}], lr=0.05)

    class Still(Toy):
        def loss(self, batch):
            return 0.0 * super().loss(batch)

    model, start = Still(optimizer).double(), Toy().double()
    train(model, [SoftTying(TIES, strength=0.5, update="decoupled")], max_epochs=1, limit_train_batches=1)
    a, b = start.encoder[0].weight, start.decoder[2].weight.T
    torch.testing.assert_close(model.encoder[0].weight, a - 0.2 * 0.5 * (a - b))
    torch.testing.assert_close(model.decoder[2].weight.T, b - 0.05 * 0.5 * (b - a))


def test_l1_proximal_with_unequal_rates_is_refused_before_any_step():
    class Rates(Toy):
        def configure_optimizers(self):
            first, *others = self.lone
            return SGD(
                [{"params": [first], "lr": 0.2}, {"params": others}, {"params": self.encoder.parameters()}], lr=0.1
            )

    model = Rates()
    model.lone = torch.nn.ParameterList([torch.ones(2) * i for i in range(3)])
    with pytest.raises(ConfigurationError, match="needs one learning rate"):
        train(model, [SoftTying(["lone.*"], penalty="l1", update="proximal")])
    assert same(model.encoder, Toy().encoder)


def test_testing_with_another_trainer_keeps_the_count():
    model, callback = Toy(), SoftTying(TIES)
    model.test_step = model.training_step
    train(model, [callback], max_epochs=1)
    pl.Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False).test(
        model, batches(), verbose=False
    )
    assert callback.state_dict() == {"steps": {0: 10}}


@pytest.mark.parametrize("update", UPDATES)
def test_a_module_that_steps_every_second_batch(update):
    """As Lightning's documentation has it: its closure zeroes the gradients of the batch before."""

    class EverySecond(Toy):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    ours, reference = EverySecond().double(), EverySecond(penalty=by_hand).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH, update=update)], gradient_clip_val=0.02)
    train(reference, gradient_clip_val=0.02)
    if update == "gradient":
        assert largest_difference(ours, reference) < 1e-10
    assert not same(ours, Toy().double())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_over_batches_without_a_loss(accumulate):
    class None0(Skips):
        skipped = (0, 3)

    ours, reference = None0().double(), None0(penalty=by_hand).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH)], accumulate_grad_batches=accumulate)
    train(reference, accumulate_grad_batches=accumulate)
    assert largest_difference(ours, reference) < 1e-10


@pytest.mark.parametrize("update", UPDATES)
def test_hooks_are_gone_after_an_error(update):
    class Keeps(Toy):
        def configure_optimizers(self):
            self.kept = getattr(self, "kept", None) or super().configure_optimizers()
            return self.kept

        def training_step(self, batch, batch_idx):
            if self.trainer.callbacks and batch_idx == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Keeps()
    with pytest.raises(ZeroDivisionError):
        train(model, [SoftTying(TIES, update=update)])
    assert not model.kept._optimizer_step_post_hooks


class ByHand(Toy):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_an_optimizer_that_lightning_does_not_step():
    model, plain, callback = ByHand(), ByHand(), SoftTying(TIES, strength=STRENGTH)
    train(plain)
    with pytest.warns(
        UserWarning, match="made a step without Lightning.*or update='decoupled' or 'proximal'"
    ) as caught:
        train(model, [callback])
    assert len([w for w in caught if "without Lightning" in str(w.message)]) == 1
    assert same(model, plain)
    assert callback.state_dict() == {"steps": {}}
    train(ByHand(), [callback := SoftTying(TIES, strength=STRENGTH, update="decoupled")])
    assert callback.state_dict() == {"steps": {0: 50}}


@pytest.mark.parametrize("update", UPDATES)
def test_optimizers_that_are_made_anew_while_training(update):
    class Anew(Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 1 and self.renews:
                self.trainer.strategy.setup_optimizers(self.trainer)

    models = []
    for renews in (True, False):
        model = Anew(lambda parameters: SGD(parameters, lr=0.1)).double()
        model.renews = renews
        callback = SoftTying(TIES, strength=STRENGTH, update=update)
        train(model, [callback], max_epochs=3)
        assert callback.state_dict() == {"steps": {0: 30}}
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftTying(["late.0.weight ~ late.1.weight"], strength=0.5),
        lambda: Coupling("late.0", "late.1", 0.5, examples=2),
        lambda: AnchorTying(["late.**"], 0.1),
        lambda: MixtureTying(["late.*.weight"], examples=2, start_epoch=1),
    ],
    ids=["SoftTying", "Coupling", "AnchorTying", "MixtureTying"],
)
def test_layers_that_the_module_makes_in_its_setup(make, tmp_path):
    class Late(Toy):
        def setup(self, stage):
            if not hasattr(self, "late"):
                self.late = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

        def loss(self, batch):
            return super().loss(batch) + sum(layer.weight.square().sum() for layer in self.late)

    model, callback = Late(), make()
    train(model, [callback], max_epochs=2, default_root_dir=tmp_path)
    assert len(callback.affected(model)) >= 2
    with pytest.raises(ConfigurationError, match="'late"):
        train(Toy(), [make()], max_epochs=2, default_root_dir=tmp_path)


def test_hooks_are_gone_after_training():
    model = Toy()
    trainer = train(model, [SoftTying(TIES)], max_epochs=1)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("update", UPDATES)
def test_compiled_module_equals_eager(backend, update):
    eager, compiled = Toy(lambda p: AdamW(p, lr=0.01)).double(), Toy(lambda p: AdamW(p, lr=0.01)).double()
    train(eager, [SoftTying(TIES, strength=STRENGTH, update=update)])
    train(torch.compile(compiled, backend=backend), [SoftTying(TIES, strength=STRENGTH, update=update)])
    assert largest_difference(eager, compiled) < 1e-10


@pytest.mark.parametrize("kind", [lambda: SoftTying(TIES), lambda: WeightClustering(["a"]), lambda: HardTying(TIES)])
def test_callbacks_that_were_never_set_up_are_torn_down(kind):
    callback = kind()
    callback.teardown(None, None, "fit")
    assert callback.groups == []
    assert getattr(callback, "log_prefix", "tying") == "tying"


def test_a_strength_in_words_is_a_number():
    assert SoftTying(TIES, strength="1e-3").strength == 0.001
