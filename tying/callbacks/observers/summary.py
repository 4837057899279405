"""Print a table of tied weights."""

from collections.abc import Sequence

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Column, Table
from torch import nn
from typing_extensions import override

from tying.callbacks.base import tied_groups
from tying.selection.tie import TiedGroup
from tying.soft import gap
from tying.weights.report import audit


class TyingSummary(pl.Callback):
    """Print, when training starts, which weights are tied or computed, and what that saves.

    Args:
        max_rows: how many groups to list.

    Example:
        >>> TyingSummary().max_rows
        40
    """

    def __init__(self, max_rows: int = 40) -> None:
        super().__init__()
        self.max_rows = max_rows

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in on_fit_start: by now every callback knows its groups, and a checkpoint's weights are loaded
        if trainer.is_global_zero:
            print_summary(pl_module, tied_groups(trainer), self.max_rows)


def summary_table(groups: Sequence[tuple[str, TiedGroup]], max_rows: int | None = 40) -> Table:
    """Return a table with a row for each group: callback, members, shape, relation and gap.

    Args:
        groups: with the names of the callbacks that tie them.
        max_rows: how many groups to list, and two names of each; ``None`` for all groups and names.
    """
    columns = (Column("weights", overflow="fold"), Column("m", justify="right"), "shape", "relation", "gap")
    table = Table("by", *columns, title="Tied weights", title_justify="left")
    for kind, group in groups[:max_rows]:
        names = [*group.names] if max_rows is None else [*group.names[:2], *["…"] * (len(group) > 2)]
        shape = "×".join(map(str, group.parameters[0].shape)) or "scalar"
        distance = f"{gap(group.tensors()):.4f}"
        table.add_row(kind, "\n".join(names), str(len(group)), shape, group.relation or "", distance)
    if max_rows is not None and len(groups) > max_rows:
        table.add_row("", f"… and {len(groups) - max_rows} more groups")
    return table


def summary_lines(model: nn.Module, groups: Sequence[tuple[str, TiedGroup]]) -> list[str]:
    """Return the lines below the table: weights that are one or computed, counts, and what harder ties would save."""
    report = audit(model)
    lines = [*map(str, report.rows), report.counts()]
    if spare := {parameter for _, group in groups if not group.shared for parameter in group.parameters[1:]}:
        values, size = sum(parameter.numel() for parameter in spare), sum(parameter.nbytes for parameter in spare)
        lines.append(f"Hard ties in place of soft ones would save {values:,} parameters and {size:,} bytes.")
    return lines


def print_summary(model: nn.Module, groups: Sequence[tuple[str, TiedGroup]], max_rows: int | None = 40) -> None:
    """Print the table and the lines of :func:`summary_table` and :func:`summary_lines`."""
    lines = summary_lines(model, groups)
    console = Console()
    if groups:
        console.print(summary_table(groups, max_rows))
    elif len(lines) == 1:
        console.print("No tied weights.")
    console.print(*lines, sep="\n", highlight=False)
