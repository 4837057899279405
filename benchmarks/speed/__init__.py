"""Times against named peers, as ratios: a module for each family."""

from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from benchmarks.speed import (
    data,
    depth,
    fairness,
    features,
    growth,
    hard,
    harness,
    hashing,
    imports,
    recurrent,
    scale,
    soft,
)

MODULES = (data, depth, fairness, features, growth, hard, hashing, harness, imports, recurrent, scale, soft)
FAMILIES: dict[str, Callable[[], Iterable[str | Figure]]] = {  # each yields the paragraphs and pictures of its page
    module.__name__.rpartition(".")[2]: module.measure for module in MODULES
}
