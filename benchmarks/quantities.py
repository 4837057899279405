"""What metrics and costs are called on the axes of figures, and their units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SPLITS = {"train": "training", "val": "validation", "test": "test"}
MEASURES = {  # by the last part of a metric's name
    "accuracy": ("accuracy", "fraction correct"),
    "bits": ("cross entropy", "bits per character"),
    "cosine": ("cosine similarity", "to the teacher"),
    "neighbour": ("nearest neighbours", "fraction kept"),
    "error": ("squared error", "relative"),
    "forgetting": ("forgetting", "accuracy lost"),
    "loss": ("loss", "mean per example"),
}
QUANTITIES = {
    "bytes": ("size of the model's state", "KiB"),
    "epoch": ("training time", "epochs"),
    "loss gap": ("test loss − training loss", "nats"),
    "parameters": ("size of the model", "parameters"),
    "peak memory": ("peak memory", "bytes"),
    "seconds / epoch": ("time per epoch", "seconds"),
    "processor seconds of training": ("training time on one core", "seconds"),
    "seconds of training": ("training time", "seconds"),
    "step": ("training time", "optimizer steps"),
    "tying/compression": ("compression", "times smaller"),
    "tying/distinct": ("distinct weights", "number"),
    "tying/entropy": ("entropy of table loads", "nats"),
    "tying/gap": ("largest gap of tied weights", "relative"),
    "tying/nonzero": ("weights that are not zero", "fraction"),
}


@dataclass(frozen=True)
class Quantity:
    """A quantity in words.

    Attributes:
        name: the name.
        unit: the unit, or what a number without a unit is relative to; empty if it is not known.
    """

    name: str
    unit: str = ""

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def quantity(metric: str) -> Quantity:
    """Return the words for a metric or a cost; those of an unknown one are its name without slashes.

    Example:
        >>> quantity("val/accuracy").label, quantity("test/grey/accuracy").label
        ('validation accuracy (fraction correct)', 'test accuracy, grey (fraction correct)')
        >>> quantity("test/task 2").label, quantity("mine/top_five").label
        ('test accuracy on task 2 (fraction correct)', 'mine top five')
    """
    if metric in QUANTITIES:
        return Quantity(*QUANTITIES[metric])
    split, *between, last = metric.split("/") if "/" in metric else ("", metric)
    if task := re.fullmatch(r"task \d+", last):
        name, unit = f"accuracy on {task[0]}", "fraction correct"
    else:
        name, unit = MEASURES.get(last, (last.replace("_", " "), ""))
    whole = ", ".join([f"{SPLITS.get(split, split.replace('_', ' '))} {name}".strip(), *between])
    return Quantity(re.sub(r"steps([+-]\d+)", r"\1 steps", whole), unit)


def in_common(metrics: Sequence[str]) -> Quantity:
    """Return what several metrics measure, for the axis that they share.

    Example:
        >>> in_common(["test/colour/accuracy", "test/grey/accuracy"]).label, in_common(["test/loss", "tying/gap"]).name
        ('test accuracy (fraction correct)', 'test loss and largest gap of tied weights')
    """
    words = [quantity(metric) for metric in metrics]
    names = [*dict.fromkeys(word.name if len(words) == 1 else word.name.partition(",")[0] for word in words)]
    units = {word.unit for word in words}
    return Quantity(" and ".join(names), units.pop() if len(units) == 1 else "")
