"""Maps between the layouts of two tensors, written as einops patterns.

A relation, for example ``"o i -> i o"``, maps the source's layout to the target's. It only rearranges entries, so it
can be inverted, composed and compared exactly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import cast

import torch
from einops import EinopsError, rearrange
from einops.parsing import ParsedExpression
from torch import Tensor

from tying.errors import ConfigurationError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One einops rearrangement with the size of each of its axes."""

    pattern: str
    axes: tuple[tuple[str, int], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Rearrange ``tensor``."""
        return rearrange(tensor, self.pattern, **dict(self.axes))

    def inverse(self) -> Step:
        """Return the step that undoes this one."""
        return Step(" -> ".join(reversed(self.pattern.split(" -> "))), self.axes)


@dataclass(frozen=True)
class Relation:
    """An invertible rearrangement from the source's layout to the target's; without steps, it is the identity.

    Example:
        >>> relation = bind("o i -> i o", (2, 3), (3, 2))
        >>> relation(torch.zeros(2, 3)).shape
        torch.Size([3, 2])
        >>> relation.then(relation.inverse()) == Relation()
        True
    """

    steps: tuple[Step, ...] = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in the target's layout, as a view if possible, else as a copy."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor

    def inverse(self) -> Relation:
        """Return the map from the target's layout back to the source's."""
        return Relation(tuple(step.inverse() for step in reversed(self.steps)))

    @property
    def permutes(self) -> bool:
        """Whether the map only permutes axes, and splits or joins none; it is then a view."""
        sides = [step.pattern.split(" -> ") for step in self.steps]
        return all("(" not in left + right and {*left.split()} == {*right.split()} for left, right in sides)

    def then(self, following: Relation) -> Relation:
        """Return the composition that applies this map first and ``following`` second."""
        if not (self.steps and following.steps):
            return self if self.steps else following
        if self.steps[-1] == following.steps[0].inverse():
            return Relation(self.steps[:-1]).then(Relation(following.steps[1:]))
        return Relation(self.steps + following.steps)

    def agrees_with(self, other: Relation, shape: Shape) -> bool:
        """Return whether both maps move each entry of a tensor of ``shape`` to the same position."""
        if self == other:
            return True
        positions = torch.arange(math.prod(shape), device="cpu").reshape(shape)
        return torch.equal(self(positions), other(positions))

    def __str__(self) -> str:
        return " | ".join(step.pattern for step in self.steps)


def check(pattern: str, context: str = "") -> None:
    """Raise an error, which begins with ``context``, unless ``pattern`` is an einops pattern that can be inverted.

    Raises:
        ConfigurationError: the pattern does not parse, or an axis does not occur once on each side.

    Example:
        >>> check("o i -> o")
        Traceback (most recent call last):
        tying.errors.ConfigurationError: relation 'o i -> o' cannot be inverted: axes i are on one side only...
    """
    try:
        left, right = map(ParsedExpression, pattern.split("->"))
    except ValueError:  # another number of sides
        raise ConfigurationError(
            f"{context}relation {pattern!r} must have the form 'source axes -> target axes'"
        ) from None
    except EinopsError as error:
        raise ConfigurationError(f"{context}relation {pattern!r} is not an einops pattern: {error}") from None
    if left.has_non_unitary_anonymous_axes or right.has_non_unitary_anonymous_axes:
        raise ConfigurationError(
            f"{context}relation {pattern!r} cannot be inverted: a number other than 1 repeats entries; name the axis"
        )
    if reserved := {str(axis) for axis in left.identifiers if re.fullmatch(r"tensor|pattern|ellipsis\d+", str(axis))}:
        raise ConfigurationError(f"{context}relation {pattern!r}: axis {reserved.pop()!r} needs another name")
    if one_sided := left.identifiers ^ right.identifiers:
        raise ConfigurationError(
            f"{context}relation {pattern!r} cannot be inverted: axes "
            f"{', '.join(sorted(one_sided)).replace('…', '...')} are on one side only; every axis must occur once "
            "on each side"
        )


def bind(pattern: str | None, source: Shape, target: Shape) -> Relation:
    """Return the relation that ``pattern`` describes between tensors of two given shapes.

    Args:
        pattern: an einops pattern from the source's layout to the target's; ``None`` for equal layouts.
        source: shape of the source.
        target: shape of the target.

    Raises:
        ConfigurationError: the pattern is not invertible, or does not map one shape to the other.

    Example:
        >>> str(bind("o (h w) -> (o h) w", (4, 6), (8, 3)))
        'o (h w) -> (o h) w'
        >>> bind("o i -> i o", (4, 6), (6, 5))
        Traceback (most recent call last):
        tying.errors.ConfigurationError: relation 'o i -> i o' does not map shape (4, 6) to shape (6, 5)
    """
    if pattern is None:
        if source != target:
            raise ConfigurationError(f"shapes {source} and {target} differ and no relation is given")
        return Relation()
    check(pattern)
    others = sum(dimension != "…" for dimension in ParsedExpression(pattern.split("->")[0]).composition)
    ellipsis = " ".join(f"ellipsis{k}" for k in range(len(source) - others))  # its axes, by name
    left, right = (" ".join(side.split()) for side in pattern.replace("...", f" {ellipsis} ").split("->"))
    axes = [cast(list[list[str]], ParsedExpression(side).composition) for side in (left, right)]
    if (counts := [*map(len, axes)]) != [len(source), len(target)]:
        numbers = "- and ".join(map(str, dict.fromkeys(counts)))
        raise ConfigurationError(
            f"relation {pattern!r} is for {numbers}-dimensional weights, and these have the shapes {source} and "
            f"{target}"
        )
    if (sizes := _solve_axes([*zip(axes[0] + axes[1], source + target, strict=True)])) is None:
        raise ConfigurationError(f"relation {pattern!r} does not map shape {source} to shape {target}")
    return Relation() if left == right else Relation((Step(f"{left} -> {right}", tuple(sorted(sizes.items()))),))


def transposing(source: Shape, target: Shape) -> str | None:
    """Return the relation that swaps the first two axes, if it maps one shape to the other.

    Example:
        >>> transposing((4, 6), (6, 4)), transposing((4, 6, 3, 3), (6, 4, 3, 3)), transposing((4, 6), (4, 6))
        ('o i -> i o', 'o i h w -> i o h w', None)
    """
    if (*source[1::-1], *source[2:]) != target or not 2 <= len(source) <= 5:
        return None
    further = "".join(f" {name}" for name in "hwd"[: len(source) - 2])
    return f"o i{further} -> i o{further}"


def _solve_axes(dimensions: list[tuple[list[str], int]]) -> dict[str, int] | None:
    """Return the size of each axis, given the size of each product of axes; ``None`` without a unique solution."""
    sizes: dict[str, int] = {}
    for _ in dimensions:  # each pass solves at least one dimension, until none can be solved
        for axes, size in dimensions:
            unknown = [axis for axis in axes if axis not in sizes]
            known = math.prod(sizes[axis] for axis in axes if axis in sizes)
            if len(unknown) == 1 and known and size % known == 0:
                sizes[unknown[0]] = size // known
    solved = all(math.prod(sizes.get(axis, -1) for axis in axes) == size for axes, size in dimensions)
    return sizes if solved and sizes.keys() >= {axis for axes, _ in dimensions for axis in axes} else None
