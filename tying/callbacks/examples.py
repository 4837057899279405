"""Count the examples of training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DistributedSampler, Sampler

from tying.errors import ConfigurationError


def only_loader(loaders: Any) -> Any:
    """Return the one loader of a sequence of one; anything else unchanged."""
    return loaders[0] if isinstance(loaders, Sequence) and len(loaders) == 1 else loaders


def num_train_samples(trainer: pl.Trainer) -> int:
    """Return the number of labelled examples in a trainer's training data.

    Raises:
        ConfigurationError: it is not known.
    """
    loaders: Any = trainer.train_dataloader
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    loader = only_loader(loaders.get("labelled") if isinstance(loaders, Mapping) else loaders)
    sampler = getattr(loader, "sampler", None)
    try:
        if isinstance(sampler, Sampler) and not isinstance(sampler, DistributedSampler):  # of a subset, say
            return len(sampler)  # type: ignore[arg-type]  # one without a length raises
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            "the number of labelled examples is not known, since the training data is neither one loader of a data set "
            "that has a length, nor a dictionary with one under 'labelled': give it as examples"
        ) from None
