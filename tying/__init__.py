"""Parameter tying and sharing: define which weights are tied, and how strictly."""

from tying.errors import ConfigurationError
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup

__version__ = "0.1.0"
__all__ = ["ConfigurationError", "Tie", "TiedGroup", "resolve"]
