import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from toys import STRENGTH, TIES, Toy, batches, by_hand, largest_difference, same, train

from tying import ConfigurationError, Tie, resolve
from tying.callbacks import AnchorTying, SoftTying
from tying.soft import Huber, Penalty, Schedule, TyingPenalty, gap

CLIPS = [None, 0.02]
ACCUMULATE = [1, 4]  # of 10 batches an epoch, 4 leave a window of 2


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_gradient_mode_equals_the_loss_in_float64(accumulate, clip):
    ours, reference = Toy().double(), Toy(penalty=by_hand).double()
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": "64-true"}
    steps = math.ceil(10 / accumulate)
    epochs = math.ceil(50 / steps)
    trainer = train(ours, [SoftTying(TIES, strength=STRENGTH)], max_epochs=epochs, **arguments)
    train(reference, max_epochs=epochs, **arguments)
    assert trainer.global_step >= 50
    assert largest_difference(ours, reference) < 1e-10
    assert largest_difference(ours, Toy().double()) > 1e-2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("count", [4, 2], ids=["full window", "short window"])
def test_gradient_mode_equals_the_loss_after_one_step(precision, accumulate, clip, count):
    if accumulate == 1:
        count = 1
    arguments = {
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": clip,
        "precision": precision,
        "max_epochs": 1,
    }
    ours, reference = Toy(), Toy(penalty=by_hand)
    trainer = train(ours, [SoftTying(TIES, strength=STRENGTH)], data=batches(count), **arguments)
    train(reference, data=batches(count), **arguments)
    assert trainer.global_step == 1
    assert largest_difference(ours, reference) < 1e-6


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize(
    "optimizer", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01)], ids=["sgd", "adamw"]
)
def test_strength_zero_is_bitwise_untied(update, optimizer):
    ours, untied = Toy(optimizer), Toy(optimizer)
    train(ours, [SoftTying(TIES, strength=0.0, update=update)])
    train(untied)
    assert same(ours, untied)


class Still(Toy):
    """A model without data gradient, so that only the pull moves it."""

    def loss(self, batch):
        return 0.0 * super().loss(batch)


def group_of(model, m):
    """Make m weights of one shape in `model`, and the tie of them all."""
    model.lone = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(m)])
    return Tie("lone.*")


@pytest.mark.parametrize("m", [2, 5])
def test_decoupled_contracts_by_one_minus_m_alpha_lambda(m):
    model = Still(lambda p: SGD(p, lr=0.1)).double()
    tie = group_of(model, m)
    before = torch.stack([*model.lone]).detach()
    trainer = train(model, [SoftTying([tie], strength=0.3, update="decoupled")], max_epochs=1)
    after = torch.stack([*model.lone]).detach()
    factor = (1 - m * 0.1 * 0.3) ** trainer.global_step
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(after - after.mean(0), factor * (before - before.mean(0)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("m", [2, 5])
def test_proximal_contracts_by_one_over_one_plus_m_alpha_lambda(m):
    model = Still(lambda p: SGD(p, lr=0.1)).double()
    tie = group_of(model, m)
    before = torch.stack([*model.lone]).detach()
    trainer = train(model, [SoftTying([tie], strength=3.0, update="proximal")], max_epochs=1)
    after = torch.stack([*model.lone]).detach()
    factor = (1 + m * 0.1 * 3.0) ** -trainer.global_step
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(after - after.mean(0), factor * (before - before.mean(0)), rtol=1e-11, atol=1e-12)


def test_explicit_tie_in_one_step_at_one_over_m():
    model = Still(lambda p: SGD(p, lr=0.1)).double()
    tie = group_of(model, 4)
    train(model, [SoftTying([tie], strength=2.5, update="decoupled")], max_epochs=1, limit_train_batches=1)
    assert gap([*model.lone]) < 1e-15


class TieRecord(pl.LightningModule):
    """A chain of m equal square layers: separate weights, or one that is used m times."""

    def __init__(self, m, share, lr, momentum):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        start = 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.layers = torch.nn.ParameterList([torch.nn.Parameter(start.clone()) for _ in range(1 if share else m)])
        self.uses, self.lr, self.momentum = m, lr, momentum

    def training_step(self, batch, batch_idx):
        x = y = batch[0].double()
        for use in range(self.uses):
            y = torch.tanh(y @ self.layers[use % len(self.layers)])
        return (y - x.flip(-1)).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("m", [2, 3])
def test_infinite_proximal_equals_one_shared_weight_at_lr_over_m(m, momentum):
    separate, shared = TieRecord(m, False, 0.3, momentum), TieRecord(m, True, 0.3 / m, momentum)
    train(separate, [SoftTying(["layers.*"], strength=math.inf, update="proximal")])
    train(shared)
    for layer in separate.layers:
        torch.testing.assert_close(layer, shared.layers[0], rtol=0, atol=1e-10)
    assert gap([*separate.layers]) < 1e-15


def test_two_ties_add_their_gradients():
    ours, reference = Toy().double(), Toy(penalty=lambda m: by_hand(m) + by_hand(m, 0.02)).double()
    callbacks = [SoftTying(TIES, strength=STRENGTH), SoftTying(TIES, strength=0.02, name="second")]
    train(ours, callbacks)
    train(reference)
    assert largest_difference(ours, reference) < 1e-10


@pytest.mark.parametrize("penalty", ["l1", Huber(0.1)], ids=["l1", "huber"])
def test_other_penalties_equal_the_loss(penalty):
    def in_loss(model):
        return STRENGTH * TyingPenalty(resolve(model, TIES), penalty)()

    ours, reference = Toy().double(), Toy(penalty=in_loss).double()
    train(ours, [SoftTying(TIES, strength=STRENGTH, penalty=penalty)])
    train(reference)
    assert largest_difference(ours, reference) < 1e-10


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
def test_schedule_counts_steps(update, tmp_path):
    seen = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["tying/strength"]))

    tying = SoftTying(TIES, strength=2.0, update=update, schedule=Schedule(0.0, 1.0, 4))
    train(
        Toy(lambda p: SGD(p, lr=0.1)), [tying, Record()], max_epochs=1, limit_train_batches=6, default_root_dir=tmp_path
    )
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert tying.state_dict() == {"steps": {0: 6}}


def test_schedule_counts_epochs():
    model = Still(lambda p: SGD(p, lr=0.1)).double()
    tie = group_of(model, 2)
    before = model.lone[0] - model.lone[1]
    schedule = Schedule(0.0, 1.0, 2, unit="epoch")
    train(
        model,
        [SoftTying([tie], strength=1.0, update="decoupled", schedule=schedule)],
        max_epochs=3,
        limit_train_batches=2,
    )
    torch.testing.assert_close(model.lone[0] - model.lone[1], before * (1 - 0.1) ** 2 * (1 - 0.2) ** 2)


def test_logs_penalty_and_strength_on_logging_steps_only(monkeypatch):
    model = Toy()
    seen, computed = [], []
    forward = TyingPenalty.forward
    monkeypatch.setattr(TyingPenalty, "forward", lambda self: computed.append(1) or forward(self))

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((float(trainer.callback_metrics["tying/penalty"]), float(by_hand(model).detach())))

    train(model, [SoftTying(TIES, strength=STRENGTH), Record()], max_epochs=1)
    assert len(seen) == 10
    assert all(logged == pytest.approx(expected, rel=1e-5) for logged, expected in seen)
    computed.clear()
    train(Toy(), [SoftTying(TIES, strength=STRENGTH)], max_epochs=1, log_every_n_steps=5)
    assert len(computed) == 2
    trainer = train(Toy(), [SoftTying(TIES, strength=STRENGTH, name="mirror")], max_epochs=1)
    assert {"tying/mirror/penalty", "tying/mirror/strength"} <= set(trainer.callback_metrics)


def test_callbacks_of_several_classes_log_apart():
    def logged(*callbacks):
        metrics = train(Toy(), callbacks, max_epochs=1).callback_metrics
        return {name.removesuffix("/penalty"): float(metrics[name]) for name in metrics if name.endswith("/penalty")}

    def anchor(name=None):
        return AnchorTying(["encoder.**"], 0.5, name=name)

    assert [*logged(SoftTying(TIES), anchor())] == ["tying/SoftTying", "tying/AnchorTying"]
    both = logged(SoftTying(TIES, name="x"), anchor("x"), anchor("y"))
    assert [*both] == ["tying/SoftTying/x", "tying/AnchorTying/x", "tying/y"]
    assert both["tying/AnchorTying/x"] == both["tying/y"] != both["tying/SoftTying/x"]


class Crash(Exception):
    pass


@pytest.mark.parametrize("update", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_resume_after_a_crash_is_bitwise(update, unit, tmp_path):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 17:
                raise Crash
            return super().training_step(batch, batch_idx)

    def tying():
        return SoftTying(
            TIES, strength=0.5, update=update, schedule=Schedule(0.0, 1.0, 30 if unit == "step" else 4, unit=unit)
        )

    whole, resumed = Toy(), Toy()
    train(whole, [tying()], accumulate_grad_batches=2, max_epochs=6)

    def saved():
        return ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)

    with pytest.raises(Crash):
        train(Fails(), [tying(), saved()], accumulate_grad_batches=2, max_epochs=6, enable_checkpointing=True)
    path = tmp_path / "epoch=2-step=15.ckpt"
    callback = tying()
    train(
        resumed, [callback, saved()], accumulate_grad_batches=2, max_epochs=6, enable_checkpointing=True, ckpt_path=path
    )
    assert same(whole, resumed)
    assert callback.state_dict() == {"steps": {0: 30}}
    state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert state == {"steps": {0: 15}}


def test_a_second_fit_goes_on_and_a_new_trainer_starts_anew():
    callback = SoftTying(TIES, schedule=Schedule(0.0, 1.0, 100))
    trainer = train(Toy(), [callback], max_epochs=1)
    assert callback.state_dict() == {"steps": {0: 10}}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Toy(), batches())
    assert callback.state_dict() == {"steps": {0: 20}}
    train(Toy(), [callback], max_epochs=1)
    assert callback.state_dict() == {"steps": {0: 10}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength must be 0 or more, not -1.0"),
        ({"strength": math.nan}, "strength must be 0 or more, not nan"),
        ({"strength": math.inf}, "strength=inf needs update='proximal'"),
        ({"strength": math.inf, "update": "decoupled"}, "strength=inf needs update='proximal'"),
        ({"penalty": "l3"}, "unknown penalty 'l3'"),
        ({"update": "proximl"}, "update must be 'gradient', .*not 'proximl'.*Nearest existing names: proximal"),
        ({"update": "proximal", "penalty": type("Mine", (Penalty,), {})()}, "Mine has no prox method"),
        ({"ties": []}, "at least one Tie"),
        ({"ties": "a ~ b"}, "ties must be a list"),
        ({"ties": Tie("a")}, "ties must be a list"),
        ({"ties": [("a", "b")]}, "ties must be a list"),
        ({"schedule": lambda count: 1.0}, "schedule must be a tying.soft.Schedule"),
        ({"ties": ["a ~"]}, "must have the form"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        SoftTying(**{"ties": TIES, **arguments})


def test_ties_that_do_not_fit_stop_the_fit():
    model = Toy()
    with pytest.raises(ConfigurationError, match="Nearest existing names"):
        train(model, [SoftTying(["encodr.0.weight ~ decoder.2.weight"])])
    with pytest.raises(ConfigurationError, match="takes pairs"):
        train(TieRecord(3, False, 0.1, 0.0), [SoftTying(["layers.*"], penalty=Huber())])
    assert same(model, Toy())


def test_ties_that_no_optimizer_trains_warn():
    class Half(Toy):
        def configure_optimizers(self):
            return SGD(self.encoder.parameters(), lr=0.1)

    model = Half()
    model.decoder.lone = torch.nn.Parameter(torch.zeros(5))
    with pytest.warns(UserWarning, match=r"no optimizer trains any weight tied to decoder\.0\.bias"):
        train(model, [SoftTying(["decoder.0.bias ~ decoder.lone"])], max_epochs=1)


@pytest.mark.parametrize("update", ["decoupled", "gradient"])
def test_past_the_stability_bound_warns_once_and_names_the_proximal_form(update):
    with pytest.warns(
        UserWarning, match=r"lr · strength = 1\.5 is past the stability bound 2/m = 1.*proximal"
    ) as caught:
        train(
            Toy(lambda p: SGD(p, lr=0.1)),
            [SoftTying(TIES, strength=15.0, update=update)],
            max_epochs=1,
            limit_train_batches=3,
        )
    assert len([w for w in caught if "stability" in str(w.message)]) == 1


def test_no_warning_within_the_bound_with_momentum_or_proximal():
    train(Toy(lambda p: SGD(p, lr=0.1)), [SoftTying(TIES, strength=9.9, update="decoupled")], limit_train_batches=2)
    train(Toy(), [SoftTying(TIES, strength=15.0)], limit_train_batches=2)
    train(Toy(lambda p: SGD(p, lr=0.1)), [SoftTying(TIES, strength=1e6, update="proximal")], limit_train_batches=2)
