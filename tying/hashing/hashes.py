"""Hashes: which table entry each virtual weight uses."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, listed
from tying.hashing.fast_paths import Blocks, FastPath, RepeatedRows, Size, both
from tying.hashing.integers import hash32, reduce_range, xxh32

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

    include_biases: ClassVar[bool] = False  # biases and norms too, and each weight as it is, without a scale

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
        return 1 - 2 * (hash32(ids, getattr(self, "seed", 0) + SIGN) & 1)

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

    def structure(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
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
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
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
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return RepeatedRows(tuple(shape), table_size, first % table_size)

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        whole, rest = divmod(count, table_size)
        loads = torch.full((table_size,), float(whole), dtype=torch.float64, device="cpu")
        loads[:rest] += 1
        return loads / count


_TAG = 0x4449524943484C45  # sets these draws apart from those of slots


def cumulative(alpha: float, count: int, seed: int) -> Tensor:
    """Return where each entry's share of the 32-bit integers begins, for shares p ~ Dir(α, …, α).

    Args:
        alpha: α > 0.
        count: number of entries.
        seed: any integer.

    Returns:
        int32, (count,), not decreasing, from −2³¹.

    Example:
        >>> cumulative(1e9, 4, seed=0).float().div(2**30).round().tolist()
        [-2.0, -1.0, 0.0, 1.0]
    """
    shares = log_gammas(alpha, count, seed).softmax(dim=0)
    ends = (shares.cumsum(dim=0) * 2.0**32).round().long().clamp(max=(1 << 32) - 1)
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (first - (1 << 31)).to(torch.int32)


def log_gammas(alpha: float, count: int, seed: int) -> Tensor:
    """Return logarithms of independent Gamma(α) draws; float64, (count,).

    They are drawn as Gamma(α + 1) by rejection, and brought down by ``log(U) / α``: in logarithms, since for small α
    most draws are below the smallest number.

    Source: G. Marsaglia and W. W. Tsang, A simple method for generating gamma variables, 2000.
    """
    shift = alpha + 1 - 1 / 3  # d
    slope = 1 / math.sqrt(9 * shift)  # c
    drawn = torch.full((count,), math.nan, dtype=torch.float64, device="cpu")
    for attempt in range(64):
        todo = drawn.isnan().nonzero().flatten()
        if not len(todo):
            break
        first, second, third = (_uniform(todo, seed, 4 * attempt + part) for part in range(3))
        normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
        root = 1 + slope * normal
        cube = root.clamp(min=1e-12) ** 3
        accepted = (root > 0) & (third.log() < normal**2 / 2 + shift * (1 - cube + cube.log()))
        drawn[todo] = torch.where(accepted, (shift * cube).log(), math.nan)
    assert not drawn.isnan().any()
    return drawn + _uniform(torch.arange(count, device="cpu"), seed, 3).log() / alpha


def _uniform(ids: Tensor, seed: int, stream: int) -> Tensor:
    """Return numbers in (0, 1), 32 bits each."""
    return (hash32(ids, (seed ^ _TAG) + (stream << 32)).double() + 0.5) / 2.0**32


class SeededHash(Hash):
    """A hash that draws; a frozen dataclass, one of whose fields is the seed.

    Attributes:
        seed: any integer; equal seeds draw alike.
    """

    seed: int

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if not isinstance(self.seed, int):
            raise ConfigurationError(f"seed must be an integer, not {self.seed!r}")

    @override
    def seeded(self, salt: int) -> Self:
        salted: Self = replace(self, seed=self.seed ^ salt)  # type: ignore[type-var]  # subclasses are dataclasses
        return salted


@dataclass(frozen=True)
class UniformHash(SeededHash):
    """Draws each entry independently and uniformly.

    Args:
        seed: any integer; equal seeds draw alike.

    Example:
        >>> UniformHash(seed=0).index(count=6, table_size=4).tolist()
        [2, 1, 0, 1, 0, 0]
    """

    seed: int = 0

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return reduce_range(hash32(ids, self.seed), table_size)

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        return torch.full((table_size,), 1 / table_size, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class DirichletHash(SeededHash):
    """Draws entries independently with probabilities p that are drawn once: ``p ~ Dir(α, …, α)``.

    Args:
        alpha: α > 0; small: few entries have most weights, large: all have alike.
        seed: any integer; equal seeds draw alike.

    Raises:
        ConfigurationError: α is not above 0, or not finite.

    Example:
        >>> DirichletHash(alpha=0.1, seed=1).index(count=8, table_size=4).unique().tolist()
        [1]
    """

    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConfigurationError(f"alpha must be above 0 and finite, not {self.alpha}")
        object.__setattr__(self, "alpha", float(self.alpha))  # 1 and 1.0 are one description

    @override
    def draw(self, table_size: int) -> Tensor:
        return cumulative(self.alpha, table_size, self.seed)

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        first = (self.draw(table_size) if drawn is None else drawn).to(ids.device)
        bits = (hash32(ids, self.seed) - (1 << 31)).to(torch.int32)
        return torch.searchsorted(first, bits, right=True) - 1

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        first = self.draw(table_size).double()
        return torch.diff(first, append=first.new_tensor([2.0**31])) / 2.0**32


@dataclass(frozen=True)
class NeighborhoodHash(SeededHash):
    """Draws an entry near that of the modulus: ``(i + U{−r, …, r}) mod n``.

    Radius 0 is the modulus; from n / 2 on it is the uniform hash.

    Args:
        radius: r ≥ 0.
        seed: any integer; equal seeds draw alike.

    Raises:
        ConfigurationError: the radius is negative.
    """

    radius: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ConfigurationError(f"radius must be 0 or more, not {self.radius}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        if 2 * self.radius >= table_size:
            return reduce_range(hash32(ids, self.seed), table_size)
        return (ids + reduce_range(hash32(ids, self.seed), 2 * self.radius + 1) - self.radius) % table_size

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        if 2 * self.radius >= table_size:
            return UniformHash().probabilities(count, table_size)
        width = 2 * self.radius + 1
        loads = ModulusHash().probabilities(count, table_size)
        around = torch.cat([loads[table_size - self.radius :], loads, loads[: self.radius]])
        return around.unfold(0, width, 1).mean(dim=1)


@dataclass(frozen=True)
class XXHash(UniformHash):
    """Takes xxh32 of the identifier, modulo n: HashedNets, with ``sign=True`` of the layer.

    Args:
        seed: in [0, 2³²).

    Source: W. Chen, J. T. Wilson, S. Tyree, K. Q. Weinberger and Y. Chen, Compressing neural networks with the hashing
    trick, 2015.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ConfigurationError(f"the seed of xxh32 is in [0, 2^32), not {self.seed}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return xxh32(ids, self.seed) % table_size

    probabilities = UniformHash.probabilities

    @override
    def sign(self, ids: Tensor) -> Tensor:
        return 1 - 2 * (xxh32(ids, self.seed ^ SIGN) & 1)

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if count > 1 << 32:
            raise ConfigurationError(f"xxh32 takes identifiers below 2^32, and there are {count} weights")


@dataclass(frozen=True)
class BlockHash(SeededHash):
    """Draws where each block of successive weights begins, and reads it contiguously.

    Args:
        block: number of weights that are read together, at most the size of the table.
        seed: any integer; equal seeds draw alike.

    Example:
        >>> BlockHash(block=3, seed=0).index(count=6, table_size=9).tolist()
        [4, 5, 6, 2, 3, 4]

    Source: A. Desai, L. Chou and A. Shrivastava, Random offset block embedding array (ROBE) for CriteoTB benchmark
    MLPerf DLRM model, 2021.
    """

    block: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigurationError(f"a block has at least one weight, not {self.block}")

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        return self._starts(table_size, ids // self.block) + ids % self.block

    def _starts(self, table_size: int, blocks: Tensor) -> Tensor:
        return reduce_range(hash32(blocks, self.seed), table_size - self.block + 1)

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return Blocks(tuple(shape), self.block, first, partial(self._starts, table_size))

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if self.block > table_size:
            raise ConfigurationError(f"a block of {self.block} is longer than the table of {table_size}")

    @override
    def probabilities(self, count: int, table_size: int) -> Tensor:
        covering = torch.arange(1, table_size + 1, dtype=torch.float64, device="cpu")
        covering = torch.minimum(covering, covering.flip(0)).clamp(max=min(self.block, table_size - self.block + 1))
        return covering / covering.sum()


@dataclass(frozen=True)
class RecurrentHash(ModulusHash):
    """Gives layers of one shape, biases included, the parameters of one: a recurrent network.

    It is the modulus over all of them, with a table of the size of one layer; see ``scope="network"``.

    Args:
        layers: how many use the table.

    Raises:
        ConfigurationError: the weights are not those of so many equal layers.
    """

    include_biases = True
    layers: int = 1

    @override
    def check_layers(self, shapes: Sequence[Sequence[int]], scope: str) -> None:
        if scope != "network":
            raise ConfigurationError(f"{self} shares the weights of layers: use scope='network'")
        each, over = divmod(len(shapes), max(1, self.layers))
        parts = [[tuple(shape) for shape in shapes[i * each : (i + 1) * each]] for i in range(self.layers)]
        if over or any(part != parts[0] for part in parts):
            raise ConfigurationError(
                f"weights of shapes {listed(map(str, map(tuple, shapes)))} are not those of {self.layers} equal layers"
            )

    @override
    def table_size(self, count: int) -> int:
        if self.layers < 1 or count % self.layers:
            raise ConfigurationError(f"{count} weights are not those of {self.layers} equal layers")
        return count // self.layers


@dataclass(frozen=True)
class ToeplitzHash(Hash):
    """Gives a linear layer the weights of a convolution: its matrix is doubly block Toeplitz, and zero elsewhere.

    The layer takes flattened images (in_channels, height, width) and returns flattened images of the convolution's
    output size. Row u = (j, k) and column v = (r, c) of a pair of channels use the kernel's entry
    ``(r + padding − stride · j, c + padding − stride · k) / dilation``, where that is whole and in the kernel.

    Args:
        in_channels: of the convolution.
        out_channels: of the convolution.
        input_size: height and width of the images.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution, zeros on both sides.
        dilation: of the convolution.

    Raises:
        ConfigurationError: the kernel does not fit the images, or the layer's size is another one.

    Example:
        >>> ToeplitzHash(1, 1, input_size=(1, 4), kernel_size=(1, 2)).index(count=12, table_size=2).view(3, 4)
        tensor([[ 0,  1, -1, -1],
                [-1,  0,  1, -1],
                [-1, -1,  0,  1]])

    Source: O. Chang and H. Lipson, Balanced and deterministic weight-sharing helps network performance, 2018, whose
    equation 6 is corrected here.
    """

    zeros: ClassVar[bool] = True
    in_channels: int
    out_channels: int
    input_size: Size
    kernel_size: Size
    stride: Size = 1
    padding: Size = 0
    dilation: Size = 1

    def __post_init__(self) -> None:
        for name, least in {"input_size": 1, "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}.items():
            size = both(getattr(self, name))
            object.__setattr__(self, name, size)  # 3, [3, 3] and (3, 3) are one description
            if min(size) < least:
                raise ConfigurationError(f"{name} must be {least} or more, not {min(size)}")
        if min(self.output_size) < 1:
            raise ConfigurationError(f"a kernel of {self.kernel_size} does not fit images of {self.input_size}")

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        arguments = (self.input_size, self.kernel_size, self.stride, self.padding, self.dilation)
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*map(both, arguments), strict=True)
        )
        return height, width

    @property
    def features(self) -> tuple[int, int]:
        """Outputs and inputs of the linear layer."""
        return self.out_channels * math.prod(self.output_size), self.in_channels * math.prod(both(self.input_size))

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        rows, columns = ids // self.features[1], ids % self.features[1]
        (out_height, out_width), (height, width) = self.output_size, both(self.input_size)
        out, j, k = rows // (out_height * out_width), rows // out_width % out_height, rows % out_width
        into, r, c = columns // (height * width), columns // width % height, columns % width
        index, fits = out * self.in_channels + into, torch.ones_like(ids, dtype=torch.bool)
        axes = zip(*map(both, (self.kernel_size, self.stride, self.padding, self.dilation)), strict=True)
        for (kernel, stride, padding, dilation), at, source in zip(axes, (j, k), (r, c), strict=True):
            offset = source + padding - stride * at
            fits &= (offset % dilation == 0) & (offset >= 0) & (offset < kernel * dilation)
            index = index * kernel + offset // dilation
        return torch.where(fits, index, -1)

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> FastPath | None:
        return self

    def weight(self, table: Tensor) -> Tensor:
        """Return the matrix: what the layer makes of each unit vector."""
        return self.linear(torch.eye(self.features[1], dtype=table.dtype, device=table.device), table).T

    def linear(self, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the flattened convolution of flattened images (..., in_channels · height · width), plus a bias."""
        images = x.reshape(math.prod(x.shape[:-1]), self.in_channels, *both(self.input_size))
        kernel = table.view(self.out_channels, self.in_channels, *both(self.kernel_size))
        stride, padding, dilation = both(self.stride), both(self.padding), both(self.dilation)
        output = F.conv2d(images, kernel, None, stride, padding, dilation).reshape(*x.shape[:-1], self.features[0])
        return output if bias is None else output + bias.to(output.dtype)

    @override
    def check_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != self.features:
            out, into = self.features
            raise ConfigurationError(
                f"{self} is for a linear layer from {into} to {out}, not for {tuple(shape)} weights"
            )

    @override
    def table_size(self, count: int) -> int:
        if count != math.prod(self.features):
            out, into = self.features
            raise ConfigurationError(f"{self} is for a linear layer from {into} to {out}, not for {count} weights")
        return self.out_channels * self.in_channels * math.prod(both(self.kernel_size))


@dataclass(frozen=True, eq=False)
class CodebookHash(Hash):
    """Takes the assignments that it is given: those of a clustering.

    Args:
        assignments: the entry of each weight, integers in [−1, table_size), (count,); −1 is a weight that is zero.
    """

    assignments: Tensor

    def __post_init__(self) -> None:
        held = self.assignments.flatten()
        object.__setattr__(self, "assignments", held.to(_least(int(held.max()) + 1 if len(held) else 1)))

    @override
    def draw(self, table_size: int) -> Tensor:
        return self.assignments.to(_least(table_size))

    @override
    def slot(self, ids: Tensor, table_size: int, drawn: Tensor | None = None) -> Tensor:
        held = self.draw(table_size) if drawn is None else drawn
        return held.to(ids.device)[ids].long()

    @override
    def check(self, count: int, table_size: int) -> None:
        super().check(count, table_size)
        if count != self.assignments.numel():
            raise ConfigurationError(f"{self.assignments.numel()} assignments do not fit {count} weights")
        low, high = map(int, self.assignments.aminmax())
        if low < -1 or high >= table_size:
            raise ConfigurationError(f"assignments from {low} to {high} do not fit a table of {table_size} entries")

    def __repr__(self) -> str:
        return f"CodebookHash({self.assignments.numel()} assignments)"


def _least(table_size: int) -> torch.dtype:
    """Return the smallest type that holds the entries of a table, and −1."""
    return torch.int8 if table_size <= 1 << 7 else torch.int16 if table_size <= 1 << 15 else torch.int32
