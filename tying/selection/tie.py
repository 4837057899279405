"""Ties between weights, by name, and the groups of tensors that they select."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tying.errors import ConfigurationError, listed, nearest
from tying.selection.relation import Relation

_BRACES = re.compile(r"\{[^~|=\s]*\}")  # which Pattern reads


@dataclass(frozen=True)
class Tie:
    """Selects weights to tie, by name.

    Args:
        source: a pattern of parameter or module names; hard ties take the source's values. ``*``, ``?`` and ``[...]``
            match within one dotted part, ``**`` matches any number of parts, ``{0..11}`` integers, ``{i}`` captures
            text and ``{i:0..11}`` an integer; see :class:`tying.selection.Pattern`. A pattern that matches no parameter
            may match modules: every parameter in them is then tied by its relative name.
        target: a pattern of the partners. Each value of the captures shared with ``source`` gives one group.
            ``{-i}`` pairs values in mirrored order: the first with the last. If ``None``, all matches of ``source``
            are one group, or one group per value of its captures.
        relation: an invertible einops pattern from the source's layout to the target's, for example ``"o i -> i o"``.
        exclude: patterns of parameters or modules to leave out.

    Example:
        >>> Tie.parse("encoder.{i}.weight ~ decoder.{-i}.weight | o i -> i o")
        Tie(source='encoder.{i}.weight', target='decoder.{-i}.weight', relation='o i -> i o', exclude=())
    """

    source: str
    target: str | None = None
    relation: str | None = None
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Tie:
        """Parse the string form ``"source ~ target | relation"``, whose last two parts are optional.

        Raises:
            ConfigurationError: a part is missing or repeated.
        """
        names, bar, relation = text.partition("|")
        source, tilde, target = names.partition("~")
        if (
            "|" in relation
            or "~" in target + relation
            or not source.strip()
            or (tilde and not target.strip())
            or (bar and not relation.strip())
        ):
            raise ConfigurationError(f"tie {text!r} must have the form 'source ~ target | relation'")
        return cls(source.strip(), target.strip() or None, relation.strip() or None)

    @classmethod
    def from_mapping(cls, arguments: Mapping[str, Any]) -> Tie:
        """Return the tie with the given arguments.

        Raises:
            ConfigurationError: ``source`` is missing, or an argument is unknown.
        """
        names = [field.name for field in fields(cls)]
        if "source" not in arguments or (unknown := [name for name in arguments if name not in names]):
            raise ConfigurationError(
                f"tie {dict(arguments)} must have a source, and may have a target, a relation and an exclude"
                + ("" if "source" not in arguments else f", not {listed(unknown)}.{nearest(unknown[0], names)}")
            )
        return cls(**arguments)

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):  # type: ignore[unreachable]  # callers may not check types
            raise ConfigurationError(f"exclude must be a list of patterns; write [{self.exclude!r}]")
        object.__setattr__(self, "exclude", tuple(self.exclude))  # YAML gives lists, which are not hashable
        for pattern in (self.source, *([] if self.target is None else [self.target]), *self.exclude):
            if not isinstance(pattern, str) or not pattern or set(_BRACES.sub("", pattern)) & set("~|=,: \t\n"):
                raise ConfigurationError(
                    f"{pattern!r} is not a pattern of names. A tie is Tie(source, target, relation), or the "
                    "string 'source ~ target | relation'"
                )

    def __str__(self) -> str:
        relation = f" | {self.relation}" if self.relation else ""
        return f"{self.source} ~ {self.target}{relation}" if self.target else f"{self.source}{relation}"


AnyTie = Tie | str | Mapping[str, Any]  # mappings hold Tie's arguments, as in YAML


@dataclass(frozen=True, eq=False, repr=False)
class TiedGroup:
    """Distinct tensors that are tied; the first one is the source.

    Attributes:
        names: one name per tensor, relative to the model.
        parameters: the parameters of the model, in their own layouts.
        relations: the map from the source's layout to the layout of each tensor.
        shared: whether all names refer to one parameter, which ``parameters`` then repeats for each name.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    relations: tuple[Relation, ...]
    shared: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        relation = f" | {self.relation}" if self.relation else ""
        return f"TiedGroup({' ~ '.join(self.names)}{relation}, {tuple(self.parameters[0].shape)})"

    @property
    def relation(self) -> str | None:
        """The einops pattern, or ``None`` if all layouts are equal; different patterns are joined by ``"; "``."""
        return "; ".join(dict.fromkeys(str(relation) for relation in self.relations if relation.steps)) or None

    @cached_property
    def to_source(self) -> tuple[Relation, ...]:
        """The map from the layout of each tensor to the source's."""
        return tuple(relation.inverse() for relation in self.relations)

    def tensors(self) -> list[Tensor]:
        """Return the group's tensors in the source's layout, differentiable with respect to the parameters."""
        pairs = zip(self.to_source, self.parameters, strict=True)
        return [*self.parameters] if self.shared else [to_source(parameter) for to_source, parameter in pairs]


def parse_ties(ties: Sequence[AnyTie]) -> list[Tie]:
    """Return ties in their dataclass form.

    Raises:
        ConfigurationError: ``ties`` is not a sequence, or is empty; or a tie is malformed.

    Example:
        >>> parse_ties(["a.* ~ b.*", {"source": "layers.*", "exclude": ["**.norm"]}])[1].exclude
        ('**.norm',)
    """
    if isinstance(ties, Tie | str | Mapping):  # callers may not check types
        raise ConfigurationError(f"ties must be a list; write [{str(ties)!r}]")
    if not isinstance(ties, Sequence) or not ties or not all(isinstance(tie, Tie | str | Mapping) for tie in ties):
        value = repr(ties) if ties is None or isinstance(ties, Sequence) else type(ties).__name__
        raise ConfigurationError(f"ties must be a list of at least one Tie, string or mapping, not {value}")
    return [
        Tie.parse(tie) if isinstance(tie, str) else Tie.from_mapping(tie) if isinstance(tie, Mapping) else tie
        for tie in ties
    ]
