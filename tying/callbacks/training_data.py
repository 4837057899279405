"""Passes over the training data: its number of examples, and the statistics of batch norms."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, Sampler

from tying.errors import ConfigurationError
from tying.lightning_namespace import pl
from tying.lightning_workarounds import training_batch, training_loader_of
from tying.weights.calibration import call


def only_loader(loaders: Any) -> Any:
    """Return the loader in a sequence of one loader; return anything else unchanged."""
    return loaders[0] if isinstance(loaders, Sequence) and len(loaders) == 1 else loaders


def num_train_samples(trainer: pl.Trainer) -> int:
    """Return the number of labelled examples in a trainer's training data.

    Raises:
        ConfigurationError: it is not known.
    """
    loaders: Any = trainer.train_dataloader
    loader = only_loader(loaders.get("labelled") if isinstance(loaders, Mapping) else loaders)
    sampler = getattr(loader, "sampler", None)
    try:
        if isinstance(sampler, Sampler) and not isinstance(sampler, DistributedSampler):  # for example of a subset
            return len(sampler)  # type: ignore[arg-type]  # one without a length raises
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise ConfigurationError(
            "the number of labelled examples is not known, since the training data is neither one loader of a data set "
            "that has a length, nor a dictionary with one under 'labelled': give it as examples"
        ) from None


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@torch.no_grad()
def estimate_batch_norms(trainer: pl.Trainer, model: pl.LightningModule, callback: str) -> None:
    """Estimate means and variances of batch norms again, by a pass over the training data without training.

    All batches have the same weight, as in ``torch.optim.swa_utils.update_bn``. Their number is that of one epoch, or
    of the training batches if there were fewer. Batch norms in evaluation mode (frozen ones), random generators and the
    loader's position do not change. Statistics are averaged over processes.

    Args:
        trainer: the trainer, in training.
        model: it is called on each batch; see :func:`tying.weights.calibration.call`.
        callback: name of the callback that changed the weights, for the warning.

    Warns:
        UserWarning: the model cannot be called on these inputs, or does not call all of its batch norms; these keep the
            statistics of the previous weights.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.training and module.running_mean is not None
    }
    before = {name: [buffer.clone() for buffer in norm.buffers()] for name, norm in norms.items()}
    if not norms:
        return
    reason = ""
    try:
        _call(trainer, model, norms.values())
    except Exception as error:
        reason = f"the model could not be called on batches of the training data ({error})"
    except BaseException:  # an interrupt
        _restore(norms, before)
        raise
    all_ranks = trainer.strategy.reduce_boolean_decision  # true if true in every process
    succeeded = all_ranks(not reason)
    kept = {n: norm for n, norm in norms.items() if not (succeeded and all_ranks(bool(norm.num_batches_tracked)))}
    _restore(kept, before)
    for norm in (norm for name, norm in norms.items() if name not in kept):
        for buffer in (norm.running_mean, norm.running_var):
            assert isinstance(buffer, Tensor)
            buffer.copy_(torch.as_tensor(trainer.strategy.reduce(buffer.clone(), reduce_op="mean")))
    if kept:
        reason = reason or "the model, called on batches of the training data, does not call these, in some process"
        warnings.warn(
            f"{callback}: batch norms keep the statistics of the former weights, since {reason}: {', '.join(kept)}; "
            "see torch.optim.swa_utils.update_bn",
            stacklevel=2,
        )


def _restore(norms: Mapping[str, BatchNorm], before: Mapping[str, list[Tensor]]) -> None:
    for name, norm in norms.items():
        for buffer, value in zip(norm.buffers(), before[name], strict=True):
            buffer.copy_(value)


@contextmanager
def replayed_batches(trainer: pl.Trainer, model: pl.LightningModule, count: int) -> Iterator[Iterable[Any]]:
    """Yield the first batches of the training data, as a training step receives them, and move nothing.

    Random generators and the loader's position are restored at the end.

    Args:
        trainer: the trainer, in training.
        model: its model.
        count: number of batches; fewer if an epoch has fewer.

    Raises:
        ConfigurationError: the training data has several loaders.
    """
    loader: Any = only_loader(trainer.train_dataloader)
    if isinstance(loader, Mapping | Sequence):
        raise ConfigurationError(f"the training data has {len(loader)} loaders, not one")
    least = int(min(count, trainer.num_training_batches))  # which is infinite if unknown
    with _copied(loader) as copied:
        yield (training_batch(trainer, model, loaded) for loaded in islice(_one_pass(copied), least))


def _one_pass(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a pass; a loader that resumes behind its last batch passes to the next one first."""
    is_empty = True
    for batch in loader:
        is_empty = False
        yield batch
    if is_empty:
        yield from loader


def _call(trainer: pl.Trainer, model: pl.LightningModule, norms: Iterable[BatchNorm]) -> None:
    """Call a model on its training batches; the statistics of its batch norms become the means over them."""
    momenta = {norm: norm.momentum for norm in norms}
    count = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    try:
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # the mean
        # compiled, a momentum of None would depend on data
        with replayed_batches(trainer, model, count) as batches, torch.compiler.set_stance("force_eager"):
            for batch in batches:
                with trainer.precision_plugin.forward_context():
                    call(model, batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


@contextmanager
def _copied(loader: Any) -> Iterator[Any]:
    """Yield a copy of a loader; afterwards, the original's position and all random generators are as before."""
    copied = copy.copy(loader)
    states = {
        generator: generator.get_state()
        for source in (copied, getattr(copied, "sampler", None))
        if isinstance(generator := getattr(source, "generator", None), torch.Generator)
    }
    try:
        with pl.utilities.seed.isolate_rng():
            yield copied
    finally:
        for generator, state in states.items():
            generator.set_state(state)


def first_batches(trainer: pl.Trainer, model: pl.LightningModule, count: int, context: str) -> list[Any]:
    """Return the first training batches, in ``setup``, where Lightning has not requested the loader yet.

    The loader's position and random generators do not change. Batches are on the device of the model.

    Args:
        trainer: the trainer, in the ``setup`` of a callback.
        model: the model, whose hooks transfer the batches.
        count: number of batches; fewer, if there are not as many.
        context: name of the argument that asks for batches, for the error.

    Raises:
        ConfigurationError: there is not one loader.
    """
    with pl.utilities.seed.isolate_rng():
        loader = only_loader(training_loader_of(trainer))
    if loader is None or isinstance(loader, Mapping | Sequence):
        data = "no training data" if loader is None else f"training data of {len(loader)} loaders"
        raise ConfigurationError(f"{context} needs one loader of training data, and there is {data}")
    with _copied(loader) as copied:
        return [training_batch(trainer, model, loaded, model.device) for loaded in islice(copied, count)]
