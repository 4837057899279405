"""Programs: runs of a suite that are more than one fit and its test.

A suite's ``program`` names a function in place of a LightningModule's training::

    program: benchmarks.continual.run   # module and function
    deltas:
      plain: []
      ewc: [{anchor.strength: 100.0}]   # its arguments, by dotted key, or files of them
    seed_keys: [seed]                   # the default of programs

The function takes a :class:`Progress` and, by name, the arguments that the suite gives: plain types, and objects by
``class_path`` as in any configuration. Its argument ``seed`` seeds all random generators before any object is made; its
argument ``data``, if it has one, is a data module. It returns an :class:`Outcome`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.seed import seed_everything

from benchmarks.folder import Folder
from benchmarks.json_files import write_json
from tying.errors import ConfigurationError
from tying.files import atomically, newest_intact, read


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    rows: Sequence[Mapping[str, float]]  # after each epoch, or stage of a program, with the keys step and seconds
    metrics: Mapping[str, float]  # at the end, in addition to the last value of each in rows
    model: torch.nn.Module
    data: Mapping[str, str | None]  # description and key
    config: str = ""  # as YAML
    testing: float = 0.0  # seconds after training
    peak: int = 0  # bytes of memory


@dataclass
class Progress:
    """What a run has logged and saved in its folder: an interrupted run goes on from there."""

    folder: Folder
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self, share: float = 0.0) -> None:
        """Begin an attempt, at a share of the run that is done; the time left is estimated from here on."""
        self.begun_at, self._start = share, time.perf_counter()

    def expected(self, share: float) -> float | None:
        """Return the seconds that a whole run takes, by how long the share up to now has taken; None at the start."""
        done = share - self.begun_at
        return (time.perf_counter() - self._start) / done if done > 0 else None

    def restore(self) -> dict[str, Any] | None:
        """Return the newest state that an earlier attempt saved, and its rows to :attr:`rows`; None at the start."""
        newest = newest_intact(self.folder.checkpoints())
        saved: dict[str, Any] = {"rows": [], "share": 0.0}
        if newest:
            saved = read(newest, "the state of the interrupted run")
        self.rows = saved["rows"]
        self.begin(saved["share"])
        return saved.get("state")

    def log(self, step: int, seconds: float, **metrics: float) -> None:
        """Add a row: the metrics after ``step`` optimizer steps, the last ones of which took ``seconds``."""
        self.rows.append({"step": step, "seconds": seconds, **metrics})

    def save(self, share: float, state: Mapping[str, Any]) -> None:
        """Save a state of tensors and plain types, with the rows, when a share of the run in [0, 1] is done."""
        content = io.BytesIO()  # what torch itself says where a disk is full nobody understands
        torch.save({"rows": self.rows, "share": share, "state": dict(state)}, content)
        with atomically(self.folder.path / "checkpoints" / "last.ckpt") as aside:
            aside.write_bytes(content.getvalue())
        self.tell(share)

    def tell(self, share: float) -> None:
        """Tell which share of the run is done, in [0, 1], and its last row."""
        whole = self.expected(share)
        left = None if whole is None else whole * (1 - share)
        row = self.rows[-1] if self.rows else {}
        loss = next((value for name, value in row.items() if name.endswith("loss")), None)
        content: dict[str, Any] = {key: row[key] for key in ("epoch", "step") if key in row}
        write_json(self.folder.path / "progress.json", {**content, "loss": loss, "share": share, "left": left})


def parse_program(path: str, given: Sequence[str]) -> tuple[Callable[..., Outcome], Namespace, str]:
    """Return the function of that module and name, its arguments as given on the command line, and those as YAML.

    Raises:
        ConfigurationError: there is no such function, or no such argument.
    """
    module, _, name = path.rpartition(".")
    try:
        program: Callable[..., Outcome] | None = getattr(import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"program {path!r}: {error}") from None
    if not callable(program):
        raise ConfigurationError(f"program {path!r}: module {module} has no function {name}")
    parser = ArgumentParser(prog=path, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(program, skip={"progress"})
    settings = parser.parse_args([*given])
    seed_everything(int(settings.get("seed") or 0), verbose=False)
    made = parser.instantiate_classes(settings)
    made.pop("config")
    return program, made, parser.dump(settings, skip_none=False)
