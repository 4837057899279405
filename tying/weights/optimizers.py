"""Optimizers of shared and derived weights: parameter groups, and states of weights that become one."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tying.errors import ConfigurationError
from tying.selection.index import clean_name
from tying.selection.tie import TiedGroup
from tying.weights.derived import derived_weights


@torch.no_grad()
def merge_optimizer_state(optimizers: Sequence[Optimizer], groups: Sequence[TiedGroup]) -> None:
    """Replace the members of each group in the optimizers by the source, which stays in its parameter group.

    State tensors of the source's shape become the mean over the members, in the source's layout. Numbers, such as a
    step count, keep the source's value.

    Args:
        optimizers: changed in place.
        groups: groups whose members are still separate parameters.

    Example:
        >>> from tying import resolve
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> for parameter, momentum in zip(model.parameters(), (1.0, 3.0)):
        ...     optimizer.state[parameter]["momentum_buffer"] = torch.full((1, 1), momentum)
        >>> merge_optimizer_state([optimizer], resolve(model, ["0.weight ~ 1.weight"]))
        >>> len(optimizer.param_groups[0]["params"]), optimizer.state[model[0].weight]["momentum_buffer"].item()
        (1, 2.0)
    """
    param_groups = [param_group for optimizer in optimizers for param_group in optimizer.param_groups]
    places = {id(p): place for place, p in enumerate(p for param_group in param_groups for p in param_group["params"])}
    replaced: dict[int, nn.Parameter | None] = {}  # what takes the place of a parameter that leaves, by identity
    for group in groups:
        source, *others = group.parameters
        _average_state(optimizers, group)
        replaced |= dict.fromkeys(map(id, others))
        trained = [parameter for parameter in others if id(parameter) in places]
        if trained and id(source) not in places:  # the source takes a member's place
            replaced[min((id(parameter) for parameter in trained), key=places.__getitem__)] = source
        for optimizer in optimizers:
            for parameter in others:
                optimizer.state.pop(parameter, None)
    for param_group in param_groups:
        kept = (replaced.get(id(parameter), parameter) for parameter in param_group["params"])
        param_group["params"] = [parameter for parameter in kept if parameter is not None]


def _average_state(optimizers: Sequence[Optimizer], group: TiedGroup) -> None:
    """Replace the source's state tensors by means over the members of its group."""
    source = group.parameters[0]
    states = {id(p): optimizer.state[p] for optimizer in optimizers for p in group.parameters if p in optimizer.state}
    merged = states.get(id(source), {})
    for key, value in merged.items():
        if isinstance(value, Tensor) and value.shape == source.shape and value.ndim:
            members = zip(group.to_source, group.parameters, strict=True)
            copies = ((read, states.get(id(parameter), {}).get(key)) for read, parameter in members)
            merged[key] = torch.stack([read(copy) for read, copy in copies if isinstance(copy, Tensor)]).mean(dim=0)


def drop_parameters(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters, and their states, from optimizers; the order of the others stays.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> drop_parameters([optimizer], [layer.weight])
        >>> optimizer.param_groups[0]["params"] == [layer.bias]
        True
    """
    dropped = {*parameters}
    for optimizer in optimizers:
        for parameter in dropped:
            optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in dropped]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups of a model, one of them without weight decay if some parameters must not decay.

    These are the parameters of weights whose parametrization has ``no_decay = True``, such as the coefficients of
    template mixtures.

    Args:
        model: the model.
        weight_decay: weight decay of all other parameters.

    Example:
        >>> from tying.hard import share_templates
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> _ = share_templates(model, ["*.weight"], templates=2)
        >>> [(len(group["params"]), group["weight_decay"]) for group in decay_groups(model, 0.1)]
        [(3, 0.1), (2, 0.0)]
    """
    undecayed: dict[nn.Parameter, None] = {}  # in order
    for derived in derived_weights(model).values():
        if any(getattr(step, "no_decay", False) for step in derived.steps):
            of_steps = {parameter for step in derived.steps for parameter in step.parameters()}
            undecayed |= dict.fromkeys(original for original in derived.originals if original not in of_steps)
    groups = [([p for p in model.parameters() if p not in undecayed], weight_decay), ([*undecayed], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def shared_in(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Return those of the parameters that a model has under several names, with these names."""
    names: dict[nn.Parameter, list[str]] = {parameter: [] for parameter in parameters}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            names[parameter].append(clean_name(name))
    return {parameter: " = ".join(shared) for parameter, shared in names.items() if len(shared) > 1}


def are_alike(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether weights can be one parameter: all trained or all frozen, of one dtype, on one device."""
    return len({(p.requires_grad, p.dtype, p.device) for p in parameters}) == 1


def check_alike(first: nn.Parameter, second: nn.Parameter, message: str) -> None:
    """Raise a ConfigurationError that begins with ``message`` unless two weights can be one parameter."""
    for what in ("requires_grad", "dtype", "device"):
        if getattr(first, what) != getattr(second, what):
            raise ConfigurationError(
                f"{message}: {what} is {getattr(first, what)} for one and {getattr(second, what)} for the other. Make "
                "them alike first, or exclude one of them"
            )
