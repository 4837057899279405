"""All uses of private names of torch, timm and transformers, each with its reason.

Tested with torch 2.11 to 2.15, timm 1.0 and transformers 5.23.

The rest of this package uses public names of torch. The private names of Lightning are in `lightning_workarounds`.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from traceback import walk_stack
from types import FunctionType
from typing import Any, Self, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode
from typing_extensions import override

# fused operations over lists of tensors, which torch's optimizers use: they have no public name
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub

# the two branches of an encoder layer: its public forward adds them to their shortcuts, which a merge must do instead
attention_branch = nn.TransformerEncoderLayer._sa_block
feed_forward_branch = nn.TransformerEncoderLayer._ff_block


def windowed_attention(block: Any, x: Tensor) -> Tensor:
    """Return the branch of attention of timm's Swin block, whose public forward adds it to its shortcut."""
    attended: Tensor = block._attn(x)
    return attended


def recorded_parts() -> list[str]:
    """Return the names of outputs that transformers' hooks now record within blocks, such as attentions.

    The hooks stay on the modules when they record nothing, and transformers has no public name that tells.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    names = capturing._active_collector.get() if capturing is not None else None
    return [name for name in names or () if name != "hidden_states" and not name.startswith("_")]


# whether a transform such as torch.func.vmap runs; and the public torch.jit.is_tracing, which takes twice the time
innermost_transform = torch._C._functorch.peek_interpreter_stack
is_jit_tracing = torch._C._is_tracing


def is_traced() -> bool:
    """Return whether operations are traced or run on fake tensors: compiled code cannot run then.

    torch has no public test for dispatch modes, which fake tensors use.
    """
    if torch.compiler.is_compiling():
        return True
    return is_jit_tracing() or is_in_torch_dispatch_mode()


def is_recorded() -> bool:
    """Return whether operations are exported, recorded or transformed: Python code cannot branch on their values.

    These are ``torch.export``, ``torch.jit.trace``, ``make_fx``, fake tensors, and transforms such as
    ``torch.func.vmap``. Code under ``torch.compile`` may decide in Python, at a graph break. torch has no public test
    for transforms, nor for the dispatch modes of ``make_fx`` and fake tensors.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        innermost_transform() is not None
        or is_jit_tracing()
        or (is_in_torch_dispatch_mode() and any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()))
    )


def breaks_graph_at_rnn() -> bool:
    """Return whether ``torch.compile`` runs and breaks its graph at recurrent layers of torch, as by default."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not torch._dynamo.config.allow_rnn


def in_backward() -> bool:
    """Return whether a backward pass runs, as while gradient checkpointing recomputes; torch has no public test.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> _ = x.register_hook(lambda gradient: print(in_backward()))
        >>> in_backward(), x.sum().backward()
        True
        (False, None)
    """
    return torch._C._current_graph_task_id() != -1


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values: meta tensors have none, nor have fake tensors, which have no public name."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def load_elsewhere(module: nn.Module, name: str) -> None:
    """Let Lightning and torch's distributed checkpoints skip a parameter when they load a module's own parameters.

    They look each parameter up by its name in the module, before any hook can rename it, and skip only names in this
    private set. Saving and ``load_state_dict`` treat the parameter as any other.
    """
    module._non_persistent_buffers_set.add(name)


def count_writes(tensor: Tensor) -> int | None:
    """Return how often a tensor and its views were written to in place; None if it cannot be known.

    torch has no public name for the number.

    Example:
        >>> x = torch.zeros(2)
        >>> count_writes(x), count_writes(x.add_(1))
        (0, 1)
    """
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def is_proxy(value: object) -> bool:
    """Return whether a value is a ``torch.fx.Proxy``, which stands for a tensor during a trace."""
    return isinstance(value, Proxy)


def error_on_graph_break() -> AbstractContextManager[None]:
    """Return a context in which a graph break raises an error instead of falling back to Python.

    The public ``fullgraph=True`` also traces the Python code that a hash runs for each number.
    """
    context: AbstractContextManager[None] = torch._dynamo.error_on_graph_break(True)
    return context


def compile_apart(function: Any) -> Any:
    """Compile a closure with a copy of its code object.

    torch counts recompilations per code object, and the public limit holds for all functions: closures over different
    hashes share one code object, and would soon reach the limit.
    """
    return torch.compile(FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__))


class FollowsDevice(nn.Module):
    """A module that moves tensors to its device although they are neither parameters nor buffers.

    torch has no public hook for moves; ``to``, ``cuda`` and ``to_empty`` all call ``_apply``.

    Attributes:
        device: the device of these tensors; a move of the module to the meta device does not move them.
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


# makes a parametrized weight a property of its module's class, with the cache of `parametrize.cached()`; the public
# `register_parametrization` also makes a class, which copies of the module share
inject_property = parametrize._inject_property


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution layer's output for another weight and bias, which the public forward does not accept."""
    output: Tensor = layer._conv_forward(input, weight, bias)  # type: ignore[operator]  # a convolution's
    return output


def is_strict_load() -> bool:
    """Return the ``strict`` argument of the running ``load_state_dict``; torch passes True to all hooks.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_load_state_dict_pre_hook(lambda *_: print(is_strict_load()))
        >>> _ = layer.load_state_dict({}, strict=False)
        False
    """
    load = nn.Module.load_state_dict.__code__
    return next((bool(frame.f_locals["strict"]) for frame, _ in walk_stack(None) if frame.f_code is load), True)


def contiguous_view(view: Tensor) -> Tensor:
    """Return a contiguous copy of a view; until it is written to, it is pickled and copied as the view.

    safetensors needs contiguous tensors, and torch.save stores the bytes of a tensor and its views once. A subclass of
    Tensor could do both, but ``nn.Parameter`` refuses it; pickle and copy also take their methods from an object
    itself. torch has no public name for the number of writes to a tensor.

    Example:
        >>> source = torch.zeros(2, 3)
        >>> copied = contiguous_view(source.T)
        >>> copied.is_contiguous(), viewed(copied).is_contiguous(), viewed(copied.zero_()).is_contiguous()
        (True, False, True)
    """
    with torch.inference_mode(False):  # which does not count writes
        copied = view.contiguous()
    _ViewState(view, copied)
    return copied


def viewed(entry: Any) -> Any:
    """Return an entry of a state dict, or the view for which it stands; see :func:`contiguous_view`."""
    state = getattr(entry, "view_state", None)
    return state.current() if isinstance(state, _ViewState) else entry


class _ViewState:
    """How a contiguous copy of a view is pickled and copied."""

    def __init__(self, view: Tensor, copied: Tensor) -> None:
        # a strong reference would be circular, and keep the memory
        self.view, self.copied, self.writes = view, ref(copied), copied._version
        members = {"view_state": self, "__reduce_ex__": self.reduce, "__deepcopy__": self.deepcopy}
        copied.__dict__.update(members)

    def current(self) -> Tensor:
        """Return the view, or the copy if something has been written to it."""
        copied = cast(Tensor, self.copied())
        return self.view if copied._version == self.writes else copied.detach()

    def reduce(self, protocol: Any) -> Any:
        return self.current().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's

    def deepcopy(self, memo: dict[int, Any]) -> Tensor:
        current = self.current()
        copied: Tensor = deepcopy(current, memo)
        return contiguous_view(copied) if current is self.view else copied
