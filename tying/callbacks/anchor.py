"""Pull weights to their initial values, or to the values in a checkpoint."""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from tying.callbacks.base import counted, is_fresh_run, is_last_epoch, reject_copies
from tying.callbacks.conflicts import acting_on
from tying.callbacks.figures import log_figure
from tying.callbacks.importance import Importance, TrainingPath
from tying.callbacks.penalty import PenaltyCallback, Update, check_strength
from tying.errors import ConfigurationError, NonFiniteError, listed, nearest
from tying.files import read, saved_weights
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, loss_scale
from tying.mappings import from_mapping
from tying.selection.index import check_shape, clean_name
from tying.selection.resolve import parse_patterns, select
from tying.soft import TyingPenalty, anchored
from tying.soft.group_penalty import Rates
from tying.soft.importance import add_importances, layer_means
from tying.soft.plots import importance_figure
from tying.weights.derived import locate_parameters
from tying.weights.sharding import anywhere, full, local, shard_like

CONTEXT = "anchor (or 'initial', the weights at the start)"


class AnchorTying(PenaltyCallback):
    """Pull weights to an anchor by ``strength/2 Σ F (w − w⁰)²``, and other weights to zero by ``head_strength/2 ‖w‖²``.

    This is soft tying of each weight with a constant; :class:`tying.callbacks.penalty.PenaltyCallback` defines the
    updates and the logged values. Without ``importance``, F = 1, and checkpoints contain anchors that are initial
    weights, but not anchors from a file, which is read again.

    With ``importance``, one fit learns one task, and the pull keeps what earlier tasks need. At the end of a fit, the
    weights become the anchor, and their importance F for the task is added to the decayed importance for earlier ones.
    The next fit with the same callback pulls, or one with ``anchor="a.ckpt"``, the last checkpoint of this fit; without
    importances from an earlier task nothing is pulled. A fit that continues from that last checkpoint is a new task; a
    fit that continues from an earlier one goes on with its task. Checkpoints contain anchors, importances and, for
    ``Synaptic``, the path. The importance of each layer is logged, drawn as ``importance`` (see
    :func:`tying.callbacks.figures.log_figure`), and shown by ``tying inspect``.

    Args:
        parameters: patterns of names of the anchored weights, S; a leading ``!`` excludes.
        strength: α ≥ 0; ``inf`` with ``update="proximal"`` freezes the weights, of those with importances all entries
            with F > 0.
        head_strength: β ≥ 0, for the weights of ``head``.
        anchor: w⁰: ``"initial"``, the weights when training first starts; or the path of a checkpoint with the names
            of the model. With ``importance``: ``"initial"``, the weights at the end of the previous fit; or the path of
            a checkpoint whose fit measured importances, which are read, too.
        update: as for SoftTying.
        name: distinguishes several callbacks of this class.
        importance: how to measure F at the end of a fit: ``Fisher(batches)`` or ``Synaptic()``.
        head: patterns of names of the weights that ``head_strength`` pulls to zero; by default all trained weights that
            are not anchored. The authors pull the weights of new layers only, and neither their biases nor batch norms:
            ``head=["head.weight"]``.

    Raises:
        ConfigurationError: an argument is out of range, a pattern matches nothing, or an anchored weight is
            missing from the file or has another shape there; the file has no importances; the model does not fit the
            importance, or the importance is zero throughout.

    Example:
        >>> AnchorTying(["backbone.**"], strength=0.1, head_strength=0.01).anchor
        'initial'
        >>> from tying.callbacks import Fisher
        >>> AnchorTying(["**"], strength=100.0, importance=Fisher(batches=50)).importance.labels
        'sampled'

    Source: X. Li, Y. Grandvalet and F. Davoine, Explicit inductive bias for transfer learning with convolutional
    networks, 2018; J. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017.
    """

    takes_factors = True

    def __init__(
        self,
        parameters: list[str],
        strength: float,
        head_strength: float = 0.0,
        anchor: str = "initial",
        update: Update = "gradient",
        name: str | None = None,
        importance: Importance | None = None,
        head: list[str] | None = None,
    ) -> None:
        super().__init__(strength, update, None, name)
        check_strength("head_strength", head_strength, update)
        if not isinstance(anchor, str | PathLike):
            raise ConfigurationError(f"anchor must be 'initial' or the path of a file, not {type(anchor).__name__}")
        self.parameters, self.head_strength, self.anchor = parse_patterns(parameters), float(head_strength), anchor
        self.head = None if head is None else parse_patterns(head, "head")
        if head is not None and not head_strength:
            raise ConfigurationError(f"head={self.head} needs head_strength above 0, which pulls these weights to zero")
        self.importance: Importance | None = from_mapping(importance, Importance, "importance")
        if not isinstance(self.importance, Importance | None):
            raise ConfigurationError(f"importance must be Fisher(batches=...), Synaptic() or None, not {importance!r}")
        self._forget()

    def _forget(self) -> None:
        self._anchors: dict[str, Tensor] = {}
        self._importances: dict[str, Tensor] = {}  # summed over the tasks learnt so far
        self._tasks = 0
        self._restored_path: dict[str, dict[str, Tensor]] = {}
        self._path: TrainingPath | None = None
        self._saved = True  # whether a state with the latest importances has been saved
        self._weights: dict[str, nn.Parameter] = {}  # the anchored weights in training

    @override
    def state_dict(self) -> dict[str, Any]:
        # whole tensors, since the file of the first process holds them, and other numbers of processes read it
        state = super().state_dict()
        if self.importance is None:
            return state | ({"anchors": _whole(self._anchors)} if self.anchor == "initial" else {})
        self._saved = True
        path = {} if self._path is None else self._path.state_dict()
        return state | {
            "anchors": _whole(self._anchors),
            "importances": _whole(self._importances),
            "tasks": self._tasks,
            "path": {part: _whole(values) for part, values in path.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._forget()
        self._anchors = dict(state_dict.get("anchors", {}))
        self._importances = dict(state_dict.get("importances", {}))
        self._tasks = state_dict.get("tasks", 0)
        self._restored_path = dict(state_dict.get("path", {}))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._weights = {}
        if self.importance is not None:
            reject_copies(trainer, "AnchorTying with importance", "other weights than those measured", processes=False)
        if is_fresh_run(trainer, stage):
            self._restored_path, self._path = {}, None
            if self.importance is None:
                self._forget()

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        weights = select(model, self.parameters)
        if not self.head_strength:
            return weights
        if self.head is not None:
            others = select(model, self.head)
        else:
            others = {clean_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
        known = {*weights.values()}
        return weights | {name: weight for name, weight in others.items() if weight not in known}

    @override
    def describe(self, model: nn.Module) -> str:
        affected, anchored_weights = self.affected(model), select(model, self.parameters)
        head = [name for name in affected if name not in anchored_weights]
        parts = [f"{counted(len(anchored_weights), 'weight')}, {self._describe_strength()}, anchor {self.anchor}"]
        if head:
            parts.append(f"head of {counted(len(head), 'weight')}, strength {self.head_strength:g}")
        if self.importance is not None:
            means = layer_means(self._importances)
            pulled = describe_importance(means) if means else "nothing is pulled yet"
            parts.append(f"task {self._tasks + 1}: {pulled}")
        return "; ".join(parts)

    @override
    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        if not self.penalties:  # without a training run
            with acting_on(model, self, others):
                self._read_anchors(model)

    def _read_anchors(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Return anchors, importances and the number of tasks, of earlier training or from the file, if any.

        Raises:
            ConfigurationError: the file does not exist; weights are missing from it or have other shapes there (the
                message lists all); it has no importances; or a weight is tied to its source through a relation.
        """
        if self.anchor == "initial" or self._importances:
            return self._anchors, self._importances, self._tasks
        weights = select(model, self.parameters)
        relations = {name: place.relation for name, place in locate_parameters(model).items() if name in weights}
        if related := [name for name, relation in relations.items() if relation is not None and relation.steps]:
            raise ConfigurationError(
                f"{listed(related)}: tied through a relation: anchor the source of the tie instead"
            )
        if self.importance is None:
            return self._fitting(weights, saved_weights(self.anchor, CONTEXT)), {}, 0
        state = self._saved_state()
        anchors, importances = (self._fitting(weights, state[key]) for key in ("anchors", "importances"))
        return anchors, importances, state["tasks"]

    def _fitting(self, weights: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the saved tensor of each weight, on its device; raise a ConfigurationError if one does not fit."""
        if missing := [name for name in weights if name not in saved]:
            raise ConfigurationError(f"anchor: {self.anchor} lacks {listed(missing)}.{nearest(missing[0], saved)}")
        if wrong := [
            f"{name!r} is {tuple(saved[name].shape)} there and {tuple(weight.shape)} here"
            for name, weight in weights.items()
            if saved[name].shape != weight.shape
        ]:
            raise ConfigurationError(f"anchor: {self.anchor}: {listed(wrong)}")
        return {name: saved[name].to(weight.device) for name, weight in weights.items()}

    def _saved_state(self) -> dict[str, Any]:
        """Return the state of the AnchorTying of this name, or of the only one, in the checkpoint ``anchor``."""
        content = read(self.anchor, CONTEXT)
        callbacks = content.get("callbacks", {}) if isinstance(content, dict) else {}
        states = {
            key: state for key, state in callbacks.items() if isinstance(state, dict) and state.get("importances")
        }
        if self.final_state_key not in states and len(states) != 1:
            raise ConfigurationError(
                f"anchor: {self.anchor} has no importances of {self.label}: they are measured when a fit ends. Train "
                "the earlier task to its end with this callback and anchor='initial', and give its last checkpoint"
            )
        return dict(states.get(self.final_state_key) or next(iter(states.values())))

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        weights = self._weights = select(module, self.parameters)
        for name, weight in self.affected(module).items():
            check_shape(name, weight)
        anchors, importances, self._tasks = self._read_anchors(module)
        self._anchors, self._importances = (
            {name: shard_like(value, weights[name]) if name in weights else value for name, value in values.items()}
            for values in (anchors, importances)
        )
        if self.importance is not None:
            self._begin_task(trainer)
        elif not self._anchors:
            self._anchors = {name: weight.detach().clone() for name, weight in weights.items()}
        self._anchored: TyingPenalty | None = None
        self._steps_checked = 0  # steps at the end of the last epoch in which some anchored weight was trained
        return self._penalties_of(module)

    def _penalties_of(self, module: nn.Module) -> list[TyingPenalty]:
        """Return the penalties on the anchored weights, if they have anchors, and on those of the head."""
        weights, penalties = self._weights, []
        if self.importance is None or self._importances:
            if missing := weights.keys() - self._anchors.keys():
                raise ConfigurationError(f"the checkpoint has no anchor of {listed(sorted(missing))}")
            self._anchored = anchored(weights, self._anchors, self.strength, self._importances or None)
            penalties.append(self._anchored)
        if head := {name: weight for name, weight in self.affected(module).items() if name not in weights}:
            penalties.append(
                anchored(head, {name: torch.zeros_like(w) for name, w in head.items()}, self.head_strength)
            )
        return penalties

    @override
    def follow_names(self, model: nn.Module) -> None:
        if not self._weights:  # they are selected next
            return
        current = {weight: name for name, weight in select(model, self.parameters).items()}
        renamed = {name: current[weight] for name, weight in self._weights.items() if weight in current}
        self._weights = {renamed[name]: self._weights[name] for name in renamed}
        self._anchors, self._importances = (
            {renamed[name]: values[name] for name in renamed if name in values}
            for values in (self._anchors, self._importances)
        )
        if self._path is not None:
            self._path.rename(renamed)
        self.penalties = self._penalties_of(model)

    def _begin_task(self, trainer: pl.Trainer) -> None:
        """Follow the path of the weights, if the importance needs it, from its beginning or from a checkpoint on."""
        assert self.importance is not None
        if complex_weights := [name for name, weight in self._weights.items() if weight.is_complex()]:
            raise ConfigurationError(
                f"{complex_weights[0]!r} is complex, and importances need real weights: exclude it"
            )
        if self.importance.follows_path:
            if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
                raise ConfigurationError(
                    f"{type(self.importance).__name__} needs one gradient for each step, and LBFGS computes several: "
                    "use Fisher, or another optimizer"
                )
            self._path = self._path or TrainingPath(self._weights, self._restored_path)
        self._checked, self._ended = False, False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.importance is not None and not self._checked:  # rather than at the end of training
            self._checked = True
            with acting_on(pl_module, self, callbacks_of(trainer)):
                self.importance.check_batch(pl_module, batch)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._path is not None:  # before the penalty's gradients are added
            optimized = {p for group in optimizer.param_groups for p in group["params"]}
            self._path.before_step(optimized, loss_scale(trainer, optimizer))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_step(self, rates: Rates) -> None:
        if self._path is not None:
            self._path.after_step()

    @override
    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        penalty = self._anchored
        frozen = penalty is None or not any(w.requires_grad for group in penalty.groups for w in group.parameters)
        if (
            penalty is not None
            and self._steps_checked == 0 < self.steps_taken
            and not frozen
            and 0 < self.strength < math.inf
            and float(penalty()) == 0
        ):
            warnings.warn(
                f"AnchorTying: after {self.steps_taken} steps every anchored weight is still exactly its anchor. Does "
                "an optimizer train them, with a learning rate above 0?",
                stacklevel=2,
            )
        self._steps_checked = 0 if frozen else self.steps_taken
        if self.importance is not None and is_last_epoch(trainer):
            self._end_task(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.importance is not None and not self._ended:
            warnings.warn(
                f"{self.label}: training stopped before the end of its last epoch: the importances are measured now, "
                "and its checkpoints lack them; trainer.save_checkpoint writes one with them",
                stacklevel=2,
            )
            self._end_task(trainer, pl_module)
            self._saved = True  # it has been said

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if trainer.checkpoint_callbacks and not (self._saved or trainer.fast_dev_run):  # type: ignore[attr-defined]
            warnings.warn(
                f"{self.label}: no checkpoint has the importances of this fit, which were measured at the end of its "
                "last epoch, after the last checkpoint: add ModelCheckpoint(save_on_train_epoch_end=True), or call "
                "trainer.save_checkpoint now",
                stacklevel=2,
            )
            self._saved = True

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure the importance of the weights for the task, and anchor them."""
        assert self.importance is not None
        with acting_on(module, self, callbacks_of(trainer)):
            importances = self.importance.measure(trainer, module, self._weights, self._path)
            shards = [local(importance) for importance in importances.values()]
            if anywhere(not all(shard.isfinite().all() for shard in shards), module.device):
                raise NonFiniteError("the importance of some weight is NaN or infinite")
            if not anywhere(any(shard.any() for shard in shards), module.device):
                raise ConfigurationError(
                    f"the importance of all of {listed(importances)} is zero throughout, and would never pull: does "
                    "training change them, and do the model's logits depend on them?"
                )
        self._importances = add_importances(importances, self._importances, self.importance.decay)
        self._anchors = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._tasks, self._path, self._restored_path = self._tasks + 1, None, {}
        self._ended, self._saved = True, False
        means, after = layer_means(self._importances), f"after {self._tasks} task{'s' * (self._tasks > 1)}"
        pl.utilities.rank_zero_info(f"{self.label}: {after}: {describe_importance(means)}")
        log_figure(trainer, partial(importance_figure, means, after), "_".join(filter(None, ("importance", self.name))))

    def layer_importances(self, states: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean importance of each layer's weights.

        Args:
            states: the states of callbacks in a checkpoint; without one of this callback, its own importances or those
                of the file ``anchor`` are used.
        """
        importances = states.get(self.final_state_key, {}).get("importances") or self._importances
        if not importances and self.importance is not None and self.anchor != "initial":
            importances = self._saved_state()["importances"]
        return layer_means(importances)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors in place of sharded ones."""
    return {name: full(tensor) for name, tensor in tensors.items()}


def describe_importance(means: Mapping[str, float]) -> str:
    """Return the mean importance of each layer's weights as text, the most important layers first."""
    ranked = sorted(means.items(), key=lambda item: -item[1])
    return f"mean importance by layer: {listed(f'{layer} {mean:.3g}' for layer, mean in ranked)}"
