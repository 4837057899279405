"""The interface of ``nn.LSTM`` for recurrent layers: their inputs, outputs and states, and the loop over steps."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from tying.depth.tracing import LeafModule
from tying.errors import ConfigurationError, check_counts, check_range

Input = Tensor | PackedSequence
Step = Callable[..., Sequence[Tensor]]
Layer = Callable[[Tensor, Sequence[Tensor], list[int] | None, bool], tuple[Tensor, Sequence[Tensor]]]
DEFAULTS = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}  # of nn.LSTM


@dataclass(frozen=True)
class Layout:
    """The layout of a recurrent layer's input, which its outputs and states have, too.

    Within the layer, sequences are (steps, batch, features) and states (layers, batch, size). Packed sequences stay
    packed, (all steps, features), and their states have the longest sequence first.

    Attributes:
        batched: False for a single sequence without a batch dimension.
        batch_first: whether a batch is (batch, steps, features).
        packed: the packed input, or ``None``.
    """

    batched: bool = True
    batch_first: bool = False
    packed: PackedSequence | None = None

    @property
    def batch_sizes(self) -> list[int] | None:
        """Number of sequences at each step, or ``None`` if it is always the same."""
        return None if self.packed is None else self.packed.batch_sizes.tolist()

    def enter(self, x: Input) -> Tensor:
        """Return sequences in the layout within the layer."""
        if isinstance(x, PackedSequence):
            return x.data
        if not self.batched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def leave(self, x: Tensor) -> Any:
        """Return outputs in the layout of the input."""
        if self.packed is not None:
            return PackedSequence(x, *self.packed[1:])
        if not self.batched:
            return x.squeeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def enter_state(
        self, x: Tensor, hx: Tensor | Sequence[Tensor] | None, *shapes: tuple[int, int], optional: int = 0
    ) -> list[Tensor]:
        """Return the parts of an initial state in the layout within the layer.

        Args:
            x: the input, within the layer.
            hx: the parts, or the only one, in the caller's layout; ``None`` for zeros.
            shapes: (layers, size) of each part.
            optional: number of last parts that may be missing, and are zeros then.
        """
        batch = x.shape[1] if self.packed is None else int(self.packed.batch_sizes[0])
        sizes = [(layers, batch, size) if self.batched else (layers, size) for layers, size in shapes]
        state = initial_state(x, hx, *sizes, optional=optional)
        if not self.batched:
            return [part.unsqueeze(1) for part in state]
        if self.packed is not None and self.packed.sorted_indices is not None:
            return [part.index_select(1, self.packed.sorted_indices) for part in state]
        return state

    def leave_state(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of the last state in the caller's layout."""
        if not self.batched:
            return [part.squeeze(1) for part in state]
        if self.packed is not None and self.packed.unsorted_indices is not None:
            return [part.index_select(1, self.packed.unsorted_indices) for part in state]
        return [*state]


def initial_state(
    x: Tensor, hx: Tensor | Sequence[Tensor] | None, *sizes: tuple[int, ...], optional: int = 0
) -> list[Tensor]:
    """Return the parts of a state; those that are not given are zeros in x's dtype and on its device.

    Args:
        x: the input.
        hx: the parts, or the only one; ``None`` for zeros.
        sizes: the size of each part.
        optional: number of last parts that may be missing.

    Raises:
        ConfigurationError: the parts have other sizes or another dtype, or their number is wrong.

    Example:
        >>> [part.shape for part in initial_state(torch.zeros(5, 2, 3), None, (1, 2, 4), (1, 2, 4))]
        [torch.Size([1, 2, 4]), torch.Size([1, 2, 4])]
    """
    parts: list[Any] = [] if hx is None else [hx] if len(sizes) == 1 else [*hx]
    counts = (len(sizes) - optional, len(sizes))
    single = len(sizes) > 1 and isinstance(hx, Tensor) and hx.ndim != len(sizes[0]) + 1  # not a stack of all parts
    if hx is not None and (single or len(parts) not in counts):
        expected = " or ".join(map(str, sorted({*counts})))
        actual = f"a tensor of size {tuple(hx.shape)}" if isinstance(hx, Tensor) else len(parts)
        raise ConfigurationError(f"Expected hx to be a tuple of {expected} tensors, got {actual}")
    for number, (part, size) in enumerate(zip(parts, sizes, strict=False)):
        name = "hx" if len(sizes) == 1 else f"hx[{number}]"
        check_size(name, part, size)
        if part.dtype != x.dtype and not autocasts(x):
            raise ConfigurationError(
                f"{name} dtype ({part.dtype}) does not match input dtype ({x.dtype}). Convert it: {name}.to({x.dtype})"
            )
    return parts + [x.new_zeros(size) for size in sizes[len(parts) :]]


def check_size(name: str, tensor: object, size: tuple[int, ...]) -> None:
    """Raise a ConfigurationError that names the tensor unless it has this size."""
    actual = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    if actual != size:
        raise ConfigurationError(f"Expected {name} size {size}, got {actual}")


def check_cell_input(cell: nn.LSTMCell, input: Tensor) -> None:
    """Raise a ConfigurationError unless the input of a cell is (batch, inputs) or (inputs,), and of its dtype."""
    if input.ndim not in (1, 2):
        raise ConfigurationError(f"{type(cell).__name__}: Expected input to be 1D or 2D, got {input.ndim}D instead")
    if input.shape[-1] != cell.input_size:
        raise ConfigurationError(f"input has inconsistent input_size: got {input.shape[-1]} expected {cell.input_size}")
    check_dtype(cell, input)


def check_dtype(layer: nn.Module, x: Tensor) -> None:
    """Raise a ConfigurationError unless an input has the dtype of the layer that multiplies it."""
    weight = next(layer.parameters())
    if x.dtype != weight.dtype and weight.is_floating_point() and not autocasts(x):
        raise ConfigurationError(
            f"input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). Convert input: "
            f"input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )


def autocasts(x: Tensor) -> bool:
    """Return whether autocast changes the precision of operations on x."""
    device = x.device.type  # torch raises an error for devices without autocast, such as meta
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not change the precision of operations on x."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def unroll(
    step: Step,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    batch_sizes: list[int] | None = None,
    reverse: bool = False,
    record: Step = lambda state: state[:1],
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Run one step after another; return the records of all states, and the last state.

    Args:
        step: ``step(state, *inputs)`` returns the next state of inputs (batch, features).
        inputs: tensors (steps, batch, features), or, of packed sequences, (all steps, features).
        state: initial state, parts of (batch, size).
        batch_sizes: for packed sequences, the number of sequences at each step.
        reverse: whether to begin with the last step of each sequence.
        record: function from a state to the tensors to return of it; default: its first part. They are laid out as
            the inputs.

    Example:
        >>> add = lambda state, x: [state[0] + x]
        >>> x = torch.ones(5, 1)  # packed sequences of 3 and 2 steps
        >>> [sums], [last] = unroll(add, [x], [torch.zeros(2, 1)], batch_sizes=[2, 2, 1])
        >>> sums.flatten().tolist(), last.flatten().tolist()
        ([1.0, 1.0, 2.0, 2.0, 3.0], [3.0, 2.0])
    """
    steps = [*zip(*(x.unbind() if batch_sizes is None else torch.split(x, batch_sizes) for x in inputs), strict=True)]
    initial, order = state, -1 if reverse else 1
    if batch_sizes is not None:
        state = [part[: batch_sizes[::order][0]] for part in initial]
    records: list[Sequence[Tensor]] = []
    ended: list[Sequence[Tensor]] = []
    for x in steps[::order]:
        if batch_sizes is not None:
            state = _resize(state, initial, len(x[0]), ended)
        state = step(state, *x)
        records.append(record(state))
    join = torch.stack if batch_sizes is None else torch.cat
    if ended:  # the shortest sequences stand last
        state = [torch.cat(parts[::-1]) for parts in zip(*ended, state, strict=True)]
    return [join(parts) for parts in zip(*records[::order], strict=True)], state


def _resize(
    state: Sequence[Tensor], initial: Sequence[Tensor], rows: int, ended: list[Sequence[Tensor]]
) -> Sequence[Tensor]:
    """Return the state of the sequences that have a step; append the last state of those that end to ``ended``."""
    if (ending := len(state[0]) - rows) > 0:
        state, last = zip(*(torch.split(part, [rows, ending]) for part in state), strict=True)
        ended.append(last)
    elif ending < 0:  # in reverse, shorter sequences begin later
        state = [torch.cat([part, first[len(part) : rows]]) for part, first in zip(state, initial, strict=True)]
    return state


class SequenceLayer(LeafModule):
    """Base class of recurrent layers that read sequences as ``nn.LSTM`` does, and have its attributes."""

    input_size: int
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    def enter(self, input: Input) -> tuple[Tensor, Layout]:
        """Return the input as (steps, batch, features) or, of packed sequences, (all steps, features), and its layout.

        Raises:
            ConfigurationError: the input has another size, or no steps.
        """
        packed = isinstance(input, PackedSequence)
        x: Tensor = input.data if isinstance(input, PackedSequence) else input
        if x.ndim != 2 and (packed or x.ndim != 3):
            expected = "packed data to be 2D" if packed else "input to be 2D or 3D"
            raise ConfigurationError(f"{type(self).__name__}: Expected {expected}, got {x.ndim}D instead")
        if x.shape[-1] != self.input_size:
            raise ConfigurationError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        layout = Layout(packed or x.ndim == 3, self.batch_first, input if isinstance(input, PackedSequence) else None)
        x = layout.enter(input)
        if not x.shape[0]:
            raise ConfigurationError("Expected input's sequence length to be larger than 0: an empty one has no steps")
        return x, layout

    def run_layers(
        self, layers: Iterable[Layer], x: Tensor, states: Sequence[Tensor], batch_sizes: list[int] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run layers, each on the outputs of the layer below, and return the outputs of the top and the last states.

        Args:
            layers: the layers, with the reverse direction of each after it.
            x: inputs.
            states: initial states, parts of (layers, batch, size).
            batch_sizes: for packed sequences, the number of sequences at each step.
        """
        directions = 2 if self.bidirectional else 1
        rows, ends = iter(zip(layers, *states, strict=True)), []
        for number in range(self.num_layers):
            x = F.dropout(x, self.dropout, self.training and number > 0)
            outputs = []
            for reverse, (layer, *state) in enumerate(islice(rows, directions)):
                output, end = layer(x, state, batch_sizes, bool(reverse))
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        return x, [torch.stack(parts) for parts in zip(*ends, strict=True)]


class RecurrentLayer(SequenceLayer):
    """Base class of recurrent layers with the interface of ``nn.LSTM``: its attributes and methods.

    Args:
        input_size: size of the input.
        hidden_size: size of the state.
        num_layers: number of layers.
        bias: whether the layers have biases.
        batch_first: inputs and outputs are (batch, steps, …) instead of (steps, batch, …).
        dropout: dropout probability for the outputs of all layers but the last.
        bidirectional: whether each layer also runs from the last step to the first.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_counts(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_range("dropout", dropout, "[0, 1]")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, and num_layers=1: it does nothing", UserWarning, stacklevel=3
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = float(dropout)

    def layer_input_sizes(self) -> list[int]:
        """Return the input size of each layer, with the reverse direction of each after it."""
        directions = 2 if self.bidirectional else 1
        above = [directions * self.hidden_size] * (self.num_layers - 1)
        return [size for size in (self.input_size, *above) for _ in range(directions)]

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        layers: list[Any] = [layer for stack in self.children() for layer in stack.children()]
        for layer in layers:
            layer.reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing: unlike the kernels of ``nn.LSTM``, these layers do not need contiguous parameters."""

    @override
    def extra_repr(self) -> str:
        others = [f"{name}={getattr(self, name)}" for name, value in DEFAULTS.items() if getattr(self, name) != value]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *others])
