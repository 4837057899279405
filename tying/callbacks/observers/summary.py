"""Print a table of tied weights."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import nn
from typing_extensions import override

from tying.callbacks.base import Callback, TyingCallback, counted, tied_groups
from tying.depth import Merge, Recurrent
from tying.depth.generated_classes import GeneratedType
from tying.errors import check_count
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of, set_callbacks
from tying.selection.tie import TiedGroup
from tying.soft.group_penalty import gaps
from tying.weights.report import audit
from tying.weights.sharding import reshard

UNLIMITED = 10_000  # columns: wider than any table


class TyingSummary(Callback):
    """Print, when training starts, which weights are tied or computed, and how much memory that saves.

    The summary follows the lines in which each callback says what it does, wherever this callback is in the list.

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
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        position = 1 + max((n for n, other in enumerate(others) if isinstance(other, Callback)), default=-1)
        set_callbacks(trainer, [*others[:position], self, *others[position:]])  # before progress bars

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in on_fit_start: only now every callback knows its groups and the checkpoint's weights are loaded
        reshard(pl_module)
        groups = tied_groups(trainer)
        lines = summary_lines(pl_module, [group for _, group in groups], callbacks_of(trainer))
        rows = [group_row(*item) for item in groups]  # in every process, since weights may be sharded
        if trainer.is_global_zero:
            print(summary(rows, lines, self.max_rows), flush=True)


def group_row(callback: str, group: TiedGroup) -> dict[str, Any]:
    """Return a tied group as plain types: its callback, names, source's shape, relation and gap."""
    shape, relation = [*group.parameters[0].shape], group.relation
    return {"by": callback, "names": group.names, "shape": shape, "relation": relation, "gap": gaps([group])[0]}


def summary_table(rows: Sequence[dict[str, Any]], max_rows: int | None = 40) -> Table:
    """Return a table with a row for each group: callback, members, shape, relation and gap.

    Args:
        rows: as :func:`group_row` returns them.
        max_rows: how many groups to list, and two names of each; ``None`` for all groups and names.
    """
    columns = (Column("weights", no_wrap=True), Column("m", justify="right"), "shape", "relation", "gap")
    table = Table("by", *columns, title="Tied weights", title_justify="left")
    for row in rows[:max_rows]:
        names, count = "\n".join(_names(row, max_rows)), str(len(row["names"]))
        table.add_row(row["by"], names, count, _shape(row), row["relation"] or "", f"{row['gap']:.4f}")
    if more := _more(rows, max_rows):
        table.add_row("", more)
    return table


def summary_list(rows: Sequence[dict[str, Any]], max_rows: int | None = 40) -> list[str]:
    """Return the lines of a list that says what :func:`summary_table` says, for narrow terminals.

    Example:
        >>> row = {"by": "SoftTying", "names": ["a.weight", "b.weight"], "shape": [2, 3], "relation": None, "gap": 0.5}
        >>> for line in summary_list([row]):
        ...     print(line)
        Tied weights
        SoftTying: 2 weights, 2×3, gap 0.5000
          a.weight
          b.weight
    """
    lines = ["Tied weights"]
    for row in rows[:max_rows]:
        size = ", ".join(filter(None, (counted(len(row["names"]), "weight"), _shape(row), row["relation"])))
        lines.append(f"{row['by']}: {size}, gap {row['gap']:.4f}")
        lines += [f"  {name}" for name in _names(row, max_rows)]
    return [*lines, *filter(None, [_more(rows, max_rows)])]


def _names(row: dict[str, Any], max_rows: int | None) -> Sequence[str]:
    """Return the names of a group's weights to list."""
    names: Sequence[str] = row["names"]
    return names if max_rows is None else [*names[:2], *["…"] * (len(names) > 2)]


def _shape(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"])) or "scalar"


def _more(rows: Sequence[dict[str, Any]], max_rows: int | None) -> str:
    """Return how many groups are not listed, or an empty string."""
    is_cut = max_rows is not None and len(rows) > max_rows
    return f"… and {counted(len(rows) - (max_rows or 0), 'more group')}" if is_cut else ""


def summary_lines(model: nn.Module, groups: Iterable[TiedGroup], callbacks: Sequence[pl.Callback] = ()) -> list[str]:
    """Return the lines below the table: weights that are shared or computed, counts, and what hard ties would save.

    Args:
        model: the model.
        groups: the tied groups that the table lists.
        callbacks: all callbacks in use. Without any of this package, the lines say that no weight is tied.
    """
    report, groups = audit(model), [*groups]
    lines = [*map(str, report.rows), report.counts()]
    is_tying = any(isinstance(callback, TyingCallback) for callback in callbacks) or _changes_depth(model)
    if not (groups or report.rows or is_tying):
        lines.insert(0, "No tied weights.")
    if spare := {parameter for group in groups if not group.shared for parameter in group.parameters[1:]}:
        values, size = sum(parameter.numel() for parameter in spare), sum(parameter.nbytes for parameter in spare)
        lines.append(f"Hard ties in place of soft ones would save {values:,} parameters and {size:,} bytes.")
    return lines


def _changes_depth(model: nn.Module) -> bool:
    """Return whether a model has blocks that are skipped, or used several times."""
    return any(
        isinstance(type(module), GeneratedType)
        or isinstance(module, Recurrent)
        or (isinstance(module, Merge) and module.draws)
        for module in model.modules()
    )


def summary(rows: Sequence[dict[str, Any]], lines: Sequence[str], max_rows: int | None = 40) -> str:
    """Return the table of :func:`summary_table`, and the lines of :func:`summary_lines`, as text.

    Names stay whole. Files and pipes take a table of any width; a terminal that is too narrow gets a list instead.
    """
    console = Console(highlight=False)
    table = summary_table(rows, max_rows)
    width = Console(width=UNLIMITED).measure(table).maximum
    if not console.is_terminal:
        console.width = width
    if not rows:
        return "\n".join(lines)
    if width > console.width:
        return "\n".join([*summary_list(rows, max_rows), *lines])
    with console.capture() as captured:
        console.print(table)
    return "\n".join([captured.get().rstrip(), *lines])
