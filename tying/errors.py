"""The one exception for mistakes in what was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigurationError(ValueError):
    """A mistake in a tie, an argument or a data path: the command line prints it without a traceback."""


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return a sentence with the existing names closest to ``name``, or an empty string.

    Example:
        >>> nearest("encoder.0.weigth", ["encoder.0.weight", "head.bias"])
        ' Nearest existing names: encoder.0.weight.'
    """
    close = get_close_matches(name, list(existing), n=3, cutoff=0.5)
    return f" Nearest existing names: {', '.join(close)}." if close else ""
