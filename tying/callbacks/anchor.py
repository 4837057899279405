"""Weights that are pulled to where they once were."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.callbacks.base import Choosing
from tying.callbacks.penalty import Pull, Pulling, Update
from tying.errors import ConfigurationError, listed, nearest
from tying.files import saved_weights
from tying.selection.index import clean_name
from tying.selection.resolve import select
from tying.soft import anchored
from tying.weights.derived import locate_parameters


class AnchorTying(Pulling, Choosing):
    """Pull weights to an anchor, ``strength/2 ‖w − w⁰‖²``, and all others to zero, ``head_strength/2 ‖w‖²``.

    This is soft tying of each weight with a constant; :class:`tying.callbacks.penalty.Pulling` says what each update
    does, and what is logged. An anchor of initial weights is kept in checkpoints; one from a file is read again.

    Args:
        parameters: patterns of names of the anchored weights, S; a leading ``!`` leaves out.
        strength: α ≥ 0; ``inf`` with ``update="proximal"`` freezes them.
        head_strength: β ≥ 0, of all other weights that are trained: a new head.
        anchor: w⁰: ``"initial"``, the weights as they are when training first starts; or a checkpoint's path, whose
            names are those of the model.
        update: as of SoftTying.
        name: tells several of a class apart.

    Raises:
        ConfigurationError: an argument is out of range, a pattern matches nothing, or the file lacks an anchored
            weight, or has it in another shape.

    Example:
        >>> AnchorTying(["backbone.**"], strength=0.1, head_strength=0.01).anchor
        'initial'

    Source: X. Li, Y. Grandvalet and F. Davoine, Explicit inductive bias for transfer learning with convolutional
    networks, 2018.
    """

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
        self._check_strength("head_strength", head_strength, update)
        self.parameters, self.head_strength, self.anchor = parameters, float(head_strength), anchor
        self._anchors: dict[str, Tensor] = {}
        self._begun = 0  # steps at the last look

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"anchors": self._anchors} if self.anchor == "initial" else {}
        return {**super().state_dict(), **kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._anchors = dict(state_dict.get("anchors", {}))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:  # a fresh run; a checkpoint's anchors are restored after this
            self._anchors = {}

    @override
    def choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = select(model, self.parameters)
        if self.anchor != "initial":
            places = locate_parameters(model)
            relations = {name: places[name].relation for name in found if name in places}
            if other := [name for name, relation in relations.items() if relation is not None and relation.steps]:
                raise ConfigurationError(
                    f"{listed(other)}: tied through a relation; anchor the source of the tie instead"
                )
            self._anchors = anchors_of(Path(self.anchor), found)
        return found

    @override
    def find_pulls(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[Pull]:
        found = self.choose(model)
        if not self._anchors:
            self._anchors = {name: weight.detach().clone() for name, weight in found.items()}
        elif missing := found.keys() - self._anchors.keys():
            raise ConfigurationError(f"the checkpoint has no anchor of {listed(sorted(missing))}")
        pulls = [Pull(anchored(found, self._anchors), self.strength)]
        if self.head_strength:
            chosen = {id(weight) for weight in found.values()}
            every = {clean_name(name): weight for name, weight in model.named_parameters()}
            head = {name: w for name, w in every.items() if w.requires_grad and id(w) not in chosen}
            zeros = {name: torch.zeros_like(weight) for name, weight in head.items()}
            pulls.append(Pull(anchored(head, zeros), self.head_strength))
        self._begun = 0
        return pulls

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = sum(self._steps.values())
        frozen = not any(w.requires_grad for pull in self._pulls[:1] for g in pull.penalty.groups for w in g.parameters)
        if self._begun == 0 < steps and self.strength and self.strength != float("inf") and not frozen:
            with torch.no_grad():
                if float(self._pulls[0].penalty()) == 0:
                    warnings.warn(
                        f"AnchorTying: after {steps} steps every anchored weight is still exactly its anchor. Does an "
                        "optimizer train them, with a learning rate above 0?",
                        stacklevel=2,
                    )
        self._begun = 0 if frozen else steps


def anchors_of(path: Path, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return what a checkpoint has in the places of weights.

    Args:
        path: of a checkpoint of Lightning's, or of a state dict.
        weights: by name.

    Raises:
        ConfigurationError: it is no such file, lacks weights, or has them in other shapes; all are told.
    """
    held = saved_weights(path, "anchor (or 'initial', the weights at the start)")
    if missing := [name for name in weights if name not in held]:
        raise ConfigurationError(f"anchor: {path} lacks {listed(missing)}.{nearest(missing[0], held)}")
    if wrong := [name for name, weight in weights.items() if held[name].shape != weight.shape]:
        told = (f"{name!r} is {tuple(held[name].shape)} there and {tuple(weights[name].shape)} here" for name in wrong)
        raise ConfigurationError(f"anchor: {path}: {listed(told)}")
    return {name: held[name].to(weight) for name, weight in weights.items()}
