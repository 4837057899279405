"""Names of torch that are private, each with the reason; written against torch 2.11 to 2.15.

Everything else in this package uses torch's public names, `lightning_workarounds` holds those of Lightning.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

# fused operations over lists of tensors, as torch's own optimizers use them: there is no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

# the two branches of an encoder layer; its public forward adds both to their shortcuts, which a merge does instead
attention_branch = nn.TransformerEncoderLayer._sa_block
feed_forward_branch = nn.TransformerEncoderLayer._ff_block


def is_traced() -> bool:
    """Return whether operations are being recorded, or run on tensors without values: compiled code cannot run then.

    torch has no public test for dispatch modes, such as that of fake tensors.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or is_in_torch_dispatch_mode()  # type: ignore[attr-defined, no-untyped-call]


def error_on_graph_break() -> AbstractContextManager[None]:
    """Return a context in which compilation fails instead of falling back to Python.

    The public ``fullgraph=True`` also traces the Python code that a hash runs for each number.
    """
    context: AbstractContextManager[None] = torch._dynamo.error_on_graph_break(True)
    return context


def compile_apart(function: Any) -> Any:
    """Compile a closure with its own code object.

    torch counts recompilations per code object, publicly with one limit for all: closures over different hashes would
    soon reach it.
    """
    return torch.compile(FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__))


class FollowsDevice(nn.Module):
    """A module with tensors that are neither parameters nor buffers, and that move to its device with it.

    torch has no hook for moves: ``_apply`` is what ``to``, ``cuda``, ``to_empty`` and the like call.

    Attributes:
        device: the device of these tensors; a module on the meta device keeps them where they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def move(self) -> None:
        """Move the tensors to ``self.device``."""
        raise NotImplementedError

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        device = fn(torch.empty(0, device=self.device)).device
        if device.type != "meta":
            self.device = device
            self.move()
        return self


# makes a parametrized weight a property of its module's class, with the cache of `parametrize.cached()`: publicly this
# comes only with torch's own class, which copies share
inject_property = parametrize._inject_property


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution layer's output with another weight and bias: publicly, a layer takes only its own."""
    output: Tensor = layer._conv_forward(input, weight, bias)  # type: ignore[operator]  # a convolution's
    return output
