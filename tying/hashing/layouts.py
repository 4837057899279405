"""Hashes that follow a layout: contiguous blocks, convolutions, layers one after another, given assignments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError, listed
from tying.hashing.hashes import Hash, ModulusHash
from tying.hashing.mixing import below, mix
from tying.hashing.seeded import SeededHash
from tying.hashing.structure import Blocks, Size, Structure, both


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
        return below(mix(blocks, self.seed), table_size - self.block + 1)

    @override
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
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

    takes_vectors = True
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
    def structure(self, shape: Sequence[int], table_size: int, first: int) -> Structure | None:
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
