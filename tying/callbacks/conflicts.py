"""Errors that name both callbacks if two act on one weight in incompatible ways."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from tying.callbacks.base import TyingCallback
from tying.errors import ConfigurationError, NonFiniteError
from tying.lightning_namespace import pl
from tying.weights.derived import derived_by_others


@contextmanager
def acting_on(model: nn.Module, callback: TyingCallback, callbacks: Sequence[pl.Callback]) -> Iterator[None]:
    """Context manager for applying a callback's patterns: its errors name the callback, and any that conflicts with it.

    Args:
        model: the model, which other callbacks may have changed.
        callback: the callback that acts.
        callbacks: all callbacks.

    Raises:
        ConfigurationError: another callback computes a weight that the patterns select, or the context raised one.
        NonFiniteError: the context raised one.
    """
    others = [other for other in callbacks if isinstance(other, TyingCallback) and other is not callback]
    computed = derived_by_others(model)
    for other in others:
        for name in filter(callback.selects, other.replaced(model)):
            if not (
                callback.takes_factors and name in computed and _affects(callback, model, computed[name].originals)
            ):
                raise conflict(callback, other, name, f"{other.label} computes it from other parameters")
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{callback.label}: {error}") from None
    except ConfigurationError as error:
        for other in others:
            tied = [name for group in other.groups if group.shared for name in group.names]
            if names := [name for name in [*tied, *other.replaced(model)] if repr(name) in str(error)]:
                raise conflict(callback, other, names[0], str(error)) from None
        raise ConfigurationError(f"{callback.label}: {error}") from None


def _affects(callback: TyingCallback, model: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether a callback acts on all of these parameters."""
    try:
        affected = {id(parameter) for parameter in callback.affected(model).values()}
    except ConfigurationError:
        return False
    return all(id(parameter) in affected for parameter in parameters)


def conflict(callback: TyingCallback, other: TyingCallback, name: str, reason: str) -> ConfigurationError:
    """Return the error for two callbacks that cannot share a weight."""
    return ConfigurationError(
        f"{callback.label} and {other.label} both act on {name!r}: {reason}. Leave the weight to one of them"
    )
