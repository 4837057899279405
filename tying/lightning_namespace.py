"""The Lightning that this process uses: ``lightning.pytorch`` or ``pytorch_lightning``, the same code under two names.

The classes of one are unrelated to those of the other, so callbacks and models of one fail in a Trainer of the other.
All of this package imports ``pl`` from here: the only one of the two that is loaded when this module is first imported,
and ``lightning.pytorch`` if both are loaded or neither is.
"""

import sys
from typing import TYPE_CHECKING

from tying.errors import ConfigurationError

if not TYPE_CHECKING and "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    import pytorch_lightning as pl
    import pytorch_lightning.cli  # noqa: F401  # for pl.cli
else:
    import lightning.pytorch as pl
    import lightning.pytorch.cli  # noqa: F401

__all__ = ["check_namespace", "pl"]


def check_namespace(kind: type, context: str) -> None:
    """Raise an error if a class derives from a class of the other Lightning.

    Args:
        kind: the class of a Trainer, a callback or a model.
        context: what of this package meets the class, for the error message.

    Raises:
        ConfigurationError: the class derives from the other Lightning.

    Example:
        >>> check_namespace(pl.Trainer, "SoftTying")
    """
    here, other = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name != pl.__name__)
    if any(base.__module__.startswith(f"{other}.") for base in kind.__mro__):
        raise ConfigurationError(
            f"{context} is built on {here}, and {kind.__name__} on {other}: import Lightning from {here} everywhere; "
            f"or import {other}, but not {here}, before you import tying's callbacks, mixins, models or data"
        )
