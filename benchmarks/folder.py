"""A run's folder: how far the run is, and what came out, in JSON.

::

    soft,seed=0/
      lock             held by the process that works on the run
      definition.json  what makes the run the run it is, its threads, its attempts
      log.txt  progress.json  checkpoints/
      failure.json     where the last attempt failed
      config.yaml  metrics.csv
      result.json      written last: the run is complete
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tying.errors import ConfigurationError
from tying.files import atomically

FILES = ("metrics.csv",)  # beside the result, what a report reads
RESULT = ("name", "definition", "metrics", "data", "machine", "seconds", "peak_memory", "parameters", "attempts")
UNSET = "not set"
State = Literal["pending", "running", "interrupted", "failed", "damaged", "complete"]


@dataclass(frozen=True)
class Folder:
    """The folder of one run, which need not exist."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def state(self) -> State:
        """Return how far the run is."""
        if self.damage():
            return "damaged"
        if self.is_complete():
            return "complete"
        if self._is_locked():
            return "running"
        if (self.path / "failure.json").exists():
            return "failed"
        return "interrupted" if (self.path / "definition.json").exists() else "pending"

    def is_complete(self) -> bool:
        """Tell whether a result is there."""
        return (self.path / "result.json").exists()

    def lock(self) -> FileLock:
        """Make the folder; return its lock, which raises :class:`filelock.Timeout` where another process holds it.

        The lock ends with the process that holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / "lock", timeout=0)

    def _is_locked(self) -> bool:
        if not (self.path / "lock").exists():
            return False
        try:
            with self.lock():
                return False
        except Timeout:
            return True
        except OSError:  # another user's folder
            return False

    def begin(self, definition: dict[str, Any], threads: int) -> dict[str, Any]:
        """Begin the next attempt, under the lock; return what :file:`definition.json` says now.

        A run that goes on keeps the number of threads it began with, since sums depend on it.
        """
        if conflict := self.conflict(definition):
            raise ConfigurationError(conflict)
        path = self.path / "definition.json"
        earlier = read_json(path) if path.exists() else {"threads": threads, "attempts": 0}
        begun = {**earlier, "definition": definition, "attempts": earlier["attempts"] + 1}
        write_json(path, begun)
        (self.path / "failure.json").unlink(missing_ok=True)
        return begun

    def conflict(self, definition: dict[str, Any]) -> str:
        """Return how the folder's definition differs from this one, in words; nothing, mostly."""
        paths = [path for name in ("definition.json", "result.json") if (path := self.path / name).exists()]
        if not paths:
            return ""
        there = read_json(paths[0])["definition"]
        there = {key: there.get(key) for key in definition}
        place = re.sub(r"^layers\[\d+\]\.?", "", difference(there, definition))
        return place and f"{self.path} holds a run of another definition: {place}"

    def damage(self) -> str:
        """Return which of its files are lost or corrupted, in words; nothing, mostly."""
        try:
            if (self.path / "definition.json").exists():
                read_json(self.path / "definition.json", "definition", "threads", "attempts")
            if self.is_complete():
                self.result()
                paths = {name: self.path / name for name in FILES}
                if missing := [name for name, path in paths.items() if not path.exists() or not path.stat().st_size]:
                    return f"{self.path} is complete, but lacks {' and '.join(missing)}"
        except ConfigurationError as error:
            return str(error)
        return ""

    def result(self) -> dict[str, Any]:
        """Return what came out of the run, unless the file is corrupted, or of another run."""
        result = read_json(self.path / "result.json", *RESULT)
        if not all(isinstance(value, int | float) for value in result["metrics"].values()):
            raise ConfigurationError(f"{self.path / 'result.json'} is truncated or corrupted")
        if result["name"] != self.name:
            raise ConfigurationError(f"{self.path / 'result.json'} is the result of {result['name']!r}")
        return result

    def failure(self) -> str:
        """Return why the last attempt failed, in a line."""
        path = self.path / "failure.json"
        return str(read_json(path)["error"]) if path.exists() else ""

    def progress(self) -> dict[str, Any]:
        """Return how far the last attempt has come, as far as that is known."""
        with suppress(OSError, ConfigurationError):
            return read_json(self.path / "progress.json", "share", "left")
        return {}

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints: the newest, and what interruptions left."""
        return [*(self.path / "checkpoints").glob("*.ckpt")]


def complete_below(out: Path) -> list[Folder]:
    """Return the folders of all complete runs in a folder."""
    folders = [Folder(path.parent) for path in out.glob("*/result.json")]
    return [folder for folder in folders if folder.state() == "complete"]


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


def difference(there: Any, here: Any, place: str = "") -> str:
    """Return the first difference of two nested structures, in words: NaN is NaN, and 1 is not 1.0.

    Example:
        >>> difference({"data": {"seed": [0]}}, {"data": {"seed": [1]}})
        'data.seed[0] is 0 there and 1 here'
    """
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [(f"{place}.{key}", there.get(key, UNSET), here.get(key, UNSET)) for key in there | here]
    elif isinstance(there, list) and isinstance(here, list):
        pairs = enumerate(zip_longest(there, here, fillvalue=UNSET))
        parts = [(f"{place}[{at}]", *pair) for at, pair in pairs]
    else:
        values = [value if value is UNSET else repr(value) for value in (there, here)]
        return "" if values[0] == values[1] else f"{place.removeprefix('.')} is {values[0]} there and {values[1]} here"
    return next(filter(None, (difference(there, here, place) for place, there, here in parts)), "")
