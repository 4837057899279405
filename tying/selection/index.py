"""The parameters and modules of a model by name, as a pattern finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError, nearest
from tying.selection.patterns import Captures, Pattern
from tying.selection.relation import Relation

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
        names = [
            clean_name(f"{path}.{name}".lstrip("."))
            for path, module in self._model.named_modules(remove_duplicate=False)
            for name in (*getattr(module, "parametrizations", ()), *getattr(type(module), "computes", ()))
        ]
        return [name for name in names if name not in self.parameters]

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

    def find(self, text: str, exclude: Sequence[str], context: str) -> list[Match]:
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
            raise ConfigurationError(f"{context}: pattern {text!r} matches no parameter or module.{known}")
        excluded = [Pattern(pattern) for pattern in exclude]
        for pattern in excluded:
            if not any(covers(pattern, name) for name in self.parameters):
                raise ConfigurationError(
                    f"{context}: exclude pattern {pattern.text!r} covers no parameter."
                    + nearest(pattern.text, dict.fromkeys([*self.parameters, *self.modules]))
                )
        kept = [match for match in matches if not any(covers(pattern, match.name) for pattern in excluded)]
        if not kept:
            raise ConfigurationError(f"{context}: exclude={list(exclude)} leaves nothing of {text!r}")
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
