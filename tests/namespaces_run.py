"""Fit every callback and mixin in one process: `namespaces_run.py TRAINER MODULE ...` imports the modules first.

TRAINER is the Lightning of the Trainer and the models. Prints the error of each run as JSON; null where all held.
"""

import importlib
import json
import sys
from functools import cache, partial
from inspect import signature

if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    given = importlib.import_module(sys.argv[1])

import torch  # after the Lightnings
from families import FAMILIES, SITES, Net, inputs
from torch.utils.data import DataLoader, TensorDataset

from tying import callbacks, mixins
from tying.data import CIFAR10
from tying.depth import HMLSTM
from tying.models import Autoencoder


def attribute_of(callback):
    """Return the name of the attribute that holds a callback's arguments: ``soft_tying`` of ``SoftTying``."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in callback).removeprefix("_")


def arguments_of(callback):
    """Return the constructor's arguments of a callback, which keeps each under its name."""
    return {name: getattr(callback, name) for name in signature(type(callback)).parameters}


CALLBACKS = {name: partial(family.callback, SITES) for name, family in FAMILIES.items()} | {
    "BoundaryPlot": callbacks.BoundaryPlot,
    "RandomState": callbacks.RandomState,
    "SlopeAnnealing": callbacks.SlopeAnnealing,
    "TyingMonitor": callbacks.TyingMonitor,
    "TyingSummary": callbacks.TyingSummary,
    "Unrolling": lambda: callbacks.Unrolling([1]),
    "UntiedBiases": lambda: callbacks.UntiedBiases(["net.kernels.*.bias"], [6]),
}
# the attribute that each mixin reads, and its value
MIXINS = {f"{name}Mixin": (attribute_of(name), arguments_of(make())) for name, make in CALLBACKS.items()} | {
    "TyingMixin": ("tying", [CALLBACKS[name]() for name in ("HardTying", "ResidualMerging", "TyingMonitor")])
}


def model_of(lightning, *bases, **attributes):
    """Return a model in which every family finds what to tie: a module of a Lightning, and of other bases."""

    class Model(*bases, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net, self.rnn = Net(), HMLSTM(6, 2, layers=2)
            self.initial = {name: p.detach().clone() for name, p in self.named_parameters()}

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - (3 * batch[0]).sin()).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    for name, value in attributes.items():
        setattr(Model, name, value)
    return Model()


def trained(model, *callbacks, data=None, **options):
    options = {"accelerator": "cpu", "max_epochs": 3, "log_every_n_steps": 1, "logger": False, **options}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    torch.manual_seed(0)
    trainer = given.Trainer(**options, callbacks=[*callbacks])
    if data is None:
        trainer.fit(model, DataLoader(TensorDataset(inputs()), batch_size=2))
    else:
        trainer.fit(model, datamodule=data)
    return model


@cache
def free():
    """Return a model that is trained without callbacks."""
    return trained(model_of(given))


def run_callback(name):
    model = trained(model_of(given), CALLBACKS[name]())
    if name in FAMILIES:
        FAMILIES[name].holds(model, free(), SITES)


def run_mixin(name):
    attribute, value = MIXINS[name]
    model = trained(model_of(given, getattr(mixins, name), **{attribute: value}))
    if family := FAMILIES.get("HardTying" if name == "TyingMixin" else name.removesuffix("Mixin")):
        family.holds(model, free(), SITES)


def run_data(name):
    model = Autoencoder((3072, 2)) if name == "Autoencoder" else model_of(given)
    trained(model, data=CIFAR10(source="sample"), limit_train_batches=0 if name == "CIFAR10" else 1)


def run_averaged(lightning):
    average = importlib.import_module(f"{lightning}.callbacks").EMAWeightAveraging()
    trained(model_of(given), CALLBACKS["MixtureTying"](), average)


def error_of(run, name):
    try:
        run(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    errors = {name: error_of(run_callback, name) for name in CALLBACKS}
    errors |= {name: error_of(run_mixin, name) for name in MIXINS}
    errors |= {name: error_of(run_data, name) for name in ("Autoencoder", "CIFAR10")}
    for lightning in {sys.argv[1], *sys.argv[2:]} - {"tying.callbacks"}:
        errors[f"averaged by {lightning}"] = error_of(run_averaged, lightning)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
