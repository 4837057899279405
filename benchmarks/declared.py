"""The files of suites, in YAML.

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

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims import Order, Peak, Trend
from benchmarks.figures import Plot
from benchmarks.report import ROOT
from benchmarks.suite import Axis, Layer, Suite, mapping_in
from tying.errors import ConfigurationError, listed, nearest
from tying.mappings import from_mapping

SUITES = ROOT / "benchmarks" / "suites"
CLAIMS = {"trends": Trend, "peaks": Peak, "orders": Order}
KEYS = ("description", "base", "deltas", "axes", "seed_keys", "figures", "curves", "plots", *CLAIMS, "like", "program")


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
