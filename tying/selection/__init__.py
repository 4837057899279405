"""Select weights that belong together: from name patterns to groups of tensors."""

from tying.selection.patterns import Pattern
from tying.selection.resolve import resolve, select
from tying.selection.tie import Tie, TiedGroup

__all__ = ["Pattern", "Tie", "TiedGroup", "resolve", "select"]
