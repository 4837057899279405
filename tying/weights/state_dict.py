"""Plain state dicts of models with shared or computed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError
from tying.selection.index import clean_name, unwrapped
from tying.weights.derived import DerivedWeight, derived_weights, eval_mode
from tying.weights.link import links_in
from tying.weights.record import are_equal, in_source, tie_records

Unequal = Literal["error", "source", "mean"]


def bake(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the untied model loads without this package.

    Every tensor is a contiguous copy of its own on the CPU, so that any format can hold it, safetensors too; extra
    state of modules that is no tensor stays as it is. What is parametrized is computed, whoever has parametrized it.
    These are weights alone: what a model does with them otherwise than a plain one, such as a merge that scales
    branches at test time, is not in them.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight | o i -> i o"])
        >>> nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).load_state_dict(bake(model))
        <All keys matched successfully>
    """
    computed = derived_by_others(model)
    state = {unwrapped(key): value for key, value in model.state_dict().items()}
    plain = {clean_name(key): state[key] for key in state if not any(key.startswith(one) for one in _hidden(computed))}
    with eval_mode(model):
        plain |= {key: getattr(one.owner, one.name) for key, one in computed.items()}
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in plain.items()}
    return {
        key: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        if isinstance(value, Tensor)
        else value
        for key, value in whole.items()
    }


def load_plain(model: nn.Module, state_dict: Mapping[str, Tensor], unequal: Unequal = "error") -> list[str]:
    """Load a state dict of the untied model into a tied one, whatever its copies of a tied weight are.

    Args:
        model: the tied model; may have parametrized weights that have a ``right_inverse``.
        state_dict: with the names of the untied model.
        unequal: what to do where copies differ: raise, take that of the source, or take their mean.

    Returns:
        The names of the weights whose copies differed.

    Raises:
        ConfigurationError: copies differ and ``unequal`` is ``"error"``, or a weight cannot be parametrized; nothing is
            loaded.
        RuntimeError: names or shapes do not fit, as of ``load_state_dict``.
    """
    if unequal not in ("error", "source", "mean"):
        raise ConfigurationError(f"unequal is 'error', 'source' or 'mean', not {unequal!r}")
    reconciled = {unwrapped(key): value for key, value in state_dict.items()}
    differing = []
    for shared in tie_records(model):
        known = [pair for pair in zip(shared.names, shared.relations, strict=True) if pair[0] in reconciled]
        copies = [in_source(name, reconciled[name], relation) for name, relation in known]
        for (name, _), copy in zip(known, copies, strict=True):
            if copy.shape != copies[0].shape:
                raise ConfigurationError(f"{known[0][0]!r} and {name!r} are tied, and differ in shape here")
        if all(are_equal(copies[0], copy) for copy in copies):
            continue
        if unequal == "error":
            raise ConfigurationError(
                f"{', '.join(repr(name) for name, _ in known)} are tied, but differ in this state dict: say "
                "unequal='source' to take the first, or unequal='mean'"
            )
        weight = copies[0] if unequal == "source" else torch.stack(copies).mean(dim=0)
        reconciled |= {name: relation(weight) for name, relation in known}
        differing += [name for name, _ in known]
    own = model.state_dict()
    clean = {unwrapped(real): value for real, value in own.items()}
    assigned: dict[DerivedWeight, Tensor] = {}
    for key, one in derived_by_others(model).items():
        if key not in reconciled:
            continue
        like, *_ = one.originals
        inverse = weight = reconciled.pop(key).to(like.device, like.dtype)
        for step in reversed(one.steps):  # before anything is loaded: does it fit?
            if not hasattr(step, "right_inverse"):
                raise ConfigurationError(
                    f"{key!r} is parametrized without a right_inverse: it cannot take a plain weight"
                )
            inverse = step.right_inverse(inverse)  # type: ignore[operator]  # a method
        assigned[one] = weight
        hidden = tuple(_hidden({key: one}))
        reconciled |= {name: value for name, value in clean.items() if name.startswith(hidden)}
    keys = {unwrapped(real): real for real in own}
    model.load_state_dict({keys.get(key, key): value for key, value in reconciled.items()})
    sharing: dict[nn.Parameter, list[tuple[nn.Module, Tensor]]] = {}  # by the one parameter they are computed from
    for one, weight in assigned.items():
        if len(one.steps) == len(one.originals) == 1 and hasattr(one.steps[0], "joint_inverse"):
            sharing.setdefault(one.originals[0], []).append((one.steps[0], weight))
        else:
            setattr(one.owner, one.name, weight)
    for table, parts in sharing.items():
        with torch.no_grad():
            table.copy_(parts[0][0].joint_inverse(parts, table))  # type: ignore[operator]  # a method
    return differing


def derived_by_others(model: nn.Module) -> dict[str, DerivedWeight]:
    """Return, by key, all weights that something else than a tie computes."""
    computed = derived_weights(model, aliases=True)
    return {key: one for key, one in computed.items() if one.name not in links_in(one.owner)}


def _hidden(computed: Mapping[str, DerivedWeight]) -> list[str]:
    """Return how the keys begin that stand for computed weights."""
    return [key.removesuffix(one.name) + prefix for key, one in computed.items() for prefix in one.prefixes]
