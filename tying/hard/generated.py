"""Weights that a small network generates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hard.applying import nearest_combination, parametrize_all
from tying.hard.places import places_of


def generate(embedding: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    """Return the basic kernel ``K_i = ⟨W_out, W_i z + B_i⟩ + B_out`` of an embedding z.

    Args:
        embedding: (..., N_z), z.
        inner: (N_in, d, N_z), W_i.
        inner_bias: (N_in, d), B_i.
        outer: (N_out, f, f, d), W_out.
        outer_bias: (N_out, f, f), B_out.

    Returns:
        (..., N_out, N_in, f, f).
    """
    hidden = torch.einsum("...z,idz->...id", embedding, inner) + inner_bias  # a_i
    return torch.einsum("...id,ofgd->...oifg", hidden, outer) + outer_bias[:, None]


class HyperWeight(nn.Module):
    """The parametrization of convolution kernels by a static hypernetwork; see :func:`generate`.

    One instance parametrizes any number of layers, and each of them keeps only its embeddings: one for each basic
    kernel that its own kernel is tiled from. Assigning a kernel takes the embeddings that come nearest.

    Args:
        in_channels: N_in of a basic kernel.
        out_channels: N_out of a basic kernel.
        kernel_size: f.
        embedding: size of an embedding, N_z.
        hidden: size of a hidden layer, d; that of the embedding by default.

    Raises:
        ConfigurationError: a kernel cannot be tiled from basic kernels.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = nn.Conv2d(16, 16, 7, bias=False)
        >>> hyper = HyperWeight(16, 16, 7, embedding=4)
        >>> sum(p.numel() for p in register_parametrization(layer, "weight", hyper).parameters())
        4244

    Source: D. Ha, A. Dai and Q. V. Le, HyperNetworks, 2016.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, embedding: int = 64, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = embedding if hidden is None else hidden
        self.inner = nn.Parameter(torch.randn(in_channels, hidden, embedding) / math.sqrt(embedding))
        self.inner_bias = nn.Parameter(torch.zeros(in_channels, hidden))
        scale = math.sqrt(2 / (in_channels * kernel_size**2 * hidden))  # kernels of Kaiming's variance
        self.outer = nn.Parameter(torch.randn(out_channels, kernel_size, kernel_size, hidden) * scale)
        self.outer_bias = nn.Parameter(torch.zeros(out_channels, kernel_size, kernel_size))

    @override
    def forward(self, embeddings: Tensor) -> Tensor:
        kernels = generate(embeddings, self.inner, self.inner_bias, self.outer, self.outer_bias)
        rows, columns, out, into, height, width = kernels.shape
        return kernels.transpose(1, 2).reshape(rows * out, columns * into, height, width)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        """Return the embeddings (rows, columns, N_z) of the nearest kernel."""
        out, into, size = self.outer.shape[0], self.inner.shape[0], self.outer.shape[1]
        if kernel.ndim != 4 or kernel.shape[0] % out or kernel.shape[1] % into or kernel.shape[2:] != (size, size):
            raise ConfigurationError(
                f"a kernel of shape {tuple(kernel.shape)} cannot be tiled from basic kernels of "
                f"{(out, into, size, size)}"
            )
        rows, columns = kernel.shape[0] // out, kernel.shape[1] // into
        tiles = kernel.detach().view(rows, out, columns, into, size, size).transpose(1, 2).reshape(rows * columns, -1)
        count = self.inner.shape[2]
        with torch.no_grad():
            at_zero = self(self.inner.new_zeros(1, 1, count)).flatten()
            basis = self(torch.eye(count, dtype=self.inner.dtype, device=self.inner.device).view(count, 1, count))
        slopes = basis.reshape(count, -1) - at_zero
        nearest = nearest_combination(slopes.T, (tiles - at_zero).T)
        return nearest.T.reshape(rows, columns, count).to(kernel.dtype)

    @override
    def extra_repr(self) -> str:
        return f"{self.inner.shape[0]}, {self.outer.shape[0]}, {self.outer.shape[1]}, embedding={self.inner.shape[2]}"


def generate_weights(
    model: nn.Module, parameters: Sequence[str], embedding: int = 64, in_channels: int = 16, out_channels: int = 16
) -> list[str]:
    """Let one hypernetwork generate convolution kernels of a model, of equal size; return their names.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` leaves out.
        embedding: size of the embedding of a basic kernel.
        in_channels: of a basic kernel.
        out_channels: of a basic kernel.

    Raises:
        ConfigurationError: a pattern matches nothing, or a kernel cannot be tiled from basic kernels; nothing is
            changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 3))
        >>> generate_weights(model, ["*.weight"], embedding=4)
        ['0.weight', '1.weight']
    """
    made: list[HyperWeight] = []

    def make(name: str, weight: nn.Parameter) -> HyperWeight:
        if weight.ndim != 4:
            raise ConfigurationError(
                f"a weight of shape {tuple(weight.shape)} is no kernel of a 2-d convolution: leave it out"
            )
        if not made:
            with torch.device("cpu"):  # as the weight may be, whatever new tensors are
                made.append(HyperWeight(in_channels, out_channels, weight.shape[-1], embedding).to(weight))
        return made[0]

    names = parametrize_all(model, parameters, make)
    places = places_of(model)
    with torch.no_grad():
        for name in names:
            embeddings = places[name].parameter
            embeddings.normal_(std=embeddings.shape[1] ** -0.5)  # a kernel of several tiles has more inputs
    return names
