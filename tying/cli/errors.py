"""Explain errors in one paragraph."""

from __future__ import annotations

import errno
import re
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from inspect import signature
from pickle import PickleError

from lightning.fabric.utilities.exceptions import MisconfigurationException
from yaml import YAMLError

from tying.errors import ConfigurationError, nearest

UNION = "Does not validate against any of the Union subtypes"  # how the parser begins, where it tried several types
VAIN = ("Expected a <class 'NoneType'>", "Not a valid subclass", "Expected a path")  # what it then tells in addition
UNFIT = "Error(s) in loading state_dict"  # how torch begins, where a checkpoint does not fit
BROKEN = ("PytorchStreamReader failed", "[enforce fail at inline_container")  # and where a file is none of its own
OTHER_WEIGHTS = "loaded state dict"  # how torch begins, where optimizers do not fit
NAMELESS = "Found more than one stateful callback"  # how Lightning begins
LIGHTNING = ("state_dict", "pytorch-lightning_version", "loops", "optimizer_states", "epoch", "global_step")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)$")
NO_OPTION = re.compile(r"Option '(\w+)' is not accepted$")
CHANGES_ANOTHER = re.compile(r"Got value: \{'init_args':")  # init_args, and no class that they are of


def explain(error: BaseException, of_checkpoint: bool = False) -> str | None:
    """Return what is wrong with what was asked for, in a paragraph; ``None`` for an error of another kind.

    Args:
        error: what was raised.
        of_checkpoint: whether a checkpoint was to be loaded, which may not fit.
    """
    chain = _causes(error)
    mistakes = (ArgumentError, ConfigurationError, MisconfigurationException)
    if of_checkpoint and str(error).startswith(UNFIT):
        return f"ckpt_path: the checkpoint does not fit the model: {_shortened(str(error))}"
    if of_checkpoint and (
        (isinstance(error, KeyError) and error.args[0] in LIGHTNING) or str(error).startswith(BROKEN)
    ):
        return f"ckpt_path: this is no checkpoint of Lightning: {str(error).splitlines()[0]}"
    if of_checkpoint and isinstance(error, PickleError):
        return f"ckpt_path: the checkpoint holds more than tensors and plain types: {str(error).splitlines()[0]}"
    if of_checkpoint and str(error).startswith(OTHER_WEIGHTS):
        return (
            "ckpt_path: its optimizers hold other weights than those here. A run goes on with the ties that it was "
            "trained with; to begin another one from its weights, load those into the model"
        )
    if str(error).startswith(NAMELESS):
        return f"{str(error).partition('. ')[0]}: give each a name of its own, such as name: features"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"{error}. Choose a folder with room and rights, such as by --trainer.default_root_dir"
    if unreadable := next((cause for cause in chain if isinstance(cause, UnicodeDecodeError)), None):
        return f"a configuration is no text in UTF-8: {unreadable}"
    if not any(isinstance(cause, mistakes) or str(cause).startswith(UNION) for cause in chain):
        return None
    return _told_briefly(chain)


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and what caused it, down to the first cause."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _told_briefly(chain: Sequence[BaseException]) -> str:
    """Return where a mistake is, and its first cause, without what the parser also tried in vain.

    Example:
        >>> outer, inner = ValueError('Parser key "data": ...'), ValueError("batch_size must be 1 or more, not 0")
        >>> _told_briefly([outer, inner])
        'data: batch_size must be 1 or more, not 0'
    """
    cause = next((error for error in chain if isinstance(error, ConfigurationError)), chain[-1])
    heads = [re.match(r"""(?:Parser key|Problem with given class_path) ["']([^"']+)["']""", str(e)) for e in chain]
    places = [*dict.fromkeys(head[1] for head in heads if head)]
    alternatives = [re.sub(r"^Parser key \S+:\s*", "", str(cause).strip())]
    union = str(chain[chain.index(cause) - 1])
    if union.startswith(UNION) and not isinstance(cause, ConfigurationError):
        tried = re.split(r"\n  - ", union.split("\nGiven value")[0])[1:]
        alternatives += [re.sub(r"\s+", " ", attempt) for attempt in tried if not attempt.startswith(VAIN)][1:]
    told = ": ".join([*places, "; or: ".join(alternatives)])
    if CHANGES_ANOTHER.search(told):
        return (
            f"{told.splitlines()[0]}. These are init_args without a class_path: changes to what another configuration "
            "says. Give that one before, such as --config configs/base.yaml"
        )
    if any(isinstance(error, YAMLError) for error in chain):
        told = " ".join(told.split())
        return f"{told}. In YAML, a pattern needs quotes: asterisks, braces and colons mean something else there"
    told = told.replace("a <class 'collections.abc.Sequence'>", "a list")
    if told.endswith("Got value: inf"):
        return f"{told} (infinity is written .inf)"
    close = _nearest(told, places)
    return f"{told}.{close}" if close else told


def _nearest(told: str, places: Sequence[str]) -> str:
    """Return what is spelled nearly as what was refused: a class of this package, or an argument of the class."""
    if refused := NO_CLASS.search(told):
        packages = map(import_module, ("tying.callbacks", "tying.models", "tying.data"))
        return nearest(refused[1], [name for package in packages for name in package.__all__])
    if (refused := NO_OPTION.search(told)) and places:
        module, _, name = places[-1].rpartition(".")
        with suppress(ImportError, AttributeError, TypeError, ValueError):
            return nearest(refused[1], signature(getattr(import_module(module), name)).parameters)
    return ""


def _shortened(told: str, lines: int = 6) -> str:
    """Return what torch says of a state dict, the first lines of it."""
    first, *others = [line.strip() for line in told.splitlines()]
    more = f" and {len(others) - lines} more" if len(others) > lines else ""
    return f"{first} {' '.join(others[:lines])}{more}"
