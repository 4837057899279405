"""Check the inputs and states of recurrent layers."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tying.errors import ConfigurationError


def steps_first(x: Tensor | PackedSequence, features: int, batch_first: bool = False) -> Tensor:
    """Return sequences as (steps, batch, features).

    Raises:
        ConfigurationError: x has another shape, has no steps, or is a packed sequence.

    Example:
        >>> import torch
        >>> steps_first(torch.zeros(2, 5, 3), 3, batch_first=True).shape
        torch.Size([5, 2, 3])
    """
    if isinstance(x, PackedSequence):
        raise ConfigurationError("only ZoneoutLSTM takes packed sequences: pad them, and mask the loss")
    if x.ndim != 3 or x.shape[2] != features:
        axes = "batch, steps" if batch_first else "steps, batch"
        raise ConfigurationError(f"inputs are ({axes}, {features}), not {tuple(x.shape)}")
    if not x.shape[1 if batch_first else 0]:
        raise ConfigurationError("an empty sequence has no steps: give one of length 1 or more")
    return x.transpose(0, 1) if batch_first else x


def initial_state(x: Tensor, state: Sequence[Tensor] | None, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return the parts of a state, or zeros of these shapes in x's dtype and device if no state is given.

    Raises:
        ConfigurationError: the parts have other shapes.

    Example:
        >>> import torch
        >>> [part.shape for part in initial_state(torch.zeros(5, 2, 3), None, (1, 2, 4), (1, 2, 4))]
        [torch.Size([1, 2, 4]), torch.Size([1, 2, 4])]
    """
    parts = [x.new_zeros(shape) for shape in shapes] if state is None else [*state]
    check_shapes("states", parts, *shapes)
    return parts


def check_shapes(name: str, tensors: Sequence[Tensor], *shapes: tuple[int, ...]) -> None:
    """Raise a ConfigurationError that names the tensors unless they have these shapes."""
    actual = tuple(tuple(tensor.shape) for tensor in tensors)
    if actual != shapes:
        raise ConfigurationError(f"{name} are {', '.join(map(str, shapes))}, not {', '.join(map(str, actual))}")
