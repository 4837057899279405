"""Which entry of a table each weight is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError
from tying.hashing.hashes import Hash
from tying.hashing.lookup import CHUNK
from tying.hashing.mixing import mix

_DENSITY = 0x44454E53  # sets the draws of kept connections apart from those of slots


def table_entries(count: int, ratio: float | None, hash: Hash) -> int:
    """Return how many entries a table has for ``count`` weights: ``ceil(ratio · count)``.

    A float that is the nearest to k / count means k. Without a ratio it is what the hash fixes, or a tenth.

    Raises:
        ConfigurationError: the ratio is not in (0, 1], or not what the hash fixes.

    Example:
        >>> from tying.hashing import UniformHash
        >>> table_entries(25, 0.1, UniformHash()), table_entries(6, 5 / 6, UniformHash())
        (3, 5)
    """
    if not isinstance(hash, Hash):
        raise ConfigurationError(f"hash must be one of tying.hashing, such as UniformHash(seed=0), not {hash!r}")
    if not count:
        raise ConfigurationError("a weight of no entries cannot be hashed")
    fixed = hash.table_size(count)
    if ratio is None:
        ratio = 0.1 if fixed is None else fixed / count
    if not 0 < ratio <= 1:
        raise ConfigurationError(f"table_ratio is in (0, 1], not {ratio}")
    exact = Fraction(ratio) * count
    size = round(exact) if round(exact) / count == ratio else math.ceil(exact)
    if fixed not in (None, size):
        raise ConfigurationError(f"{hash} needs a table of {fixed} entries, table_ratio={fixed}/{count}, not {ratio}")
    hash.check(count, size)
    return size


class Drawn:
    """What a hash has drawn for a table, for all weights that share it: in memory, and in checkpoints, once.

    Attributes:
        values: ``None`` where it draws nothing.
    """

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        self._loaded: Drawn | None = None

    def loaded(self, values: Tensor) -> Drawn:
        """Return that of weights which have loaded these values: the same one for all of them."""
        if self._is(values):
            return self
        if self._loaded is None or not self._loaded._is(values):
            self._loaded = Drawn(values.clone())  # what it came in may be changed
        return self._loaded

    def _is(self, values: Tensor) -> bool:
        return self.values is not None and self.values.device == values.device and torch.equal(self.values, values)


class Entries(nn.Module):
    """Which entry of a table each weight is, ``h(i)`` with its sign, for a weight of some shape.

    Args:
        shape: of the weight.
        table_size: n, the number of entries.
        hash: h.
        sign: some weights are entries negated.
        density: fraction of weights that are kept; the others are zero.
        salt: sets the draws of kept weights apart from those of other weights with the same hash.
        first: identifier of the first weight.
        zero_row: a row that is zero: an embedding's padding.
        common: what the hash has drawn for another weight of the table.

    Raises:
        ConfigurationError: the density is out of range, or the hash does not fit.
    """

    def __init__(
        self,
        shape: Sequence[int],
        table_size: int,
        hash: Hash,
        *,
        sign: bool,
        density: float,
        salt: int,
        first: int,
        zero_row: int | None,
        common: Drawn | None,
    ) -> None:
        super().__init__()
        if not math.prod(shape):
            raise ConfigurationError("a weight of no entries cannot be hashed")
        if not 0 < density <= 1:
            raise ConfigurationError(f"density is in (0, 1], not {density}")
        self.shape, self.table_size, self.hash = torch.Size(shape), table_size, hash
        self.sign, self.density, self.salt = sign, density, salt
        self.first, self.zero_row = first, zero_row
        hash.check_shape(self.shape)
        self.common = common or Drawn(hash.draw(table_size))
        self.zeros = False  # whether some weights are

    @property
    def drawn(self) -> Tensor | None:
        """What the hash has drawn."""
        return self.common.values

    def entries(self) -> Tensor:
        """Return the table entry of each weight, −1 where it is zero; int64, of the weight's shape."""
        return torch.cat([self._slot(ids) for ids in self._ids(torch.device("cpu"))]).view(self.shape)

    def extended_entries(self) -> Tensor:
        """Return the same, with entries that are negated beyond the others and those that are zero last."""
        return torch.cat([self._entries(ids) for ids in self._ids(torch.device("cpu"))]).view(self.shape)

    @property
    def _described(self) -> str:
        count = self.shape.numel()
        told = f"{count} weights from {self.first} on, of a table of {self.table_size} by {self.hash}"
        told += ", signed" * self.sign + f", density {self.density}" * (self.density < 1)
        told += f", salt {self.salt}" * (self.density < 1 and self.salt != 0)
        return told + f", row {self.zero_row} zero" * (self.zero_row is not None)

    @property
    def _as_they_are(self) -> bool:
        """Whether weights are the entries that the hash says: none is negated, or zero for another reason."""
        return not self.sign and self.density == 1 and self.zero_row is None

    @property
    def _size(self) -> int:
        """Of the extended table: its entries, where signs are drawn their negatives, and where there are any a zero."""
        return self.table_size * (1 + self.sign) + self.zeros

    def _slot(self, ids: Tensor) -> Tensor:
        slot = self.hash.slot(ids, self.table_size, *([] if self.drawn is None else [self.drawn]))
        if self.density < 1:
            kept = mix(ids, getattr(self.hash, "seed", 0) ^ self.salt ^ _DENSITY) < int(self.density * 2**32)
            slot = torch.where(kept, slot, -1)
        if self.zero_row is not None:
            slot = torch.where((ids - self.first) // self.shape[1:].numel() == self.zero_row, -1, slot)
        return slot

    def _entries(self, ids: Tensor) -> Tensor:
        """Return where weights of these identifiers are in the extended table."""
        entries = slot = self._slot(ids)
        if self.sign:
            entries = slot + (self.hash.sign(ids) < 0) * self.table_size
        return torch.where(slot < 0, self._size - 1, entries) if self.zeros else entries

    def _numbered(self, numbers: Tensor) -> Tensor:
        return self._entries(numbers + self.first)

    def _ids(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the identifiers of all weights, in chunks."""
        end = self.first + self.shape.numel()
        for begin in range(self.first, end, CHUNK):
            yield torch.arange(begin, min(begin + CHUNK, end), device=device)

    def check_slots(self, whole: bool = True) -> None:
        """See whether some weights are zero: of all, or of the first and the last.

        Raises:
            ConfigurationError: the hash leaves the table.
        """
        zeros = False
        ends = (self.first, self.first + self.shape.numel() - 1)
        for ids in self._ids(torch.device("cpu")) if whole else map(torch.tensor, ends):
            slot = self._slot(ids)
            low, high = map(int, slot.aminmax())
            if low < -1 or high >= self.table_size or slot.is_floating_point():
                raise ConfigurationError(
                    f"{self.hash}.slot returned {slot.dtype} from {low} to {high}: integers in [-1, {self.table_size}) "
                    "are needed"
                )
            zeros |= low < 0
        self.zeros = zeros
