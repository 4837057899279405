"""Patterns of dotted names, with the wildcards of a shell, ``**`` across parts, and captures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

from tying.errors import ConfigurationError

_TOKEN = re.compile(r"\{(?P<mirror>-?)(?P<name>[A-Za-z_]\w*)\}|(?P<set>\[!?\]?[^\]]*\])|(?P<char>.)", re.DOTALL)
Captures = tuple[tuple[str, str], ...]  # (capture, text) in the pattern's order


@dataclass(frozen=True)
class Pattern:
    """A pattern of dotted names.

    ``*``, ``?`` and ``[...]`` work as in a shell, within one dotted part. ``**`` matches zero or more whole parts.
    ``{i}`` captures text within one part. ``{-i}`` also captures text; its values are paired in mirrored order.

    Example:
        >>> Pattern("encoder.{i}.weight").match("encoder.0.weight")
        (('i', '0'),)
        >>> Pattern("**.weight").match("encoder.0.bias") is None
        True
    """

    text: str

    @cached_property
    def mirrored(self) -> frozenset[str]:
        """Names of the captures written ``{-name}``."""
        return frozenset(m["name"] for m in _TOKEN.finditer(self.text) if m["name"] and m["mirror"])

    @cached_property
    def captures(self) -> tuple[str, ...]:
        """Names of all captures, in the order of the pattern."""
        return tuple(dict.fromkeys(m["name"] for m in _TOKEN.finditer(self.text) if m["name"]))

    @cached_property
    def literal(self) -> bool:
        """Whether the pattern is a name without wildcards and captures."""
        return not set(self.text) & set("*?[]{}")

    def match(self, name: str) -> Captures | None:
        """Return the captures if the pattern matches the whole ``name``, else ``None``."""
        if self.literal:
            return () if name == self.text else None
        match = self._regex.fullmatch(f"{name}.")
        return tuple((capture, match[capture]) for capture in self.captures) if match else None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """The regular expression; it matches a name with a dot after it, so that every part ends with a dot."""
        parts = self.text.split(".")
        if not all(parts):
            raise ConfigurationError(f"pattern {self.text!r} has an empty part between its dots")
        captured: set[str] = set()
        regex = ""
        for part, before in zip(parts, ["", *parts], strict=False):
            if part != "**":
                regex += self._translate(part, captured) + r"\."
            elif before != "**":  # a repeated ** matches the same names, but slowly
                regex += r"(?:[^.]+\.)*"
        return re.compile(regex)

    def _translate(self, part: str, captured: set[str]) -> str:
        """Return the regular expression of one part, and add the names of its captures to ``captured``."""
        if "**" in part:
            raise ConfigurationError(f"pattern {self.text!r}: '**' must be a whole part between dots")
        regex = ""
        for token in _TOKEN.finditer(part):
            if name := token["name"]:
                if bool(token["mirror"]) != (name in self.mirrored):
                    raise ConfigurationError(f"pattern {self.text!r} has both {{{name}}} and {{-{name}}}")
                regex += f"(?P={name})" if name in captured else f"(?P<{name}>[^.]+)"
                captured.add(name)
            elif token["set"]:
                # fnmatch translates the sets of a shell; the lookahead excludes the dot
                regex += r"(?!\.)" + translate(token["set"]).removeprefix("(?s:")[:-3]
            elif token["char"] in "{}[]":
                raise ConfigurationError(
                    f"pattern {self.text!r}: a lone {token['char']!r}; captures are written {{i}} or {{-i}}, sets [abc]"
                )
            else:
                regex += {"*": "[^.]*", "?": "[^.]"}.get(token["char"], re.escape(token["char"]))
        return regex


def mirror_ranks(matches: list[Captures], capture: str, within: Sequence[str] = ()) -> dict[Captures, tuple[int, int]]:
    """Return, for each match, the rank of its value of ``capture`` and the number of distinct values.

    Values are ranked in numeric order if all are integers, else in the order of ``matches``. Matches with different
    values of the captures ``within`` are ranked apart.
    """
    siblings = {captures: tuple(dict(captures)[other] for other in within) for captures in matches}
    ranks: dict[tuple[str, ...], dict[str, int]] = {}
    for captures, key in siblings.items():
        ranks.setdefault(key, {}).setdefault(dict(captures)[capture], len(ranks[key]))
    for key, values in ranks.items():
        if all(re.fullmatch(r"\d+", value) for value in values):
            ranks[key] = {value: rank for rank, value in enumerate(sorted(values, key=int))}
    return {captures: (ranks[key][dict(captures)[capture]], len(ranks[key])) for captures, key in siblings.items()}
