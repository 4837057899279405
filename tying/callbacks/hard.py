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
from tying.errors import ConfigurationError
from tying.hard import audit, generate_weights, lower_rank, plot_similarity, share_templates, tie, tied
from tying.hard.applying import are_parametrized
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
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if problems := audit(pl_module, trainer.optimizers).problems:
            raise ConfigurationError("; ".join(problems))

    @override
    def apply(self, model: nn.Module) -> list[TiedGroup]:
        gaps = [gap(group.tensors()) for group in resolve(model, self.ties)] if not tied(model) else []
        if differing := sum(apart > 0 for apart in gaps):
            kept = "those of the source are" if self.init == "source" else "their mean is"
            rank_zero_info(
                f"HardTying: the weights of {differing} of {len(gaps)} groups differed before they became one "
                f"(largest gap {max(gaps):.4f}); {kept} kept"
            )
        self._groups = tie(model, self.ties, self.init)
        return self._groups


class LowRankWeights(ChangesModel):
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
        super().__init__()
        self.parameters, self.rank, self.diagonal = parameters, rank, diagonal
        self._names: list[str] = []

    @override
    def apply(self, model: nn.Module) -> list[str]:
        if not are_parametrized(model, self._names):
            self._names = lower_rank(model, self.parameters, self.rank, self.diagonal)
        return self._names


class TemplateWeights(ChangesModel):
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
        super().__init__()
        self.parameters, self.templates = parameters, templates
        self._names: list[str] = []

    @override
    def apply(self, model: nn.Module) -> list[str]:
        if not are_parametrized(model, self._names):
            self._names = [*share_templates(model, self.parameters, self.templates)]
        return self._names

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: the processes agree on it
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # untyped
            plot_similarity(pl_module, folder / "layer_similarity.png")


class GeneratedWeights(ChangesModel):
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
        super().__init__()
        self.parameters, self.embedding = parameters, embedding
        self.in_channels, self.out_channels = in_channels, out_channels
        self._names: list[str] = []

    @override
    def apply(self, model: nn.Module) -> list[str]:
        if not are_parametrized(model, self._names):
            arguments = self.embedding, self.in_channels, self.out_channels
            self._names = generate_weights(model, self.parameters, *arguments)
        return self._names
