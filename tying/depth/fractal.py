"""Fractal blocks: columns of different depth, joined at several points; training drops some inputs of each join."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.draws import agreed_rand
from tying.depth.merge import zero_gradients
from tying.depth.tracing import in_graph, leaf_function
from tying.errors import ConfigurationError, check_count, check_range


@leaf_function
def fractal_join(inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of the inputs that are not dropped; a single input is returned as is.

    Example:
        >>> fractal_join([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])

    Source: G. Larsson, M. Maire and G. Shakhnarovich, FractalNet: ultra-deep neural networks without residuals, 2017.
    """
    return inputs[0] if len(inputs) == 1 else torch.stack([*inputs]).mean(dim=0)


def path_mask(count: int, drop: float) -> Tensor:
    """Return a mask, bool (count,), of the inputs that a join keeps: each with probability 1 − drop, and at least one.

    If all are dropped, one input is drawn uniformly and kept. The result is the same in all processes.

    Example:
        >>> path_mask(3, drop=0.0)
        tensor([True, True, True])
    """
    numbers = agreed_rand(count + 1)
    kept = numbers[:count] >= drop
    return torch.where(kept.any(), kept, torch.arange(count) == (numbers[count] * count).long())


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; a decision in Python cannot be part of a graph
def draw_paths(count: int, drop: float) -> list[int]:
    """Return the indices of the inputs that :func:`path_mask` keeps.

    Example:
        >>> draw_paths(3, drop=0.0)
        [0, 1, 2]
    """
    return path_mask(count, drop).nonzero().flatten().tolist()


@leaf_function
def column_index(x: Tensor, columns: int, probability: float) -> Tensor:
    """Return a random column with the given probability, and −1 otherwise, on x's device.

    Columns are drawn uniformly. The result is the same in all processes.

    Example:
        >>> column_index(torch.zeros(2), 3, probability=0.0)
        tensor(-1)
    """
    numbers = agreed_rand(2)
    return torch.where(numbers[0] < probability, (numbers[1] * columns).long(), -1).to(x.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def draw_column(columns: int, probability: float) -> int | None:
    """Return the column that :func:`column_index` draws, or ``None``.

    Example:
        >>> draw_column(3, probability=0.0) is None, draw_column(1, probability=1.0)
        (True, 0)
    """
    column = int(column_index(torch.empty(0), columns, probability))
    return None if column < 0 else column


@leaf_function
def masked_join(inputs: Sequence[Tensor], drop: float, first: int, column: Tensor | None) -> Tensor:
    """Return the join of inputs, some dropped by a random mask. Graphs use it: they compute every input.

    Args:
        inputs: one tensor of each column from ``first`` on.
        drop: probability of dropping an input.
        first: the column of the first input.
        column: keep this column alone, if it is one of the inputs'; int64, −1 for none.
    """
    mask = path_mask(len(inputs), drop).to(inputs[0].device)
    if column is not None:
        alone = torch.arange(first, first + len(inputs), device=mask.device) == column
        mask = torch.where(alone.any(), alone, mask)
    stacked = torch.stack([*inputs], dim=-1)
    return torch.where(mask, stacked, 0).sum(dim=-1) / mask.sum()


@dataclass(eq=False)
class _Node:
    """A layer or a join, whose output is computed from other nodes when it is first read."""

    compute: Callable[..., Tensor]
    inputs: "Sequence[_Node]" = ()
    output: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.output is None:
            self.output = self.compute(*(node() for node in self.inputs))
        return self.output


class FractalBlock(nn.Module):
    """The fractal of C columns: ``f_1 = conv``, ``f_{c+1}(z) = (f_c ∘ f_c)(z) ⊕ conv(z)``; adjacent joins form one.

    Column 0 is the shallowest, with one layer, and column c has 2ᶜ layers. A layer that no kept path needs is not
    computed, and its parameters get a gradient of zero. In graphs of ``torch.fx`` and ``torch.export`` and under
    ``torch.func`` every layer is computed, and masks drop inputs of joins.

    Args:
        columns: C.
        layer: creates a layer from its number of input channels and its number of output channels.
        inputs: channels of the block's input.
        outputs: channels after every layer.
        drop_path: probability of dropping an input of a join in training, drawn once per mini-batch.

    Shape: (batch, inputs, ...) to (batch, outputs, ...).

    Raises:
        ConfigurationError: ``columns`` is below 1, or ``drop_path`` is not in [0, 1].

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
        check_count("columns", columns, "[1, inf)")
        check_range("drop_path", drop_path, "[0, 1]")
        self.columns = nn.ModuleList(
            nn.ModuleList(layer(outputs if number else inputs, outputs) for number in range(2**column))
            for column in range(columns)
        )
        self.drop_path = drop_path

    @override
    def forward(self, x: Tensor, column: int | Tensor | None = None) -> Tensor:
        """Return the join of all columns.

        Args:
            x: the block's input.
            column: compute this column alone, in training and in evaluation; in graphs, a tensor as
                :func:`column_index` draws it.

        Raises:
            ConfigurationError: there is no such column.
        """
        if isinstance(column, int) and not 0 <= column < len(self.columns):
            raise ConfigurationError(f"column must be an integer in [0, {len(self.columns) - 1}], not {column}")
        columns = [[*stack.children()] for stack in self.columns]
        steps = len(columns[-1])  # one iteration per layer of the deepest column; layers of other columns span several
        layers: list[tuple[nn.Module, _Node]] = []
        inputs = [_Node(lambda: x)] * len(columns)  # input of the next layer of each column
        for step in range(1, steps + 1):  # all draws are made before anything is computed
            first = next(number for number, stack in enumerate(columns) if step * len(stack) % steps == 0)
            ending = [stack[step * len(stack) // steps - 1] for stack in columns[first:]]
            outputs = [_Node(layer, [z]) for layer, z in zip(ending, inputs[first:], strict=True)]
            layers += zip(ending, outputs, strict=True)
            inputs[first:] = [self._join(outputs, first, column, in_graph(x))] * len(outputs)
        out = inputs[0]()
        unused = [layer for layer, node in layers if node.output is None]
        parameters = (parameter for layer in unused for parameter in layer.parameters())
        return zero_gradients(out, parameters) if unused and self.training else out

    def _join(self, outputs: list[_Node], first: int, column: int | Tensor | None, graph: bool) -> _Node:
        """Return the join of the inputs that are not dropped; they come from column ``first`` and those below it."""
        if isinstance(column, int):  # no node reads this join if the column is shallower than the first
            outputs = [output for number, output in enumerate(outputs, first) if number == column]
        elif graph and self.training and len(outputs) > 1:
            return _Node(lambda *tensors: masked_join(tensors, self.drop_path, first, column), outputs)
        elif self.training and self.drop_path and len(outputs) > 1:
            outputs = [outputs[path] for path in draw_paths(len(outputs), self.drop_path)]
        return _Node(lambda *tensors: fractal_join(tensors), outputs)

    @override
    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"
