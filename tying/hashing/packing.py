"""Clustered weights in few bits, and files that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tying.errors import ConfigurationError, listed
from tying.files import atomically, read
from tying.hashing.hashes import CodebookHash
from tying.hashing.parametrization import HashedParametrization
from tying.hashing.report import hashed_in

VERSION = 1  # of packed files
GAP_BITS = 5
FAR = (1 << GAP_BITS) - 1  # the gap that says: so many zeros, and no weight yet


@dataclass(frozen=True)
class Packed:
    """A clustered weight in as few bits as its codebook, indices and gaps take.

    Attributes:
        shape: of the weight.
        codebook: float32, (k,).
        indices: of the weights that are not zero, ⌈log₂ k⌉ bits each, packed.
        gaps: how many zeros stand before each of them, 5 bits each, packed; 31: so many, and no weight yet.
        counts: number of indices, and of gaps.
    """

    shape: tuple[int, ...]
    codebook: Tensor
    indices: Tensor
    gaps: Tensor
    counts: tuple[int, int]

    @property
    def bits(self) -> int:
        """Of all of it: codebook, indices and gaps."""
        return 32 * len(self.codebook) + index_bits(len(self.codebook)) * self.counts[0] + GAP_BITS * self.counts[1]


def index_bits(clusters: int) -> int:
    """Return how many bits an index takes.

    Example:
        >>> index_bits(32), index_bits(33), index_bits(1)
        (5, 6, 1)
    """
    return max(1, math.ceil(math.log2(clusters)))


def packed(assignments: Tensor, codebook: Tensor) -> Packed:
    """Pack a clustered weight.

    Args:
        assignments: which entry each weight is, −1 for zero; of the weight's shape.
        codebook: (k,).

    Example:
        >>> one = packed(torch.tensor([[0, -1], [-1, 1]]), torch.tensor([0.5, 2.0]))
        >>> one.bits, unpacked(one)
        (76, tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]]))
    """
    indices, gaps = indices_and_gaps(assignments)
    held = codebook.detach().float().cpu().clone()
    content = _pack(indices, index_bits(len(codebook))), _pack(gaps, GAP_BITS)
    return Packed(tuple(assignments.shape), held, *content, (len(indices), len(gaps)))


def indices_and_gaps(assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of weights that are not zero, and how many zeros stand before each, as :class:`Packed` says.

    Example:
        >>> indices_and_gaps(torch.tensor([3, -1, -1, 0]))
        (tensor([3, 0]), tensor([0, 2]))
    """
    flat = assignments.flatten().cpu()
    at = (flat >= 0).nonzero().flatten()
    zeros = torch.diff(at, prepend=at.new_tensor([-1])) - 1
    fillers, rest = zeros // FAR, zeros % FAR
    gaps = torch.full((int(fillers.sum()) + len(at),), FAR)
    gaps[torch.arange(len(at)) + fillers.cumsum(0)] = rest
    return flat[at], gaps


def sizes(assignments: Sequence[Tensor], clusters: int) -> tuple[int, int]:
    """Return the bits of weights that share a codebook: as :func:`packed` holds them, and with Huffman's codes.

    Args:
        assignments: of each weight, which entry each number is, −1 for zero.
        clusters: k.

    Example:
        >>> sizes([torch.tensor([0, -1, 0, 1])], clusters=2)
        (82, 70)

    Source: S. Han, H. Mao and W. J. Dally, Deep compression, 2016, sections 2 and 4.
    """
    parts = [indices_and_gaps(one) for one in assignments]
    indices, gaps = (torch.cat(column) for column in zip(*parts, strict=True))
    plain = index_bits(clusters) * len(indices) + GAP_BITS * len(gaps)
    return 32 * clusters + plain, 32 * clusters + huffman_bits(indices) + huffman_bits(gaps)


def huffman_bits(symbols: Tensor) -> int:
    """Return how many bits Huffman's code takes for symbols, its table apart.

    Example:
        >>> huffman_bits(torch.tensor([0, 0, 0, 1, 2]))
        7
    """
    counts = [int(count) for count in torch.unique(symbols, return_counts=True)[1]]
    if len(counts) == 1:
        return counts[0]
    heapify(counts)
    total = 0
    while len(counts) > 1:  # joining the two rarest gives each symbol below one bit more
        joined = heappop(counts) + heappop(counts)
        total += joined
        heappush(counts, joined)
    return total


def unpacked(one: Packed) -> Tensor:
    """Return the weight; float32."""
    bits = index_bits(len(one.codebook))
    for what, length in {"indices": bits * one.counts[0], "gaps": GAP_BITS * one.counts[1]}.items():
        held, due = len(getattr(one, what)), math.ceil(length / 8)
        if held != due:
            raise ConfigurationError(f"{what} of {held} bytes, where {due} are due")
    gaps = _unpack(one.gaps, one.counts[1], GAP_BITS)
    at = torch.where(gaps == FAR, FAR, gaps + 1).cumsum(0)[gaps != FAR] - 1
    weight = torch.zeros(math.prod(one.shape))
    weight[at] = one.codebook[_unpack(one.indices, one.counts[0], bits)]
    return weight.view(one.shape)


def clustered(model: nn.Module) -> dict[str, tuple[HashedParametrization, Tensor]]:
    """Return the clustered weights of a model, by name: the map from the codebook to the weight, and the codebook."""
    return {
        name: (virtual, table) for name, virtual, table in hashed_in(model) if isinstance(virtual.hash, CodebookHash)
    }


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Return all clustered weights of a model, packed, by name.

    Raises:
        ConfigurationError: one of them is signed.
    """
    weights = clustered(model)
    if signed := [name for name, (virtual, _) in weights.items() if virtual.sign]:
        raise ConfigurationError(f"{listed(signed)}: signed, which packed files do not hold")
    return {name: packed(virtual.slots(), virtual.scaled(table)) for name, (virtual, table) in weights.items()}


def save_packed(model: nn.Module, path: Path | str) -> int:
    """Write all clustered weights of a model to a file, packed; return its bytes.

    Raises:
        ConfigurationError: no weight is clustered.
    """
    weights = packed_weights(model)
    if not weights:
        raise ConfigurationError("no weight of the model is clustered")
    with atomically(Path(path)) as aside:
        torch.save({"version": VERSION, "weights": {name: vars(one) for name, one in weights.items()}}, aside)
    return Path(path).stat().st_size


def load_packed(path: Path | str) -> dict[str, Tensor]:
    """Return the weights in a file of :func:`save_packed`, by name, as a plain state dict holds them.

    These are the clustered ones alone, in float32; ``model.load_state_dict(weights, strict=False)`` leaves others as
    they are, and tells by ``unexpected_keys`` which of these the model has no place for.

    Raises:
        ConfigurationError: it is no such file, one of another version, or a damaged one.
    """
    content = read(path, "packed weights")
    if not isinstance(content, Mapping) or "version" not in content or "weights" not in content:
        raise ConfigurationError(f"{path} holds no packed weights")
    if content["version"] != VERSION:
        raise ConfigurationError(f"{path} is of version {content['version']}; this package reads version {VERSION}")
    try:
        return {name: unpacked(Packed(**fields)) for name, fields in content["weights"].items()}
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged: {error}") from None


def clustered_size(model: nn.Module, names: Sequence[str]) -> tuple[int, int]:
    """Return the bits of weights, dense in float32, and packed.

    Raises:
        ConfigurationError: one of them is not clustered.
    """
    weights = packed_weights(model)
    if missing := [name for name in names if name not in weights]:
        raise ConfigurationError(f"{listed(missing)}: not clustered")
    return sum(32 * math.prod(weights[n].shape) for n in names), sum(weights[n].bits for n in names)


def _pack(values: Tensor, bits: int) -> Tensor:
    spread = (values.numpy()[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8).ravel()))


def _unpack(content: Tensor, count: int, bits: int) -> Tensor:
    spread = np.unpackbits(content.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy((spread.astype(np.int64) << np.arange(bits)).sum(axis=1))
