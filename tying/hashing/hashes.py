"""Hashes, which map each weight to a slot of a table, with the same results on every machine, device and release."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.deprecated import class_aliases
from tying.errors import ConfigurationError, check_count, check_counts, check_range, listed
from tying.hashing.fast_paths import Blocks, Convolution, FastPath, RepeatedRows, Size, pair

_LOW = 0xFFFFFFFF  # the low 32 bits
_PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5 = 2246822519, 3266489917, 668265263, 374761393  # of xxh32
LARGEST_TABLE = (1 << 31) - 1  # hashes draw slots from 32 random bits, and a stored index has 32 bits
SIGN = 0x5349474E  # makes signs independent of slots
_DIRICHLET = 0x4449524943484C45  # makes the probabilities of a Dirichlet hash independent of its slots


@class_aliases("tying.hashing.Hash")
class Hash:
    """Base class of all hashes. A subclass implements :meth:`slot`; all other methods are optional.

    Each weight of a layer has an identifier: its position in the flattened weight. Layers that share one table number
    their weights consecutively. A hash uses integer arithmetic on identifiers and on its arguments only, so that it
    returns the same slots on every machine.

    Example:
        >>> class Halves(Hash):
        ...     def slot(self, ids, table_size):
        ...         return ids // 2 % table_size
        >>> Halves().index(count=6, table_size=2).tolist()
        [0, 0, 1, 1, 0, 0]
    """

    include_biases: ClassVar[bool] = False  # hash biases and norms too, and never scale weights
    has_zeros: ClassVar[bool] = True  # whether a slot may be −1; a class that overrides slot says it anew

    def __repr__(self) -> str:  # checkpoints compare hashes by it
        arguments = ", ".join(f"{name}={_represent(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        """Return the table slot of each weight; −1 makes the weight zero.

        Args:
            ids: identifiers of the weights, int64, of any shape.
            table_size: number of slots.
            drawn: result of :meth:`state`; passed only if that is not None.

        Returns:
            int64, of the shape of ``ids``, in [−1, table_size).
        """
        raise NotImplementedError

    def state(self, table_size: int) -> Tensor | None:
        """Return a tensor to save in checkpoints because other machines might compute other values, or None."""
        return None

    def sign(self, ids: Tensor) -> Tensor:
        """Return +1 or −1 for each identifier, independently of its slot."""
        return 1 - 2 * (hash32(ids, getattr(self, "seed", 0) + SIGN) & 1)

    def index(self, count: int, table_size: int) -> Tensor:
        """Return the slots of the weights with identifiers 0 to count − 1."""
        self.check(count, table_size)
        state = self.state(table_size)
        return self.slot(torch.arange(count, device="cpu"), table_size, *([] if state is None else [state]))

    def with_salt(self, salt: int) -> Self:
        """Return this hash with another seed; a hash without a seed returns itself."""
        return self

    def table_size(self, count: int) -> int | None:
        """Return the size of the table for ``count`` weights if the hash determines it, else None."""
        return None

    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        """Raise a ConfigurationError if the hash does not fit the weights or the table.

        It is called several times; arguments that are not yet known are None.

        Args:
            shapes: shapes of the weights; if ``table_size`` is given, ``[(count,)]`` for the number of weights that
                share the table.
            table_size: number of slots.
            scope: ``"layer"`` or ``"network"``, as in :func:`tying.hashing.hash_weights`.
        """
        if table_size is not None:
            check_count("table_size", table_size, "[1, inf)")
            self.check_slots(table_size)
            count = sum(map(math.prod, shapes))
            if (required := self.table_size(count)) not in (None, table_size):
                raise ConfigurationError(
                    f"{self} needs a table of {required} slots, table_ratio={required}/{count}, not {table_size}"
                )

    def check_slots(self, slots: int) -> None:
        """Raise a ConfigurationError if a 32-bit index cannot address the slots of a table."""
        if slots > LARGEST_TABLE:
            raise ConfigurationError(
                f"{self}: the index must address {slots:,} values (the table's slots, their negatives if signed, "
                f"and zero), but its 32 bits address only {LARGEST_TABLE:,}: lower table_ratio, or use several tables"
            )

    def check(self, count: int, table_size: int) -> None:
        """Raise a ConfigurationError if the hash does not fit this number of weights or slots."""
        self.validate([(count,)], table_size)

    def check_layers(self, shapes: Sequence[Sequence[int]], scope: str) -> None:
        """Raise a ConfigurationError if the hash does not fit the weights to hash, given in the model's order."""
        self.validate(shapes, scope=scope)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise a ConfigurationError if the hash does not fit a weight of this shape."""
        self.validate([shape])

    def probabilities(self, count: int, table_size: int) -> Tensor | None:
        """Return the probability of each slot, averaged over ``count`` weights; float64, or None if unknown."""
        return None

    def fast_path(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        """Return a way to compute a layer without an index, or None.

        Args:
            shape: shape of the layer's weight.
            table_size: number of slots.
            first: identifier of the layer's first weight.
        """
        return None


def overrides_slot_only(hash: Hash, method: str) -> bool:
    """Return whether a class overrides ``slot`` but inherits ``method``, which describes the slots of its parent."""
    return method not in vars(next(cls for cls in type(hash).__mro__ if {"slot", method} & vars(cls).keys()))


def _none_if_slot_overridden(
    probabilities: Callable[[Any, int, int], Tensor],
) -> Callable[[Any, int, int], Tensor | None]:
    """Make ``probabilities`` return None in subclasses that override ``slot`` only."""

    @wraps(probabilities)
    def known(self: Hash, count: int, table_size: int) -> Tensor | None:
        return None if overrides_slot_only(self, "probabilities") else probabilities(self, count, table_size)

    return known


def _represent(value: object) -> str:
    """Return a string that is equal for equal values. Tensors get a checksum, since torch abbreviates long ones."""
    if not isinstance(value, Tensor):
        return repr(value)
    checksum = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{value.dtype} {tuple(value.shape)} of checksum {checksum:08x}"


class SeededHash(Hash):
    """Base class of hashes with a seed: frozen dataclasses with a field ``seed``.

    Attributes:
        seed: any integer; hashes with equal seeds return equal slots.
    """

    seed: int

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        if not isinstance(self.seed, int):
            raise ConfigurationError(f"seed must be an integer, not {self.seed!r}")

    @override
    def with_salt(self, salt: int) -> Self:
        return replace(self, seed=self.seed ^ salt)  # type: ignore[type-var]  # subclasses are dataclasses


@dataclass(frozen=True)
class IdentityHash(Hash):
    """Give each weight its own slot: no sharing."""

    has_zeros = False

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids

    @override
    def fast_path(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return RepeatedRows(tuple(shape), table_size, first)

    @override
    def table_size(self, count: int) -> int:
        return count


@dataclass(frozen=True)
class ModulusHash(Hash):
    """Cycle through the table: ``i mod n``; the loads of two slots differ by at most one.

    A layer with k inputs has at most ``n / gcd(k, n)`` distinct units, so choose a table size n that is coprime to k.

    Example:
        >>> ModulusHash().index(count=5, table_size=3).tolist()
        [0, 1, 2, 0, 1]
    """

    has_zeros = False

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return ids % table_size

    @override
    def fast_path(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return RepeatedRows(tuple(shape), table_size, first % table_size)

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return _cycle_probabilities(count, table_size)


def _cycle_probabilities(count: int, table_size: int) -> Tensor:
    """Return the probabilities of slots that ``count`` weights read in turn."""
    return (count // table_size + (torch.arange(table_size, device="cpu") < count % table_size)).double() / count


@dataclass(frozen=True)
class UniformHash(SeededHash):
    """Draw each slot independently and uniformly.

    Args:
        seed: any integer; hashes with equal seeds return equal slots.

    Example:
        >>> UniformHash(seed=0).index(count=6, table_size=4).tolist()
        [2, 1, 0, 1, 0, 0]
    """

    has_zeros = False
    seed: int = 0

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return reduce_range(hash32(ids, self.seed), table_size)

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return _equal_probabilities(table_size)


def _equal_probabilities(table_size: int) -> Tensor:
    return torch.full((table_size,), 1 / table_size, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class DirichletHash(SeededHash):
    """Draw each slot independently with probabilities p, which are drawn once: ``p ~ Dir(α, …, α)``.

    Args:
        alpha: α > 0; if it is small, most weights share a few slots; if it is large, loads are about equal.
        seed: any integer; hashes with equal seeds return equal slots.

    Raises:
        ConfigurationError: α is not positive, or not finite.

    Example:
        >>> DirichletHash(alpha=0.1, seed=1).index(count=8, table_size=4).unique().tolist()
        [1]
    """

    has_zeros = False
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, "(0, inf)")
        object.__setattr__(self, "alpha", float(self.alpha))  # so that 1 and 1.0 have the same repr

    @override
    def state(self, table_size: int) -> Tensor:
        """Return the first 32-bit integer of each slot's interval: (table_size,), int32, from −2³¹.

        The lengths of the intervals are proportional to p.

        Example:
            >>> DirichletHash(alpha=1e9).state(4).float().div(2**30).round().tolist()
            [-2.0, -1.0, 0.0, 1.0]
        """
        cumulative = log_gammas(self.alpha, table_size, self.seed).softmax(dim=0).cumsum(dim=0)
        ends = (cumulative * 2.0**32).round().long().clamp(max=(1 << 32) - 1)
        return (torch.cat([ends.new_zeros(1), ends[:-1]]) - (1 << 31)).to(torch.int32)

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        starts = (self.state(table_size) if drawn is None else drawn).to(ids.device)
        return torch.searchsorted(starts, (hash32(ids, self.seed) - (1 << 31)).to(torch.int32), right=True) - 1

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        starts = self.state(table_size).double()
        return torch.diff(starts, append=starts.new_tensor([2.0**31])) / 2.0**32


def log_gammas(alpha: float, count: int, seed: int) -> Tensor:
    """Return logarithms of independent Gamma(α) samples; float64, (count,).

    Rejection samples Gamma(α + 1), and adding ``log(U) / α`` gives Gamma(α). Logarithms are needed because for small α
    most samples are below the smallest float64.

    Source: G. Marsaglia and W. W. Tsang, A simple method for generating gamma variables, 2000.
    """
    shift = alpha + 1 - 1 / 3  # d
    slope = 1 / math.sqrt(9 * shift)  # c
    draws = torch.full((count,), math.nan, dtype=torch.float64, device="cpu")
    for attempt in range(64):
        rejected = draws.isnan().nonzero().flatten()
        if not len(rejected):
            break
        first, second, third = (_uniform(rejected, seed, 4 * attempt + part) for part in range(3))
        normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
        root = 1 + slope * normal
        cube = root.clamp(min=1e-12) ** 3
        accepted = (root > 0) & (third.log() < normal**2 / 2 + shift * (1 - cube + cube.log()))
        draws[rejected] = torch.where(accepted, (shift * cube).log(), math.nan)
    assert not draws.isnan().any()
    return draws + _uniform(torch.arange(count, device="cpu"), seed, 3).log() / alpha


def _uniform(ids: Tensor, seed: int, stream: int) -> Tensor:
    """Return a number in (0, 1) for each identifier, with 32 random bits."""
    return (hash32(ids, (seed ^ _DIRICHLET) + (stream << 32)).double() + 0.5) / 2.0**32


@dataclass(frozen=True)
class NeighborhoodHash(SeededHash):
    """Draw a slot near the slot of the modulus hash: ``(i + U{−r, …, r}) mod n``.

    Radius 0 gives the modulus hash; a radius of n / 2 or more gives the uniform hash.

    Args:
        radius: r ≥ 0.
        seed: any integer; hashes with equal seeds return equal slots.

    Raises:
        ConfigurationError: the radius is negative.
    """

    has_zeros = False
    radius: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("radius", self.radius, "[0, inf)")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        bits, width = hash32(ids, self.seed), 2 * self.radius + 1
        if width > table_size:
            return reduce_range(bits, table_size)
        return (ids + reduce_range(bits, width) - self.radius) % table_size

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        width = 2 * self.radius + 1
        if width > table_size:
            return _equal_probabilities(table_size)
        centers = F.pad(_cycle_probabilities(count, table_size)[None], (self.radius, self.radius), mode="circular")
        return centers[0].unfold(0, width, 1).mean(dim=1)


@dataclass(frozen=True)
class XXHash(SeededHash):
    """Use the xxh32 digest of the identifier, modulo n. With ``sign=True``, layers are HashedNets.

    Args:
        seed: in [0, 2³²).

    Source: W. Chen, J. T. Wilson, S. Tyree, K. Q. Weinberger and Y. Chen, Compressing neural networks with the hashing
    trick, 2015.
    """

    has_zeros = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, f"[0, {1 << 32})")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return xxh32(ids, self.seed) % table_size

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return _equal_probabilities(table_size)

    @override
    def sign(self, ids: Tensor) -> Tensor:
        return 1 - 2 * (xxh32(ids, self.seed ^ SIGN) & 1)

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        if table_size is not None:
            check_range("the number of weights of an XXHash", sum(map(math.prod, shapes)), f"[1, {1 << 32}]")


@dataclass(frozen=True)
class BlockHash(SeededHash):
    """Draw the first slot of each block of consecutive weights; the block reads contiguous slots.

    Args:
        block: number of weights in a block, at most the size of the table.
        seed: any integer; hashes with equal seeds return equal slots.

    Example:
        >>> BlockHash(block=3, seed=0).index(count=6, table_size=9).tolist()
        [4, 5, 6, 2, 3, 4]

    Source: A. Desai, L. Chou and A. Shrivastava, Random offset block embedding array (ROBE) for CriteoTB benchmark
    MLPerf DLRM model, 2021.
    """

    has_zeros = False
    block: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("block", self.block, "[1, inf)")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return reduce_range(hash32(ids // self.block, self.seed), table_size - self.block + 1) + ids % self.block

    @override
    def fast_path(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        keys = splitmix64(self.seed) if type(self).slot is BlockHash.slot else None
        slot = partial(self.slot, table_size=table_size)
        return Blocks(tuple(shape), self.block, first, slot, keys, table_size - self.block + 1)

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        if table_size is not None:
            check_count("block", self.block, f"[1, {table_size}]")

    @override
    @_none_if_slot_overridden
    def probabilities(self, count: int, table_size: int) -> Tensor:
        covering = torch.arange(1, table_size + 1, dtype=torch.float64, device="cpu")
        covering = torch.minimum(covering, covering.flip(0)).clamp(max=min(self.block, table_size - self.block + 1))
        return covering / covering.sum()


@dataclass(frozen=True)
class RecurrentHash(ModulusHash):
    """Give layers of equal shapes the same weights and biases: a recurrent network.

    This is the modulus hash over all layers, with a table of the size of one layer. It needs ``scope="network"``.

    Args:
        layers: number of layers that share the table.

    Raises:
        ConfigurationError: the weights do not form ``layers`` layers of equal shapes.
    """

    include_biases = True
    layers: int = 1

    def __post_init__(self) -> None:
        check_counts(layers=self.layers)

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        if scope == "layer":
            raise ConfigurationError(f"{self} shares the weights of layers: use scope='network'")
        sizes = [*map(tuple, shapes)]
        if scope == "network" and sizes != sizes[: len(sizes) // self.layers] * self.layers:
            raise ConfigurationError(
                f"weights of shapes {listed(map(str, sizes))} are not those of {self.layers} equal layers"
            )

    @override
    def table_size(self, count: int) -> int:
        if count % self.layers:
            raise ConfigurationError(f"{count} weights are not those of {self.layers} equal layers")
        return count // self.layers


@dataclass(frozen=True)
class ToeplitzHash(Hash):
    """Give a linear layer the weights of a convolution: its matrix is doubly block Toeplitz, and zero elsewhere.

    The layer takes flattened images (in_channels, height, width) and returns flattened images of the convolution's
    output size. Row u = (j, k) and column v = (r, c) of a pair of channels read the kernel's entry
    ``(r + padding − stride · j, c + padding − stride · k) / dilation`` if that is an integer inside the kernel.

    Args:
        in_channels: input channels of the convolution.
        out_channels: output channels of the convolution.
        input_size: height and width of the images.
        kernel_size: height and width of the kernel.
        stride: stride of the convolution.
        padding: zero padding on both sides.
        dilation: dilation of the convolution.

    Raises:
        ConfigurationError: the kernel does not fit the images, or the layer has another size.

    Example:
        >>> ToeplitzHash(1, 1, input_size=(1, 4), kernel_size=(1, 2)).index(count=12, table_size=2).view(3, 4)
        tensor([[ 0,  1, -1, -1],
                [-1,  0,  1, -1],
                [-1, -1,  0,  1]])

    Source: O. Chang and H. Lipson, Balanced and deterministic weight-sharing helps network performance, 2018, with
    equation 6 corrected.
    """

    in_channels: int
    out_channels: int
    input_size: Size
    kernel_size: Size
    stride: Size = 1
    padding: Size = 0
    dilation: Size = 1

    def __post_init__(self) -> None:
        check_counts(in_channels=self.in_channels, out_channels=self.out_channels)
        for name, least in {"input_size": 1, "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}.items():
            object.__setattr__(self, name, pair(getattr(self, name)))  # so that 3, [3, 3] and (3, 3) have the same repr
            for size in getattr(self, name):
                check_count(name, size, f"[{least}, inf)")
        if min(self.output_size) < 1:
            raise ConfigurationError(f"a kernel of {self.kernel_size} does not fit images of {self.input_size}")

    def _axes(self, *sizes: Size) -> Any:
        """Yield, for each axis, the given sizes, then kernel size, stride, padding and dilation."""
        return zip(*map(pair, (*sizes, self.kernel_size, self.stride, self.padding, self.dilation)), strict=True)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Height and width of the output."""
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in self._axes(self.input_size)
        )

    @property
    def features(self) -> tuple[int, int]:
        """Output and input features of the linear layer."""
        return self.out_channels * math.prod(self.output_size), self.in_channels * math.prod(pair(self.input_size))

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        out, j, k, into, r, c = torch.unravel_index(
            ids, (self.out_channels, *self.output_size, self.in_channels, *pair(self.input_size))
        )
        slot, fits = out * self.in_channels + into, torch.ones_like(ids, dtype=torch.bool)
        for (kernel, stride, padding, dilation), target, source in zip(self._axes(), (j, k), (r, c), strict=True):
            offset = source + padding - stride * target
            fits &= (offset % dilation == 0) & (offset >= 0) & (offset < kernel * dilation)
            slot = slot * kernel + offset // dilation
        return torch.where(fits, slot, -1)

    @override
    def fast_path(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return Convolution(
            images=(self.in_channels, *pair(self.input_size)),
            kernels=(self.out_channels, self.in_channels, *pair(self.kernel_size)),
            stride=pair(self.stride),
            padding=pair(self.padding),
            dilation=pair(self.dilation),
        )

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        for shape in shapes if table_size is None else ():
            self._check(tuple(shape) == self.features, tuple(shape))

    @override
    def table_size(self, count: int) -> int:
        self._check(count == math.prod(self.features), count)
        return self.out_channels * self.in_channels * math.prod(pair(self.kernel_size))

    def _check(self, fits: bool, weights: object) -> None:
        if not fits:
            raise ConfigurationError(
                f"{self} is for a linear layer from {self.features[1]} to {self.features[0]}, not for {weights} weights"
            )


@dataclass(frozen=True, eq=False)
class CodebookHash(Hash):
    """Use given assignments, for example from a clustering.

    Args:
        assignments: the slot of each weight, integers in [−1, table_size), (count,); −1 makes the weight zero.
    """

    assignments: Tensor

    def __post_init__(self) -> None:
        flat = self.assignments.flatten()
        object.__setattr__(self, "assignments", flat.to(_smallest_dtype(int(flat.max()) + 1 if len(flat) else 1)))

    @override
    def state(self, table_size: int) -> Tensor:
        return self.assignments.to(_smallest_dtype(table_size))

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return (self.assignments if drawn is None else drawn).to(ids.device)[ids].long()

    @override
    def validate(
        self, shapes: Sequence[Sequence[int]], table_size: int | None = None, scope: str | None = None
    ) -> None:
        super().validate(shapes, table_size, scope)
        if table_size is not None:
            if (count := sum(map(math.prod, shapes))) != self.assignments.numel():
                raise ConfigurationError(f"{self.assignments.numel()} assignments do not fit {count} weights")
            for extreme in self.assignments.aminmax():
                check_range("each assignment", int(extreme), f"[-1, {table_size})")

    def __repr__(self) -> str:
        return f"CodebookHash({self.assignments.numel()} assignments)"


def _smallest_dtype(table_size: int) -> torch.dtype:
    """Return the smallest integer type for the slots of a table and −1."""
    return torch.int8 if table_size <= 1 << 7 else torch.int16 if table_size <= 1 << 15 else torch.int32


def hash32(ids: Tensor, seed: int) -> Tensor:
    """Return 32 pseudo-random bits for each identifier, independent for different seeds.

    Multiplications and shifts mix the low 32 bits of an identifier with two keys from the seed. The high bits are first
    folded into the low bits.

    Args:
        ids: int64, of any shape.
        seed: any integer.

    Returns:
        int64, in [0, 2³²).

    Example:
        >>> hash32(torch.arange(3), seed=0).tolist()
        [2872864583, 1772158550, 138880084]
    """
    low_key, high_key = splitmix64(seed)
    x = ((ids ^ ((ids >> 32) * 0x9E3779B1)) + low_key) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D & _LOW) ^ high_key
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def reduce_range(bits: Tensor, count: int) -> Tensor:
    """Map 32-bit integers to [0, count); each result is equally frequent to within 2⁻³² · count."""
    return (bits * count) >> 32


def xxh32(ids: Tensor, seed: int) -> Tensor:
    """Return the xxh32 digest of each identifier as four little-endian bytes.

    Args:
        ids: int64, in [0, 2³²).
        seed: in [0, 2³²).

    Returns:
        int64, in [0, 2³²).

    Example:
        >>> xxh32(torch.tensor([0, 1]), seed=0).tolist()
        [148298089, 4089149075]

    Source: Y. Collet, xxHash fast digest algorithm, 2012-2021, https://github.com/Cyan4973/xxHash.
    """
    x = (ids * _PRIME_3 + (seed + _PRIME_5 + 4)) & _LOW
    x = (((x << 17) | (x >> 15)) & _LOW) * _PRIME_4 & _LOW
    x = (x ^ (x >> 15)) * _PRIME_2 & _LOW
    x = (x ^ (x >> 13)) * _PRIME_3 & _LOW
    return x ^ (x >> 16)


def splitmix64(seed: int) -> tuple[int, int]:
    """Return two 32-bit keys for a seed: the halves of its splitmix64 hash."""
    mask = (1 << 64) - 1
    z = (seed + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z & _LOW, z >> 32
