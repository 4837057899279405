"""Hashes: which table entry each virtual weight uses."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hashing.mixing import mix
from tying.hashing.structure import RepeatedRows, Structure

SIGN = 0x5349474E  # sets the draws of signs apart from those of slots


class Hash:
    """The base of all hashes; a hash of your own writes :meth:`slot`.

    Identifiers count the virtual weights of a layer, or of a network where its layers share a table, row by row. What
    a hash returns is a function of them and of its arguments alone, in integer arithmetic, hence the same on every
    machine.

    Example:
        >>> class Halves(Hash):
        ...     def slot(self, ids, table_size):
        ...         return ids // 2 % table_size
        >>> Halves().index(count=6, table_size=2).tolist()
        [0, 0, 1, 1, 0, 0]
    """

    takes_vectors: ClassVar[bool] = False  # biases and norms too, and each weight as it is, without a scale

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for known in ("structure", "probabilities"):  # of a parent's slots, not of another
            if "slot" in vars(cls) and known not in vars(cls):
                setattr(cls, known, getattr(Hash, known))

    def __repr__(self) -> str:  # by which checkpoints know the hash
        return f"{type(self).__name__}({', '.join(f'{name}={_told(value)}' for name, value in vars(self).items())})"

    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        """Return the table entry of each identifier; −1 is a weight that is zero.

        Args:
            ids: int64, of any shape.
            table_size: number of entries.
            drawn: what :meth:`draw` returned; a hash that draws nothing need not take it.

        Returns:
            int64, of that shape, in [−1, table_size).
        """
        raise NotImplementedError

    def draw(self, table_size: int) -> Tensor | None:
        """Return what is saved with a model's weights, since it could be drawn differently elsewhere."""
        return None

    def sign(self, ids: Tensor) -> Tensor:
        """Return +1 or −1 for each identifier, independently of its slot."""
        return 1 - 2 * (mix(ids, getattr(self, "seed", 0) + SIGN) & 1)

    def index(self, count: int, table_size: int) -> Tensor:
        """Return the table entries of identifiers 0 to count − 1."""
        self.check(count, table_size)
        drawn = self.draw(table_size)
        return self.slot(torch.arange(count, device="cpu"), table_size, *([] if drawn is None else [drawn]))

    def seeded(self, salt: int) -> Self:
        """Return this hash with other draws; the same one where it draws nothing."""
        return self

    def table_size(self, count: int) -> int | None:
        """Return the size of the table, where the hash leaves no choice."""
        return None

    def check(self, count: int, table_size: int) -> None:
        """Raise a ConfigurationError where the hash does not fit so many weights, or such a table."""
        if table_size < 1:
            raise ConfigurationError(f"a table has at least one entry, not {table_size}")
        fixed = self.table_size(count)
        if fixed not in (None, table_size):
            raise ConfigurationError(f"{self} needs a table of {fixed} entries, not {table_size}")

    def check_layers(self, shapes: Sequence[Sequence[int]], scope: str) -> None:
        """Raise a ConfigurationError where the hash does not fit weights of these shapes, in this order."""

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise a ConfigurationError where the hash is for weights of another shape."""

    def probabilities(self, count: int, table_size: int) -> Tensor | None:
        """Return how probable each entry is in the mean over identifiers, where that is known; float64."""
        return None

    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        """Return a form of a layer's algebra that needs neither index nor weight, where there is one.

        Args:
            shape: of the layer's weight.
            table_size: number of entries.
            first: identifier of the layer's first weight.
        """
        return None


def _told(value: object) -> str:
    """Return what tells a value from others: a tensor is abbreviated by torch."""
    if not isinstance(value, Tensor):
        return repr(value)
    content = value.detach().cpu().contiguous()
    checksum = zlib.crc32(content.view(-1).view(torch.uint8).numpy().tobytes())
    return f"{content.dtype} {tuple(content.shape)} of checksum {checksum:08x}"


@dataclass(frozen=True)
class IdentityHash(Hash):
    """Gives each weight an entry of its own: no sharing."""

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        return RepeatedRows(tuple(shape), table_size, first)

    @override
    def table_size(self, count: int) -> int:
        return count


@dataclass(frozen=True)
class ModulusHash(Hash):
    """Goes through the table again and again: ``i mod n``; the loads differ by one at most.

    A layer whose width and table have a common divisor repeats units: it has only ``n / gcd(in, n)`` of them.

    Example:
        >>> ModulusHash().index(count=5, table_size=3).tolist()
        [0, 1, 2, 0, 1]
    """

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids % table_size

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
        return RepeatedRows(tuple(shape), table_size, first % table_size)

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        whole, rest = divmod(count, table_size)
        loads = torch.full((table_size,), float(whole), dtype=torch.float64, device="cpu")
        loads[:rest] += 1
        return loads / count
