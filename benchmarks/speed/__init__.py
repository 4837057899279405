"""Times against named peers, as ratios: a module for each family."""

from collections.abc import Callable

from matplotlib.figure import Figure

from benchmarks.speed import data, depth, fairness, growth, hard, harness, hashing, imports, recurrent, scale, soft

FAMILIES: dict[str, Callable[[], str | tuple[str, Figure]]] = {
    "data": data.measure,
    "depth": depth.measure,
    "fairness": fairness.measure,
    "growth": growth.measure,
    "hard": hard.measure,
    "hashing": hashing.measure,
    "harness": harness.measure,
    "imports": imports.measure,
    "recurrent": recurrent.measure,
    "scale": scale.measure,
    "soft": soft.measure,
}
