"""Select weights by name patterns, and group weights to tie."""

from tying.selection.patterns import Pattern
from tying.selection.resolve import resolve, select
from tying.selection.tie import Tie, TiedGroup

__all__ = ["Pattern", "Tie", "TiedGroup", "resolve", "select"]
