"""Read configuration files, and name the file in every error."""

import os
import re
from argparse import ArgumentError
from typing import Any

import yaml
from typing_extensions import override

from tying.cli.bake import bake_parser
from tying.cli.demo import demo_parser
from tying.cli.hints import of_optimizer
from tying.errors import ConfigurationError, nearest
from tying.lightning_namespace import pl

SECTIONS = ("seed_everything", "trainer", "model", "data")  # of a run's configuration, without its subcommand's options
_VARIABLE = re.compile(r"\$\{[^}]*\}|\$([A-Za-z_]\w*)")


class Parser(pl.cli.LightningArgumentParser):
    """Lightning's parser, with the subcommands ``bake`` and ``demo``, which need neither trainer nor model.

    Errors in a configuration file name the file. Files that are empty, that give a key twice or that name an
    environment variable are refused.
    """

    @override
    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        subcommands = super().add_subcommands(*args, **kwargs)
        for name, parser in {"bake": bake_parser(), "demo": demo_parser()}.items():
            subcommands.add_subcommand(name, parser, help=parser.description)
        return subcommands

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            parsed = super().parse_path(path, *args, **kwargs)
            self._check_options(parsed)
        except UnicodeDecodeError as error:
            raise TypeError(f'Parser key "{path}":') from ConfigurationError(f"not UTF-8 text: {error}")
        except (TypeError, KeyError, ValueError, ArgumentError) as error:  # in the form of the parser's own errors
            raise TypeError(f'Parser key "{path}": {error}') from error
        return parsed

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        check_content(content)
        return super().parse_string(content, *args, **kwargs)

    def _check_options(self, parsed: Any) -> None:
        """Raise a ConfigurationError if a file has an option that the parser does not have, which it checks later."""
        known = [*self.get_defaults(skip_validation=True).keys()]
        options = {*known, *(key.partition(".")[0] for key in known)}
        for key in dict(parsed.items()):
            if not any(key == option or key.startswith(f"{option}.") for option in known):
                raise ConfigurationError(f"there is no option {key!r}.{of_optimizer(key) or nearest(key, options)}")


class SectionsParser(Parser):
    """Parser that reads trainer, model and data of a run's configuration, and ignores the subcommand's options."""

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        check_content(content)
        sections = {key: value for key, value in yaml.safe_load(content).items() if key in SECTIONS}
        return super().parse_string(yaml.safe_dump(sections), *args, **kwargs)


def check_content(content: str) -> None:
    r"""Raise an error unless a text is a configuration that YAML reads as it is meant.

    Raises:
        ConfigurationError: the text is not YAML, is empty, or holds no keys; there is a duplicate key; or a value names
            an environment variable, which would not be replaced.

    Example:
        >>> check_content("data: CIFAR10\ndata: MNIST")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: duplicate key 'data', in lines 1 and 2: the second would replace the...
    """
    root, problem = None, ""
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = _explain_syntax(content, error)
    if problem:  # not in the except clause, so that this is the only error of the chain
        raise ConfigurationError(problem)
    if not isinstance(root, yaml.MappingNode):
        content = "is empty" if root is None else "holds no keys"
        raise ConfigurationError(
            f"the configuration {content}: write keys and values, such as trainer: {{max_epochs: 3}}"
        )
    _check_node(root)


def _explain_syntax(content: str, error: yaml.YAMLError) -> str:
    """Return the place and the reason of an error of YAML, with the remedy."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return f"not YAML: {error}"
    line = next(iter(content.splitlines()[mark.line :]), "").strip()
    remedy = (
        "Indent by spaces, not by tabs"
        if "'\\t'" in str(error.problem)
        else "In YAML, a pattern needs quotes: asterisks, braces and colons mean something else there. Or is the line "
        "indented otherwise than its neighbours?"
    )
    return f"line {mark.line + 1}, {line!r}: {error.problem}. {remedy}"


def _check_node(node: yaml.Node, parents: tuple[yaml.Node, ...] = ()) -> None:
    """Raise a ConfigurationError if part of a YAML document has a duplicate key, or a value names a variable."""
    if node in parents:
        raise ConfigurationError(f"line {node.start_mark.line + 1}: this part of the configuration contains itself")
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise ConfigurationError(
                    f"duplicate key {name!r}, in lines {lines[name]} and {line}: the second would replace the "
                    "first. Put both into one"
                )
            lines[name] = line
            _check_node(value, (*parents, node))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, (*parents, node))
    else:
        check_variables(node.value, f"line {node.start_mark.line + 1}: ")


def check_variables(value: str, context: str = "") -> None:
    """Raise an error if a value names an environment variable, which would not be replaced.

    Args:
        value: a value of a configuration, or an argument of the command line.
        context: first words of the error message.

    Raises:
        ConfigurationError: it holds ``${NAME}``, or ``$NAME`` of a variable that is set.

    Example:
        >>> check_variables("${DATA}/cifar")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: '${DATA}' is not replaced: environment variables are not read here. Write ...
    """
    for match in _VARIABLE.finditer(value):
        if match[1] is None or match[1] in os.environ:
            raise ConfigurationError(
                f"{context}{match[0]!r} is not replaced: environment variables are not read here. Write the value, or "
                "give it on the command line, without single quotes, where your shell replaces the name"
            )
