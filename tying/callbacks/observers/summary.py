"""Print a table of tied weights."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Column, Table
from torch import nn
from typing_extensions import override

from tying.callbacks.base import Callback, tied_groups
from tying.errors import check_count
from tying.lightning_namespace import pl
from tying.selection.tie import TiedGroup
from tying.soft import gap
from tying.weights.report import audit


class TyingSummary(Callback):
    """Print, when training starts, which weights are tied or computed, and how much memory that saves.

    Args:
        max_rows: how many groups to list.

    Example:
        >>> TyingSummary().max_rows
        40
    """

    def __init__(self, max_rows: int = 40) -> None:
        super().__init__()
        check_count("max_rows", max_rows, "[0, inf)")
        self.max_rows = max_rows

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in on_fit_start: only now every callback knows its groups and the checkpoint's weights are loaded
        if trainer.is_global_zero:
            groups = tied_groups(trainer)
            lines = summary_lines(pl_module, [group for _, group in groups])
            Console().print(summary([group_row(*item) for item in groups], lines, self.max_rows), highlight=False)


def group_row(callback: str, group: TiedGroup) -> dict[str, Any]:
    """Return a tied group as plain types: its callback, names, source's shape, relation and gap."""
    shape, relation = [*group.parameters[0].shape], group.relation
    return {"by": callback, "names": group.names, "shape": shape, "relation": relation, "gap": gap(group.tensors())}


def summary_table(rows: Sequence[dict[str, Any]], max_rows: int | None = 40) -> Table:
    """Return a table with a row for each group: callback, members, shape, relation and gap.

    Args:
        rows: as :func:`group_row` returns them.
        max_rows: how many groups to list, and two names of each; ``None`` for all groups and names.
    """
    columns = (Column("weights", overflow="fold"), Column("m", justify="right"), "shape", "relation", "gap")
    table = Table("by", *columns, title="Tied weights", title_justify="left")
    for row in rows[:max_rows]:
        count = len(row["names"])
        names = row["names"] if max_rows is None else [*row["names"][:2], *["…"] * (count > 2)]
        shape = "×".join(map(str, row["shape"])) or "scalar"
        table.add_row(row["by"], "\n".join(names), str(count), shape, row["relation"] or "", f"{row['gap']:.4f}")
    if max_rows is not None and len(rows) > max_rows:
        table.add_row("", f"… and {len(rows) - max_rows} more groups")
    return table


def summary_lines(model: nn.Module, groups: Iterable[TiedGroup]) -> list[str]:
    """Return the lines below the table: weights that are shared or computed, counts, and what hard ties would save."""
    report = audit(model)
    lines = [*map(str, report.rows), report.counts()]
    if spare := {parameter for group in groups if not group.shared for parameter in group.parameters[1:]}:
        values, size = sum(parameter.numel() for parameter in spare), sum(parameter.nbytes for parameter in spare)
        lines.append(f"Hard ties in place of soft ones would save {values:,} parameters and {size:,} bytes.")
    return lines


def summary(rows: Sequence[dict[str, Any]], lines: Sequence[str], max_rows: int | None = 40) -> Group:
    """Return the table and the lines of :func:`summary_table` and :func:`summary_lines`, to be printed by rich."""
    if rows:
        return Group(summary_table(rows, max_rows), *lines)
    return Group(*["No tied weights."] * (len(lines) == 1), *lines)
