"""Merges in the residual blocks of a model in training."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.transform import ChangesModel
from tying.depth import Merge, apply_merge
from tying.depth.apply import residual_blocks
from tying.errors import ConfigurationError
from tying.soft import Schedule


class ResidualMerging(ChangesModel):
    """Let a merge combine branch and shortcut in residual blocks: stochastic depth, swapout, or one of your own.

    See :func:`tying.depth.apply_merge` for blocks that are understood. Names and values of the model's state stay:
    who loads a checkpoint without this callback or mixin gets the plain sums. Where a Trainer loads it, Lightning warns
    of the callback that is missing, and this callback of merges that are not those of the training.

    Args:
        blocks: a pattern of names of modules, or several.
        merge: each block gets a copy.
        keep_schedule: how what is dropped grows with depth: ``"linear"``: from an L-th of what the merge says, in the
            first of L blocks, to all of it in the last; ``"uniform"``: all of it; or the keep of each block.
        schedule: a factor on what is dropped, from 0 to 1, over training: to warm up, or to fade out. Tests and
            predictions take its end.

    Raises:
        ConfigurationError: as apply_merge, when the model is set up; ``keep_schedule`` is unknown.

    Example:
        >>> from tying.depth import StochasticDepth
        >>> ResidualMerging("network.layer*.*", StochasticDepth(keep=0.5, mode="subset")).keep_schedule
        'linear'
    """

    def __init__(
        self,
        blocks: str | list[str],
        merge: nn.Module,
        keep_schedule: Literal["linear", "uniform"] | list[float] = "linear",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if isinstance(keep_schedule, str) and keep_schedule not in ("linear", "uniform"):
            raise ConfigurationError(
                f"keep_schedule is 'linear', 'uniform' or a list of keeps, one a block, not {keep_schedule!r}"
            )
        if not isinstance(merge, nn.Module):
            raise ConfigurationError(
                f"merge is a module such as tying.depth.StochasticDepth(keep=0.5), not {merge!r}; in YAML a class_path "
                "with init_args"
            )
        if not isinstance(merge, Merge) and (keep_schedule != "uniform" or schedule is not None):
            raise ConfigurationError(
                f"{type(merge).__name__} is no tying.depth.Merge, of which keeps are known: it takes "
                "keep_schedule='uniform' alone, and no schedule"
            )
        if schedule is not None and max(schedule.start, schedule.end) > 1:
            raise ConfigurationError(f"a schedule of what is dropped is a share of it, from 0 to 1: {schedule}")
        self.blocks, self.merge, self.keep_schedule, self.schedule = blocks, merge, keep_schedule, schedule
        self._merges: list[Merge] = []  # of the model in training

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(blocks=self.blocks)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"merges": self._described}  # where a test lacks this callback, Lightning warns of a state without one

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (trained := state_dict.get("merges", self._described)) != self._described:
            warnings.warn(
                f"ResidualMerging: the checkpoint was trained with {trained}; now it is {self._described}", stacklevel=2
            )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        rank_zero_info(f"ResidualMerging: {self.told(pl_module)}")
        if stage != "fit":
            self._set_share(pl_module, self._last_share)

    @override
    def is_applied(self, model: nn.Module) -> bool:
        try:
            found = residual_blocks(model, self.blocks)
        except ConfigurationError:
            return False
        return all(block.__dict__.get("_merged_by") == self._mark for block in found.values())

    @override
    def apply(self, model: nn.Module) -> int:
        found = residual_blocks(model, self.blocks)
        if self.is_applied(model):
            return len(found)
        apply_merge(model, self.blocks, self.merge, self.keep_schedule)
        for block in found.values():
            block.__dict__["_merged_by"] = self._mark
        self._set_share(model, self._last_share)  # as it will be at the end, wherever the model is loaded
        return len(found)

    @property
    def _last_share(self) -> float:
        return self.schedule.end if self.schedule else 1.0

    @property
    def _described(self) -> str:
        """What the merges are, in words that are the same in every process."""
        kind = f"{type(self.merge).__name__}({self.merge.extra_repr()})"
        return f"{kind} in {self.blocks}, keep_schedule={self.keep_schedule}, schedule={self.schedule}"

    @property
    def _mark(self) -> str:
        """What makes the callback equal to another."""
        own = {key: value for key, value in vars(self.merge).items() if not key.startswith("_") and key != "training"}
        return (
            f"{self.blocks} {type(self.merge).__qualname__} {own} {self.merge!r} {self.keep_schedule} {self.schedule}"
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._merges = self._merges_of(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.schedule is not None:
            steps = trainer.global_step // max(1, len(trainer.optimizers))  # of each optimizer
            count = steps if self.schedule.unit == "step" else trainer.current_epoch
            share = self.schedule(count)
            for merge in self._merges:
                merge.drop_scale = share

    def _set_share(self, model: nn.Module, share: float) -> None:
        for merge in self._merges_of(model):
            merge.drop_scale = share

    def _merges_of(self, model: nn.Module) -> list[Merge]:
        found = [block.merge for block in residual_blocks(model, self.blocks).values()]
        return [merge for merge in found if isinstance(merge, Merge)]

    @override
    def told(self, model: nn.Module) -> str:
        found = residual_blocks(model, self.blocks)
        named = [f"{name}: {block.merge}" for name, block in found.items()]
        return f"{len(found)} blocks, {named[0]} to {named[-1]}"
