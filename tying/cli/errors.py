"""Explain errors in one paragraph."""

import errno
import re
from argparse import ArgumentError
from collections.abc import Sequence
from pickle import PickleError
from traceback import walk_tb

from yaml import YAMLError

from tying.cli.hints import hint
from tying.errors import ConfigurationError, listed
from tying.lightning_namespace import pl
from tying.lightning_workarounds import MisconfigurationException

UNION = "Does not validate against any of the Union subtypes"  # the parser has tried several types
TRIED = ("Expected a <class 'NoneType'>", "Not a valid subclass", "Expected a path")  # of types that users rarely mean
WORDS = {"Sequence": "a list", "int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# class of an error, pattern of the beginning of its message, whether it is explained only if a checkpoint is loaded,
# and the explanation, with the message, its first line, its first sentence and its summary as fields
EXPLANATIONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str, bool, str], ...] = (
    (
        Exception,
        r"Error\(s\) in loading state_dict",
        True,
        "ckpt_path: the checkpoint does not fit the model: {summary}",
    ),
    (
        Exception,
        "'(state_dict|pytorch-lightning_version|loops|optimizer_states|epoch|global_step)'$|"  # a KeyError
        r"PytorchStreamReader failed|\[enforce fail at inline_container",
        True,
        "ckpt_path: not a checkpoint of Lightning: {line}",
    ),
    (PickleError, "", True, "ckpt_path: the checkpoint holds more than tensors and plain types: {line}"),
    (
        (FileNotFoundError, ImportError, ValueError),
        r"Checkpoint file not found|Install \w+ to access|Protocol not known",
        True,
        "ckpt_path: {message}: check the address, or download the checkpoint and give its path",
    ),
    (
        Exception,
        "loaded state dict",
        True,
        "ckpt_path: its optimizers hold other weights than this model has. Resume a run with the ties with which it "
        "was trained; to begin another run from its weights, load only those into the model",
    ),
    (
        RuntimeError,
        ".*mat1 and mat2 shapes cannot be multiplied",
        False,
        "the network takes inputs of another size than that of the data: {line}. Change its sizes; or add the "
        "configuration of the data that it needs, which the first line of a file in configs names",
    ),
    (
        Exception,
        "Found more than one stateful callback",
        False,
        "{sentence}: leave all but one out, or let their arguments differ",
    ),
    (
        OSError,
        rf"\[Errno ({'|'.join(map(str, UNWRITABLE))})\]",
        False,
        "{message}. Choose a folder with free space that you may write to, by --trainer.default_root_dir for example",
    ),
)


def explain(error: BaseException, of_checkpoint: bool = False) -> str | None:
    """Return a paragraph that explains a mistake of the user, or ``None`` for an error of another kind.

    Args:
        error: what was raised.
        of_checkpoint: whether the command loads a checkpoint, which may not fit the model.
    """
    message = str(error)
    for kind, pattern, only_of_checkpoint, explanation in EXPLANATIONS:
        if isinstance(error, kind) and re.match(pattern, message) and only_of_checkpoint <= of_checkpoint:
            line, *others = [line.strip() for line in message.splitlines()]
            return explanation.format(
                message=message,
                line=line,
                sentence=message.partition(". ")[0],
                summary=f"{line} {listed(others)}",
            )
    chain = [error]  # down to the first cause
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return (
        _summarize(chain)
        if any(
            isinstance(cause, ArgumentError | ConfigurationError | MisconfigurationException)
            or str(cause).startswith(UNION)
            for cause in chain
        )
        else None
    )


def _summarize(chain: Sequence[BaseException]) -> str:
    """Return the location of a mistake and its first cause, without the types that the parser tried in vain.

    Example:
        >>> outer, inner = ValueError('Parser key "data": ...'), ValueError("batch_size must be 1 or more, not 0")
        >>> _summarize([outer, inner])
        'data: batch_size must be 1 or more, not 0'
    """
    of_arguments = [error for error in chain if not isinstance(error, OSError)]  # which name no address
    cause = next((error for error in chain if isinstance(error, ConfigurationError)), (of_arguments or chain)[-1])
    head = re.compile(r"""(?:Parser key|Problem with given class_path) ["']([^"']+)["']""")
    places = [*dict.fromkeys(match[1] for error in chain if (match := head.match(str(error))))]
    alternatives = [re.sub(r"^Parser key \S+:\s*", "", str(cause).strip())]
    union = str(chain[chain.index(cause) - 1])
    if union.startswith(UNION) and not isinstance(cause, ConfigurationError):
        attempts = re.split(r"\n  - ", union.split("\nGiven value")[0])[1:]
        alternatives += [re.sub(r"\s+", " ", attempt) for attempt in attempts if not attempt.startswith(TRIED)][1:]
        of_classes = [text for text in alternatives if "Got value: Namespace(class_path=" not in text]
        alternatives = of_classes or alternatives  # whoever names a class means none of the other types
    alternatives = [text.partition("\nSubclass types expect")[0] for text in alternatives]
    alternatives = [text for text in alternatives if "Got value: {'init_args':" in text][:1] or alternatives
    if isinstance(cause, ConfigurationError) and not places and (constructed := _constructed(cause)) not in str(cause):
        places.append(constructed)
    text = ": ".join([*places, _in_plain_words("; or: ".join(alternatives))])
    if "Got value: {'init_args':" in text:
        return (
            f"{text.splitlines()[0]}. These are init_args without a class_path: changes to what another configuration "
            "says. Give that one before, such as --config configs/base.yaml"
        )
    if any(isinstance(error, YAMLError) for error in chain):
        return (
            f"{' '.join(text.split())}. In YAML, a pattern needs quotes: asterisks, braces and colons mean something "
            "else there"
        )
    if text.endswith("Got value: inf"):
        return f"{text} (infinity is written .inf)"
    sentence = hint(text, places)
    return f"{text}.{sentence}" if sentence else text


def _constructed(error: BaseException) -> str:
    """Return the name of the class in whose constructor an error was raised; an empty string if in none."""
    for frame, _ in walk_tb(error.__traceback__):
        instance = frame.f_locals.get("self")
        if frame.f_code.co_name in ("__init__", "__post_init__") and not isinstance(instance, pl.cli.LightningCLI):
            return type(instance).__name__
    return ""


def _in_plain_words(text: str) -> str:
    """Return a message of the parser without the names of its types.

    Example:
        >>> _in_plain_words("Expected a typing.Literal['l2', 'l1']. Got value: l3; or: Expected a <class 'int'>")
        "Expected 'l2' or 'l1'. Got value: l3; or: Expected an integer"
    """
    text = re.sub(r"a typing\.Literal\[([^\]]*)\]", lambda match: " or ".join(match[1].rsplit(", ", 1)), text)
    text = re.sub(r"an? <class '(?:[\w.]*\.)?(\w+)'>", lambda match: WORDS.get(match[1], f"a {match[1]}"), text)
    return re.sub(r"Expected a dot import path string: (\w+)", r"no class is named \1", text)
