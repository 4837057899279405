"""Plain state dicts of models with shared or derived weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, check_choice
from tying.selection.index import clean_name, unwrapped
from tying.weights.derived import DerivedWeight, derived_weights, eval_mode, links_in
from tying.weights.record import Unequal, reconcile


def bake(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the untied model loads without this package.

    Every tensor is a contiguous copy of its own on the CPU, so that any format can hold it, safetensors too; extra
    state of modules that is no tensor stays as it is. Derived weights are computed, whoever has parametrized them.
    These are weights alone: what a model does with them otherwise than a plain one, such as a merge that scales
    branches at test time, is not in them.

    Example:
        >>> from tying.hard import tie
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> _ = tie(model, ["0.weight ~ 1.weight | o i -> i o"])
        >>> nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).load_state_dict(bake(model))
        <All keys matched successfully>
    """
    derived = derived_by_others(model)
    hidden = tuple(prefix for key, weight in derived.items() for prefix in _prefixes(key, weight))
    state = model.state_dict()
    plain = {clean_name(key): state[key] for key in state if not unwrapped(key).startswith(hidden)}
    with eval_mode(model):
        plain |= {key: getattr(weight.owner, weight.name) for key, weight in derived.items()}
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in plain.items()}
    return {
        key: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        if isinstance(value, Tensor)
        else value
        for key, value in whole.items()
    }


def load_plain(model: nn.Module, state_dict: Mapping[str, Tensor], unequal: Unequal = "error") -> list[str]:
    """Load a state dict of the untied model into a tied one, also where its copies of a tied weight differ.

    Args:
        model: the tied model; may have derived weights whose steps have a ``right_inverse``.
        state_dict: with the names of the untied model.
        unequal: what to do where copies differ: raise, take that of the source, or take their mean.

    Returns:
        The names of the weights whose copies differed.

    Raises:
        ConfigurationError: copies differ and ``unequal`` is ``"error"``, or a weight cannot be parametrized; nothing is
            loaded.
        RuntimeError: names or shapes do not fit, as of ``load_state_dict``.
    """
    check_choice("unequal", unequal, ("error", "source", "mean"))
    plain = {unwrapped(key): value for key, value in state_dict.items()}
    differing = reconcile(model, plain, unequal=unequal)
    current = model.state_dict()
    assigned = _take_derived(model, plain, {unwrapped(key): value for key, value in current.items()})
    keys = {unwrapped(key): key for key in current}
    model.load_state_dict({keys.get(key, key): value for key, value in plain.items()})
    _assign(assigned)
    return differing


def _take_derived(
    model: nn.Module, plain: dict[str, Tensor], current: Mapping[str, Tensor]
) -> dict[DerivedWeight, Tensor]:
    """Replace the entries of derived weights by the current ones of their parameters; return the former.

    Raises:
        ConfigurationError: a derived weight cannot take its entry.
    """
    assigned = {}
    for key, derived in derived_by_others(model).items():
        if key in plain:
            value = assigned[derived] = plain.pop(key).to(derived.originals[0])
            for step in reversed(derived.steps):  # does it fit?
                if not hasattr(step, "right_inverse"):
                    raise ConfigurationError(
                        f"{key!r} is parametrized without a right_inverse: it cannot take a plain weight"
                    )
                value = step.right_inverse(value)  # type: ignore[operator]  # a method
            prefixes = _prefixes(key, derived)
            plain |= {name: value for name, value in current.items() if name.startswith(prefixes)}
    return assigned


def _assign(weights: Mapping[DerivedWeight, Tensor]) -> None:
    """Assign derived weights; those computed from one parameter together, so that it becomes the nearest to all."""
    sharing: dict[nn.Parameter, list[tuple[nn.Module, Tensor]]] = {}  # by that parameter
    for derived, weight in weights.items():
        if len(derived.steps) == len(derived.originals) == 1 and hasattr(derived.steps[0], "joint_inverse"):
            sharing.setdefault(derived.originals[0], []).append((derived.steps[0], weight))
        else:
            setattr(derived.owner, derived.name, weight)
    for table, parts in sharing.items():
        with torch.no_grad():
            table.copy_(parts[0][0].joint_inverse(parts, table))  # type: ignore[operator]  # a method


def derived_by_others(model: nn.Module) -> dict[str, DerivedWeight]:
    """Return, by key, all derived weights except those of ties."""
    derived = derived_weights(model, aliases=True)
    return {key: weight for key, weight in derived.items() if weight.name not in links_in(weight.owner)}


def _prefixes(key: str, derived: DerivedWeight) -> tuple[str, ...]:
    """Return the prefixes, in the model's state dict, of the keys that stand for a derived weight."""
    return tuple(key.removesuffix(derived.name) + prefix for prefix in derived.prefixes)
