"""Fractal blocks: columns of different depth, joined at several points; training drops some inputs of each join."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.depth.draws import agreed_rand
from tying.depth.merge import zero_gradients
from tying.errors import ConfigurationError, check_range


def fractal_join(inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of the inputs that are not dropped; a single input is returned as is.

    Example:
        >>> fractal_join([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])

    Source: G. Larsson, M. Maire and G. Shakhnarovich, FractalNet: ultra-deep neural networks without residuals, 2017.
    """
    return inputs[0] if len(inputs) == 1 else torch.stack([*inputs]).mean(dim=0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; a decision in Python cannot be part of a graph
def draw_paths(count: int, drop: float) -> list[int]:
    """Return the indices of the kept inputs of a join: each is kept with probability 1 − drop, and at least one is.

    If all are dropped, one input is drawn uniformly and kept. The result is the same in all processes.

    Example:
        >>> draw_paths(3, drop=0.0)
        [0, 1, 2]
    """
    numbers = agreed_rand(count + 1)
    return [i for i in range(count) if numbers[i] >= drop] or [min(int(numbers[count] * count), count - 1)]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def draw_column(columns: int, probability: float) -> int | None:
    """Return a random column with the given probability, and ``None`` otherwise.

    Columns are drawn uniformly. The result is the same in all processes.

    Example:
        >>> draw_column(3, probability=0.0) is None, draw_column(1, probability=1.0)
        (True, 0)
    """
    numbers = agreed_rand(2)
    return min(int(numbers[1] * columns), columns - 1) if numbers[0] < probability else None


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
    computed, and its parameters get a gradient of zero.

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
        check_range("columns", columns, "[1, inf)")
        check_range("drop_path", drop_path, "[0, 1]")
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
            column: compute this column alone, in training and in evaluation.

        Raises:
            ConfigurationError: there is no such column.
        """
        if column is not None and not 0 <= column < len(self.columns):
            raise ConfigurationError(f"columns are 0 to {len(self.columns) - 1}, not {column}")
        columns = [[*stack.children()] for stack in self.columns]
        steps = len(columns[-1])  # one iteration per layer of the deepest column; layers of other columns span several
        layers: list[tuple[nn.Module, _Node]] = []
        inputs = [_Node(lambda: x)] * len(columns)  # input of the next layer of each column
        for step in range(1, steps + 1):  # all draws are made before anything is computed
            first = next(number for number, stack in enumerate(columns) if step * len(stack) % steps == 0)
            ending = [stack[step * len(stack) // steps - 1] for stack in columns[first:]]
            outputs = [_Node(layer, [z]) for layer, z in zip(ending, inputs[first:], strict=True)]
            layers += zip(ending, outputs, strict=True)
            joined = _Node(lambda *tensors: fractal_join(tensors), self._kept(outputs, first, column))
            inputs[first:] = [joined] * len(outputs)
        out = inputs[0]()
        unused = [layer for layer, node in layers if node.output is None]
        parameters = (parameter for layer in unused for parameter in layer.parameters())
        return zero_gradients(out, parameters) if unused and self.training else out

    def _kept(self, outputs: list[_Node], first: int, column: int | None) -> list[_Node]:
        """Return the inputs of a join that are not dropped; they come from column ``first`` and all deeper columns."""
        if column is not None:  # no node reads this join if the column is shallower than the first
            return [output for number, output in enumerate(outputs, first) if number == column]
        if self.training and self.drop_path and len(outputs) > 1:
            return [outputs[path] for path in draw_paths(len(outputs), self.drop_path)]
        return outputs

    @override
    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"
