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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.claims import Claim, Order, Peak, Trend
from benchmarks.figures import Plot
from benchmarks.report import ROOT
from benchmarks.suite import Axis, Layer, Suite, mapping_in
from tying.errors import ConfigurationError, listed, nearest

SUITES = ROOT / "benchmarks" / "suites"
CLAIMS = {"trends": Trend, "peaks": Peak, "orders": Order}
KEYS = ("description", "base", "deltas", "axes", "seed_keys", "figures", "curves", "plots", *CLAIMS, "like", "program")
AXIS_KEYS = ("key", "values", "deltas")
Part = TypeVar("Part", bound="Plot | Claim")


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
    content = mapping_in(path)
    _refuse_unknown(content, KEYS, f"suite {path.name}: unknown key")
    suite = _like_another(path, content) if "like" in content else _of_its_own(path, content)
    figures = content.get("figures", suite.figures)
    if not isinstance(figures, dict):
        raise ConfigurationError(f"suite {path.name}: figures must map headings to metrics, not {figures!r}")
    suite = replace(
        suite,
        name=path.stem,
        description=str(content.get("description", suite.description)),
        figures=figures,
        curves=_strings(path, content.get("curves", [*suite.curves]), "curves"),
        plots=_of(path, Plot, content, "plots"),
        claims=tuple(claim for key, kind in CLAIMS.items() for claim in _of(path, kind, content, key)),
    )
    _check(suite)
    return suite


def _like_another(path: Path, content: Mapping[str, Any]) -> Suite:
    """Return the runs of another suite, as this one chooses them."""
    if wrong := [key for key in ("base", "axes", "seed_keys", "program") if key in content]:
        raise ConfigurationError(f"suite {path.name}: {wrong[0]} and like exclude each other")
    other = load(content["like"])
    chosen = _strings(path, content.get("deltas", [*other.deltas]), "deltas, with like,")
    _refuse_unknown(chosen, other.deltas, f"suite {path.name}: unknown delta")
    deltas = {name: other.deltas[name] for name in chosen}
    axes = {}
    for name, axis in other.axes.items():
        if within := tuple(delta for delta in axis.deltas if delta in chosen):
            axes[name] = replace(axis, deltas=within)
    return replace(other, home=other.home or other.name, deltas=deltas, axes=axes)


def _of_its_own(path: Path, content: Mapping[str, Any]) -> Suite:
    """Return the runs that base, deltas, axes and seeds make."""
    deltas, axes = content.get("deltas"), content.get("axes", {})
    if not isinstance(deltas, dict) or not deltas:
        raise ConfigurationError(f"suite {path.name}: deltas must map names to lists of files and overrides")
    if not isinstance(axes, dict):
        raise ConfigurationError(f"suite {path.name}: axes must map names to keys and values, not {axes!r}")
    program = str(content.get("program", ""))
    return Suite(
        path.stem,
        "",
        _layers(path, content.get("base", []), "base"),
        {str(delta): _layers(path, layers, f"delta {delta}") for delta, layers in deltas.items()},
        {str(axis): _axis(path, axis, given, deltas) for axis, given in axes.items()},
        _strings(path, content.get("seed_keys", ["seed" if program else "seed_everything"]), "seed_keys"),
        program=program,
    )


def _check(suite: Suite) -> None:
    """Refuse plots and claims of other axes and settings than the suite's own."""
    settings = [*{run.setting: None for run in suite.runs()}]
    for plot in suite.plots:  # over an axis or a metric
        place = f"suite {suite.name}: {plot.name!r}"
        _refuse_unknown([plot.lines], [*suite.axes, "run"], f"{place}: unknown axis")
        shown = [setting for family in plot.families.values() for setting in family]
        _refuse_unknown(shown, settings, f"{place}: unknown setting")
        _refuse_words(suite, plot.x, place)
    for claim in suite.claims:
        place = f"suite {suite.name}: {claim.claim!r}"
        if isinstance(claim, Order):
            _refuse_unknown([claim.higher, claim.lower], settings, f"{place}: unknown setting")
        else:
            _refuse_unknown([claim.lines, claim.x], suite.axes, f"{place}: unknown axis")
            _refuse_words(suite, claim.x, place)


def _refuse_words(suite: Suite, x: str, place: str) -> None:
    """Refuse an axis as x whose values are no numbers, as the rows of results have them."""
    for value in suite.axes[x].values if x in suite.axes else ():
        try:
            float(str(value))
        except ValueError:
            raise ConfigurationError(
                f"{place}: x must be an axis of numbers, but {x} has the value {value!r}; such an axis can be its lines"
            ) from None


def _of(path: Path, kind: Callable[..., Part], content: Mapping[str, Any], key: str) -> tuple[Part, ...]:
    try:
        return tuple(kind(**given) for given in content.get(key, []))
    except TypeError as error:
        raise ConfigurationError(f"suite {path.name}: {key}: {error}") from None


def _axis(path: Path, name: str, given: Any, deltas: Iterable[str]) -> Axis:
    place = f"suite {path.name}: axis {name}"
    if not isinstance(given, dict) or "key" not in given or not isinstance(given.get("values"), list):
        raise ConfigurationError(f"{place} needs a key and a list of values, not {given!r}")
    _refuse_unknown(given, AXIS_KEYS, f"{place}: unknown key")
    within = _strings(path, given.get("deltas", [*deltas]), f"axis {name}: deltas")
    _refuse_unknown(within, deltas, f"{place}: unknown delta")
    return Axis(given["key"], tuple(given["values"]), within)


def _strings(path: Path, given: Any, place: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise ConfigurationError(f"suite {path.name}: {place} must be a list of names, not {given!r}")
    return tuple(given)


def _layers(suite: Path, given: Any, place: str) -> tuple[Layer, ...]:
    layers = []
    if not isinstance(given, list):
        raise ConfigurationError(f"suite {suite.name}: {place} must be a list of files and overrides, not {given!r}")
    for layer in given:
        if isinstance(layer, dict):
            layers.append(Layer(layer))
            continue
        folders = [ROOT / "configs"] if suite.parent == SUITES else [suite.parent, ROOT / "configs"]
        found = next((path.resolve() for folder in folders if (path := folder / str(layer)).is_file()), None)
        if found is None:
            files = sorted(path.name for folder in folders for path in folder.glob("*.yaml"))
            raise ConfigurationError(
                f"suite {suite.name}: {place}: there is no {layer!r} in {listed(map(str, folders))}; a layer is such a "
                f"file, or overrides by dotted key.{nearest(str(layer), files)}"
            )
        layers.append(Layer(mapping_in(found), is_file=True))
    return tuple(layers)


def _refuse_unknown(names: Iterable[str] | Mapping[str, Any], known: Iterable[str], told: str) -> None:
    known = [*known]
    if unknown := [name for name in names if name not in known]:
        close = nearest(str(unknown[0]), known)
        raise ConfigurationError(f"{told} {unknown[0]!r}: there is {listed(known)}.{close}")
