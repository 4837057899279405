"""Times against named peers, as ratios: a module for each family."""

from collections.abc import Callable

from matplotlib.figure import Figure

from benchmarks.speed import data, depth, fairness, growth, hard, harness, hashing, imports, recurrent, scale, soft

MODULES = (data, depth, fairness, growth, hard, hashing, harness, imports, recurrent, scale, soft)
FAMILIES: dict[str, Callable[[], str | tuple[str, Figure]]] = {
    module.__name__.rpartition(".")[2]: module.measure for module in MODULES
}
