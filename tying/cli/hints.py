"""Hints that follow an error of the command line: the names closest to a wrong one, or what to write instead."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tying
from tying.errors import listed, nearest
from tying.lightning_namespace import pl
from tying.mappings import subclasses

PACKAGES = ("tying.callbacks", "tying.models", "tying.data", "tying.soft", "tying.hard", "tying.hashing", "tying.depth")
SHORT = PACKAGES[:3]  # whose classes need no path
OPTIONS = ["config", "print_config", "seed_everything", "model", "data", "ckpt_path", "weights_only", "verbose"]
OPTIONS += ["plot", "json", "ckpt", "out", "budget", "steps", "batches", "parameters", "rate"]


def hint(text: str, places: Sequence[str]) -> str:
    """Return a sentence that follows an error, or an empty string.

    Args:
        text: the error's message.
        places: the keys and classes that the error is in, the innermost last.

    Example:
        >>> hint("Option 'strenght' is not accepted", ["trainer.callbacks", "tying.callbacks.SoftTying"])
        ' Nearest existing names: strength.'
        >>> hint("unrecognized arguments: --trainer.max_epohcs=3", [])
        ' Nearest existing names: --trainer.max_epochs, --trainer.max_steps, --trainer.min_epochs.'
    """
    for pattern, sentence in HINTS.items():
        if match := re.search(pattern, text):
            return sentence(match[1], places)
    return ""


def _of_class(name: str, places: Sequence[str]) -> str:
    """Return the classes that an argument takes, or those closest to the name of a callback, a model or data."""
    taken = sorted(_taken_by(places))
    return f" Its classes are {listed(taken, limit=12)}." if taken else nearest(name, _public(SHORT))


def _of_path(name: str, places: Sequence[str]) -> str:
    """Return the import paths closest to one that does not exist."""
    module, _, name = places[-1].rpartition(".") if places else ("", "", "")
    paths = _public(PACKAGES)
    with suppress(ImportError, ValueError):
        content = vars(import_module(module))
        paths |= {cls: f"{module}.{cls}" for cls in content if isinstance(content[cls], type)}
    lower = {cls.lower(): path for cls, path in paths.items()}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.7)]
    return f" Nearest existing names: {', '.join(close)}." if close else ""


def _of_argument(name: str, places: Sequence[str]) -> str:
    """Return the arguments of a class closest to a rejected one, or the callbacks that have it."""
    arguments: list[str] = []
    with suppress(ImportError, AttributeError, TypeError, ValueError):
        arguments = [*signature(_imported(places[-1])).parameters]
    if close := nearest(name, arguments):
        return close
    takers = [cls for cls, path in _public(SHORT[:1]).items() if name in signature(_imported(path)).parameters]
    if not takers or "trainer.callbacks" not in places[-2:-1]:
        return f" It takes {listed(arguments, limit=12)}." if arguments else ""
    return (
        f" --trainer.callbacks.{name} changes the last callback before it; {listed(takers)} have this argument: name "
        f"one first, as in --trainer.callbacks+={takers[-1]}."
    )


def _of_option(option: str, places: Sequence[str]) -> str:
    """Return the options closest to one that does not exist, or how to name a file."""
    if option.endswith((".yaml", ".yml", ".json")) and not option.startswith("-"):
        return f" Write --config {option}."
    trainer = (f"trainer.{name}" for name in signature(pl.Trainer).parameters)
    name = option.partition("=")[0].removeprefix("--")
    return of_optimizer(name) or nearest(f"--{name}", [f"--{known}" for known in (*OPTIONS, *trainer)])


def of_optimizer(option: str) -> str:
    """Return where the optimizer is chosen, if an option would choose it; else an empty string.

    Example:
        >>> of_optimizer("optimizer.lr")
        ' Models make their optimizers; those of tying.models take --model.optimizer=sgd or --model.optimizer=adamw.'
        >>> of_optimizer("verbose")
        ''
    """
    if option.partition(".")[0] not in ("optimizer", "lr_scheduler"):
        return ""
    return " Models make their optimizers; those of tying.models take --model.optimizer=sgd or --model.optimizer=adamw."


def _of_file(path: str, places: Sequence[str]) -> str:
    """Return the files of the same folder, or of this package, closest to one that does not exist."""
    folders = [Path(path).parent, Path(tying.__file__).parent / "configs"]
    close = (nearest(Path(path).name, [file.name for file in folder.glob("*.yaml")]) for folder in folders)
    return next(filter(None, close), "")


def _of_no_model(name: str, places: Sequence[str]) -> str:
    return " Name it, as in --model=Autoencoder, or give a configuration that does, such as --config configs/base.yaml."


def _of_value(value: str, places: Sequence[str]) -> str:
    """Return what to write for a value that is neither a class's name nor its arguments."""
    if "Tie" in value:
        return " A tie is 'source ~ target | relation', or a mapping with source, target, relation and exclude."
    return _of_class(value, places) or " Write the name of a class, or class_path and init_args."


def _of_list(value: str, places: Sequence[str]) -> str:
    return f" Write [{value!r}]."


def _of_class_path(name: str, places: Sequence[str]) -> str:
    return " The arguments of a class belong under init_args, beside class_path."


HINTS = {  # by a pattern of the message, whose group is the wrong name
    r"Option '(class_path)' is not accepted$": _of_class_path,
    r"(Not a valid subclass of \w+|does not correspond to a subclass of \w+)": _of_value,
    r"Expected a list\. Got value: ([^[{].*)$": _of_list,
    r"no class is named (\w+)$": _of_class,
    r"(has no attribute '\w+'|No module named '[\w.]+')$": _of_path,
    r"Option '([\w.]+)' is not accepted$": _of_argument,
    r"unrecognized arguments: (\S+)": _of_option,
    r"File does not exist: '([^']+)'": _of_file,
    r"arguments are required: \w+\.(model)$": _of_no_model,
}


def _public(packages: Sequence[str]) -> dict[str, str]:
    """Return the path of each public class, by its name."""
    modules = map(import_module, packages)
    return {
        name: f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if isinstance(getattr(module, name), type)
    }


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _taken_by(places: Sequence[str]) -> Iterator[str]:
    """Yield the names of the public classes of this package that the argument at a place takes."""
    public = {*_public(PACKAGES)}
    with suppress(ImportError, AttributeError, TypeError, ValueError, KeyError, IndexError, NameError):
        for base in _flat(get_type_hints(_imported(places[-2]).__init__)[places[-1]]):
            if isinstance(base, type) and base.__module__.startswith("tying."):
                yield from (cls.__name__ for cls in [*subclasses(base)] or [base] if cls.__name__ in public)


def _flat(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _flat(part)
