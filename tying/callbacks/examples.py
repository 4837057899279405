"""How many examples training data has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DistributedSampler, Sampler

from tying.errors import ConfigurationError


def num_train_samples(trainer: pl.Trainer) -> int:
    """Return the number of labelled examples that a trainer's training data has.

    Raises:
        ConfigurationError: it is not known.
    """
    loaders: Any = trainer.train_dataloader
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    if isinstance(loaders, Mapping):
        loaders = loaders.get("labelled")
    one = loaders[0] if isinstance(loaders, Sequence) and len(loaders) == 1 else loaders
    sampler = getattr(one, "sampler", None)
    try:
        if isinstance(sampler, Sampler) and not isinstance(sampler, DistributedSampler):  # of a subset, say
            return len(sampler)  # type: ignore[arg-type]  # what has none raises
        return len(one.dataset)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            "the number of labelled examples is not known, since the training data is neither one loader of a data set "
            "that has a length, nor a dictionary whose loader 'labelled' is such: give it as examples"
        ) from None
