"""Optimizer state of weights that become one during training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tying.errors import ConfigurationError
from tying.selection.tie import TiedGroup


@torch.no_grad()
def merge_optimizer_state(optimizers: Sequence[Optimizer], group: TiedGroup) -> None:
    """Let optimizers hold one weight for a group: the source, in its own parameter group.

    What they keep of the source, entry by entry, becomes the mean over the members, in the source's layout; numbers,
    such as a count of steps, stay the source's.

    Args:
        optimizers: changed in place.
        group: members that are separate parameters still.

    Example:
        >>> from tying import resolve
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> for parameter, momentum in zip(model.parameters(), (1.0, 3.0)):
        ...     optimizer.state[parameter]["momentum_buffer"] = torch.full((1, 1), momentum)
        >>> merge_optimizer_state([optimizer], resolve(model, ["0.weight ~ 1.weight"])[0])
        >>> len(optimizer.param_groups[0]["params"]), optimizer.state[model[0].weight]["momentum_buffer"].item()
        (1, 2.0)
    """
    source, *others = group.parameters
    states = {id(p): optimizer.state[p] for optimizer in optimizers for p in group.parameters if p in optimizer.state}
    known = [
        (states[id(p)], read) for p, read in zip(group.parameters, group.to_source, strict=True) if id(p) in states
    ]
    merged = states.get(id(source), {})
    for key, value in merged.items():
        if isinstance(value, Tensor) and value.shape == source.shape and value.ndim:
            copies = [read(state[key]) for state, read in known if isinstance(state.get(key), Tensor)]
            merged[key] = torch.stack(copies).mean(dim=0)
    gone = {id(parameter) for parameter in others}
    groups = [held for optimizer in optimizers for held in optimizer.param_groups]
    if not any(parameter is source for held in groups for parameter in held["params"]):
        held = next((held for held in groups for parameter in held["params"] if id(parameter) in gone), None)
        if held is not None:  # the source was trained by nobody: it takes a member's place
            at = next(at for at, parameter in enumerate(held["params"]) if id(parameter) in gone)
            held["params"][at] = source
    for held in groups:
        held["params"] = [parameter for parameter in held["params"] if id(parameter) not in gone]
    for optimizer in optimizers:
        for parameter in others:
            optimizer.state.pop(parameter, None)


def are_alike(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether weights could be one: all trained or all frozen, of one type, on one device."""
    return len({(p.requires_grad, p.dtype, p.device) for p in parameters}) == 1


def check_alike(one: nn.Parameter, other: nn.Parameter, told: str) -> None:
    """Raise a ConfigurationError that begins as ``told`` where two weights could not be one."""
    for what in ("requires_grad", "dtype", "device"):
        if getattr(one, what) != getattr(other, what):
            raise ConfigurationError(
                f"{told}: {what} is {getattr(one, what)} for one and {getattr(other, what)} for the other"
            )
