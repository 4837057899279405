import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toys import Toy, batches, same, train

from tying.callbacks import RandomState
from tying.callbacks.random_state import generator_states, restore_generators
from tying.data import CIFAR10


def draws():
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_states_are_restored_exactly():
    draws()
    states = generator_states()
    first = draws()
    restore_generators(states)
    assert draws() == first


class Noisy(Toy):
    """Draws from every generator in every step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3072, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layer(torch.dropout(x.flatten(1), 0.5, True)) * sum(draws()), y)


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("stop", [3, 10, 14])
def test_a_run_goes_on_as_if_it_had_never_stopped(stop, tmp_path, caplog):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise Interrupted

    def run(model, *callbacks, ckpt_path=None):
        pl.seed_everything(3, verbose=False)
        data = CIFAR10(batch_size=450)
        train(model, [RandomState(), *callbacks], data=data, ckpt_path=ckpt_path, max_epochs=2)

    whole, first, second = Noisy(), Noisy(), Noisy()
    run(whole)
    with pytest.raises(Interrupted):
        run(first, Interrupt())
    draws()
    caplog.clear()
    run(second, ckpt_path=tmp_path / "a.ckpt")
    [line] = [message for message in caplog.messages if "RandomState" in message]
    assert line == "RandomState: the random generators of each process continue from the checkpoint"
    assert same(whole, second)
    assert not same(whole, first)
    torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_a_test_leaves_the_seed_of_the_next_fit_alone(tmp_path):
    class First(Toy):
        def on_train_batch_start(self, *_):
            self.drawn = draws()

        def test_step(self, batch, batch_idx):
            pass

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    train(Toy(), [RandomState()], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    drawn = []
    for tests in (True, False):
        model = First()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=1,
            callbacks=[RandomState()],
            log_every_n_steps=1,
            **quiet,
        )
        if tests:
            trainer.test(model, batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        pl.seed_everything(7, verbose=False)
        trainer.fit(model, batches())
        drawn.append(model.drawn)
    assert drawn[0] == drawn[1]


def test_another_number_of_processes_seeds_anew(tmp_path):
    """Neither do the numbers of the beginning recur, nor those of the process that saved; but a run can be repeated."""
    callback, drawn, states = RandomState(), [], generator_states()
    trainer = train(Toy(), [callback], max_epochs=1)
    for seed in (1, 2):
        torch.manual_seed(seed)
        callback.load_state_dict({"processes": [states, states]})
        with pytest.warns(UserWarning, match="random states of 2 processes, not of 1: the generators are seeded anew"):
            callback.on_train_start(trainer, Toy())
        drawn.append(draws())
    restore_generators(states)
    assert drawn[0] == drawn[1] != draws()


def test_a_shuffled_loader_goes_on_with_the_next_epochs_order(tmp_path):
    """torch's DataLoader takes its order from the global generator, whenever it is started."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(*callbacks, ckpt_path=None):
        model = Toy()
        torch.manual_seed(0)
        data = DataLoader(batches().dataset, batch_size=4, shuffle=True)
        train(model, [RandomState(), *callbacks], data=data, ckpt_path=ckpt_path, max_epochs=4)
        return model

    assert same(run(Save()), run(ckpt_path=tmp_path / "a.ckpt"))


class Scheduled(Noisy):
    """Its rate falls with each epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class SaveOften(pl.Callback):
    """Save after each step and epoch, and after training."""

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint("step.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint("epoch.ckpt")


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("saved", ["step.ckpt", "epoch.ckpt", "fit.ckpt"])
@pytest.mark.parametrize("then", [{"max_steps": 13}, {"max_epochs": 3}], ids=str)
@pytest.mark.parametrize("first", [{"max_steps": 3}, {"max_steps": 5}, {"max_epochs": 1}], ids=str)
def test_a_run_that_had_ended_goes_on(first, then, saved):
    """Within an epoch or at its end; to more steps or more epochs."""

    def run(callbacks, ckpt_path=None, **ends):
        model, data = Scheduled(), CIFAR10(batch_size=900)
        ends = {"max_epochs": -1, **ends}
        return model, train(model, [RandomState(), *callbacks], data=data, ckpt_path=ckpt_path, **ends)

    pl.seed_everything(3, verbose=False)
    whole, _ = run([], **then)
    pl.seed_everything(3, verbose=False)
    _, trainer = run([SaveOften()], **first)
    trainer.save_checkpoint("fit.ckpt")
    draws()
    again, trainer = run([], ckpt_path=saved, **then)
    assert same(whole, again)
    assert trainer.current_epoch == 3
