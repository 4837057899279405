"""Former public names: they still work, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

# for each module or class, its former names and their current names
ALIASES: dict[str, dict[str, str]] = {
    "tying.callbacks.TyingCallback": {"check": "check_groups"},
    "tying.depth.Merge": {
        "keeps": "prob_names",
        "kept": "keep_prob",
        "share": "drop_scale",
        "with_share": "scaled",
    },
    "tying.depth.Sampled": {"spread": "std"},
    "tying.hashing": {"VirtualWeight": "HashedParametrization"},
    "tying.hashing.Hash": {
        "check_entries": "check_slots",
        "draw": "state",
        "seeded": "with_salt",
        "structure": "fast_path",
        "takes_vectors": "include_biases",
    },
    "tying.hashing.HashedParametrization": {
        "common": "state",
        "entries": "slots",
        "extended_entries": "extended_slots",
        "structure": "fast_path",
    },
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
    """Return a class decorator for former names: code can read and write them, and subclasses can override them.

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
        def rename_overrides(subclass: type, **options: Any) -> None:
            super(cls, subclass).__init_subclass__(**options)  # type: ignore[arg-type]  # a class
            for former, current in ALIASES[owner].items():
                if former in vars(subclass):
                    _warn(owner, former, current)
                    setattr(subclass, current, vars(subclass)[former])
                elif current in vars(subclass):  # overrides in its subclasses may call super().former()
                    setattr(subclass, former, _Alias(owner, former, current, vars(subclass)[current]))

        inherited_dir: Any = cls.__dir__

        def dir_without_aliases(self: Any) -> list[str]:  # torch.jit reads every attribute in this list
            return [name for name in inherited_dir(self) if name not in ALIASES[owner]]

        for former, current in ALIASES[owner].items():
            setattr(cls, former, _Alias(owner, former, current, vars(cls).get(current)))
        cls.__dir__ = dir_without_aliases  # type: ignore[assignment]  # of object, which has one
        cls.__init_subclass__ = classmethod(rename_overrides)  # type: ignore[assignment, arg-type]  # of type, which has none
        return cls

    return decorate


class _Alias:
    """A descriptor under the former name of an attribute; for a method, it returns the method of the class it is in."""

    def __init__(self, owner: str, former: str, current: str, value: Any) -> None:
        self.owner, self.former, self.current, self.value = owner, former, current, value
        self.__doc__ = f"Former name of ``{current}``."

    def __get__(self, instance: Any, cls: type) -> Any:
        if instance is None:
            return getattr(cls, self.current, self)
        _warn(self.owner, self.former, self.current)
        if isinstance(self.value, FunctionType):
            return self.value.__get__(instance)
        return getattr(instance, self.current)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn(self.owner, self.former, self.current)
        setattr(instance, self.current, value)
