"""The parameters and modules of a model by name, as a pattern finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError, nearest
from tying.patterns import Captures, Pattern
from tying.relations import Relation

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original$")


def unwrapped(name: str) -> str:
    """Return ``name`` without the parts that wrappers add to it.

    Example:
        >>> unwrapped("encoder._orig_mod.weight")
        'encoder.weight'
    """
    return _WRAPPERS.sub("", name).rstrip(".")


def clean_name(name: str) -> str:
    """Return ``name`` without the parts that wrappers and parametrizations add to it.

    Example:
        >>> clean_name("encoder._orig_mod.parametrizations.weight.original")
        'encoder.weight'
    """
    return plain_name(_WRAPPERS.sub("", name)).rstrip(".")


def plain_name(name: str) -> str:
    """Return ``name`` without the parts that parametrizations add to it; wrappers stay."""
    return _PARAMETRIZED.sub(r"\1", name)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Look at a model, evaluated and without gradients, and leave it as it was: some parametrizations learn by use."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Computed:
    """A weight that a module computes from parameters.

    Attributes:
        owner: the module.
        name: of the weight, an attribute of the owner.
        steps: modules that compute it, one after another; each may have a ``right_inverse``.
        prefixes: with which the keys begin, in the owner's state dict, that stand for the weight.
    """

    owner: nn.Module
    name: str
    steps: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]

    @property
    def originals(self) -> list[nn.Parameter]:
        """The parameters that it is computed from."""
        own = self.owner.named_parameters(remove_duplicate=False)
        return [parameter for name, parameter in own if name.startswith(self.prefixes)]


def computed_in(module: nn.Module) -> list[Computed]:
    """Return the weights that a module computes: by parametrizations, or as its class says by ``computes``.

    ``computes`` maps the name of a weight to those of the parameter, and of the module that maps one to the other.
    """
    held: Mapping[str, ParametrizationList] = getattr(module, "parametrizations", {})
    found = [Computed(module, name, (*steps,), (f"parametrizations.{name}.",)) for name, steps in held.items()]
    computes: Mapping[str, tuple[str, str]] = getattr(type(module), "computes", {})
    for name, (parameter, step) in computes.items():
        found.append(Computed(module, name, (getattr(module, step),), (parameter, f"{step}.")))
    return found


def computed_weights(model: nn.Module, aliases: bool = False) -> dict[str, Computed]:
    """Return the weights that a model computes, by clean names: the first of each, or all."""
    return {
        clean_name(f"{path}.{one.name}".lstrip(".")): one
        for path, module in model.named_modules(remove_duplicate=not aliases)
        for one in computed_in(module)
    }


def uses(model: nn.Module) -> Iterator[Tensor]:
    """Yield each weight that a model computes with, aliases again; of a computed one, what it is computed to.

    Where its last step knows the shape (``shape``), it is not computed: a tensor on the meta device stands for it.
    """
    with at_rest(model):
        for path, module in model.named_modules(remove_duplicate=False):
            if "parametrizations" in path.split("."):
                continue
            computed = computed_in(module)
            yield from map(_use, computed)
            for name, parameter in module._parameters.items():
                if parameter is not None and not any(name in one.prefixes for one in computed):
                    yield parameter


def _use(one: Computed) -> Tensor:
    shape = getattr(one.steps[-1], "shape", None)
    if isinstance(shape, torch.Size) and one.prefixes[0] in one.owner._parameters:
        return torch.empty(shape, dtype=one.owner.get_parameter(one.prefixes[0]).dtype, device="meta")
    weight: Tensor = getattr(one.owner, one.name)
    return weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameter values that are stored, and of those that the model computes with.

    The latter counts each alias again, and for a parametrized weight the entries of the weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = model[0].weight
        >>> count_parameters(model)
        (4, 8)
    """
    return sum(parameter.numel() for parameter in model.parameters()), sum(weight.numel() for weight in uses(model))


def saved_bytes(model: nn.Module) -> int:
    """Return by how much the weights that a model computes with exceed what is stored."""
    stored, used = (sum(t.numel() * t.element_size() for t in held) for held in (model.parameters(), uses(model)))
    return used - stored


@dataclass(frozen=True)
class Match:
    """A weight found by a pattern, itself or below a module of which it is ``relative``; and its parameter's layout."""

    captures: Captures
    relative: str
    name: str
    parameter: nn.Parameter
    layout: Relation

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.layout(self.parameter.detach()).shape) if self.layout.steps else tuple(self.parameter.shape)


class Names:
    """The parameters and modules of a model under their clean names, aliases included."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {clean_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
        self._model = model

    @cached_property
    def layouts(self) -> dict[str, Relation]:
        """The map from a parameter to the weight of this name, where that is another layout of it."""
        found = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            if isinstance(module, ParametrizationList) and len(module) == 1:
                relation = getattr(module[0], "relation", None)
                if isinstance(relation, Relation):
                    found[clean_name(f"{path}.original")] = relation
        return found

    @cached_property
    def computed(self) -> list[str]:
        """Names of weights that are computed, and have no parameter of that name."""
        return [name for name in computed_weights(self._model, aliases=True) if name not in self.parameters]

    @cached_property
    def plain(self) -> dict[int, str]:
        """The first name under which each parameter has its own layout, by identity."""
        found: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            if name not in self.layouts:
                found.setdefault(id(parameter), name)
        return found

    @cached_property
    def modules(self) -> list[str]:
        """Clean names of all modules, parents before children."""
        return [clean_name(name) for name, _ in self._model.named_modules(remove_duplicate=False) if name]

    def find(self, text: str, exclude: Sequence[str], asker: str) -> list[Match]:
        """Return what the pattern ``text`` matches, parameters before modules, less what ``exclude`` covers."""
        pattern = Pattern(text)
        matches = [
            Match(captures, "", name, self.parameters[name], self.layouts.get(name, Relation()))
            for name in ([text] if pattern.literal and text in self.parameters else self.parameters)
            if (captures := pattern.match(name)) is not None
        ] or list(self._below_modules(pattern))
        if not matches:
            known = nearest(text, dict.fromkeys([*self.parameters, *self.modules]))
            if computed := [name for name in self.computed if pattern.match(name) is not None]:
                known = f" {computed[0]!r} is computed from others: hash or parametrize it, or tie it, but not both."
            raise ConfigurationError(f"{asker}: pattern {text!r} matches no parameter or module.{known}")
        excluded = [Pattern(pattern) for pattern in exclude]
        for pattern in excluded:
            if not any(covers(pattern, name) for name in self.parameters):
                raise ConfigurationError(
                    f"{asker}: exclude pattern {pattern.text!r} covers no parameter."
                    + nearest(pattern.text, dict.fromkeys([*self.parameters, *self.modules]))
                )
        kept = [match for match in matches if not any(covers(pattern, match.name) for pattern in excluded)]
        if not kept:
            raise ConfigurationError(f"{asker}: exclude={list(exclude)} leaves nothing of {text!r}")
        return kept

    def _below_modules(self, pattern: Pattern) -> Iterable[Match]:
        found: dict[str, Captures] = {}
        for name in dict.fromkeys(self.modules):
            captures = pattern.match(name)
            if captures is not None and not any(parent in found for parent in _parents(name)):
                found[name] = captures
        for name, parameter in self.parameters.items():
            for module in _parents(name):
                if module in found:
                    relative, layout = name[len(module) + 1 :], self.layouts.get(name, Relation())
                    yield Match(found[module], relative, name, parameter, layout)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def covers(pattern: Pattern, name: str) -> bool:
    """Return whether a pattern matches a name, or one of the modules above it.

    Example:
        >>> covers(Pattern("encoder.*"), "encoder.0.weight")
        True
    """
    return any(pattern.match(part) is not None for part in [name, *_parents(name)])
