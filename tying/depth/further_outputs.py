"""The outputs of a block beside its hidden state."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor


@dataclass(frozen=True)
class FurtherOutputs:
    """The outputs of a block after the first: what a skipped block returns for them.

    Attributes:
        container: makes the outputs from a list; None if the block returns a single tensor.
        constants: None, numbers and strings, by the number of the output; the second output has number 2.
        passed: the labels of arguments that the block passes on, such as the height and width of its image.
        computed: descriptions of what only the block can compute.
    """

    container: Callable[[list[Any]], Any] | None = None
    constants: dict[int, Any] = field(default_factory=dict)
    passed: dict[int, str] = field(default_factory=dict)
    computed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, outputs: Any, arguments: Mapping[str, Any]) -> "FurtherOutputs":
        """Return where the outputs of a call with the given arguments come from."""
        if isinstance(outputs, Tensor):
            return cls()
        further = cls(container_of(outputs))
        for number, value in enumerate(outputs[1:], 2):
            if value is None or isinstance(value, (bool, int, float, str)):
                further.constants[number] = value
            elif label := next((label for label, argument in arguments.items() if is_same(argument, value)), None):
                further.passed[number] = label
            else:
                further.computed[number] = f"output {number} ({describe(value)})"
        return further

    def around(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Any:
        """Return the outputs of a block: the hidden state, and what the block passes on."""
        if self.container is None:
            return hidden
        further = self.constants | {number: arguments[label] for number, label in self.passed.items()}
        return self.container([hidden, *(further[number] for number in sorted(further))])


def is_same(argument: Any, output: Any) -> bool:
    """Return whether an output of a block is one of its arguments, or has the same sizes, a tuple or list of integers.

    Example:
        >>> is_same((4, 4), [4, 4]), is_same([4, 4], [2, 2]), is_same([], [])
        (True, False, False)
    """
    if argument is output:
        return True
    sizes = [[*value] if isinstance(value, (tuple, list)) else [] for value in (argument, output)]
    return bool(sizes[0]) and sizes[0] == sizes[1] if all(type(n) is int for part in sizes for n in part) else False


def first_output(outputs: Any) -> Any:
    """Return the first item of a tuple or list, or another output as it is."""
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def container_of(outputs: Any) -> Callable[[list[Any]], Any]:
    """Return the function that makes a tuple, named tuple or list like the given one from a list."""
    return cast(Callable[[list[Any]], Any], getattr(outputs, "_make", type(outputs)))


def labelled_parts(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value and its label, and those of its parts if it is a tuple, list or dict.

    Example:
        >>> [*labelled_parts("pair", (1, 2))]
        [('pair', (1, 2)), ('pair[0]', 1), ('pair[1]', 2)]
    """
    yield label, value
    if isinstance(value, (tuple, list, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from labelled_parts(f"{label}[{key!r}]", part)


def describe(value: Any) -> str:
    """Describe an output in an error.

    Example:
        >>> import torch
        >>> describe(torch.ones(2, 3)), describe({})
        ('a tensor of shape (2, 3)', 'a dict')
    """
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
