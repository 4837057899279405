"""Couple two models of one training run by a prior."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from tying.callbacks.examples import num_train_samples
from tying.callbacks.penalty import PenaltyCallback, Update
from tying.errors import ConfigurationError, check_range, listed
from tying.selection.index import clean_name
from tying.selection.resolve import resolve
from tying.selection.tie import Tie
from tying.soft import TyingPenalty, coupling_strength


class Coupling(PenaltyCallback):
    """Couple two submodules, whose weights are paired by name, by a prior on their difference.

    The loss must be a mean over labelled examples. The prior, which is weighed against a sum over them, is divided by
    their number: :class:`tying.callbacks.SoftTying` with ``strength = coupling_strength(alpha, exponent) / examples``
    does the same. :class:`tying.callbacks.penalty.PenaltyCallback` defines the updates.

    Args:
        first: a module, or a pattern of parameters, of the discriminative model.
        second: its partner in the generative model.
        alpha: in [0, 1]: 0 makes both one, generative model; 1 leaves the discriminative model uncoupled.
        exponent: as in :func:`tying.soft.coupling_strength`.
        examples: number of labelled examples; by default that of the training data, or of its loader ``labelled``
            where batches are dictionaries.
        update: as for SoftTying; α = 0 needs ``"proximal"``.
        name: distinguishes several callbacks of this class.

    Raises:
        ConfigurationError: α is out of range, or 0 with an explicit update; weights of one module have no partner of
            their shape in the other, all of which are listed; or the number of examples is not known.

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
        if examples is not None:
            check_range("examples", examples, "[1, inf)")
        strength = coupling_strength(alpha, exponent)
        if math.isinf(strength) and update != "proximal":
            raise ConfigurationError(f"alpha=0 makes both models one, which needs update='proximal', not {update!r}")
        super().__init__(strength, update, None, name)
        self.first, self.second, self.alpha, self.exponent, self.examples = first, second, alpha, exponent, examples
        self.ties = [Tie(first, second)]

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        if wrong := unpaired(module, self.first, self.second):
            raise ConfigurationError(f"{self.first!r} and {self.second!r} do not pair: {listed(wrong, limit=20)}")
        return [TyingPenalty(resolve(module, self.ties), strength=self.strength)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if 0 < self.strength < math.inf:  # the training data is there only now
            self.examples_scale = 1 / (self.examples or num_train_samples(trainer))


def unpaired(model: nn.Module, first: str, second: str) -> list[str]:
    """Return the weights of two modules that have no partner of their name and shape; nothing if these are no modules.

    Example:
        >>> unpaired(nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4, bias=False)}), "a", "b")
        ["'a.bias' has no partner", "'a.weight' is (3, 2) and 'b.weight' (4, 2)"]
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if not {first, second} <= modules.keys():
        return []
    ours, theirs = (
        {clean_name(name): tuple(weight.shape) for name, weight in modules[side].named_parameters()}
        for side in (first, second)
    )
    return [
        *(f"{f'{first}.{name}'!r} has no partner" for name in ours if name not in theirs),
        *(f"{f'{second}.{name}'!r} has no partner" for name in theirs if name not in ours),
        *(
            f"{f'{first}.{name}'!r} is {shape} and {f'{second}.{name}'!r} {theirs[name]}"
            for name, shape in ours.items()
            if name in theirs and shape != theirs[name]
        ),
    ]
