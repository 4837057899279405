"""Trained quantisation, in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import Choosing, callbacks_of, held_by, reject_copies, warn_if_too_late
from tying.callbacks.finite_check import Watching, kept_for
from tying.callbacks.transform import arguments_of
from tying.errors import ConfigurationError
from tying.hashing.apply import table_names
from tying.hashing.codebook import check_clusterable, cluster_weight, put_codebook, uses_of
from tying.hashing.packing import clustered, clustered_size
from tying.selection.resolve import select
from tying.weights.derived import locate_parameters


@dataclass(frozen=True)
class BeforeEpoch:
    """Tells whether an epoch is before another: when Lightning's ``ModelPruning`` may still prune.

    Args:
        epoch: the first one for which the answer is no.

    Example:
        >>> [BeforeEpoch(2)(epoch) for epoch in range(4)]
        [True, True, False, False]
    """

    epoch: int

    def __call__(self, epoch: int) -> bool:
        """Return the answer."""
        return epoch < self.epoch


class WeightClustering(Watching, Choosing):
    """Let weights be entries of a codebook each, from an epoch on; see :func:`tying.hashing.cluster_weight`.

    Assignments are frozen; the codebook is trained, by the sum of its weights' gradients, or their mean. Zeros stay
    zeros: of Lightning's ``ModelPruning``, say, which must have ended by then (``apply_pruning=BeforeEpoch(...)``).
    Optimizers take the codebooks in the weights' places, and begin anew with them. Logs ``tying/compression``: bits of
    the dense weights over those of codebooks, indices and 5-bit gaps; see :func:`tying.hashing.save_packed`.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out. Those of fewer than two dimensions are skipped.
        clusters: entries of each codebook.
        start_epoch: at whose start weights are clustered.
        init: where k-means begins: ``"linear"``, ``"density"`` or ``"forgy"``.
        gradient: of an entry: the ``"sum"`` of those of its weights, as in the paper; or their ``"mean"``, which moves
            it as far as they would go together: with plain SGD at the rate of the dense weights the sum would not do.

    Raises:
        ConfigurationError: an argument is out of range, there are several processes, a callback averages weights, or a
            weight is tied or computed, or has fewer entries than clusters.

    Example:
        >>> WeightClustering(["network.*.weight"], clusters=32, start_epoch=10).clusters
        32
    """

    def __init__(
        self,
        parameters: list[str],
        clusters: int = 32,
        start_epoch: int = 0,
        init: Literal["linear", "density", "forgy"] = "linear",
        gradient: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ConfigurationError(f"clusters must be 1 or more, not {clusters}")
        if start_epoch < 0:
            raise ConfigurationError(f"start_epoch must be 0 or more, not {start_epoch}")
        if init not in ("linear", "density", "forgy"):
            raise ConfigurationError(f"init is 'linear', 'density' or 'forgy', not {init!r}")
        if gradient not in ("sum", "mean"):
            raise ConfigurationError(f"gradient is 'sum' or 'mean', not {gradient!r}")
        self.parameters, self.clusters, self.start_epoch, self.init = parameters, clusters, start_epoch, init
        self.gradient = gradient
        self.names: list[str] = []
        self._hook: RemovableHandle | None = None
        self._compression: float | None = None
        self._uses: list[tuple[Tensor, Tensor]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        reject_copies(trainer, "WeightClustering", "the dense weights")
        _call_configure_model(trainer)  # layers that it makes must be there; Lightning calls it again
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelPruning):
                prunes = callback._apply_pruning
                if prunes(self.start_epoch) if callable(prunes) else prunes:
                    raise ConfigurationError(
                        f"ModelPruning still prunes in epoch {self.start_epoch}, when weights are codebooks: give it "
                        f"apply_pruning=BeforeEpoch({self.start_epoch})"
                    )
        self.names, self._compression, self._uses = self._find(pl_module), None, []
        self._hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # torch's
            partial(_take_codebooks, self.names)
        )

    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Give a model the codebooks that a state dict has, before it is loaded."""
        _take_codebooks(self._find(model), model, state_dict, "")

    def _find(self, model: nn.Module) -> list[str]:
        """Return the names of the weights to cluster; once they are, the patterns would not match them."""
        record: dict[str, list[str]] = model.__dict__.setdefault("_clustered_by", {})
        if arguments_of(self) not in record:
            names = [name for name, weight in select(model, self.parameters).items() if weight.ndim >= 2]
            if not names:
                raise ConfigurationError(f"parameters {self.parameters} match nothing of two dimensions or more")
            places = locate_parameters(model)
            for name in names:
                check_clusterable(name, places, self.clusters)
            record[arguments_of(self)] = names
        return record[arguments_of(self)]

    @override
    def choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        names = self._find(model)
        named = ((name.removesuffix("_orig"), weight) for name, weight in model.named_parameters())  # what is pruned
        return {name: weight for name, weight in named if name in names}

    @override
    def refuse(self, model: nn.Module, held: Iterable[tuple[pl.Callback, nn.Parameter]]) -> None:
        own = {id(weight): name for name, weight in self.choose(model).items()}
        for other, weight in held:
            if other is not self and id(weight) in own:
                raise ConfigurationError(
                    f"{own[id(weight)]!r} is tied by {type(other).__name__}: it cannot be clustered too"
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if searching := [type(optimizer).__name__ for optimizer in trainer.optimizers if isinstance(optimizer, LBFGS)]:
            raise ConfigurationError(f"{searching[0]} keeps its weights to itself: it cannot take codebooks instead")
        self.refuse(pl_module, ((one, weight) for one in callbacks_of(trainer) for weight in held_by(one)))
        if not self._is_done(pl_module):
            warn_if_too_late(trainer, "WeightClustering", self.start_epoch)
        if trainer.global_step and any(isinstance(callback, ModelPruning) for callback in callbacks_of(trainer)):
            for name in self.names:
                _prune_again(pl_module, name)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run that goes on from the last step of an epoch does not start the next one
        if batch_idx > 0 or trainer.current_epoch < self.start_epoch or self._is_done(pl_module):
            return
        for name in self.names:
            module, _, attribute = name.rpartition(".")
            owner = pl_module.get_submodule(module)
            weight = owner._parameters.get(attribute, owner._parameters.get(f"{attribute}_orig"))
            table = cluster_weight(pl_module, name, self.clusters, self.init)
            for optimizer in trainer.optimizers:
                if weight is not None:
                    optimizer.state.pop(weight, None)
                for group in optimizer.param_groups:
                    group["params"] = [table if one is weight else one for one in group["params"]]
        self.rewatch()
        rank_zero_info(
            f"WeightClustering: {len(self.names)} weights clustered, {self._rate(pl_module):.1f} times smaller"
        )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.gradient == "mean":
            if not self._uses and self._is_done(pl_module):
                done = clustered(pl_module)
                self._uses = [(table, uses_of(virtual)) for virtual, table in (done[name] for name in self.names)]
            stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
            for table, uses in self._uses:
                if table.grad is not None and id(table) in stepped:
                    table.grad /= uses

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_done(pl_module):
            pl_module.log("tying/compression", self._rate(pl_module))

    @override
    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return kept_for(model, self.names)

    def _is_done(self, model: nn.Module) -> bool:
        return clustered(model).keys() >= {*self.names}

    def _rate(self, model: nn.Module) -> float:
        if self._compression is None:  # it stays: assignments are frozen
            dense, small = clustered_size(model, self.names)
            self._compression = dense / small
        return self._compression


def _take_codebooks(
    names: Sequence[str], model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give a model the codebooks that a state dict has, before their values are loaded."""
    done = clustered(model)
    places = {module: f"{prefix}{place}." if place else prefix for place, module in model.named_modules()}
    for name in names:
        path, _dot, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        table, virtual = (places[owner] + own for own in table_names(type(owner), attribute))
        if f"{virtual}.drawn" in state_dict and name not in done:
            nowhere = torch.zeros(owner.get_parameter(attribute).numel()).long()
            put_codebook(owner, attribute, nowhere, state_dict[table])


def _prune_again(model: nn.Module, name: str) -> None:
    """Hold a weight's zeros again: Lightning's checkpoints keep them, but not the mask that holds them at zero."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    weight = owner._parameters.get(attribute)
    if weight is not None and bool((weight == 0).any()):
        prune.custom_from_mask(owner, attribute, (weight != 0).to(weight.dtype))  # type: ignore[no-untyped-call]  # torch's
