"""Put merges into blocks of a model."""

import warnings
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from tying.callbacks.base import counted, optimizer_steps, training_steps
from tying.callbacks.transform import ModelTransform
from tying.depth import Merge, apply_merge, drop_scale
from tying.depth.apply import merges_in, residual_blocks
from tying.errors import ConfigurationError, check_choice, listed
from tying.lightning_namespace import pl
from tying.mappings import from_mapping
from tying.soft import Schedule
from tying.soft.schedule import parse_schedule


class ResidualMerging(ModelTransform):
    """Let a merge combine branch and shortcut in blocks: stochastic depth, swapout, or a subclass of Merge.

    A block is any module that keeps the shape of its input, see :func:`tying.depth.apply_merge`. The model's state dict
    does not change: a model that loads it without this callback or mixin computes plain sums. When a Trainer loads a
    checkpoint, Lightning warns if the callback is missing, and this callback warns if its merges differ from the merges
    used in training.

    Args:
        blocks: a pattern of names of modules, or several; a leading ``!`` excludes.
        merge: the merge; each block gets a copy.
        keep_schedule: the drop probabilities by depth: ``"linear"``: block n of L drops n/L of the merge's drop
            probabilities; ``"uniform"``: each block drops as the merge does; ``"model"``: each block drops as its
            DropPath or StochasticDepth modules do, which then return their input; or the keep probability of each
            block.
        schedule: a factor in [0, 1] on the drop probabilities that changes during training: ``"early"`` decreases from
            1 to 0 over the first sixth of training, ``"late"`` is 0 for five sixths and then 1, see
            :func:`tying.depth.drop_scale`; or any Schedule. Tests and predictions use its final value.
        whole: merge blocks as a whole, also where their branches are known: LayerDrop, with ``"uniform"``.

    Raises:
        ConfigurationError: ``keep_schedule`` or ``schedule`` is unknown; when the model is set up, see apply_merge;
            when training starts, its length is unknown, which ``"early"`` and ``"late"`` need.

    Example:
        >>> from tying.depth import StochasticDepth
        >>> ResidualMerging("network.layer*.*", StochasticDepth(keep=0.5, mode="subset")).keep_schedule
        'linear'
    """

    distinguished_by = "blocks"

    def __init__(
        self,
        blocks: str | list[str],
        merge: nn.Module,
        keep_schedule: Literal["linear", "uniform", "model"] | list[float] = "linear",
        schedule: Schedule | Literal["early", "late"] | None = None,
        whole: bool = False,
    ) -> None:
        if isinstance(keep_schedule, str):
            choices = ("linear", "uniform", "model")
            check_choice("keep_schedule, if not a list with one keep per block,", keep_schedule, choices)
        merge = from_mapping(merge, Merge, "merge")
        if schedule != "early" and schedule != "late":
            schedule = parse_schedule(schedule, ", or 'early' or 'late'")
        if not isinstance(merge, nn.Module):
            raise ConfigurationError(
                f"merge must be a module such as tying.depth.StochasticDepth(keep=0.5), not {merge!r}; in YAML a "
                "class_path with init_args"
            )
        if not isinstance(merge, Merge) and (keep_schedule != "uniform" or schedule is not None):
            raise ConfigurationError(
                f"{type(merge).__name__} is not a tying.depth.Merge: its keep probabilities are not known. Use "
                "keep_schedule='uniform', without a schedule"
            )
        if isinstance(schedule, Schedule) and max(schedule.start, schedule.end) > 1:
            raise ConfigurationError(f"schedule, a factor on drop probabilities, must be in [0, 1], not {schedule}")
        self.blocks = blocks if isinstance(blocks, str) else [*blocks]
        self.keep_schedule = keep_schedule if isinstance(keep_schedule, str) else [*keep_schedule]
        self.merge, self.schedule, self.whole = merge, schedule, whole

    precedes_sharding = False  # merges have no parameters

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"merges": self._description}  # Lightning warns if a checkpoint has the state of a missing callback

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (trained := state_dict.get("merges", self._description)) != self._description:
            warnings.warn(
                f"ResidualMerging: the checkpoint was trained with {trained}; now it is {self._description}",
                stacklevel=2,
            )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            self._end_schedule(pl_module)

    @override
    def is_applied(self, model: nn.Module) -> bool:
        try:
            blocks = residual_blocks(model, self.blocks).values()
        except ConfigurationError:
            return False
        return all(block.__dict__.get("_merged_by") == self._mark for block in blocks)

    @override
    def apply(self, model: nn.Module) -> int:
        blocks = residual_blocks(model, self.blocks)
        if not self.is_applied(model):
            apply_merge(model, self.blocks, self.merge, self.keep_schedule, self.whole)
            for block in blocks.values():
                block.__dict__["_merged_by"] = self._mark
            self._end_schedule(model)  # outside training, merges use the final drop probabilities
        return len(blocks)

    def _end_schedule(self, model: nn.Module) -> None:
        end = self.schedule.end if isinstance(self.schedule, Schedule) else float(self.schedule != "early")
        for merge in self._merges_of(model):
            merge.drop_scale = end

    @property
    def _description(self) -> str:
        """A description of the merges that is the same in every process."""
        return (
            f"{type(self.merge).__name__}({self.merge.extra_repr()}) in {self.blocks}, "
            f"keep_schedule={self.keep_schedule}, schedule={self.schedule}{', whole' * self.whole}"
        )

    @property
    def _mark(self) -> str:
        """The callback's arguments, and all attributes of its merge: the same for equal callbacks."""
        public = {key: value for key, value in vars(self.merge).items() if key[0] != "_" and key != "training"}
        arguments = f"{self.blocks} {self.keep_schedule} {self.schedule} {self.whole}"
        return f"{type(self.merge)} {public} {self.merge!r} {arguments}"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._merges = self._merges_of(pl_module)
        if isinstance(self.schedule, str):
            self._total_steps = training_steps(
                trainer, f"{self.label}: schedule={self.schedule!r}", ", or give a tying.soft.Schedule with a length"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.schedule is not None:
            scale = self._drop_scale(optimizer_steps(trainer), trainer.current_epoch)
            for merge in self._merges:
                merge.drop_scale = scale

    def _drop_scale(self, step: int, epoch: int) -> float:
        """Return the factor on the drop probabilities at a step."""
        if isinstance(self.schedule, Schedule):
            return self.schedule(self.schedule.count(step, epoch))
        return 1.0 if self.schedule is None else drop_scale(self.schedule, step, self._total_steps)

    def _merges_of(self, model: nn.Module) -> list[Merge]:
        blocks = residual_blocks(model, self.blocks).values()
        return [merge for block in blocks for merge in merges_in(block).values() if isinstance(merge, Merge)]

    @override
    def describe(self, model: nn.Module) -> str:
        blocks = [
            f"{name}: {listed(dict.fromkeys(map(str, merges_in(block).values())))}"
            for name, block in residual_blocks(model, self.blocks).items()
        ]
        return f"{counted(len(blocks), 'block')}, {' to '.join(dict.fromkeys((blocks[0], blocks[-1])))}"
