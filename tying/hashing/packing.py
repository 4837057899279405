"""Save and load clustered weights in packed files, with a few bits per weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
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
FILLER = (1 << GAP_BITS) - 1  # a gap of this many zeros without a weight after it


@dataclass(frozen=True)
class Packed:
    """A clustered weight, packed into the bits of its codebook, indices and gaps.

    Attributes:
        shape: shape of the weight.
        codebook: float32, (k,).
        indices: codebook indices of the nonzero weights, ⌈log₂ k⌉ bits each, packed.
        gaps: number of zeros before each nonzero weight, 5 bits each, packed; 31 means 31 zeros without a weight after
            them.
        counts: number of indices, and of gaps.
    """

    shape: tuple[int, ...]
    codebook: Tensor
    indices: Tensor
    gaps: Tensor
    counts: tuple[int, int]

    @property
    def bits(self) -> int:
        """Number of bits of codebook, indices and gaps."""
        return 32 * len(self.codebook) + index_bits(len(self.codebook)) * self.counts[0] + GAP_BITS * self.counts[1]


def index_bits(clusters: int) -> int:
    """Return the number of bits of an index into a codebook.

    Example:
        >>> index_bits(32), index_bits(33), index_bits(1)
        (5, 6, 1)
    """
    return max(1, math.ceil(math.log2(clusters)))


def packed(assignments: Tensor, codebook: Tensor) -> Packed:
    """Pack a clustered weight.

    Args:
        assignments: slot of each weight, −1 for zero; of the weight's shape.
        codebook: (k,).

    Example:
        >>> content = packed(torch.tensor([[0, -1], [-1, 1]]), torch.tensor([0.5, 2.0]))
        >>> content.bits, unpacked(content)
        (76, tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]]))
    """
    indices, gaps = indices_and_gaps(assignments)
    return Packed(
        shape=tuple(assignments.shape),
        codebook=codebook.detach().float().cpu().clone(),
        indices=_pack(indices, index_bits(len(codebook))),
        gaps=_pack(gaps, GAP_BITS),
        counts=(len(indices), len(gaps)),
    )


def indices_and_gaps(assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots of nonzero weights, and the numbers of zeros before them, as in :class:`Packed`.

    Example:
        >>> indices_and_gaps(torch.tensor([3, -1, -1, 0]))
        (tensor([3, 0]), tensor([0, 2]))
    """
    flat = assignments.flatten().cpu()
    positions = (flat >= 0).nonzero().flatten()
    zeros = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    fillers = zeros // FILLER
    gaps = torch.full((int(fillers.sum()) + len(positions),), FILLER)
    gaps[torch.arange(len(positions)) + fillers.cumsum(0)] = zeros % FILLER
    return flat[positions], gaps


def sizes(assignments: Sequence[Tensor], clusters: int) -> tuple[int, int]:
    """Return the number of bits of weights that share a codebook: packed, and with Huffman codes.

    Args:
        assignments: for each weight, the slots of its entries, −1 for zero.
        clusters: k.

    Example:
        >>> sizes([torch.tensor([0, -1, 0, 1])], clusters=2)
        (82, 70)

    Source: S. Han, H. Mao and W. J. Dally, Deep compression, 2016, sections 2 and 4.
    """
    indices, gaps = (torch.cat(parts) for parts in zip(*map(indices_and_gaps, assignments), strict=True))
    plain = index_bits(clusters) * len(indices) + GAP_BITS * len(gaps)
    return 32 * clusters + plain, 32 * clusters + huffman_bits(indices) + huffman_bits(gaps)


def huffman_bits(symbols: Tensor) -> int:
    """Return the number of bits of a Huffman code for symbols, without its table.

    Example:
        >>> huffman_bits(torch.tensor([0, 0, 0, 1, 2]))
        7
    """
    counts = sorted(torch.unique(symbols, return_counts=True)[1].tolist())  # a sorted list is a heap
    bits = 0
    while len(counts) > 1:  # joining the two rarest nodes adds one bit to each symbol below them
        node = heappop(counts) + heappop(counts)
        bits += node
        heappush(counts, node)
    return bits or sum(counts)  # if there is a single symbol, it takes one bit


def unpacked(content: Packed) -> Tensor:
    """Return the weight, float32."""
    gaps = _unpack("gaps", content.gaps, content.counts[1], GAP_BITS)
    positions = torch.where(gaps == FILLER, FILLER, gaps + 1).cumsum(0)[gaps != FILLER] - 1
    indices = _unpack("indices", content.indices, content.counts[0], index_bits(len(content.codebook)))
    return torch.zeros(math.prod(content.shape)).index_put((positions,), content.codebook[indices]).view(content.shape)


def clustered(model: nn.Module) -> dict[str, tuple[HashedParametrization, Tensor]]:
    """Return the parametrization and the codebook of each clustered weight of a model, by name."""
    return {name: (weight, table) for name, weight, table in hashed_in(model) if isinstance(weight.hash, CodebookHash)}


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Return all clustered weights of a model, packed, by name.

    Raises:
        ConfigurationError: a weight is signed.
    """
    weights = clustered(model)
    if signed := [name for name, (parametrization, _) in weights.items() if parametrization.sign]:
        raise ConfigurationError(f"{listed(signed)}: signed, which packed files do not hold")
    return {name: packed(weight.slots(), weight.scaled(table)) for name, (weight, table) in weights.items()}


def save_packed(model: nn.Module, path: Path | str) -> int:
    """Write all clustered weights of a model to a packed file; return its size in bytes.

    Raises:
        ConfigurationError: no weight is clustered.
    """
    if not (weights := packed_weights(model)):
        raise ConfigurationError("no weight of the model is clustered")
    with atomically(Path(path)) as temporary:
        torch.save({"version": VERSION, "weights": {name: vars(weight) for name, weight in weights.items()}}, temporary)
    return Path(path).stat().st_size


def load_packed(path: Path | str) -> dict[str, Tensor]:
    """Return the clustered weights in a file that :func:`save_packed` wrote, by name, in float32.

    ``model.load_state_dict(weights, strict=False)`` loads them into a plain model: it leaves other weights unchanged,
    and returns names without a counterpart as ``unexpected_keys``.

    Raises:
        ConfigurationError: the file is missing, damaged, or has another kind or version.
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
    """Return the number of bits of weights: dense in float32, and packed.

    Raises:
        ConfigurationError: a weight is not clustered.
    """
    weights = packed_weights(model)
    if missing := [name for name in names if name not in weights]:
        raise ConfigurationError(f"{listed(missing)}: not clustered")
    return sum(32 * math.prod(weights[n].shape) for n in names), sum(weights[n].bits for n in names)


def _pack(values: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(np.packbits((values.numpy()[:, None] >> np.arange(bits)) % 2 > 0))


def _unpack(name: str, content: Tensor, count: int, bits: int) -> Tensor:
    if len(content) != (size := math.ceil(count * bits / 8)):
        raise ConfigurationError(f"{name} of {len(content)} bytes, where {size} are due")
    spread = np.unpackbits(content.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy((spread.astype(np.int64) << np.arange(bits)).sum(axis=1))
