"""Mistakes in what was asked for, and what has gone wrong in training."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigurationError(ValueError):
    """A mistake in a tie, an argument or a data path: the command line prints it without a traceback."""


class NonFiniteError(ArithmeticError):
    """Weights that are tied have become NaN or infinite; the command line prints it without a traceback."""


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return a sentence with the existing names closest to ``name``, or an empty string.

    Example:
        >>> nearest("encoder.0.weigth", ["encoder.0.weight", "head.bias"])
        ' Nearest existing names: encoder.0.weight.'
    """
    spelled = {known.lower(): known for known in existing}
    close = [spelled[match] for match in get_close_matches(name.lower(), list(spelled), n=3, cutoff=0.5)]
    return f" Nearest existing names: {', '.join(close)}." if close else ""


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Return names with commas between them, the first ``limit`` of them and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
