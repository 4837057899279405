"""The base of all callbacks that tie weights, and what they share."""

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from tying.callbacks.finite_check import FiniteCheck
from tying.deprecated import class_aliases
from tying.errors import ConfigurationError
from tying.lightning_workarounds import callbacks_of
from tying.selection.index import clean_name
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup

SHARDING = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy  # they split weights over processes


@class_aliases("tying.callbacks.TyingCallback")
class TyingCallback(pl.Callback):
    """A callback that acts on weights; it ends training where one of them is not finite.

    Attributes:
        ties: the ties that it makes, if any.
        name: distinguishes several callbacks of a class.

    Raises:
        ConfigurationError: when training starts, another callback acts on the same weights in a way that excludes it.
        NonFiniteError: when training starts, or during it, an affected weight is NaN or infinite.
    """

    ties: Sequence[Tie] = ()
    name: str | None = None
    _finite_check = FiniteCheck("")
    _steps_seen = 0

    @property
    def groups(self) -> list[TiedGroup]:
        """The tied groups of the model in training; empty before training starts."""
        return []

    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights of a model that the callback acts on, by name: a query, which changes nothing.

        Raises:
            ConfigurationError: a pattern matches nothing, or a tie does not fit the model.
        """
        parameters = {id(parameter) for parameter in model.parameters()}
        groups = [group for group in self.groups if id(group.parameters[0]) in parameters]  # not those of another model
        return members(groups or (resolve(model, self.ties) if self.ties else []))

    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights that must stay finite, by name: the affected ones, unless a subclass adds others."""
        return self.affected(model)

    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Change a model as training would have, so that it can load a state dict of that training."""

    def check_groups(self, groups: Sequence[TiedGroup]) -> None:
        """Raise a ConfigurationError if the callback could not tie these groups."""

    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        """Raise a ConfigurationError if other callbacks act on the same weights in a way that excludes this one."""

    def monitor(self, model: nn.Module) -> None:
        """Check the monitored weights from now on; to be called again where the callback has replaced some."""
        self._finite_check.weights, self._finite_check.groups = self.monitored(model), self.groups

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finite_check = FiniteCheck(" ".join(filter(None, (type(self).__name__, self.name))))
        self._steps_seen = 0
        self.monitor(pl_module)
        self._finite_check.check()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_conflicts(pl_module, callbacks_of(trainer))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._finite_check.report()
        if trainer.gradient_clip_val:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            self._finite_check.measure_gradients(optimizer, scaled)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.check_finite(wait=False)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training:
            self._finite_check.measure()
        self._finite_check.report()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finite_check.report()

    def check_finite(self, wait: bool = True) -> None:
        """Raise a NonFiniteError if a monitored weight is not finite; without ``wait``, a GPU may report it later."""
        self._finite_check.measure()
        self._finite_check.report(wait)


def members(groups: Iterable[TiedGroup]) -> dict[str, nn.Parameter]:
    """Return the parameters of tied groups, by name."""
    return {name: p for group in groups for name, p in zip(group.names, group.parameters, strict=True)}


def parameters_beside(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return all parameters of the modules that have weights of these names, by name."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in weights]
    parameters = {id(parameter) for owner in owners for parameter in owner.parameters()}
    return {clean_name(name): p for name, p in model.named_parameters() if id(p) in parameters}


def tied_groups(trainer: pl.Trainer) -> list[tuple[str, TiedGroup]]:
    """Return every group that a callback of the trainer ties, with the class and name of the callback."""
    return [
        (" ".join(filter(None, (type(callback).__name__, callback.name))), group)
        for callback in callbacks_of(trainer)
        if isinstance(callback, TyingCallback)
        for group in callback.groups
    ]


def configure_model(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let a module make its layers now, as Lightning does later, so that a callback can change them in ``setup``.

    Lightning calls ``configure_model`` again, which must be able to run twice.
    """
    if is_overridden("configure_model", module):
        contexts = trainer.strategy.tensor_init_context(), trainer.strategy.model_sharded_context()
        with contexts[0], contexts[1], trainer.precision_plugin.module_init_context():
            module.configure_model()


def is_fresh_run(trainer: pl.Trainer, stage: str) -> bool:
    """Return whether setup begins a training run; the state of a checkpoint, if any, is restored after it."""
    return stage == "fit" and trainer.global_step == 0


def is_logging_step(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Return whether Lightning writes what ``on_train_batch_end`` logs: every ``log_every_n_steps``, and at the end."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # untyped
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    step = trainer.global_step if module.automatic_optimization else batches
    return every > 0 and (step % every == 0 or trainer.should_stop)


def picture_folder(trainer: pl.Trainer) -> Path | None:
    """Return the logger's directory, for pictures; None in all processes but the first, and in trial runs.

    Where it cannot be written, a warning says so instead of an error: training goes on without pictures.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: the processes agree on it
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(f"pictures are left out, since {folder} cannot be written: {error}", stacklevel=2)
        return None


def reject_copies(trainer: pl.Trainer, context: str, content: str, processes: bool = True) -> None:
    """Raise if a callback that averages weights, or another process, has a copy of weights that training replaces.

    Args:
        trainer: of the run.
        context: the callback's name.
        content: what the copies would keep.
        processes: whether other processes count: they do not where each makes the same change itself.

    Raises:
        ConfigurationError: there are such copies.
    """
    averaging = [c for c in callbacks_of(trainer) if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
    holders = [type(callback).__name__ for callback in averaging]
    if processes and isinstance(trainer.strategy, SHARDING):
        holders.append(type(trainer.strategy).__name__)
    if processes and trainer.world_size > 1:
        holders.append("several processes")
    if holders:
        raise ConfigurationError(f"{context} does not go with {holders[0]}, which would keep {content}")


def warn_if_too_late(trainer: pl.Trainer, context: str, start_epoch: int) -> None:
    """Warn if training ends before the epoch in which a callback begins."""
    if 0 <= (trainer.max_epochs or -1) <= start_epoch:
        warnings.warn(
            f"{context} begins in epoch {start_epoch}, and training ends before: max_epochs is {trainer.max_epochs}",
            stacklevel=3,
        )
