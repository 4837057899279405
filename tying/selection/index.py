"""Find the parameters and modules of a model by name patterns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from tying.errors import ConfigurationError, listed, nearest
from tying.selection.patterns import Captures, Pattern
from tying.selection.relation import Relation

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")
_NO_SUBMODULES = " The model has no submodules: to name the model itself, pass nn.ModuleList([model]) and '0'."
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


@dataclass(frozen=True, slots=True)  # one for each weight: fewer objects to collect
class Match:
    """A weight that a pattern matches.

    Attributes:
        captures: the captured parts of the matched name, which names the weight or a module that contains it.
        relative: the weight's name relative to the matched module; empty if the pattern matches the weight itself.
        name: the clean name of the weight.
        parameter: the parameter that stores the weight.
        layout: the map from the layout of the parameter to the layout of the weight.
    """

    captures: Captures
    relative: str
    name: str
    parameter: nn.Parameter
    layout: Relation

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.layout(self.parameter.detach()).shape) if self.layout.steps else tuple(self.parameter.shape)


class Names:
    """The parameters and modules of a model under their clean names, aliases included."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        self.buffers = [name for name, _ in model.named_buffers()]
        self.parameters = {clean_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
        # parents before children, the model itself first
        self.modules = {clean_name(n): module for n, module in model.named_modules(remove_duplicate=False)}

    @cached_property
    def layouts(self) -> dict[str, Relation]:
        """The maps from the layout of a parameter to the layout of its weight, by name, if the two differ."""
        return {
            clean_name(f"{path}.original"): relation
            for path, module in self.modules.items()
            if isinstance(module, ParametrizationList)
            and len(module) == 1
            and isinstance(relation := getattr(module[0], "relation", None), Relation)
        }

    @cached_property
    def plain(self) -> dict[int, str]:
        """The first name under which each parameter has the layout of its weight, by the parameter's identity."""
        # reversed, so that the first name overwrites the later ones
        return {id(p): name for name, p in reversed(self.parameters.items()) if name not in self.layouts}

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        """The names of the parameters in each module, itself and its parts, by the module's name."""
        below: dict[str, list[str]] = {}
        for name in self.parameters:
            for module in _parents(name):
                below.setdefault(module, []).append(name)
        return below

    def find(self, text: str, exclude: Sequence[str], context: str) -> list[Match]:
        """Return the weights that a pattern matches, without the excluded ones.

        Args:
            text: a pattern. If it matches no weight, it selects all weights in the modules that it matches.
            exclude: patterns of weights or modules to leave out.
            context: first words of the error message.

        Raises:
            ConfigurationError: a pattern matches nothing, or all matches are excluded.
        """
        pattern = Pattern(text)
        matches = [
            self._match(captures, name)
            for name in _candidates(pattern, self.parameters)
            if (captures := pattern.match(name)) is not None
        ] or self._below_modules(pattern)
        if not matches:
            hint = self._explain_derived(pattern) or nearest(text, [*self.parameters, *self.modules])
            hint = hint or f" Parameters are {listed(self.parameters, limit=3)}."
            raise ConfigurationError(f"{context}: pattern {text!r} matches no parameter or module.{hint}")
        for other in map(Pattern, exclude):
            if not any(covers(other, name) for name in self.parameters):
                raise ConfigurationError(
                    f"{context}: exclude pattern {other.text!r} covers no parameter."
                    + nearest(other.text, [*self.parameters, *self.modules])
                )
            matches = [match for match in matches if not covers(other, match.name)]
        if not matches:
            raise ConfigurationError(f"{context}: exclude={list(exclude)} leaves nothing of {text!r}")
        return matches

    def _match(self, captures: Captures, name: str, relative: str = "") -> Match:
        return Match(captures, relative, name, self.parameters[name], self.layouts.get(name, Relation()))

    def _below_modules(self, pattern: Pattern) -> list[Match]:
        outermost: dict[str, Captures] = {}
        for name in filter(None, _candidates(pattern, self.modules)):
            if (captures := pattern.match(name)) is not None and outermost.keys().isdisjoint(_parents(name)):
                outermost[name] = captures
        return [
            self._match(captures, name, name.removeprefix(f"{module}."))
            for module, captures in outermost.items()
            for name in self._below.get(module, ())
        ]

    def _explain_derived(self, pattern: Pattern) -> str:
        """Return a hint if the pattern matches a weight that is computed from parameters, else an empty string."""
        names = (
            clean_name(f"{path}.{name}".lstrip("."))
            for path, module in self.modules.items()
            for name in (*getattr(module, "parametrizations", ()), *getattr(type(module), "computes", ()))
        )
        if buffer := next((name for name in self.buffers if pattern.match(name) is not None), None):
            return f" {buffer!r} is a buffer; ties and patterns take parameters."
        computed = next((n for n in names if n not in self.parameters and pattern.match(n) is not None), None)
        return (
            f" {computed!r} is computed from others: hash or parametrize it, or tie it, but not both."
            if computed
            else ""
        )


def matching_modules(
    modules: Mapping[str, nn.Module], patterns: str | Sequence[str], argument: str
) -> dict[str, nn.Module]:
    """Return the modules whose names match patterns, in the given order.

    Args:
        modules: modules by name.
        patterns: a pattern of module names, or several; a leading ``!`` excludes.
        argument: the name of the argument that holds the patterns, for errors.

    Raises:
        ConfigurationError: a pattern matches nothing, or the patterns exclude all that they match.
    """
    texts = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Sequence) else [*patterns]
    if not all(isinstance(text, str) for text in texts) or all(text.startswith("!") for text in texts):
        raise ConfigurationError(f"{argument} must be a pattern of module names, or several, not {patterns!r}")
    names: set[str] = set()
    for text in sorted(texts, key=lambda text: text.startswith("!")):
        pattern = Pattern(text.removeprefix("!"))
        if not (matches := {name for name in modules if pattern.match(name) is not None}):
            hint = nearest(pattern.text, modules) if modules else _NO_SUBMODULES
            raise ConfigurationError(f"{argument}: pattern {text!r} matches no module.{hint}")
        names = names - matches if text.startswith("!") else names | matches
    if not names:
        raise ConfigurationError(f"{argument}: {listed(map(repr, texts))} exclude all that they match")
    return {name: module for name, module in modules.items() if name in names}


def check_shape(name: str, parameter: nn.Parameter, context: str = "") -> None:
    """Raise a ConfigurationError, which begins with ``context``, if a parameter is lazy: it has no shape yet."""
    if is_lazy(parameter):
        raise ConfigurationError(
            f"{context}{name!r} has no shape yet, since its layer is lazy: call the model on a batch first, or make "
            "the layer with its sizes"
        )


def _candidates(pattern: Pattern, names: Mapping[str, object]) -> Iterable[str]:
    """Return the names that a pattern may match."""
    return filter(names.__contains__, [pattern.text]) if pattern.literal else names


def _parents(name: str) -> list[str]:
    """Return the names of the modules that contain a name, the outermost first."""
    return [name[:position] for position, letter in enumerate(name) if letter == "."]


def covers(pattern: Pattern, name: str) -> bool:
    """Return whether a pattern matches a name or a module that contains it.

    Example:
        >>> covers(Pattern("encoder.*"), "encoder.0.weight")
        True
    """
    return any(pattern.match(part) is not None for part in [name, *_parents(name)])
