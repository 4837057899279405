"""The parametrization of a hashed weight, which reads its values from a smaller table."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.compiled import compiled_loops
from tying.deprecated import class_aliases
from tying.errors import ConfigurationError, check_choice, check_range
from tying.hashing.fast_paths import Blocks, RepeatedRows
from tying.hashing.gather import (
    CHUNK,
    IndexSource,
    block_source,
    compile_source,
    is_plain_cpu,
    lookup,
    scatter,
)
from tying.hashing.hashes import (
    SIGN,
    BlockHash,
    CodebookHash,
    Hash,
    UniformHash,
    hash32,
    overrides_slot_only,
    splitmix64,
)
from tying.torch_workarounds import FollowsDevice, is_proxy, is_recorded, is_traced
from tying.weights.values import check_real

Index = Literal["auto", "stored", "computed", "structured"]
STORED = 1 << 24  # "auto" stores an index of at most this number of weights
COMPILED = 1 << 20  # a computed index of at least this number of weights is compiled
SCALE_SWEEPS = 100  # alternations between table and scales, at most
LONGEST_NUMBER = 24  # characters of a float, such as -2.2250738585072014e-308
FUSED = ("cuda",)  # devices for which Triton fuses layers
_DENSITY = 0x44454E53  # makes the choice of kept weights independent of their slots


def table_slots(count: int, ratio: float | None, hash: Hash) -> int:
    """Return the size of the table for ``count`` weights: ``ceil(ratio · count)``.

    If ``ratio`` is the float nearest to k / count, the size is k. The default is the ratio that the hash requires, or
    0.1 if it requires none.

    Raises:
        ConfigurationError: the ratio is not in (0, 1], or the hash requires another ratio, or a table that is larger
            than the weights.

    Example:
        >>> from tying.hashing import UniformHash
        >>> table_slots(25, 0.1, UniformHash()), table_slots(6, 5 / 6, UniformHash())
        (3, 5)
    """
    if not isinstance(hash, Hash):
        raise ConfigurationError(f"hash must be one of tying.hashing, such as UniformHash(seed=0), not {hash!r}")
    if not count:
        raise ConfigurationError("an empty weight cannot be hashed")
    required = hash.table_size(count)
    if required is not None and not 1 <= required <= count:
        raise ConfigurationError(
            f"{hash} needs a table of {required:,} slots for {count:,} weights, but a table has at least one slot "
            "and at most one for each weight: change the sizes of the hash or of the layer"
        )
    if ratio is None:
        ratio = 0.1 if required is None else required / count
    check_range("table_ratio", ratio, "(0, 1]")
    exact = Fraction(ratio) * count
    size = round(exact) if round(exact) / count == ratio else math.ceil(exact)
    hash.check(count, size)
    return size


class HashState:
    """The state of a hash, shared by all weights that share a table, so that checkpoints store it once.

    Attributes:
        values: result of :meth:`tying.hashing.Hash.state`.
    """

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        self._successor: Self | None = None

    def loaded(self, values: Tensor) -> Self:
        """Return a state with the given values; all weights that load equal values get the same object."""
        if self._successor is None or not self._successor.equals(values):
            self._successor = type(self)(values.clone())  # the caller may change the checkpoint's tensor
        return self._successor

    def equals(self, values: Tensor) -> bool:
        """Return whether the state has the given values, on the same device."""
        return self.values is not None and self.values.device == values.device and torch.equal(self.values, values)


@class_aliases("tying.hashing.HashedParametrization")
class HashedParametrization(FollowsDevice):
    """The map from a table to a weight, ``w_i = ξ(i) · t[h(i)]``; usable with ``torch.nn.utils.parametrize``.

    Its state dict contains a description of the hash and the hash's state, for example the assignments of a clustering.
    It does not contain an index, which can be recomputed.

    In-place writes to the weight are lost; see :func:`tying.hashing.hash_weights`.

    Args:
        shape: shape of the weight.
        table_size: n, the number of slots.
        hash: h.
        sign: multiply by ξ = ±1.
        density: fraction of weights that are kept; the others are zero. It does not change the table's size.
        salt: integer that makes the choice of kept weights independent of other weights with the same hash.
        index: ``"stored"`` (4 bytes per weight), ``"computed"`` at each read, ``"structured"`` (the hash's fast path,
            without an index), or ``"auto"``.
        first: identifier of the first weight.
        scale: a constant factor on all weights.
        zero_row: index of a row of zeros, for example an embedding's ``padding_idx``.
        state: the ``state`` of another weight that shares the table; by default, the hash computes it.

    Raises:
        ConfigurationError: an argument is out of range, or the hash does not fit, returns slots outside the table, or
            has no fast path.

    Example:
        >>> from tying.hashing import ModulusHash
        >>> HashedParametrization((2, 3), 4, ModulusHash())(torch.arange(4.0))
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
        state: HashState | None = None,
    ) -> None:
        check_choice("index", index, get_args(Index))
        super().__init__()
        if not math.prod(shape):
            raise ConfigurationError("an empty weight cannot be hashed")
        check_range("density", density, "(0, 1]")
        self.shape, self.table_size, self.hash = torch.Size(shape), table_size, hash
        self.sign, self.density, self.salt = sign, density, salt
        self.first, self.scale, self.zero_row = first, scale, zero_row
        hash.check_shape(self.shape)
        hash.check_slots(table_size * (1 + sign) + 1)  # and zero
        self.state = state or HashState(hash.state(table_size))
        fast_path = (
            hash.fast_path(self.shape, table_size, first)
            if self._is_plain and not overrides_slot_only(hash, "fast_path")
            else None
        )
        if index == "structured" and fast_path is None:
            raise ConfigurationError(f"{hash} has no structure here: use index='stored' or 'computed'")
        best: Index = "structured" if fast_path else "stored" if self.shape.numel() <= STORED else "computed"
        self.index = best if index == "auto" else index
        is_fast = self.index == "structured" or (self.index == "computed" and isinstance(fast_path, Blocks))
        self.fast_path = fast_path if is_fast else None
        self.check_slots()
        self._stored: Tensor | None = None
        self._fastest: IndexSource | None = None
        self.move()
        self.register_state_dict_post_hook(HashedParametrization._save_drawn)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(HashedParametrization._load_drawn)  # type: ignore[no-untyped-call]

    @override
    def forward(self, table: Tensor) -> Tensor:
        if is_proxy(table):  # torch.fx traces no Python code that depends on values
            index = self.extended_slots().flatten().to(self.device)
            return self._read(table, self._source_of(len(index), self._extended_slot, index)).view(self.shape)
        if self.fast_path is not None:
            return self.fast_path.weight(self.scaled(table))
        return self._read(table, self._source(table.device)).view(self.shape)

    def rows(self, table: Tensor, chosen: Tensor) -> Tensor:
        """Return some rows of the weight, ``(*chosen, ...)``, without computing the others.

        Args:
            table: (n,).
            chosen: integers in [0, number of rows), of any shape.

        Raises:
            IndexError: a row is out of range, or not an integer.
        """
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise IndexError(f"row indices must be integers, not {chosen.dtype}")
        recorded = is_recorded()  # the values and the number of rows are unknown
        if (
            chosen.device.type == "cpu"  # on a GPU, reading the values would wait for it
            and not (recorded or torch.compiler.is_compiling())
            and chosen.numel()
            and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.shape[0]
        ):
            low, high = int(chosen.min()), int(chosen.max())
            raise IndexError(f"row indices must be in [0, {self.shape[0]}), not from {low} to {high}")
        width = self.shape[1:].numel()
        first = chosen.long()[..., None] * width
        if recorded:
            slots = self._extended_slot(first + torch.arange(width, device=chosen.device))
            source = self._source_of(0, self._extended_slot)
            return source.extended(self.scaled(table))[slots].view(*chosen.shape, *self.shape[1:])
        starts = first.flatten()
        source = self._source_of(
            len(starts) * width, lambda entries: self._extended_slot(starts[entries // width] + entries % width)
        )
        block = self.hash.block if type(self.hash) is BlockHash else 0
        if block and self._is_plain and width % block == self.first % block == 0 and is_plain_cpu(table):
            blocks = first + torch.arange(0, width, block, device="cpu")
            source = block_source(source, self._slot(blocks.flatten()), block)
        return self._read(table, source).view(*chosen.shape, *self.shape[1:])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the table nearest to a weight: each slot is the mean of the weights that read it, or zero."""
        return self.nearest_table([(self, weight)], weight.new_zeros(self.table_size))

    @staticmethod
    def nearest_table(parts: "Sequence[tuple[HashedParametrization, Tensor]]", table: Tensor) -> Tensor:
        """Return the table nearest to weights that share it: ``t_j = Σ s ξ w / Σ s²`` over the weights of slot j.

        Args:
            parts: for each weight, its parametrization, of scale s, and its values.
            table: (n,); slots that no weight reads keep their values.
        """
        shares = [(part.scale, *part.sums(weight)) for part, weight in parts]
        return _least_squares_table(shares, table).to(table.dtype)

    @staticmethod
    def joint_inverse(
        parts: "Sequence[tuple[HashedParametrization, nn.Parameter, Tensor]]",
    ) -> dict[Tensor | nn.Module, Tensor]:
        """Return the table nearest to several weights that share it, and, as extra states, their scales.

        Scales change only if no weight is farther from its given values than with the present scales, as where the
        weights come from a table of the same hash with other scales. Scales that are all 1 stay.

        Args:
            parts: for each weight, its parametrization, the table, and its values.
        """
        steps, (table, *_), weights = zip(*parts, strict=True)
        present = table.detach()
        sums = [step.sums(weight) for step, weight in zip(steps, weights, strict=True)]
        scales: Sequence[float] = [step.scale for step in steps]
        nearest = _least_squares_table([(s, *pair) for s, pair in zip(scales, sums, strict=True)], present)
        if len(steps) > 1 and any(scale != 1 for scale in scales):
            squares = [float(weight.double().square().sum()) for weight in weights]
            scales, nearest = _fit_scales(scales, nearest, sums, squares)
        states = {step: step.state_of(scale) for step, scale in zip(steps, scales, strict=True)}
        return {table: nearest.to(table.dtype), **states}

    def initial(self, weight: Tensor) -> Tensor:
        """Return the table of a module whose reset drew the given weight."""
        return self.drawn_from(weight.detach().flatten() / self.scale)

    def drawn_from(self, pool: Tensor) -> Tensor:
        """Return an initial table: n numbers sampled from a pool; for a recurrent hash, the first n numbers.

        A codebook gets quantiles of the pool: weights with the given assignments then have the pool's distribution.
        """
        if self.hash.include_biases:
            return pool[: self.table_size].clone()
        if isinstance(self.hash, CodebookHash):
            slots = self.slots().flatten()
            uses = torch.bincount(slots[slots >= 0], minlength=self.table_size).double()
            ranks = (uses.cumsum(0) - uses / 2) / uses.sum().clamp(min=1)
            return pool.sort().values[(ranks * (len(pool) - 1)).round().long().to(pool.device)]
        sampled = (
            torch.randperm(len(pool), device="cpu")[: self.table_size]
            if len(pool) >= self.table_size
            else torch.randint(len(pool), (self.table_size,), device="cpu")  # other weights read the table
        )
        return pool[sampled.to(pool.device)]

    def sums(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each slot, the sum of the weights that read it, times their signs, and their number."""
        if weight.shape != self.shape:
            raise ConfigurationError(f"a weight of shape {tuple(weight.shape)} is not one of {tuple(self.shape)}")
        check_real("weight", weight)
        flat, size = weight.detach().flatten().double(), self.table_size  # float32 loses 1e-3 over a million weights
        source = self._source_of(len(flat), self._extended_slot)
        extended_size = source.extended_size(size)
        uses = scatter(torch.ones_like(flat), replace(source, negatives=False, zeros=False), extended_size)
        return scatter(flat, source, size), uses[: size * (1 + self.sign)].view(-1, size).sum(dim=0)

    def fusible_seed(self, table: Tensor) -> int | None:
        """Return the seed for :func:`tying.hashing.kernels.fused_linear`, or None if the layer cannot be fused."""
        if (
            type(self.hash) is not UniformHash
            or self.index != "computed"
            or not self._is_plain
            or is_proxy(table)
            or torch.compiler.is_compiling()  # the compiler fuses the plain operations
            or torch.are_deterministic_algorithms_enabled()  # kernels add gradients in any order
            or table.device.type not in FUSED
            or table.dtype == torch.float64
            or find_spec("triton") is None
        ):
            return None
        return self.hash.seed

    def scaled(self, table: Tensor) -> Tensor:
        """Return the table times the scale."""
        return table if self.scale == 1 else table * self.scale

    @property
    def drawn(self) -> Tensor | None:
        """The state of the hash, as in the state dict."""
        return self.state.values

    def slots(self) -> Tensor:
        """Return the slot of each weight, −1 for zero weights; int64, of the weight's shape."""
        return torch.cat([*map(self._slot, self._positions(torch.device("cpu")))]).view(self.shape)

    def extended_slots(self) -> Tensor:
        """Return indices into ``[table, −table, 0]``; ``−table`` only if signed, 0 only if a weight is zero."""
        return torch.cat([*map(self._extended_slot, self._positions(torch.device("cpu")))]).view(self.shape)

    def loads(self) -> Tensor:
        """Return how many weights read each slot; int64, (table_size,)."""
        counts = torch.zeros(self.table_size, dtype=torch.int64, device="cpu")
        for positions in self._positions(torch.device("cpu")):
            slots = self._slot(positions)
            read = slots[slots >= 0]
            counts.index_add_(0, read, torch.ones_like(read))
        return counts

    def distinct_rows(self) -> int | None:
        """Return the number of distinct rows: if a hash repeats rows, the layer has fewer distinct units.

        It is None if more than ``STORED`` weights would have to be compared.

        Example:
            >>> from tying.hashing import ModulusHash
            >>> HashedParametrization((200, 784), 1000, ModulusHash()).distinct_rows()
            125
        """
        if isinstance(self.fast_path, RepeatedRows):
            return self.fast_path.distinct
        if self.shape.numel() > STORED:
            return None
        rows = self.extended_slots().view(self.shape[0], -1)
        factors = hash32(torch.arange(rows.shape[1], device="cpu"), 0) * 2 + 1  # odd; equal sums mod 2⁶⁴: equal rows
        return len(torch.unique((hash32(rows, 0) * factors).sum(dim=1)))

    def describe(self) -> str:
        """Describe index, table and repeated rows for a report."""
        return (
            f"{self.index} index into a table of {self.table_size:,} by {self.hash}"
            f"{repeated_units(self.distinct_rows(), self.shape)}"
        )

    def check_slots(self) -> None:
        """Check that slots are in the table, and set ``zeros``: whether some weights are zero.

        With a fast path, only the first and the last slot are computed; of more than ``STORED`` weights whose index is
        computed, only the first and the last chunk. The hash then tells whether some weights may be zero.

        Raises:
            ConfigurationError: the hash returns slots outside the table.
        """
        count, sampled = self.shape.numel(), self.index == "computed" and self.shape.numel() > STORED
        if self.fast_path:
            chunks: Iterable[Tensor] = [torch.tensor([0, count - 1], device="cpu")]
        elif sampled:
            chunks = [torch.arange(begin, begin + CHUNK, device="cpu") for begin in (0, count - CHUNK)]
        else:
            chunks = self._positions(torch.device("cpu"))
        extremes = torch.stack([torch.stack(self._slot(positions).aminmax()) for positions in chunks])
        low, high = int(extremes.min()), int(extremes.max())
        if low < -1 or high >= self.table_size or extremes.is_floating_point():
            raise ConfigurationError(
                f"{self.hash}.slot must return integers in [-1, {self.table_size}), not {extremes.dtype} from {low} "
                f"to {high}"
            )
        drops = self.density < 1 or self.zero_row is not None
        may_be_zero = drops or self.hash.has_zeros or overrides_slot_only(self.hash, "has_zeros")
        self.zeros = self.fast_path.zeros if self.fast_path else low < 0 or (sampled and may_be_zero)

    @property
    def _is_plain(self) -> bool:
        """Whether the hash alone determines the weights: no signs, no dropped weights, no row of zeros."""
        return not self.sign and self.density == 1 and self.zero_row is None

    def _source_of(self, count: int, compute: Callable[[Tensor], Tensor], stored: Tensor | None = None) -> IndexSource:
        return IndexSource(count, compute, stored, negatives=self.sign, zeros=bool(self.zeros))

    def _positions(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the positions of all weights, in chunks."""
        for begin in range(0, self.shape.numel(), CHUNK):
            yield torch.arange(begin, min(begin + CHUNK, self.shape.numel()), device=device)

    def _slot(self, positions: Tensor) -> Tensor:
        ids = positions + self.first
        slots = self.hash.slot(ids, self.table_size, *([] if self.drawn is None else [self.drawn]))
        if self.density < 1:
            kept = hash32(ids, getattr(self.hash, "seed", 0) ^ self.salt ^ _DENSITY) < int(self.density * 2**32)
            slots = torch.where(kept, slots, -1)
        if self.zero_row is not None:
            slots = torch.where(positions // self.shape[1:].numel() == self.zero_row, -1, slots)
        return slots

    def _extended_slot(self, positions: Tensor) -> Tensor:
        extended = slots = self._slot(positions)
        if self.sign:
            extended = slots + (self.hash.sign(positions + self.first) < 0) * self.table_size
        return torch.where(slots < 0, self.table_size * (1 + self.sign), extended) if self.zeros else extended

    def _source(self, device: torch.device) -> IndexSource:
        stored = None if self._stored is None else self._stored.to(device)
        source = self._source_of(self.shape.numel(), self._extended_slot, stored)
        if device.type != "cpu" or is_traced():
            return source
        if self._fastest is None:
            self._fastest = self._accelerated(source)
        return self._fastest

    def _accelerated(self, source: IndexSource) -> IndexSource:
        """Return a source that reads faster on the CPU, if there is one."""
        if (loops := compiled_loops("tying.hashing")) is not None:
            if source.stored is not None:
                signed = self.table_size if self.sign and not self.zeros else None
                return replace(source, loops=loops.StoredLoops(self._smallest_index(source.stored), signed))
            hash, is_whole = self.hash, self.density == 1 and self.zero_row is None
            if type(hash) is UniformHash and is_whole and self.first + source.count <= 1 << 32:
                keys = (*splitmix64(hash.seed), *splitmix64(hash.seed + SIGN))
                uniform = loops.UniformLoops(source.count, self.first, self.table_size, keys, self.sign)
                return replace(source, loops=uniform)
        if self.index == "computed" and source.count >= COMPILED:
            return compile_source(source, self.table_size, str(self.hash))
        return source

    def _smallest_index(self, stored: Tensor) -> Tensor:
        """Return the assignments of a codebook, in a smaller type than a stored index, if they are the index."""
        if self.drawn is not None and isinstance(self.hash, CodebookHash) and self._is_plain and not self.zeros:
            return self.drawn[self.first : self.first + len(stored)]
        return stored

    def _read(self, table: Tensor, source: IndexSource) -> Tensor:
        small_table = self.table_size <= source.count  # if so, scaling the table is cheaper than scaling the weights
        scaled = table * self.scale if small_table and self.scale != 1 else table
        weights = lookup(scaled, source)
        return weights if small_table else self.scaled(weights)

    @override
    def move(self) -> None:
        self._fastest = None
        if self.drawn is not None:
            self.state.values = self.drawn.to(self.device)
        if self.index == "stored":
            self._stored = torch.cat([self._extended_slot(part).int() for part in self._positions(self.device)])

    @property
    def _description(self) -> str:
        """The text that checkpoints compare; a change would make older checkpoints unreadable."""
        return (
            f"{self.shape.numel()} weights from {self.first} on, of a table of {self.table_size} by {self.hash}"
            + ", signed" * self.sign
            + f", density {self.density}" * (self.density < 1)
            + f", salt {self.salt}" * (self.density < 1 and self.salt != 0)
            + f", row {self.zero_row} zero" * (self.zero_row is not None)
        )

    @override
    def get_extra_state(self) -> Tensor:
        return self.state_of(self.scale)

    def state_of(self, scale: float) -> Tensor:
        """Return the extra state for a scale; all scales have one size, since distributed checkpoints compare sizes."""
        content = json.dumps({"described": self._description, "scale": scale}).removesuffix("}")
        padding = " " * (LONGEST_NUMBER - len(str(scale)))
        return torch.frombuffer(bytearray(f"{content}{padding}}}".encode()), dtype=torch.uint8)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or state.is_meta:  # it has no values; torch's loaders of shards set a mark
            return
        try:
            content = json.loads(bytes(state.cpu().numpy().tobytes()))
        except ValueError:
            raise ConfigurationError("its description in the checkpoint is truncated or corrupted") from None
        if content["described"] != self._description:
            raise ConfigurationError(
                f"this weight is {self._description}; in the checkpoint it is {content['described']}"
            )
        self.scale = content["scale"]

    def _save_drawn(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Add the hash's state to a state dict. As a buffer, it would be broadcast at every step of DDP."""
        if self.drawn is not None:
            state_dict[f"{prefix}drawn"] = self.drawn

    def _load_drawn(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *_: Any,
    ) -> None:
        """Load the hash's state before torch reads the rest of a state dict."""
        try:
            if f"{prefix}_extra_state" in state_dict:  # check here, so that errors name the weight
                self.set_extra_state(state_dict[f"{prefix}_extra_state"])
            if self.drawn is not None and f"{prefix}drawn" in state_dict:
                self._take(self.drawn, state_dict.pop(f"{prefix}drawn"))  # torch would report the key as unexpected
            elif self.drawn is not None and strict:
                missing_keys.append(f"{prefix}drawn")
        except ConfigurationError as error:
            raise ConfigurationError(f"{prefix.removesuffix('.')!r}: {error}") from None

    def _take(self, current: Tensor, loaded: Tensor) -> None:
        """Replace the hash's state by a checkpoint's state."""
        ours, theirs = (f"{values.dtype} of shape {tuple(values.shape)}" for values in (current, loaded))
        if ours != theirs:
            raise ConfigurationError(f"the state of its hash is {ours}; in the checkpoint it is {theirs}")
        if loaded.is_meta:  # it has no values
            return
        if loaded.data_ptr() == current.data_ptr():  # distributed checkpoints write into our own state dict
            self.check_slots()
            self.move()
        elif not self.state.equals(loaded.to(current.device)):
            previous, self.state = self.state, self.state.loaded(loaded.to(current.device))
            try:
                self.check_slots()
            except ConfigurationError:
                self.state = previous
                raise
            self.move()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle: all attributes except the index, which is recomputed."""
        return {**self.__dict__, "_stored": None, "_fastest": None}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self.move()

    @override
    def extra_repr(self) -> str:
        return f"{self._description}, index={self.index!r}"


Sums = tuple[Tensor, Tensor]  # of HashedParametrization.sums


def _least_squares_table(shares: Sequence[tuple[float, Tensor, Tensor]], table: Tensor) -> Tensor:
    """Return the table nearest to weights, each given by its scale and its sums; see :meth:`nearest_table`."""
    products = torch.stack([scale * sums for scale, sums, _ in shares]).sum(dim=0)
    norms = torch.stack([scale**2 * uses for scale, _, uses in shares]).sum(dim=0)
    return torch.where(norms > 0, products / torch.where(norms > 0, norms, 1), table)


def _fit_scales(
    scales: Sequence[float], table: Tensor, sums: Sequence[Sums], squares: Sequence[float]
) -> tuple[Sequence[float], Tensor]:
    """Return scales and a table that are nearer to weights, or the given ones if a weight would be farther.

    Alternates between the best table and the best scales, from scales in proportion to the weights' root mean squares.

    Args:
        scales: the present scale of each weight.
        table: the nearest table with these scales.
        sums: the sums of each weight.
        squares: the squared norm of each weight.
    """
    precise = [(values.double(), uses.double()) for values, uses in sums]
    counts = [float(uses.sum()) for _, uses in precise]
    level = math.sqrt(sum(n * s**2 for n, s in zip(counts, scales, strict=True)))  # kept: it could be the table's
    fitted, nearest = [math.sqrt(q / max(1, n)) for q, n in zip(squares, counts, strict=True)], table.double()
    for _ in range(SCALE_SWEEPS):
        norm = math.sqrt(sum(n * s**2 for n, s in zip(counts, fitted, strict=True)))
        if not norm > 0 or min(fitted) <= 0:
            return scales, table
        before = fitted = [s * level / norm for s in fitted]
        nearest = _least_squares_table([(s, *pair) for s, pair in zip(fitted, precise, strict=True)], nearest)
        moments = [(float(values @ nearest), float(uses @ nearest.square())) for values, uses in precise]
        fitted = [product / max(norm, 1e-300) for product, norm in moments]
        if max(abs(s / t - 1) for s, t in zip(fitted, before, strict=True)) < 1e-12:
            break
    old, new = (_squared_errors(s, t, precise, squares) for s, t in ((scales, table.double()), (before, nearest)))
    slack = [1e-12 * q for q in squares]  # of rounding
    is_nearer = all(b <= a + e for a, b, e in zip(old, new, slack, strict=True))
    return (before, nearest) if is_nearer else (scales, table)


def _squared_errors(
    scales: Sequence[float], table: Tensor, sums: Sequence[Sums], squares: Sequence[float]
) -> list[float]:
    """Return ``‖w − s t[h]‖²`` of each weight."""
    return [
        square - 2 * scale * float(values @ table) + scale**2 * float(uses @ table.square())
        for scale, (values, uses), square in zip(scales, sums, squares, strict=True)
    ]


def repeated_units(distinct: int | None, shape: Sequence[int]) -> str:
    """Describe how many units of a weight are distinct, for reports; empty if all are, or if that is unknown."""
    return "" if distinct in (None, shape[0]) else f"; only {distinct} of {shape[0]} units are distinct"
