"""Former public names, which still work and warn."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

# by module or class: former name to current name
ALIASES: dict[str, dict[str, str]] = {
    "tying.callbacks.TyingCallback": {"check": "check_groups"},
}


def _warn(owner: str, former: str, current: str) -> None:
    warnings.warn(f"{owner}.{former} is now called {current}", DeprecationWarning, stacklevel=3)


def module_aliases(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module, which finds its former names."""

    def find(name: str) -> Any:
        if name not in ALIASES[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(module, name, ALIASES[module][name])
        return getattr(sys.modules[module], ALIASES[module][name])

    return find


def class_aliases(owner: str) -> Callable[[T], T]:
    """Return a class decorator that lets former names be read, written, and overridden by subclasses.

    Example:
        >>> ALIASES["Shelf"] = {"volumes": "books"}
        >>> @class_aliases("Shelf")
        ... class Shelf:
        ...     books = 3
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Shelf().volumes, str(caught[0].message)
        (3, 'Shelf.volumes is now called books')
    """

    def decorate(cls: T) -> T:
        def alias(former: str, current: str) -> property:
            def read(self: Any) -> Any:
                _warn(owner, former, current)
                return getattr(self, current)

            def write(self: Any, value: Any) -> None:
                _warn(owner, former, current)
                setattr(self, current, value)

            return property(read, write, doc=f"Former name of ``{current}``.")

        def rename_overrides(subclass: type, **options: Any) -> None:
            super(cls, subclass).__init_subclass__(**options)  # type: ignore[arg-type]  # a class
            for former, current in ALIASES[owner].items():
                if former in vars(subclass):
                    _warn(owner, former, current)
                    setattr(subclass, current, vars(subclass)[former])

        for former, current in ALIASES[owner].items():
            setattr(cls, former, alias(former, current))
        cls.__init_subclass__ = classmethod(rename_overrides)  # type: ignore[assignment, arg-type]  # of type, which has none
        return cls

    return decorate
