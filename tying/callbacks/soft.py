"""Pull tied weights together during training."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from tying.callbacks.base import reject_copies
from tying.callbacks.penalty import PenaltyCallback, Update
from tying.callbacks.training_data import num_train_samples
from tying.callbacks.transform import shared_with
from tying.errors import ConfigurationError, check_count, check_range, listed
from tying.hard import untie
from tying.lightning_namespace import pl
from tying.lightning_workarounds import weights_to_prune
from tying.selection.index import check_shape, clean_name
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup, parse_ties
from tying.soft import Penalty, Schedule, TyingPenalty, coupling_strength
from tying.soft.group_penalty import as_penalty, gaps
from tying.weights.optimizers import merge_optimizer_state
from tying.weights.tie import Init, plan, tie_groups


class SoftTying(PenaltyCallback):
    """Pull tied weights together while they train.

    :class:`tying.callbacks.penalty.PenaltyCallback` defines the updates and the logged values.

    Args:
        ties: which weights belong together: :class:`tying.Tie`, or strings ``"source ~ target | relation"``.
        strength: factor on Ω, ≥ 0; ``inf`` (``.inf`` in YAML) with ``update="proximal"``: equal after every step.
        penalty: ``"l2"``, ``"l1"``, ``Huber(delta)`` for pairs, or a subclass of :class:`tying.soft.Penalty`.
        update: add to the gradients, or move the weights after the step, explicitly or by a proximal step.
        schedule: a factor on ``strength`` over steps or epochs.
        harden_below: at the end of each epoch, groups with a gap below this become one weight, their mean, see
            :class:`HardTying`; their optimizer states are also averaged.
        name: distinguishes several callbacks of this class, in checkpoints and in the log (``tying/<name>/penalty``).

    Raises:
        ConfigurationError: at construction, for arguments out of range; when training starts, for ties that do not
            fit the model, and for optimizers and strategies with which the update would be wrong.

    Example:
        >>> SoftTying(["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"], strength=1e-2).ties
        [Tie(source='encoder.{i}.weight', target='decoder.{-i}.weight', relation='o i -> i o', exclude=())]

    Source: I. Goodfellow, Y. Bengio and A. Courville, Deep Learning, 2016, section 7.9; for decoupled updates
    I. Loshchilov and F. Hutter, Decoupled weight decay regularization, 2019.
    """

    def __init__(
        self,
        ties: Sequence[Tie | str],
        strength: float = 1e-3,
        penalty: Literal["l2", "l1"] | Penalty = "l2",
        update: Update = "gradient",
        schedule: Schedule | None = None,
        harden_below: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, update, schedule, name)
        self.ties, self.penalty, self.harden_below = parse_ties(ties), as_penalty(penalty), harden_below
        if update == "proximal" and type(self.penalty).prox is Penalty.prox:
            raise ConfigurationError(f"{type(self.penalty).__name__} has no prox method, which update='proximal' needs")
        check_range("harden_below", 1 if harden_below is None else harden_below, "(0, 1]")
        self._hardened: list[TiedGroup] = []  # in the order of hardening
        self._restored: list[set[str]] = []  # names of hardened groups in a checkpoint

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return [*super().groups, *self._hardened]

    @override
    def check_groups(self, groups: Sequence[TiedGroup]) -> None:
        TyingPenalty(groups, self.penalty)

    @override
    def state_dict(self) -> dict[str, Any]:
        hardened = [list(group.names) for group in self._hardened]
        return super().state_dict() | ({"hardened": hardened} if hardened else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = [{*names} for names in state_dict.get("hardened", ())]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.harden_below is not None:
            reject_copies(
                trainer, "harden_below", "the weights apart: train on with HardTying from a checkpoint instead"
            )
        parameters = {id(parameter) for parameter in pl_module.parameters()}
        if self._hardened and trainer.ckpt_path is not None:  # the checkpoint may be from before they were hardened
            untie(pl_module, {name for group in self._hardened for name in group.names})
        if trainer.ckpt_path is not None or any(id(g.parameters[0]) not in parameters for g in self._hardened):
            self._hardened = []

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        groups = self.penalties[0].groups if self.penalties and self._hardened else resolve(module, self.ties)
        if self.harden_below is not None:
            plan(module, groups)  # raises if they cannot become one weight
        # optimizer states are restored next, by position, so harden now
        hardened = {name for names in self._restored for name in names}
        self._harden(trainer, module, [g for g in groups if not hardened.isdisjoint(g.names)], "source")
        self._restored = []
        return [TyingPenalty([g for g in groups if hardened.isdisjoint(g.names)], self.penalty, self.strength)]

    @override
    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        if self.harden_below is None:
            return
        pruning = [callback for callback in others if isinstance(callback, pl.callbacks.ModelPruning)]
        pruned = {
            id(getattr(module, name, None)) for callback in pruning for module, name in weights_to_prune(callback)
        }
        if conflicts := [name for name, weight in self.affected(model).items() if id(weight) in pruned]:
            raise ConfigurationError(
                f"{self.label}: harden_below cannot tie {conflicts[0]!r} to another weight once ModelPruning has "
                "pruned it: prune other weights, prune in a later run, or leave harden_below out"
            )
        for name, other in shared_with(self, model, others):
            raise ConfigurationError(
                f"{self.label}: harden_below would replace {name!r}, which another {other.label} ties too: put all "
                "their ties into one callback, or leave harden_below out"
            )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.harden_below is None:
            return
        [penalty] = self.penalties
        measured = zip(penalty.groups, gaps(penalty.groups), strict=True)
        near = [group for group, gap in measured if gap < self.harden_below]
        if near:
            pl.utilities.rank_zero_info(f"SoftTying: {listed(group.names[0] for group in near)}: hard tied from now on")
        self._harden(trainer, pl_module, near, "mean")
        self.penalties = [TyingPenalty([g for g in penalty.groups if g not in near], self.penalty, self.strength)]
        self.monitor(pl_module)
        pl_module.log(f"{self.log_prefix}/hardened", float(len(self._hardened)))

    def _harden(self, trainer: pl.Trainer, model: pl.LightningModule, groups: list[TiedGroup], init: Init) -> None:
        """Make each group one weight, also in the optimizers."""
        self._hardened += tie_groups(model, groups, init)
        merge_optimizer_state(trainer.optimizers, groups)


class Coupling(PenaltyCallback):
    """Couple two submodules by a prior on the difference of their weights, which are paired by name.

    The loss must be a mean over labelled examples. The prior belongs to the sum over the examples, so it is divided by
    their number. :class:`tying.callbacks.SoftTying` with ``strength = coupling_strength(alpha, exponent) / examples``
    is equivalent. :class:`tying.callbacks.penalty.PenaltyCallback` defines the updates.

    Args:
        first: a module, or a pattern of parameters, of the discriminative model.
        second: its partner in the generative model.
        alpha: in [0, 1]: 0 shares all weights (one generative model); 1 leaves the models uncoupled.
        exponent: as in :func:`tying.soft.coupling_strength`.
        examples: number of labelled examples; by default the number in the training data, or in its loader
            ``labelled`` if batches are dictionaries.
        update: as for SoftTying; α = 0 needs ``"proximal"``.
        name: distinguishes several callbacks of this class.

    Raises:
        ConfigurationError: α is out of range, or 0 with an explicit update; weights of one module have no partner of
            their shape in the other (the message lists all); or the number of examples is not known.

    Example:
        >>> Coupling("classifier.encoder", "autoencoder.encoder", alpha=0.2, examples=500).strength
        16.0

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
        check_count("examples", 1 if examples is None else examples, "[1, inf)")
        if not (isinstance(first, str) and isinstance(second, str)):
            raise ConfigurationError(f"first and second must each be one name or pattern, not {first!r} and {second!r}")
        strength = coupling_strength(alpha, exponent)
        if math.isinf(strength) and update != "proximal":
            raise ConfigurationError(
                f"alpha=0 makes the weights of both models equal, which needs update='proximal', not {update!r}"
            )
        super().__init__(strength, update, None, name)
        self.first, self.second, self.alpha, self.exponent, self.examples = first, second, alpha, exponent, examples
        self.ties = [Tie(first, second)]

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        if wrong := unpaired(module, self.first, self.second):
            raise ConfigurationError(f"{self.first!r} and {self.second!r} cannot be paired: {listed(wrong, limit=20)}")
        return [TyingPenalty(resolve(module, self.ties), strength=self.strength)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if 0 < self.strength < math.inf:  # the training data is loaded only now
            self.examples_scale = 1 / (self.examples or num_train_samples(trainer))
        super().on_train_start(trainer, pl_module)


def unpaired(model: nn.Module, first: str, second: str) -> list[str]:
    """List the weights of two modules without a partner of equal name and shape; empty if a name is no module.

    Example:
        >>> unpaired(nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4, bias=False)}), "a", "b")
        ["'a.bias' has no partner", "'a.weight' is (3, 2) and 'b.weight' (4, 2)"]
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if not {first, second} <= modules.keys():
        return []
    weights = {side: {clean_name(name): w for name, w in modules[side].named_parameters()} for side in (first, second)}
    for side, name in ((side, name) for side, names in weights.items() for name in names):
        check_shape(f"{side}.{name}", weights[side][name])
    ours, theirs = ({name: tuple(w.shape) for name, w in weights[side].items()} for side in (first, second))
    return [
        *(f"{f'{first}.{name}'!r} has no partner" for name in ours if name not in theirs),
        *(f"{f'{second}.{name}'!r} has no partner" for name in theirs if name not in ours),
        *(
            f"{f'{first}.{name}'!r} is {shape} and {f'{second}.{name}'!r} {theirs[name]}"
            for name, shape in ours.items()
            if name in theirs and shape != theirs[name]
        ),
    ]
