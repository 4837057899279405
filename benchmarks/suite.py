"""Suites: which runs to compare, as a file in YAML says.

A suite is a base configuration, deltas to compare, and axes to sweep::

    description: Untied against softly tied.
    base: [base.yaml]                # configuration files, beside a suite of one's own or in configs/
    deltas:                          # by name: files and overrides on top of the base; the first is the baseline
      untied: []
      soft: [soft.yaml, {trainer.callbacks.update: proximal}]
    axes:                            # every combination of values, for all deltas or for those listed
      strength: {key: trainer.callbacks.strength, values: [1.0e-3, 1.0e-2], deltas: [soft]}
    seed_keys: [seed_everything]     # where the seed goes
    program: module.function         # what does a run that is no single fit: see benchmarks.program
    figures: {accuracy: test/accuracy}  # columns of the report: metrics by heading
    curves: [val/accuracy]           # panels of its plot: metrics over epochs
    like: other                      # instead of base, axes and seeds: the very runs of another suite,
                                     # those of all its deltas, or of a list of them, the first the baseline

Figures in a paper's layout are :mod:`benchmarks.figures`, and verdicts on its claims :mod:`benchmarks.claims`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims import Claim, Order, Peak, Trend
from benchmarks.figures import Plot
from benchmarks.report import ROOT, write
from tying.errors import ConfigurationError, listed, nearest
from tying.mappings import from_mapping

SUITES = ROOT / "benchmarks" / "suites"
CLAIMS = {"trends": Trend, "peaks": Peak, "orders": Order}
KEYS = ("description", "base", "deltas", "axes", "seed_keys", "figures", "curves", "plots", *CLAIMS, "like", "program")


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


def suites() -> list[str]:
    """Return the names of the suites that come along."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load(name: str) -> Suite:
    """Return the suite of that name, or the one in that file.

    Raises:
        ConfigurationError: there is no such suite, or its file is wrong.

    Example:
        >>> [run.name for run in load("soft").runs()][:2]
        ['untied,seed=0', 'gradient,strength=0.001,seed=0']
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.exists():
        raise ConfigurationError(
            f"unknown suite {name!r}: there is {listed(suites())}, or give the path of a YAML file."
            f"{nearest(name, suites())}"
        )
    content, place = mapping_in(path), f"suite {path.name}:"
    _refuse_unknown(content, KEYS, f"{place} unknown key")
    suite = _like_another(place, content) if "like" in content else _of_its_own(path, place, content)
    suite = replace(
        suite,
        name=path.stem,
        description=str(content.get("description", suite.description)),
        figures=_mapping(f"{place} figures", content.get("figures", suite.figures), "headings to metrics"),
        curves=_names(f"{place} curves", content.get("curves", [*suite.curves])),
        plots=_made(f"{place} plots", Plot, content.get("plots", [])),
        claims=tuple(
            claim for key, kind in CLAIMS.items() for claim in _made(f"{place} {key}", kind, content.get(key, []))
        ),
    )
    _check(suite)
    return suite


def _like_another(place: str, content: Mapping[str, Any]) -> Suite:
    """Return the runs of another suite, as this one chooses them."""
    if wrong := [key for key in ("base", "axes", "seed_keys", "program") if key in content]:
        raise ConfigurationError(f"{place} {wrong[0]} and like exclude each other")
    other = load(content["like"])
    chosen = _names(f"{place} deltas, with like,", content.get("deltas", [*other.deltas]))
    _refuse_unknown(chosen, other.deltas, f"{place} unknown delta")
    within = {name: tuple(delta for delta in axis.deltas if delta in chosen) for name, axis in other.axes.items()}
    axes = {name: replace(other.axes[name], deltas=deltas) for name, deltas in within.items() if deltas}
    deltas = {name: other.deltas[name] for name in chosen}
    return replace(other, home=other.home or other.name, deltas=deltas, axes=axes)


def _of_its_own(path: Path, place: str, content: Mapping[str, Any]) -> Suite:
    """Return the runs that base, deltas, axes and seeds make."""
    deltas = _mapping(f"{place} deltas", content.get("deltas") or None, "names to lists of files and overrides")
    axes = _mapping(f"{place} axes", content.get("axes", {}), "names to keys and values")
    program = str(content.get("program", ""))
    return Suite(
        path.stem,
        "",
        _layers(path, f"{place} base", content.get("base", [])),
        {str(delta): _layers(path, f"{place} delta {delta}", layers) for delta, layers in deltas.items()},
        {str(name): _axis(f"{place} axis {name}", axis, deltas) for name, axis in axes.items()},
        _names(f"{place} seed_keys", content.get("seed_keys", ["seed" if program else "seed_everything"])),
        program=program,
    )


def _check(suite: Suite) -> None:
    """Refuse plots and claims of other axes and settings than the suite's own, and words as x."""
    settings = [*{run.setting: None for run in suite.runs()}]
    for part in (*suite.plots, *suite.claims):
        place = f"suite {suite.name}: {(part.name if isinstance(part, Plot) else part.claim)!r}:"
        shown: list[str] = []
        if isinstance(part, Plot):
            _refuse_unknown([part.lines], [*suite.axes, "run"], f"{place} unknown axis")
            shown = [setting for family in part.families.values() for setting in family]
        elif isinstance(part, Order):
            shown = [part.higher, part.lower]
        else:
            _refuse_unknown([part.lines, part.x], suite.axes, f"{place} unknown axis")
        _refuse_unknown(shown, settings, f"{place} unknown setting")
        x = "" if isinstance(part, Order) else part.x  # of a plot, an axis or a metric
        for value in suite.axes[x].values if x in suite.axes else ():
            try:
                float(str(value))
            except ValueError:
                raise ConfigurationError(
                    f"{place} x must be an axis of numbers, but {x} has the value {value!r}; such an axis can be its "
                    "lines"
                ) from None


def _made(place: str, kind: type, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise ConfigurationError(f"{place} must be a list of mappings, not {given!r}")
    return tuple(from_mapping(entry, kind, f"{place}: an entry") for entry in given)


def _axis(place: str, given: Any, deltas: Iterable[str]) -> Axis:
    if not isinstance(given, dict) or "key" not in given or not isinstance(given.get("values"), list):
        raise ConfigurationError(f"{place} needs a key and a list of values, not {given!r}")
    _refuse_unknown(given, ("key", "values", "deltas"), f"{place}: unknown key")
    within = _names(f"{place}: deltas", given.get("deltas", [*deltas]))
    _refuse_unknown(within, deltas, f"{place}: unknown delta")
    return Axis(given["key"], tuple(given["values"]), within)


def _mapping(place: str, given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigurationError(f"{place} must map {what}, not {given!r}")
    return given


def _names(place: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise ConfigurationError(f"{place} must be a list of names, not {given!r}")
    return tuple(given)


def _layers(suite: Path, place: str, given: Any) -> tuple[Layer, ...]:
    if not isinstance(given, list):
        raise ConfigurationError(f"{place} must be a list of files and overrides, not {given!r}")
    folders = [ROOT / "configs"] if suite.parent == SUITES else [suite.parent, ROOT / "configs"]
    layers = []
    for layer in given:
        if isinstance(layer, dict):
            layers.append(Layer(layer))
            continue
        path = next((path.resolve() for folder in folders if (path := folder / str(layer)).is_file()), None)
        if path is None:
            files = sorted(path.name for folder in folders for path in folder.glob("*.yaml"))
            raise ConfigurationError(
                f"{place}: there is no {layer!r} in {listed(map(str, folders))}; a layer is such a file, or overrides "
                f"by dotted key.{nearest(str(layer), files)}"
            )
        layers.append(Layer(mapping_in(path), is_file=True))
    return tuple(layers)


def _refuse_unknown(names: Iterable[str], known: Iterable[str], told: str) -> None:
    known = [*known]
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(f"{told} {unknown[0]!r}: there is {listed(known)}.{nearest(str(unknown[0]), known)}")
