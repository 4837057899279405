"""Check a model at its first forward pass in a run of several processes: only then is it known how it is sharded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tying.weights.sharding import is_distributed


def check_at_first_call(module: nn.Module, check: Callable[[nn.Module], None]) -> None:
    """Call ``check(module)`` before the module's next forward pass, once, if there are several processes."""
    name = f"_first_call_{check.__name__}"
    if is_distributed() and name not in vars(module):
        vars(module)[name] = module.register_forward_pre_hook(partial(_check, check, name))


def _check(check: Callable[[nn.Module], None], name: str, module: nn.Module, inputs: Any) -> None:
    if not torch.compiler.is_compiling():
        vars(module).pop(name).remove()
        check(module)
