"""Patterns of dotted names, with the wildcards of a shell, ``**`` across parts, ranges of integers, and captures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

from tying.errors import ConfigurationError

_TOKEN = re.compile(
    r"\{(?:(?P<mirror>-?)(?P<name>[A-Za-z_]\w*))?(?P<range>(?(name):)(?P<low>[0-9]+)\.\.(?P<high>[0-9]+))?(?<!\{)\}"
    r"|(?P<braces>\{[^{}]*[{}]?|\})|(?P<set>\[!?\]?[^\].]*\])|(?P<char>.)",
    re.DOTALL,
)
_DOT = re.compile(r"\.(?![^{}]*\})")  # outside braces
_NUMBERS = re.compile(r"([0-9]+)-([0-9]{2,})|([0-9]{2,})-([0-9]+)")  # in a set, whose characters are single digits
Captures = tuple[tuple[str, str], ...]  # (capture, text) in the pattern's order


@dataclass(frozen=True)
class Pattern:
    """A pattern of dotted names.

    ``*``, ``?`` and ``[...]`` work as in a shell, within one dotted part. ``**`` matches zero or more whole parts.
    ``{0..11}`` matches the integers from 0 to 11, without leading zeros. ``{i}`` captures text within one part, and
    ``{i:0..11}`` an integer. ``{-i}`` and ``{-i:0..11}`` also capture; their values are paired in mirrored order.

    Example:
        >>> Pattern("encoder.{i}.weight").match("encoder.0.weight")
        (('i', '0'),)
        >>> [name for name in ("h.8", "h.11", "h.12") if Pattern("h.{0..11}").match(name) is not None]
        ['h.8', 'h.11']
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
        """Return the captures if the pattern matches the whole ``name``, else ``None``.

        Raises:
            ConfigurationError: the pattern is malformed.
        """
        if self.literal:
            return () if name == self.text else None
        match = self._regex.fullmatch(f"{name}.")
        return tuple((capture, match[capture]) for capture in self.captures) if match else None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """The regular expression; it matches a name with a dot after it, so that every part ends with a dot."""
        self._check_brackets()
        parts = _DOT.split(self.text)
        if not all(parts):
            raise ConfigurationError(f"pattern {self.text!r} has an empty part between its dots")
        captured: dict[str, str | None] = {}
        regex = ""
        for part, before in zip(parts, ["", *parts], strict=False):
            if part != "**":
                regex += self._translate(part, captured) + r"\."
            elif before != "**":  # a repeated ** matches the same names, but slowly
                regex += r"(?:[^.]+\.)*"
        return re.compile(regex)

    def _check_brackets(self) -> None:
        """Raise a ConfigurationError for braces and brackets that are not closed, or hold something else."""
        for token in _TOKEN.finditer(self.text):
            if (braces := token["braces"]) or token["char"] in ("[", "]"):
                if not braces or len(braces) == 1 or braces[-1] not in "{}":
                    reason = f"a lone {token[0][0]!r}"
                elif braces[-1] == "{":
                    reason = "braces within braces"
                else:
                    reason = f"{braces!r} is " + ("no range of two integers" if ".." in braces else "no capture")
                raise ConfigurationError(
                    f"pattern {self.text!r}: {reason}; captures are written {{i}} or {{-i}}, ranges {{0..11}}, "
                    "{i:0..11} or {-i:0..11}, and sets [abc]"
                )
            if token["set"] and (numbers := _NUMBERS.search(token["set"])):
                low, high = filter(None, numbers.groups())
                raise ConfigurationError(
                    f"pattern {self.text!r}: the set {token['set']!r} matches one character, not the numbers {low} "
                    f"to {high}: write {{{low}..{high}}}, or for characters list them, as in [0123]"
                )

    def _translate(self, part: str, captured: dict[str, str | None]) -> str:
        """Return the regular expression of one part, and add its captures, with their ranges, to ``captured``."""
        if "**" in part:
            raise ConfigurationError(f"pattern {self.text!r}: '**' must be a whole part between dots")
        regex = ""
        for token in _TOKEN.finditer(part):
            if token["name"]:
                regex += self._capture(token, captured)
            elif token["range"]:
                regex += self._integers(token)
            elif token["set"]:
                # fnmatch translates the sets of a shell; the lookahead excludes the dot
                regex += r"(?!\.)" + translate(token["set"]).removeprefix("(?s:")[:-3]
            else:
                regex += {"*": "[^.]*", "?": "[^.]"}.get(token["char"], re.escape(token["char"]))
        return regex

    def _capture(self, token: re.Match[str], captured: dict[str, str | None]) -> str:
        """Return the regular expression of a capture, which at later places matches what it captured first."""
        name, numbers = token["name"], token["range"]
        if bool(token["mirror"]) != (name in self.mirrored):
            raise ConfigurationError(f"pattern {self.text!r} has both {{{name}}} and {{-{name}}}")
        if name in captured:
            if numbers not in (None, captured[name]):
                raise ConfigurationError(f"pattern {self.text!r}: give the range of {{{name}}} at its first occurrence")
            return f"(?P={name})"
        captured[name] = numbers
        return f"(?P<{name}>{self._integers(token) if numbers else '[^.]+'})"

    def _integers(self, token: re.Match[str]) -> str:
        """Return the regular expression of the integers in a range, both ends included."""
        low, high = int(token["low"]), int(token["high"])
        if [token["low"], token["high"]] != [str(low), str(high)]:
            raise ConfigurationError(
                f"pattern {self.text!r}: {token[0]!r} has leading zeros, which ranges do not match: write "
                f"{{{low}..{high}}}, or sets of digits such as 0[0-9]"
            )
        if low > high:
            raise ConfigurationError(
                f"pattern {self.text!r}: {token[0]!r} descends, and ranges ascend: write {{{high}..{low}}}; a mirrored "
                "order is written {-i}"
            )
        blocks = []
        while low <= high:  # 10 ** k numbers from a multiple of 10 ** k on are a prefix and k digits
            k = 0
            while low and low % 10 ** (k + 1) == 0 and low + 10 ** (k + 1) - 1 <= high:
                k += 1
            blocks.append(f"{low // 10**k}" + "[0-9]" * k)
            low += 10**k
        return f"(?:{'|'.join(blocks)})"


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
