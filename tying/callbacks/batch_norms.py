"""Statistics of batch norms, for weights that were changed at the end of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def estimate_batch_norms(trainer: pl.Trainer, model: pl.LightningModule, callback: str) -> None:
    """Estimate means and variances of batch norms anew, by a pass over the training data without training.

    They are those of all batches alike, as ``torch.optim.swa_utils.update_bn`` takes them. Batch norms in evaluation
    mode, which are frozen, stay. Random generators and the loader's place do, too; processes take the mean of theirs.

    Args:
        trainer: that trains.
        model: is called on a batch, or if that is a tuple or a list on its first element.
        callback: name of whose weights they are, for the warning.

    Warns:
        UserWarning: the model cannot be called on that; statistics stay those of the weights before.
    """
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.training and one.track_running_stats]
    if not norms:
        return
    before = [({name: buffer.clone() for name, buffer in norm.named_buffers()}, norm.momentum) for norm in norms]
    loader: Any = trainer.train_dataloader
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    try:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over batches
            for x in _inputs(trainer, loader):
                model(x)
    except Exception as error:
        for norm, (buffers, _) in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        warnings.warn(
            f"{callback}: batch norms keep the statistics of the weights before, for the model could not be called on "
            f"batches of the training data ({error}); see torch.optim.swa_utils.update_bn",
            stacklevel=2,
        )
    finally:
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
        if place is not None:
            loader.load_state_dict(place)
    for norm in norms:
        _average(trainer, norm)


def _inputs(trainer: pl.Trainer, loader: Any) -> Iterator[Tensor]:
    """Yield what the network takes of each training batch, as training steps find it."""
    count = trainer.num_training_batches
    for batch in loader if count == float("inf") else islice(loader, int(count)):
        moved: Any = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        x = moved[0] if isinstance(moved, tuple | list) else moved
        if not isinstance(x, Tensor):
            raise TypeError(f"batches are of {type(moved).__name__}")
        yield x


def _average(trainer: pl.Trainer, norm: nn.Module) -> None:
    for buffer in (norm.running_mean, norm.running_var):
        assert isinstance(buffer, Tensor)
        buffer.copy_(torch.as_tensor(trainer.strategy.reduce(buffer.clone(), reduce_op="mean")))
