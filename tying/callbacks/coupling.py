"""Two models of one training run, coupled by a prior."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from tying.callbacks.base import TyingCallback
from tying.callbacks.examples import num_train_samples
from tying.callbacks.penalty import Pull, Pulling, Update
from tying.errors import ConfigurationError, listed
from tying.selection.index import clean_name
from tying.selection.resolve import resolve
from tying.selection.tie import Tie
from tying.soft import TyingPenalty, coupling_strength


class Coupling(Pulling, TyingCallback):
    """Couple two submodules, paired by the names of their weights, by a prior on the difference.

    The loss is to be a mean over labelled examples: the prior, which stands against a sum over them, is divided by
    their number: :class:`tying.callbacks.SoftTying` with ``strength = coupling_strength(alpha, exponent) / examples``
    does the same; :class:`tying.callbacks.penalty.Pulling` says what each update does.

    Args:
        first: a module, or a pattern of parameters: of the discriminative model.
        second: its partner in the generative model.
        alpha: from 0, one generative model, to 1, a discriminative one that knows nothing of the other.
        exponent: of :func:`tying.soft.coupling_strength`.
        examples: number of labelled examples; that of the training data by default: of its part ``labelled``, where
            its batches are dictionaries.
        update: as of SoftTying; α = 0 needs ``"proximal"``.
        name: tells several of a class apart.

    Raises:
        ConfigurationError: α is out of range, or 0 with an explicit update; weights of one module have no partner of
            their shape in the other, all of which are told; or the number of examples is not known.

    Example:
        >>> Coupling("classifier.encoder", "autoencoder.encoder", alpha=0.2, examples=500).strength
        16.0

    Source: J. A. Lasserre, C. M. Bishop and T. P. Minka, Principled hybrids of generative and discriminative models,
    2006.
    """

    def __init__(
        self,
        first: str,
        second: str,
        alpha: float,
        exponent: float = 2.0,
        examples: int | None = None,
        update: Update = "proximal",
        name: str | None = None,
    ) -> None:
        if examples is not None and examples < 1:
            raise ConfigurationError(f"examples must be 1 or more, not {examples}")
        strength = coupling_strength(alpha, exponent)
        if math.isinf(strength) and update != "proximal":
            raise ConfigurationError(f"alpha=0 makes both models one, which needs update='proximal', not {update!r}")
        super().__init__(strength, update, None, name)
        self.first, self.second, self.alpha, self.exponent, self.examples = first, second, alpha, exponent, examples
        self.ties = [Tie(first, second)]

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        if wrong := unpaired(model, self.first, self.second):
            raise ConfigurationError(f"{self.first!r} and {self.second!r} do not pair: {listed(wrong, limit=20)}")
        return [Pull(TyingPenalty(resolve(model, self.ties)), self.strength)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 < self.strength < math.inf:
            self._share = 1 / (self.examples or num_train_samples(trainer))  # the data is there only now


def unpaired(model: nn.Module, first: str, second: str) -> list[str]:
    """Return what keeps the weights of two modules from being paired by name; nothing where these are no modules.

    Example:
        >>> unpaired(nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4, bias=False)}), "a", "b")
        ["'a.bias' has no partner", "'a.weight' is (3, 2) and 'b.weight' (4, 2)"]
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if not {first, second} <= modules.keys():
        return []
    own, other = ({clean_name(name): w for name, w in modules[one].named_parameters()} for one in (first, second))
    alone = [f"{first}.{name}" for name in own if name not in other]
    alone += [f"{second}.{name}" for name in other if name not in own]
    both = {name: (tuple(own[name].shape), tuple(other[name].shape)) for name in own if name in other}
    return [
        *(f"{name!r} has no partner" for name in alone),
        *(f"{f'{first}.{name}'!r} is {a} and {f'{second}.{name}'!r} {b}" for name, (a, b) in both.items() if a != b),
    ]
