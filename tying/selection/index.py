"""The parameters and modules of a model by name, and the patterns that match them."""

import re
from collections.abc import Sequence
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
    """A weight that a pattern matches.

    Attributes:
        captures: what the pattern captures of its name, or of the name of the module above it.
        relative: its name below the module that the pattern matches; empty where it matches the weight itself.
        name: its clean name.
        parameter: the parameter behind it.
        layout: the map from the parameter to the weight.
    """

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
        # parents before children, the model itself first
        self.modules = {clean_name(n): module for n, module in model.named_modules(remove_duplicate=False)}

    @cached_property
    def layouts(self) -> dict[str, Relation]:
        """The map from a parameter to the weight of this name, where the weight is another layout of it."""
        return {
            clean_name(f"{path}.original"): relation
            for path, module in self.modules.items()
            if isinstance(module, ParametrizationList)
            and len(module) == 1
            and isinstance(relation := getattr(module[0], "relation", None), Relation)
        }

    @cached_property
    def plain(self) -> dict[int, str]:
        """The first name under which each parameter has the layout of its weight, by identity."""
        names = reversed(self.parameters.items())  # the first name comes last, and stays
        return {id(parameter): name for name, parameter in names if name not in self.layouts}

    def find(self, text: str, exclude: Sequence[str], context: str) -> list[Match]:
        """Return the weights that a pattern matches, less those that others exclude.

        Args:
            text: a pattern. If it matches no weight, the weights below the modules that it matches are found.
            exclude: patterns of weights or modules.
            context: what the pattern is part of; errors begin with it.

        Raises:
            ConfigurationError: a pattern matches nothing, or nothing is left.
        """
        pattern = Pattern(text)
        matches = [
            self._match(captures, name)
            for name in ([text] if pattern.literal and text in self.parameters else self.parameters)
            if (captures := pattern.match(name)) is not None
        ] or self._below_modules(pattern)
        if not matches:
            hint = self._derived(pattern) or self._near(text)
            raise ConfigurationError(f"{context}: pattern {text!r} matches no parameter or module.{hint}")
        for other in map(Pattern, exclude):
            if not any(covers(other, name) for name in self.parameters):
                hint = self._near(other.text)
                raise ConfigurationError(f"{context}: exclude pattern {other.text!r} covers no parameter.{hint}")
            matches = [match for match in matches if not covers(other, match.name)]
        if not matches:
            raise ConfigurationError(f"{context}: exclude={list(exclude)} leaves nothing of {text!r}")
        return matches

    def _match(self, captures: Captures, name: str, relative: str = "") -> Match:
        return Match(captures, relative, name, self.parameters[name], self.layouts.get(name, Relation()))

    def _below_modules(self, pattern: Pattern) -> list[Match]:
        outermost: dict[str, Captures] = {}
        for name in filter(None, self.modules):
            if (captures := pattern.match(name)) is not None and outermost.keys().isdisjoint(_parents(name)):
                outermost[name] = captures
        return [
            self._match(outermost[module], name, name.removeprefix(f"{module}."))
            for name in self.parameters
            for module in _parents(name)
            if module in outermost
        ]

    def _near(self, text: str) -> str:
        return nearest(text, [*self.parameters, *self.modules])

    def _derived(self, pattern: Pattern) -> str:
        """Return a sentence on the first weight that matches and is computed, and so has no parameter of its name."""
        names = (
            clean_name(f"{path}.{name}".lstrip("."))
            for path, module in self.modules.items()
            for name in (*getattr(module, "parametrizations", ()), *getattr(type(module), "computes", ()))
        )
        computed = next((n for n in names if n not in self.parameters and pattern.match(n) is not None), None)
        hint = f" {computed!r} is computed from others: hash or parametrize it, or tie it, but not both."
        return hint if computed else ""


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
