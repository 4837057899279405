"""Two models of one training run, coupled by a prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from typing_extensions import override

from tying.callbacks.base import TyingCallback
from tying.callbacks.pulling import Pull, Pulling, Update
from tying.errors import ConfigurationError
from tying.selection import resolve
from tying.soft import TyingPenalty, coupling_strength
from tying.ties import Tie, TiedGroup


class Coupling(Pulling, TyingCallback):
    """Couple two submodules, paired by the names of their weights, by a prior on the difference.

    The loss is to be a mean over labelled examples: the prior, which stands against a sum over them, is divided by
    their number, ``strength = coupling_strength(alpha, exponent) / examples``. :class:`tying.callbacks.SoftTying` with
    that strength does the same; :class:`tying.callbacks.pulling.Pulling` says what each update does.

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
        >>> Coupling("classifier.encoder", "autoencoder.encoder", alpha=0.5, examples=500).strength
        0.002

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
        super().__init__(strength / (examples or 1), update, None, name)
        self.first, self.second, self.alpha, self.exponent, self.examples = first, second, alpha, exponent, examples
        self.ties = [Tie(first, second)]

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [group for pull in self._pulls for group in pull.penalty.groups]

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        return [Pull(TyingPenalty(resolve(model, self.ties)), self.strength)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.examples is None:  # the data is there only now
            whole = coupling_strength(self.alpha, self.exponent)
            self.strength = whole / labelled_examples(trainer) if 0 < whole < math.inf else whole
            self._pulls = [Pull(penalty, self.strength) for penalty, _ in self._pulls]


def labelled_examples(trainer: pl.Trainer) -> int:
    """Return the number of labelled examples that a trainer's training data has.

    Raises:
        ConfigurationError: it is not known.
    """
    loaders: Any = trainer.train_dataloader
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    if isinstance(loaders, Mapping):
        loaders = loaders.get("labelled")
    one = loaders[0] if isinstance(loaders, Sequence) and len(loaders) == 1 else loaders
    try:
        return len(one.dataset)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            "the number of labelled examples is not known, since the training data is neither one loader of a data set "
            "that has a length, nor a dictionary whose loader 'labelled' is such: say examples=..."
        ) from None
