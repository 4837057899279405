"""Files in JSON: read, written, compared."""

from __future__ import annotations

import json
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
    """Tell whether two nested structures are written alike: NaN is NaN, and 1 is not 1.0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def difference(there: Any, here: Any) -> str:
    """Return the first difference of two nested structures, in words.

    Example:
        >>> difference({"data": {"seed": [0]}}, {"data": {"seed": [1]}})
        'data.seed[0] is 0 there and 1 here'
    """
    leaves = _leaves(there), _leaves(here)
    for place in leaves[0] | leaves[1]:
        values = [repr(side[place]) if place in side else "not set" for side in leaves]
        if values[0] != values[1]:
            return f"{place.removeprefix('.')} is {values[0]} there and {values[1]} here"
    return ""


def _leaves(content: Any, place: str = "") -> dict[str, Any]:
    if not content or not isinstance(content, dict | list):
        return {place: content}
    keys = [f".{key}" for key in content] if isinstance(content, dict) else [f"[{at}]" for at in range(len(content))]
    values = content.values() if isinstance(content, dict) else content
    parts = [_leaves(value, place + key) for key, value in zip(keys, values, strict=True)]
    return {place: value for part in parts for place, value in part.items()}
