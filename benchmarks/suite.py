"""Suites: which runs to compare; :mod:`benchmarks.declared` reads them from YAML."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims import Claim
from benchmarks.figures import Plot
from benchmarks.report import write
from tying.errors import ConfigurationError, listed, nearest


@dataclass(frozen=True)
class Layer:
    """One step of a configuration: a file, or overrides by dotted key."""

    content: dict[str, Any]
    is_file: bool = False

    def arguments(self, path: Path) -> list[str]:
        """Return the layer on the command line; a file's content is written to ``path``.

        The file itself may have changed since the run was defined by its content.
        """
        if not self.is_file:
            return [f"--{key}={_written(value)}" for key, value in self.content.items()]
        write(path, yaml.safe_dump(self.content, sort_keys=False))
        return [f"--config={path}"]


@dataclass(frozen=True)
class Run:
    """One training run of a suite.

    Attributes:
        delta: what it compares.
        values: its value on each axis.
        seed: of everything random.
        layers: its configuration, each layer on top of those before.
        program: the function that does it, where it is no single fit; see :mod:`benchmarks.program`.
    """

    delta: str
    values: dict[str, Any]
    seed: int
    layers: tuple[Layer, ...]
    program: str = ""

    @property
    def setting(self) -> str:
        """What the run's replicas have in common, as words."""
        return ",".join([self.delta, *(f"{axis}={_written(value)}" for axis, value in self.values.items())])

    @property
    def name(self) -> str:
        """The run's name, fit for a folder.

        Example:
            >>> Run("soft", {"strength": 0.001}, seed=2, layers=()).name
            'soft,strength=0.001,seed=2'
        """
        return re.sub(r"[^\w.,=+-]", "_", f"{self.setting},seed={self.seed}")

    def arguments(self, folder: Path) -> list[str]:
        """Return the run on the command line; its files are written to ``folder``."""
        layers = enumerate(self.layers)
        return [argument for number, layer in layers for argument in layer.arguments(folder / f"{number}.yaml")]

    @property
    def definition(self) -> list[dict[str, Any]]:
        """What makes the run the run it is: the content of its layers, as JSON holds it."""
        content: list[dict[str, Any]] = json.loads(json.dumps([layer.content for layer in self.layers], default=str))
        return content


@dataclass(frozen=True)
class Axis:
    """Values that a key takes, in some deltas."""

    key: str
    values: tuple[Any, ...]
    deltas: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """What a suite's file says."""

    name: str
    description: str
    base: tuple[Layer, ...]
    deltas: dict[str, tuple[Layer, ...]]
    axes: dict[str, Axis] = field(default_factory=dict)
    seed_keys: tuple[str, ...] = ("seed_everything",)
    figures: dict[str, str] = field(default_factory=dict)
    curves: tuple[str, ...] = ("val/accuracy",)
    plots: tuple[Plot, ...] = ()
    claims: tuple[Claim, ...] = ()
    home: str = ""  # the suite whose runs these are, if another's
    program: str = ""  # module and function that does each run, where a run is no single fit

    @property
    def time(self) -> str:
        """What the curves are over."""
        return "step" if self.program else "epoch"

    def runs(self, seeds: int = 1, only: str | None = None, overrides: Iterable[str] = ()) -> list[Run]:
        """Return all runs, seed by seed.

        Args:
            seeds: how many replicas: with seeds 0, 1, ….
            only: a shell pattern; of runs whose name or setting it fits.
            overrides: arguments ``--key=value`` or ``--config=file`` of all runs, on top of everything.

        Raises:
            ConfigurationError: no seed, or an override of it; the pattern fits no run; two runs have one name.
        """
        if seeds < 1:
            raise ConfigurationError(f"seeds must be 1 or more, not {seeds}")
        above: list[Layer] = []
        for argument in overrides:
            layer = self._override(argument)
            if above and not (layer.is_file or above[-1].is_file or layer.content.keys() & above[-1].content.keys()):
                layer = Layer({**above.pop().content, **layer.content})  # their order makes no other definition
            above.append(layer)
        every: dict[str, Run] = {}
        for seed, (delta, layers) in itertools.product(range(seeds), self.deltas.items()):
            axes = {name: axis for name, axis in self.axes.items() if delta in axis.deltas}
            for combination in itertools.product(*(axis.values for axis in axes.values())):
                values = dict(zip(axes, combination, strict=True))
                swept = Layer({axes[name].key: value for name, value in values.items()})
                seeded = Layer(dict.fromkeys(self.seed_keys, seed))
                run = Run(delta, values, seed, (*self.base, *layers, swept, *above, seeded), self.program)
                if run.name in every:
                    raise ConfigurationError(f"suite {self.name}: two runs are named {run.name}")
                every[run.name] = run
        if only is None:
            return [*every.values()]
        chosen = [run for run in every.values() if fnmatchcase(run.name, only) or fnmatchcase(run.setting, only)]
        if not chosen:
            close = nearest(only.replace("*", ""), [*every, *self.deltas, *(run.setting for run in every.values())])
            axes_told = f", axes {listed(self.axes)}" if self.axes else ""
            raise ConfigurationError(
                f"no run of suite {self.name} fits {only!r}: it has deltas {listed(self.deltas)}{axes_told} and seeds "
                f"0 to {seeds - 1}, in names such as {next(iter(every))}.{close}"
            )
        return chosen

    def _override(self, argument: str) -> Layer:
        key, assigned, value = argument.removeprefix("--").partition("=")
        if not (argument.startswith("--") and assigned and key):
            raise ConfigurationError(f"unknown argument {argument!r}: overrides are written --key=value")
        if key in self.seed_keys:
            raise ConfigurationError(f"{argument!r}: the seeds of a suite's runs are 0, 1, …; say how many by --seeds")
        if key == "config":
            if not Path(value).is_file():
                raise ConfigurationError(f"{argument!r}: there is no such file")
            return Layer(mapping_in(Path(value)), is_file=True)
        try:
            return Layer({key: yaml.safe_load(value)})
        except yaml.YAMLError:
            raise ConfigurationError(f"{argument!r}: the value is not YAML") from None


def mapping_in(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ConfigurationError: it is not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold keys and values")
    return content


def _written(value: Any) -> str:
    """Return a value as the command line takes it.

    Example:
        >>> _written(0.001), _written("proximal"), _written([1, 2]), _written(None)
        ('0.001', 'proximal', '[1, 2]', 'null')
    """
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
