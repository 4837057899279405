"""The base classes of all callbacks, and shared functions."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from tying.callbacks.finite_check import FiniteCheck
from tying.deprecated import class_aliases
from tying.errors import ConfigurationError, listed
from tying.files import NEED
from tying.lightning_namespace import check_namespace, pl
from tying.lightning_workarounds import callbacks_of, can_stop_early
from tying.selection.index import clean_name, covers
from tying.selection.patterns import Pattern
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup
from tying.weights.derived import derived_by_others
from tying.weights.sharding import reshard

# strategies that replace parameters by parts of flat ones
FLATTENING = pl.strategies.FSDPStrategy | pl.strategies.DeepSpeedStrategy
# callbacks that average weights in a copy of the model
AVERAGING = pl.callbacks.StochasticWeightAveraging | pl.callbacks.WeightAveraging


class _KeyBeforeSetup:
    """The key of a callback before setup: Lightning would refuse equal ones in its own words."""

    def __get__(self, callback: Any, owner: type) -> str:
        return f"{callback.final_state_key} {id(callback)}"


class Callback(pl.Callback):
    """The base of all callbacks. It checks the Trainer, and that no two callbacks save their states under one key.

    Attributes:
        name: distinguishes several callbacks of a class.
        distinguished_by: the constructor's argument that distinguishes several callbacks of a class, and their states.

    Raises:
        ConfigurationError: in ``setup``, the Trainer or one of its callbacks is of the other Lightning, or another
            callback of the class would save its state under the same key.
    """

    name: str | None = None
    distinguished_by: str | None = None

    @property
    def label(self) -> str:
        """The callback's class and, if it has one, its name."""
        return " ".join(filter(None, (type(self).__name__, self.name)))

    def is_same(self, other: pl.Callback) -> bool:
        """Return whether another callback is of this class, and does not differ in the distinguishing argument."""
        argument = self.distinguished_by or "name"
        return type(other) is type(self) and getattr(other, argument) == getattr(self, argument)

    # Lightning reads it at every call of every hook, which costs no call of Python this way
    state_key = property(attrgetter("_state_key"), doc="The key of the callback's state; before setup, of no other's.")
    _state_key = _KeyBeforeSetup()

    @property
    def final_state_key(self) -> str:
        """The key of the callback's state in checkpoints."""
        argument = self.distinguished_by
        return f"{type(self).__qualname__}{ {argument: getattr(self, argument)} if argument else '' }"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for thing in (trainer, *callbacks_of(trainer)):
            check_namespace(type(thing), type(self).__name__)
        self._check_state_key(callbacks_of(trainer))
        self._state_key = self.final_state_key

    def _check_state_key(self, callbacks: Sequence[pl.Callback]) -> None:
        if type(self).state_dict is pl.Callback.state_dict:  # it saves no state
            return
        kind, argument = type(self), self.distinguished_by
        if (count := sum(map(self.is_same, callbacks))) > 1:
            same = f" with {argument}={getattr(self, argument)!r}" if argument else ""
            remedy = f"give each its own {argument}, or leave all but one out" if argument else "leave all but one out"
            raise ConfigurationError(f"{kind.__name__}: {count} callbacks are {kind.__name__}{same}: {remedy}")


@class_aliases("tying.callbacks.TyingCallback")
class TyingCallback(Callback):
    """A callback that acts on weights. It stops training with an error when a weight is not finite.

    Attributes:
        ties: the ties that the callback makes, if any.
        parameters: patterns of the weights that the callback acts on, unless it has ties.
        takes_factors: whether the callback may act on a weight that another callback computes, by acting on all
            parameters from which it is computed.

    Raises:
        ConfigurationError: when training starts, the callback does not fit the model, or another callback acts on the
            same weights in an incompatible way.
        NonFiniteError: when training starts, or during it, an affected weight is NaN or infinite.
    """

    ties: Sequence[Tie] = ()
    parameters: Sequence[str] = ()
    takes_factors = False
    _finite_check = FiniteCheck("")

    @property
    def groups(self) -> list[TiedGroup]:
        """The tied groups of the model in training; empty before training starts."""
        return []

    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights of a model that the callback acts on, by name. This changes nothing.

        Raises:
            ConfigurationError: a pattern matches nothing, or a tie does not fit the model.
        """
        parameters = {id(parameter) for parameter in model.parameters()}
        groups = [group for group in self.groups if id(group.parameters[0]) in parameters]  # of this model
        return members(groups or (resolve(model, self.ties) if self.ties else []))

    def describe(self, model: nn.Module) -> str:
        """Describe in one line what the callback does to which weights of a model. This changes nothing.

        It is what the callback says when training starts.
        """
        weights = self.affected(model)
        return f"{counted(len(weights), 'weight')}: {listed(weights)}"

    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights that must stay finite, by name: the affected ones, unless a subclass adds others."""
        return self.affected(model)

    def replaced(self, model: nn.Module) -> list[str]:
        """Return the names of the weights that this callback computes, or will compute, from other parameters."""
        return []

    def selects(self, name: str) -> bool:
        """Return whether the callback's patterns match the name of a weight, even if it is no longer a parameter."""
        without = [pattern[1:] for pattern in self.parameters if pattern.startswith("!")]
        choices = [(pattern, without) for pattern in self.parameters if not pattern.startswith("!")]
        choices += [(side, [*tie.exclude]) for tie in self.ties for side in (tie.source, tie.target) if side]
        return any(
            covers(Pattern(pattern), name) and not any(covers(Pattern(other), name) for other in excluded)
            for pattern, excluded in choices
        )

    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Apply the changes of training to a model, so that it can load a state dict from that training."""

    def is_needed(self, model: nn.Module) -> bool:
        """Return whether a model without this callback could not load the state dict, or would compute otherwise."""
        return not derived_by_others(model).keys().isdisjoint(self.replaced(model))

    def restore_structure(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """When a fit resumes, change the model as training had changed the checkpoint's model, unless that is done.

        Each callback that keeps values by names of weights calls this for all others first.
        """

    def follow_names(self, model: nn.Module) -> None:
        """Use the current names of weights in training: another callback has changed them."""

    def check_groups(self, groups: Sequence[TiedGroup]) -> None:
        """Raise a ConfigurationError if the callback cannot tie these groups."""

    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        """Raise a ConfigurationError if other callbacks act on the same weights in an incompatible way."""

    def monitor(self, model: nn.Module) -> None:
        """Check the monitored weights from now on. Call this again when the callback has replaced some."""
        self._finite_check.follow(self.monitored(model), self.groups)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy, FLATTENING):
            raise ConfigurationError(
                f"{self.label} does not support {type(trainer.strategy).__name__}, which replaces weights by parts of "
                "flat tensors: use ModelParallelStrategy, and shard the model by torch's fully_shard in "
                "configure_model; or use 'ddp' if the model fits one device"
            )
        accept_need(pl_module, self)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finite_check = FiniteCheck(self.label)
        self.monitor(pl_module)
        self._finite_check.check()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        self.check_conflicts(pl_module, callbacks_of(trainer))
        pl.utilities.rank_zero_info(f"{self.label}: {self.describe(pl_module)}")

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._finite_check.report()
        if trainer.gradient_clip_val:
            self._finite_check.measure_gradients(
                optimizer, getattr(trainer.precision_plugin, "scaler", None) is not None
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._finite_check.steps_seen:
            self._finite_check.steps_seen = trainer.global_step
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


def needs(callback: TyingCallback, mixin: str) -> str:
    """Return the key in checkpoints that says that loading needs a callback, which a mixin added.

    A model without the callback refuses to load the key, and the error names it; see :func:`accept_need`.
    """
    return f"{NEED}{type(callback).__name__} of {mixin}"


def accept_need(model: nn.Module, callback: TyingCallback) -> None:
    """Let a model that has a callback load checkpoints that need it."""
    if "_accepted_needs" not in vars(model):
        vars(model)["_accepted_needs"] = set()
        model.register_load_state_dict_pre_hook(_drop_needs)  # type: ignore[no-untyped-call]  # torch's
    vars(model)["_accepted_needs"].add(f"{NEED}{type(callback).__name__} ")


def _drop_needs(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    accepted = tuple(prefix + need for need in vars(model)["_accepted_needs"])
    for key in [key for key in state_dict if key.startswith(accepted)]:
        del state_dict[key]


def members(groups: Iterable[TiedGroup]) -> dict[str, nn.Parameter]:
    """Return the parameters of tied groups, by name."""
    return {name: p for group in groups for name, p in zip(group.names, group.parameters, strict=True)}


def parameters_beside(model: nn.Module, weights: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return all parameters of the modules that contain the named weights, by name."""
    parameters = {id(p) for name in weights for p in model.get_submodule(name.rpartition(".")[0]).parameters()}
    return {clean_name(name): p for name, p in model.named_parameters() if id(p) in parameters}


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    Example:
        >>> counted(1, "group"), counted(2000, "weight")
        ('1 group', '2,000 weights')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def tied_groups(trainer: pl.Trainer) -> list[tuple[str, TiedGroup]]:
    """Return every group that a callback of the trainer ties, with the class and name of the callback."""
    return [
        (callback.label, group)
        for callback in callbacks_of(trainer)
        if isinstance(callback, TyingCallback)
        for group in callback.groups
    ]


def configure_model(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Call a module's ``configure_model`` in ``setup``, so that a callback can change the layers that it creates.

    Lightning calls ``configure_model`` again after ``setup``, so it must be safe to call twice.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    for hook in ("configure_sharded_model", "configure_model"):  # the former is deprecated, and still called
        if pl.utilities.model_helpers.is_overridden(hook, module):
            with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
                getattr(module, hook)()


def is_fresh_run(trainer: pl.Trainer, stage: str) -> bool:
    """Return whether ``setup`` begins training. Lightning restores the state of a checkpoint, if any, later."""
    return stage == "fit" and trainer.global_step == 0


def is_last_epoch(trainer: pl.Trainer) -> bool:
    """Return whether training ends with the epoch that has just ended, as far as is known in ``on_train_epoch_end``."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    ends = 0 < (trainer.max_epochs or -1) <= progress.processed or 0 < trainer.max_steps <= trainer.global_step
    return ends or (trainer.should_stop and can_stop_early(trainer))


def training_steps(trainer: pl.Trainer, context: str, remedy: str = "") -> int:
    """Return the number of optimizer steps of the whole training, which fractions of training refer to.

    Call it when the training data is loaded, from ``on_train_start`` on: it would load them.

    Args:
        trainer: the trainer.
        context: the callback and its argument, for the error message.
        remedy: what to do other than setting an end, for the error message.

    Raises:
        ConfigurationError: training has no end, or one that cannot be estimated.
    """
    if (steps := estimated_steps(trainer)) is None:
        raise ConfigurationError(
            f"{context} needs the length of training, which is unknown: set the trainer's max_steps{remedy}"
        )
    return steps


def estimated_steps(trainer: pl.Trainer) -> int | None:
    """Return the number of optimizer steps of the whole training, or None if it has no end that can be estimated.

    Call it when the training data is loaded, from ``on_train_start`` on: it would load them.
    """
    steps = trainer.estimated_stepping_batches  # -1 for an iterable dataset without max_steps
    accumulation = [c for c in callbacks_of(trainer) if isinstance(c, pl.callbacks.GradientAccumulationScheduler)]
    is_wrong = trainer.max_steps == -1 and any(len({*callback.scheduling.values()}) > 1 for callback in accumulation)
    return None if steps < 0 or math.isinf(steps) or is_wrong else int(steps)


def optimizer_steps(trainer: pl.Trainer) -> int:
    """Return the number of steps that each optimizer has made; ``global_step`` counts those of all optimizers."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def replica_of(trainer: pl.Trainer) -> tuple[int, int]:
    """Return which part of the data this process trains on, and the number of parts.

    The processes of tensor parallelism have one part.
    """
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", {})
    return sampler.get("rank", 0), sampler.get("num_replicas", 1)


def reject_copies(trainer: pl.Trainer, context: str, content: str, shards: bool = True) -> None:
    """Raise if a callback that averages weights, or the strategy, keeps weights that training replaces.

    Args:
        trainer: the trainer.
        context: the name of the callback that replaces weights.
        content: what would be kept, for the error message.
        shards: whether to reject strategies that shard parameters; False if the parameters stay. DDP is not rejected:
            see :func:`replicate_again`.

    Raises:
        ConfigurationError: weights would be kept.
    """
    holders = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, AVERAGING)]
    if holders:
        raise ConfigurationError(f"{context} cannot be combined with {holders[0]}, which would keep {content}")
    parallel, ddp = pl.strategies.ParallelStrategy, pl.strategies.DDPStrategy
    if shards and isinstance(trainer.strategy, parallel) and not isinstance(trainer.strategy, ddp):
        raise ConfigurationError(
            f"{context} cannot be combined with {type(trainer.strategy).__name__}, which would keep {content}. "
            "Strategy 'ddp' and one device support it"
        )


def replicate_again(trainer: pl.Trainer) -> None:
    """Let DDP reduce the gradients of the parameters that the model has now: training has replaced some.

    Every process must call it between two batches. Parameters and buffers become those of the first process.
    """
    strategy = trainer.strategy
    if isinstance(strategy, pl.strategies.DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.model.module  # the last reference to the former wrapper, which removes its hooks
        strategy.configure_ddp()


def warn_if_too_late(trainer: pl.Trainer, context: str, start_epoch: int) -> None:
    """Warn if training ends before a callback's first epoch."""
    if 0 <= (trainer.max_epochs or -1) <= start_epoch:
        warnings.warn(
            f"{context} begins in epoch {start_epoch}, and training ends before: max_epochs is {trainer.max_epochs}",
            stacklevel=3,
        )
