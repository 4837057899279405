"""Quantise weights during training, and train the codebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tying.callbacks.base import (
    TyingCallback,
    configure_model,
    counted,
    parameters_beside,
    reject_copies,
    replicate_again,
    warn_if_too_late,
)
from tying.callbacks.conflicts import acting_on, conflict
from tying.callbacks.derived import HardTying
from tying.callbacks.transform import parameters_of, record, recorded, shared_with
from tying.errors import ConfigurationError, check_choice, check_count, listed
from tying.hashing.apply import check_hashable, table_names
from tying.hashing.codebook import Start, check_fits_codebook, find_codebook, put_codebook, uses_of
from tying.hashing.packing import clustered, contents
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, prunes_in
from tying.selection.resolve import parse_patterns
from tying.weights.derived import locate_parameters
from tying.weights.replace import Selection, select_weights


@dataclass(frozen=True)
class BeforeEpoch:
    """A predicate of epochs: true before a given epoch. Lightning's ``ModelPruning`` takes it as ``apply_pruning``.

    Args:
        epoch: the first epoch for which it is false.

    Example:
        >>> [BeforeEpoch(2)(epoch) for epoch in range(4)]
        [True, True, False, False]
    """

    epoch: int

    def __post_init__(self) -> None:
        check_count("epoch", self.epoch, "[0, inf)")

    def __call__(self, epoch: int) -> bool:
        """Return whether ``epoch`` comes before."""
        return epoch < self.epoch


class WeightClustering(TyingCallback):
    """Replace each weight by entries of a codebook from an epoch on; see :func:`tying.hashing.cluster_weight`.

    Each weight has its own codebook. Assignments are frozen; the codebook is trained by the sum or the mean of its
    weights' gradients. Zero weights stay zero, for example those that Lightning's ``ModelPruning`` pruned; it must stop
    before ``start_epoch`` (``apply_pruning=BeforeEpoch(...)``).
    In the optimizers, codebooks replace the weights; the weights' optimizer state is dropped. Logs
    ``tying/compression``: how many times smaller the model is in a packed file than its plain state dict, with all that
    is not clustered; see :func:`tying.hashing.save_packed`.

    Args:
        parameters: patterns of names; a leading ``!`` excludes. Weights of fewer than two dimensions are skipped.
        clusters: number of entries of each codebook.
        start_epoch: weights are clustered when this epoch starts.
        init: initial centroids of k-means: ``"linear"``, ``"density"`` or ``"forgy"``.
        gradient: the gradient of an entry: the ``"sum"`` of its weights' gradients, as in the paper; or their
            ``"mean"``, which moves an entry as far as the dense weights would move: use it with plain SGD at their
            learning rate.

    Raises:
        ConfigurationError: an argument is out of range, the strategy shards weights, a callback averages weights, or a
            weight is computed or tied through a relation, or has fewer entries than clusters.

    Example:
        >>> WeightClustering(["network.*.weight"], clusters=32, start_epoch=10).clusters
        32
    """

    distinguished_by = "parameters"

    def __init__(
        self,
        parameters: list[str],
        clusters: int = 32,
        start_epoch: int = 0,
        init: Literal["linear", "density", "forgy"] = "linear",
        gradient: Literal["sum", "mean"] = "sum",
    ) -> None:
        check_count("clusters", clusters, "[1, inf)")
        check_count("start_epoch", start_epoch, "[0, inf)")
        check_choice("init", init, get_args(Start))
        check_choice("gradient", gradient, ("sum", "mean"))
        self.parameters, self.clusters = parse_patterns(parameters), clusters
        self.start_epoch, self.init = start_epoch, init
        self.gradient = gradient
        self.names: list[str] = []
        self._hook: RemovableHandle | None = None
        self._uses: list[tuple[Tensor, Tensor]] = []  # codebooks, and the number of weights that use each entry

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        reject_copies(trainer, "WeightClustering", "the dense weights")
        configure_model(trainer, pl_module)
        pruning = [callback for callback in callbacks_of(trainer) if isinstance(callback, pl.callbacks.ModelPruning)]
        if any(prunes_in(callback, self.start_epoch) for callback in pruning):
            raise ConfigurationError(
                f"{self.label}: ModelPruning still prunes in epoch {self.start_epoch}, when weights are codebooks: "
                f"give it apply_pruning=BeforeEpoch({self.start_epoch})"
            )
        with acting_on(pl_module, self, callbacks_of(trainer)):
            self.names, self._uses = self._choose(pl_module), []
        self._hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]  # torch's
            partial(_put_codebooks, self.names)
        )

    @override
    def prepare(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        _put_codebooks(self._choose(model), model, state_dict, "")

    def _choose(self, model: nn.Module) -> list[str]:
        """Return the names of the weights to cluster; record them, since patterns do not match clustered weights."""
        if not recorded(model, self):
            selection = self._select(model)
            selection.report("WeightClustering")
            record(model, self, [*selection.weights])
        return recorded(model, self)

    def _select(self, model: nn.Module) -> Selection:
        selection, locations = select_weights(model, self.parameters, least_dims=2), locate_parameters(model)
        for name in selection.weights:
            check_hashable(name, locations)
        return selection.fitting(lambda name, _: check_fits_codebook(locations.owners(name), self.clusters))

    @override
    def replaced(self, model: nn.Module) -> list[str]:
        return recorded(model, self)

    @override
    def affected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return parameters_of(model, recorded(model, self) or self._select(model).weights)

    @override
    def describe(self, model: nn.Module) -> str:
        names = recorded(model, self) or [*self._select(model).weights]
        return (
            f"{counted(len(names), 'weight')}, each of {counted(self.clusters, 'value')} from epoch {self.start_epoch} "
            f"on: {listed(names)}"
        )

    @override
    def monitored(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return parameters_beside(model, self.names)

    @override
    def check_conflicts(self, model: nn.Module, others: Sequence[pl.Callback]) -> None:
        for name, other in shared_with(self, model, [other for other in others if not isinstance(other, HardTying)]):
            raise conflict(self, other, name, "a codebook replaces it")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ConfigurationError(
                f"{self.label}: LBFGS holds {listed(self.names)}, and codebooks cannot replace them there: use "
                "another optimizer"
            )
        if not self._is_done(pl_module):
            warn_if_too_late(trainer, "WeightClustering", self.start_epoch)
        if trainer.global_step and any(
            isinstance(callback, pl.callbacks.ModelPruning) for callback in callbacks_of(trainer)
        ):
            _prune_again(pl_module, self.names)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning skips on_train_epoch_start in a run that resumes at the end of an epoch
        if batch_idx > 0 or trainer.current_epoch < self.start_epoch or self._is_done(pl_module):
            return
        weights = self.affected(pl_module)
        for name in self.names:
            codebook = find_codebook(pl_module, name, self.clusters, self.init)
            table = put_codebook(pl_module, name, *trainer.strategy.broadcast(codebook))  # k-means may draw numbers
            weight = weights.get(name)  # none, if an interrupted run has clustered it already
            for optimizer in trainer.optimizers:
                if weight is not None:
                    optimizer.state.pop(weight, None)
                for group in optimizer.param_groups:
                    group["params"] = [table if parameter is weight else parameter for parameter in group["params"]]
        replicate_again(trainer)
        self.monitor(pl_module)
        pl.utilities.rank_zero_info(
            f"WeightClustering: {counted(len(self.names), 'weight')} clustered; a packed file of the model is "
            f"{contents(pl_module).rate:.1f} times smaller than its state dict"
        )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.gradient == "mean":
            if not self._uses and self._is_done(pl_module):
                codebooks = clustered(pl_module)
                self._uses = [(codebooks[name][1], uses_of(codebooks[name][0])) for name in self.names]
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for table, uses in self._uses:
                if table.grad is not None and id(table) in stepped:
                    table.grad /= uses

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_done(pl_module):
            pl_module.log("tying/compression", contents(pl_module).rate)

    def _is_done(self, model: nn.Module) -> bool:
        return clustered(model).keys() >= {*self.names}


def _put_codebooks(
    names: Sequence[str], model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Replace weights of a model by the codebooks that a state dict contains, before it is loaded."""
    done = clustered(model)
    prefixes = {module: f"{prefix}{path}." if path else prefix for path, module in model.named_modules()}
    for name in names:
        path, _dot, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        table, virtual = (prefixes[owner] + key for key in table_names(type(owner), attribute))
        if f"{virtual}.drawn" in state_dict and name not in done:
            put_codebook(model, name, torch.zeros(owner.get_parameter(attribute).numel()).long(), state_dict[table])


def _prune_again(model: nn.Module, names: Sequence[str]) -> None:
    """Prune the zeros of weights again: Lightning's checkpoints contain the zeros, but not the masks."""
    locations = locate_parameters(model)
    for location in (locations[name] for name in names if name in locations):
        mask = location.parameter != 0
        if not mask.all():
            prune.custom_from_mask(location.owner, location.attribute, mask)  # type: ignore[no-untyped-call]  # torch's
