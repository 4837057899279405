"""A run's folder: how far the run is, and what came out.

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

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from benchmarks.json_files import difference, read_json, same, write_json
from tying.errors import ConfigurationError

FILES = ("metrics.csv",)  # beside the result, what a report reads
RESULT = ("name", "definition", "metrics", "data", "machine", "seconds", "peak_memory", "parameters", "attempts")
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
        if same(there, definition):
            return ""
        place = re.sub(r"^layers\[\d+\]\.?", "", difference(there, definition))
        return f"{self.path} holds a run of another definition: {place}"

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
