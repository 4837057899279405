"""Parameter tying and sharing: say which weights belong together, and how strictly."""

from tying.errors import ConfigurationError
from tying.selection.resolve import resolve
from tying.selection.tie import Tie, TiedGroup

__version__ = "0.1.0"
__all__ = ["ConfigurationError", "Tie", "TiedGroup", "resolve"]
