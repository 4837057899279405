"""Log and plot the gaps of tied groups."""

from typing import Any

from typing_extensions import override

from tying.callbacks.base import Callback, is_fresh_run, picture_folder, tied_groups
from tying.files import save_figure
from tying.lightning_namespace import pl
from tying.lightning_workarounds import is_logging_step
from tying.soft import gap
from tying.soft.plots import gap_figure

VALUES = 200_000  # of the history, at most: checkpoints hold it


class TyingMonitor(Callback):
    """Log ``tying/gap``, the largest gap of all tied groups, and plot the gaps when training ends.

    The gap of a group is ``sqrt(Σ‖w_i − w̄‖² / Σ‖w_i‖²)``; see :func:`tying.soft.gap`. It is logged at the trainer's
    ``log_every_n_steps``, to the trainer's loggers. The plot is ``tying_gap.png`` in the logger's directory.
    Whenever the history has more than 200,000 gaps, every second step is dropped.

    Args:
        max_lines: how many groups the plot shows: those that end furthest apart. The largest gap of all groups is a
            line of its own.

    Example:
        >>> TyingMonitor(max_lines=4).history
        {}
    """

    def __init__(self, max_lines: int = 12) -> None:
        self.max_lines = max_lines
        self.steps: list[int] = []
        # pairs of step and gap, by callback and the names of the group's first two weights
        self.history: dict[str, list[tuple[int, float]]] = {}

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
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        groups, step = tied_groups(trainer), trainer.global_step
        if groups and step > max(self.steps, default=0) and is_logging_step(trainer):
            gaps = [gap(group.tensors()) for _, group in groups]
            pl_module.log("tying/gap", max(gaps))
            self.steps.append(step)
            for (callback, group), value in zip(groups, gaps, strict=True):
                self.history.setdefault(f"{callback}: {' ~ '.join(group.names[:2])}", []).append((step, value))
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
        if (folder := picture_folder(trainer)) and self.steps:
            save_figure(gap_figure(self.history, self.max_lines), folder / "tying_gap.png")
