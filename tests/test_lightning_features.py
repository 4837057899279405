"""What Lightning does to a training run, with every family's callback attached: a test for each cell of a table."""

import gc
import re
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from families import FAMILIES, SITES, Trained, at_once, inputs
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.nn import functional as F

from tying.callbacks import TyingMonitor

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def trainer_of(callbacks, others=(), **options):
    return pl.Trainer(**{**QUIET, "max_epochs": 3, **options}, callbacks=[*callbacks, *others])


def fitted(callbacks, **options):
    model = Trained()
    trainer_of(callbacks, **options).fit(model)
    return model


def with_options(**options):
    """Return a feature that is a matter of the trainer's arguments, which functions of none make anew."""
    return lambda callbacks: fitted(callbacks, **{name: make() for name, make in options.items()})


def scaled():
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]


def found_learning_rate(callbacks):
    model, trainer = Trained(), trainer_of(callbacks, max_epochs=2)
    model.hparams["lr"] = 0.01
    Tuner(trainer).lr_find(model, min_lr=1e-3, max_lr=0.1, num_training=8, update_attr=False)
    trainer.fit(model)
    return model


def found_batch_size(callbacks):
    model, trainer = Trained(), trainer_of(callbacks)
    Tuner(trainer).scale_batch_size(
        model, mode="power", steps_per_trial=1, init_val=2, max_trials=1, batch_arg_name="batch_size"
    )
    trainer.fit(model)
    return model


def fitted_twice(callbacks):
    model = Trained()
    for _ in range(2):
        trainer_of(callbacks, max_epochs=2).fit(model)
    return model


def fitted_another(callbacks):
    fitted(callbacks)
    return fitted(callbacks)


def fitted_further(callbacks):
    model, trainer = Trained(), trainer_of(callbacks, max_epochs=1)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    return model


def evaluated_alone(callbacks):
    model, trainer = Trained(), trainer_of(callbacks)
    trainer.fit(model)
    trainer.save_checkpoint("last.ckpt")
    [whole] = trainer.validate(model, verbose=False)
    fresh = Trained()
    again = trainer_of([FAMILIES[type(callback).__name__].callback(SITES) for callback in callbacks])
    [alone] = again.validate(fresh, ckpt_path="last.ckpt", weights_only=True, verbose=False)
    assert alone == whole
    predicted = torch.cat(again.predict(fresh, ckpt_path="last.ckpt", weights_only=True))
    torch.testing.assert_close(predicted, fresh.eval()(inputs(6)).detach(), rtol=0, atol=1e-6)
    return fresh


def by_fabric(callbacks):
    """Train by Fabric, without a trainer; a run that is saved after an epoch goes on to the weights of a whole one."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    begin = FAMILIES[type(callbacks[0]).__name__].begin if callbacks else at_once(lambda *_: None)

    def run(epochs, load=None, save=None):
        torch.manual_seed(1)  # some begin with random numbers
        model = Trained()
        step, finish, kept = begin(model, SITES, examples=20)
        wrapped, optimizer = fabric.setup(model, model.configure_optimizers())
        kept |= {"model": wrapped, "optimizer": optimizer}
        if load:
            fabric.load(load, kept)
        for epoch in epochs:
            torch.manual_seed(epoch)
            for [x] in fabric.setup_dataloaders(model.train_dataloader()):
                optimizer.zero_grad()
                fabric.backward(F.mse_loss(wrapped(x).float(), (3 * x).sin()))
                step()
                optimizer.step()
        if save:
            fabric.save(save, kept)
        finish()
        return model

    whole = run(range(3))
    run([0], save="first.ckpt")
    model = run([1, 2], load="first.ckpt")
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
    return model


FEATURES = {
    "bf16-mixed": with_options(precision=lambda: "bf16-mixed"),
    "16-mixed, a scaler": with_options(plugins=scaled),
    "64-true": with_options(precision=lambda: "64-true"),
    "bf16-true": with_options(precision=lambda: "bf16-true"),
    "16-true": with_options(precision=lambda: "16-true"),
    "clipping by norm": with_options(gradient_clip_val=lambda: 0.5),
    "clipping by value": with_options(gradient_clip_val=lambda: 0.1, gradient_clip_algorithm=lambda: "value"),
    "accumulation, a short last window": with_options(accumulate_grad_batches=lambda: 3),
    "max_steps": with_options(max_epochs=lambda: -1, max_steps=lambda: 25),
    "early stopping": with_options(
        max_epochs=lambda: 50, others=lambda: [EarlyStopping("loss", patience=0, min_delta=0.02)]
    ),
    "stochastic weight averaging": with_options(others=lambda: [StochasticWeightAveraging(0.05, 1)]),
    "EMA weight averaging": with_options(others=lambda: [EMAWeightAveraging(decay=0.5)]),
    "ModelPruning": with_options(others=lambda: [ModelPruning("l1_unstructured", amount=0.02)]),
    "overfit_batches": with_options(overfit_batches=lambda: 2, max_epochs=lambda: 10),
    "fast_dev_run": with_options(fast_dev_run=lambda: 8),
    "learning-rate finder": found_learning_rate,
    "batch-size finder": found_batch_size,
    "validate, predict alone": evaluated_alone,
    "another model before": fitted_another,
    "fit twice": fitted_twice,
    "fit further": fitted_further,
    "Fabric, without a Trainer": by_fabric,
}
REFUSED = {
    ("stochastic weight averaging", "MixtureTying"): "cannot be combined with StochasticWeightAveraging",
    ("stochastic weight averaging", "WeightClustering"): "cannot be combined with StochasticWeightAveraging",
    ("EMA weight averaging", "MixtureTying"): "cannot be combined with EMAWeightAveraging",
    ("EMA weight averaging", "WeightClustering"): "cannot be combined with EMAWeightAveraging",
    ("ModelPruning", "RelaxedTying"): "give it other parameters_to_prune",
    ("ModelPruning", "WeightClustering"): "give it apply_pruning=BeforeEpoch(0)",
}
WARNED = (
    "ignore:MixtureTying begins with net.first.weight as initialised",
    "ignore:training stopped before the end of its last epoch",
    "ignore:Swapping scheduler",
    "ignore:You're using the WeightAveraging callback",
    "ignore:.*overfit_batches.*",
    "ignore:.*in sanity checking.*",
)


@pytest.mark.filterwarnings(*WARNED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("feature", FEATURES)
def test_family_holds(feature, family, record_property):
    run = FEATURES[feature]
    callback = FAMILIES[family].callback(SITES)
    record_property("cell", ("lightning_features", family, feature))
    if reason := REFUSED.get((feature, family)):
        with pytest.raises(ValueError, match=re.escape(reason)):
            run([callback])
        record_property("remark", f"refused: {reason}")
        return
    model, free = run([callback]), run([])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not torch.equal(model.double()(inputs().double()).float(), Trained()(inputs()))
    FAMILIES[family].holds(model, free, SITES)


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_over_2000_steps(family):
    class Count(pl.Callback):
        held: ClassVar[dict[int, tuple[int, ...]]] = {}

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (200, 2000):
                gc.collect()
                tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
                sizes = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
                lists = sum(len(one) for one in gc.get_objects() if type(one) in (list, dict) and len(one) > 1000)
                self.held[trainer.global_step] = len(tensors), sum(sizes.values()), lists

    callbacks = [FAMILIES[family].callback(SITES), TyingMonitor(), Count()]
    trainer_of(callbacks, max_epochs=-1, max_steps=2000, val_check_interval=None).fit(Trained())
    assert all(late <= early for late, early in zip(Count.held[2000], Count.held[200], strict=True))
