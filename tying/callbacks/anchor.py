"""Pull weights to their initial values, or to the values in a checkpoint."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import is_fresh_run
from tying.callbacks.conflicts import acting_on
from tying.callbacks.penalty import PenaltyCallback, Update, check_strength
from tying.errors import ConfigurationError, listed, nearest
from tying.files import saved_weights
from tying.lightning_namespace import pl
from tying.selection.index import check_shape, clean_name
from tying.selection.resolve import parse_patterns, select
from tying.soft import TyingPenalty, anchored
from tying.weights.derived import locate_parameters


class AnchorTying(PenaltyCallback):
    """Pull weights to an anchor by ``strength/2 ‖w − w⁰‖²``, and all others to zero by ``head_strength/2 ‖w‖²``.

    This is soft tying of each weight with a constant; :class:`tying.callbacks.penalty.PenaltyCallback` defines the
    updates and the logged values. Checkpoints contain anchors that are initial weights, but not anchors from a file,
    which is read again.

    Args:
        parameters: patterns of names of the anchored weights, S; a leading ``!`` excludes.
        strength: α ≥ 0; ``inf`` with ``update="proximal"`` freezes the weights.
        head_strength: β ≥ 0, for all other trained weights, for example a new head.
        anchor: w⁰: ``"initial"``, the weights when training first starts; or the path of a checkpoint with the names
            of the model.
        update: as for SoftTying.
        name: distinguishes several callbacks of this class.

    Raises:
        ConfigurationError: an argument is out of range, a pattern matches nothing, or an anchored weight is
            missing from the file or has another shape there.

    Example:
        >>> AnchorTying(["backbone.**"], strength=0.1, head_strength=0.01).anchor
        'initial'

    Source: X. Li, Y. Grandvalet and F. Davoine, Explicit inductive bias for transfer learning with convolutional
    networks, 2018.
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
    ) -> None:
        super().__init__(strength, update, None, name)
        check_strength("head_strength", head_strength, update)
        self.parameters, self.head_strength, self.anchor = parse_patterns(parameters), float(head_strength), anchor
        self._anchors: dict[str, Tensor] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"anchors": self._anchors} if self.anchor == "initial" else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._anchors = dict(state_dict.get("anchors", {}))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if is_fresh_run(trainer, stage):
            self._anchors = {}

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        weights = select(model, self.parameters)
        known = {*weights.values()}
        head = {clean_name(name): w for name, w in model.named_parameters() if w.requires_grad and w not in known}
        return weights | head if self.head_strength else weights

    @override
    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        if not self.penalties:  # without a training run
            with acting_on(model, self, others):
                self._read_anchors(model)

    def _read_anchors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the anchors from the file or from the checkpoint that training resumes from, if any.

        Raises:
            ConfigurationError: the file does not exist; weights are missing from it or have other shapes there (the
                message lists all); or a weight is tied to its source through a relation.
        """
        if self.anchor == "initial":
            return self._anchors
        weights = select(model, self.parameters)
        relations = {name: place.relation for name, place in locate_parameters(model).items() if name in weights}
        if related := [name for name, relation in relations.items() if relation is not None and relation.steps]:
            raise ConfigurationError(
                f"{listed(related)}: tied through a relation; anchor the source of the tie instead"
            )
        saved = saved_weights(self.anchor, "anchor (or 'initial', the weights at the start)")
        if missing := [name for name in weights if name not in saved]:
            raise ConfigurationError(f"anchor: {self.anchor} lacks {listed(missing)}.{nearest(missing[0], saved)}")
        if wrong := [
            f"{name!r} is {tuple(saved[name].shape)} there and {tuple(weight.shape)} here"
            for name, weight in weights.items()
            if saved[name].shape != weight.shape
        ]:
            raise ConfigurationError(f"anchor: {self.anchor}: {listed(wrong)}")
        return {name: saved[name].to(weight) for name, weight in weights.items()}

    @override
    def build_penalties(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[TyingPenalty]:
        weights = select(module, self.parameters)
        self._anchors = self._read_anchors(module) or {name: w.detach().clone() for name, w in weights.items()}
        if missing := weights.keys() - self._anchors.keys():
            raise ConfigurationError(f"the checkpoint has no anchor of {listed(sorted(missing))}")
        self._steps_checked = 0  # steps at the end of the last epoch in which some anchored weight was trained
        for name, weight in self.affected(module).items():
            check_shape(name, weight)
        penalties = [anchored(weights, self._anchors, self.strength)]
        if head := {name: weight for name, weight in self.affected(module).items() if name not in weights}:
            penalties.append(
                anchored(head, {name: torch.zeros_like(w) for name, w in head.items()}, self.head_strength)
            )
        return penalties

    @override
    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        penalty, *_ = self.penalties
        frozen = not any(weight.requires_grad for group in penalty.groups for weight in group.parameters)
        if (
            self._steps_checked == 0 < self.steps_taken
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
