"""Fractal blocks: columns of many and of few layers between joins, of which some are dropped in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.draws import broadcast_rank0
from tying.depth.merge import Branch, skip_branch
from tying.errors import ConfigurationError


def fractal_join(inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of the inputs that are not dropped; one alone as it is.

    Example:
        >>> fractal_join([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])

    Source: G. Larsson, M. Maire and G. Shakhnarovich, FractalNet: ultra-deep neural networks without residuals, 2017.
    """
    return inputs[0] if len(inputs) == 1 else torch.stack([*inputs]).mean(dim=0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; a decision in Python is no part of a graph
def draw_paths(count: int, drop: float) -> list[int]:
    """Return which of several inputs of a join are kept: each with probability 1 − drop, and one at least.

    Where all are dropped, one of them is kept after all, each as likely as another. All processes draw alike.

    Example:
        >>> draw_paths(3, drop=0.0)
        [0, 1, 2]
    """
    drawn = torch.rand(count + 1, dtype=torch.float64)
    broadcast_rank0(drawn)
    kept = [place for place in range(count) if drawn[place] >= drop]
    return kept or [min(int(drawn[count] * count), count - 1)]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # likewise
def draw_column(columns: int, share: float) -> int | None:
    """Return one of the columns, each as likely as another, in this share of draws; or none. All processes draw alike.

    Example:
        >>> draw_column(3, share=0.0) is None, draw_column(1, share=1.0)
        (True, 0)
    """
    drawn = torch.rand(2, dtype=torch.float64)
    broadcast_rank0(drawn)
    return min(int(drawn[1] * columns), columns - 1) if drawn[0] < share else None


class FractalBlock(nn.Module):
    """The fractal of C columns: ``f_1 = conv``, ``f_{c+1}(z) = (f_c ∘ f_c)(z) ⊕ conv(z)``; joins ⊕ that meet are one.

    Column 0 is the shallowest, of one layer, and column c has 2ᶜ layers. What no kept path needs is not computed, and
    its parameters get a gradient of zero.

    Args:
        columns: C.
        layer: makes a layer, when called with its number of input and of output channels.
        inputs: channels of the block's input.
        outputs: channels after every layer.
        drop_path: probability of dropping an input of a join in training, one mini-batch through.

    Shape: (batch, inputs, ...) to (batch, outputs, ...).

    Raises:
        ConfigurationError: there is no column, or ``drop_path`` is no probability.

    Example:
        >>> block = FractalBlock(3, nn.Linear, 4, 8)
        >>> [len(column) for column in block.columns], block(torch.zeros(2, 4)).shape
        ([1, 2, 4], torch.Size([2, 8]))
    """

    def __init__(
        self,
        columns: int,
        layer: Callable[[int, int], nn.Module],
        inputs: int,
        outputs: int,
        drop_path: float = 0.15,
    ) -> None:
        super().__init__()
        if columns < 1:
            raise ConfigurationError(f"columns must be 1 or more, not {columns}")
        if not 0 <= drop_path <= 1:
            raise ConfigurationError(f"drop_path is a probability, from 0 to 1, not {drop_path}")
        self.columns = nn.ModuleList(
            nn.ModuleList(layer(outputs if number else inputs, outputs) for number in range(2**column))
            for column in range(columns)
        )
        self.drop_path = drop_path

    @override
    def forward(self, x: Tensor, column: int | None = None) -> Tensor:
        """Return the join of all columns.

        Args:
            x: the block's input.
            column: pass through this one alone, in training as in evaluation.

        Raises:
            ConfigurationError: there is no such column.
        """
        if column is not None and not 0 <= column < len(self.columns):
            raise ConfigurationError(f"columns are 0 to {len(self.columns) - 1}, not {column}")
        plan = _Plan(self, column)
        out = plan.join(plan.columns_from(_Value(lambda: x), 0))()
        unused = [layer for layer in plan.layers if layer not in plan.used]
        return skip_branch(out, Branch(nn.Identity(), [(out, 0)], unused)) if unused and self.training else out

    @override
    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"


class _Value:
    """A tensor that is computed once, when it is first asked for."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self.found: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.found is None:
            self.found = self.compute()
        return self.found


class _Plan:
    """Which layers and joins one pass takes: all draws are made before anything is computed."""

    def __init__(self, block: FractalBlock, column: int | None) -> None:
        self.block, self.column = block, column
        columns = [[*column.children()] for column in block.columns]
        self.queues = [iter(column) for column in columns]
        self.layers = [layer for column in columns for layer in column]
        self.used: set[nn.Module] = set()

    def columns_from(self, z: _Value, shallowest: int) -> list[tuple[int, _Value]]:
        """Return the columns from the shallowest on, each with what it computes of z."""
        own = self._layer(next(self.queues[shallowest]), z)
        if shallowest + 1 == len(self.queues):
            return [(shallowest, own)]
        middle = self.join(self.columns_from(z, shallowest + 1))
        return [(shallowest, own), *self.columns_from(middle, shallowest + 1)]

    def join(self, columns: list[tuple[int, _Value]]) -> _Value:
        """Return the join of columns, of which some are dropped."""
        if self.column is not None:
            chosen = [value for number, value in columns if number == self.column]  # none: nothing asks for this join
        elif self.block.training and self.block.drop_path and len(columns) > 1:
            chosen = [columns[place][1] for place in draw_paths(len(columns), self.block.drop_path)]
        else:
            chosen = [value for _, value in columns]
        return _Value(lambda: fractal_join([value() for value in chosen]))

    def _layer(self, layer: nn.Module, z: _Value) -> _Value:
        def compute() -> Tensor:
            self.used.add(layer)
            out: Tensor = layer(z())
            return out

        return _Value(compute)
