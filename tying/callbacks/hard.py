"""Weights that are one, of low rank, mixed or generated, in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.base import ChangesModel, TyingCallback
from tying.errors import ConfigurationError, listed
from tying.hard import generate_weights, lower_rank, plot_similarity, share_templates, tie, tied
from tying.hard.applying import are_parametrized
from tying.hard.guard import record_of, shared_in
from tying.hard.states import are_alike
from tying.selection import resolve
from tying.soft import gap
from tying.ties import Tie, TiedGroup


class HardTying(TyingCallback, ChangesModel):
    """Make tied weights one parameter, before the optimizers are made; see :func:`tying.hard.tie`.

    Args:
        ties: :class:`tying.Tie`, or strings ``"source ~ target | relation"``.
        init: what the one weight is: that of the source, or the mean.
        name: tells several of a class apart.

    Raises:
        ConfigurationError: the ties do not fit the model, a callback that averages weights stands before this one, the
            strategy splits weights, or an optimizer does not hold the tied weights.

    Example:
        >>> HardTying(ties=["encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o"]).init
        'source'
    """

    def __init__(
        self, ties: Sequence[Tie | str], init: Literal["source", "mean"] = "source", name: str | None = None
    ) -> None:
        super().__init__(ties, name)
        if init not in ("source", "mean"):
            raise ConfigurationError(f"init is 'source' or 'mean', not {init!r}")
        self.init = init
        self._groups: list[TiedGroup] = []

    @property
    @override
    def groups(self) -> list[TiedGroup]:
        return self._groups

    @override
    def check(self, groups: Sequence[TiedGroup]) -> None:
        for group in groups:
            if not are_alike(group.parameters):
                raise ConfigurationError(
                    f"{listed(group.names)} cannot be one weight: they differ in requires_grad, dtype or device"
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tied(pl_module)
        trained = [id(p) for optimizer in trainer.optimizers for held in optimizer.param_groups for p in held["params"]]
        for group in self._groups:
            weight = group.parameters[0]
            if trained.count(id(weight)) > 1:
                raise ConfigurationError(
                    f"{group.names[0]!r} stands {trained.count(id(weight))} times in the optimizers, and would be "
                    "stepped and decayed as often: build them from self.parameters(), which yields each weight once"
                )
            if weight.requires_grad and trained and self._are_older(trainer, pl_module, group):
                raise ConfigurationError(
                    f"an optimizer holds tensors of the shape of {group.names[0]!r} that are not the model's: it was "
                    "made before the weights became one. Make it in configure_optimizers"
                )

    def _are_older(self, trainer: pl.Trainer, model: nn.Module, group: TiedGroup) -> bool:
        own = {id(parameter) for parameter in model.parameters()}
        shapes = {relation(group.parameters[0]).shape for relation in group.relations}
        held = [p for optimizer in trainer.optimizers for one in optimizer.param_groups for p in one["params"]]
        return any(id(parameter) not in own and parameter.shape in shapes for parameter in held)

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return record_of(model).ties.keys() >= {*self.ties}

    @override
    def apply(self, model: nn.Module) -> list[TiedGroup]:
        gaps = [] if shared_in(model) else [gap(group.tensors()) for group in resolve(model, self.ties)]
        if differing := sum(apart > 0 for apart in gaps):
            kept = "that of its source" if self.init == "source" else "their mean"
            rank_zero_info(
                f"HardTying: {len(gaps)} groups are one weight each, {kept}; as initialised, the members of "
                f"{differing} differed (largest gap {max(gaps):.4f})"
            )
        self._groups = tie(model, self.ties, self.init)
        return self._groups


class Parametrizing(ChangesModel):
    """A callback that lets weights of a model be computed; which, and how, its subclasses say.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
    """

    def __init__(self, parameters: list[str]) -> None:
        super().__init__()
        self.parameters = parameters

    def change(self, model: nn.Module) -> list[str]:
        """Parametrize the weights; return their names."""
        raise NotImplementedError

    @property
    def _asked(self) -> str:
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({public})"

    @override
    def is_applied(self, model: nn.Module) -> bool:
        return are_parametrized(model, model.__dict__.get("_computed_by", {}).get(self._asked, []))

    @override
    def apply(self, model: nn.Module) -> list[str]:
        record: dict[str, list[str]] = model.__dict__.setdefault("_computed_by", {})
        if not self.is_applied(model):
            record[self._asked] = self.change(model)
        return record[self._asked]


class LowRankWeights(Parametrizing):
    """Train weights of lower rank; see :func:`tying.hard.lower_rank`.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
        rank: of each weight.
        diagonal: add a diagonal; for square weights.

    Example:
        >>> LowRankWeights(["network.layer3.*.branch.conv2.weight"], rank=8).rank
        8
    """

    def __init__(self, parameters: list[str], rank: int, diagonal: bool = False) -> None:
        super().__init__(parameters)
        self.rank, self.diagonal = rank, diagonal

    @override
    def change(self, model: nn.Module) -> list[str]:
        return lower_rank(model, self.parameters, self.rank, self.diagonal)


class TemplateWeights(Parametrizing):
    """Train weights that are mixtures of shared templates; see :func:`tying.hard.share_templates`.

    When training ends, the similarity of the layers is plotted as ``layer_similarity.png`` in the logger's directory.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
        templates: how many; for each shape of weights.

    Example:
        >>> TemplateWeights(["network.layer3.*.branch.conv2.weight"], templates=2).templates
        2
    """

    def __init__(self, parameters: list[str], templates: int) -> None:
        super().__init__(parameters)
        self.templates = templates

    @override
    def change(self, model: nn.Module) -> list[str]:
        return [*share_templates(model, self.parameters, self.templates)]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: the processes agree on it
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped
            plot_similarity(pl_module, folder / "layer_similarity.png")


class GeneratedWeights(Parametrizing):
    """Train convolution kernels that a small network generates; see :func:`tying.hard.generate_weights`.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out.
        embedding: size of the embedding of a basic kernel.
        in_channels: of a basic kernel.
        out_channels: of a basic kernel.

    Example:
        >>> GeneratedWeights(["network.layer*.conv*.weight"]).embedding
        64
    """

    def __init__(
        self, parameters: list[str], embedding: int = 64, in_channels: int = 16, out_channels: int = 16
    ) -> None:
        super().__init__(parameters)
        self.embedding = embedding
        self.in_channels, self.out_channels = in_channels, out_channels

    @override
    def change(self, model: nn.Module) -> list[str]:
        return generate_weights(model, self.parameters, self.embedding, self.in_channels, self.out_channels)
