"""Let tied weights differ by a residual during training, for good or for a while."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import TyingCallback, counted, estimated_steps, optimizer_steps, reject_copies
from tying.callbacks.training_data import first_batches
from tying.callbacks.transform import ModelTransform, parameters_of
from tying.errors import ConfigurationError, check_choice, check_count, listed
from tying.hard import (
    RelaxedGroup,
    RelaxedWeight,
    WeightResidual,
    harden,
    relax,
    relaxed,
    set_residual_factor,
    tied,
    untie,
)
from tying.hard.relaxed import Init
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, is_logging_step, weights_to_prune
from tying.mappings import from_mapping
from tying.selection.index import unwrapped
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft import Schedule
from tying.soft.schedule import parse_schedule
from tying.weights.calibration import call
from tying.weights.derived import DerivedWeight, derived_weights
from tying.weights.optimizers import drop_parameters
from tying.weights.state_dict import install_record


class RelaxedTying(ModelTransform):
    """Let layers share a weight up to a residual, before the optimizers are made; see :func:`tying.hard.relax`.

    With ``anneal``, the residuals shrink during training. At its end they are dropped: the layers become one weight, as
    with :class:`HardTying`, which keeps the optimizer's state of the shared weight.

    Logs ``tying/residual``, the factor on the residuals in the last step, and at the end of each epoch
    ``tying/largest_residual``, the largest ``‖W − S‖ / ‖W‖`` of a layer; with a name, ``tying/<name>/residual``.

    Args:
        ties: :class:`tying.Tie`, strings ``"source ~ target | relation"``, or mappings of Tie's arguments. Vectors that
            wildcards or names of modules match stay separate: list HardTying after this callback for them.
        residual: such as :class:`tying.hard.LowRankResidual`; default: none, as with HardTying.
        anneal: a factor in [0, 1] on the residuals, which ends at 0, such as ``Schedule(1.0, 0.0, 1000)``; default: the
            residuals stay.
        calibration: number of training batches by which residuals of low rank are initialised; see relax. The model is
            called on them when a run begins; the loader and random generators do not move.
        name: distinguishes several callbacks of this class, in checkpoints and in the log.
        init: ``"nearest"``: the shared weight is the mean of the layers' weights, and the residuals are nearest to what
            is left; ``"source"``: it is the source's, and residuals begin at zero, for training from scratch.

    Raises:
        ConfigurationError: at construction, ``anneal`` does not end at 0 or leaves [0, 1], or there is no residual to
            anneal or to calibrate; when the model is set up, the ties do not fit it, or there are several processes or
            averaged weights with ``anneal``, or no training batches for ``calibration``.

    Example:
        >>> from tying.hard import LowRankResidual
        >>> RelaxedTying(["h.{0..3}"], LowRankResidual(rank=8), anneal=Schedule(1.0, 0.0, 1000)).residual
        LowRankResidual(rank=8, scale=False)
    """

    distinguished_by = "name"

    def __init__(
        self,
        ties: Sequence[Tie | str],
        residual: WeightResidual | None = None,
        anneal: Schedule | None = None,
        calibration: int | None = None,
        name: str | None = None,
        init: Init = "nearest",
    ) -> None:
        check_choice("init", init, get_args(Init))
        check_count("calibration", 1 if calibration is None else calibration)
        self.ties, self.residual = parse_ties(ties), from_mapping(residual, WeightResidual, "residual")
        if not isinstance(self.residual, WeightResidual | None):
            raise ConfigurationError(
                f"residual must be a tying.hard.WeightResidual, such as LowRankResidual(rank=8), not {residual!r}; in "
                "YAML a class_path with init_args"
            )
        self.anneal, self.calibration = _parse_anneal(anneal), calibration
        for argument in ("anneal", "calibration"):
            if self.residual is None and getattr(self, argument) is not None:
                raise ConfigurationError(f"{argument} needs a residual, such as LowRankResidual(rank=8)")
        self.name, self.init = name, init
        self._batches: list[Any] | None = None  # of the calibration, while the model is relaxed
        self._relaxed: list[RelaxedGroup] = []  # in training
        self._hard_groups: list[TiedGroup] = []
        self._factor = 1.0  # in the last step
        self._is_fitting = self._is_resumed_hard = False
        self._load_hook: RemovableHandle | None = None

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [*self._hard_groups]  # relaxed weights are not equal

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"anneal": str(self.anneal)}  # Lightning warns if a checkpoint has the state of a missing callback

    @override
    def change(self, model: nn.Module) -> list[str]:
        groups = relax(model, self.ties, self.residual, self._batches, self.init, forward=_call)
        return [name for group in groups for name in group.names]

    @override
    def _would_compute(self, derived: DerivedWeight) -> bool:
        step = derived.steps[-1]
        return isinstance(step, RelaxedWeight) and step.residual == self.residual

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return bool(self.changed(model))  # without residuals, the weights are not computed any more

    @override
    def is_needed(self, model: nn.Module) -> bool:
        return bool(self.replaced(model))

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self.is_applied(model):
            return parameters_of(model, self.changed(model))
        matched = super().affected(model)
        return {name: weight for name, weight in matched.items() if weight.ndim > 1 or self.residual is None}

    @override
    def describe(self, model: nn.Module) -> str:
        groups = self._relaxed_in(model)
        if not groups:
            return f"{listed(self.changed(model))}: hard tied, without residuals"
        layers = listed(name for group in groups for name in group.names)
        residual = groups[0].steps[0].residual.describe()
        return f"{layers} share {counted(len(groups), 'weight')}, and differ by {residual} each"

    @override
    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        self.apply(model)
        if not self._is_fitting:  # then _before_load prepares it
            self._follow(model, self._is_hard_in(model, state_dict))

    @override
    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        pruned = {
            module
            for other in others
            if isinstance(other, pl.callbacks.ModelPruning)
            for module, name in weights_to_prune(other)
            if name == "weight"
        }
        for group in self._relaxed_in(model):
            if group.steps[0].shared in pruned:
                raise ConfigurationError(
                    f"{self.label}: ModelPruning would prune the weight that {listed(group.names)} share, which is not "
                    "possible: give it other parameters_to_prune, or prune in a later run"
                )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_fitting, self._is_resumed_hard = stage == "fit", False
        if self.anneal is not None:
            reject_copies(trainer, f"{self.label}: anneal", "the residuals: leave it out, and train on with HardTying")
        if self.calibration and self._is_fitting and not self.is_applied(pl_module):
            self._batches = first_batches(trainer, pl_module, self.calibration, f"{self.label}: calibration")
        try:
            super().setup(trainer, pl_module, stage)
        finally:
            self._batches = None
        self._remove_hook()
        install_record(pl_module, [])  # registers hooks, which hardening cannot while torch calls them
        self._load_hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # torch's
            partial(self._before_load, trainer)
        )

    def _before_load(
        self, trainer: pl.Trainer, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
    ) -> None:
        """Let a model have the residuals that a checkpoint has, when Lightning restores it."""
        if self.residual is None or trainer.ckpt_path is None:
            return
        is_hard = self._is_hard_in(model, state_dict, prefix)
        self._follow(model, is_hard and not self._is_fitting)
        if is_hard and self._is_fitting:  # optimizers are made as when training began: on_fit_start hardens
            self._is_resumed_hard = True
            _insert_residuals(self._relaxed_in(model), model, state_dict, prefix)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hook()
        if self.anneal is not None and any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ConfigurationError(
                f"{self.label}: LBFGS holds the residuals, so that anneal cannot drop them: use another "
                "optimizer, or leave anneal out"
            )
        self.restore_structure(trainer, pl_module)
        self._relaxed, names = self._relaxed_in(pl_module), {*self.changed(pl_module)}
        self._factor = 1.0 if self._relaxed else 0.0
        self._hard_groups = [group for group in tied(pl_module) if not names.isdisjoint(group.names)]
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.anneal is None:
            return
        epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        total = epochs if self.anneal.unit == "epoch" else estimated_steps(trainer)
        if total is not None and total < self.anneal.length:
            warnings.warn(
                f"{self.label}: anneal ends after {self.anneal.length} {self.anneal.unit}s, and training after "
                f"{total}: the residuals stay. Shorten anneal, or train longer",
                stacklevel=2,
            )

    @override
    def restore_structure(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if self._is_resumed_hard:  # optimizer states are restored next, by position
            self._is_resumed_hard, self._relaxed = False, self._relaxed_in(model)
            self._harden(trainer, model)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.anneal is not None and not self._harden_at_end(trainer, pl_module):
            self._factor = self.anneal(self._count(trainer))
            for group in self._relaxed:
                set_residual_factor(group, self._factor)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.residual is not None and is_logging_step(trainer):
            pl_module.log(f"{self._log_prefix}/residual", self._factor)
        self._harden_at_end(trainer, pl_module)  # before checkpoints are written

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._harden_at_end(trainer, pl_module, ended_epochs=1)
        if self.residual is not None:
            distances = [distance for group in self._relaxed for distance in group.distances().values()]
            pl_module.log(f"{self._log_prefix}/largest_residual", max(distances, default=0.0))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_hook()  # Lightning skips teardown after an exception

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hook()
        self._is_fitting = False

    def _remove_hook(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    @property
    def _log_prefix(self) -> str:
        return "/".join(filter(None, ("tying", self.name)))

    def _count(self, trainer: pl.Trainer, ended_epochs: int = 0) -> int:
        """Return the number of steps of each optimizer, or of epochs, that the schedule counts."""
        assert self.anneal is not None
        return self.anneal.count(optimizer_steps(trainer), trainer.current_epoch + ended_epochs)

    def _harden_at_end(self, trainer: pl.Trainer, model: pl.LightningModule, ended_epochs: int = 0) -> bool:
        """Drop the residuals if the schedule has ended; return whether there are none."""
        if self.anneal is not None and self._relaxed and self._count(trainer, ended_epochs) >= self.anneal.length:
            self._harden(trainer, model)
            self.monitor(model)
        return not self._relaxed

    def _harden(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Make the layers of each group one weight, and drop the residuals, also from the optimizers."""
        residuals = [parameter for group in self._relaxed for values in group.residuals for parameter in values]
        drop_parameters(trainer.optimizers, residuals)
        self._hard_groups = harden(model, self.changed(model))
        self._relaxed, self._factor = [], 0.0
        for other in callbacks_of(trainer):
            if isinstance(other, TyingCallback):
                other.follow_names(model)
        pl.utilities.rank_zero_info(f"{self.label}: {self.describe(model)}")

    def _relaxed_in(self, model: nn.Module) -> list[RelaxedGroup]:
        """Return the groups of this callback that still have residuals."""
        names = {*self.changed(model)}
        return [group for group in relaxed(model) if not names.isdisjoint(group.names)]

    def _follow(self, model: nn.Module, is_hard: bool) -> None:
        """Harden a model, or give hardened weights residuals again, without values: they are loaded next."""
        if is_hard:
            harden(model, self.changed(model))
        elif self.residual is not None and not self._relaxed_in(model):
            untie(model, self.changed(model))
            relax(model, self.ties, self.residual, init="source")

    def _is_hard_in(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> bool:
        """Return whether a state dict holds the weights without residuals."""
        return not {unwrapped(key.removeprefix(prefix)) for key in state_dict}.isdisjoint(self.changed(model))


def _call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a training batch, for the calibration."""
    try:
        return call(model, batch)
    except Exception as error:
        raise ConfigurationError(
            f"calibration calls the model on the input of a training batch, and {type(model).__name__} fails "
            f"({type(error).__name__}: {error}): define its forward for this input, or leave calibration out"
        ) from error


def _parse_anneal(anneal: Any) -> Schedule | None:
    schedule = parse_schedule(anneal, argument="anneal")
    if schedule is not None and (schedule.end != 0 or schedule.length == 0):
        raise ConfigurationError(
            f"anneal must end at 0 after some steps or epochs, when the residuals are dropped, as "
            f"Schedule(1.0, 0.0, length) does, not {schedule}; leave it out to keep the residuals"
        )
    if schedule is not None and schedule.start > 1:
        raise ConfigurationError(f"anneal, a factor on the residuals, must be in [0, 1], not {schedule}")
    return schedule


def _insert_residuals(
    groups: Sequence[RelaxedGroup], model: nn.Module, state_dict: dict[str, Any], prefix: str
) -> None:
    """Replace hard tied weights in a state dict by shared weights, with the residuals that a model has."""
    keys = {unwrapped(key.removeprefix(prefix)): key for key in state_dict}
    current = {unwrapped(key): (key, value) for key, value in model.state_dict(keep_vars=True).items()}
    shared = {group.parameters[0]: state_dict[keys[group.names[0]]] for group in groups}
    for name, derived in derived_weights(model, aliases=True).items():
        if not shared.keys().isdisjoint(derived.originals):
            hidden = tuple(name.removesuffix(derived.name) + key for key in derived.prefixes)
            state_dict.pop(keys[name], None)
            state_dict |= {
                prefix + key: shared[value] if value in shared else value.detach()
                for clean, (key, value) in current.items()
                if clean.startswith(hidden)
            }
