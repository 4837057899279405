"""Weights that are equal: one parameter under several names, also through a relation."""

from tying.hard.audit import TieReport, audit
from tying.hard.plain import bake, load_plain
from tying.hard.sharing import tie, tied, untie

__all__ = ["TieReport", "audit", "bake", "load_plain", "tie", "tied", "untie"]
