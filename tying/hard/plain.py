"""Weights of a tied model as those of the untied one, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError
from tying.hard.related import related
from tying.hard.sharing import Record, are_equal
from tying.names import clean_name

Unequal = Literal["error", "source", "mean"]


def bake(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the untied model loads without this package.

    Every tensor is a contiguous copy of its own on the CPU, so that any format can hold it, safetensors too. What is
    parametrized is computed, whoever has parametrized it.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight | o i -> i o"])
        >>> nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).load_state_dict(bake(model))
        <All keys matched successfully>
    """
    plain = {clean_name(key): value for key, value in model.state_dict().items() if "parametrizations." not in key}
    plain |= {clean_name(key): getattr(owner, name) for key, owner, name, _ in _computed(model)}
    return {
        key: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for key, value in plain.items()
        if isinstance(value, Tensor)
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
    reconciled = dict(state_dict)
    differing = []
    record: Record = model.__dict__.get("_hard_ties") or Record()
    for shared in record.groups:
        known = [
            (name, relation)
            for name, relation in zip(shared.names, shared.relations, strict=True)
            if name in state_dict
        ]
        copies = [relation.inverse()(state_dict[name]) for name, relation in known]
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
    assigned = []
    for key, owner, name, held in _computed(model):
        if key not in reconciled:
            continue
        if not all(hasattr(one, "right_inverse") for one in held):
            raise ConfigurationError(f"{key!r} is parametrized without a right_inverse: it cannot take a plain weight")
        assigned.append((owner, name, reconciled.pop(key)))
        reconciled |= {own: value for own, value in model.state_dict().items() if own.startswith(_prefix(key))}
    model.load_state_dict(reconciled)
    for owner, name, weight in assigned:
        setattr(owner, name, weight)
    return differing


def _computed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, ParametrizationList]]:
    """Yield key, owner, name and parametrization of all weights that are parametrized by others than ties."""
    for path, owner in model.named_modules():
        tied = {name for name, _, _ in related(owner)}
        for name, held in getattr(owner, "parametrizations", {}).items():
            if name not in tied:
                yield f"{path}.{name}".lstrip("."), owner, name, held


def _prefix(key: str) -> str:
    module, _, name = key.rpartition(".")
    return f"{module}.parametrizations.{name}.".lstrip(".")
