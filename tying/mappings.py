"""Arguments given as mappings, in Python as in YAML."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from tying.errors import ConfigurationError, listed, misnamed, nearest


def from_mapping(value: Any, kind: type, argument: str) -> Any:
    """Return the instance that a mapping describes; return anything else unchanged.

    Args:
        value: a mapping with the constructor's arguments; or with ``class_path``, the class's name or the path that
            imports it, and ``init_args``, as in YAML.
        kind: the class, or the base class of what ``class_path`` may name.
        argument: name of the argument, for error messages.

    Raises:
        ConfigurationError: the mapping names no such class, or arguments that the class does not have; or the value is
            a class, not an instance.

    Example:
        >>> from tying.soft import Penalty, Schedule
        >>> from_mapping({"start": 0.0, "length": 10}, Schedule, "schedule")
        Schedule(start=0.0, end=1.0, length=10, shape='linear', unit='step')
        >>> from_mapping({"class_path": "Huber", "init_args": {"delta": 0.5}}, Penalty, "penalty")
        Huber(delta=0.5)
    """
    if isinstance(value, type):
        name = value.__name__
        raise ConfigurationError(f"{argument} must be an instance, not the class {name}: write {name}(...)")
    if not isinstance(value, Mapping):
        return value
    arguments = {**value}
    if path := arguments.pop("class_path", None):
        kind, arguments = _find_class(str(path), kind, argument), {**arguments.pop("init_args", {}), **arguments}
    try:
        return kind(**arguments)
    except TypeError as error:
        known = listed(cls.__name__ for cls in subclasses(kind))
        remedy = f"; write class_path, such as {known}, and init_args" if known and not path else ""
        if not remedy and (close := misnamed(kind, arguments)):
            remedy = f".{close}"
        raise ConfigurationError(f"{argument} cannot be {dict(value)}: {error}{remedy}") from None


def _find_class(path: str, base: type, argument: str) -> type:
    """Return the class that a path imports, or the subclass of a base that has this name."""
    module, _, name = path.rpartition(".")
    classes = {cls.__name__: cls for cls in (base, *subclasses(base))}
    cls: Any = None
    with suppress(ImportError, AttributeError, KeyError):
        cls = getattr(import_module(module), name) if module else classes[name]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigurationError(
            f"{argument}: class_path {path!r} is not a {base.__name__}: give the path that imports one, or a name "
            f"among {listed(classes)}.{nearest(name, classes)}"
        )
    return cls


def subclasses(kind: type[Any]) -> Iterator[type]:
    """Yield the subclasses of a class, and theirs."""
    for cls in kind.__subclasses__():
        yield from (cls, *subclasses(cls))
