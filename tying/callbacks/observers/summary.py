"""Print a table of tied weights."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

from tying.callbacks.base import tied_groups
from tying.selection.tie import TiedGroup
from tying.soft import gap
from tying.weights.derived import count_parameters, saved_bytes


class TyingSummary(pl.Callback):
    """Print, when training starts, which weights are tied, and what that saves.

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
        # not in on_fit_start: by now every callback has found its groups, and a checkpoint's weights are in place
        if trainer.is_global_zero:
            print_summary(pl_module, tied_groups(trainer), self.max_rows)


def summary_table(groups: Sequence[tuple[str, TiedGroup]], max_rows: int | None = 40) -> Table:
    """Return a table with a row per group: who, how many, shape, relation and gap; ``None``: all, with all names."""
    table = Table(title="Tied weights", title_justify="left")
    for column, justify in [("by", "left"), ("weights", "left"), ("m", "right"), ("shape", "left")]:
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a literal, to mypy
    table.add_column("relation")
    table.add_column("gap", justify="right")
    for kind, group in groups[:max_rows]:
        names = [*group.names] if max_rows is None else [*group.names[:2], *["…"] * (len(group) > 2)]
        shape = "×".join(map(str, group.parameters[0].shape)) or "scalar"
        relation = group.relation or ""
        table.add_row(kind, "\n".join(names), str(len(group)), shape, relation, f"{gap(group.tensors()):.4f}")
    if max_rows is not None and len(groups) > max_rows:
        table.add_row("", f"… and {len(groups) - max_rows} more groups")
    return table


def summary_lines(model: nn.Module, groups: Sequence[tuple[str, TiedGroup]]) -> list[str]:
    """Return the counts that go with the table: unique and virtual parameters, and bytes saved."""
    unique, virtual = count_parameters(model)
    apart = [group for _, group in groups if not group.shared]
    spare = {id(parameter): parameter for group in apart for parameter in group.parameters[1:]}.values()
    spare_bytes = sum(p.numel() * p.element_size() for p in spare)
    saved = saved_bytes(model)
    lines = [f"{unique:,} unique parameters, {virtual:,} counting each use; {saved:,} bytes saved by sharing."]
    if spare:
        lines.append(
            f"Were every group one weight, {sum(p.numel() for p in spare):,} parameters and {spare_bytes:,} bytes less."
        )
    return lines


def print_summary(model: nn.Module, groups: Sequence[tuple[str, TiedGroup]], max_rows: int | None = 40) -> None:
    """Print the table and the counts of :func:`summary_table` and :func:`summary_lines`."""
    console = Console()
    console.print(summary_table(groups, max_rows) if groups else "No tied weights.")
    for line in summary_lines(model, groups):
        console.print(line, highlight=False)
