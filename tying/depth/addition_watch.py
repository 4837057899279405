"""Notice blocks that are not residual: they do not add their input to their output."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
COPIES = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous"}


@dataclass
class ResidualNotice:
    """Warns once if a block does not add its input to its output; all blocks of one ``apply_merge`` share it."""

    given: bool = False

    def give(self, block: str) -> None:
        """Warn, unless that has been done."""
        if not self.given:
            self.given = True
            warnings.warn(
                f"{block} does not add its input to its output, as residual blocks do. A merge treats it as one, since "
                "it keeps the shape of its input; if that is not what you want, name other blocks",
                stacklevel=2,
            )


class AdditionWatch(TorchFunctionMode):
    """Observes whether a tensor is added to another.

    Args:
        x: the tensor; views of it count, and copies in another dtype, in which some models add.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.equals, self.has_added = [x], False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function; remember if it adds the tensor."""
        name, values = getattr(func, "__name__", ""), (*args, *(kwargs or {}).values())
        output = func(*args, **(kwargs or {}))
        if name in ADDITIONS:
            self.has_added |= any(map(self._is_equal, values))
        elif name in COPIES and self._is_equal(values[0]):
            self.equals.append(output)
        return output

    def _is_equal(self, value: object) -> bool:
        return any(is_view(value, x) for x in self.equals)


def is_view(value: object, x: Tensor) -> bool:
    """Return whether a value is a tensor, or a view of it.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 3)
        >>> is_view(x.flatten(), x), is_view(x + 1, x)
        (True, False)
    """
    if value is x or type(value) is not Tensor or type(x) is not Tensor:
        return value is x
    return value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
