"""Log and plot the gaps of tied groups."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from typing_extensions import override

from tying.callbacks.base import Callback, counted, is_fresh_run, tied_groups
from tying.callbacks.figures import log_figure
from tying.callbacks.penalty import PenaltyCallback
from tying.errors import check_count
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, is_logging_step
from tying.selection.tie import TiedGroup
from tying.soft.group_penalty import gaps
from tying.soft.plots import gap_figure

VALUES = 200_000  # of the history, at most: checkpoints hold it


class TyingMonitor(Callback):
    """Log ``tying/gap``, the largest gap of all tied groups, and draw the gaps when training ends.

    The gap of a group is ``sqrt(Σ‖w_i − w̄‖² / Σ‖w_i‖²)``; see :func:`tying.soft.gap`. It is logged at the trainer's
    ``log_every_n_steps``, to the trainer's loggers. It is also measured at the end of each epoch and before each
    validation, so that ``EarlyStopping(monitor="tying/gap")`` and ``ModelCheckpoint`` always have it.
    The picture is ``tying_gap``, see :func:`tying.callbacks.figures.log_figure`.
    Whenever the history has more than 200,000 gaps, every second step is dropped.

    Args:
        max_lines: how many groups the plot shows: those that end furthest apart. The largest gap of all groups is a
            line of its own.
        prog_bar: show the largest gap in the progress bar.
        per_group: also log the gap of each group, as ``tying/gap/<name of its first weight>``. If several groups begin
            with the same weight, the name of the callback comes before it.

    Example:
        >>> TyingMonitor(max_lines=4).history
        {}
    """

    def __init__(self, max_lines: int = 12, prog_bar: bool = False, per_group: bool = False) -> None:
        check_count("max_lines", max_lines, "[0, inf)")
        self.max_lines, self.prog_bar, self.per_group = max_lines, prog_bar, per_group
        self.steps: list[int] = []
        # pairs of step and gap, by callback and the names of the group's first two weights
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._measured_step = -1  # the step of the last measured gaps in this fit

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "gaps": {name: list(gaps) for name, gaps in self.history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.history = state_dict["steps"], state_dict.get("gaps", {})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if is_fresh_run(trainer, stage):
            self.steps, self.history = [], {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured_step = -1
        for callback in callbacks_of(trainer):
            if isinstance(callback, PenaltyCallback):
                callback.begin(trainer, pl_module)
        groups = [group for _, group in tied_groups(trainer)]
        largest = f"gap {max(gaps(groups)):.2g}" if groups else "no gap to log"
        pl.utilities.rank_zero_info(f"TyingMonitor: {counted(len(groups), 'tied group')}; {largest}")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if is_logging_step(trainer) and step > max(self.steps, default=0):
            self._record(step, self._measure(trainer, pl_module))
        elif self._measured_step < 0 or trainer.is_last_batch:  # other callbacks may read it before it is logged
            self._measure_again(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure_again(trainer, pl_module, on_step=False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure_again(trainer, pl_module, on_step=False)  # training may end within an epoch

    def _measure_again(self, trainer: pl.Trainer, module: pl.LightningModule, on_step: bool = True) -> None:
        """Measure the gaps, unless no step was taken since they were measured."""
        if trainer.global_step != self._measured_step:
            self._measure(trainer, module, on_step)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, on_step: bool = True) -> dict[str, float]:
        """Log the gaps, and return them by callback and the names of the group's first two weights.

        Without ``on_step``, other callbacks can read them, and loggers do not write them.
        """
        groups = tied_groups(trainer)
        measured = gaps([group for _, group in groups])
        if measured:
            self._measured_step = trainer.global_step
            module.log(
                "tying/gap",
                max(measured),
                prog_bar=self.prog_bar,
                logger=None if on_step else False,
                sync_dist=not on_step,
            )
        if self.per_group:
            values = dict(zip(_metric_names(groups), measured, strict=True))
            module.log_dict(values, logger=None if on_step else False, sync_dist=not on_step)
        names = [f"{callback}: {' ~ '.join(group.names[:2])}" for callback, group in groups]
        return dict(zip(names, measured, strict=True))

    def _record(self, step: int, gaps: Mapping[str, float]) -> None:
        """Add the gaps after a step to the history."""
        if gaps:
            self.steps.append(step)
        for name, value in gaps.items():
            self.history.setdefault(name, []).append((step, value))
        if len(self.steps) * len(self.history) > VALUES:
            self._thin()

    def _thin(self) -> None:
        """Drop every second step, but not the last, from the history."""
        self.steps = self.steps[::-2][::-1]
        kept = {*self.steps}
        thinned = {name: [pair for pair in gaps if pair[0] in kept] for name, gaps in self.history.items()}
        self.history = {name: gaps for name, gaps in thinned.items() if gaps}

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.steps:
            log_figure(trainer, partial(gap_figure, self.history, self.max_lines), "tying_gap")


def _metric_names(groups: Sequence[tuple[str, TiedGroup]]) -> list[str]:
    """Return the name under which the gap of each group of a callback is logged."""
    counts = Counter(group.names[0] for _, group in groups)
    owners = [f"{callback}/" if counts[group.names[0]] > 1 else "" for callback, group in groups]
    return [f"tying/gap/{owner}{group.names[0]}" for owner, (_, group) in zip(owners, groups, strict=True)]
