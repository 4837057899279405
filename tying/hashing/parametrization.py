"""A weight whose entries are those of a smaller table."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from types import FunctionType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from tying.errors import ConfigurationError, nearest
from tying.hashing.gather import CHUNK, IndexSource, gather, lookup, scatter
from tying.hashing.hashes import Hash, UniformHash
from tying.hashing.integers import hash32


def compiled(slots: IndexSource, size: int, name: str) -> IndexSource:
    """Return slots that compiled code computes, on the CPU; where torch cannot compile them, slots as they are.

    Args:
        slots: that are computed.
        size: of the table.
        name: of the hash, for the warning.

    Warns:
        UserWarning: torch cannot: this machine has no compiler, or the hash has what torch does not know.
    """

    def runs(starts: Tensor) -> Tensor:
        return slots.compute(starts + torch.arange(CHUNK, device="cpu"))

    def read(table: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # where compilation is off after all: by chunks, not a whole index
            return gather(table, slots)
        return table[slots.compute(torch.arange(slots.count, device="cpu"))]

    quickly, read_all = _compiled(runs), _compiled(read)
    try:
        # unlike `fullgraph=True`, this does not trace what a hash does in Python for each number
        with torch._dynamo.error_on_graph_break(True):
            quickly(torch.tensor([[0], [CHUNK]], device="cpu"))
            read_all(torch.zeros(size, device="cpu"))
    except Exception as error:
        warnings.warn(f"{name} is computed without compilation, hence slowly: {error}", stacklevel=2)
        return slots
    return replace(slots, quickly=quickly, read=read_all)


def traced() -> bool:
    """Tell whether operations are recorded, or done on tensors without numbers, which compiled code cannot be."""
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or is_in_torch_dispatch_mode()  # type: ignore[attr-defined, no-untyped-call]


def _compiled(function: Any) -> Any:
    """Compile a function with code of its own, lest torch count it among the variants of another hash's."""
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return torch.compile(own)


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


class HashState:
    """What a hash has drawn for a table, for all weights that share it: in memory, and in checkpoints, once.

    Attributes:
        values: ``None`` where it draws nothing.
    """

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        self._loaded: HashState | None = None

    def loaded(self, values: Tensor) -> HashState:
        """Return that of weights which have loaded these values: the same one for all of them."""
        if self._is(values):
            return self
        if self._loaded is None or not self._loaded._is(values):
            self._loaded = HashState(values.clone())  # what it came in may be changed
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
        common: HashState | None,
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
        self.common = common or HashState(hash.draw(table_size))
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
            kept = hash32(ids, getattr(self.hash, "seed", 0) ^ self.salt ^ _DENSITY) < int(self.density * 2**32)
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


Index = Literal["auto", "stored", "computed", "structured"]
INDEXES = ("auto", "stored", "computed", "structured")
KEPT = 1 << 24  # weights up to which "auto" keeps an index
FUSED = ("cuda",)  # devices for which Triton fuses layers
COMPILED = 1 << 20  # weights from which on computing entries is worth compiling


class VirtualWeight(Entries):
    """The map from a table to a weight, ``w_i = ξ(i) · t[h(i)]``; also a parametrization.

    Its state is the hash's description, and what the hash has drawn: a clustering's assignments, say. An index that can
    be computed is never saved.

    Args:
        shape: of the weight.
        table_size: n, the number of entries.
        hash: h.
        sign: multiply by ξ = ±1.
        density: fraction of weights that are kept; the others are zero. The table has the same size.
        salt: sets the draws of kept weights apart from those of other weights with the same hash.
        index: keep it (4 bytes a weight), compute it anew each time, or do without by the hash's structure.
        first: identifier of the first weight.
        scale: a constant factor on all weights.
        zero_row: a row that is zero: an embedding's padding.
        common: what the hash has drawn for another weight of the table, ``virtual.common``.

    Raises:
        ConfigurationError: an argument is out of range, the hash does not fit or leaves the table, or has no
            structure.

    Example:
        >>> from tying.hashing import ModulusHash
        >>> VirtualWeight((2, 3), 4, ModulusHash())(torch.arange(4.0))
        tensor([[0., 1., 2.],
                [3., 0., 1.]])
    """

    def __init__(
        self,
        shape: Sequence[int],
        table_size: int,
        hash: Hash,
        *,
        sign: bool = False,
        density: float = 1.0,
        salt: int = 0,
        index: Index = "auto",
        first: int = 0,
        scale: float = 1.0,
        zero_row: int | None = None,
        common: HashState | None = None,
    ) -> None:
        if index not in INDEXES:
            raise ConfigurationError(f"index is one of {', '.join(INDEXES)}, not {index!r}.{nearest(index, INDEXES)}")
        options: dict[str, Any] = {"sign": sign, "density": density, "salt": salt, "first": first, "zero_row": zero_row}
        super().__init__(shape, table_size, hash, **options, common=common)
        self.scale = scale
        structure = hash.structure(self.shape, table_size, first) if self._as_they_are else None
        if index == "structured" and structure is None:
            raise ConfigurationError(f"{hash} has no structure here: use index='stored' or 'computed'")
        self.structure = structure if index in ("auto", "structured") else None
        if index == "auto":
            index = "structured" if self.structure else "stored" if self.shape.numel() <= KEPT else "computed"
        self.index = index
        self.check_slots(whole=self.structure is None)
        if self.structure is not None:
            self.zeros = self.structure.zeros
        self._kept: Tensor | None = None
        self._keep(torch.device("cpu"))
        self._compiled: IndexSource | None = None
        self._may_compile = index == "computed" and self.shape.numel() >= COMPILED

    @override
    def forward(self, table: Tensor) -> Tensor:
        if self.structure is not None:
            return self.structure.weight(self.scaled(table))
        return self._read(table, self._slots(table.device)).view(self.shape)

    def rows(self, table: Tensor, chosen: Tensor) -> Tensor:
        """Return the chosen rows of the weight, (*chosen, ...), without the others.

        Args:
            table: (n,).
            chosen: integers in [0, rows), of any shape.

        Raises:
            IndexError: one is not, or they are no integers.
        """
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise IndexError(f"rows are chosen by integers, not by {chosen.dtype}")
        if chosen.device.type == "cpu" and chosen.numel() and not torch.compiler.is_compiling():
            least, largest = map(int, chosen.aminmax())
            if least < 0 or largest >= self.shape[0]:
                raise IndexError(f"rows {least} to {largest} of a weight of {self.shape[0]} rows")
        width = self.shape[1:].numel()
        ids = (chosen.reshape(-1, 1).long() * width + torch.arange(width, device=chosen.device)).flatten()
        slots = IndexSource(len(ids), lambda numbers: self._entries(ids[numbers] + self.first))
        return self._read(table, slots).view(*chosen.shape, *self.shape[1:])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the table nearest to a weight: each entry is the mean over its uses; zero where it has none."""
        return self.joint_inverse([(self, weight)], weight.new_zeros(self.table_size))

    @staticmethod
    def joint_inverse(parts: Sequence[tuple[VirtualWeight, Tensor]], table: Tensor) -> Tensor:
        """Return the table nearest to several weights that share it; entries without a use stay as they are."""
        pairs = [virtual.sums(weight) for virtual, weight in parts]
        sums, uses = (torch.stack(column).sum(dim=0) for column in zip(*pairs, strict=True))
        return torch.where(uses > 0, sums / uses.clamp(min=1), table).to(table.dtype)

    def drawn_from(self, pool: Tensor) -> Tensor:
        """Return a table whose entries are drawn from numbers, or for a hash that takes vectors are these."""
        if self.hash.include_biases:
            return pool[: self.table_size]
        if len(pool) < self.table_size:  # one of several weights that share it
            drawn = torch.randint(len(pool), (self.table_size,), device="cpu")
        else:
            drawn = torch.randperm(len(pool), device="cpu")[: self.table_size]
        return pool[drawn.to(pool.device)]

    def sums(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each entry of the table the sum of a weight's entries, signs and scale undone, and its uses."""
        if weight.shape != self.shape:
            raise ConfigurationError(f"a weight of shape {tuple(weight.shape)} is not one of {tuple(self.shape)}")
        flat, size = weight.detach().flatten() / self.scale, self.table_size
        sums, uses = (scatter(values, self._computing(), self._size) for values in (flat, torch.ones_like(flat)))
        if not self.sign:
            return sums[:size], uses[:size]
        return sums[:size] - sums[size : 2 * size], uses[:size] + uses[size : 2 * size]

    def fusible_seed(self, table: Tensor) -> int | None:
        """Return the seed for :func:`tying.hashing.kernels.fused_linear`, where the layer of a table may be fused."""
        if self.index != "computed" or table.device.type not in FUSED or table.dtype == torch.float64:
            return None
        if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
            return None  # the compiler fuses by itself; kernels add up in any order
        if type(self.hash) is not UniformHash or not self._as_they_are or find_spec("triton") is None:
            return None
        return self.hash.seed

    @override
    def get_extra_state(self) -> Tensor:
        told = json.dumps({"described": self._described, "scale": self.scale}).encode()
        return torch.frombuffer(bytearray(told), dtype=torch.uint8)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        if state.is_meta:  # and has no values
            return
        try:
            told = json.loads(bytes(state.cpu().numpy().tobytes()))
        except ValueError:
            raise ConfigurationError("its description in the checkpoint is truncated or corrupted") from None
        if told["described"] != self._described:
            raise ConfigurationError(f"this weight is {self._described}; in the checkpoint it is {told['described']}")
        self.scale = told["scale"]

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.drawn is not None:  # no buffer, which processes would send to each other at every step
            destination[f"{prefix}drawn"] = self.drawn

    @override
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}drawn"
        reported = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        try:
            super()._load_from_state_dict(state_dict, prefix, *reported)
            if self.drawn is None:
                return
            if key in state_dict:
                self._take(state_dict[key])
            elif strict:
                missing_keys.append(key)
        except ConfigurationError as error:
            raise ConfigurationError(f"{prefix.removesuffix('.')!r}: {error}") from None
        unexpected_keys[:] = [one for one in unexpected_keys if one != key]

    def _take(self, drawn: Tensor) -> None:
        """Take what the hash has drawn elsewhere."""
        assert self.drawn is not None
        if (drawn.shape, drawn.dtype) != (self.drawn.shape, self.drawn.dtype):
            told = [f"{one.dtype} of shape {tuple(one.shape)}" for one in (self.drawn, drawn)]
            raise ConfigurationError(f"what its hash draws is {told[0]}; in the checkpoint it is {told[1]}")
        common = self.common
        if drawn.is_meta or (loaded := common.loaded(drawn.to(self.drawn.device))) is common:
            return
        self.common = loaded
        try:
            self.check_slots()
        except ConfigurationError:
            self.common = common
            raise
        if self._kept is not None:
            self._keep(self._kept.device)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        held = self.drawn if self._kept is None else self._kept
        device = fn(torch.empty(0, device="cpu" if held is None else held.device)).device
        if device.type != "meta":  # there it has no values
            if self.drawn is not None:
                self.common.values = self.drawn.to(device)
            self._keep(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled: the index is computed anew."""
        kept = None if self._kept is None else self._kept.device
        compiles = self._may_compile or self._compiled is not None
        return {**self.__dict__, "_kept": kept, "_compiled": None, "_may_compile": compiles}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_kept": None})  # type: ignore[no-untyped-call]  # torch's
        if state["_kept"] is not None:
            self._keep(state["_kept"])

    @override
    def extra_repr(self) -> str:
        return f"{self._described}, index={self.index!r}"

    def scaled(self, table: Tensor) -> Tensor:
        """Return a table times the scale."""
        return table if self.scale == 1 else table * self.scale

    def _read(self, table: Tensor, slots: IndexSource) -> Tensor:
        few = self.table_size <= slots.count  # scale the fewer numbers
        scaled = self.scaled(table) if few else table
        parts = [scaled, *[-scaled] * self.sign, *[scaled.new_zeros(1)] * self.zeros]
        weight = lookup(torch.cat(parts) if len(parts) > 1 else scaled, slots)
        return weight if few else self.scaled(weight)

    def _computing(self) -> IndexSource:
        return IndexSource(self.shape.numel(), self._numbered)

    def _slots(self, device: torch.device) -> IndexSource:
        if self.index == "computed":
            if device.type != "cpu" or traced():
                return self._computing()
            if self._may_compile:
                self._compiled, self._may_compile = compiled(self._computing(), self._size, str(self.hash)), False
            return self._compiled or self._computing()
        if self._kept is None or self._kept.device != device:
            self._keep(device)
        return IndexSource(self.shape.numel(), self._numbered, self._kept)

    def _keep(self, device: torch.device) -> None:
        if self.index == "stored":
            self._kept = torch.cat([self._entries(ids).int() for ids in self._ids(device)])
