"""Name patterns: shell wildcards within a dotted part, ``**`` across parts, and captures."""

from __future__ import annotations

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
    """A pattern over dotted names.

    ``*``, ``?`` and ``[...]`` work as in a shell within one dotted part; ``**`` is zero or more whole parts;
    ``{i}`` captures text within one part; ``{-i}`` captures it too, to be paired in mirrored order.

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
        """Names of all captures, in the order in which they first stand."""
        return tuple(dict.fromkeys(m["name"] for m in _TOKEN.finditer(self.text) if m["name"]))

    @cached_property
    def literal(self) -> bool:
        """Whether the pattern is a plain name."""
        return not set(self.text) & set("*?[]{}")

    def match(self, name: str) -> Captures | None:
        """Return the captures of a match with the whole of ``name``, or ``None``."""
        if self.literal:
            return () if name == self.text else None
        found = self._regex.fullmatch(name)
        return tuple((capture, found[capture]) for capture in self.captures) if found else None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        split = self.text.split(".")
        parts = [part for part, before in zip(split, ["", *split], strict=False) if (part, before) != ("**", "**")]
        if not all(parts):
            raise ConfigurationError(f"pattern {self.text!r} has an empty part between its dots")
        seen: set[str] = set()
        regex = ""
        for position, part in enumerate(parts):
            first, last = position == 0, position == len(parts) - 1
            if part == "**":
                # each "**" owns the dot on one side of it, so that zero parts leave no dot behind
                regex += r"(?:[^.]+(?:\.[^.]+)*)" if first and last else r"(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*"
                continue
            regex += self._translate(part, seen)
            if not last and not (position == len(parts) - 2 and parts[-1] == "**"):
                regex += r"\."
        return re.compile(regex)

    def _translate(self, part: str, seen: set[str]) -> str:
        if "**" in part:
            raise ConfigurationError(f"pattern {self.text!r}: '**' must be a whole part between dots")
        regex = ""
        for token in _TOKEN.finditer(part):
            if name := token["name"]:
                if bool(token["mirror"]) != (name in self.mirrored):
                    raise ConfigurationError(f"pattern {self.text!r} has both {{{name}}} and {{-{name}}}")
                regex += f"(?P={name})" if name in seen else f"(?P<{name}>[^.]+)"
                seen.add(name)
            elif token["set"]:
                # the standard library knows the rules of a shell's sets; none of them may match a dot
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

    Values are ranked in numeric order if all are integers, else in the order given; among all matches, or among
    those that agree on the captures ``within``.
    """
    siblings: dict[tuple[str, ...], dict[str, None]] = {}
    place: dict[Captures, tuple[tuple[str, ...], str]] = {}
    for captures in matches:
        values = dict(captures)
        key = tuple(values[other] for other in within)
        place[captures] = key, values[capture]
        siblings.setdefault(key, {})[values[capture]] = None
    ranks: dict[tuple[str, ...], dict[str, int]] = {}
    for key, found in siblings.items():
        integers = all(re.fullmatch(r"\d+", value) for value in found)
        ranked = sorted(found, key=int) if integers else list(found)
        ranks[key] = {value: rank for rank, value in enumerate(ranked)}
    return {captures: (ranks[key][value], len(ranks[key])) for captures, (key, value) in place.items()}
