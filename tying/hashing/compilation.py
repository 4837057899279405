"""Entries of a table computed by compiled code."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tying.hashing.lookup import CHUNK, Slots, gather


def compiled(slots: Slots, size: int, name: str) -> Slots:
    """Return slots that compiled code computes, on the CPU; where torch cannot compile them, slots as they are.

    Args:
        slots: that are computed.
        size: of the table.
        name: of the hash, for the warning.

    Warns:
        UserWarning: torch cannot: this machine has no compiler, or the hash has what torch does not know.
    """

    def runs(starts: Tensor) -> Tensor:
        return slots.compute(starts + torch.arange(CHUNK, device="cpu"))

    def read(table: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # where compilation is off after all: by chunks, not a whole index
            return gather(table, slots)
        return table[slots.compute(torch.arange(slots.count, device="cpu"))]

    quickly, read_all = _compiled(runs), _compiled(read)
    try:
        # unlike `fullgraph=True`, this does not trace what a hash does in Python for each number
        with torch._dynamo.error_on_graph_break(True):
            quickly(torch.tensor([[0], [CHUNK]], device="cpu"))
            read_all(torch.zeros(size, device="cpu"))
    except Exception as error:
        warnings.warn(f"{name} is computed without compilation, hence slowly: {error}", stacklevel=2)
        return slots
    return replace(slots, quickly=quickly, read=read_all)


def traced() -> bool:
    """Tell whether operations are recorded, or done on tensors without numbers, which compiled code cannot be."""
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or is_in_torch_dispatch_mode()  # type: ignore[attr-defined, no-untyped-call]


def _compiled(function: Any) -> Any:
    """Compile a function with code of its own, lest torch count it among the variants of another hash's."""
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return torch.compile(own)
