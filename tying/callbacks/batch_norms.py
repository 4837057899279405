"""Statistics of batch norms, for weights that were changed at the end of training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


@torch.no_grad()
def estimate_batch_norms(trainer: pl.Trainer, model: pl.LightningModule, callback: str) -> None:
    """Estimate means and variances of batch norms anew, by a pass over the training data without training.

    They are those of all batches alike, as ``torch.optim.swa_utils.update_bn`` takes them: of an epoch's, or of as many
    as training took, if those are fewer. Batch norms in evaluation mode, which are frozen, stay. Random generators and
    the loader's place do, too; processes take the mean of theirs.

    Args:
        trainer: that trains.
        model: is called on a batch, or if that is a tuple or a list on its first element.
        callback: name of whose weights they are, for the warning.

    Warns:
        UserWarning: the model cannot be called on that, or does not call all of its batch norms then; these keep the
            statistics of the weights before.
    """
    norms = {name: one for name, one in model.named_modules() if isinstance(one, _BatchNorm) and _learns(one)}
    before = {name: [buffer.clone() for buffer in norm.buffers()] for name, norm in norms.items()}
    if not norms:
        return
    try:
        _call(trainer, model, [*norms.values()])
        reason = ""
    except Exception as error:
        reason = f"the model could not be called on batches of the training data ({error})"
    except BaseException:  # an interrupt
        _restore(norms, before)
        raise
    decide = trainer.strategy.reduce_boolean_decision  # what one process lacks, all keep
    called = decide(not reason)
    kept = {name: norm for name, norm in norms.items() if not (called and decide(bool(norm.num_batches_tracked)))}
    _restore(kept, before)
    for name in [name for name in norms if name not in kept]:
        for buffer in (norms[name].running_mean, norms[name].running_var):
            assert isinstance(buffer, Tensor)
            buffer.copy_(torch.as_tensor(trainer.strategy.reduce(buffer.clone(), reduce_op="mean")))
    if kept:
        reason = reason or "the model, called on batches of the training data, does not call these, in some process"
        warnings.warn(
            f"{callback}: batch norms keep the statistics of the weights before, for {reason}: {', '.join(kept)}; see "
            "torch.optim.swa_utils.update_bn",
            stacklevel=2,
        )


def _learns(norm: _BatchNorm) -> bool:
    return norm.training and norm.running_mean is not None and not is_lazy(norm.running_mean)


def _restore(norms: Mapping[str, _BatchNorm], before: Mapping[str, list[Tensor]]) -> None:
    for name, norm in norms.items():
        for buffer, value in zip(norm.buffers(), before[name], strict=True):
            buffer.copy_(value)


def _call(trainer: pl.Trainer, model: pl.LightningModule, norms: Sequence[_BatchNorm]) -> None:
    """Call a model on its training batches; batch norms take the mean over these."""
    momenta = [norm.momentum for norm in norms]
    loader = _own_loader(trainer)
    generators = {getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))}
    states = [(one, one.get_state()) for one in generators if isinstance(one, torch.Generator)]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean
        with isolate_rng(), torch.compiler.set_stance("force_eager"):  # compiled, None would depend on data
            for x in _inputs(trainer, model, loader):
                with trainer.precision_plugin.forward_context():
                    model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for generator, state in states:
            generator.set_state(state)


def _own_loader(trainer: pl.Trainer) -> Any:
    """Return a loader of the training data whose place is its own."""
    loader: Any = trainer.train_dataloader
    loader = loader[0] if isinstance(loader, Sequence) and len(loader) == 1 else loader
    if isinstance(loader, Mapping | Sequence):
        raise TypeError(f"they are those of {len(loader)} loaders")
    return copy.copy(loader)


def _inputs(trainer: pl.Trainer, model: pl.LightningModule, loader: Any) -> Iterator[Tensor]:
    """Yield what the network takes of each training batch, as training steps find it."""
    trained = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    for loaded in islice(loader, int(min(trained, trainer.num_training_batches))):
        batch = model._on_before_batch_transfer(trainer.precision_plugin.convert_input(loaded))
        batch = trainer.strategy.batch_to_device(batch)
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"{'they are' if x is batch else 'their first element is'} of {type(x).__name__}")
        yield x
