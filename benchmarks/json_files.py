"""Files in JSON: read, written, compared."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tying.errors import ConfigurationError
from tying.files import atomically


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return a file's content.

    Raises:
        ConfigurationError: it is truncated or corrupted, or lacks one of ``keys``.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() >= {*keys}:
        raise ConfigurationError(f"{path} is truncated or corrupted")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    with atomically(path) as aside:
        aside.write_text(json.dumps(content, indent=1))


def same(one: Any, other: Any) -> bool:
    """Tell whether two nested structures are written alike: NaN is NaN.

    Example:
        >>> same({"lr": float("nan")}, {"lr": float("nan")}), same([1], [1.5])
        (True, False)
    """
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def difference(there: Any, here: Any, place: str = "") -> str:
    """Return the first difference of two nested structures, in words.

    Example:
        >>> difference({"data": {"seed": 0}}, {"data": {"seed": 1}})
        'data.seed is 0 there and 1 here'
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if (key in there) != (key in here) or not same(there[key], here[key]):
                told = f"{place}.{key}".removeprefix(".")
                if key not in here:
                    return f"{told} is {there[key]!r} there and not set here"
                if key not in there:
                    return f"{told} is not set there and {here[key]!r} here"
                return difference(there[key], here[key], told)
    if isinstance(there, list) and isinstance(here, list):
        for number, (one, other) in enumerate(zip_longest(there, here)):
            if not same(one, other):
                return difference(one, other, f"{place}[{number}]")
    return f"{place or 'it'} is {there!r} there and {here!r} here"
