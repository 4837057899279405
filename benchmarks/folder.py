"""A run's folder: who works on it, what came out, and what was left by attempts that ended early.

::

    soft,seed=0/
      attempts/000/          made by renaming, hence by one process alone: this is its claim
        claim.json           which process, and which run
        log.txt  progress.json  logs/  checkpoints/
        failure.json         where the attempt failed
      config.yaml  metrics.csv
      result.json            written last: the run is complete

An attempt's claim lasts as long as the process that made it lives. Processes of other machines cannot be seen; they
touch their claims instead (:data:`HEARTBEAT`), and count as dead when they have not done so for :data:`SILENCE`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.json_files import difference, read_json, same, write_json
from tying.errors import ConfigurationError

HEARTBEAT = 15.0  # seconds
SILENCE = 120.0
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
        if (self.path / "result.json").exists():
            return "complete"
        last = self.last_attempt()
        if last is None:
            return "pending"
        if (last / "failure.json").exists():
            return "failed"
        return "running" if is_alive(last) else "interrupted"

    def attempts(self) -> list[Path]:
        """Return the folders of all attempts, first to last."""
        paths = (self.path / "attempts").glob("*")
        return sorted((path for path in paths if path.name.isdecimal()), key=lambda path: int(path.name))

    def claimed_attempts(self) -> list[Path]:
        """Return the folders of those attempts whose claim is not lost."""
        return [path for path in self.attempts() if (path / "claim.json").exists()]

    def last_attempt(self) -> Path | None:
        """Return the folder of the attempt that counts."""
        return next(reversed(self.claimed_attempts()), None)

    def last_of(self, name: str) -> Path | None:
        """Return a file of the attempt that counts, if it is there."""
        last = self.last_attempt()
        return last / name if last is not None and (last / name).exists() else None

    def claim(self, content: dict[str, Any]) -> Path | None:
        """Begin the next attempt, unless another process works on the run or has completed it; return its folder.

        Args:
            content: what the claim says in addition to who made it: the ``definition``, above all.

        Raises:
            ConfigurationError: the folder holds a run of another definition.
        """
        number = max((int(attempt.name) for attempt in self.attempts()), default=-1) + 1
        if self.state() not in ("pending", "interrupted", "failed"):  # looked at after the number was taken
            return None
        if other := self.conflict(content["definition"]):
            raise ConfigurationError(other)
        attempt = self.path / "attempts" / f"{number:03}"
        attempt.parent.mkdir(parents=True, exist_ok=True)
        aside = attempt.with_name(f".{uuid.uuid4().hex}")
        try:
            aside.mkdir()
            write_json(aside / "claim.json", {"process": this_process(), "begun": time.time(), **content})
            aside.rename(attempt)  # fails where another process has made it: its folder is not empty
        except OSError:
            if (attempt / "claim.json").exists():
                return None
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return attempt

    def keep_claim(self, attempt: Path) -> None:
        """Raise if another process has taken the run over, as it does where this one was long silent."""
        if self.last_attempt() != attempt:
            raise ConfigurationError(f"the run was taken over by another process, as {self.last_attempt()}")

    def definition(self) -> dict[str, Any] | None:
        """Return the definition this folder was made for, or ``None`` where it holds none."""
        holder = self.last_of("claim.json") or self.path / "result.json"
        return read_json(holder)["definition"] if holder.exists() else None

    def conflict(self, definition: dict[str, Any]) -> str:
        """Return how the folder's definition differs from what this one says, in words; nothing, mostly."""
        found = self.definition()
        if found is not None:
            found = {key: found.get(key) for key in definition}
        if found is None or same(found, definition):
            return ""
        told = re.sub(r"^layers\[\d+\]\.?", "", difference(found, definition))
        return f"{self.path} holds a run of another definition: {told}"

    def damage(self) -> str:
        """Return which of its files are lost or corrupted, in words; nothing, mostly."""
        try:
            if claim := self.last_of("claim.json"):
                read_json(claim, "definition", "process")
            if (self.path / "result.json").exists():
                self.result()
                paths = {name: self.path / name for name in FILES}
                if missing := [name for name, path in paths.items() if not path.exists() or not path.stat().st_size]:
                    return f"{self.path} is complete, but lacks {' and '.join(missing)}"
        except ConfigurationError as error:
            return str(error)
        return ""

    def result(self) -> dict[str, Any]:
        """Return what came out of the run.

        Raises:
            ConfigurationError: the file is corrupted, or of another run.
        """
        result = read_json(self.path / "result.json", *RESULT)
        if not all(isinstance(value, int | float) for value in result["metrics"].values()):
            raise ConfigurationError(f"{self.path / 'result.json'} is truncated or corrupted")
        if result["name"] != self.name:
            raise ConfigurationError(f"{self.path / 'result.json'} is the result of {result['name']!r}")
        return result

    def failure(self) -> str:
        """Return why the last attempt failed, in a line."""
        path = self.last_of("failure.json")
        return str(read_json(path)["error"]) if path else ""

    def checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoints of all attempts."""
        return (self.path / "attempts").glob("[0-9]*/checkpoints/*.ckpt")


def complete_below(out: Path) -> list[Folder]:
    """Return the folders of all complete runs in a folder."""
    folders = [Folder(path.parent) for path in out.glob("*/result.json")]
    return [folder for folder in folders if folder.state() == "complete"]


def this_process() -> dict[str, Any]:
    """Return what identifies this process among those of all machines."""
    return {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(attempt: Path) -> bool:
    """Tell whether the process that made an attempt still works on it."""
    try:
        process = read_json(attempt / "claim.json")["process"]
        if process["machine"] != _machine():
            return _age(attempt) < SILENCE
        return bool(_started(process["pid"]) == process["started"])
    except FileNotFoundError:
        return False


def touch(attempt: Path) -> None:
    """Tell other machines that this process is still alive."""
    os.utime(attempt / "claim.json")


def _started(pid: int) -> str | None:
    """Return when a process started, as text that no change of the clock changes; ``None`` if it lives no more."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").exists():
            state, *fields = stat.read_text().rpartition(")")[2].split()
            return None if state in "ZX" else fields[18]
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def _machine() -> str:
    """Return what processes have in common that can see each other's numbers."""
    parts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        parts.append(boot.read_text().strip())
    if namespace.exists():
        parts.append(os.readlink(namespace))
    return " ".join(parts)


def _age(attempt: Path) -> float:
    """Return the seconds since a claim was touched, by the clock of the file system that holds it."""
    clock = attempt.parent / f".clock-{uuid.uuid4().hex}"
    try:
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
    except OSError:  # nothing can be written there: this machine's clock must do
        now = time.time()
    return now - (attempt / "claim.json").stat().st_mtime
