"""Every callback and mixin under ``lightning.pytorch``, ``pytorch_lightning`` and both."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from namespaces_run import CALLBACKS, MIXINS

from tying import callbacks, mixins
from tying.callbacks.base import Callback

LIGHTNINGS = ["lightning.pytorch", "pytorch_lightning"]
# the namespace of the Trainer and the model, and the modules that are imported before, in order
ALIKE = {
    "lightning alone": ["lightning.pytorch", "lightning.pytorch"],
    "pytorch_lightning alone": ["pytorch_lightning", "pytorch_lightning"],
    "both": ["lightning.pytorch", "pytorch_lightning", "lightning.pytorch"],
}
UNLIKE = {
    "both, Trainer of pytorch_lightning": ["pytorch_lightning", *LIGHTNINGS],
    "tying first, Trainer of pytorch_lightning": ["pytorch_lightning", "tying.callbacks"],
    "pytorch_lightning first, Trainer of lightning": ["lightning.pytorch", "pytorch_lightning", "tying.callbacks"],
}


@cache
def errors(*arguments):
    """Return the error of each run in a process with these arguments; None where all held."""
    script = Path(__file__).with_name("namespaces_run.py")
    run = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def other_of(lightning):
    return next(name for name in LIGHTNINGS if name != lightning)


def test_every_callback_and_mixin_is_run():
    exported = [getattr(callbacks, name) for name in callbacks.__all__]
    kinds = {kind.__name__ for kind in exported if issubclass(kind, Callback)} - {"TyingCallback"}
    assert kinds == CALLBACKS.keys()
    assert {name for name in vars(mixins) if name.endswith("Mixin")} - {"Mixin"} == MIXINS.keys()


@pytest.mark.parametrize("case", ALIKE)
def test_all_hold(case):
    lightning = ALIKE[case][0]
    outcome = dict(errors(*ALIKE[case]))
    assert "cannot be combined with EMAWeightAveraging" in outcome.pop(f"averaged by {lightning}")
    if other := outcome.pop(f"averaged by {other_of(lightning)}", None):
        assert other.startswith(
            f"ConfigurationError: MixtureTying is built on {lightning}, and EMAWeightAveraging on {other_of(lightning)}"
        )
    assert {name: error for name, error in outcome.items() if error} == {}


@pytest.mark.parametrize("name", [*CALLBACKS, *MIXINS, "CIFAR10"])
@pytest.mark.parametrize("case", UNLIKE)
def test_the_other_trainer_is_refused_in_a_sentence(case, name):
    other = UNLIKE[case][0]
    kind = "Model" if name in MIXINS else "Trainer"
    assert errors(*UNLIKE[case])[name].startswith(
        f"ConfigurationError: {name} is built on {other_of(other)}, and {kind} on {other}: import Lightning from "
    )


@pytest.mark.parametrize("case", UNLIKE)
def test_the_other_trainer_itself_refuses_our_models(case):
    assert errors(*UNLIKE[case])["Autoencoder"].startswith("TypeError: `model` must be a `LightningModule`")
