"""All uses of private or untyped names of Lightning, each with its reason; checked with Lightning 2.6.

Everything else in this package uses Lightning's public names.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tying.lightning_namespace import pl

# Lightning's stubs of types do not export it from its namespace
MisconfigurationException: type[Exception] = pl.utilities.exceptions.MisconfigurationException  # type: ignore[attr-defined]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's callbacks. The attribute is public, but mypy does not see it: a connector sets it."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Give the trainer a new list of callbacks: a hook that Lightning is calling goes on with the old one."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def finetuning_groups(callbacks: Iterable[pl.Callback]) -> list[dict[str, Any]]:
    """Return the parameter groups, as names, from which ``BaseFinetuning`` restores optimizers in a resumed run.

    Lightning writes them to checkpoints; no public method changes them.
    """
    finetuning = [callback for callback in callbacks if isinstance(callback, pl.callbacks.BaseFinetuning)]
    return [g for callback in finetuning for groups in callback._internal_optimizer_metadata.values() for g in groups]


def averages(callbacks: Iterable[pl.Callback]) -> list[nn.Module]:
    """Return the copies of the model in which callbacks average its weights; no public name holds them."""
    kinds = pl.callbacks.WeightAveraging | pl.callbacks.StochasticWeightAveraging
    copies = [callback._average_model for callback in callbacks if isinstance(callback, kinds)]
    return [getattr(copied, "module", copied) for copied in copies if copied is not None]


def weights_to_prune(pruning: pl.callbacks.ModelPruning) -> list[tuple[nn.Module, str]]:
    """Return the modules and attributes that ``ModelPruning`` prunes; no public method lists them before pruning."""
    return [*(pruning._parameters_to_prune or ())]


def prunes_in(pruning: pl.callbacks.ModelPruning, epoch: int) -> bool:
    """Return whether ``ModelPruning`` prunes in an epoch; no public method answers this."""
    decision = pruning._apply_pruning
    return bool(decision(epoch) if callable(decision) else decision)


def can_stop_early(trainer: pl.Trainer) -> bool:
    """Return whether ``should_stop`` ends training now: only the loop checks the minimum of epochs and steps."""
    return trainer.fit_loop._can_stop_early


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Return whether Lightning writes logs in this step.

    With manual optimization Lightning counts batches, except those that a hook has skipped, in a private attribute.
    """
    return trainer._logger_connector.should_update_logs


def restart_loader(trainer: pl.Trainer) -> None:
    """Restart the epoch's pass over the training data, which Lightning starts before ``on_train_start``."""
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # set by now


def training_loader_of(trainer: pl.Trainer) -> Any:
    """Return the training loader, or loaders, before Lightning requests them; None if there are none.

    ``trainer.train_dataloader`` is set only when training starts.
    """
    source = trainer.fit_loop._data_source
    return source.dataloader() if source.instance is not None and source.is_defined() else None


def training_batch(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, device: torch.device | None = None
) -> Any:
    """Return a batch of the loader as a training step receives it; with a device, as the model takes it in ``setup``.

    ``strategy.batch_to_device`` calls all hooks of the module or data module except ``on_before_batch_transfer``.
    Lightning moves the model, and converts it to the precision's dtype, after ``setup``.
    """
    if device is None:
        batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch), device)


def loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return the scale of the gradients in ``on_before_optimizer_step``.

    Lightning has already unscaled them, unless the optimizer's step unscales them itself (torch's private
    ``_step_supports_amp_scaling``).
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
