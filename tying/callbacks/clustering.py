"""Trained quantisation, in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import callbacks_of, refuse_copies
from tying.errors import ConfigurationError
from tying.hashing.codebook import cluster_weight, put_codebook
from tying.hashing.packing import clustered_size
from tying.selection import select

CLUSTERED = "_clustered"  # an attribute of models: the names of their clustered weights


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


class WeightClustering(pl.Callback):
    """Let weights be entries of a codebook each, from an epoch on; see :func:`tying.hashing.cluster_weight`.

    Assignments are frozen; the codebook is trained, by the sum of its weights' gradients. Zeros stay zeros: of
    Lightning's ``ModelPruning``, say, which must have ended by then (``apply_pruning=BeforeEpoch(...)``).
    Optimizers take the codebooks in the weights' places, and begin anew with them. Logs ``tying/compression``: bits of
    the dense weights over those of codebooks, indices and 5-bit gaps; see :func:`tying.hashing.save_packed`.

    Args:
        parameters: patterns of names; a leading ``!`` leaves out. Those of fewer than two dimensions are skipped.
        clusters: entries of each codebook.
        start_epoch: at whose start weights are clustered.
        init: where k-means begins: ``"linear"``, ``"density"`` or ``"forgy"``.

    Raises:
        ConfigurationError: an argument is out of range, there are several processes, a callback averages weights, or a
            weight has fewer entries than clusters.

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
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ConfigurationError(f"clusters must be 1 or more, not {clusters}")
        if start_epoch < 0:
            raise ConfigurationError(f"start_epoch must be 0 or more, not {start_epoch}")
        if init not in ("linear", "density", "forgy"):
            raise ConfigurationError(f"init is 'linear', 'density' or 'forgy', not {init!r}")
        self.parameters, self.clusters, self.start_epoch, self.init = parameters, clusters, start_epoch, init
        self.names: list[str] = []
        self._hook: RemovableHandle | None = None
        self._compression: float | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_copies(trainer, "WeightClustering", "the dense weights")
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelPruning):
                prunes = callback._apply_pruning
                if prunes(self.start_epoch) if callable(prunes) else prunes:
                    raise ConfigurationError(
                        f"ModelPruning still prunes in epoch {self.start_epoch}, when weights are codebooks: give it "
                        f"apply_pruning=BeforeEpoch({self.start_epoch})"
                    )
        self.names, self._compression = pl_module.__dict__.get(CLUSTERED, []), None
        if self.names:
            return
        found = select(pl_module, self.parameters)
        self.names = [name for name, weight in found.items() if weight.ndim >= 2]
        if not self.names:
            raise ConfigurationError(f"parameters {self.parameters} match nothing of two dimensions or more")
        for name in self.names:
            if found[name].numel() < self.clusters:
                raise ConfigurationError(f"{name!r}: {self.clusters} clusters of {found[name].numel()} weights")
        self._hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # torch's
            partial(_take_codebooks, self.names)
        )

    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Give a model the codebooks that a state dict has, before it is loaded."""
        found = select(model, self.parameters)
        _take_codebooks([name for name, weight in found.items() if weight.ndim >= 2], model, state_dict, "")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if CLUSTERED in pl_module.__dict__ or trainer.current_epoch < self.start_epoch:
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
        pl_module.__dict__[CLUSTERED] = self.names
        rate = self._rate(pl_module)
        rank_zero_info(f"WeightClustering: {len(self.names)} weights clustered, {rate:.1f} times smaller")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if CLUSTERED in pl_module.__dict__:
            pl_module.log("tying/compression", self._rate(pl_module))

    def _rate(self, model: nn.Module) -> float:
        if self._compression is None:  # it stays: assignments are frozen
            dense, small = clustered_size(model, self.names)
            self._compression = dense / small
        return self._compression


def _take_codebooks(
    names: Sequence[str], model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give a model the codebooks that a state dict has, before their values are loaded."""
    if CLUSTERED in model.__dict__:
        return
    for name in names:
        path, _dot, attribute = name.rpartition(".")
        owner, begins = model.get_submodule(path), f"{prefix}{path}.".lstrip(".")
        keys = [begins + end for end in ("table", f"{attribute}_table")]
        table = next((state_dict[key] for key in keys if key in state_dict), None)
        if table is not None:
            put_codebook(owner, attribute, torch.zeros(owner.get_parameter(attribute).numel()).long(), table)
            model.__dict__[CLUSTERED] = list(names)
