"""Errors of configuration and training, and checks of arguments."""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import signature
from typing import Any


class ConfigurationError(ValueError):
    """A mistake in a tie, an argument or a data path. The command line prints it without a traceback."""


class NonFiniteError(ArithmeticError):
    """Tied weights have become NaN or infinite. The command line prints it without a traceback."""


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return a sentence with the existing names that are most similar to ``name``, or an empty string.

    Example:
        >>> nearest("encoder.0.weigth", ["encoder.0.weight", "head.bias"])
        ' Nearest existing names: encoder.0.weight.'
    """
    spelled = {known.lower(): known for known in existing}
    close = [spelled[match] for match in get_close_matches(name.lower(), list(spelled), n=3, cutoff=0.5)]
    return f" Nearest existing names: {', '.join(close)}." if close else ""


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Return the first ``limit`` names, separated by commas, and the number of the other names.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def misnamed(function: Callable[..., Any], arguments: Iterable[str]) -> str:
    """Return a sentence with the arguments of a function closest to one that it does not have, or an empty string.

    Example:
        >>> misnamed(check_choice, ["name", "chioces"])
        ' Nearest existing names: choices.'
    """
    known = [*signature(function).parameters]
    wrong = [argument for argument in arguments if argument not in known]
    return (nearest(wrong[0], known) or f" It takes {listed(known, limit=12)}.") if wrong else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise an error unless the value of an argument is one of the given choices.

    Args:
        name: name of the argument.
        value: value of the argument.
        choices: the valid values.

    Raises:
        ConfigurationError: the value is not a choice. The message lists the choices and the most similar one.

    Example:
        >>> check_choice("init", "sorce", ("source", "mean"))
        Traceback (most recent call last):
        tying.errors.ConfigurationError: init must be 'source' or 'mean', not 'sorce'. Nearest existing names: source.
    """
    *others, last = choices = [*choices]
    if value not in choices:
        expected = f"{', '.join(map(repr, others))} or {last!r}" if others else repr(last)
        close = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigurationError(f"{name} must be {expected}, not {value!r}{close and '.' + close}")


def check_range(name: str, value: float | str, interval: str) -> None:
    """Raise an error unless the value of an argument lies in an interval.

    Args:
        name: name of the argument.
        value: value of the argument.
        interval: in mathematical notation: ``"[0, 1]"``, ``"(0, 1]"``, ``"[1, inf)"``; ``inf]`` includes infinity.

    Raises:
        ConfigurationError: the value is outside, NaN, or not a number.

    Example:
        >>> check_range("keep", 1.5, "[0, 1]")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: keep must be in [0, 1], not 1.5
        >>> check_range("samples", 0, "[1, inf)")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: samples must be 1 or more, not 0
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    number = _number(value)
    inside = low <= number if interval[0] == "[" else low < number
    if not (inside and (number <= high if interval[-1] == "]" else number < high)):
        bound = "a finite number" if low == -float("inf") else f"in {interval}"
        if low > -float("inf") and high == float("inf"):
            bound = f"{low:g} or more" if interval[0] == "[" else f"above {low:g}"
            bound += " and finite" * (number == high)
        raise ConfigurationError(f"{name} must be {bound}, not {value!r}")


def _number(value: object) -> float:
    """Return a value as a float; NaN if it is no number."""
    try:
        return float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, RuntimeError):  # of an array of several numbers
        return math.nan


def check_count(name: str, value: int, interval: str = "[1, inf)") -> None:
    """Raise an error unless the value of an argument is an integer in an interval.

    Args:
        name: name of the argument.
        value: value of the argument.
        interval: as of :func:`check_range`.

    Raises:
        ConfigurationError: the value is outside the interval, or not an integer.

    Example:
        >>> check_count("rank", 1.5)
        Traceback (most recent call last):
        tying.errors.ConfigurationError: rank must be an integer, not 1.5
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigurationError(f"{name} must be an integer, not {value!r}")
    check_range(name, value, interval)


def check_counts(**counts: int) -> None:
    """Raise an error unless the values of arguments, given by their names, are integers of 1 or more.

    Raises:
        ConfigurationError: as :func:`check_count`.

    Example:
        >>> check_counts(layers=2, heads=0)
        Traceback (most recent call last):
        tying.errors.ConfigurationError: heads must be 1 or more, not 0
    """
    for name, value in counts.items():
        check_count(name, value)
