"""Classes that are generated at run time for modules of other libraries, and pickled like others."""

import copyreg
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, cast

from torch import nn


class GeneratedType(ABCMeta):
    """The class of generated classes, which are pickled as calls of :func:`generate_class`."""


GENERATED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def generate_class(behaviour: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module's class that behaves as another class says; the same in each call.

    Example:
        >>> from tying.depth.tracing import LeafModule
        >>> [cls.__name__ for cls in generate_class(LeafModule, nn.Linear).__mro__[:4]]
        ['LeafModuleLinear', 'LeafModule', 'Linear', 'Module']
    """
    if (bases := (behaviour, plain)) not in GENERATED:
        name, kind = f"{behaviour.__name__.removesuffix('Block')}{plain.__name__}", _generated_type(type(plain))
        GENERATED[bases] = cast(type[nn.Module], kind(name, bases, {"__module__": __name__}))
    return GENERATED[bases]


def _generated_type(plain: type) -> type:
    """Return the class of the subclasses of a class whose own class, its metaclass, is given."""
    for kind in (GeneratedType, plain):
        if issubclass(kind, GeneratedType) and issubclass(kind, plain):
            return kind
    kind = type(f"Generated{plain.__name__}", (GeneratedType, plain), {})
    copyreg.pickle(kind, _reduce)
    return kind


def _reduce(cls: GeneratedType) -> tuple[Callable[..., Any], tuple[type, ...]]:
    return generate_class, cls.__bases__


copyreg.pickle(GeneratedType, _reduce)


def original_class(generated: type[nn.Module]) -> type[nn.Module]:
    """Return the class from which :func:`generate_class` made another."""
    return cast(type[nn.Module], generated.__bases__[1])
